"""Runs that differ in the seed only: heads and their partners in other runs, and what holds in each seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attention_visualizer.analysis.claims.chapter import MIN_IMAGES
from attention_visualizer.analysis.claims.declared import declared_claims
from attention_visualizer.analysis.claims.evidence import evidence_of
from attention_visualizer.analysis.claims.measure import control_evidence
from attention_visualizer.analysis.claims.verdicts import judge
from attention_visualizer.analysis.runs.surveyed_runs import (
    CONTROL_FACTOR,
    ENOUGH_SEEDS,
    FAMILY_LEVEL,
    FEW_SEEDS,
    SURVEY_IMAGES,
    Quantity,
    SurveyedRun,
    uniform_values,
)
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.analysis.study.survey import Survey
from attention_visualizer.data.ink import in_patches, inked_patches
from attention_visualizer.measures.head_matching import Matching, complete_rows, match_heads
from attention_visualizer.measures.intervals import Interval, learnt_threshold
from attention_visualizer.measures.over_seeds import sign_flip_test, student_interval

Array = NDArray[Any]
# Partners must be closer than randomly paired heads by this share of their divergence: a quarter of the way to a copy.
MIN_GAIN = 0.25
# Minimum effects: a twentieth of what uniform attention has, a twentieth of all attention, a tenth of a uniform head's
# attention to ink.
QUANTITIES = {
    quantity.name: quantity
    for quantity in (
        Quantity("entropy", "entropy (uniform = 1)", 0.05),
        Quantity("maximum", "maximum attention to a patch (share)", 0.05),
        Quantity("distance", "attention distance (uniform = 1)", 0.05),
        Quantity("ink", "attention to inked patches (uniform = 1)", 0.1),
    )
}


@dataclass(frozen=True)
class Pair:
    """Two models' heads, matched on the same images."""

    first: int  # positions of the two models in the lists that they are from
    second: int
    matching: Matching
    #: Quantity -> rank correlation, over all heads and their partners, of a head's distance from its layer's mean; NaN
    #: where it has none.
    agreement: dict[str, float]

    @property
    def gain(self) -> float:
        return float(self.matching.gains.mean())

    @cached_property
    def p_value(self) -> float:
        return self.matching.p_value()


@dataclass(frozen=True)
class SeedEffects:
    """A family of differences, tested over seeds: quantity -> [...], the same shapes in all fields."""

    means: dict[str, Array]  # of the difference, over seeds
    every_seed: dict[str, Array]  # bool: of one sign in every seed, beyond the minimum effect and the controls
    adjusted: dict[str, Array]  # p-values by sign flips, for all of the family together

    @property
    def size(self) -> int:
        return int(sum((~np.isnan(each)).sum() for each in self.means.values()))

    @property
    def num_in_every_seed(self) -> int:
        return int(sum(each.sum() for each in self.every_seed.values()))

    def num_significant(self, num_seeds: int) -> int:
        """Count the differences that are more than descriptive; none with few seeds."""
        if num_seeds < ENOUGH_SEEDS:
            return 0
        return int(sum((self.every_seed[name] & (self.adjusted[name] < FAMILY_LEVEL)).sum() for name in self.means))


@dataclass(frozen=True, kw_only=True)
class SeedComparison:
    """The runs of one architecture and setting over the same images."""

    runs: list[SurveyedRun]
    image_kind: str  # such as "test image"
    values: dict[str, Array]  # quantity -> [run, layer, head], heads as each run numbers them
    aligned: dict[str, Array]  # the same, heads in the order of the first run's partners
    controls: dict[str, Array]  # quantity -> [control, layer, head], of random weights
    pairs: list[Pair]  # of each two runs
    shifted: list[Pair]  # the same, the second run's layers each replaced by the next one, whose heads are other heads
    random: list[Pair]  # of each two models with random weights
    partners: Array  # [run, layer, head], of the first run's heads (themselves in that run)
    profiles: dict[str, list[float]]  # quantity -> rank correlation of layers' means, of each two runs
    layer_effects: SeedEffects  # [layer]: differences from random weights
    head_effects: SeedEffects  # [layer, head]: differences of aligned heads from their layer's mean
    supported: dict[str, int]  # claim -> runs that support it; empty where claims are not tested

    @property
    def num_seeds(self) -> int:
        return len(self.partners)

    @property
    def num_images(self) -> int:
        return self.runs[0].survey.num_images

    @property
    def limit(self) -> float:
        """The gain that partners must exceed: MIN_GAIN, and CONTROL_FACTOR times what unrelated heads reach."""
        unrelated = [pair.gain for pair in (*self.shifted, *self.random)]
        return max(MIN_GAIN, CONTROL_FACTOR * max(unrelated, default=0.0))

    @cached_property
    def heads_recur(self) -> bool:
        """Return whether in every pair of runs partners are closer than unrelated heads would be."""
        # All must hold, so that there is nothing to adjust for.
        return all(pair.gain > self.limit and pair.p_value < FAMILY_LEVEL for pair in self.pairs)

    @cached_property
    def over_seeds(self) -> dict[str, Interval]:
        """Return the means over seeds with intervals over seeds, of two or more: "accuracy" [], where classes are
        known, and quantity -> [layer], mean over heads."""
        accuracies = [each.accuracy.value for each in self.runs if each.accuracy is not None]
        values = {"accuracy": np.array(accuracies)} if accuracies else {}
        values |= {name: each.mean(axis=2) for name, each in self.values.items()}
        return {name: student_interval(each) for name, each in values.items()}


