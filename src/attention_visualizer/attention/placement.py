"""From what keys answer to, to their places: a grid of patches, the order of its keys, or why there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attention_visualizer.attention.receptive_fields import Axis, ReceptiveFields

Array = NDArray[Any]
NOWHERE = "its keys answer to no part of the picture"
SAME_LINE = 0.5  # of the width of its patches: centres of one row of patches differ by less
MAX_LOPSIDED = 0.15  # of its width: how far the centre of a single line may be off its middle
MAX_APART = 0.5  # of their width: between lines that are further apart, others were left out, evenly or not
MIN_STEP = 0.3  # of the expected one: lines that are not so far apart may be chance
UNEVEN = 0.5  # of the mean step: so much one step between the lines of a regular grid may be off
MAX_BESIDE = 0.2  # of what all lines cover: so far the middle of one may lie from where it is drawn
TOLERANCE = 1.0  # pixels by which interpolation moves an edge


@dataclass(frozen=True)
class Unplaced:
    """Why maps of a layer cannot be put on the image."""

    reason: str


@dataclass(frozen=True)
class Lines:
    """The rows, or columns, of a grid of patches."""

    number: int
    start: float  # pixels: where the first begins, before the image where the model pads it
    step: float  # pixels from one to the next

    @property
    def end(self) -> float:
        return self.start + self.number * self.step


@dataclass(frozen=True)
class PlacedKeys:
    """A grid of patches, found in what keys answer to."""

    rows: Lines
    columns: Lines
    order: Array  # the key of each patch, row by row


def place(fields: ReceptiveFields) -> PlacedKeys | Unplaced:
    """Find the grid of patches that the keys of a layer answer to, each to one patch, and no two to the same.

    Keys that answer to no place are prefix tokens; all others must make up the grid.
    """
    if fields.depends_on_picture:
        return Unplaced("the number of its keys depends on the picture: tokens are selected or merged")
    if not fields.may_be_patches:
        return Unplaced(NOWHERE)
    grids = []
    for keys in fields.may_be_patches:
        # The middle is exact where keys answer to their patches alone, the centre tells fields apart that overlap.
        grids += grids_of(fields, keys, fields.middles) or grids_of(fields, keys, fields.centres)
    if len(grids) != 1:
        number, of = len(fields.may_be_patches[0]), fields.rows.shape[1]
        return Unplaced(
            f"the {number} of its {of} keys that answer to places are no grid of patches, or several: tokens were "
            "selected, merged or mixed"
        )
    return grids[0]


def grids_of(fields: ReceptiveFields, keys: Array, position: Callable[[Axis], Array]) -> list[PlacedKeys]:
    """Return all grids that the positions of keys can make up."""
    found = []
    for number_of_rows in divisors(len(keys)):
        numbers = (number_of_rows, len(keys) // number_of_rows)
        down, across = (lines_of(fields, axis, keys, position(axis)[keys], numbers[axis]) for axis in range(2))
        if down is None or across is None:
            continue
        (rows, row), (columns, column) = down, across
        order = np.full(len(keys), -1)
        order[row * columns.number + column] = keys
        if (order >= 0).all():
            found.append(PlacedKeys(rows, columns, order))
    return found


def divisors(number: int) -> Iterator[int]:
    return (each for each in range(1, number + 1) if number % each == 0)


def lines_of(
    fields: ReceptiveFields, axis: Axis, keys: Array, middles: Array, number: int
) -> tuple[Lines, Array] | None:
    """Divide keys into `number` rows (columns) of equal size; return these and the row of each key, or None where
    what they answer to is no such rows, evenly spaced."""
    firsts, lasts = (each[keys] for each in fields.extent(axis))
    in_lines = middles.argsort(kind="stable").reshape(number, -1)
    of_lines = middles[in_lines]
    if np.ptp(of_lines, axis=1).max() > SAME_LINE * float(np.median(lasts - firsts)):
        return None
    if (of_lines[1:].min(axis=1) <= of_lines[:-1].max(axis=1)).any():
        return None
    if number == 1 and is_lopsided(fields.centres(axis)[keys].mean(), firsts.min(), lasts.max()):
        return None
    size = (fields.row_edges if axis == 0 else fields.column_edges)[-1]
    lines = regular(of_lines.mean(axis=1), firsts[in_lines].min(axis=1), lasts[in_lines].max(axis=1), size)
    if lines is None:
        return None
    line = np.empty(len(keys), int)
    line[in_lines] = np.arange(number)[:, None]
    return lines, line


def is_lopsided(centre: float, first: float, last: float) -> bool:
    """Whether a single line answers to one side more: it is a part of a picture rather than all of it."""
    return abs(centre - (first + last) / 2) > MAX_LOPSIDED * (last - first)


def regular(middles: Array, firsts: Array, lasts: Array, size: int) -> Lines | None:
    """Return evenly spaced lines with these middles, first pixels and ends, on a side of `size` pixels; None where they
    are not even. The image's edge may cut off the first and the last."""
    number, widths = len(middles), lasts - firsts
    if number == 1:
        return Lines(1, float(firsts[0]), float(widths[0]))
    if (firsts[1:] - lasts[:-1]).max() > MAX_APART * float(np.median(widths)):
        # Of every second line, as strided attention leaves, each stands for what lies between.
        if number == 2 or np.ptp(np.diff(firsts)) > TOLERANCE:
            return None
    if (lasts[:-1] == firsts[1:]).all():  # patch beside patch: exact
        step = float(widths.max())
        start = float(lasts[0]) - step
        cuts = start + step * np.arange(1, number)
        return Lines(number, start, step) if np.abs(cuts - firsts[1:]).max() <= TOLERANCE else None
    inner, expected = slice(1, -1), float(lasts.max() - firsts.min()) / number
    exact = (firsts[inner] + lasts[inner]) / 2
    if number > 3 and np.ptp(widths[inner]) == 0 and np.diff(exact).min() > MIN_STEP * expected:
        # Overlapping patches of one size.
        step = float(np.diff(exact).mean())
        start = float(exact[0] - 1.5 * step)
        if np.abs(np.diff(exact) - step).max() > TOLERANCE:
            return None
        # As many as fit the side are laid over all of it: a convolution with padding sees a little beside them.
        is_whole = abs(number * step - size) <= step / 2
        return Lines(number, 0.0, size / number) if is_whole else Lines(number, start, step)
    if number > 3:
        steps = np.diff(middles)
        if steps.max() > (1 + UNEVEN) * steps.mean() or steps[inner].min() < (1 - UNEVEN) * steps.mean():
            return None
    # What the keys see reaches far beyond their patches: these divide it evenly, if the middles lie there.
    lines = Lines(number, float(firsts.min()), expected)
    drawn = lines.start + lines.step * (np.arange(number) + 0.5)
    return lines if np.abs(middles - drawn).max() <= MAX_BESIDE * (lines.end - lines.start) else None
