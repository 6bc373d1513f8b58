"""Maps put to the test: deletion and insertion against rankings by ink alone, and what is left with other weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attention_visualizer import inference, ink
from attention_visualizer.analysis.study import FIRST_CONTROL, Study
from attention_visualizer.controls import random_weights
from attention_visualizer.explanations import explain
from attention_visualizer.inference import Interval
from attention_visualizer.model import VisionTransformer
from attention_visualizer.parallel import on_all_cores
from attention_visualizer.perturbation import OPERATORS, Curves, Operator, Perturbation, ranking_of

Array = NDArray[Any]

METHODS = {
    "CLS attention": "attention, last layer",
    "rollout": "rollout",
    "relevance": "relevance",
    "gradient x attention": "gradient x attention",
}
RANDOM, INKED, AMOUNT = "random", "random among inked", "amount of ink"
BASELINES = (RANDOM, INKED, AMOUNT)
TO_BEAT = (INKED, AMOUNT)  # on an empty background, beating plain chance only says that ink was found
DIRECTIONS = ("deletion", "insertion")

# Stated beforehand: what trust needs at least.
LEAST_GAIN = 0.02  # of the class's probability, mean over the shares of patches: two points in a hundred
MOST_LIKENESS = 0.5  # rank correlation with the map of random weights: a map that stays is not about the weights
RANDOMISED = 100  # pictures, at most, whose maps are made again at each stage
PASSES = 600  # over each picture: 7 rankings, 2 operators and 30 steps, then gradients with other weights


@dataclass(frozen=True)
class Gain:
    """How much better than a baseline, in mean probability, positive is better: paired over pictures."""

    operator: Operator
    direction: str
    baseline: str
    value: Interval


@dataclass(frozen=True)
class MethodTrust:
    """areas: (operator, direction) -> area under the curve; gains: against each baseline that is to be beaten.

    pointing: share of pictures whose highest patch holds ink; mass: share of the map on inked patches; likeness: rank
    correlation with the original map at each stage of randomisation [stage], the last one with all weights random.
    """

    name: str
    areas: dict[tuple[Operator, str], Interval]
    gains: list[Gain]
    pointing: Interval
    mass: Interval
    likeness: Interval | None
    answers: bool = True  # whether the model answers better than by chance, so that there is something to explain

    @property
    def worst(self) -> Gain:
        return min(self.gains, key=lambda gain: float(gain.value.value))

    @property
    def faithful(self) -> bool:
        """Better than every baseline that is to be beaten, in both directions with every operator."""
        return all(gain.value.value >= LEAST_GAIN and gain.value.low > 0 for gain in self.gains)

    @property
    def sensitive(self) -> bool:
        """Whether the map depends on the weights."""
        return self.likeness is not None and bool(self.likeness.high[-1] <= MOST_LIKENESS)

    @property
    def trusted(self) -> bool:
        return self.answers and self.faithful and self.sensitive

    @property
    def reason(self) -> str:
        """One plain sentence."""
        worst = self.worst
        how = f"{worst.direction}, {OPERATOR_NAMES[worst.operator]}"
        gain = f"{float(worst.value.value):+.3f} ({float(worst.value.low):+.3f} to {float(worst.value.high):+.3f})"
        if not self.answers:
            return f"Do not trust {self.name} here: the model answers no better than by chance, so nothing was learnt."
        if not self.faithful:
            failing = [each for each in self.gains if not (each.value.value >= LEAST_GAIN and each.value.low > 0)]
            return (
                f"Do not trust {self.name} here: in {len(failing)} of {len(self.gains)} comparisons with rankings "
                f"that know only the ink, it does not gain what trust needs (worst: {how}, against "
                f"{worst.baseline}, {gain})."
            )
        if not self.sensitive:
            told = "is not known" if self.likeness is None else f"is {self.likeness[-1].text(2)}"
            return (
                f"Do not trust {self.name} here: its likeness to the map of random weights {told}, so it is not about "
                "what was learnt."
            )
        return (
            f"Trust {self.name} here, for which patches the answer rests on: it beats every ranking that knows only "
            f"the ink (least: {how}, against {worst.baseline}, {gain}) and is lost with the weights."
        )


OPERATOR_NAMES = {"fill": "background fill", "drop": "tokens dropped"}


@dataclass
class Trial:
    """Everything measured on one model. curves: (ranking, operator) -> Curves; order of stages as in `stages`."""

    methods: list[MethodTrust]
    baselines: dict[str, MethodTrust]
    curves: dict[tuple[str, Operator], Curves]
    num_pictures: int
    num_randomised: int = 0
    stages: list[str] = field(default_factory=list)


def try_methods(study: Study, model: VisionTransformer, numbers: Array, randomise: bool, seed: int = 0) -> Trial:
    """Of a model over pictures by their numbers; classes are those that the model predicts."""
    pictures = study.pictures.read(numbers.tolist())
    inputs = study.model_input(pictures)
    with torch.no_grad():
        classes = torch.cat([model(part).argmax(dim=1) for part in inputs.split(500)])
    inked = ink.inked_patches(pictures, model.grid_size).numpy()
    amount = ink.ink_amount(pictures, model.grid_size).numpy()
    maps = method_maps(model, inputs, classes)
    generator = np.random.default_rng(seed)
    rankings = {name: ranking_of(each, seed) for name, each in maps.items()}
    rankings |= {
        RANDOM: ranking_of(generator.random(inked.shape)),
        INKED: ranking_of(inked + 0.5 * generator.random(inked.shape)),
        AMOUNT: ranking_of(amount, seed),
    }
    perturbation = Perturbation(model, pictures, classes.cpu().numpy(), study.model_input)

    def put_to_the_test(task: tuple[str, Operator]) -> Curves:
        name, operator = task
        study.progress(f"{name}: deletion and insertion, {OPERATOR_NAMES[operator]}")
        return perturbation.curves(rankings[name], operator)

    tasks = [(name, operator) for name in rankings for operator in OPERATORS]
    curves = dict(zip(tasks, on_all_cores(put_to_the_test, tasks, study.device), strict=True))
    few = numbers[:: max(1, len(numbers) // RANDOMISED)][:RANDOMISED]
    rows = np.searchsorted(numbers, few)
    likeness: dict[str, Interval] = {}
    stages: list[str] = []
    if randomise:
        likeness, stages = randomisation(
            study, model, inputs[rows], classes[rows], {k: v[rows] for k, v in maps.items()}
        )
    shown = {**maps, INKED: inked.astype(float), AMOUNT: amount, RANDOM: np.ones_like(amount)}
    answers = beats_chance(study, numbers, classes)
    found = {
        name: judged(name, curves, shown[name], rankings[name], inked, likeness.get(name), answers) for name in rankings
    }
    return Trial(
        [found[name] for name in maps],
        {name: found[name] for name in BASELINES},
        curves,
        len(numbers),
        len(few),
        stages,
    )


def beats_chance(study: Study, numbers: Array, predicted: Tensor) -> bool:
    """Whether the share of right answers is well above that of guessing, with its whole interval."""
    labels, classes = study.pictures.labels, study.pictures.num_classes
    if labels is None or not classes:
        return False
    right = labels[torch.from_numpy(numbers)].cpu() == predicted.cpu()
    return bool(inference.bootstrap_mean(right.numpy().astype(float)).low > inference.well_above(1 / classes))


def judged(
    name: str,
    curves: dict[tuple[str, Operator], Curves],
    maps: Array,
    ranking: Array,
    inked: Array,
    likeness: Interval | None,
    answers: bool,
) -> MethodTrust:
    areas: dict[tuple[Operator, str], Interval] = {}
    gains = []
    for operator in OPERATORS:
        for direction, sign in zip(DIRECTIONS, (-1, 1), strict=True):
            own = area(curves[name, operator], direction)
            areas[operator, direction] = inference.bootstrap_mean(own)
            for baseline in TO_BEAT:
                better = sign * (own - area(curves[baseline, operator], direction))
                gains.append(Gain(operator, direction, baseline, inference.bootstrap_mean(better)))
    total = np.maximum(maps.sum(axis=1), 1e-30)
    hit = np.take_along_axis(inked, ranking[:, :1], axis=1)[:, 0]
    return MethodTrust(
        name,
        areas,
        gains,
        inference.bootstrap_mean(hit.astype(float)),
        inference.bootstrap_mean((maps * inked).sum(axis=1) / total),
        likeness,
        answers,
    )


def area(curves: Curves, direction: str) -> Array:
    return curves.deletion_area if direction == "deletion" else curves.insertion_area


def method_maps(model: VisionTransformer, inputs: Tensor, classes: Tensor) -> dict[str, Array]:
    """Method -> [image, patch], for the readout query and the given classes."""
    found = explain(model, inputs, classes).maps
    return {name: found[key].reshape(len(inputs), -1) for name, key in METHODS.items() if key in found}


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
    study: Study, model: VisionTransformer, inputs: Tensor, classes: Tensor, original: dict[str, Array]
) -> tuple[dict[str, Interval], list[str]]:
    """Method -> likeness [stage] to the original maps, and the stages' names."""
    likeness: dict[str, list[Array]] = {name: [] for name in original}
    stages = []
    for stage, changed in cascade(model, FIRST_CONTROL):
        study.progress(f"random weights down to the {stage}")
        stages.append(stage)
        for name, maps in method_maps(changed, inputs, classes).items():
            likeness[name].append(rank_correlations(original[name], maps))
    return {name: inference.bootstrap_mean(np.stack(each, axis=1)) for name, each in likeness.items()}, stages


def rank_correlations(first: Array, second: Array) -> Array:
    """Spearman's for each image: [image, patch] twice -> [image]; 0 where a map is the same everywhere."""
    import scipy.stats

    ranks = [scipy.stats.rankdata(each, axis=1) for each in (first, second)]
    centred = [each - each.mean(axis=1, keepdims=True) for each in ranks]
    norm = np.sqrt((centred[0] ** 2).sum(axis=1) * (centred[1] ** 2).sum(axis=1))
    return np.divide((centred[0] * centred[1]).sum(axis=1), norm, out=np.zeros(len(first)), where=norm > 0)
