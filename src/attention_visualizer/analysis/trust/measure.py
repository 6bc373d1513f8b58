"""Maps put to the test: deletion and insertion against baselines and maps of random weights, beside the rankings that
ask the model itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attention_visualizer.analysis.study.study import Study
from attention_visualizer.analysis.trust.controls import (
    choose_control_rows,
    control_maps,
    randomisation,
    rank_correlations,
)
from attention_visualizer.analysis.trust.rankings import MappedImages, curves_along, map_images
from attention_visualizer.analysis.trust.verdict import (
    BASELINES,
    HALVES,
    INKED,
    RANDOM,
    REFERENCES,
    SHAPLEY,
    MethodTrust,
    PairedGains,
    performance,
)
from attention_visualizer.measures import intervals
from attention_visualizer.measures.intervals import Interval, half_means, share_interval
from attention_visualizer.measures.perturbation import Curves, Operator, ranking_of
from attention_visualizer.measures.shapley import antithetic_pairs

Array = NDArray[Any]

#: Over each image, as measured with all tokens: of the rankings' 800 pictures and the permutations' 600 many are the
#: same, and tokens that are dropped cost nothing; a fifth is for maps of random weights.
PASSES = 700


@dataclass(frozen=True)
class Calibration:
    """Whether the rule lets the truth pass: Shapley values from one half of the permutations, judged like a method,
    beside those from the other half."""

    verdict: MethodTrust
    passes: float  # the share of resampled sets of images in which it has all gains that trust needs


@dataclass(frozen=True)
class TrustResult:
    """Everything measured on one model."""

    methods: list[MethodTrust]
    references: list[MethodTrust]
    baselines: list[MethodTrust]
    calibration: Calibration
    curves: dict[tuple[str, Operator], Curves]  # (ranking, operator) ->
    num_images: int
    num_control_images: int
    num_controls: int
    num_permutations: int
    stages: list[str]  # of randomisation, in the order of `MethodTrust.likeness`

    @property
    def rankings(self) -> list[MethodTrust]:
        return [*self.methods, *self.references, *self.baselines]

    @property
    def trusted(self) -> list[str]:
        """Return the names of the methods that are to be trusted."""
        return [method.name for method in self.methods if method.is_trusted]


def measure(study: Study, rows: Array, seed: int = 0) -> TrustResult:
    """Put each method's maps to the test over the images of these rows, for the classes that the model predicts."""
    images = map_images(study, rows)
    known, rankings = images.baseline_maps(), rankings_of(images, seed)
    orders = antithetic_pairs(len(rows), images.inked.shape[1], seed)
    if not study.has_learnt:
        orders = orders[:2]  # one for each half: nothing is trusted anyway, and they are most of the cost
    curves = curves_along(study, rows, images.classes, rankings, "trained", orders)

    control_rows = choose_control_rows(len(rows))
    selected = rows[control_rows], images.classes[control_rows]
    original = {name: each[control_rows] for name, each in images.maps.items()}
    likeness, stages = randomisation(study, *selected, original)
    controls = control_maps(study, *selected)
    reached = control_performances(study, *selected, controls, seed)
    performances = {name: performance(curves, name) for name in (*rankings, *REFERENCES, *HALVES)}
    baselines = {name: performances[name] for name in BASELINES}
    references = {name: performances[name] for name in REFERENCES}

    def judge(name: str) -> MethodTrust:
        own = [each for ranking, each in reached.items() if ranking.startswith(f"{name}, control ")]
        compared = PairedGains.of(performances[name], baselines, references, own, control_rows)
        maps = images.maps.get(name, known.get(name))
        alike = [rank_correlations(original[name], each[name]) for each in controls] if name in likeness else []
        return MethodTrust(
            name,
            intervals.bootstrap_mean(areas_of(performances[name])),
            compared.summary(),
            None if maps is None else pointing(rankings[name], images.inked),
            None if maps is None else mass_on(maps, images.inked),
            likeness.get(name),
            intervals.bootstrap_mean(np.stack(alike, axis=1)) if alike else None,
            study.has_learnt,
        )

    half, other = (performances[name] for name in HALVES)
    # Against the maps of random weights of all methods: which of them is nearest to its own kind nobody can say.
    compared = PairedGains.of(half, baselines, {**references, SHAPLEY: other}, list(reached.values()), control_rows)
    calibration = Calibration(
        MethodTrust(
            HALVES[0], intervals.bootstrap_mean(areas_of(half)), compared.summary(), is_learnt=study.has_learnt
        ),
        compared.chance_of_passing(),
    )
    return TrustResult(
        [judge(name) for name in images.maps],
        [judge(name) for name in REFERENCES],
        [judge(name) for name in BASELINES],
        calibration,
        curves,
        len(rows),
        len(control_rows),
        len(controls),
        2 * len(orders),
        stages,
    )


def rankings_of(images: MappedImages, seed: int) -> dict[str, Array]:
    """Return the rankings by every method and baseline, name -> [image, patch]."""
    # A generator each, so that no ranking depends on another.
    random, among_inked = (np.random.default_rng([seed, stream]).random(images.inked.shape) for stream in range(2))
    scores = {**images.maps, **images.baseline_maps(), RANDOM: random, INKED: images.inked + 0.5 * among_inked}
    return {name: ranking_of(score, seed) for name, score in scores.items()}


def control_performances(
    study: Study, rows: Array, classes: Array, controls: list[dict[str, Array]], seed: int
) -> dict[str, Array]:
    """Return how well the answers follow each method's maps of each control model: "<method>, control <number>" ->
    [image, operator, direction]."""
    rankings = {
        f"{name}, control {number}": ranking_of(each, seed)
        for number, maps in enumerate(controls, start=1)
        for name, each in maps.items()
    }
    curves = curves_along(study, rows, classes, rankings, "random weights") if controls else {}
    return {name: performance(curves, name) for name in rankings}


def areas_of(performances: Array) -> Array:
    """Return the areas under the curves, [image, operator, direction]."""
    return performances * np.array([-1, 1])


def pointing(ranking: Array, inked: Array) -> Interval:
    """Return the share of images whose highest patch holds ink. Both [image, patch]."""
    hits = np.take_along_axis(inked, ranking[:, :1], axis=1)[:, 0]
    return share_interval(int(hits.sum()), len(hits)).including(half_means(hits))


def mass_on(maps: Array, inked: Array) -> Interval:
    """Return the share of a map that lies on inked patches. Both [image, patch]."""
    return intervals.bootstrap_mean((maps * inked).sum(axis=1) / np.maximum(maps.sum(axis=1), 1e-30))
