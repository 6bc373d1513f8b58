"""What a map must show to be trusted as an explanation, and whether it does: from curves to one verdict a method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attention_visualizer.measures import intervals
from attention_visualizer.measures.intervals import Interval, share_interval
from attention_visualizer.measures.perturbation import OPERATORS, Curves, Operator

Array = NDArray[Any]

RANDOM, INKED, AMOUNT = "random", "random among inked", "amount of ink"
BASELINES = (RANDOM, INKED, AMOUNT)  # on an empty background, beating plain chance only says that ink was found
DIRECTIONS = ("deletion", "insertion")
OPERATOR_NAMES = {"fill": "background fill", "drop": "tokens dropped"}

# Declared beforehand: what trust needs at least.
MIN_GAIN = 0.02  # of the class's probability, mean over the shares of patches: two points in a hundred
MAX_LIKENESS = 0.5  # rank correlation with the map of random weights: a map that stays is not about the weights
CONTROL_FACTOR = 1.5  # times the largest gain of the same method's maps of random weights, for these answers


@dataclass(frozen=True)
class Gain:
    """How much better than a baseline a map is, in mean probability, paired over images; positive is better."""

    operator: Operator
    direction: str
    baseline: str
    value: Interval
    #: The same of the method's maps of random weights, [control], for the same answers; None without any.
    controls: Interval | None = None

    @property
    def control(self) -> Interval | None:
        """The gain of the random weights that come furthest."""
        return None if self.controls is None else self.controls[int(self.controls.value.argmax())]

    @property
    def needed(self) -> float:
        return MIN_GAIN if self.control is None else max(MIN_GAIN, CONTROL_FACTOR * float(self.control.value))

    @property
    def comparison(self) -> str:
        """The direction and the operator, in words."""
        return f"{self.direction}, {OPERATOR_NAMES[self.operator]}"

    @property
    def is_enough(self) -> bool:
        return bool(self.value.value >= self.needed and self.value.low > 0)

    @property
    def text(self) -> str:
        """Where, and how much: "deletion, background fill, against amount of ink, +0.031 (...), needs 0.02"."""
        value, low, high = (float(each) for each in (self.value.value, self.value.low, self.value.high))
        return (
            f"{self.comparison}, against {self.baseline}: {value:+.3f} ({low:+.3f} to {high:+.3f}), required "
            f"{self.needed:.3f}"
        )


@dataclass(frozen=True)
class MethodTrust:
    """What one ranking of patches was measured to do, and whether it is to be trusted as an explanation."""

    name: str
    areas: dict[tuple[Operator, str], Interval]  # (operator, direction) -> area under the curve
    gains: list[Gain]  # by operator, direction and baseline
    pointing: Interval  # share of images whose highest patch holds ink
    mass: Interval  # share of the map on inked patches
    likeness: Interval | None = None  # rank correlation with the original map, [stage of randomisation]
    control_likeness: Interval | None = None  # the same of each model with all weights random, [control]
    is_learnt: bool = True  # whether the model has learnt something, so that there is something to explain

    @property
    def worst(self) -> Gain:
        """The gain that is least beyond what it needs."""
        return min(self.gains, key=lambda gain: float(gain.value.value) - gain.needed)

    @property
    def is_faithful(self) -> bool:
        """Better than every baseline, in both directions with every operator, and not without training."""
        return all(gain.is_enough and gain.controls is not None for gain in self.gains)

    @property
    def closest_control(self) -> Interval | None:
        """The likeness to the map of those random weights that come closest."""
        likeness = self.control_likeness
        return None if likeness is None else likeness[int(likeness.high.argmax())]

    @property
    def is_sensitive(self) -> bool:
        """Return whether the map depends on the weights."""
        return self.closest_control is not None and bool(self.closest_control.high <= MAX_LIKENESS)

    @property
    def is_trusted(self) -> bool:
        return self.is_learnt and self.is_faithful and self.is_sensitive

    @property
    def reason(self) -> str:
        """The verdict in one plain sentence."""
        refused = f"Do not trust {self.name} here:"
        if not self.is_learnt:
            return f"{refused} the accuracy is not above chance and that of random weights, so nothing was learnt."
        failing = sum(not gain.is_enough for gain in self.gains)
        if failing:
            return (
                f"{refused} in {failing} of {len(self.gains)} comparisons with random and ink-only rankings it "
                f"misses the required gain (worst: {self.worst.text})."
            )
        if self.closest_control is None:
            return f"{refused} there is no model with random weights to compare with."
        if not self.is_sensitive:
            return (
                f"{refused} its similarity to the map of random weights is {self.closest_control.text(2)}, so it does "
                "not depend on what was learnt."
            )
        return (
            f"Trust {self.name} here, as to which patches the prediction depends on: it beats every random and "
            f"ink-only ranking (weakest: {self.worst.text}) and changes when the weights are randomised."
        )


@dataclass(frozen=True)
class ControlMap:
    """One method's maps of random weights."""

    curves: dict[Operator, Curves]  # of the model in question along these maps
    likeness: Array  # rank correlation with the original map, [image]


def judge(
    name: str,
    curves: dict[Operator, Curves],
    baselines: dict[tuple[str, Operator], Curves],
    maps: Array,
    ranking: Array,
    inked: Array,
    *,
    likeness: Interval | None,
    controls: list[ControlMap],
    control_rows: Array,
    is_learnt: bool,
) -> MethodTrust:
    """Sum up what was measured of one ranking. maps, ranking, inked: [image, patch]; control_rows: the rows of these
    images that the controls are over."""
    gains = gains_over(curves, baselines)
    control_gains = [gains_over(control.curves, baselines, control_rows) for control in controls]
    hits = np.take_along_axis(inked, ranking[:, :1], axis=1)
    total = np.maximum(maps.sum(axis=1), 1e-30)
    return MethodTrust(
        name,
        {
            (operator, direction): intervals.bootstrap_mean(area(curves[operator], direction))
            for operator in OPERATORS
            for direction in DIRECTIONS
        },
        [
            Gain(
                *comparison, intervals.bootstrap_mean(gain), mean_of_each([each[comparison] for each in control_gains])
            )
            for comparison, gain in gains.items()
        ],
        share_interval(int(hits.sum()), len(hits)),
        intervals.bootstrap_mean((maps * inked).sum(axis=1) / total),
        likeness,
        mean_of_each([control.likeness for control in controls]),
        is_learnt,
    )


def mean_of_each(values: list[Array]) -> Interval | None:
    """The mean of each model's values [image]: [model]; None without a model."""
    return intervals.bootstrap_mean(np.stack(values, axis=1)) if values else None


def gains_over(
    curves: dict[Operator, Curves], baselines: dict[tuple[str, Operator], Curves], rows: Array | slice = slice(None)
) -> dict[tuple[Operator, str, str], Array]:
    """(operator, direction, baseline) -> by how much the area is better than the baseline's, [image]. rows: those of
    the baselines' images that `curves` are over."""
    return {
        (operator, direction, baseline): sign
        * (area(curves[operator], direction) - area(baselines[baseline, operator], direction)[rows])
        for operator in OPERATORS
        for direction, sign in zip(DIRECTIONS, (-1, 1), strict=True)
        for baseline in BASELINES
    }


def area(curves: Curves, direction: str) -> Array:
    return curves.deletion_area if direction == "deletion" else curves.insertion_area
