"""Numbers from runs that differ in their settings: each setting, and its difference from the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attention_visualizer.analysis.runs.survey import CONTROL_FACTOR, SurveyedRun, scales
from attention_visualizer.analysis.study.compared_runs import ComparedRun
from attention_visualizer.analysis.study.survey import MEASURE_NAMES, Survey
from attention_visualizer.measures.intervals import (
    LEVEL,
    Interval,
    bootstrap_p_value,
    false_discovery_control,
    percentiles,
)

Array = NDArray[Any]


MOST_NAMED = 2  # knobs in the name of a setting


@dataclass(frozen=True)
class Quantity:
    """name: of the measure, or "accuracy"; minimum: the smallest difference that is worth a word."""

    name: str
    label: str
    minimum: float


QUANTITIES = (
    # Twenty of 10,000 test images: more than another seed brings about in the default model (12 over three seeds).
    Quantity("accuracy", "accuracy", 0.002),
    # A twentieth of what uniform attention has.
    Quantity("entropy", "attention entropy (uniform = 1)", 0.05),
    Quantity("distance", "attention distance (uniform = 1)", 0.05),
    # A twentieth of the largest divergence, ln 2 = 0.69.
    Quantity("divergence", "divergence between a layer's heads (nats)", 0.035),
)


@dataclass(frozen=True)
class Value:
    """A quantity of one run or setting: [] and [replicate], paired between runs; n: pictures."""

    mean: float
    replicates: Array
    n: int

    @property
    def interval(self) -> Interval:
        low, high = percentiles(self.replicates)
        return Interval(np.array(self.mean), np.asarray(low), np.asarray(high), self.n)


@dataclass(frozen=True)
class Setting:
    """Runs with the same settings.

    label: all that differ; name: the same, or its number if that is long. values: quantity -> of the runs' mean;
    of_runs: quantity -> of each; controls: quantity -> [control], of random weights in this architecture.
    """

    label: str
    name: str
    runs: list[ComparedRun]
    values: dict[str, Value]
    of_runs: dict[str, list[float]]
    controls: dict[str, Array]

    @property
    def has_learnt(self) -> bool:
        """Whether it classifies clearly better than random weights; else nothing of it is a finding."""
        return self.values["accuracy"].mean > CONTROL_FACTOR * float(np.max(self.controls["accuracy"]))


@dataclass(frozen=True)
class Difference:
    """Of one setting from the first in one quantity, over the same pictures.

    limit: the largest difference between their random weights; adjusted: the p-value, over all differences; learnt:
    whether both classify clearly better than random weights; apart: whether all runs of one lie on one side of all
    runs of the other, as two single runs do.
    """

    quantity: Quantity
    setting: Setting
    interval: Interval
    limit: float
    adjusted: float
    learnt: bool
    apart: bool

    @property
    def stands_out(self) -> bool:
        """Beyond what other pictures, random weights and the minimum effect can explain; not beyond another seed."""
        size = abs(float(self.interval.value))
        limit = 0.0 if self.quantity.name == "accuracy" else CONTROL_FACTOR * self.limit
        return self.learnt and self.apart and self.adjusted <= LEVEL and size >= max(self.quantity.minimum, limit)


def compare_settings(looked: Sequence[SurveyedRun], controls: Sequence[Sequence[SurveyedRun]]) -> list[Setting]:
    """controls: for each run, models with random weights in its architecture. -> by the knobs' values."""
    grouped: dict[tuple[str, ...], list[int]] = {}
    for position in sorted(range(len(looked)), key=lambda position: order(looked[position].run)):
        grouped.setdefault(looked[position].run.setting, []).append(position)
    settings: list[Setting] = []
    for setting, positions in grouped.items():
        members = [values_of(looked[position]) for position in positions]
        untrained = [values_of(each) for each in controls[positions[0]]]
        settings.append(
            Setting(
                ", ".join(setting),
                ", ".join(setting) if len(setting) <= MOST_NAMED else f"setting {len(settings) + 1}",
                [looked[position].run for position in positions],
                {name: mean_value([each[name] for each in members]) for name in members[0]},
                {name: [each[name].mean for each in members] for name in members[0]},
                {name: np.array([each[name].mean for each in untrained]) for name in members[0]},
            )
        )
    return settings


def order(run: ComparedRun) -> tuple[tuple[int, float, str], ...]:
    """Numbers by size, before words by the alphabet."""
    return tuple(
        (0, float(value), "") if isinstance(value, int | float) else (1, 0.0, str(value))
        for value in run.knobs.values()
    )


def values_of(looked: SurveyedRun) -> dict[str, Value]:
    """Quantity -> value; NaN where the model has none, such as the divergence of a single head."""
    found = {}
    if looked.accuracies is not None:
        mean, replicates = looked.accuracies.resampled()
        found["accuracy"] = Value(float(mean), replicates, int(looked.accuracies.num_images[0]))
    for quantity in QUANTITIES[1:]:
        level, paired = over_layers(looked.survey, quantity.name)
        found[quantity.name] = Value(level, paired, looked.survey.num_images)
    return found


def over_layers(survey: Survey, measure: str) -> tuple[float, Array]:
    """The mean over layers and heads, relative to uniform attention where that has a value, and its replicates."""
    means, replicates = survey.means.resampled()
    column = MEASURE_NAMES.index(measure)
    scale = scales(survey, measure)
    layers = means[column, :, -1] / scale
    there = ~np.isnan(layers)
    if not there.any():
        return float("nan"), np.full(len(replicates), np.nan)
    return float(layers[there].mean()), (replicates[:, column, :, -1] / scale)[:, there].mean(axis=1)


def mean_value(values: Sequence[Value]) -> Value:
    """Over runs of one setting, the same pictures counted in each replicate."""
    replicates = np.mean([value.replicates for value in values], axis=0)
    return Value(float(np.mean([value.mean for value in values])), replicates, values[0].n)


def differences(settings: Sequence[Setting]) -> list[Difference]:
    """Of every setting from the first, in every quantity: one family."""
    first = settings[0]
    found, p_values = [], []
    for quantity in QUANTITIES:
        for setting in settings[1:]:
            if quantity.name not in setting.values:
                continue
            one, other = first.values[quantity.name], setting.values[quantity.name]
            value = Value(other.mean - one.mean, other.replicates - one.replicates, one.n)
            learnt = all("accuracy" in each.values and each.has_learnt for each in (first, setting))
            limit = largest_control_difference(first.controls[quantity.name], setting.controls[quantity.name])
            p_values.append(bootstrap_p_value(value.replicates))
            ours, theirs = first.of_runs[quantity.name], setting.of_runs[quantity.name]
            apart = max(ours) < min(theirs) or max(theirs) < min(ours)
            found.append((quantity, setting, value.interval, limit, learnt, apart))
    adjusted = false_discovery_control(np.array(p_values, dtype=np.float64))
    return [
        Difference(quantity, setting, interval, limit, float(p_value), learnt, apart)
        for (quantity, setting, interval, limit, learnt, apart), p_value in zip(found, adjusted, strict=True)
    ]


def largest_control_difference(first: Array, second: Array) -> float:
    """Between models with random weights of two settings; those of the same number may be the very same model."""
    gaps = np.abs(first[:, None] - second[None])
    return float("nan") if np.isnan(gaps).all() else float(np.nanmax(gaps))
