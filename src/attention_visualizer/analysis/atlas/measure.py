"""Mean maps of each class, and where those of two classes differ, with and without what ink predicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from attention_visualizer.analysis.study.study import Study
from attention_visualizer.analysis.study.survey import Survey
from attention_visualizer.data import ink
from attention_visualizer.data.image_sets import ImageSet
from attention_visualizer.measures import intervals
from attention_visualizer.measures.ink_regression import PIXEL_COMPONENTS, Residuals, main_components, residuals_of
from attention_visualizer.measures.intervals import Interval

Array = NDArray[Any]

ALIKE_DIGITS = (("4", "9"), ("3", "5"), ("3", "8"), ("7", "9"))
MAX_CONFUSED_PAIRS = 2  # pairs that this model confuses most, besides
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
    regressions: list[Regression]  # from nothing taken out to the most
    differences: list[Difference]

    @property
    def differ(self) -> Array:
        """Return where the classes of a pair differ beyond what was taken out: bool [2, regression, pair, layer,
        patch]."""
        return np.stack([each.differs for each in self.differences], axis=2)


@dataclass(frozen=True)
class Regression:
    """What was taken out of the maps before classes were compared."""

    taken_out: str  # in words
    regressors: int  # of each place
    predicted: float  # share of the variance of the maps that they predict, out of fold


@dataclass(frozen=True)
class Difference:
    """The first class's mean map minus the second's. p-values hold for all places of all pairs together, intervals for
    each place."""

    first: int  # class
    second: int
    confused: int | None  # how often the model takes one for the other, None for a pair named beforehand
    counts: tuple[int, int]  # images of each
    # In shares of the attention on patches, of what each regression leaves, over all images or those of the pair alone:
    attention: Interval  # [2, regression, layer, patch]
    p_value: Array  # that the class says nothing beyond what was taken out: [2, regression, layer, patch]
    ink: Interval  # brightness, 0 to 1: [patch]
    ink_p_value: Array  # [patch]
    largest: tuple[int, int]  # layer and patch with the largest difference on half of the images, nothing taken out
    largest_elsewhere: Interval  # what it is there on the other half

    @property
    def differs(self) -> Array:
        """Return where the classes differ beyond what was taken out: bool [2, regression, layer, patch]."""
        return np.asarray((self.p_value < intervals.CHAPTER_LEVEL) & (np.abs(self.attention.value) >= MIN_SHARE))

    @property
    def differs_in_all(self) -> Array:
        """Return where they differ whatever was taken out: bool [layer, patch]."""
        return np.asarray(self.differs.all(axis=(0, 1)))

    @property
    def ink_differs(self) -> Array:
        """bool [patch]"""
        return np.asarray(self.ink_p_value < intervals.CHAPTER_LEVEL)


def measure(study: Study) -> Atlas:
    survey, images = study.survey, study.target.images
    names, labels = list(images.class_names), survey.labels[survey.kept]
    maps = np.nanmean(survey.shares, axis=2)  # over heads
    amount = ink.in_patches(ink.ink_amount, images, survey.kept, survey.grid)
    rollouts = None
    if survey.rollouts is not None:
        shares = survey.rollouts / survey.rollouts.sum(axis=-1, keepdims=True)
        rollouts = class_means(shares, labels, len(names))
    pixels = main_components(pixel_values(images, survey.kept), PIXEL_COMPONENTS)
    pairs = chosen_pairs(names, labels, survey.predicted[survey.kept])
    study.progress(f"{len(pairs)} pairs of classes")
    regressions, differences = compare(maps, amount, labels, pixels, pairs) if pairs else ([], [])
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
        regressions,
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


def pixel_values(images: ImageSet, rows: Array) -> Array:
    """Return the brightness of all pixels, 0 to 1: float32 [image, pixel]."""
    return np.concatenate(
        [pixels.amax(dim=1).flatten(1).float().numpy() / 255 for _, pixels in ink.in_blocks(images, rows)]
    )


def chosen_pairs(names: list[str], labels: Array, predicted: Array) -> dict[tuple[int, int], int | None]:
    """Return digits that look alike, then those that this model confuses most, in either direction, with how often; of
    classes with an image for each half."""
    counts = np.bincount(labels, minlength=len(names))
    known = {name for name, count in zip(names, counts, strict=True) if count >= 2}
    alike = [pair for pair in ALIKE_DIGITS if set(pair) <= known]
    pairs: dict[tuple[int, int], int | None] = {
        (names.index(first), names.index(second)): None for first, second in alike
    }
    confused = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(confused, (labels, predicted), 1)
    both = np.triu(confused + confused.T, 1)
    order = np.argsort(-both, axis=None, kind="stable")
    most_confused = [(int(each // len(names)), int(each % len(names))) for each in order if both.flat[each] > 0]
    others = [pair for pair in most_confused if pair not in pairs and counts[list(pair)].min() >= 2]
    return pairs | {pair: int(both[pair]) for pair in others[:MAX_CONFUSED_PAIRS]}


def compare(
    maps: Array, amount: Array, labels: Array, pixels: Array, pairs: Mapping[tuple[int, int], int | None]
) -> tuple[list[Regression], list[Difference]]:
    """Compare the mean maps of pairs of classes, with more and more taken out.

    maps: [image, layer, patch]; amount: ink, [image, patch]; labels: [image]; pixels: their main components, [image,
    component]; pairs: classes -> how often they are confused. Each regression is made over all images, which are
    most, and over those of the pair alone, which it may describe better.
    """
    regressions, of_all = [], []
    for residuals in residuals_of(maps, amount, labels, pixels):
        predicted = 1 - float(residuals.maps.var(axis=0).sum() / max(maps.var(axis=0).sum(), 1e-12))
        regressions.append(Regression(residuals.taken_out, residuals.regressors or 0, predicted))
        of_all.append(class_differences([(residuals, labels, pair) for pair in pairs]))
    rows = [np.isin(labels, pair) for pair in pairs]
    local = [list(residuals_of(maps[those], amount[those], labels[those], pixels[those])) for those in rows]
    of_pair = [
        class_differences([(each, labels[those], pair) for each, those, pair in zip(left, rows, pairs, strict=True)])
        for left in zip(*local, strict=True)
    ]
    of_ink = [group_difference(amount, labels, pair) for pair in pairs]
    noise = amount - class_means(amount, labels, int(labels.max()) + 1)[labels]
    ink_p_values = intervals.largest_effect_test(
        effect_and_influences(indicator(labels, pair)[:, None], amount, noise) for pair in pairs
    )
    differences = []
    for index, ((first, second), confused) in enumerate(pairs.items()):
        found = [[regression[index] for regression in scope] for scope in (of_all, of_pair)]
        differences.append(
            Difference(
                first,
                second,
                confused,
                (int((labels == first).sum()), int((labels == second).sum())),
                stacked([stacked([interval for interval, _ in scope]) for scope in found]),
                np.array([[p_value for _, p_value in scope] for scope in found]),
                of_ink[index],
                ink_p_values[index],
                *largest_of_half(maps, labels, (first, second)),
            )
        )
    return regressions, differences


def indicator(labels: Array, pair: tuple[int, int]) -> Array:
    """Return the weights of images whose sum is the mean of the first class minus that of the second: [image]."""
    first, second = (labels == each for each in pair)
    return (first / max(first.sum(), 1) - second / max(second.sum(), 1)).astype(np.float32)


def group_difference(values: Array, labels: Array, pair: tuple[int, int]) -> Interval:
    """Return the first class's mean minus the second's: [image, ...] -> [...]."""
    groups = [values[labels == each].astype(np.float64) for each in pair]
    difference = groups[0].mean(axis=0) - groups[1].mean(axis=0)
    half = intervals.NORMAL * np.sqrt(sum(each.var(axis=0) / max(len(each) - 1, 1) for each in groups))
    return Interval(difference, difference - half, difference + half, sum(map(len, groups)))


def stacked(found: Sequence[Interval]) -> Interval:
    """Stack intervals over the same images."""
    value, low, high = (np.stack([getattr(each, name) for each in found]) for name in ("value", "low", "high"))
    return Interval(value, low, high, found[0].n)


def class_differences(cases: Sequence[tuple[Residuals, Array, tuple[int, int]]]) -> list[tuple[Interval, Array]]:
    """Return what is left of the difference of each pair, and the p-values that its classes have the same attention,
    what was taken out being equal, for all places of all pairs together: [layer, patch] each.

    cases: residuals, the labels of their images, and the pair.
    """

    def parts() -> Iterator[tuple[Array, Array]]:
        for residuals, _, (first, second) in cases:
            weights = residuals.class_effects
            yield effect_and_influences(
                weights[:, first, None] - weights[:, second, None], residuals.maps, residuals.noise
            )

    left = [group_difference(residuals.maps, labels, pair) for residuals, labels, pair in cases]
    return list(zip(left, intervals.largest_effect_test(parts()), strict=True))


def effect_and_influences(weights: Array, values: Array, noise: Array) -> tuple[Array, Array]:
    """Return a weighted sum of images [...], and the influence of each image on it were it 0 [image, ...].

    weights, values: [image, ...]; noise: the values without what goes with any class. What this effect alone makes is
    added to it again (Freedman and Lane, 1983).
    """
    effect = (weights * values).sum(axis=0, dtype=np.float64)
    return effect, weights * (noise + weights * effect / np.maximum((weights**2).sum(axis=0), 1e-12))


def largest_of_half(maps: Array, labels: Array, pair: tuple[int, int]) -> tuple[tuple[int, int], Interval]:
    """Choose the place of the largest difference on every second image of each class, from the first; return where it
    is, and what it is there on the others."""
    rows = [np.flatnonzero(labels == each) for each in pair]
    chosen, others = (np.concatenate([each[start::2] for each in rows]) for start in (0, 1))
    there = group_difference(maps[chosen], labels[chosen], pair)
    elsewhere = group_difference(maps[others], labels[others], pair)
    layer, patch = np.unravel_index(int(np.abs(there.value).argmax()), there.value.shape)
    return (int(layer), int(patch)), elsewhere[layer, patch]
