"""Statistics over images: bootstrap and other intervals, rank correlations, permutation tests, multiple-testing
correction, stratified subsets, and the accuracy from which a model counts as trained.

The unit is the image: an interval says how another draw of test images would move a value of this one model. How
another training run would move it, it does not say. Test images are no simple random sample (those of MNIST come from
two sources), so intervals of averages also include what either half of the images gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

REPLICATES = 1000
PERMUTATIONS = 999
LEVEL = 0.05  # of all tests of a report together and, as 1 - LEVEL, of intervals
# One family over the whole report: five chapters make statements (roles, class by class, importance, claims, runs).
# Each keeps the chance of any false one below this (Holm, or the largest of all under permutation), so that it stays
# below LEVEL for the report, whichever chapters it has.
CHAPTER_LEVEL = LEVEL / 5
PERMUTATION_BATCH = 64  # permutations at once: bounds memory
IMAGES_AT_ONCE = 1000  # that get random signs: bounds memory
NORMAL = NormalDist().inv_cdf(1 - LEVEL / 2)  # 1.96


@dataclass(frozen=True)
class Interval:
    """Values with their 95% intervals, arrays of one shape."""

    value: Array
    low: Array
    high: Array
    n: int  # images

    def __getitem__(self, index: Any) -> Interval:
        return Interval(self.value[index], self.low[index], self.high[index], self.n)

    def including(self, halves: Array) -> Interval:
        """Widen the intervals to what halves of the images give, [half, ...], NaN for a half without any.

        Of images in random order a half lies outside in one case of twenty, which hardly widens them.
        """
        lowest = np.fmin.reduce(halves, axis=0, initial=np.inf)
        highest = np.fmax.reduce(halves, axis=0, initial=-np.inf)
        return Interval(self.value, np.minimum(self.low, lowest), np.maximum(self.high, highest), self.n)

    def where(self, chosen: Array) -> Interval:
        """Return the same with NaN where not chosen, a mask that broadcasts to the values' shape."""
        value, low, high = (np.where(chosen, each, np.nan) for each in (self.value, self.low, self.high))
        return Interval(value, low, high, self.n)

    def text(self, digits: int = 3, percent: bool = False) -> str:
        """Format a single value as "0.12 (0.10 to 0.15)", never "-0.00"; a dash for NaN. All three have as many
        decimals as `decimals` allows."""
        if np.isnan(self.value):
            return "–"
        scale, unit = (100, "%") if percent else (1, "")
        decimals = self.decimals(digits, scale)
        value, low, high = (f"{scale * float(each):z.{decimals}f}" for each in (self.value, self.low, self.high))
        # One image says nothing of others.
        return f"{value}{unit}" if self.n < 2 else f"{value}{unit} ({low} to {high})"

    def decimals(self, most: int, scale: float = 1) -> int:
        """Return how many decimals of a single value, times `scale`, are worth printing, `most` at most: the last is
        that of the first digit of half the interval's width, as of a standard error. The interval moves that digit, and
        those before it only by a carry."""
        half = scale * float(self.high - self.low) / 2
        return int(np.clip(-math.floor(math.log10(half)), 0, most)) if half > 0 else most

    def times(self, factor: float) -> Interval:
        """Return the interval in another unit, or with the other sign."""
        ends = factor * self.low, factor * self.high
        return Interval(factor * self.value, np.minimum(*ends), np.maximum(*ends), self.n)

    def numbers(self) -> dict[str, Any]:
        """Return the fields by name, for a chapter's numbers."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


class BootstrapMeans:
    """The means over a stream of images with percentile intervals, in memory that does not grow (Poisson bootstrap:
    Hanley and MacGibbon, 2006; Chamandy et al., 2012).

    In each replicate each image counts as often as a Poisson variable of mean 1 says; the means do not depend on how
    the stream is cut into batches.
    """

    def __init__(
        self, groups: int = 1, replicates: int = REPLICATES, seed: int = 0, num_images: int | None = None
    ) -> None:
        """groups: how many groups of images have means of their own; num_images: of the whole stream, whose first and
        second half intervals then include."""
        self.groups, self.replicates = groups, replicates
        self.generator = np.random.default_rng(seed)
        self.counts = np.zeros((groups, replicates))
        self.first_half = None if num_images is None else num_images // 2  # images; None: no half is told apart
        self.num_seen = 0
        self.half_counts = np.zeros((2, groups), dtype=np.int64)
        self.sums: Array | None = None  # [group, replicate, ...]
        self.plain: Array | None = None  # sums without resampling, [half, group, ...]

    def update(self, values: Array, groups: Array | None = None) -> None:
        """Add images. values: [image, ...]; groups: [image], below 0 for images of none."""
        values = np.asarray(values, dtype=np.float64)
        flat = values.reshape(len(values), -1)
        if self.sums is None or self.plain is None:
            self.sums = np.zeros((self.groups, self.replicates, *values.shape[1:]))
            self.plain = np.zeros((2, self.groups, *values.shape[1:]))
        times = self.generator.poisson(1.0, (len(values), self.replicates)).astype(np.float64)
        members = np.zeros(len(values), dtype=np.int64) if groups is None else np.asarray(groups)
        in_second = np.full(len(values), False)
        if self.first_half is not None:
            in_second = self.num_seen + np.arange(len(values)) >= self.first_half
        self.num_seen += len(values)
        for group in np.unique(members[members >= 0]):
            those = members == group
            self.sums[group] += (times[those].T @ flat[those]).reshape(self.sums.shape[1:])
            self.counts[group] += times[those].sum(axis=0)
            for half, chosen in enumerate((those & ~in_second, those & in_second)):
                self.plain[half, group] += flat[chosen].sum(axis=0).reshape(self.plain.shape[2:])
                self.half_counts[half, group] += chosen.sum()

    @property
    def num_images(self) -> Array:
        """Return how many images each group has had: [group]."""
        return self.half_counts.sum(axis=0)

    def of_group(self, group: int = 0) -> Interval:
        """Return the means of one group: [...], NaN if it has no image."""
        return self.of(lambda means: means, group)

    def of(self, function: Callable[[Array], Array], group: int = 0) -> Interval:
        """Return a function of one group's means with its interval: [..., as in `update`] -> [...]."""
        means, replicates = self.resampled(group)
        has_images = self.counts[group] > 0  # of very few images, a replicate may hold none
        low, high = percentiles(function(replicates[has_images]))
        found = Interval(np.asarray(function(means)), low, high, int(self.num_images[group]))
        return found.including(function(self.of_halves(group)))

    def difference(self, first: int, second: int) -> Interval:
        """Return the first group's means minus the second's: [...]."""
        (means, replicates), (other_means, others) = self.resampled(first), self.resampled(second)
        have_images = (self.counts[[first, second]] > 0).all(axis=0)
        low, high = percentiles(replicates[have_images] - others[have_images])
        found = Interval(means - other_means, low, high, int(self.num_images[[first, second]].sum()))
        return found.including(self.of_halves(first) - self.of_halves(second))

    def resampled(self, group: int = 0) -> tuple[Array, Array]:
        """Return the means [...] and each replicate's [replicate, ...].

        In streams of the same images with the same seed an image counts equally often, so that differences between
        their replicates are paired.
        """
        if self.sums is None or self.plain is None:
            raise ValueError("there were no images")
        counts = self.counts[group].reshape(-1, *[1] * (self.sums.ndim - 2))
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.plain[:, group].sum(axis=0) / self.num_images[group], self.sums[group] / counts

    def of_halves(self, group: int = 0) -> Array:
        """Return the means of each half of the images: [half, ...], NaN where it is not told apart or has none."""
        if self.plain is None:
            raise ValueError("there were no images")
        counts = self.half_counts[:, group].reshape(-1, *[1] * (self.plain.ndim - 2))
        if self.first_half is None:
            counts = np.zeros_like(counts)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(counts > 0, self.plain[:, group] / counts, np.nan)