def measure(study: Study, surveyed: list[SurveyedRun]) -> SeedComparison:
    """Compare at least two runs that differ in the seed only."""
    surveys, controls = [each.survey for each in surveyed], study.control_surveys
    kept_rows = study.stratified_rows(SURVEY_IMAGES)[surveys[0].kept]
    inked = in_patches(inked_patches, study.target.images, kept_rows, surveys[0].grid)
    values, untrained = quantity_values(surveys, inked), quantity_values(controls, inked)
    rows = [complete_rows(survey.maps) for survey in surveys]
    pairs, shifted = pair_all(rows, values), pair_with_next_layer(rows, values)
    random = pair_all([complete_rows(survey.maps) for survey in controls], untrained)
    themselves = np.broadcast_to(np.arange(rows[0].shape[2]), rows[0].shape[1:3])
    partners = np.stack([themselves, *(pair.matching.partners for pair in pairs if pair.first == 0)])
    aligned = {name: np.take_along_axis(each, partners, axis=2) for name, each in values.items()}
    return SeedComparison(
        runs=surveyed,
        image_kind=study.target.images.kind,
        values=values,
        aligned=aligned,
        controls=untrained,
        pairs=pairs,
        shifted=shifted,
        random=random,
        partners=partners,
        profiles={name: correlate_profiles(each.mean(axis=2)) for name, each in values.items()},
        layer_effects=layer_effects(values, untrained),
        head_effects=head_effects(values, aligned, shifted, untrained, random),
        supported=supported_claims(study, surveyed) if len(surveyed) >= FEW_SEEDS else {},
    )


def supported_claims(study: Study, surveyed: Sequence[SurveyedRun]) -> dict[str, int]:
    """Count the runs that support each claim, each over the images of its survey and against the controls of the
    analysed one; empty where these are too few. A run that has learnt nothing supports none."""
    kept, images = study.stratified_rows(SURVEY_IMAGES)[surveyed[0].survey.kept], study.target.images
    if len(kept) < MIN_IMAGES or not images.num_classes:
        return {}
    controls, pictures, supported = control_evidence(study), images.read(kept.tolist()), Counter[str]()
    for each in surveyed:
        study.progress(f"claims of {each.run.label}")
        evidence, accuracy = evidence_of(each.survey, pictures), each.accuracy
        has_learnt = accuracy is not None and bool(accuracy.low > learnt_threshold(1 / images.num_classes))
        for judgement in judge(declared_claims(evidence)[0], evidence, controls, has_learnt):
            supported[judgement.claim.name] += judgement.verdict == "supported"
    return dict(supported)


def quantity_values(surveys: Sequence[Survey], inked: Array) -> dict[str, Array]:
    """Measure each quantity: name -> [survey, layer, head]; quantities that no layer has are left out.

    inked: [kept, patch], bool.
    """
    values = {
        name: np.stack([survey.summaries[name].mean / uniform_values(survey, name)[:, None] for survey in surveys])
        for name in ("entropy", "maximum", "distance")
    }
    values["ink"] = np.stack([ink_ratios(survey, inked) for survey in surveys])
    return {name: values[name] for name in QUANTITIES if not np.isnan(values[name]).all()}


def ink_ratios(survey: Survey, inked: Array) -> Array:
    """Divide attention to inked patches, of that to all patches, by a uniform head's: [layer, head].

    inked: [kept, patch], bool.
    """
    on_ink = np.einsum("nlhp,np->lh", survey.shares.astype(np.float64), inked.astype(np.float64)) / len(inked)
    return on_ink / inked.mean()


# --- pairs of models ------------------------------------------------------------------------------------------------


def pair_all(rows: Sequence[Array], values: dict[str, Array]) -> list[Pair]:
    """Match the heads of each two models. rows: [image, layer, head, key] of each; values: [model, layer, head]."""
    return [pair_heads(rows, values, first, second) for first, second in combinations(range(len(rows)), 2)]


