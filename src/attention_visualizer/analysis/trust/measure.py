"""Maps put to the test: deletion and insertion against rankings that know nothing or only the ink, and against maps of
random weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attention_visualizer.analysis.study.study import FIRST_CONTROL, Study
from attention_visualizer.analysis.study.target import batch_size
from attention_visualizer.data import ink
from attention_visualizer.figures.attention_figures import query_name
from attention_visualizer.measures import intervals
from attention_visualizer.measures.explanations import explain
from attention_visualizer.measures.intervals import Interval, share_interval
from attention_visualizer.measures.perturbation import OPERATORS, Curves, Operator, Perturbation, ranking_of
from attention_visualizer.models.untrained import random_weights
from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.support.parallel import on_all_cores

Array = NDArray[Any]

LAST = "attention, last layer"  # what `explain` calls it
RANDOM, INKED, AMOUNT = "random", "random among inked", "amount of ink"
BASELINES = (RANDOM, INKED, AMOUNT)  # on an empty background, beating plain chance only says that ink was found
DIRECTIONS = ("deletion", "insertion")
OPERATOR_NAMES = {"fill": "background fill", "drop": "tokens dropped"}

# Stated beforehand: what trust needs at least.
LEAST_GAIN = 0.02  # of the class's probability, mean over the shares of patches: two points in a hundred
MOST_LIKENESS = 0.5  # rank correlation with the map of random weights: a map that stays is not about the weights
BEYOND_CONTROLS = 1.5  # times the largest gain of the same method's maps of random weights, for these answers
RANDOMISED, LEAST_RANDOMISED = 60, 10  # pictures, at most and at least, whose maps are made again with random weights
TOKENS = 10_000  # at once, at most
PASSES = 600  # over each picture: 7 rankings, 2 operators and 30 steps, then gradients with other weights
CONTROL_PASSES = 240  # over each of few pictures, with each control's maps: 4 rankings, 2 operators and 30 steps


@dataclass(frozen=True)
class Gain:
    """How much better than a baseline, in mean probability, positive is better: paired over pictures. controls: the
    same of the method's maps of random weights, [control], for the same answers; None without any."""

    operator: Operator
    direction: str
    baseline: str
    value: Interval
    controls: Interval | None = None

    @property
    def control(self) -> Interval | None:
        """Of the random weights that come furthest."""
        return None if self.controls is None else self.controls[int(self.controls.value.argmax())]

    @property
    def needed(self) -> float:
        return LEAST_GAIN if self.control is None else max(LEAST_GAIN, BEYOND_CONTROLS * float(self.control.value))

    @property
    def enough(self) -> bool:
        return bool(self.value.value >= self.needed and self.value.low > 0)

    @property
    def text(self) -> str:
        """Where, and how much: "deletion, background fill, against amount of ink, +0.031 (...), needs 0.02"."""
        value, low, high = (float(each) for each in (self.value.value, self.value.low, self.value.high))
        return (
            f"{self.direction}, {OPERATOR_NAMES[self.operator]}, against {self.baseline}: {value:+.3f} ({low:+.3f} to "
            f"{high:+.3f}), trust needs {self.needed:.3f}"
        )


