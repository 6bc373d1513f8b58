"""Numbers from runs that differ in the seed only: heads and their partners, and what each seed shows."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attention_visualizer.analysis.runs.survey import CONTROL_FACTOR, SEED_CLAIMS, by_head, ink_ratios
from attention_visualizer.analysis.study.survey import Survey
from attention_visualizer.measures.head_matching import Matching, match_heads, readout_rows
from attention_visualizer.measures.intervals import LEVEL, false_discovery_control, sign_flip_test

Array = NDArray[Any]
# Partners must be closer than heads paired by lot by this share of their divergence: a quarter of the way to a copy.
MINIMUM_GAIN = 0.25
# Nats of at most 0.69 between a head and its partner, from which a reader would take their maps for one head's.
CLOSE = 0.1
# By how much a quantity must differ to matter: a twentieth of what uniform attention has, a twentieth of all
# attention, a tenth of a uniform head's attention to ink.
QUANTITIES = {
    "entropy": ("entropy (uniform = 1)", 0.05),
    "maximum": ("maximum attention to a patch (share)", 0.05),
    "distance": ("attention distance (uniform = 1)", 0.05),
    "ink": ("attention to inked patches (uniform = 1)", 0.1),
}


@dataclass(frozen=True)
class Pair:
    """Two models' heads matched on the same pictures, and how well their quantities agree over partners.

    agreement: quantity -> rank correlation over all heads, each head's distance from its layer's mean; NaN for none.
    """

    first: int
    second: int
    matching: Matching
    agreement: dict[str, float]

    @property
    def gain(self) -> float:
        return float(self.matching.gains.mean())


@dataclass(frozen=True)
class SeedComparison:
    """values: quantity -> [run, layer, head], heads as each run numbers them; aligned: the same, heads in the order of
    the first run's partners; controls: quantity -> [control, layer, head], of random weights.

    pairs: of each two runs; shifted: the same with each layer against the next one, whose heads are other heads;
    random: of each two models with random weights. partners: [run, layer, head], of the first run's heads (themselves
    in that run); profiles: quantity -> rank correlation of layers' means, of each two runs.
    """

    values: dict[str, Array]
    aligned: dict[str, Array]
    controls: dict[str, Array]
    pairs: list[Pair]
    shifted: list[Pair]
    random: list[Pair]
    partners: Array
    profiles: dict[str, list[float]]

    @property
    def num_seeds(self) -> int:
        return len(self.partners)

    @property
    def limit(self) -> float:
        """The gain that partners must exceed: by MINIMUM_GAIN, and CONTROL_FACTOR times what unrelated heads reach."""
        unrelated = [pair.gain for pair in (*self.shifted, *self.random)]
        return max(MINIMUM_GAIN, CONTROL_FACTOR * max(unrelated, default=0.0))

    @property
    def heads_recur(self) -> bool:
        """Whether in every pair of runs partners are closer than unrelated heads would be."""
        p_values = false_discovery_control(np.array([pair.matching.p_value() for pair in self.pairs]))
        return all(pair.gain > self.limit for pair in self.pairs) and bool((p_values <= LEVEL).all())


@dataclass(frozen=True)
class Claims:
    """Of one family of statements, [...] each: the mean over seeds of a difference, its p-value by sign flips, adjusted
    over the family, and whether it holds in every seed beyond the minimum effect and the controls."""

    effects: dict[str, Array]
    every_seed: dict[str, Array]
    adjusted: dict[str, Array]

    @property
    def size(self) -> int:
        return int(sum((~np.isnan(each)).sum() for each in self.effects.values()))

    def held(self) -> int:
        return int(sum(each.sum() for each in self.every_seed.values()))

    def significant(self, num_seeds: int) -> int:
        """Statements that are more than descriptive; none with few seeds."""
        if num_seeds < SEED_CLAIMS:
            return 0
        return int(sum((self.every_seed[name] & (self.adjusted[name] <= LEVEL)).sum() for name in self.effects))


def compare_seeds(surveys: list[Survey], controls: list[Survey], inked: Array) -> SeedComparison:
    """surveys: of at least two runs of one architecture over the same pictures; controls: of random weights over them.
    inked: [kept, patch], bool."""
    values = quantities(surveys, inked)
    untrained = quantities(controls, inked)
    rows = [readout_rows(survey.maps) for survey in surveys]
    random_rows = [readout_rows(survey.maps) for survey in controls]
    pairs = [pair_of(rows, values, first, second) for first, second in combinations(range(len(rows)), 2)]
    shifted = []
    if rows[0].shape[1] > 1:
        next_rows = [np.roll(each, -1, axis=1) for each in rows]
        next_values = {name: np.roll(each, -1, axis=1) for name, each in values.items()}
        for first, second in combinations(range(len(rows)), 2):
            mixed = {name: np.stack([values[name][first], next_values[name][second]]) for name in values}
            shifted.append(pair_of([rows[first], next_rows[second]], mixed, 0, 1))
    random = [
        pair_of(random_rows, untrained, first, second) for first, second in combinations(range(len(random_rows)), 2)
    ]
    own = np.broadcast_to(np.arange(rows[0].shape[2]), rows[0].shape[1:3])
    partners = np.stack([own, *(pair.matching.partners for pair in pairs if pair.first == 0)])
    return SeedComparison(
        values,
        {name: aligned(each, partners) for name, each in values.items()},
        untrained,
        pairs,
        shifted,
        random,
        partners,
        {
            name: [rank_correlation(each[first].mean(axis=1), each[second].mean(axis=1))
                   for first, second in combinations(range(len(each)), 2)]
            for name, each in values.items()
        },
    )  # fmt: skip


def quantities(surveys: list[Survey], inked: Array) -> dict[str, Array]:
    """Quantity -> [survey, layer, head]; quantities that no layer has are left out."""
    found = {
        name: np.stack([by_head(survey, name) for survey in surveys]) for name in ("entropy", "maximum", "distance")
    }
    found["ink"] = np.stack([ink_ratios(survey, inked) for survey in surveys])
    return {name: found[name] for name in QUANTITIES if not np.isnan(found[name]).all()}


def pair_of(rows: list[Array], values: dict[str, Array], first: int, second: int) -> Pair:
    matching = match_heads(rows[first], rows[second])
    agreement = {
        name: rank_correlation(
            beyond_layer(each[first]), beyond_layer(np.take_along_axis(each[second], matching.partners, axis=1))
        )
        for name, each in values.items()
    }
    return Pair(first, second, matching, agreement)


def beyond_layer(values: Array) -> Array:
    """[..., layer, head], each less its layer's mean: agreement of what tells a layer's heads apart."""
    return values - values.mean(axis=-1, keepdims=True)


def rank_correlation(first: Array, second: Array) -> float:
    """Spearman's, over places where both have a value; NaN of fewer than three, or where nothing varies."""
    import scipy.stats

    there = ~(np.isnan(first) | np.isnan(second))
    one, other = first[there], second[there]
    if len(one) < 3 or np.ptp(one) < 1e-12 or np.ptp(other) < 1e-12:
        return float("nan")
    return float(scipy.stats.spearmanr(one, other).statistic)


