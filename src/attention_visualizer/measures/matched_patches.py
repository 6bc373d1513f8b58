"""Excess attention on a feature, compared within strata of matched patches: same place, similar amount of ink.

The excess is the coefficient of a regression with one intercept a stratum (Frisch and Waugh, 1933).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from attention_visualizer.measures.intervals import PERMUTATIONS

Array = NDArray[Any]

OUTSIDE = -1  # the stratum of patches that are not compared
LEVELS = 10  # of ink at each place
IMAGES_PER_LEVEL = 50  # of few images fewer levels are made


@dataclass(frozen=True)
class Excess:
    """A quantity of patches with a feature and of matched ones without it, such as how much more the former get."""

    value: Array  # [...], in the values' unit
    influences: Array  # what each image moves it by, [image, ...]; they sum to 0


def strata_of(amount: Array, among: Array, levels: int | None = None) -> Array:
    """Number the stratum of each patch, by its place and the rank of its amount among the patches there: [image, patch]
    -> [image, patch]. among: which patches are compared, bool [image, patch]; the others are OUTSIDE."""
    images, patches = amount.shape
    levels = num_levels(images) if levels is None else levels
    strata = np.full((images, patches), OUTSIDE)
    for patch in range(patches):
        compared = np.flatnonzero(among[:, patch])
        if len(compared):
            edges = np.quantile(amount[compared, patch], np.arange(1, levels) / levels)
            strata[compared, patch] = patch * levels + np.searchsorted(edges, amount[compared, patch], side="right")
    return strata


def num_levels(images: int) -> int:
    """The number of strata of ink at each place."""
    return max(1, min(LEVELS, images // IMAGES_PER_LEVEL))


def above_median(amount: Array, strata: Array) -> Array:
    """Return which patches hold more than the median of their stratum: [image, patch] -> bool [image, patch]."""
    is_above = np.zeros(strata.shape, dtype=bool)
    for members in members_by_stratum(strata):
        amounts = amount.ravel()[members]
        is_above.ravel()[members] = amounts > np.median(amounts)
    return is_above


def centre_within_strata(feature: Array, strata: Array) -> Array:
    """Subtract the stratum's mean from the feature; 0 outside: [image, patch] -> float64 [image, patch]."""
    compared = strata != OUTSIDE
    counts = np.bincount(strata[compared])
    sums = np.bincount(strata[compared], feature[compared].astype(np.float64))
    deviations = np.zeros(feature.shape)
    deviations[compared] = feature[compared] - (sums / np.maximum(counts, 1))[strata[compared]]
    deviations[np.abs(deviations) < 1e-12] = 0.0
    return deviations


