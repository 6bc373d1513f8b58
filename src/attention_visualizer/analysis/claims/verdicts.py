"""Claims about attention, what each of them requires, and the verdict: pure functions of evidence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from attention_visualizer.analysis.claims.measure import Evidence
from attention_visualizer.measures.intervals import LEVEL, false_discovery_control, percentiles

Array = NDArray[Any]
Verdict = Literal["supported", "not supported", "cannot be decided by attention alone"]

TOO_FEW_HEADS = (
    "it holds, but with so few layers and heads a head drawn at random in each layer does as well in more than "
    f"{LEVEL:.0%} of the draws: a model with more of them could tell"
)
CONTROL_MARGIN = 1.5  # times the largest value that random weights reach


@dataclass(frozen=True)
class Requirement:
    """One thing that must hold for a claim. quantity: in words; statistic: from quantities to [...], where quantities
    may have a first axis for resampled images; minimum: the smallest value that counts.

    of_control: the values that a control model reaches, for a claim about one head those of each of its heads; None
    where a control is no comparison. p_value: None for that of the resampled images. smallest_p: that the test can
    give. counted: the evidence's quantity whose images are counted.
    """

    quantity: str
    minimum: float
    statistic: Callable[[dict[str, Array]], Array]
    of_control: Callable[[dict[str, Array]], Array] | None
    p_value: Callable[[Evidence], float] | None = None
    null: str = "images resampled"
    unit: str = "of an even share"
    smallest_p: Callable[[Evidence], float] | None = None
    counted: str = ""


@dataclass(frozen=True)
class Claim:
    """undecided_by: why attention cannot decide the claim even where all requirements hold, and what would."""

    name: str
    requirements: tuple[Requirement, ...]
    undecided_by: str = ""


@dataclass(frozen=True)
class Result:
    """A requirement's value with its 95 % interval; controls: the values of random weights, () for none; standardised:
    the value in standard deviations over its n images; threshold: what the value must reach; testable: whether the
    test could give a p-value below LEVEL at all."""

    requirement: Requirement
    value: float
    low: float
    high: float
    controls: tuple[float, ...]
    standardised: float
    p_value: float
    threshold: float
    n: int
    testable: bool = True

    @property
    def failure(self) -> str:
        """Why the requirement does not hold, adjusted p-values apart; nothing where it does."""
        minimum = self.requirement.minimum
        if np.isnan(self.value):
            return "it could not be measured"
        if self.value <= -minimum and self.high < 0:
            return f"{self.value:.3f} says the opposite"
        if self.value < minimum:
            return f"{self.value:.3f} is below the minimum effect of {minimum:g}"
        if np.isinf(self.threshold):
            return "there is no model with random weights to compare with"
        if self.value < self.threshold:
            largest = max(map(abs, self.controls))
            return f"{self.value:.3f} is less than {CONTROL_MARGIN:g} times what random weights reach ({largest:.3f})"
        return "" if self.low > 0 else "its interval includes no effect"

    @property
    def margin(self) -> float:
        """The value relative to what it must reach; what could not be measured is the weakest."""
        return -np.inf if np.isnan(self.value) else self.value / self.threshold


@dataclass(frozen=True)
class Judgement:
    """A claim with all that it requires, the weakest first; p_value: the largest of theirs, since all must hold, and
    adjusted over all claims."""

    claim: Claim
    results: tuple[Result, ...]
    p_value: float
    adjusted: float
    verdict: Verdict
    reason: str


def judge(claims: Sequence[Claim], subject: Evidence, controls: Sequence[Evidence]) -> list[Judgement]:
    """A claim stands where each requirement has an interval without 0, an adjusted p-value below LEVEL, its minimum
    effect, and CONTROL_MARGIN times what any control reaches. Without a control nothing is supported."""
    measured = []
    for claim in claims:
        results = [measure(requirement, subject, controls) for requirement in claim.requirements]
        # What fails comes first, the weakest of it ahead.
        measured.append(tuple(sorted(results, key=lambda result: (not result.failure, result.margin))))
    p_values = np.array([max(result.p_value for result in results) for results in measured])
    adjusted = false_discovery_control(p_values)
    return [
        Judgement(claim, results, float(p_value), float(after), *verdict_of(claim, results, float(after)))
        for claim, results, p_value, after in zip(claims, measured, p_values, adjusted, strict=True)
    ]


def verdict_of(claim: Claim, results: Sequence[Result], adjusted: float) -> tuple[Verdict, str]:
    """The verdict and its reason, as a clause."""
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
    return "supported", f"all it requires holds; the weakest is {weakest.requirement.quantity}"


def measure(requirement: Requirement, subject: Evidence, controls: Sequence[Evidence]) -> Result:
    value = float(requirement.statistic(subject.values))
    replicates = np.asarray(requirement.statistic(subject.replicates), dtype=np.float64)
    low, high = (float(end) for end in percentiles(replicates))
    reached: tuple[float, ...] = ()
    threshold = requirement.minimum
    if requirement.of_control is not None:
        found = [np.ravel(requirement.of_control(control.values)) for control in controls]
        reached = tuple(float(each) for values in found for each in values if not np.isnan(each))
        threshold = max(threshold, CONTROL_MARGIN * max(map(abs, reached), default=np.inf))
    own = resampled_p_value(replicates) if requirement.p_value is None else requirement.p_value(subject)
    n = subject.counts.get(requirement.counted, subject.n)
    deviation = float(replicates.std()) * np.sqrt(n)
    standardised = value / deviation if deviation > 0 else float("nan")
    testable = requirement.smallest_p is None or requirement.smallest_p(subject) < LEVEL
    p_value = 1.0 if np.isnan(own) else own
    return Result(requirement, value, low, high, reached, standardised, p_value, threshold, n, testable)


def resampled_p_value(replicates: Array) -> float:
    """Two-sided: how often resampled images give a value on the other side of 0."""
    beyond = min((replicates <= 0).sum(), (replicates >= 0).sum())
    return float(min(1.0, 2 * (beyond + 1) / (len(replicates) + 1)))
