"""Deletion and insertion: how a model's answer falls as patches are taken from a picture in the order of a map, and how
it rises as they are put back (Samek et al., 2017; Petsiuk et al., 2018).

A ranking is an order of the patches, [image, patch], the most relevant one first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attention_visualizer.data import ink
from attention_visualizer.models.vision_transformer import VisionTransformer

Array = NDArray[Any]
Operator = Literal["fill", "drop"]
OPERATORS: tuple[Operator, ...] = ("fill", "drop")
MAX_STEPS = 16


@dataclass(frozen=True)
class Curves:
    """Probability of each image's class as its most relevant patches are taken away first, or put back first."""

    shares: Array  # of the patches that are taken away or put back, [step]
    deletion: Array  # from the whole image, [image, step]
    insertion: Array  # from the empty image, [image, step]

    @classmethod
    def concatenate(cls, parts: list[Curves]) -> Curves:
        """Join the curves of parts of the images, in their order."""
        both = (np.concatenate([getattr(part, name) for part in parts]) for name in ("deletion", "insertion"))
        return cls(parts[0].shares, *both)

    @property
    def deletion_area(self) -> Array:
        """Return the mean probability over the shares, [image]: low where the map finds what the prediction needs."""
        return np.asarray(np.trapezoid(self.deletion, self.shares, axis=1))

    @property
    def insertion_area(self) -> Array:
        """Return the mean probability over the shares, [image]: high where the map finds what suffices for the
        prediction."""
        return np.asarray(np.trapezoid(self.insertion, self.shares, axis=1))


def ranking_of(maps: Array, seed: int = 0) -> Array:
    """Rank patches by falling value, equal ones in random order: [image, patch] -> [image, patch]."""
    shuffled = np.random.default_rng(seed).permuted(np.tile(np.arange(maps.shape[1]), (len(maps), 1)), axis=1)
    order = np.argsort(-np.take_along_axis(maps, shuffled, axis=1), axis=1, kind="stable")
    return np.take_along_axis(shuffled, order, axis=1)


def step_sizes(num_patches: int) -> Array:
    """The number of patches that are gone at each step, from none to all."""
    return np.unique(np.linspace(0, num_patches, min(num_patches, MAX_STEPS) + 1).round().astype(np.int64))


class Perturbation:
    """A model's probabilities for images of which some patches are hidden.

    All images go through the model at once, and their tokens stay in memory: give many of them in parts.
    images: uint8 [image, channel, height, width], on a background of 0; classes: [image], whose probability is asked
    for. "fill" paints hidden patches with the background, "drop" leaves their tokens out of the model's sequence.
    """

    def __init__(
        self, model: VisionTransformer, images: Tensor, classes: Array, to_input: Callable[[Tensor], Tensor]
    ) -> None:
        self.model, self.to_input = model, to_input
        self.images, self.classes = images, torch.from_numpy(classes)
        self.grid = model.grid_size
        self.background = (ink.ink_amount(images, self.grid) == 0).numpy()
        with torch.no_grad():
            self.tokens = model.embed(to_input(images))
        # For the whole and the empty image, which all curves share.
        nothing, everything = (np.full(self.background.shape, is_visible) for is_visible in (False, True))
        self.ends = {
            operator: (self.probabilities(nothing, operator), self.probabilities(everything, operator))
            for operator in OPERATORS
        }

    def curves(self, ranking: Array, operator: Operator) -> Curves:
        """Run deletion and insertion along a ranking [image, patch]."""
        places = np.argsort(ranking, axis=1)  # of each patch in the order
        num_patches = ranking.shape[1]
        counts = step_sizes(num_patches)
        empty, whole = self.ends[operator]
        return Curves(
            counts / num_patches,
            self._along([places >= count for count in counts], operator, whole, empty),
            self._along([places < count for count in counts], operator, empty, whole),
        )

    def _along(self, visible: list[Array], operator: Operator, first: Array, last: Array) -> Array:
        """Return the probabilities at each step [image, step], those at the ends being known."""
        steps = [first]
        for before, now in pairwise(visible[:-1]):
            changed = before != now
            if operator == "fill":
                changed &= ~self.background  # painted as background, these stay what they are
            rows = np.flatnonzero(changed.any(axis=1))
            probabilities = steps[-1].copy()
            probabilities[rows] = self.probabilities(now[rows], operator, rows)
            steps.append(probabilities)
        return np.stack([*steps, last], axis=1)

    def probabilities(self, visible: Array, operator: Operator, rows: Array | None = None) -> Array:
        """Return the probability of the class with only the visible patches, the same number of them in each image, of
        the images `rows` (None: all): bool [image, patch] -> [image]."""
        selected = torch.arange(len(self.images)) if rows is None else torch.from_numpy(rows)
        if not len(selected):
            return np.zeros(0)
        logits = self._logits_filled if operator == "fill" else self._logits_dropped
        with torch.no_grad():
            probability = logits(torch.from_numpy(visible), selected).softmax(dim=-1)
        of_class = probability.gather(1, self.classes[selected, None].to(probability.device))[:, 0]
        return np.asarray(of_class.cpu().double().numpy())

    def _logits_filled(self, visible: Tensor, rows: Tensor) -> Tensor:
        height, width = (side // count for side, count in zip(self.images.shape[2:], self.grid, strict=True))
        shown = visible.view(-1, 1, *self.grid).repeat_interleave(height, dim=2).repeat_interleave(width, dim=3)
        logits: Tensor = self.model(self.to_input(self.images[rows] * shown))
        return logits

    def _logits_dropped(self, visible: Tensor, rows: Tensor) -> Tensor:
        prefix = self.model.num_prefix_tokens
        tokens = self.tokens[rows.to(self.tokens.device)]
        patches = tokens[:, prefix:][visible.to(tokens.device)].view(len(tokens), -1, tokens.shape[2])
        if not prefix and not patches.shape[1]:  # the mean of no token: what the model says of nothing at all
            patches = torch.zeros_like(tokens[:, :1])
        return self.model.classify(torch.cat([tokens[:, :prefix], patches], dim=1))