def aligned(values: Array, partners: Array) -> Array:
    """[run, layer, head] in the order of the first run's heads."""
    return np.take_along_axis(values, partners, axis=2)


def layer_claims(found: SeedComparison) -> Claims:
    """By layer: does the mean over heads lie on one side of random weights in every seed?"""
    effects, limits = {}, {}
    for name, values in found.values.items():
        untrained = found.controls[name].mean(axis=2)
        effects[name] = values.mean(axis=2) - untrained.mean(axis=0)
        limits[name] = np.abs(untrained - untrained.mean(axis=0)).max(axis=0)
    return claims(effects, limits)


def head_claims(found: SeedComparison) -> Claims:
    """By head of the first run: do it and its partners lie on one side of their layer's mean in every seed?

    Partners are chosen by their rows, so that unrelated heads agree to some degree, too: the limit is what heads
    that are matched with those of the next layer, and with those of other random weights, reach.
    """
    effects, limits = {}, {}
    # What the matching alone brings about: the largest that the controls' heads reach, in any layer.
    for name, values in found.aligned.items():
        effects[name] = beyond_layer(values)
        reached = [0.0]
        for pairs, source, shift in (
            (found.shifted, found.values[name], 1),
            (found.random, found.controls[name], 0),
        ):
            chosen = [pair for pair in pairs if pair.first == 0]
            if not chosen:
                continue
            theirs = [
                np.take_along_axis(np.roll(source[pair.second], -shift, axis=0), pair.matching.partners, axis=1)
                for pair in chosen
            ]
            mean = beyond_layer(np.stack([source[0], *theirs])).mean(axis=0)
            if not np.isnan(mean).all():
                reached.append(float(np.nanmax(np.abs(mean))))
        limits[name] = np.full(effects[name].shape[1:], max(reached))
    return claims(effects, limits)


def claims(effects: dict[str, Array], limits: dict[str, Array]) -> Claims:
    """effects: [seed, ...] each; limits: [...], the largest that controls reach."""
    p_values = {name: sign_flip_test(each) for name, each in effects.items()}
    family = np.concatenate([each.ravel() for each in p_values.values()])
    adjusted = np.split(false_discovery_control(family), np.cumsum([each.size for each in p_values.values()])[:-1])
    means, every = {}, {}
    for name, each in effects.items():
        means[name] = each.mean(axis=0)
        one_side = np.abs(np.sign(each).sum(axis=0)) == len(each)
        with np.errstate(invalid="ignore"):
            far = np.abs(each).min(axis=0) >= QUANTITIES[name][1]
            every[name] = one_side & far & (np.abs(means[name]) >= CONTROL_FACTOR * limits[name])
    shapes = {name: each.shape for name, each in p_values.items()}
    return Claims(means, every, {name: part.reshape(shapes[name]) for name, part in zip(shapes, adjusted, strict=True)})
