"""Deletion and insertion: how a model's answer falls as patches are taken from a picture in the order of a map, and how
it rises as they are put back (Samek et al., 2017; Petsiuk et al., 2018).

A ranking is an order of the patches, [image, patch], the most relevant one first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


def random_orders(num_images: int, num_patches: int, seed: int | Sequence[int] = 0) -> Array:
    """Draw an order of the patches for each image: [image, patch]."""
    return np.random.default_rng(seed).permuted(np.tile(np.arange(num_patches), (num_images, 1)), axis=1)


def ranking_of(maps: Array, seed: int = 0) -> Array:
    """Rank patches by falling value, equal ones in random order: [image, patch] -> [image, patch]."""
    return ranking_with_ties(maps, random_orders(len(maps), maps.shape[1], seed))


def ranking_with_ties(maps: Array, ties: Array) -> Array:
    """Rank patches by falling value, equal ones in the order of `ties`: [image, patch] twice -> [image, patch]."""
    order = np.argsort(-np.take_along_axis(maps, ties, axis=1), axis=1, kind="stable")
    return np.take_along_axis(ties, order, axis=1)


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
        #: What the model was asked already, (image, its visible patches) -> probability: rankings share many sets.
        self.known: dict[Operator, dict[tuple[int, bytes], float]] = {operator: {} for operator in OPERATORS}

    def curves(self, rankings: Array, operator: Operator) -> list[Curves]:
        """Run deletion and insertion along each ranking: [ranking, image, patch]."""
        places = np.argsort(rankings, axis=-1)  # of each patch in the order
        counts = step_sizes(rankings.shape[-1])
        deletion = np.stack([self.probabilities(places >= count, operator) for count in counts], axis=-1)
        insertion = np.stack([self.probabilities(places < count, operator) for count in counts], axis=-1)
        return [Curves(counts / rankings.shape[-1], *both) for both in zip(deletion, insertion, strict=True)]

    def probabilities(self, visible: Array, operator: Operator) -> Array:
        """Return the probability of each image's class with only the visible patches, the same number of them
        everywhere: bool [..., image, patch] -> [..., image]. The model is asked once for each picture."""
        if operator == "fill":
            visible = visible & ~self.background  # painted as background, these stay what they are
        flat, known = visible.reshape(-1, visible.shape[-1]), self.known[operator]
        keys = [(at % len(self.images), packed.tobytes()) for at, packed in enumerate(np.packbits(flat, axis=1))]
        first = {key: at for at, key in reversed(list(enumerate(keys))) if key not in known}
        if first:
            logits = self._logits_filled if operator == "fill" else self._logits_dropped
            images = torch.tensor([image for image, _ in first])
            with torch.no_grad():
                probability = logits(torch.from_numpy(flat[list(first.values())]), images).softmax(dim=-1)
            of_class = probability.gather(1, self.classes[images, None].to(probability.device))[:, 0]
            known.update(zip(first, of_class.tolist(), strict=True))
        return np.array([known[key] for key in keys]).reshape(visible.shape[:-1])

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
