"""How much of the variance of maps between images lies between classes, and how much of that goes with ink.

A share of the total variance, less its mean under permuted labels, for each regression of `ink_regression`. Whatever
predicts maps predicts classes, too, so that a regression may also take out what is the class's alone: `kept` says how
much of that it leaves. A small share that is left therefore shows that the finding depends on the form of the
regression, not that classes are treated alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attention_visualizer.measures.ink_regression import Residuals, residuals_of
from attention_visualizer.measures.intervals import REPLICATES, Interval, percentiles, sign_flipped_sums

Array = NDArray[Any]

FLIPS = 999  # p-values from 0.001 on, which nine claims leave below a chapter's level
IMAGES_AT_ONCE = 1000  # while resampling: bounds memory


@dataclass(frozen=True)
class ClassShare:
    """The share of the variance between images that lies between classes, after something was taken out."""

    taken_out: str  # in words
    regressors: int | None  # of each place, None where another regression gave the residuals
    share: Interval  # of the variance of all layers together, before anything was taken out: []
    by_layer: Interval  # of each layer's own variance: [layer]
    p_value: float  # that classes say nothing beyond the regressors, NaN where not resampled
    p_by_layer: Array  # [layer]
    predicted: float  # share of the variance that the regressors predict out of fold
    kept: float  # of maps that the class alone makes, what share would be left between classes; NaN where not known
    replicates: Array  # of `share`, of resampled images: [replicate], empty where not resampled


def class_variance(
    maps: Array,
    amount: Array,
    labels: Array,
    pixels: Array | None = None,
    given: Mapping[str, Array] | None = None,
    resampled: bool = True,
) -> list[ClassShare]:
    """Return the share between classes on each regression, from nothing taken out to the most.

    maps: [image, layer, patch]; amount: of ink, 0 to 1, [image, patch]; labels: [image], from 0, of at least two
    classes; pixels: their main components [image, component]; given: residual maps of other regressions, by what they
    took out; resampled: whether with intervals and p-values.
    """
    regressions = list(residuals_of(maps, amount, labels, pixels))
    regressions += [given_residuals(name, left, labels) for name, left in (given or {}).items()]
    total = variance_of(maps)
    resampled_sums = resample_classes([each.maps for each in regressions], labels) if resampled else None
    return [
        share_of(regression, labels, total, None if resampled_sums is None else resampled_sums[index])
        for index, regression in enumerate(regressions)
    ]


def share_left(maps: Array, left: Array, labels: Array, taken_out: str) -> ClassShare:
    """Return the share after one regression alone, which left these residual maps, without interval and p-value."""
    return share_of(given_residuals(taken_out, left, labels), labels, variance_of(maps), None)


def given_residuals(taken_out: str, left: Array, labels: Array) -> Residuals:
    indicators = np.eye(int(labels.max()) + 1, dtype=np.float32)[labels]
    indicators -= indicators.mean(axis=0)
    return Residuals(taken_out, None, left.astype(np.float32), indicators[:, :, None])


def smallest(shares: Sequence[ClassShare]) -> ClassShare:
    """Return the share that a statement about classes may rest on: what no regression takes out."""
    return min(shares, key=lambda each: float(each.share.value))


def share_of(regression: Residuals, labels: Array, total: Array, resampled: tuple[Array, Array] | None) -> ClassShare:
    """total: sum of squares of the maps before anything was taken out, [layer]; resampled: sums [replicate, class,
    layer, patch] and counts [replicate, class] of resampled images."""
    n, left = len(labels), variance_of(regression.maps)
    counts = np.bincount(labels)
    # What permuted labels have on average.
    chance = left * ((counts > 0).sum() - 1) / (n - 1)
    between = between_classes(class_sums(regression.maps, labels), counts) - chance
    num_layers = len(total)
    p_value, p_by_layer = float("nan"), np.full(num_layers, np.nan)
    replicates, low, high = np.empty((0, num_layers)), p_by_layer, p_by_layer
    if resampled is not None:
        p_value, p_by_layer = class_p_values(regression)
        # Resampling adds as much chance again as the sample has.
        replicates = between_classes(*resampled) * (n / resampled[1].sum(axis=1))[:, None] - 2 * chance
        low, high = percentiles(replicates / total)
    of_all = replicates.sum(axis=1) / total.sum()
    return ClassShare(
        regression.taken_out,
        regression.regressors,
        Interval(np.asarray(between.sum() / total.sum()), *percentiles(of_all), n),
        Interval(between / total, low, high, n),
        p_value,
        p_by_layer,
        float(1 - left.sum() / total.sum()),
        kept_of_classes(regression, labels),
        of_all,
    )


def variance_of(maps: Array) -> Array:
    """Return the sum of squares about the mean, at least a trace: [image, layer, patch] -> [layer]."""
    return np.maximum(maps.var(axis=0, dtype=np.float64).sum(axis=-1) * len(maps), 1e-12)


def class_sums(values: Array, labels: Array) -> Array:
    """[image, ...] -> [class, ...]"""
    indicators = np.eye(int(labels.max()) + 1, dtype=np.float32)[labels]
    return np.tensordot(indicators, values, axes=(0, 0))


def between_classes(sums: Array, counts: Array) -> Array:
    """Return the sum of squares between classes: [..., layer].

    sums: over a class's images, [..., class, layer, patch]; counts: of them, [..., class].
    """
    counts = counts[..., None, None]
    of_classes = (sums.astype(np.float64) ** 2 / np.maximum(counts, 1e-12)).sum(axis=(-3, -1))
    of_all = (sums.sum(axis=-3, dtype=np.float64) ** 2).sum(axis=-1)
    return of_classes - of_all / counts.sum(axis=-3)[..., 0]


def class_p_values(regression: Residuals) -> tuple[float, Array]:
    """Return the p-values that the class says nothing about the maps beyond the regressors: of all layers, and [layer].

    From the squared effects of what is left of the classes on what is left of the maps, among those of maps with random
    signs.
    """
    basis = regression.class_basis()[:, :, None]  # [image, dimension, 1, patch or 1]
    effects = (basis * regression.maps[:, None]).sum(axis=0, dtype=np.float64)
    null = sign_flipped_sums(basis * regression.maps[:, None], FLIPS)
    observed, flipped = (np.square(each, dtype=np.float64).sum(axis=(-3, -1)) for each in (effects, null))

    def p_value(value: Array, null: Array) -> Array:
        return ((null >= value * (1 - 1e-6)).sum(axis=0) + 1) / (FLIPS + 1)

    return float(p_value(observed.sum(), flipped.sum(axis=1))), p_value(observed, flipped)


def kept_of_classes(regression: Residuals, labels: Array) -> float:
    """Return which share of the variance of maps that the class alone makes is left between classes."""
    if regression.regressors is None:
        return float("nan")
    counts = np.bincount(labels)
    whole = regression.classes.shape[2] * float((counts * (1 - counts / len(labels))).sum())
    left = between_classes(class_sums(regression.classes, labels), counts)
    return float(left.sum()) / whole


def resample_classes(maps: Sequence[Array], labels: Array) -> list[tuple[Array, Array]]:
    """Resample the images of each class (Poisson bootstrap), the same ones for all maps [image, layer, patch]: for
    each, sums [replicate, class, layer, patch] and counts [replicate, class]."""
    generator = np.random.default_rng(0)
    sums = [np.zeros((REPLICATES, int(labels.max()) + 1, *each.shape[1:]), dtype=np.float32) for each in maps]
    counts = np.zeros((REPLICATES, int(labels.max()) + 1))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        for start in range(0, len(members), IMAGES_AT_ONCE):
            block = members[start : start + IMAGES_AT_ONCE]
            times = generator.poisson(1.0, (REPLICATES, len(block))).astype(np.float32)
            counts[:, label] += times.sum(axis=1)
            for into, each in zip(sums, maps, strict=True):
                into[:, label] += np.tensordot(times, each[block], axes=(1, 0))
    return [(each, counts) for each in sums]
