"""What a class's score and the accuracy lose without each head and each layer, and what that loss goes along with."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attention_visualizer.analysis.study.heads import Heads
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.attention.capture import AttentionLayer, Edit, capture, intervene
from attention_visualizer.attention.edits import replace_by_mean, switch_off
from attention_visualizer.attention.outputs import class_scores
from attention_visualizer.measures import intervals
from attention_visualizer.measures.intervals import Interval, learnt_threshold
from attention_visualizer.measures.streaming import MeanWeights
from attention_visualizer.support.parallel import on_all_cores

Array = NDArray[Any]

# Declared beforehand: a head matters if, without it, the class's score falls by at least this part of what it is.
MIN_PART = 0.05
# Declared beforehand: a head works alike on every image if at most this part of its loss is left when it is averaged.
CONSTANT_PART = 0.1


@dataclass(frozen=True)
class Ablation:
    """A way to take away what a head contributes."""

    short_name: str
    name: str
    edit: Callable[[str, int | None, Callable[[], Tensor]], Edit]  # of a layer's name, a head (None: all), its mean


ABLATIONS = {
    "zero": Ablation("zero ablation", "weights set to zero", lambda layer, head, mean: switch_off(layer, head)),
    "mean": Ablation(
        "mean ablation",
        "weights replaced by their mean",
        lambda layer, head, mean: replace_by_mean(layer, head, mean()),
    ),
}


@dataclass(frozen=True)
class Correlation:
    """Spearman's correlation between a quantity of heads and the loss without them, by ablation."""

    quantity: Array  # [existing head]
    value: dict[str, Interval]
    p_value: dict[str, float]  # by permutation, adjusted for all quantities and ablations


@dataclass(frozen=True)
class Importance:
    """What changes without each head.

    Changes are [layer, head + 1] by ablation, paired by image; the last column is the whole layer, and heads that a
    layer does not have are NaN.
    """

    heads: Heads
    images: str  # how many of which kind
    class_source: Literal["true", "predicted"]  # which class's score; the predicted where true ones are not known
    #: The class's logit relative to the mean of all logits (a common shift changes no prediction), with all heads.
    score: Interval
    accuracy: Interval  # with all heads
    score_changes: dict[str, Interval]
    accuracy_changes: dict[str, Interval]
    chance_accuracy: float  # of guessing
    correlations: dict[str, Correlation]  # by the quantity's name, with its unit

    @property
    def is_learnt(self) -> bool:
        """Return whether predictions are well above guessing, so that heads could be needed for them. Where true
        classes are not known, that is not known either: any model agrees with itself."""
        learnt = self.accuracy.low > learnt_threshold(self.chance_accuracy) and self.score.low > 0
        return bool(self.class_source == "true" and learnt)

    @property
    def least_loss(self) -> float:
        """The least loss of the score without a head that matters."""
        return MIN_PART * abs(float(self.score.value))

    def matters(self, ablation: str) -> Array:
        """Return whether the whole interval lies beyond the least loss: bool [layer, head + 1]."""
        with np.errstate(invalid="ignore"):
            return np.asarray((self.score_changes[ablation].high <= -self.least_loss) & self.is_learnt)

    def num_mattering(self, ablation: str) -> int:
        """The number of single heads that matter."""
        return int(self.matters(ablation)[self.heads.index].sum())

    def loss(self, ablation: str) -> Interval:
        """The loss of the score without each head, [existing head]."""
        return self.score_changes[ablation][self.heads.index].times(-1)

    @property
    def constant_heads(self) -> list[str]:
        """Return the labels of the heads whose loss is nearly all gone when they are averaged instead of switched
        off."""
        zero, mean = (self.score_changes[ablation][self.heads.index] for ablation in ABLATIONS)
        is_constant = (zero.high < 0) & (mean.value > CONSTANT_PART * zero.value)
        return [label for label, constant in zip(self.heads.labels, is_constant, strict=True) if constant]


def num_passes(study: Study) -> int:
    """Return how often `measure` runs the model over each image."""
    return len(ABLATIONS) * len(ablated_places(study)) + 1