def percentiles(replicates: Array) -> tuple[Array, Array]:
    """Return the ends of the 95% interval of [replicate, ...]: [...] each; NaN where any replicate is."""
    flat = replicates.reshape(len(replicates), math.prod(replicates.shape[1:]))
    ends = np.full((2, flat.shape[1]), np.nan)
    defined = ~np.isnan(flat).any(axis=0)
    if len(flat) and defined.any():
        ends[:, defined] = np.quantile(flat[:, defined], (LEVEL / 2, 1 - LEVEL / 2), axis=0)
    low, high = ends.reshape(2, *replicates.shape[1:])
    return low, high


def bootstrap_mean(values: Array, seed: int = 0, replicates: int = REPLICATES) -> Interval:
    """Return the mean over images of [image, ...], in their order, with its interval: [...]."""
    means = BootstrapMeans(1, replicates, seed, len(values))
    means.update(values)
    return means.of_group()


def half_means(values: Array) -> Array:
    """Return the means over the first and the second half of the images: [image, ...] -> [half, ...]; NaN for a half
    without any."""
    middle = len(values) // 2
    halves = [
        each.mean(axis=0) if len(each) else np.full(values.shape[1:], np.nan)
        for each in (values[:middle], values[middle:])
    ]
    return np.stack(halves)


