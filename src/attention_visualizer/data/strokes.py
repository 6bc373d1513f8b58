"""Find the end points, junctions, bends and edges of strokes, from the skeleton of the ink."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.ndimage
import torch
from numpy.typing import NDArray
from skimage.morphology import skeletonize

from attention_visualizer.data.ink import patch_shares

Array = NDArray[Any]

# Neighbours of a pixel in the order of a circle, as (row, column).
CIRCLE = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))
TOUCHING = np.zeros((3, 3, 3), dtype=bool)  # eight neighbours, none of another image
TOUCHING[1] = True
BEND = 60.0  # degrees from which a stroke bends: twice what a straight line of pixels can seem to turn
REACH = 1 / 7  # of the image's side, how far along the stroke a turn is measured: 4 of 28 pixels
IMAGE_BATCH = 1000  # images at once: bounds memory


@dataclass(frozen=True)
class Strokes:
    """Pixels of images, bool [image, height, width] each."""

    skeleton: Array
    ends: Array  # one pixel for each point, like the next two
    junctions: Array
    bends: Array
    edges: Array  # ink beside background


def find_strokes(ink: Array) -> Strokes:
    """Find the strokes of images. ink: bool [image, height, width].

    The skeleton is scikit-image's (Zhang and Suen, 1984). By the crossing number of a skeleton pixel, the strokes that
    leave it (Rutovitz, 1966), 1 is an end and 3 or more a junction. A bend is where the skeleton turns by BEND or
    more between the two directions in which it is left after REACH, at least that far along it from any end and
    junction. Junctions or bends of pixels at most 3 apart are one, since thinning pulls a crossing apart; side branches
    shorter than REACH are cut off.
    """
    batches = [ink[start : start + IMAGE_BATCH] for start in range(0, len(ink), IMAGE_BATCH)] or [ink]
    parts = [_strokes_of_batch(batch) for batch in batches]
    return Strokes(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def patches_with(points: Array, grid: tuple[int, int]) -> Array:
    """Return which patches hold any of the pixels: bool [image, height, width] -> bool [image, patch]."""
    return amount_in_patches(points, grid) > 0


def amount_in_patches(pixels: Array, grid: tuple[int, int]) -> Array:
    """Return the share of each patch that the pixels take: bool [image, height, width] -> float32 [image, patch]."""
    return patch_shares(torch.from_numpy(np.ascontiguousarray(pixels)), grid).numpy()


def _strokes_of_batch(ink: Array) -> tuple[Array, ...]:
    reach = max(2, round(REACH * ink.shape[1]))
    skeleton = pruned(skeletons(ink), reach - 1)
    crossing = crossing_numbers(skeleton)
    ends = crossing == 1
    # Four strokes that meet at a diagonal leave a block of 2 x 2, of which no pixel has a crossing number above 2.
    junctions = one_of_each((crossing >= 3) | in_blocks(skeleton), crossing, apart=3)
    near = _along(skeleton, ends | junctions, reach - 1)
    turns = turns_of(skeleton, skeleton & (crossing == 2) & ~near, reach)
    bends = one_of_each(turns >= BEND, turns, apart=3)
    return skeleton, ends, junctions, bends, edges_of(ink)


def skeletons(ink: Array) -> Array:
    """Thin the ink of all images in one call: bool [image, height, width]. Thinning depends on neighbours only, and a
    margin separates the images."""
    if not ink.size:
        return ink.copy()
    padded = _padded(ink)
    thin = skeletonize(padded.reshape(-1, padded.shape[2]))
    return np.ascontiguousarray(thin.reshape(padded.shape)[:, 1:-1, 1:-1])


def pruned(skeleton: Array, length: int) -> Array:
    """Remove side branches of `length` pixels or fewer: thinning leaves such spurs at sharp corners of thick strokes.

    Ends are removed `length` times and grown back where a branch remains; pieces that vanish whole are restored.
    """
    remaining = skeleton
    for _ in range(length):
        remaining = remaining & (crossing_numbers(remaining) != 1)
    grown = remaining | _along(skeleton, remaining & (crossing_numbers(remaining) == 1), length)
    return grown | (skeleton & ~scipy.ndimage.binary_propagation(grown, TOUCHING, mask=skeleton))


def crossing_numbers(skeleton: Array) -> Array:
    """Count how often the circle around each skeleton pixel goes from background to ink: [image, height, width], 0
    elsewhere."""
    height, width = skeleton.shape[1:]
    padded = _padded(skeleton)
    circle = [padded[:, 1 + row : 1 + row + height, 1 + column : 1 + column + width] for row, column in CIRCLE]
    changes = np.zeros(skeleton.shape, dtype=np.int8)
    for first, second in zip(circle, circle[1:] + circle[:1], strict=True):
        changes += first ^ second
    return np.where(skeleton, changes // 2, 0)


def in_blocks(skeleton: Array) -> Array:
    """Return the pixels that belong to a full block of 2 x 2: bool [image, height, width]."""
    in_block = np.zeros_like(skeleton)
    for row in (-1, 1):
        for column in (-1, 1):
            in_block |= _shifted(skeleton, row, 0) & _shifted(skeleton, 0, column) & _shifted(skeleton, row, column)
    return in_block & skeleton


def edges_of(ink: Array) -> Array:
    """Return ink beside background above, below, left or right; the image's border is no background."""
    surrounded = np.ones_like(ink)
    padded = np.pad(ink, ((0, 0), (1, 1), (1, 1)), mode="edge")
    for rows, columns in (((0, -2), (1, -1)), ((2, None), (1, -1)), ((1, -1), (0, -2)), ((1, -1), (2, None))):
        surrounded &= padded[:, slice(*rows), slice(*columns)]
    return ink & ~surrounded


