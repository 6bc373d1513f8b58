"""Mean maps of each class, and where those of two classes differ, with and without what goes with their ink."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from attention_visualizer.analysis.study.study import Study
from attention_visualizer.analysis.study.survey import Survey
from attention_visualizer.data import ink
from attention_visualizer.data.image_sets import ImageSet
from attention_visualizer.measures import intervals
from attention_visualizer.measures.intervals import Interval

Array = NDArray[Any]

ALIKE_DIGITS = (("4", "9"), ("3", "5"), ("3", "8"), ("7", "9"))
MAX_CONFUSED_PAIRS = 2  # pairs that this model confuses most, besides
MAX_OF_CLASS = 1000  # images of one class in a permutation test: bounds memory
IMAGES_AT_ONCE = 500  # while resampling: bounds memory
NO_SPREAD = 1e-12  # variance of a patch's ink, below which nothing can be predicted from it
MIN_SHARE = 0.01  # declared beforehand: a difference of less than this share of the attention is not shown as one


@dataclass(frozen=True)
class Atlas:
    """The mean maps of each class over the images whose maps the survey kept."""

    names: list[str]  # of the classes
    counts: Array  # images of each, [class]
    num_images: int
    images: str  # in words, such as "10,000 test images"
    query: Literal["cls", "patches"]
    grid: tuple[int, int]
    mean_images: Array  # uint8 [class, height, width, channel]
    maps: Array  # mean over heads, shares of the attention on patches: [class, layer, patch]
    rollouts: Array | None  # shares of what reaches the patches: [class, layer, patch]; None where there are none
    ink: Array  # brightness, 0 to 1: [class, patch]
    differences: list[Difference]


@dataclass(frozen=True)
class Difference:
    """The first class's mean map minus the second's. p-values hold for all places of a pair together, intervals for
    each."""

    first: int  # class
    second: int
    counts: tuple[int, int]  # images of each
    attention: Interval  # shares of the attention on patches: [layer, patch]
    p_value: Array  # [layer, patch]
    beyond_ink: Interval  # what is left when each place's attention is predicted from its own ink: [layer, patch]
    beyond_ink_p_value: Array  # [layer, patch]
    with_ink: Interval  # share of the difference's squares, over layers and places, that this takes away: one value
    ink: Interval  # brightness, 0 to 1: [patch]
    ink_p_value: Array  # [patch]

    def differs(self) -> Array:
        """bool [layer, patch]"""
        return np.asarray((self.p_value < intervals.LEVEL) & (np.abs(self.attention.value) >= MIN_SHARE))

    def differs_beyond_ink(self) -> Array:
        """bool [layer, patch]"""
        return np.asarray((self.beyond_ink_p_value < intervals.LEVEL) & (np.abs(self.beyond_ink.value) >= MIN_SHARE))

    def ink_differs(self) -> Array:
        """bool [patch]"""
        return np.asarray(self.ink_p_value < intervals.LEVEL)


def measure(study: Study) -> Atlas:
    survey, images = study.survey, study.target.images
    names, labels = list(images.class_names), survey.labels[survey.kept]
    maps = np.nanmean(survey.shares, axis=2)  # over heads
    amount = ink.in_patches(ink.ink_amount, images, survey.kept, survey.grid)
    rollouts = None
    if survey.rollouts is not None:
        shares = survey.rollouts / survey.rollouts.sum(axis=-1, keepdims=True)
        rollouts = class_means(shares, labels, len(names))
    differences = []
    for first, second in chosen_pairs(names, labels, survey.predicted[survey.kept]):
        study.progress(f"classes {names[first]} and {names[second]}")
        differences.append(measure_difference(maps, amount, labels, first, second))
    return Atlas(
        names,
        np.bincount(labels, minlength=len(names)),
        len(survey.kept),
        describe_images(survey, images.kind),
        "cls" if survey.reads_class_token else "patches",
        survey.grid,
        mean_images(images, survey.kept, labels),
        class_means(maps, labels, len(names)),
        rollouts,
        class_means(amount, labels, len(names)),
        differences,
    )


def describe_images(survey: Survey, kind: str) -> str:
    """Return how many images the maps are of, such as "10,000 test images", and how they were chosen if not all."""
    n = len(survey.kept)
    chosen = f" of {survey.num_images:,}, each class in its share" if n < survey.num_images else ""
    return f"{n:,} {kind}s{chosen}"


def class_means(values: Array, labels: Array, num_classes: int) -> Array:
    """[image, ...] -> [class, ...]; NaN for a class without an image."""
    with np.errstate(invalid="ignore"):
        return np.stack([values[labels == each].sum(axis=0) / (labels == each).sum() for each in range(num_classes)])


def mean_images(images: ImageSet, rows: Array, labels: Array) -> Array:
    """Return the mean image of each class, black for one without an image: uint8 [class, height, width, channel]."""
    sums = np.zeros((len(images.class_names), *images.shape))
    for block, pixels in ink.in_blocks(images, rows):
        np.add.at(sums, labels[block], pixels.numpy())
    counts = np.maximum(np.bincount(labels, minlength=len(sums)), 1)
    return (sums / counts[:, None, None, None]).round().astype(np.uint8).transpose(0, 2, 3, 1)


def chosen_pairs(names: list[str], labels: Array, predicted: Array) -> list[tuple[int, int]]:
    """Return digits that look alike, then those that this model confuses most, in either direction."""
    alike = [pair for pair in ALIKE_DIGITS if set(pair) <= set(names)]
    pairs = [(names.index(first), names.index(second)) for first, second in alike]
    confused = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(confused, (labels, predicted), 1)
    both = np.triu(confused + confused.T, 1)
    order = np.argsort(-both, axis=None, kind="stable")
    most_confused = [(int(each // len(names)), int(each % len(names))) for each in order if both.flat[each] > 0]
    return pairs + [pair for pair in most_confused if pair not in pairs][:MAX_CONFUSED_PAIRS]


def without_ink(maps: Array, amount: Array) -> Array:
    """Return what the ink of a place does not predict of its attention, by a line for each layer and place.

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


