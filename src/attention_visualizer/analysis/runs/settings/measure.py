"""Runs that differ in their settings: each setting, and its differences from the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attention_visualizer.analysis.runs.surveyed_runs import (
    CONTROL_FACTOR,
    FEW_SEEDS,
    SURVEY_IMAGES,
    Quantity,
    SurveyedRun,
    uniform_values,
)
from attention_visualizer.analysis.study.compared_runs import ComparedRun, short_name
from attention_visualizer.analysis.study.study import FIRST_CONTROL, Study
from attention_visualizer.analysis.study.survey import MEASURE_NAMES, Survey
from attention_visualizer.measures.intervals import (
    CHAPTER_LEVEL,
    Interval,
    holm,
    normal_p_value,
    percentiles,
)
from attention_visualizer.measures.over_seeds import student_interval
from attention_visualizer.models.untrained import random_weights
from attention_visualizer.runs.config_fields import is_architecture

Array = NDArray[Any]

MAX_NAMED = 2  # varied settings that the name of a setting holds
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
    """A quantity of one run or setting."""

    mean: float
    replicates: Array  # [replicate], of resampled images, the same ones in all runs
    halves: Array  # [half], of the images
    n: int  # images

    @property
    def interval(self) -> Interval:
        low, high = percentiles(self.replicates)
        return Interval(np.array(self.mean), np.asarray(low), np.asarray(high), self.n).including(self.halves)


@dataclass(frozen=True)
class Setting:
    """The runs with the same settings."""

    label: str  # all settings that vary
    name: str  # the same, or "setting 3" where that is long
    runs: list[ComparedRun]
    values: dict[str, Value]  # quantity -> mean over the runs
    values_by_run: dict[str, list[float]]
    controls: dict[str, Array]  # quantity -> [control], of random weights in this architecture

    def interval(self, quantity: str) -> Interval:
        """Return its interval over the runs where these are enough, else over images."""
        if len(self.runs) >= FEW_SEEDS:
            return student_interval(np.array(self.values_by_run[quantity]))
        return self.values[quantity].interval

    @property
    def has_learnt(self) -> bool:
        """Return whether it classifies clearly better than random weights; else nothing of it is a finding."""
        return self.values["accuracy"].mean > CONTROL_FACTOR * float(np.max(self.controls["accuracy"]))


@dataclass(frozen=True)
class SettingDifference:
    """The difference of one setting from the first in one quantity, over the same images."""

    quantity: Quantity
    setting: Setting
    interval: Interval
    limit: float  # the largest difference between their random weights
    adjusted: float  # p-value, adjusted over all differences
    learnt: bool  # whether both classify clearly better than random weights
    apart: bool  # whether all runs of one lie on one side of all runs of the other, as two single runs do

    @property
    def stands_out(self) -> bool:
        """Beyond what other images, random weights and the minimum effect can explain; not beyond another seed."""
        size = abs(float(self.interval.value))
        limit = 0.0 if self.quantity.name == "accuracy" else CONTROL_FACTOR * self.limit
        return (
            self.learnt and self.apart and self.adjusted < CHAPTER_LEVEL and size >= max(self.quantity.minimum, limit)
        )


@dataclass(frozen=True)
class SettingComparison:
    """Runs of at least two settings over the same images."""

    runs: list[SurveyedRun]
    image_kind: str  # such as "test image"
    settings: list[Setting]
    differences: list[SettingDifference]  # of every setting from the first, in every quantity

    @property
    def num_images(self) -> int:
        return self.runs[0].survey.num_images

    @property
    def num_classified(self) -> int:
        """The number of images that accuracy is of."""
        correct = self.runs[0].correct
        return self.num_images if correct is None else len(correct)

    @property
    def varied(self) -> list[str]:
        """Return short names of the settings that vary."""
        return [short_name(name) for name in self.runs[0].run.varied]


def measure(study: Study, surveyed: list[SurveyedRun]) -> SettingComparison:
    settings = group_by_setting(surveyed, survey_random_weights(study, surveyed))
    return SettingComparison(surveyed, study.target.images.kind, settings, differences_from_first(settings))


def survey_random_weights(study: Study, surveyed: Sequence[SurveyedRun]) -> list[list[SurveyedRun]]:
    """Survey, for each run, as many models with random weights in its architecture as the study's budget says."""
    rows = study.stratified_rows(SURVEY_IMAGES)
    by_architecture: dict[str, list[SurveyedRun]] = {}
    controls = []
    for each in surveyed:
        # What only training knows of makes no other model.
        architecture = repr(
            {name: value for name, value in each.run.loaded.model_config.to_dict().items() if is_architecture(name)}
        )
        if architecture not in by_architecture:
            study.progress(f"random weights in the architecture of {each.run.label}")
            models = [
                random_weights(each.run.loaded.build_model().to(study.target.device), FIRST_CONTROL + index)
                for index in range(study.budget.controls)
            ]
            surveys = [study.target.with_model(model).survey(rows) for model in models]
            by_architecture[architecture] = [SurveyedRun(each.run, survey, survey.correct) for survey in surveys]
        controls.append(by_architecture[architecture])
    return controls