@dataclass(frozen=True)
class MethodTrust:
    """areas: (operator, direction) -> area under the curve; gains: against each baseline.

    pointing: share of pictures whose highest patch holds ink; mass: share of the map on inked patches; likeness: rank
    correlation with the original map at each stage of randomisation [stage]; unlearnt: the same of each model with all
    weights random [control].
    """

    name: str
    areas: dict[tuple[Operator, str], Interval]
    gains: list[Gain]
    pointing: Interval
    mass: Interval
    likeness: Interval | None = None
    unlearnt: Interval | None = None
    answers: bool = True  # whether the model has learnt something, so that there is something to explain

    @property
    def worst(self) -> Gain:
        """Where it gains least beyond what it needs."""
        return min(self.gains, key=lambda gain: float(gain.value.value) - gain.needed)

    @property
    def faithful(self) -> bool:
        """Better than every baseline, in both directions with every operator, and not without training."""
        return all(gain.enough and gain.controls is not None for gain in self.gains)

    @property
    def alike(self) -> Interval | None:
        """The likeness to the map of those random weights that come closest."""
        return None if self.unlearnt is None else self.unlearnt[int(self.unlearnt.high.argmax())]

    @property
    def sensitive(self) -> bool:
        """Whether the map depends on the weights."""
        return self.alike is not None and bool(self.alike.high <= MOST_LIKENESS)

    @property
    def trusted(self) -> bool:
        return self.answers and self.faithful and self.sensitive

    @property
    def reason(self) -> str:
        """One plain sentence."""
        refused = f"Do not trust {self.name} here:"
        if not self.answers:
            return f"{refused} the model answers no better than by chance or random weights do, so nothing was learnt."
        failing = sum(not gain.enough for gain in self.gains)
        if failing:
            return (
                f"{refused} in {failing} of {len(self.gains)} comparisons with rankings that know nothing or only the "
                f"ink, it does not gain what trust needs (furthest from it: {self.worst.text})."
            )
        if self.alike is None:
            return f"{refused} there is no model with random weights to compare with."
        if not self.sensitive:
            return (
                f"{refused} its likeness to the map of random weights is {self.alike.text(2)}, so it is not about what "
                "was learnt."
            )
        return (
            f"Trust {self.name} here, for which patches the answer rests on: it beats every ranking that knows nothing "
            f"or only the ink (nearest to failing: {self.worst.text}) and is lost with the weights."
        )


@dataclass
class TrustResult:
    """Everything measured on one model. curves: (ranking, operator) -> Curves; order of stages as in `stages`."""

    methods: list[MethodTrust]
    baselines: dict[str, MethodTrust]
    curves: dict[tuple[str, Operator], Curves]
    num_pictures: int
    num_randomised: int
    num_controls: int
    stages: list[str]


def try_methods(study: Study, numbers: Array, seed: int = 0) -> TrustResult:
    """Of the study's model over pictures by their numbers; classes are those that it predicts."""
    classes, maps, inked, amount = look(study, numbers)
    # A generator each, so that no ranking depends on another.
    by_lot, among_inked = (np.random.default_rng([seed, number]).random(inked.shape) for number in range(2))
    scores = {**maps, RANDOM: by_lot, INKED: inked + 0.5 * among_inked, AMOUNT: amount}
    rankings = {name: ranking_of(each, seed) for name, each in scores.items()}
    curves = curves_along(study, numbers, classes, rankings, "trained")

    few = few_of(len(numbers), len(study.control_models))
    original = {name: each[few] for name, each in maps.items()}
    likeness, stages = randomisation(study, numbers[few], classes[few], original)
    controls = without_training(study, numbers[few], classes[few], original, seed)

    shown = {**maps, INKED: inked.astype(float), AMOUNT: amount, RANDOM: np.ones_like(amount)}
    answers = has_learnt(study, numbers, classes, few)
    found = {
        name: judged(
            name,
            {operator: curves[name, operator] for operator in OPERATORS},
            {key: each for key, each in curves.items() if key[0] in BASELINES},
            shown[name],
            rankings[name],
            inked,
            likeness.get(name),
            [control[name] for control in controls if name in control],
            few,
            answers,
        )
        for name in rankings
    }
    return TrustResult(
        [found[name] for name in maps],
        {name: found[name] for name in BASELINES},
        curves,
        len(numbers),
        len(few),
        len(controls),
        stages,
    )


def few_of(num_pictures: int, num_controls: int) -> Array:
    """Evenly among the pictures, so many that all controls together cost no more than the model's own maps."""
    affordable = num_pictures * PASSES // (CONTROL_PASSES * max(1, num_controls))
    count = min(num_pictures, RANDOMISED, max(LEAST_RANDOMISED, affordable))
    return np.arange(count) * num_pictures // count