def share_interval(count: Array | int, total: int) -> Interval:
    """Return the share of images for which something holds, with its interval (Wilson, 1927), which is not empty where
    it holds for all. count: [...]."""
    share = np.asarray(count) / total
    spread = NORMAL**2 / total
    middle = (share + spread / 2) / (1 + spread)
    half = np.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return Interval(share, np.maximum(middle - half, 0), np.minimum(middle + half, 1), total)


def share_change(before: Array, after: Array) -> Interval:
    """Return the change of the share of images for which something holds: bool [image] to bool [image, ...] -> [...].

    The interval (Newcombe, 1998, Statistics in Medicine 17, 2635: method 10, Wilson's intervals joined by the
    correlation of the pairs) is not empty where no image changes.
    """
    n = len(before)
    before = np.asarray(before, dtype=bool).reshape(n, *[1] * (after.ndim - 1))
    both, neither = (before & after).sum(axis=0), (~before & ~after).sum(axis=0)
    gained, lost = (~before & after).sum(axis=0), (before & ~after).sum(axis=0)
    new, old = share_interval(both + gained, n), share_interval(both + lost, n)
    agreement = (both * neither - gained * lost).astype(np.float64)
    # Corrected for continuity, on the side where pairs agree.
    agreement = np.where(agreement > 0, np.maximum(agreement - n / 2, 0), agreement)
    spread = np.sqrt(new.value * (1 - new.value) * old.value * (1 - old.value)) * n**2
    phi = np.divide(agreement, spread, out=np.zeros(spread.shape), where=spread > 0)

    def joined(first: Array, second: Array) -> Array:
        # A square, but for rounding.
        return np.asarray(np.sqrt(np.maximum(first**2 - 2 * phi * first * second + second**2, 0)))

    change = (gained - lost) / n
    below = joined(new.value - new.low, old.high - old.value)
    above = joined(new.high - new.value, old.value - old.low)
    return Interval(change, np.maximum(change - below, -1), np.minimum(change + above, 1), n)


def spearman(first: Array, second: Array, axis: int = -1) -> Array:
    """Return Spearman's rank correlation along an axis; NaN where either is constant."""
    import scipy.stats

    ranks = [scipy.stats.rankdata(values, axis=axis) for values in (first, second)]
    one, other = (each - each.mean(axis=axis, keepdims=True) for each in ranks)
    norm = np.sqrt((one**2).sum(axis=axis) * (other**2).sum(axis=axis))
    return np.divide((one * other).sum(axis=axis), norm, out=np.full(norm.shape, np.nan), where=norm > 0)


