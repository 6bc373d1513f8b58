"""The control models that every claim and every role is compared with: surveys of attention where nothing was learnt,
or nothing about the classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attention_visualizer.analysis.study.shuffled_labels import MAX_IMAGES, kept_or_learnt
from attention_visualizer.analysis.study.survey import Survey
from attention_visualizer.analysis.study.target import Target
from attention_visualizer.attention.capture import AttentionLayer, intervene
from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.measures.intervals import stratified
from attention_visualizer.measures.map_measures import readout_entropy
from attention_visualizer.support.parallel import on_all_cores

Rows = NDArray[np.int64]

RANDOM, SHARPENED, SHUFFLED = "random weights", "sharpened random weights", "shuffled labels"
SHARPENED_FOR_EACH = 2  # models, for each one with random weights: they vary most, see BEYOND_CONTROLS
FIRST_SHUFFLED = 2000  # the seed of the first model that learns shuffled labels: no run is likely to have it
MAX_SHUFFLED = 3  # models; one of the default size takes a core about a minute
MAX_TRAINING_COST = 2e11  # of one of them, in images x parameters x tokens; the default model's is 1.4e10
MIN_OF_CLASS = 10  # images that are learnt by heart, on average
BISECTIONS, LARGEST_EXPONENT = 40, 1e4


def random_surveys(target: Target, models: Sequence[nn.Module], rows: Rows) -> list[Survey]:
    """Survey other weights of the same architecture on the images of these rows."""
    return on_all_cores(lambda model: target.with_model(model).survey(rows), models, target.device)


def sharpened_surveys(target: Target, models: Sequence[nn.Module], rows: Rows, like: Survey) -> list[Survey]:
    """Survey random weights whose attention is as sharp as that of `like`, head by head."""

    def survey(model: nn.Module) -> Survey:
        with intervene(model, Sharpening.like(like)):
            return target.with_model(model).survey(rows)

    return on_all_cores(survey, models, target.device)


@dataclass(frozen=True)
class Sharpening:
    """An edit: raise each head's weights to a power, as if its logits were multiplied by it, so that the entropy of the
    readout query on the first batch is on average that of another model's head."""

    geometries: dict[str, Geometry]  # by the layer's name
    entropies: dict[str, Tensor]  # [head], nats
    exponents: dict[str, Tensor] = field(default_factory=dict)  # [head], as they are found

    @classmethod
    def like(cls, survey: Survey) -> Sharpening:
        entropies = torch.from_numpy(survey.mean_of("entropy").value[:, :-1])
        return cls(
            dict(zip(survey.layer_names, survey.geometries, strict=True)),
            {name: each[~each.isnan()] for name, each in zip(survey.layer_names, entropies, strict=True)},
        )

    def __call__(self, layer: AttentionLayer, weights: Tensor) -> Tensor:
        if layer.name not in self.entropies:
            return weights
        if layer.name not in self.exponents:
            self.exponents[layer.name] = exponents_for(
                weights, self.geometries[layer.name], self.entropies[layer.name].to(weights)
            )
        return sharpened(weights, self.exponents[layer.name])


def exponents_for(weights: Tensor, geometry: Geometry, entropies: Tensor) -> Tensor:
    """Find, by bisection, the powers [head] of weights [batch, head, query, key] at which the readout query's mean
    entropy is `entropies` [head]."""
    low = torch.full_like(entropies, -np.log(LARGEST_EXPONENT))
    high = -low
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        too_flat = readout_entropy(sharpened(weights, middle.exp()), geometry).mean(dim=0) > entropies
        low, high = torch.where(too_flat, middle, low), torch.where(too_flat, high, middle)
    return ((low + high) / 2).exp()


def sharpened(weights: Tensor, exponents: Tensor) -> Tensor:
    """Return weights [batch, head, query, key] to the power of exponents [head], rows brought to sum 1."""
    return (weights.log() * exponents[:, None, None]).softmax(dim=-1)


def shuffled_surveys(
    target: Target, count: int, rows: Rows, folder: Path | None, progress: Callable[[str], None]
) -> list[Survey]:
    """Survey `count` models that know shuffled labels by heart, those of images that are not among `rows` where there
    are enough. None where classes are not known, or learning them would take too long.

    folder: where they are kept for the next analysis.
    """
    learnt = learning_rows(target, rows) if count else np.empty(0, np.int64)
    if not len(learnt):
        return []
    assert target.images.labels is not None
    inputs = target.model_input(target.images.read(learnt.tolist()))
    labels = target.images.labels[torch.from_numpy(learnt)].to(target.device)

    def learn(number: int) -> nn.Module | None:
        def tell(message: str) -> None:
            progress(f"{SHUFFLED}, model {number + 1} of {count}: {message}")

        return kept_or_learnt(folder, target.model, inputs, labels, FIRST_SHUFFLED + number, tell)

    models = on_all_cores(learn, range(count), target.device)
    return random_surveys(target, [model for model in models if model is not None], rows)


def learning_rows(target: Target, rows: Rows) -> Rows:
    """Return the images whose shuffled labels are learnt: of those that are not surveyed, a third of all at most; none
    where that is too few or too many."""
    images = target.images
    if images.labels is None or not images.num_classes:
        return np.empty(0, np.int64)
    others = np.setdiff1d(np.arange(len(images)), rows)
    candidates = others if len(others) >= len(images) // 3 else np.arange(len(images))
    count = min(MAX_IMAGES, len(images) // 3)
    if count < MIN_OF_CLASS * images.num_classes:
        return np.empty(0, np.int64)
    num_tokens = max(geometry.num_tokens for geometry in target.first_observation.geometries)
    if count * target.num_parameters * num_tokens > MAX_TRAINING_COST:
        return np.empty(0, np.int64)
    return candidates[stratified(images.labels.cpu().numpy()[candidates], count)]