def pair_with_next_layer(rows: Sequence[Array], values: dict[str, Array]) -> list[Pair]:
    """Match the heads of each two runs, with the second run's next layer; none where there is but one layer."""
    if rows[0].shape[1] < 2:
        return []
    pairs = []
    for first, second in combinations(range(len(rows)), 2):
        two_rows = [rows[first], np.roll(rows[second], -1, axis=1)]
        two_values = {name: np.stack([each[first], np.roll(each[second], -1, axis=0)]) for name, each in values.items()}
        pairs.append(replace(pair_heads(two_rows, two_values, 0, 1), first=first, second=second))
    return pairs


def pair_heads(rows: Sequence[Array], values: dict[str, Array], first: int, second: int) -> Pair:
    matching = match_heads(rows[first], rows[second])
    agreement = {
        name: correlate_known(
            beyond_layer(each[first]), beyond_layer(np.take_along_axis(each[second], matching.partners, axis=1))
        )
        for name, each in values.items()
    }
    return Pair(first, second, matching, agreement)


def beyond_layer(values: Array) -> Array:
    """Subtract each layer's mean from its heads, [..., layer, head]: what tells the heads of a layer apart."""
    return values - values.mean(axis=-1, keepdims=True)


def correlate_profiles(profiles: Array) -> list[float]:
    """Correlate the layers' means of each two runs, [run, layer]."""
    return [correlate_known(first, second) for first, second in combinations(profiles, 2)]


def correlate_known(first: Array, second: Array) -> float:
    """Return Spearman's correlation over places where both have a value; NaN of fewer than three, or where nothing
    varies beyond rounding."""
    import scipy.stats

    known = ~(np.isnan(first) | np.isnan(second))
    one, other = first[known], second[known]
    if len(one) < 3 or np.ptp(one) < 1e-12 or np.ptp(other) < 1e-12:
        return float("nan")
    return float(scipy.stats.spearmanr(one, other).statistic)


# --- what holds in each seed ----------------------------------------------------------------------------------------


def layer_effects(values: dict[str, Array], controls: dict[str, Array]) -> SeedEffects:
    """Test whether a layer's mean over heads lies on one side of random weights in every seed."""
    effects, limits = {}, {}
    for name, each in values.items():
        untrained = controls[name].mean(axis=2)
        effects[name] = each.mean(axis=2) - untrained.mean(axis=0)
        limits[name] = np.abs(untrained - untrained.mean(axis=0)).max(axis=0)
    return sign_flip_effects(effects, limits)


def head_effects(
    values: dict[str, Array],
    aligned: dict[str, Array],
    shifted: list[Pair],
    controls: dict[str, Array],
    random: list[Pair],
) -> SeedEffects:
    """Test whether a head of the first run and its partners lie on one side of their layer's mean in every seed.

    Partners are chosen by their rows, so that unrelated heads agree to some degree, too: the limit is the largest that
    heads matched with those of the next layer, and with those of other random weights, reach in any layer.
    """
    effects, limits = {}, {}
    for name, each in aligned.items():
        effects[name] = beyond_layer(each)
        reached = largest_of_matched(values[name], shifted, layers_later=1), largest_of_matched(controls[name], random)
        limits[name] = np.full(effects[name].shape[1:], max(reached))
    return sign_flip_effects(effects, limits)


def largest_of_matched(values: Array, pairs: list[Pair], layers_later: int = 0) -> float:
    """Return the largest distance from its layer's mean, in absolute value, that heads of the first model reach on
    average with their partners; 0 where there are none. values: [model, layer, head]."""
    matched = [
        np.take_along_axis(np.roll(values[pair.second], -layers_later, axis=0), pair.matching.partners, axis=1)
        for pair in pairs
        if pair.first == 0
    ]
    if not matched:
        return 0.0
    mean = beyond_layer(np.stack([values[0], *matched])).mean(axis=0)
    return 0.0 if np.isnan(mean).all() else float(np.nanmax(np.abs(mean)))


def sign_flip_effects(effects: dict[str, Array], limits: dict[str, Array]) -> SeedEffects:
    """Test a family of differences, [seed, ...] each. limits: [...], the largest that controls reach."""
    family = np.concatenate([each.reshape(len(each), -1) for each in effects.values()], axis=1)
    ends = np.cumsum([each[0].size for each in effects.values()])[:-1]
    adjusted = dict(zip(effects, np.split(sign_flip_test(family), ends), strict=True))
    means, every_seed = {}, {}
    for name, each in effects.items():
        means[name] = each.mean(axis=0)
        one_sided = np.abs(np.sign(each).sum(axis=0)) == len(each)
        with np.errstate(invalid="ignore"):
            large = np.abs(each).min(axis=0) >= QUANTITIES[name].minimum
            every_seed[name] = one_sided & large & (np.abs(means[name]) >= CONTROL_FACTOR * limits[name])
    return SeedEffects(means, every_seed, {name: adjusted[name].reshape(each.shape) for name, each in means.items()})
