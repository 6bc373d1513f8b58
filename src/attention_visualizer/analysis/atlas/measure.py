"""Where the mean maps of two classes differ, with and without what goes with their ink."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attention_visualizer.measures import intervals
from attention_visualizer.measures.intervals import Interval

Array = NDArray[Any]

MOST_OF_CLASS = 1000  # pictures of one class in a permutation test: bounds memory
NO_SPREAD = 1e-12  # variance of a patch's ink, below which nothing can be predicted from it
LEAST_SHARE = 0.01  # stated beforehand: a difference of less than this share of the attention is not shown as one


@dataclass(frozen=True)
class Difference:
    """Between the mean maps of two classes. attention, p_value: [layer, patch], shares of the attention on patches;
    ink, ink_p_value: [patch], brightness 0 to 1. beyond_ink, beyond_ink_p_value: [layer, patch], what is left of the
    difference when each place's attention is predicted from its own ink. with_ink: the share of the difference's
    squares, over layers and places, that this takes away. p-values hold for all places of a pair, intervals for each.
    """

    first: int
    second: int
    counts: tuple[int, int]
    attention: Interval
    p_value: Array
    beyond_ink: Interval
    beyond_ink_p_value: Array
    with_ink: Interval
    ink: Interval
    ink_p_value: Array

    def differs(self) -> Array:
        """bool [layer, patch]"""
        return np.asarray((self.p_value < intervals.LEVEL) & (np.abs(self.attention.value) >= LEAST_SHARE))

    def differs_beyond_ink(self) -> Array:
        return np.asarray((self.beyond_ink_p_value < intervals.LEVEL) & (np.abs(self.beyond_ink.value) >= LEAST_SHARE))


def without_ink(maps: Array, amount: Array) -> Array:
    """What the ink of a place does not predict of its attention, by a line for each layer and place.

    maps: [image, layer, patch]; amount: [image, patch] -> residuals [image, layer, patch], of mean 0.
    """
    ink_centred = (amount - amount.mean(axis=0))[:, None]
    maps_centred = maps - maps.mean(axis=0)
    spread = (ink_centred**2).sum(axis=0)
    slope = np.divide(
        (maps_centred * ink_centred).sum(axis=0),
        spread,
        out=np.zeros(maps.shape[1:]),
        where=spread > NO_SPREAD * len(amount),
    )
    return maps_centred - slope * ink_centred


def difference(maps: Array, amount: Array, labels: Array, first: int, second: int, seed: int = 0) -> Difference:
    """maps: [image, layer, patch]; amount: ink, [image, patch]; labels: [image]."""
    rows = [np.flatnonzero(labels == each)[:MOST_OF_CLASS] for each in (first, second)]
    both = np.concatenate(rows)
    left = without_ink(maps[both], amount[both])
    count = len(rows[0])
    _, p_value = intervals.largest_difference_test(maps[rows[0]], maps[rows[1]], seed=seed)
    _, beyond_p_value = intervals.largest_difference_test(left[:count], left[count:], seed=seed)
    _, ink_p_value = intervals.largest_difference_test(amount[rows[0]], amount[rows[1]], seed=seed)
    attention, beyond, with_ink, of_ink = resampled_differences(maps[both], amount[both], count, seed)
    return Difference(
        first,
        second,
        (count, len(rows[1])),
        attention,
        p_value,
        beyond,
        beyond_p_value,
        with_ink,
        of_ink,
        ink_p_value,
    )


def resampled_differences(maps: Array, amount: Array, count: int, seed: int = 0) -> tuple[Interval, ...]:
    """Between the first `count` pictures and the others, whose pictures are resampled apart: of the attention [layer,
    patch], of what the ink of a place does not predict of it [layer, patch], the share of squares that goes with ink,
    and of the ink [patch].

    The lines through the ink are fitted again in each replicate, from the means of maps, ink, their product and square.
    """
    n, num_layers, num_patches = maps.shape
    moments = intervals.BootstrapMeans(2, seed=seed)
    for start in range(0, n, 500):
        ink_there, seen = amount[start : start + 500, None], maps[start : start + 500]
        moments.update(
            np.concatenate([seen, ink_there, seen * ink_there, ink_there**2], axis=1),
            (np.arange(start, start + len(seen)) >= count).astype(np.int64),
        )

    def differences(first: Array, second: Array) -> tuple[Array, ...]:
        """Of means [..., moment, patch]."""
        pooled = (count * first + (n - count) * second) / n
        maps_mean, ink_mean = pooled[..., :num_layers, :], pooled[..., num_layers : num_layers + 1, :]
        spread = pooled[..., -1:, :] - ink_mean**2
        together = pooled[..., num_layers + 1 : -1, :] - maps_mean * ink_mean
        slope = np.divide(together, spread, out=np.zeros_like(together), where=spread > NO_SPREAD)
        between = first - second
        attention, of_ink = between[..., :num_layers, :], between[..., num_layers : num_layers + 1, :]
        beyond = attention - slope * of_ink
        total = (attention**2).sum(axis=(-2, -1))
        unexplained = np.divide((beyond**2).sum(axis=(-2, -1)), total, out=np.full_like(total, np.nan), where=total > 0)
        return attention, beyond, 1 - unexplained, of_ink[..., 0, :]

    (first, first_replicates), (second, second_replicates) = moments.resampled(0), moments.resampled(1)
    values = differences(first, second)
    replicates = differences(first_replicates, second_replicates)
    return tuple(
        Interval(np.asarray(value), *intervals.percentiles(each), n)
        for value, each in zip(values, replicates, strict=True)
    )