def blocks(study: Study, numbers: Array) -> Iterator[slice]:
    """So many pictures at once that memory stays bounded."""
    rows, columns = own_model(study).grid_size
    size = min(batch_size(study.target.images.shape), max(1, TOKENS // (rows * columns)))
    return (slice(start, start + size) for start in range(0, len(numbers), size))


def look(study: Study, numbers: Array) -> tuple[Array, dict[str, Array], Array, Array]:
    """The predicted classes [image]; maps by method, which patches hold ink, and how much: [image, patch] each."""
    model = own_model(study)
    found = []
    for rows in blocks(study, numbers):
        pictures = study.target.images.read(numbers[rows].tolist())
        inputs = study.target.model_input(pictures)
        with torch.no_grad():
            classes = model(inputs).argmax(dim=1)
        maps = method_maps(model, inputs, classes)
        inked, amount = (each(pictures, model.grid_size).numpy() for each in (ink.inked_patches, ink.ink_amount))
        found.append((classes.cpu().numpy(), maps, inked, amount))
    parts = list(zip(*found, strict=True))
    joined = {name: np.concatenate([maps[name] for maps in parts[1]]) for name in parts[1][0]}
    return np.concatenate(parts[0]), joined, np.concatenate(parts[2]), np.concatenate(parts[3])


def curves_along(
    study: Study, numbers: Array, classes: Array, rankings: dict[str, Array], whose: str
) -> dict[tuple[str, Operator], Curves]:
    """(ranking, operator) -> Curves of the study's model, over rankings [image, patch] by name."""
    tasks = [(name, operator) for name in rankings for operator in OPERATORS]
    found: dict[tuple[str, Operator], list[Curves]] = {task: [] for task in tasks}
    for rows in blocks(study, numbers):
        pictures = study.target.images.read(numbers[rows].tolist())
        perturbation = Perturbation(own_model(study), pictures, classes[rows], study.target.model_input)

        def run_curves(
            task: tuple[str, Operator], perturbation: Perturbation = perturbation, rows: slice = rows
        ) -> Curves:
            name, operator = task
            study.progress(f"{name} ({whose}): deletion and insertion, {OPERATOR_NAMES[operator]}")
            return perturbation.curves(rankings[name][rows], operator)

        for task, curves in zip(tasks, on_all_cores(run_curves, tasks, study.target.device), strict=True):
            found[task].append(curves)
    return {task: Curves.joined(each) for task, each in found.items()}


def own_model(study: Study) -> VisionTransformer:
    assert isinstance(study.target.model, VisionTransformer)
    return study.target.model


def has_learnt(study: Study, numbers: Array, predicted: Array, few: Array) -> bool:
    """Whether the share of right answers is, with its whole interval, well above that of guessing and above those of
    random weights, which tell two classes apart by luck more often than one would think."""
    labels, num_classes = study.target.images.labels, study.target.images.num_classes
    if labels is None or not num_classes:
        return False
    known = labels[torch.from_numpy(numbers)].cpu().numpy()
    inputs = study.target.model_input(study.target.images.read(numbers[few].tolist()))
    with torch.no_grad():
        guesses = [model(inputs).argmax(dim=1).cpu().numpy() for model in study.control_models]
    by_luck = max((float((guess == known[few]).mean()) for guess in guesses), default=0.0)
    right = share_interval(int((predicted == known).sum()), len(known))
    return bool(right.low > max(by_luck, intervals.learnt_threshold(1 / num_classes)))


@dataclass(frozen=True)
class Control:
    """One method's map of random weights: curves of the model in question along it, by operator, and its likeness to
    the original map [image]."""

    curves: dict[Operator, Curves]
    likeness: Array


def without_training(
    study: Study, numbers: Array, classes: Array, original: dict[str, Array], seed: int
) -> list[dict[str, Control]]:
    """For each control model, method -> Control. The maps are of random weights, the answers of the trained ones: how
    much of what a method gains needs no training."""
    inputs = study.target.model_input(study.target.images.read(numbers.tolist()))
    found = []
    for number, model in enumerate(study.control_models):
        assert isinstance(model, VisionTransformer)
        maps = method_maps(model, inputs, torch.from_numpy(classes))
        rankings = {name: ranking_of(each, seed) for name, each in maps.items()}
        curves = curves_along(study, numbers, classes, rankings, f"random weights, {number + 1}")
        found.append(
            {
                name: Control({each: curves[name, each] for each in OPERATORS}, rank_correlations(original[name], own))
                for name, own in maps.items()
            }
        )
    return found


def judged(
    name: str,
    own: dict[Operator, Curves],
    baselines: dict[tuple[str, Operator], Curves],
    maps: Array,
    ranking: Array,
    inked: Array,
    likeness: Interval | None,
    controls: list[Control],
    few: Array,
    answers: bool,
) -> MethodTrust:
    """few: numbers of those pictures, among all, that the controls are over."""
    values, gains = gains_over(own, baselines), []
    reached = [gains_over(control.curves, baselines, few) for control in controls]
    for operator, direction, baseline in values:
        key = operator, direction, baseline
        without = intervals.bootstrap_mean(np.stack([each[key] for each in reached], axis=1)) if reached else None
        gains.append(Gain(*key, intervals.bootstrap_mean(values[key]), without))
    hits = np.take_along_axis(inked, ranking[:, :1], axis=1)
    total = np.maximum(maps.sum(axis=1), 1e-30)
    return MethodTrust(
        name,
        {(each, way): intervals.bootstrap_mean(area(own[each], way)) for each in OPERATORS for way in DIRECTIONS},
        gains,
        share_interval(int(hits.sum()), len(hits)),
        intervals.bootstrap_mean((maps * inked).sum(axis=1) / total),
        likeness,
        intervals.bootstrap_mean(np.stack([each.likeness for each in controls], axis=1)) if controls else None,
        answers,
    )


def gains_over(
    own: dict[Operator, Curves], baselines: dict[tuple[str, Operator], Curves], rows: Array | slice = slice(None)
) -> dict[tuple[Operator, str, str], Array]:
    """(operator, direction, baseline) -> by how much the area is better, [image]; rows: those of the baselines'
    pictures that `own` is over."""
    return {
        (operator, direction, baseline): sign
        * (area(own[operator], direction) - area(baselines[baseline, operator], direction)[rows])
        for operator in OPERATORS
        for direction, sign in zip(DIRECTIONS, (-1, 1), strict=True)
        for baseline in BASELINES
    }


def area(curves: Curves, direction: str) -> Array:
    return curves.deletion_area if direction == "deletion" else curves.insertion_area


def method_maps(model: VisionTransformer, inputs: Tensor, classes: Tensor) -> dict[str, Array]:
    """Method -> [image, patch], for the readout query and the given classes."""
    found = explain(model, inputs, classes).maps
    attention = query_name("cls" if model.num_prefix_tokens else "patches")
    names = {LAST: attention, **{name: name for name in ("rollout", "relevance", "gradient x attention")}}
    return {name: found[key].reshape(len(inputs), -1) for key, name in names.items()}


def cascade(model: VisionTransformer, seed: int) -> Iterator[tuple[str, VisionTransformer]]:
    """The model with its weights made random from the output down, stage by stage (Adebayo et al., 2018)."""
    fresh = random_weights(model, seed).state_dict()
    changed = copy.deepcopy(model)
    depth = len(model.blocks)
    stages: list[tuple[str, tuple[str, ...]]] = [("head", ("head.", "norm."))]
    stages += [(f"block {number + 1}", (f"blocks.{number}.",)) for number in reversed(range(depth))]
    stages += [("embedding", ("patch_embed.", "cls_token", "pos_embed"))]
    for name, prefixes in stages:
        part = {key: value for key, value in fresh.items() if key.startswith(prefixes)}
        changed.load_state_dict(part, strict=False)
        yield name, changed


def randomisation(
    study: Study, numbers: Array, classes: Array, original: dict[str, Array]
) -> tuple[dict[str, Interval], list[str]]:
    """Method -> likeness [stage] to the original maps, and the stages' names."""
    inputs = study.target.model_input(study.target.images.read(numbers.tolist()))
    likeness: dict[str, list[Array]] = {name: [] for name in original}
    stages = []
    for stage, changed in cascade(own_model(study), FIRST_CONTROL):
        study.progress(f"random weights down to the {stage}")
        stages.append(stage)
        for name, maps in method_maps(changed, inputs, torch.from_numpy(classes)).items():
            likeness[name].append(rank_correlations(original[name], maps))
    return {name: intervals.bootstrap_mean(np.stack(each, axis=1)) for name, each in likeness.items()}, stages


def rank_correlations(first: Array, second: Array) -> Array:
    """Spearman's for each image: [image, patch] twice -> [image]; 0 where a map is the same everywhere."""
    import scipy.stats

    ranks = [scipy.stats.rankdata(each, axis=1) for each in (first, second)]
    centred = [each - each.mean(axis=1, keepdims=True) for each in ranks]
    norm = np.sqrt((centred[0] ** 2).sum(axis=1) * (centred[1] ** 2).sum(axis=1))
    return np.divide((centred[0] * centred[1]).sum(axis=1), norm, out=np.zeros(len(first)), where=norm > 0)
