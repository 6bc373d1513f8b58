"""Claims about attention, what each of them requires, and the verdicts: pure functions of evidence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from attention_visualizer.analysis.claims.evidence import Evidence
from attention_visualizer.measures.intervals import CHAPTER_LEVEL, Interval, holm, normal_p_value, percentiles

Array = NDArray[Any]
Verdict = Literal["supported", "not supported", "cannot be decided by attention alone"]

NOT_LEARNT = "the model's accuracy is not above chance, so its attention shows nothing learnt"


@dataclass(frozen=True)
class Requirement:
    """One thing that must hold for a claim."""

    quantity: str  # in words
    minimum: float  # the smallest value that counts
    #: From the evidence's values or replicates to the quantity, [] or [replicate].
    statistic: Callable[[dict[str, Array]], Array]
    p_value: Callable[[Evidence], float] | None = None  # None for that of the resampled images
    null: str = "images resampled"
    unit: str = "of what matched patches get"
    n_from: str = ""  # the evidence's quantity whose images are counted; "" for all of them
    compared: bool = True  # whether a control that reaches as much speaks against it


@dataclass(frozen=True)
class Claim:
    name: str
    requirements: tuple[Requirement, ...]
    anywhere: bool = False  # whether one of them suffices (each is of another layer), rather than all being needed
    undecided_by: str = ""  # why attention cannot decide it even where all requirements hold, and what would


@dataclass(frozen=True)
class Result:
    """What a requirement's quantity is."""

    requirement: Requirement
    interval: Interval  # of the quantity, 95%
    controls: Mapping[str, tuple[float, ...]]  # kind -> what each model of it reaches
    standardised: float  # the value in standard deviations over its images
    p_value: float
    threshold: float  # that the value must reach

    @property
    def value(self) -> float:
        return float(self.interval.value)

    @property
    def failure(self) -> str:
        """Return why the requirement does not hold, adjusted p-values apart; "" where it does."""
        minimum = self.requirement.minimum
        if np.isnan(self.value):
            return "it could not be measured"
        if self.value <= -minimum and self.interval.high < 0:
            return f"{self.value:.3f} is the opposite"
        if self.value < minimum:
            return f"{self.value:.3f} is below the minimum effect of {minimum:g}"
        if np.isinf(self.threshold):
            return "there is no control to compare with"
        if self.value < self.threshold:
            kind, largest = self.largest_control
            return f"{self.value:.3f} is not {minimum:g} beyond the largest of {kind} ({largest:.3f})"
        return "" if self.interval.low > 0 else "its interval includes no effect"

    @property
    def largest_control(self) -> tuple[str, float]:
        """The kind of control that comes farthest, and how far."""
        reached = {kind: max(values) for kind, values in self.controls.items() if values}
        kind = max(reached, key=lambda each: reached[each])
        return kind, reached[kind]

    @property
    def margin(self) -> float:
        """The value relative to its threshold; minus infinity where it could not be measured."""
        return -np.inf if np.isnan(self.value) else self.value / self.threshold


@dataclass(frozen=True)
class Judgement:
    """The verdict on a claim."""

    claim: Claim
    #: Of all requirements; in front the one that decides: the weakest, or the strongest where one suffices.
    results: tuple[Result, ...]
    p_value: float  # of all requirements together
    adjusted: float  # the same, adjusted over all claims
    verdict: Verdict
    reason: str  # a clause


def judge(
    claims: Sequence[Claim],
    measured: Evidence,
    controls: Mapping[str, Sequence[Evidence]],
    has_learnt: bool = True,
) -> list[Judgement]:
    """Judge each claim: it is supported where its requirements have an interval without 0, an adjusted p-value below
    CHAPTER_LEVEL, and their minimum effect, beyond what any control reaches. Without controls none is, and none for a
    model that has learnt nothing.

    controls: the evidence of each model by the kind of control.
    """
    ordered = [in_order(claim, [check(each, measured, controls) for each in claim.requirements]) for claim in claims]
    p_values = np.array(
        [joint_p_value(claim, results) for claim, results in zip(claims, ordered, strict=True)], dtype=np.float64
    )
    return [
        Judgement(claim, results, float(p_value), float(adjusted), *decide(claim, results, adjusted, has_learnt))
        for claim, results, p_value, adjusted in zip(claims, ordered, p_values, holm(p_values), strict=True)
    ]


def in_order(claim: Claim, results: Sequence[Result]) -> tuple[Result, ...]:
    """Put what decides in front."""
    if claim.anywhere:
        return tuple(sorted(results, key=lambda result: (bool(result.failure), -result.margin)))
    return tuple(sorted(results, key=lambda result: (not result.failure, result.margin)))


def joint_p_value(claim: Claim, results: Sequence[Result]) -> float:
    """Return the largest p-value where all must hold; where one suffices, the deciding one times their number."""
    if claim.anywhere:
        return min(1.0, results[0].p_value * len(results))
    return max(result.p_value for result in results)


def decide(claim: Claim, results: Sequence[Result], adjusted: float, has_learnt: bool) -> tuple[Verdict, str]:
    """Return the verdict and its reason. results: in order; adjusted: p-value of the claim."""
    first = results[0]
    if not has_learnt:
        return "not supported", NOT_LEARNT
    if first.failure:
        return "not supported", f"{first.requirement.quantity}: {first.failure}"
    if not adjusted < CHAPTER_LEVEL:
        return "not supported", f"{first.requirement.quantity}: p is {adjusted:.3f} after adjustment"
    if claim.undecided_by:
        return "cannot be decided by attention alone", claim.undecided_by
    if claim.anywhere:
        holding = sum(not result.failure for result in results)
        return "supported", f"{first.requirement.quantity}; {holding} of {len(results)} such requirements hold"
    return "supported", f"all requirements hold; the weakest is {first.requirement.quantity}"


def check(requirement: Requirement, measured: Evidence, controls: Mapping[str, Sequence[Evidence]]) -> Result:
    value = np.asarray(requirement.statistic(measured.values))
    replicates = np.asarray(requirement.statistic(measured.replicates), dtype=np.float64)
    n = measured.counts.get(requirement.n_from, measured.n)
    interval = Interval(value, *percentiles(replicates), n).including(requirement.statistic(measured.halves))
    reached: dict[str, tuple[float, ...]] = {}
    threshold = requirement.minimum
    if requirement.compared:
        for kind, evidences in controls.items():
            values = [float(requirement.statistic(evidence.values)) for evidence in evidences]
            reached[kind] = tuple(each for each in values if not np.isnan(each))
        threshold += max(0.0, max((each for values in reached.values() for each in values), default=np.inf))
    p_value = normal_p_value(replicates) if requirement.p_value is None else requirement.p_value(measured)
    deviation = float(replicates.std()) * np.sqrt(n)
    return Result(
        requirement,
        interval,
        controls=reached,
        standardised=float(value) / deviation if deviation > 0 else float("nan"),
        p_value=1.0 if np.isnan(p_value) else p_value,
        threshold=threshold,
    )