def one_of_each(pixels: Array, score: Array, apart: int = 1) -> Array:
    """Keep the pixel of highest score in each group of pixels, the first of equals; a group's pixels are linked by
    steps of `apart` pixels or fewer (odd)."""
    joined = scipy.ndimage.binary_dilation(pixels, TOUCHING, iterations=apart // 2) if apart > 1 else pixels
    labels, _ = scipy.ndimage.label(joined, TOUCHING)
    places = np.flatnonzero(pixels)
    groups = labels.ravel()[places]
    order = np.lexsort((places, -score.ravel()[places], groups))
    _, first = np.unique(groups[order], return_index=True)
    chosen = np.zeros(pixels.size, dtype=bool)
    chosen[places[order[first]]] = True
    return chosen.reshape(pixels.shape)


def turns_of(skeleton: Array, pixels: Array, reach: int) -> Array:
    """Measure by how many degrees, 0 to 180, the skeleton turns at each of the pixels, from its directions `reach`
    steps away on both sides: [image, height, width], 0 elsewhere."""
    side = 2 * reach + 1
    padded = np.pad(skeleton, ((0, 0), (reach, reach), (reach, reach)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side), axis=(1, 2))
    turns = np.zeros(skeleton.shape)
    around = windows[pixels]  # [pixel, side, side]
    if not len(around):
        return turns
    reached = np.zeros_like(around)
    reached[:, reach, reach] = True
    for _ in range(reach):
        last = reached
        reached = scipy.ndimage.binary_dilation(last, TOUCHING) & around
    ring = (reached & ~last).reshape(len(around), -1)
    offsets = np.indices((side, side)).reshape(2, -1).T - reach
    lengths = np.linalg.norm(offsets, axis=1, keepdims=True)
    directions = offsets / np.maximum(lengths, 1)
    cosines = directions @ directions.T  # [place, place]
    # The two places farthest apart: from any, the farthest, and from that the farthest.
    start = ring.argmax(axis=1)
    farthest = np.where(ring, cosines[start], 2.0).argmin(axis=1)
    cosine = np.where(ring, cosines[farthest], 2.0).min(axis=1)
    turns[pixels] = np.where(ring.any(axis=1), 180 - np.degrees(np.arccos(cosine.clip(-1, 1))), 0.0)
    return turns


def _along(skeleton: Array, pixels: Array, steps: int) -> Array:
    """Return the pixels within `steps` steps along the skeleton: bool [image, height, width]."""
    if not steps:
        return pixels
    return scipy.ndimage.binary_dilation(pixels, TOUCHING, iterations=steps, mask=skeleton) & skeleton


def _padded(pixels: Array) -> Array:
    return np.pad(pixels, ((0, 0), (1, 1), (1, 1)))


def _shifted(pixels: Array, row: int, column: int) -> Array:
    """Return the value `row` down and `column` to the right of each pixel, background outside."""
    height, width = pixels.shape[1:]
    return _padded(pixels)[:, 1 + row : 1 + row + height, 1 + column : 1 + column + width]
