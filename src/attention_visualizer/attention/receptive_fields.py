"""Which pixels each key answers to, measured: the second proof, of a key's place.

A model runs on copies of one picture, in each of which some rows of pixels, or columns, are others. A key whose values
move answers to what was changed. Attention is switched off meanwhile: layers before have mixed all places, without them
a token at any depth answers to its own place alone. Only numbers are compared, so it works without gradients.

Rows are not changed one by one: those of one residue, r mod m, change together, then those of one quotient, r // m.
With m more than twice what a key answers to, that tells the rows as exactly, with m + n / m pictures instead of n.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
Axis = int  # 0 for rows, 1 for columns
#: Pictures [picture, channel, height, width] -> how far each key's values move from those of the picture that nothing
#: was changed in: by layer, [picture, key]; NaN where the layer has other numbers of keys.
Moves = Callable[[Tensor], dict[str, Array]]
ANSWER = 1e-3  # of the median of what keys move by at the most: less is rounding
MAX_EVERYWHERE = 0.3  # of its largest answer: what a key gives to every band is background, unless it is more
MAX_WHOLE = 0.25  # keys that answer to the whole picture for each that answers to a place
MIN_KEYS = 9  # of which places are told where each answers to each change of the picture
MAX_SINGLE = 16  # so many bands are changed one by one


@dataclass(frozen=True)
class Bands:
    """Bands of pixels along one axis of a picture, and which of them change together."""

    edges: tuple[int, ...]  # pixels: band i goes from edges[i] to edges[i + 1]
    modulus: int  # at least the number of bands where they change one by one

    @classmethod
    def of(cls, edges: Sequence[int], modulus: int) -> Bands:
        number = len(edges) - 1
        return cls(tuple(edges), number if number <= max(MAX_SINGLE, modulus) else modulus)

    def __len__(self) -> int:
        return len(self.edges) - 1

    @property
    def groups(self) -> Array:
        """Whether each group has each band: bool [group, band]."""
        number = np.arange(len(self))
        combs = [number % self.modulus == rest for rest in range(self.modulus)]
        if self.modulus < len(self):
            combs += [number // self.modulus == block for block in range(-(-len(self) // self.modulus))]
        return np.stack(combs)

    def answers(self, of_groups: Array) -> Array:
        """Return how much each key answers to each band, from its answers to the groups: [group, key] -> [band, key].

        Of residue and quotient, the smaller counts. Where a key's bands lie in two blocks, that has echoes a block
        away, each less than the run of bands that it answers to; only the largest run is kept.
        """
        residues, quotients = local_part(of_groups[: self.modulus]), of_groups[self.modulus :]
        if not len(quotients):
            return residues
        number = np.arange(len(self))
        return only_largest_run(
            np.minimum(residues[number % self.modulus], local_part(quotients)[number // self.modulus])
        )


def local_part(answers: Array) -> Array:
    """Leave of a key's answers [group, key] what it does not give to every group: a norm over all tokens, a gate of
    channels answer to everything a little. Where that is most of it, all is left; what is rounding is 0."""
    everywhere = answers.min(axis=0) if len(answers) > 3 else np.zeros(answers.shape[1])
    local = np.where(everywhere < MAX_EVERYWHERE * answers.max(axis=0), answers - everywhere, answers)
    return np.where(local > ANSWER, local, 0.0)


def only_largest_run(answers: Array) -> Array:
    """Set all but the run of bands with the largest sum to 0, for each key: [band, key]."""
    starts = (answers > 0) & ~np.concatenate([np.zeros_like(answers[:1], bool), answers[:-1] > 0])
    run = np.cumsum(starts, axis=0) * (answers > 0)  # number of the run, 0 outside
    sums = np.stack([np.where(run == number, answers, 0.0).sum(axis=0) for number in range(int(run.max()) + 1)])
    sums[0] = 0
    return np.where(run == sums.argmax(axis=0), answers, 0.0)


@dataclass(frozen=True)
class ReceptiveFields:
    """What the keys of one layer answer to: those of all windows of an image, one window after the other."""

    rows: Array  # [band, key]: how much the key's values move, as a share of what keys move by; 0 for no answer
    columns: Array  # the same
    row_edges: tuple[int, ...]  # pixels
    column_edges: tuple[int, ...]
    has_background: bool = False  # most keys answer to each change of the picture, a little perhaps
    depends_on_picture: bool = False  # the number of its keys does

    @property
    def may_be_patches(self) -> list[Array]:
        """The keys that may be the patches, in each way that there is: those that answer to a place: [key].

        Few keys that answer to all rows and columns are tokens of the whole picture, such as a mean. Of more they may
        be, or patches that see all of a small picture. Where most answer to each change of it, to a norm over
        all tokens for instance, few are in line by chance.
        """
        some = (self.rows > 0).any(axis=0) & (self.columns > 0).any(axis=0)
        everywhere = (self.rows > 0).all(axis=0) & (self.columns > 0).all(axis=0)
        local = some & ~everywhere
        few = everywhere.sum() <= MAX_WHOLE * local.sum()
        candidates = [np.flatnonzero(each) for each in ([local] if few else [some, local])]
        least = MIN_KEYS if self.has_background else 1
        return [each for each in candidates if len(each) >= least]

    def extent(self, axis: Axis) -> tuple[Array, Array]:
        """Return the first pixel that each key answers to, and the one behind the last: [key] both."""
        answers, edges = (self.rows, self.row_edges) if axis == 0 else (self.columns, self.column_edges)
        some = answers > 0
        first, last = some.argmax(axis=0), len(some) - some[::-1].argmax(axis=0)
        pixels = np.asarray(edges)
        return pixels[first], pixels[last]

    @property
    def typical_width(self) -> float:
        """The median, over keys that answer, of the larger side of what they answer to, in pixels."""
        some = (self.rows > 0).any(axis=0) & (self.columns > 0).any(axis=0)
        sides = [last - first for first, last in (self.extent(axis) for axis in range(2))]
        return float(np.median(np.maximum(*sides)[some])) if some.any() else 0.0

    def middles(self, axis: Axis) -> Array:
        """Return the middle between the first and the last pixel that each key answers to: [key]."""
        first, last = self.extent(axis)
        return (first + last) / 2

    def centres(self, axis: Axis) -> Array:
        """Return the mean of the pixels that each key answers to, weighted by the square of how much it does: [key]."""
        answers, edges = (self.rows, self.row_edges) if axis == 0 else (self.columns, self.column_edges)
        pixels = np.asarray(edges, float)
        middles = (pixels[:-1] + pixels[1:]) / 2
        weights = answers**2
        return middles @ weights / np.maximum(weights.sum(axis=0), 1e-300)


def mean_moves(draws: Iterable[dict[str, Array]]) -> dict[str, Array]:
    each = list(draws)
    return {name: np.mean([moves[name] for moves in each], axis=0) for name in each[0]}


def pictures(image: Tensor, bands: Bands, axis: Axis, draw: int = 0) -> Tensor:
    """Return the image [1, channel, height, width] with other pixels in each group of bands: [group, ...]."""
    groups = bands.groups
    of_pixels = np.zeros((len(groups), image.shape[2 + axis]), bool)
    for band, (start, end) in enumerate(zip(bands.edges[:-1], bands.edges[1:], strict=True)):
        of_pixels[:, start:end] = groups[:, band, None]
    return changed(image, of_pixels, axis, draw)


def changed(image: Tensor, lines: Array, axis: Axis, draw: int = 0) -> Tensor:
    """Return the image [1, channel, height, width] with other pixels in some rows, or columns: bool [picture, line]."""
    shape = (len(lines), 1, -1, 1) if axis == 0 else (len(lines), 1, 1, -1)
    return torch.where(torch.from_numpy(lines).to(image.device).view(shape), other_pixels(image, draw), image)


def other_pixels(image: Tensor, draw: int = 0) -> Tensor:
    """Return another image of the same shape and range, each pixel of which differs from the given one; another one
    for each draw."""
    low, high = (float(edge) for edge in torch.aminmax(image.float()))
    if high <= low:
        low, high = low - 1, high + 1 if image.is_floating_point() else max(high, 1)
    generator = torch.Generator().manual_seed(draw)
    shift = (0.25 + 0.5 * torch.rand(image.shape, generator=generator)).to(image.device)
    moved = ((image.float() - low) / (high - low) + shift).remainder(1.0) * (high - low) + low
    return moved.to(image.dtype) if image.is_floating_point() else moved.round().to(image.dtype)


def measure(
    moves: Moves, image: Tensor, row_bands: Bands, column_bands: Bands, draws: Iterable[int] = (0,)
) -> dict[str, ReceptiveFields]:
    """Measure the receptive fields of the keys of all layers, with attention off in the layers before.

    draws: numbers of the pictures to take other pixels from; more tell overlapping fields apart better.
    """
    draws = tuple(draws)
    rows, columns = (
        mean_moves(moves(pictures(image, bands, axis, draw)) for draw in draws)
        for axis, bands in enumerate((row_bands, column_bands))
    )
    fields = {}
    for name in rows:
        largest = np.maximum(rows[name].max(axis=0), columns[name].max(axis=0))
        answering = largest[largest > 0]
        scale = float(np.median(answering)) if len(answering) else 1.0
        fields[name] = ReceptiveFields(
            row_bands.answers(rows[name] / scale),
            column_bands.answers(columns[name] / scale),
            row_bands.edges,
            column_bands.edges,
            has_background=bool(np.mean((rows[name].min(axis=0) > 0) & (columns[name].min(axis=0) > 0)) > 0.5),
            depends_on_picture=bool(np.isnan(largest).any()),
        )
    return fields
