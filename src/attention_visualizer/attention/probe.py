"""A model's call repeated with other pictures and attention switched off: what its places are measured with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attention_visualizer.attention.function_call import FunctionCall
from attention_visualizer.attention.placement import PlacedKeys
from attention_visualizer.attention.policies import OneCallOff, OnlyItself, SwitchedOff
from attention_visualizer.support.double_precision import in_float64
from attention_visualizer.support.errors import ran_out_of_memory

Array = NDArray[Any]
QUERIES = "queries"  # among the moves of keys, those of the queries of the call that a pass ends with
STILL = 1e-6  # of the largest move: less is rounding, of keys that stay as they are
MAX_PICTURES = 16  # of 224 x 224 pixels in one pass, and fewer of larger ones
#: A call of a model, and what becomes of its attention -> the values of each attention call, by name, in their order:
#: [batch, head, key, column].
Record = Callable[[FunctionCall, SwitchedOff], dict[str, Tensor]]


@dataclass(frozen=True)
class CallPlaces:
    """The places of one attention call's keys, all windows of an image one after the other."""

    keys: PlacedKeys
    num_windows: int
    num_keys: int  # of a window
    image: tuple[int, int]  # pixels: height, width


class Probe:
    """A call of a model that is repeated with other pictures, each beside the unchanged one."""

    def __init__(self, call: FunctionCall, images: Tensor, record: Record) -> None:
        self.record = record
        self.call = call
        # All tensors of as many entries as there are images are cut to the first.
        self.of_batch: list[Tensor] = []
        num_images = len(images)
        for tensor in {id(tensor): tensor for tensor in call.tensors()}.values():
            if tensor.ndim and len(tensor) == num_images:
                first = tensor[:1].clone()
                self.call = self.call.replaced(tensor, first)
                self.of_batch.append(first)
                images = first if tensor is images else images
        self.image = images
        self.num_passes = 0
        self.policy: Callable[[], SwitchedOff] = SwitchedOff
        self.stop: int | None = None  # number of the call behind which passes may end
        self.at_once = max(1, min(4 * MAX_PICTURES, MAX_PICTURES * 224 * 224 // (images.shape[2] * images.shape[3])))
        self.windows: dict[str, int] = {}  # of each attention call
        self.keys: dict[str, int] = {}
        self.is_image = True  # rather than values that attention is called with
        policy = SwitchedOff()
        for name, values in self.values(images, policy).items():
            self.windows[name], self.keys[name] = len(values), values.shape[2]
            self.is_image = self.is_image and not (values.shape == images.shape and torch.equal(values, images))
        self.queries = policy.num_queries

    def values(self, pictures: Tensor, policy: SwitchedOff) -> dict[str, Tensor]:
        call = self.call
        for tensor in self.of_batch:
            call = call.replaced(
                tensor, pictures if tensor is self.image else tensor.expand(len(pictures), *tensor.shape[1:])
            )
        # What a model draws must not look like a place. Seeding devices that do not take part costs as much as a pass.
        (torch.default_generator if self.image.device.type == "cpu" else torch).manual_seed(self.num_passes)
        self.num_passes += 1
        return self.record(call, policy)

    def call_places(self, name: str, keys: PlacedKeys) -> CallPlaces:
        return CallPlaces(keys, self.windows[name], self.keys[name], (self.image.shape[2], self.image.shape[3]))

    def moves(self, pictures: Tensor) -> dict[str, Array]:
        """Return how far each key's values move from those of the unchanged picture: by name, [picture, key]."""
        parts: list[dict[str, Array]] = []
        start = 0
        while start < len(pictures):
            part = pictures[start : start + self.at_once]
            policy = self.policy()
            policy.stop = self.stop
            try:
                values = self.values(torch.cat([self.image, part]), policy)
            except Exception as error:
                if len(part) == 1 or not ran_out_of_memory(error):
                    raise
                self.at_once = len(part) // 2
                continue
            parts.append({name: self._moves(name, values.get(name), len(part)) for name in self._names(values)})
            if isinstance(policy, OnlyItself) and policy.weights is not None:
                parts[-1][QUERIES] = moves_of_queries(policy.weights, next(iter(parts[-1].values())))
            start += len(part)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _names(self, values: dict[str, Tensor]) -> list[str]:
        if self.stop is not None:
            return [list(self.windows)[self.stop]]
        if len(values) == len(self.windows):
            return list(self.windows)
        if len(values) % len(self.windows) == 0:
            raise UnmeasurableError("images are computed one by one, in a loop")
        raise UnmeasurableError("the number of its attention calls depends on the picture")

    def _moves(self, name: str, values: Tensor | None, number: int) -> Array:
        num_keys = self.windows[name] * self.keys[name]
        if values is None or values.shape[0] * values.shape[2] != (number + 1) * num_keys:
            return np.full((number, num_keys), np.nan)
        # [picture, key, head and column]
        each = values.unflatten(0, (number + 1, -1)).transpose(2, 3).flatten(3).flatten(1, 2)
        each = in_float64(each)
        return (each[1:] - each[:1]).square().mean(dim=-1).sqrt().cpu().numpy()

    def dependence(self) -> Array:
        """Return whether each call's values depend on what each call gave: bool [call, call that was switched off].

        By the least change, since layers may be scaled to almost nothing: more than between two pictures that nothing
        was switched off for.
        """
        names = list(self.windows)
        depends = np.zeros((len(names), len(names)), bool)
        for first in range(0, len(names), self.at_once):
            number = min(self.at_once, len(names) - first)
            pictures = self.image.expand(number + 2, *self.image.shape[1:])
            values = self.values(pictures, OneCallOff(first, number))
            for later, name in enumerate(names):
                moves = self._moves(name, values.get(name), number + 1).max(axis=1)
                depends[later, first : first + number] = moves[:-1] > moves[-1]
        return depends


def moves_of_queries(weights: Tensor, moves_of_keys: Array) -> Array:
    """Return how far each query moves from that of the first picture, seen in its weights for keys that do not, the sum
    of their softmax aside: [1 + picture, head, query, key], [picture, key] -> [picture, query]; NaN without two."""
    moving = torch.from_numpy(moves_of_keys > STILL * moves_of_keys.max()).to(weights.device)
    logarithms = weights.where(weights > torch.finfo(weights.dtype).tiny, torch.nan).log()
    change = (logarithms[1:] - logarithms[:1]).where(~moving[:, None, None, :], torch.nan)
    change = change.where((~change.isnan()).sum(dim=-1, keepdim=True) > 1, torch.nan)
    change = (change - change.nanmean(dim=-1, keepdim=True)).abs()
    return change.nanmean(dim=(1, 3)).cpu().numpy()


class UnmeasurableError(Exception):
    """A model computes pictures in a way that tells no places."""
