"""Deletion and insertion: how a model's answer falls as patches are taken from a picture in the order of a map, and how
it rises as they are put back (Samek et al., 2017; Petsiuk et al., 2018).

A ranking is an order of the patches, [image, patch], the most relevant one first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attention_visualizer.model import VisionTransformer

Array = NDArray[Any]
Operator = Literal["fill", "drop"]
OPERATORS: tuple[Operator, ...] = ("fill", "drop")
MOST_STEPS = 16
BATCH = 500


@dataclass(frozen=True)
class Curves:
    """Probability of each picture's class, [image, step], at `shares` [step] of the patches: deletion, from the whole
    picture, the most relevant patches taken away first; insertion, from the empty one, put back first."""

    shares: Array
    deletion: Array
    insertion: Array

    @property
    def deletion_area(self) -> Array:
        """Mean probability over the shares, [image]: low where the map finds what the answer needs."""
        return np.asarray(np.trapezoid(self.deletion, self.shares, axis=1))

    @property
    def insertion_area(self) -> Array:
        """[image]: high where the map finds what suffices for the answer."""
        return np.asarray(np.trapezoid(self.insertion, self.shares, axis=1))


def ranking_of(maps: Array, seed: int = 0) -> Array:
    """Patches by falling value, equal ones in random order: [image, patch] -> [image, patch]."""
    shuffled = np.random.default_rng(seed).permuted(np.tile(np.arange(maps.shape[1]), (len(maps), 1)), axis=1)
    order = np.argsort(-np.take_along_axis(maps, shuffled, axis=1), axis=1, kind="stable")
    return np.take_along_axis(shuffled, order, axis=1)


def step_sizes(num_patches: int) -> Array:
    """How many patches are gone at each step, from none to all."""
    return np.unique(np.linspace(0, num_patches, min(num_patches, MOST_STEPS) + 1).round().astype(np.int64))


class Perturbation:
    """Answers to pictures of which some patches are hidden.

    pictures: uint8 [image, channel, height, width], on a background of 0; classes: [image], whose probability is asked
    for. "fill" paints hidden patches with the background, "drop" leaves their tokens out of the model's sequence.
    """

    def __init__(
        self, model: VisionTransformer, pictures: Tensor, classes: Array, to_input: Callable[[Tensor], Tensor]
    ) -> None:
        self.model, self.to_input = model, to_input
        self.pictures, self.classes = pictures, torch.from_numpy(classes)
        self.grid = model.grid_size
        with torch.no_grad():
            self.tokens = torch.cat([model.embed(to_input(part)) for part in pictures.split(BATCH)])
        # Of the whole and the empty picture, which all curves share.
        nothing, everything = (np.full((len(pictures), self.grid[0] * self.grid[1]), each) for each in (False, True))
        self.ends = {each: (self.answers(nothing, each), self.answers(everything, each)) for each in OPERATORS}

    def curves(self, ranking: Array, operator: Operator) -> Curves:
        places = np.argsort(ranking, axis=1)  # of each patch in the order
        num_patches = ranking.shape[1]
        counts = step_sizes(num_patches)
        empty, whole = self.ends[operator]
        deletion = [self.answers(places >= count, operator) for count in counts[1:-1]]
        insertion = [self.answers(places < count, operator) for count in counts[1:-1]]
        return Curves(
            counts / num_patches,
            np.stack([whole, *deletion, empty], axis=1),
            np.stack([empty, *insertion, whole], axis=1),
        )

    def answers(self, kept: Array, operator: Operator) -> Array:
        """Probability of the class with only the kept patches, the same number of them in each picture: bool [image,
        patch] -> [image]."""
        run = self._filled if operator == "fill" else self._dropped
        mask = torch.from_numpy(kept)
        found = []
        with torch.no_grad():
            for start in range(0, len(mask), BATCH):
                rows = slice(start, start + BATCH)
                probability = run(mask[rows], rows).softmax(dim=-1)
                found.append(probability.gather(1, self.classes[rows, None].to(probability.device))[:, 0])
        return torch.cat(found).double().cpu().numpy()

    def _filled(self, kept: Tensor, rows: slice) -> Tensor:
        height, width = (side // count for side, count in zip(self.pictures.shape[2:], self.grid, strict=True))
        shown = kept.view(-1, 1, *self.grid).repeat_interleave(height, dim=2).repeat_interleave(width, dim=3)
        logits: Tensor = self.model(self.to_input(self.pictures[rows] * shown))
        return logits

    def _dropped(self, kept: Tensor, rows: slice) -> Tensor:
        prefix = self.model.num_prefix_tokens
        tokens = self.tokens[rows]
        patches = tokens[:, prefix:][kept.to(tokens.device)].view(len(tokens), -1, tokens.shape[2])
        if not prefix and not patches.shape[1]:  # the mean of no token: the model's answer to nothing at all
            patches = torch.zeros_like(tokens[:, :1])
        return self.model.classify(torch.cat([tokens[:, :prefix], patches], dim=1))
