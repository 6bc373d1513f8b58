"""Claims about attention, what each of them requires, and the verdicts: pure functions of evidence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from attention_visualizer.analysis.claims.evidence import Evidence
from attention_visualizer.measures.intervals import (
    LEVEL,
    bootstrap_p_value,
    false_discovery_control,
    percentiles,
)

Array = NDArray[Any]
Verdict = Literal["supported", "not supported", "cannot be decided by attention alone"]

TOO_FEW_HEADS = (
    "it holds, but with so few layers and heads, heads drawn at random in each layer do as well in more than "
    f"{LEVEL:.0%} of the draws: a model with more of them could decide it"
)
CONTROL_FACTOR = 1.5  # times the largest value that random weights reach


@dataclass(frozen=True)
class Requirement:
    """One thing that must hold for a claim."""

    quantity: str  # in words
    minimum: float  # the smallest value that counts
    #: From the evidence's values or replicates to the quantity, [] or [replicate].
    statistic: Callable[[dict[str, Array]], Array]
    #: The values that a control reaches, for a claim about one head those of each of its heads; None where a control is
    #: no comparison.
    of_control: Callable[[dict[str, Array]], Array] | None
    p_value: Callable[[Evidence], float] | None = None  # None for that of the resampled images
    null: str = "images resampled"
    unit: str = "of a uniform share"
    smallest_p: Callable[[Evidence], float] | None = None  # that the test can give; None where it is always small
    n_from: str = ""  # the evidence's quantity whose images are counted; "" for all of them


@dataclass(frozen=True)
class Claim:
    name: str
    requirements: tuple[Requirement, ...]
    undecided_by: str = ""  # why attention cannot decide it even where all requirements hold, and what would


@dataclass(frozen=True)
class Result:
    """A requirement's value with its 95 % interval."""

    requirement: Requirement
    value: float
    low: float
    high: float
    controls: tuple[float, ...]  # of random weights, () for none
    standardised: float  # the value in standard deviations over its n images
    p_value: float
    threshold: float  # that the value must reach
    n: int
    testable: bool = True  # whether the test could give a p-value below LEVEL at all

    @property
    def failure(self) -> str:
        """Return why the requirement does not hold, adjusted p-values apart; "" where it does."""
        minimum = self.requirement.minimum
        if np.isnan(self.value):
            return "it could not be measured"
        if self.value <= -minimum and self.high < 0:
            return f"{self.value:.3f} is the opposite"
        if self.value < minimum:
            return f"{self.value:.3f} is below the minimum effect of {minimum:g}"
        if np.isinf(self.threshold):
            return "there is no model with random weights to compare with"
        if self.value < self.threshold:
            largest = max(map(abs, self.controls))
            return (
                f"{self.value:.3f} is less than {CONTROL_FACTOR:g} times the largest of random weights ({largest:.3f})"
            )
        return "" if self.low > 0 else "its interval includes no effect"

    @property
    def margin(self) -> float:
        """The value relative to its threshold; minus infinity where it could not be measured."""
        return -np.inf if np.isnan(self.value) else self.value / self.threshold


@dataclass(frozen=True)
class Judgement:
    """The verdict on a claim."""

    claim: Claim
    results: tuple[Result, ...]  # of all that it requires, the weakest first
    p_value: float  # the largest of the results', since all must hold
    adjusted: float  # the same, adjusted over all claims
    verdict: Verdict
    reason: str  # a clause


def judge(claims: Sequence[Claim], measured: Evidence, controls: Sequence[Evidence]) -> list[Judgement]:
    """Judge each claim: it is supported where each requirement has an interval without 0, an adjusted p-value below
    LEVEL, its minimum effect, and CONTROL_FACTOR times what any control reaches. Without a control none is."""
    results_by_claim = []
    for claim in claims:
        results = [check(requirement, measured, controls) for requirement in claim.requirements]
        # What fails comes first, the weakest of it ahead.
        results_by_claim.append(tuple(sorted(results, key=lambda result: (not result.failure, result.margin))))
    p_values = np.array([max(result.p_value for result in results) for results in results_by_claim])
    return [
        Judgement(claim, results, float(p_value), float(adjusted), *decide(claim, results, float(adjusted)))
        for claim, results, p_value, adjusted in zip(
            claims, results_by_claim, p_values, false_discovery_control(p_values), strict=True
        )
    ]


def decide(claim: Claim, results: Sequence[Result], adjusted: float) -> tuple[Verdict, str]:
    """Return the verdict and its reason. results: the weakest first; adjusted: p-value of the claim."""
    weakest = results[0]
    if weakest.failure:
        return "not supported", f"{weakest.requirement.quantity}: {weakest.failure}"
    if not adjusted < LEVEL:
        likeliest = max(results, key=lambda result: result.p_value)
        if not likeliest.testable:
            return "cannot be decided by attention alone", f"{likeliest.requirement.quantity}: {TOO_FEW_HEADS}"
        return "not supported", f"{likeliest.requirement.quantity}: p is {adjusted:.3f} after adjustment"
    if claim.undecided_by:
        return "cannot be decided by attention alone", claim.undecided_by
    return "supported", f"all requirements hold; the weakest is {weakest.requirement.quantity}"


def check(requirement: Requirement, measured: Evidence, controls: Sequence[Evidence]) -> Result:
    value = float(requirement.statistic(measured.values))
    replicates = np.asarray(requirement.statistic(measured.replicates), dtype=np.float64)
    low, high = (float(end) for end in percentiles(replicates))
    reached: tuple[float, ...] = ()
    threshold = requirement.minimum
    if requirement.of_control is not None:
        of_controls = [np.ravel(requirement.of_control(control.values)) for control in controls]
        reached = tuple(float(each) for values in of_controls for each in values if not np.isnan(each))
        threshold = max(threshold, CONTROL_FACTOR * max(map(abs, reached), default=np.inf))
    p_value = bootstrap_p_value(replicates) if requirement.p_value is None else requirement.p_value(measured)
    n = measured.counts.get(requirement.n_from, measured.n)
    deviation = float(replicates.std()) * np.sqrt(n)
    return Result(
        requirement,
        value,
        low,
        high,
        controls=reached,
        standardised=value / deviation if deviation > 0 else float("nan"),
        p_value=1.0 if np.isnan(p_value) else p_value,
        threshold=threshold,
        n=n,
        testable=requirement.smallest_p is None or requirement.smallest_p(measured) < LEVEL,
    )