def rank_correlation(first: Array, second: Array, permutations: int = PERMUTATIONS) -> tuple[Interval, float]:
    """Return Spearman's over units [unit], such as heads, with its interval (Bonett and Wright, 2000) and p-value by
    permutation, all pairings where they are few. NaN where there are fewer than four units, or all are equal."""
    import scipy.stats

    n, undefined = len(first), np.asarray(np.nan)
    if n < 4 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return Interval(undefined, undefined, undefined, n), float("nan")
    ranks, others = (scipy.stats.zscore(scipy.stats.rankdata(each)) for each in (first, second))
    tested = scipy.stats.permutation_test(
        (ranks,),
        lambda permuted, axis: (permuted * others).mean(axis=axis),  # a pass over all permutations at once
        permutation_type="pairings",
        vectorized=True,
        n_resamples=permutations,
        rng=np.random.default_rng(0),
    )
    value = float(np.clip(tested.statistic, -1, 1))
    with np.errstate(divide="ignore"):
        middle, half = np.arctanh(value), NORMAL * np.sqrt((1 + value**2 / 2) / (n - 3))
    ends = np.tanh(middle - half), np.tanh(middle + half)
    return Interval(np.asarray(value), np.asarray(ends[0]), np.asarray(ends[1]), n), float(tested.pvalue)


def permuted_products(
    attention: Array, content: Array, permutations: int = PERMUTATIONS, seed: int = 0
) -> tuple[Array, Array]:
    """Return how far attention follows the content of places beyond the places themselves, [head], and the same of
    permuted images, [permutation, head].

    attention: [image, head, patch]; content: [image, patch]. The statistic is the mean over images of
    sum_p attention_p content_p. In each permutation, images get another image's content, so that places keep their
    content on average.
    """
    n, heads, patches = attention.shape
    places, usual = attention.mean(axis=0, dtype=np.float64), content.mean(axis=0, dtype=np.float64)
    by_place = places @ usual  # what all permutations share
    # Without it, a head with the same map on every image has exactly 0, and no rounding looks like a finding.
    moving = attention - places.astype(np.float32)
    rows = np.ascontiguousarray(moving.transpose(1, 0, 2).reshape(heads, n * patches), dtype=np.float32)
    content = (content - usual).astype(np.float32)
    observed = by_place + rows @ content.reshape(-1) / n
    generator = np.random.default_rng(seed)
    null = np.empty((permutations, heads))
    for start in range(0, permutations, PERMUTATION_BATCH):
        orders = [generator.permutation(n) for _ in range(min(PERMUTATION_BATCH, permutations - start))]
        mixed = np.stack([content[order].reshape(-1) for order in orders], axis=1)
        null[start : start + len(orders)] = by_place + (rows @ mixed).T / n
    return observed, null


def largest_of_all_p_value(observed: Array, null: Array) -> Array:
    """Return two-sided p-values for all statistics together: how often the largest of all, each standardised by its own
    permutations, is as large as an observed one (Westfall and Young, 1993). observed: [...]; null: [permutation, ...];
    1 for one that no permutation changes, NaN where it is NaN."""
    # The observed ones are among all: else few permutations would reject too often.
    every = np.concatenate([null, observed[None]])
    middle, deviation = every.mean(axis=0), every.std(axis=0)
    scale = np.where(deviation > 1e-7 * np.abs(middle), deviation, np.inf)
    distance = np.abs(observed - middle) / scale
    largest = np.nanmax(np.abs(null - middle) / scale, axis=tuple(range(1, null.ndim)), initial=0.0)
    # A permutation that gives back the data must count, whatever its rounding, in float32 too.
    p_value = ((largest[:, None] >= distance.ravel() * (1 - 1e-5)).sum(axis=0) + 1) / (len(null) + 1)
    return np.where(np.isnan(observed), np.nan, p_value.reshape(observed.shape))


