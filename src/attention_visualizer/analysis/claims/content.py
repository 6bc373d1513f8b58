"""What is in the patches of images: ink, edges and points of strokes, and the strata in which they are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from attention_visualizer.data import ink, strokes
from attention_visualizer.measures.matched_patches import above_median, strata_of

Array = NDArray[Any]

POINTS = ("end points", "junctions", "bends")
KEY_POINTS = "key points"  # any of these


@dataclass(frozen=True)
class Content:
    grid: tuple[int, int]  # (height, width)
    amount: Array  # of ink, float [image, patch]
    inked: Array  # bool [image, patch]
    features: dict[str, Array]  # name -> whether a patch has it, bool [image, patch]
    strata: dict[str, Array]  # name -> the stratum within which a patch is compared, [image, patch], -1 for none

    @classmethod
    def of(cls, images: Tensor, grid: tuple[int, int]) -> Content:
        """images: uint8 [image, channel, height, width]."""
        found = strokes.find_strokes(ink.ink_pixels(images).numpy())
        points = {
            name: strokes.patches_with(pixels, grid)
            for name, pixels in zip(POINTS, (found.ends, found.junctions, found.bends), strict=True)
        }
        inked = ink.inked_patches(images, grid).numpy()
        edges = strokes.amount_in_patches(found.edges, grid)
        return cls.stratified(grid, ink.ink_amount(images, grid).numpy(), inked, points, edges)

    @classmethod
    def stratified(
        cls, grid: tuple[int, int], amount: Array, inked: Array, points: dict[str, Array], edges: Array
    ) -> Content:
        """Compare ink at one place; edges and points at one place among patches with about as much ink; each kind of
        point with ink that holds no point.

        edges: [image, patch], the share of pixels.
        """
        anywhere = np.ones(inked.shape, dtype=bool)
        similar_ink = strata_of(amount, inked)
        key_points = np.any(list(points.values()), axis=0)
        features = {"ink": inked, "edges": above_median(edges, similar_ink), **points, KEY_POINTS: key_points}
        strata = {"ink": strata_of(amount, anywhere, 1), "edges": similar_ink, KEY_POINTS: similar_ink}
        strata |= {name: np.where(has | ~key_points, similar_ink, -1) for name, has in points.items()}
        return cls(grid, amount, inked, features, strata)
