"""What a ranking gains, and what it must gain to be trusted as an explanation: from curves to one verdict a method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attention_visualizer.measures.intervals import REPLICATES, BootstrapMeans, Interval
from attention_visualizer.measures.perturbation import OPERATORS, Curves, Operator

Array = NDArray[Any]

RANDOM, INKED, AMOUNT, EDGES = "random", "random among inked", "amount of ink", "amount of edge"
BASELINES = (RANDOM, INKED, AMOUNT, EDGES)  # on an empty background, beating plain chance only says that ink was found
SHAPLEY, LEAVE_ONE_OUT = "Shapley values", "leave-one-out"
REFERENCES = (SHAPLEY, LEAVE_ONE_OUT)  # ask the model itself, with the operator that they are tested with
HALVES = ("Shapley values, first half of the permutations", "Shapley values, second half")
DIRECTIONS = ("deletion", "insertion")
OPERATOR_NAMES = {"fill": "background fill", "drop": "tokens dropped"}
COMPARISONS = [(operator, direction) for operator in OPERATORS for direction in DIRECTIONS]

# Declared beforehand: what trust needs at least. Shapley values meet it, which each report checks anew.
MIN_SHARE = 0.5  # of what Shapley values gain: a map that misses more than it shows is no explanation
MIN_GAIN = 0.02  # of the class's probability, mean over the shares of patches: two points in a hundred
MAX_LIKENESS = 0.5  # rank correlation with the map of random weights: a map that stays is not about the weights
RESAMPLES = 100  # of the images, for the power of the rule: its standard error is at most 0.05
POWER_REPLICATES = 200  # of the intervals of each of them


def performance(curves: dict[tuple[str, Operator], Curves], ranking: str) -> Array:
    """Return how well the answers follow a ranking, higher is better: the area under the insertion curve, minus that
    under the deletion curve, [image, operator, direction]."""
    areas = [[-curves[ranking, each].deletion_area, curves[ranking, each].insertion_area] for each in OPERATORS]
    return np.moveaxis(np.array(areas), 2, 0)


def mean_of_comparisons(values: Array) -> Array:
    """[..., operator, direction] -> [...]."""
    return np.asarray(values.mean(axis=(-2, -1)))


@dataclass(frozen=True)
class Gains:
    """How much better than others a ranking is, in mean probability, over images."""

    over: dict[str, Interval]  # baseline -> [operator, direction]
    mean_over: dict[str, Interval]  # baseline -> mean over operators and directions
    share: dict[
        str, Interval
    ]  # of what a reference gains over random among inked, of those means; NaN where too little
    shares: dict[str, Interval]  # the same, [operator, direction]
    #: Over the same method's map of random weights, mean over operators and directions, [control]; None without any.
    over_controls: Interval | None

    def failures(self) -> list[str]:
        """Return what trust misses, as plain phrases."""
        found, share = [], self.share[SHAPLEY]
        if np.isnan(share.value):
            found.append("Shapley values themselves gain too little here to compare with")
        elif share.low <= MIN_SHARE:
            found.append(f"its share of what Shapley values gain is not surely above {100 * MIN_SHARE:.0f}%")
        weakest = min(self.mean_over, key=lambda name: float(self.mean_over[name].value))
        if not is_enough(self.mean_over[weakest]):
            found.append(f"its gain over the ranking by {weakest} is {signed(self.mean_over[weakest])}")
        worse = [
            f"it is worse than the ranking by {name} in {direction}, {OPERATOR_NAMES[operator]}"
            for name, gain in self.over.items()
            for (operator, direction), high in zip(COMPARISONS, gain.high.flat, strict=True)
            if high < 0
        ]
        found += worse[:1]
        if self.over_controls is None:
            found.append("there is no model with random weights to compare with")
        else:
            control = self.over_controls[int(self.over_controls.value.argmin())]
            if not is_enough(control):
                found.append(f"its gain over a map of random weights is {signed(control)}")
        return found

    def beats(self, baseline: str) -> str:
        """Return "yes", "no" where a gain of MIN_GAIN is ruled out, or "not distinguishable"."""
        gain = self.mean_over[baseline]
        return "yes" if is_enough(gain) else "no" if gain.high < MIN_GAIN else "not distinguishable"


def is_enough(gain: Interval) -> bool:
    return bool(gain.value >= MIN_GAIN and gain.low > 0)


def signed(gain: Interval) -> str:
    return f"{float(gain.value):+.3f} ({float(gain.low):+.3f} to {float(gain.high):+.3f})"


@dataclass(frozen=True)
class PairedGains:
    """What a ranking and the references gain, image by image."""

    over: dict[str, Array]  # the ranking over each baseline, [image, operator, direction]
    possible: dict[str, Array]  # each reference over random among inked, [image, operator, direction]
    over_controls: Array  # the ranking over each map of random weights, [control image, control]
    control_rows: Array  # the rows of these images that the controls are over

    @classmethod
    def of(
        cls,
        ranking: Array,
        baselines: dict[str, Array],
        references: dict[str, Array],
        controls: list[Array],
        control_rows: Array,
    ) -> PairedGains:
        """All but control_rows are performances, [image, operator, direction]."""
        own = ranking[control_rows]
        differences = [mean_of_comparisons(own - control) for control in controls]
        return cls(
            {name: ranking - each for name, each in baselines.items()},
            {name: each - baselines[INKED] for name, each in references.items()},
            np.stack(differences, axis=1) if controls else np.zeros((len(control_rows), 0)),
            control_rows,
        )

    def resampled(self, rows: Array) -> PairedGains:
        """The same of these images, any of them several times or not at all."""
        positions = np.full(rows.size, -1)
        positions[self.control_rows] = np.arange(len(self.control_rows))
        kept = positions[rows][positions[rows] >= 0]
        return PairedGains(
            {name: each[rows] for name, each in self.over.items()},
            {name: each[rows] for name, each in self.possible.items()},
            self.over_controls[kept],
            np.flatnonzero(positions[rows] >= 0),
        )

    def summary(self, replicates: int = REPLICATES) -> Gains:
        """The means with their intervals, all from the same resampled images, so that shares are paired."""
        values = {("over", name): each for name, each in self.over.items()}
        values |= {("possible", name): each for name, each in self.possible.items()}
        stream = BootstrapMeans(replicates=replicates, num_images=len(self.over[INKED]))
        stream.update(np.stack(list(values.values()), axis=1))
        at = {key: position for position, key in enumerate(values)}

        def ratio(reference: str, mean: Any) -> Interval:
            """Of means [..., operator, direction] by way of `mean`; NaN where the reference has no gain to speak of."""
            own, whole = at["over", INKED], at["possible", reference]
            possible = stream.of(lambda means: mean(means[..., whole, :, :]))
            with np.errstate(divide="ignore", invalid="ignore"):
                share = stream.of(lambda means: mean(means[..., own, :, :]) / mean(means[..., whole, :, :]))
            is_defined = (possible.low > 0) & (possible.value >= MIN_GAIN)
            value, low, high = (np.where(is_defined, each, np.nan) for each in (share.value, share.low, share.high))
            return Interval(value, low, high, share.n)

        def gain(name: str, mean: Any) -> Interval:
            return stream.of(lambda means: mean(means[..., at["over", name], :, :]))

        controls = None
        if self.over_controls.size:
            control_stream = BootstrapMeans(replicates=replicates, num_images=len(self.over_controls))
            control_stream.update(self.over_controls)
            controls = control_stream.of_group()
        return Gains(
            {name: gain(name, np.asarray) for name in self.over},
            {name: gain(name, mean_of_comparisons) for name in self.over},
            {name: ratio(name, mean_of_comparisons) for name in self.possible},
            {name: ratio(name, np.asarray) for name in self.possible},
            controls,
        )

    def chance_of_passing(self, seed: int = 0) -> float:
        """Return the share of resampled sets of images in which the ranking has every gain that trust needs."""
        generator, count = np.random.default_rng(seed), len(self.over[INKED])
        samples = (self.resampled(generator.integers(count, size=count)) for _ in range(RESAMPLES))
        return float(np.mean([not sample.summary(POWER_REPLICATES).failures() for sample in samples]))


@dataclass(frozen=True)
class MethodTrust:
    """What one ranking of patches was measured to do, and whether it is to be trusted as an explanation."""

    name: str
    areas: Interval  # under the curves, [operator, direction]
    gains: Gains
    pointing: Interval | None = None  # share of images whose highest patch holds ink
    mass: Interval | None = None  # share of the map on inked patches
    likeness: Interval | None = None  # rank correlation with the original map, [stage of randomisation]
    control_likeness: Interval | None = None  # the same of each model with all weights random, [control]
    is_learnt: bool = True  # whether the model has learnt something, so that there is something to explain

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
    def failures(self) -> list[str]:
        """Return what trust misses, as plain phrases."""
        if not self.is_learnt:
            return ["the accuracy is not above chance and that of random weights, so nothing was learnt"]
        found = self.gains.failures()
        if self.closest_control is not None and not self.is_sensitive:
            found.append(f"its similarity to the map of random weights is {self.closest_control.text(2)}")
        return found

    @property
    def is_trusted(self) -> bool:
        return not self.failures

    @property
    def degrees(self) -> str:
        """The verdict in degrees: how much it gains, whether it beats the ink, whether it is about the weights."""
        share = self.gains.share[SHAPLEY]
        gained = "no share can be given" if np.isnan(share.value) else f"{share.text(0, percent=True)}"
        likeness = self.closest_control
        depends = "unknown" if likeness is None else "yes" if self.is_sensitive else "no"
        return (
            f"{gained} of what Shapley values gain; beats the amount of ink: {self.gains.beats(AMOUNT)}, "
            f"{signed(self.gains.mean_over[AMOUNT])}; depends on the weights: {depends}"
        )

    @property
    def reason(self) -> str:
        """The verdict in one plain sentence."""
        if self.failures:
            return f"Not trusted: {self.failures[0]}."
        return (
            "Trusted, as to which patches the prediction depends on: it gains most of what Shapley values gain, beats "
            "every baseline ranking and its maps of random weights, and depends on the weights."
        )