def sign_flipped_sums(influences: Array, flips: int = PERMUTATIONS, seed: int = 0) -> Array:
    """Return sums over images with random signs (wild bootstrap: Wu, 1986; Mammen, 1993), how they would lie if each
    image's expectation were 0, whatever its variance: [image, ...] -> [flip, ...]."""
    generator = np.random.default_rng(seed)
    flat = influences.reshape(len(influences), -1).astype(np.float32, copy=False)
    sums = np.zeros((flips, flat.shape[1]), dtype=np.float32)
    for start in range(0, len(flat), IMAGES_AT_ONCE):
        block = flat[start : start + IMAGES_AT_ONCE]
        bits = np.frombuffer(generator.bytes(flips * math.ceil(len(block) / 8)), np.uint8).reshape(flips, -1)
        sums += np.unpackbits(bits, axis=1, count=len(block)).astype(np.float32) @ block
    # Of signs, which are twice the bits less one.
    return (2 * sums - flat.sum(axis=0)).reshape(flips, *influences.shape[1:])


def largest_effect_test(parts: Iterable[tuple[Array, Array]], flips: int = PERMUTATIONS) -> list[Array]:
    """Return p-values that effects are 0, for all parts together: [...] for each part.

    They come from the largest of all standardised sums of influences with random signs (Westfall and Young, 1993).
    parts: effects [...], and the influences of each image on them were there none, [image, ...]; parts may be of
    different images.
    """
    standardised, undefined, largest = [], [], np.zeros(flips)
    for effects, influences in parts:
        deviation = np.sqrt(np.square(influences, dtype=np.float64).sum(axis=0))
        varies = deviation > 1e-12
        scale = np.divide(1, deviation, out=np.zeros(deviation.shape), where=varies)
        flipped = np.abs(sign_flipped_sums(influences, flips)) * scale
        largest = np.maximum(largest, flipped.reshape(flips, -1).max(axis=1))
        standardised.append(np.abs(effects) * scale)
        undefined.append(~varies)
    largest.sort()
    above = [flips - np.searchsorted(largest, each * (1 - 1e-6)) for each in standardised]
    return [np.where(none, 1.0, (each + 1) / (flips + 1)) for none, each in zip(undefined, above, strict=True)]


def holm(p_values: Array) -> Array:
    """Adjust p-values so that any of those below a level is a false one with at most that chance (Holm, 1979); NaN
    stays and does not count."""
    adjusted = np.full(np.shape(p_values), np.nan)
    defined = ~np.isnan(p_values)
    order = np.argsort(p_values[defined])
    steps = p_values[defined][order] * np.arange(len(order), 0, -1)
    adjusted[defined] = np.minimum(np.maximum.accumulate(steps), 1)[np.argsort(order)]
    return adjusted


def normal_p_value(replicates: Array) -> float:
    """Return the two-sided p-value of a difference from its bootstrap replicates [replicate], taken for normal, so
    that it can be smaller than one of their number; NaN where any replicate is."""
    deviation = float(replicates.std())
    if not deviation:
        return float(replicates.mean() == 0)
    return 2 * NormalDist().cdf(-abs(float(replicates.mean())) / deviation)


def alternate_halves(labels: Array) -> Array:
    """Return which images are of the second of two halves: of each class, in order, the second, the fourth and so on;
    bool [image]. What is chosen on one half is reported on the other."""
    second = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        second[np.flatnonzero(labels == label)[1::2]] = True
    return second


def learnt_threshold(chance: float) -> float:
    """Return the accuracy above which a model counts as trained: 10% of the way from chance to perfect, which models
    with random weights do not reach by luck."""
    return chance + (1 - chance) / 10


def stratified(labels: Array, count: int) -> Array:
    """Return sorted rows of `count` images (or all), each class in its share to one image: [image]."""
    if count >= len(labels):
        return np.arange(len(labels))
    generator = np.random.default_rng(0)
    order = generator.permutation(len(labels))
    # Every (n / count)-th image in the order of classes.
    by_class = order[np.argsort(labels[order], kind="stable")]
    chosen = ((np.arange(count) + generator.random()) * len(labels) / count).astype(np.int64)
    return np.sort(by_class[chosen])