def measure_difference(maps: Array, amount: Array, labels: Array, first: int, second: int) -> Difference:
    """Compare two classes. maps: [image, layer, patch]; amount: ink, [image, patch]; labels: [image]."""
    rows = [np.flatnonzero(labels == each)[:MAX_OF_CLASS] for each in (first, second)]
    both = np.concatenate(rows)
    residuals = without_ink(maps[both], amount[both])
    count = len(rows[0])
    p_value = intervals.largest_difference_test(maps[rows[0]], maps[rows[1]])
    beyond_p_value = intervals.largest_difference_test(residuals[:count], residuals[count:])
    ink_p_value = intervals.largest_difference_test(amount[rows[0]], amount[rows[1]])
    attention, beyond, with_ink, of_ink = resampled_differences(maps[both], amount[both], count)
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


def resampled_differences(maps: Array, amount: Array, count: int) -> tuple[Interval, ...]:
    """Return differences between the first `count` images and the others, each group resampled apart: of the attention
    [layer, patch], of what the ink of a place does not predict of it [layer, patch], the share of squares that goes
    with ink, and of the ink [patch].

    The lines through the ink are fitted again in each replicate, from the means of maps, ink, their product and square.
    """
    n, num_layers, num_patches = maps.shape
    moments = intervals.BootstrapMeans(2)
    for start in range(0, n, IMAGES_AT_ONCE):
        block = slice(start, start + IMAGES_AT_ONCE)
        block_ink, block_maps = amount[block, None], maps[block]
        moments.update(
            np.concatenate([block_maps, block_ink, block_maps * block_ink, block_ink**2], axis=1),
            (np.arange(n)[block] >= count).astype(np.int64),
        )

    def differences(first: Array, second: Array) -> tuple[Array, ...]:
        """Return the quantity from the groups' means [..., moment, patch]."""
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
