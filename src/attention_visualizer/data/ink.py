"""Ink: what is drawn on the empty background of a digit, pixel by pixel and patch by patch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from attention_visualizer.data.image_sets import ImageSet

IMAGES_AT_ONCE = 1000  # bounds memory
BRIGHT = 128  # of 255, from which a pixel counts as ink
INKED = 0.04  # the share of a patch's pixels, from which it counts as inked: 2 of 49


def ink_pixels(images: Tensor) -> Tensor:
    """Return whether each pixel is ink: uint8 [image, channel, height, width] -> bool [image, height, width]."""
    return images.amax(dim=1) >= BRIGHT


def patch_shares(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the mean of each patch's pixels: [image, height, width] -> float32 [image, patch].

    Patches lie as in a Geometry: row by row, all of one size, pixels beyond the last whole patch left out.
    """
    height, width = pixels.shape[1] // grid[0], pixels.shape[2] // grid[1]
    whole = pixels[:, : grid[0] * height, : grid[1] * width].float()
    return whole.unflatten(2, (grid[1], width)).unflatten(1, (grid[0], height)).mean(dim=(2, 4)).flatten(1)


def ink_amount(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the mean brightness of each patch, 0 to 1: uint8 [image, channel, height, width] -> [image, patch]."""
    return patch_shares(images.amax(dim=1).float() / 255, grid)


def inked_patches(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return which patches hold ink: uint8 [image, channel, height, width] -> bool [image, patch]."""
    return patch_shares(ink_pixels(images), grid) >= INKED


def in_blocks(images: ImageSet, rows: NDArray[np.int64]) -> Iterator[tuple[slice, Tensor]]:
    """Yield the images of these rows, IMAGES_AT_ONCE at a time: where they stand in `rows`, and uint8 [image, channel,
    height, width]."""
    for start in range(0, len(rows), IMAGES_AT_ONCE):
        block = slice(start, start + IMAGES_AT_ONCE)
        yield block, images.read(rows[block].tolist())


def in_patches(
    measure: Callable[[Tensor, tuple[int, int]], Tensor],
    images: ImageSet,
    rows: NDArray[np.int64],
    grid: tuple[int, int],
) -> NDArray[Any]:
    """Apply `ink_amount` or `inked_patches` to the images of these rows in blocks of bounded memory: [image, patch]."""
    return np.concatenate([measure(block, grid).numpy() for _, block in in_blocks(images, rows)])


def border_patches(grid: tuple[int, int]) -> NDArray[np.bool_]:
    """Return which patches lie at the image's border: bool [patch]."""
    border = np.ones(grid, dtype=bool)
    border[1:-1, 1:-1] = False
    return border.ravel()