def excess(values: Array, feature: Array, strata: Array) -> Excess:
    """Compute how much more the patches with the feature get: the mean over strata of the difference with - without,
    each stratum counting with x without / all of its patches.

    values: [image, ..., patch]; feature, strata: [image, patch]. NaN where no stratum has both kinds. The influences
    are those of a regression with clusters, the images (Liang and Zeger, 1986).
    """
    images, patches = feature.shape
    deviations = centre_within_strata(feature, strata)
    squares = float((deviations**2).sum())
    shape = values.shape[1:-1]
    if not squares:
        return Excess(np.full(shape, np.nan), np.full((images, *shape), np.nan))
    flat = values.reshape(images, -1, patches)
    products = np.einsum("ip,ivp->iv", deviations, flat)
    value = products.sum(axis=0) / squares
    # What is left of the values without their stratum's mean and the excess itself.
    compared = np.flatnonzero(strata != OUTSIDE)
    stratum = strata.ravel()[compared]
    members = scipy.sparse.csr_array(
        (np.ones(len(compared)), (stratum, np.arange(len(compared)))), (int(strata.max()) + 1, len(compared))
    )
    by_patch = flat.transpose(0, 2, 1).reshape(images * patches, -1)
    means = (members @ by_patch[compared]) / np.maximum(members.sum(axis=1), 1)[:, None]
    image_deviations = scipy.sparse.csr_array(
        (deviations.ravel()[compared], (compared // patches, stratum)), (images, len(means))
    )
    image_squares = (deviations**2).sum(axis=1)
    influences = (products - image_deviations @ means - image_squares[:, None] * value) / squares
    return Excess(value.reshape(shape), influences.reshape(images, *shape))


def relative_excess(values: Array, predicted: Array, feature: Array, strata: Array) -> tuple[Excess, Array]:
    """Compute by which part the patches with the feature get more than is predicted for them, beyond what matched
    patches without it do: the excess of values - predicted, divided by what those patches get. Return that, and the
    divisors [...].

    A ratio of attention to attention, it says the same of sharp maps and of nearly uniform ones. values, predicted:
    [image, ..., patch]; feature, strata: [image, patch].
    """
    return ratio(excess(values - predicted, feature, strata), matched_mean(values, feature, strata))


def contrast(values: Array, feature: Array, strata: Array) -> tuple[Excess, Array]:
    """Compute (with - without) / (with + without) of what patches with the feature and matched patches without it get,
    from -1 to 1, and the divisors: [image, ..., patch] -> [...]."""
    more, without = excess(values, feature, strata), matched_mean(values, feature, strata)
    return ratio(more, Excess(more.value + 2 * without.value, more.influences + 2 * without.influences))


def ratio(part: Excess, whole: Excess) -> tuple[Excess, Array]:
    """Divide one by the other, by the delta method; return the divisors as well."""
    value = part.value / whole.value
    return Excess(value, (part.influences - value * whole.influences) / whole.value), whole.value


def matched_mean(values: Array, feature: Array, strata: Array) -> Excess:
    """Compute the mean of the values over patches without the feature, weighted so that each stratum counts as in
    `excess`: [image, ..., patch] -> [...]; NaN where no stratum has both kinds."""
    shape = values.shape[1:-1]
    compared = strata != OUTSIDE
    counts = np.bincount(strata[compared])
    with_feature = np.bincount(strata[compared], feature[compared].astype(np.float64))
    weights = np.zeros(feature.shape)
    weights[compared] = (with_feature / np.maximum(counts, 1))[strata[compared]]
    weights *= ~feature
    total = float(weights.sum())
    if not total:
        return Excess(np.full(shape, np.nan), np.full((len(values), *shape), np.nan))
    sums = np.einsum("ip,ivp->iv", weights, values.reshape(len(values), -1, values.shape[-1]))
    value = sums.sum(axis=0) / total
    influences = (sums - weights.sum(axis=1)[:, None] * value) / total
    return Excess(value.reshape(shape), influences.reshape(len(values), *shape))


def permuted_excess(
    values: Array, feature: Array, strata: Array, permutations: int = PERMUTATIONS, seed: int = 0
) -> tuple[float, Array]:
    """Return the excess of values [image, patch], and those after permuting the feature within strata: [permutation].

    Each stratum's patches are put on a ring in random order, and each permutation turns every ring at random. Turns
    are a group, so the test is exact, and a Fourier transform has the sums of all turns at once.
    """
    generator = np.random.default_rng(seed)
    deviations = centre_within_strata(feature, strata).ravel()
    squares = float((deviations**2).sum())
    null = np.zeros(permutations)
    if not squares:
        return np.nan, np.full(permutations, np.nan)
    flat = values.reshape(-1).astype(np.float64)
    for members in members_by_stratum(strata):
        if not deviations[members].any():
            continue
        ring = generator.permutation(members)
        turned = np.fft.irfft(np.conj(np.fft.rfft(deviations[ring])) * np.fft.rfft(flat[ring]), len(ring))
        null += turned[generator.integers(len(ring), size=permutations)]
    return float(deviations @ flat / squares), null / squares


def members_by_stratum(strata: Array) -> list[Array]:
    """Return the positions of each stratum's members in the flattened strata; OUTSIDE is left out."""
    order = np.argsort(strata, axis=None, kind="stable")
    sorted_strata = strata.ravel()[order]
    order = order[np.searchsorted(sorted_strata, OUTSIDE, side="right") :]
    starts = np.flatnonzero(np.diff(strata.ravel()[order])) + 1
    return np.split(order, starts) if len(order) else []
