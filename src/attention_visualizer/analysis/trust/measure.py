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
from attention_visualizer.analysis.trust.verdict import (
    AMOUNT,
    BASELINES,
    INKED,
    OPERATOR_NAMES,
    RANDOM,
    ControlMap,
    MethodTrust,
    judge,
)
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

LAST_LAYER = "attention, last layer"  # what `explain` calls it
MAX_CONTROL_IMAGES, MIN_CONTROL_IMAGES = 60, 10  # whose maps are made again with random weights
MAX_TOKENS = 10_000  # at once
PASSES = 600  # over each image: 7 rankings, 2 operators and 30 steps, then gradients with other weights
CONTROL_PASSES = 240  # over each control image, with each control's maps: 4 rankings, 2 operators and 30 steps


@dataclass(frozen=True)
class TrustResult:
    """Everything measured on one model."""

    methods: list[MethodTrust]
    baselines: dict[str, MethodTrust]
    curves: dict[tuple[str, Operator], Curves]  # (ranking, operator) ->
    num_images: int
    num_control_images: int
    num_controls: int
    stages: list[str]  # of randomisation, in the order of `MethodTrust.likeness`

    @property
    def rankings(self) -> list[MethodTrust]:
        """The methods, then the baselines."""
        return [*self.methods, *self.baselines.values()]

    @property
    def trusted(self) -> list[str]:
        """Return the names of the methods that are to be trusted."""
        return [method.name for method in self.methods if method.is_trusted]


@dataclass(frozen=True)
class MappedImages:
    """Some images with the model's maps of them, and their ink."""

    classes: Array  # that the model predicts, [image]
    maps: dict[str, Array]  # method -> [image, patch]
    inked: Array  # which patches hold ink, bool [image, patch]
    ink_amount: Array  # [image, patch]

    @classmethod
    def concatenate(cls, parts: list[MappedImages]) -> MappedImages:
        return cls(
            np.concatenate([part.classes for part in parts]),
            {name: np.concatenate([part.maps[name] for part in parts]) for name in parts[0].maps},
            np.concatenate([part.inked for part in parts]),
            np.concatenate([part.ink_amount for part in parts]),
        )


def measure(study: Study, rows: Array, seed: int = 0) -> TrustResult:
    """Put each method's maps to the test over the images of these rows, for the classes that the model predicts."""
    images = map_images(study, rows)
    # A generator each, so that no ranking depends on another.
    random, among_inked = (np.random.default_rng([seed, stream]).random(images.inked.shape) for stream in range(2))
    scores = {**images.maps, RANDOM: random, INKED: images.inked + 0.5 * among_inked, AMOUNT: images.ink_amount}
    rankings = {name: ranking_of(score, seed) for name, score in scores.items()}
    curves = curves_along(study, rows, images.classes, rankings, "trained")

    control_rows = choose_control_rows(len(rows), len(study.control_models))
    selected = rows[control_rows], images.classes[control_rows], {k: v[control_rows] for k, v in images.maps.items()}
    likeness, stages = randomisation(study, *selected)
    controls = control_maps(study, *selected, seed)

    is_learnt = has_learnt(study, rows, images.classes, control_rows)
    even = np.ones_like(images.ink_amount)
    shown = {**images.maps, RANDOM: even, INKED: images.inked.astype(float), AMOUNT: images.ink_amount}
    verdicts = {
        name: judge(
            name,
            {operator: curves[name, operator] for operator in OPERATORS},
            {key: curve for key, curve in curves.items() if key[0] in BASELINES},
            shown[name],
            ranking,
            images.inked,
            likeness=likeness.get(name),
            controls=[control[name] for control in controls if name in control],
            control_rows=control_rows,
            is_learnt=is_learnt,
        )
        for name, ranking in rankings.items()
    }
    return TrustResult(
        [verdicts[name] for name in images.maps],
        {name: verdicts[name] for name in BASELINES},
        curves,
        len(rows),
        len(control_rows),
        len(controls),
        stages,
    )


def choose_control_rows(num_images: int, num_controls: int) -> Array:
    """Return evenly spaced rows, so many that all controls together cost no more than the model's own maps."""
    affordable = num_images * PASSES // (CONTROL_PASSES * max(1, num_controls))
    count = min(num_images, MAX_CONTROL_IMAGES, max(MIN_CONTROL_IMAGES, affordable))
    return np.arange(count) * num_images // count