def group_by_setting(surveyed: Sequence[SurveyedRun], controls: Sequence[Sequence[SurveyedRun]]) -> list[Setting]:
    """Group runs by the values of the varied settings, and sort the groups by these.

    controls: for each run, models with random weights in its architecture.
    """
    positions_by_setting: dict[tuple[str, ...], list[int]] = {}
    for position in sorted(range(len(surveyed)), key=lambda position: sort_key(surveyed[position].run)):
        positions_by_setting.setdefault(surveyed[position].run.setting, []).append(position)
    settings: list[Setting] = []
    for parts, positions in positions_by_setting.items():
        trained = [quantity_values(surveyed[position]) for position in positions]
        untrained = [quantity_values(control) for control in controls[positions[0]]]
        label = ", ".join(parts)
        settings.append(
            Setting(
                label,
                label if len(parts) <= MAX_NAMED else f"setting {len(settings) + 1}",
                [surveyed[position].run for position in positions],
                {name: mean_value([values[name] for values in trained]) for name in trained[0]},
                {name: [values[name].mean for values in trained] for name in trained[0]},
                {name: np.array([values[name].mean for values in untrained]) for name in trained[0]},
            )
        )
    return settings


def sort_key(run: ComparedRun) -> tuple[tuple[int, float, str], ...]:
    """Sort numbers by size, before words by the alphabet."""
    return tuple(
        (0, float(value), "") if isinstance(value, int | float) else (1, 0.0, str(value))
        for value in run.varied.values()
    )


def quantity_values(surveyed: SurveyedRun) -> dict[str, Value]:
    """Measure each quantity; NaN where the model has none, such as the divergence of a single head."""
    values = {}
    if surveyed.accuracies is not None:
        accuracies = surveyed.accuracies
        mean, replicates = accuracies.resampled()
        values["accuracy"] = Value(float(mean), replicates, accuracies.of_halves(), int(accuracies.num_images[0]))
    for quantity in QUANTITIES[1:]:
        values[quantity.name] = mean_over_layers(surveyed.survey, quantity.name)
    return values


def mean_over_layers(survey: Survey, measure: str) -> Value:
    """Average a measure over layers and heads, relative to uniform attention where that has a value."""
    means, replicates = survey.means.resampled()
    column = MEASURE_NAMES.index(measure)
    uniform = uniform_values(survey, measure)
    layers = means[column, :, -1] / uniform
    known = ~np.isnan(layers)
    if not known.any():
        return Value(float("nan"), np.full(len(replicates), np.nan), np.full(2, np.nan), survey.num_images)
    resampled, halves = (
        (each[:, column, :, -1] / uniform)[:, known].mean(axis=1) for each in (replicates, survey.means.of_halves())
    )
    return Value(float(layers[known].mean()), resampled, halves, survey.num_images)


def mean_value(values: Sequence[Value]) -> Value:
    """Average over runs of one setting, with the same images in each replicate."""
    replicates, halves = (
        np.mean(each, axis=0) for each in zip(*((value.replicates, value.halves) for value in values), strict=True)
    )
    return Value(float(np.mean([value.mean for value in values])), replicates, halves, values[0].n)


def differences_from_first(settings: Sequence[Setting]) -> list[SettingDifference]:
    """Compare every setting with the first in every quantity; all p-values are one family."""
    first = settings[0]
    compared = [
        (quantity, setting) for quantity in QUANTITIES for setting in settings[1:] if quantity.name in setting.values
    ]
    values = []
    for quantity, setting in compared:
        one, other = first.values[quantity.name], setting.values[quantity.name]
        values.append(Value(other.mean - one.mean, other.replicates - one.replicates, other.halves - one.halves, one.n))
    p_values = np.array([normal_p_value(value.replicates) for value in values], dtype=np.float64)
    return [
        SettingDifference(
            quantity,
            setting,
            value.interval,
            largest_control_difference(first.controls[quantity.name], setting.controls[quantity.name]),
            float(adjusted),
            learnt=all("accuracy" in each.values and each.has_learnt for each in (first, setting)),
            apart=are_apart(first.values_by_run[quantity.name], setting.values_by_run[quantity.name]),
        )
        for (quantity, setting), value, adjusted in zip(compared, values, holm(p_values), strict=True)
    ]


def are_apart(first: Sequence[float], second: Sequence[float]) -> bool:
    """Return whether all values of one lie on one side of all values of the other."""
    return max(first) < min(second) or max(second) < min(first)


def largest_control_difference(first: Array, second: Array) -> float:
    """Return the largest difference between random weights of two settings, each with each: those with the same seed
    may be the very same model."""
    gaps = np.abs(first[:, None] - second[None])
    return float("nan") if np.isnan(gaps).all() else float(np.nanmax(gaps))