def measure(study: Study, rows: Array) -> Importance:
    """Ablate each head and each layer over the images of these rows. Raise ValueError for a model without scores."""
    survey, heads, places = study.survey, Heads.of(study.survey), ablated_places(study)
    classes = (survey.predicted if survey.correct is None else survey.labels)[rows]
    logits = logits_of_rows(study, rows)
    score, is_right = relative_score(logits, classes), logits.argmax(axis=1) == classes
    score_changes, accuracy_changes = {}, {}
    for name, ablation in ABLATIONS.items():
        ablated = ablated_logits(study, rows, ablation, places)
        changes = np.stack([relative_score(each, classes) - score for each in ablated], axis=-1)
        score_changes[name] = intervals.bootstrap_mean(by_layer(changes, places))
        still_right = np.stack([each.argmax(axis=1) == classes for each in ablated], axis=-1)
        change = intervals.share_change(is_right, still_right)
        value, low, high = (by_layer(each, places) for each in (change.value, change.low, change.high))
        accuracy_changes[name] = Interval(value, low, high, change.n)
    quantities = {"attention entropy (nats)": "entropy", "head confidence (share)": "confidence"}
    return Importance(
        heads=heads,
        images=f"{len(rows):,} {study.target.images.kind}s",
        class_source="predicted" if survey.correct is None else "true",
        score=intervals.bootstrap_mean(score),
        accuracy=intervals.share_interval(is_right.sum(), len(is_right)),
        score_changes=score_changes,
        accuracy_changes=accuracy_changes,
        chance_accuracy=1 / logits.shape[1],
        correlations=correlate(
            {label: survey.mean_of(name).value[heads.index] for label, name in quantities.items()},
            {name: -change.value[heads.index] for name, change in score_changes.items()},
        ),
    )


def ablated_places(study: Study) -> list[tuple[int, int]]:
    """(layer, column) of each existing head and then of each whole layer, whose column is the one behind the heads."""
    num_layers, num_heads = study.survey.maps.shape[1:3]
    return [*Heads.of(study.survey), *((layer, num_heads) for layer in range(num_layers))]


def by_layer(values: Array, places: list[tuple[int, int]]) -> Array:
    """Return values [..., place] as [..., layer, column], NaN elsewhere."""
    layers, columns = np.array(places).T
    filled = np.full((*values.shape[:-1], layers.max() + 1, columns.max() + 1), np.nan)
    filled[..., layers, columns] = values
    return filled


def ablated_logits(study: Study, rows: Array, ablation: Ablation, places: list[tuple[int, int]]) -> list[Array]:
    """Return the logits [image, class] without each of the places."""
    survey = study.survey
    num_heads = survey.maps.shape[2]

    def logits_without(place: tuple[int, int]) -> Array:
        layer, column = place
        head = None if column == num_heads else column
        study.progress(f"without layer {layer + 1}" if head is None else f"without head {layer + 1}.{head + 1}")
        name = survey.layer_names[layer]
        return logits_of_rows(study, rows, ablation.edit(name, head, partial(mean_weights, study, rows, name)))

    return on_all_cores(logits_without, places, study.target.device)


def mean_weights(study: Study, rows: Array, name: str) -> Tensor:
    """Return a layer's mean weights [head, query, key]: those of the survey; of large layers, of which it keeps none,
    over the images of these rows."""
    known = study.survey.mean_weights
    if name in known:
        return known[name]
    means = MeanWeights()

    def consume(layer: AttentionLayer) -> None:
        if layer.name == name:
            means.update(layer)

    with torch.no_grad(), capture(study.target.model, consume, study.target.geometry):
        for images, _ in study.target.batches(rows):
            study.target.model(images)
    return means.compute()[name]


def logits_of_rows(study: Study, rows: Array, edit: Edit | None = None) -> Array:
    """Return the logits of the images of these rows, float64 [image, class]."""
    model, batches = study.target.model, []
    with torch.no_grad(), ExitStack() as stack:
        if edit is not None:
            stack.enter_context(intervene(model, edit))
        for images, _ in study.target.batches(rows):
            scores = class_scores(model, images, model(images))
            if scores is None:
                raise ValueError("the model gives no class scores")
            batches.append(scores.logits.cpu().double().numpy())
    return np.concatenate(batches)


def relative_score(logits: Array, classes: Array) -> Array:
    """Return the logits [image, class] at the classes [image], relative to their mean over all classes: [image]."""
    return np.asarray((logits - logits.mean(axis=1, keepdims=True))[np.arange(len(logits)), classes])


def correlate(quantities: dict[str, Array], losses: dict[str, Array]) -> dict[str, Correlation]:
    """Each quantity [head] with each loss [head]; NaN where there are too few heads, or all are equal."""
    correlations = {
        (label, ablation): intervals.rank_correlation(values, loss)
        for label, values in quantities.items()
        for ablation, loss in losses.items()
    }
    adjusted = intervals.false_discovery_control(np.array([p_value for _, p_value in correlations.values()]))
    p_values = dict(zip(correlations, adjusted.tolist(), strict=True))
    return {
        label: Correlation(
            values,
            {ablation: correlations[label, ablation][0] for ablation in losses},
            {ablation: p_values[label, ablation] for ablation in losses},
        )
        for label, values in quantities.items()
    }