def memory_bounded_slices(study: Study, num_images: int) -> Iterator[slice]:
    """Return slices of the images for one pass each."""
    num_patches = int(np.prod(own_model(study).grid_size))
    size = min(batch_size(study.target.images.shape), max(1, MAX_TOKENS // num_patches))
    return (slice(start, start + size) for start in range(0, num_images, size))


def own_model(study: Study) -> VisionTransformer:
    assert isinstance(study.target.model, VisionTransformer)
    return study.target.model


def map_images(study: Study, rows: Array) -> MappedImages:
    """Predict the classes of the images of these rows, and explain them by every method."""
    model, parts = own_model(study), []
    for batch in memory_bounded_slices(study, len(rows)):
        images = study.target.images.read(rows[batch].tolist())
        inputs = study.target.model_input(images)
        with torch.no_grad():
            classes = model(inputs).argmax(dim=1)
        inked, amount = (each(images, model.grid_size).numpy() for each in (ink.inked_patches, ink.ink_amount))
        parts.append(MappedImages(classes.cpu().numpy(), method_maps(model, inputs, classes), inked, amount))
    return MappedImages.concatenate(parts)


def method_maps(model: VisionTransformer, inputs: Tensor, classes: Tensor) -> dict[str, Array]:
    """Return method -> [image, patch], for the readout query and the given classes."""
    maps = explain(model, inputs, classes).maps
    attention = query_name("cls" if model.num_prefix_tokens else "patches")
    names = {LAST_LAYER: attention, **{name: name for name in ("rollout", "relevance", "gradient x attention")}}
    return {name: maps[method].reshape(len(inputs), -1) for method, name in names.items()}


def curves_along(
    study: Study, rows: Array, classes: Array, rankings: dict[str, Array], weights: str
) -> dict[tuple[str, Operator], Curves]:
    """(ranking, operator) -> curves of the study's model. rankings: name -> [image, patch]; weights: those that the
    rankings are of, for the progress bar."""
    tasks = [(name, operator) for name in rankings for operator in OPERATORS]
    parts: dict[tuple[str, Operator], list[Curves]] = {task: [] for task in tasks}
    for batch in memory_bounded_slices(study, len(rows)):
        images = study.target.images.read(rows[batch].tolist())
        perturbation = Perturbation(own_model(study), images, classes[batch], study.target.model_input)

        def run_curves(
            task: tuple[str, Operator], perturbation: Perturbation = perturbation, batch: slice = batch
        ) -> Curves:
            name, operator = task
            study.progress(f"{name} ({weights}): deletion and insertion, {OPERATOR_NAMES[operator]}")
            return perturbation.curves(rankings[name][batch], operator)

        for task, curves in zip(tasks, on_all_cores(run_curves, tasks, study.target.device), strict=True):
            parts[task].append(curves)
    return {task: Curves.concatenate(each) for task, each in parts.items()}


def has_learnt(study: Study, rows: Array, predicted: Array, control_rows: Array) -> bool:
    """Return whether the accuracy is, with its whole interval, well above that of guessing and above those of random
    weights, which tell two classes apart by luck more often than one would think."""
    labels, num_classes = study.target.images.labels, study.target.images.num_classes
    if labels is None or not num_classes:
        return False
    known = labels[torch.from_numpy(rows)].cpu().numpy()
    inputs = study.target.model_input(study.target.images.read(rows[control_rows].tolist()))
    with torch.no_grad():
        guesses = [model(inputs).argmax(dim=1).cpu().numpy() for model in study.control_models]
    by_luck = max((float((guess == known[control_rows]).mean()) for guess in guesses), default=0.0)
    accuracy = share_interval(int((predicted == known).sum()), len(known))
    return bool(accuracy.low > max(by_luck, intervals.learnt_threshold(1 / num_classes)))


def control_maps(
    study: Study, rows: Array, classes: Array, original: dict[str, Array], seed: int
) -> list[dict[str, ControlMap]]:
    """Return method -> ControlMap, for each control model. The maps are of random weights, the answers of the trained
    ones: how much of what a method gains needs no training."""
    inputs = study.target.model_input(study.target.images.read(rows.tolist()))
    controls = []
    for number, model in enumerate(study.control_models, start=1):
        assert isinstance(model, VisionTransformer)
        maps = method_maps(model, inputs, torch.from_numpy(classes))
        rankings = {name: ranking_of(each, seed) for name, each in maps.items()}
        curves = curves_along(study, rows, classes, rankings, f"random weights, {number}")
        controls.append(
            {
                name: ControlMap(
                    {operator: curves[name, operator] for operator in OPERATORS},
                    rank_correlations(original[name], maps[name]),
                )
                for name in maps
            }
        )
    return controls


def randomisation(
    study: Study, rows: Array, classes: Array, original: dict[str, Array]
) -> tuple[dict[str, Interval], list[str]]:
    """Return method -> likeness [stage] to the original maps, and the stages' names."""
    inputs = study.target.model_input(study.target.images.read(rows.tolist()))
    likeness: dict[str, list[Array]] = {name: [] for name in original}
    stages = []
    for stage, model in cascade(own_model(study), FIRST_CONTROL):
        study.progress(f"random weights down to the {stage}")
        stages.append(stage)
        for name, maps in method_maps(model, inputs, torch.from_numpy(classes)).items():
            likeness[name].append(rank_correlations(original[name], maps))
    return {name: intervals.bootstrap_mean(np.stack(each, axis=1)) for name, each in likeness.items()}, stages


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


def rank_correlations(first: Array, second: Array) -> Array:
    """Return Spearman's for each image: [image, patch] twice -> [image]; 0 where a map is the same everywhere."""
    return np.nan_to_num(intervals.spearman(first, second))
