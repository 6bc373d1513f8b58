"""Passes over images with edited attention: what is edited, the average maps for it, and what the model answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attention_visualizer.analysis.importance.outcomes import Answers
from attention_visualizer.analysis.importance.reuse import EarlierModules, KeptOutputs
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.analysis.study.target import BatchLimit
from attention_visualizer.attention.capture import AttentionLayer, Edit, intervene
from attention_visualizer.attention.edits import (
    attend_as_partner,
    attend_to_maximum,
    in_all_layers,
    make_uniform,
    replace_by_mean,
    switch_off,
)
from attention_visualizer.attention.outputs import class_scores
from attention_visualizer.measures.streaming import MeanWeights
from attention_visualizer.support.parallel import on_all_cores

Array = NDArray[Any]

MAX_MEAN_BYTES = 2**30  # of the average maps of all layers, while they are summed
IMAGES_AT_ONCE = 250  # of the default model's, twice as many take a tenth more time each
MIN_BATCHES = 8  # of fewer, it does not pay to find out what can be left out of passes


@dataclass(frozen=True)
class Trial:
    """An intervention to try."""

    name: str
    edit: Edit
    with_partners: bool = False  # whether the batch has another image for each, behind them
    num_passes: int = 1


@dataclass(frozen=True)
class Passes:
    """Passes of a study's model over the images of some rows."""

    study: Study
    rows: Array
    classes: Array  # [image], of which the scores are

    def of_images(self, positions: Array) -> Passes:
        """The same over some of the images."""
        return Passes(self.study, self.rows[positions], self.classes[positions])

    def answers(self) -> Answers:
        """Return what the model answers as it is. Raise ValueError for a model without scores."""
        return self._compared([self._logits(images) for images, _ in self._batches()])

    def try_all(self, trials: Sequence[Trial]) -> list[Answers]:
        """Return what the model answers in each trial. Raise ValueError for a model without scores."""
        batches: list[list[Array]] = []
        earlier: EarlierModules | None = None
        done = 0
        for images, others in self._batches(any(trial.with_partners for trial in trials)):
            self.study.progress(f"{len(trials)} interventions, image {done + 1:,} of {len(self.rows):,}")
            batches.append(self._try_batch(trials, images, others, earlier))
            done += len(images)
            if len(batches) == 1 and len(self.rows) >= MIN_BATCHES * len(images):
                earlier = EarlierModules(self.study.target.model, images)
                again = self._try_batch(trials, images, others, earlier)
                # A model may keep more between its modules than what they give each other.
                if not all(np.array_equal(*each, equal_nan=True) for each in zip(batches[0], again, strict=True)):
                    earlier = None
        return [self._compared(logits) for logits in zip(*batches, strict=True)]

    def _try_batch(
        self, trials: Sequence[Trial], images: Tensor, others: Tensor | None, earlier: EarlierModules | None
    ) -> list[Array]:
        """Return the logits of each trial, [image, class]; modules that run before what it edits run once for all."""
        skipped = [[] if earlier is None or trial.with_partners else earlier.of(trial.edit) for trial in trials]
        kept = KeptOutputs({module for modules in skipped for module in modules})

        def logits(position: int) -> Array:
            trial = trials[position]
            batch = torch.cat([images, others]) if trial.with_partners and others is not None else images
            with kept.given(skipped[position]), intervene(self.study.target.model, trial.edit):
                return self._logits(batch)[: len(images)]

        with kept.installed():
            if kept.modules:
                with kept.kept():
                    self._logits(images)
            return on_all_cores(logits, range(len(trials)), self.study.target.device)

    def _logits(self, images: Tensor) -> Array:
        """Return the model's logits, [image, class]."""
        model = self.study.target.model
        with torch.no_grad():
            scores = class_scores(model, images, model(images))
        if scores is None:
            raise ValueError("the model gives no class scores")
        return scores.logits.cpu().double().numpy()

    def _compared(self, logits: Sequence[Array]) -> Answers:
        """logits: of each batch, [image, class]."""
        each = np.concatenate(logits)
        score = (each - each.mean(axis=1, keepdims=True))[np.arange(len(each)), self.classes]
        return Answers(each.argmax(axis=1) == self.classes, score)

    def average_maps(self) -> AverageMaps:
        """Return the average map of each layer over these images."""
        means, names = MeanWeights(MAX_MEAN_BYTES), {}

        def note(layer: AttentionLayer, weights: Tensor) -> Tensor:
            means.update(layer)
            names[layer.name] = class_queries(layer)
            return weights

        with torch.no_grad(), intervene(self.study.target.model, note):
            for images, _ in self._batches():
                self.study.target.model(images)
        return AverageMaps(means.compute(), names)

    def _batches(self, with_partners: bool = False) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield model inputs, and another image for each of them where they are asked for."""
        limit = BatchLimit(min(self.study.target.limit.images, IMAGES_AT_ONCE))
        target = replace(self.study.target, limit=limit)
        batches = (images for images, _ in target.batches(self.rows))
        if not with_partners:
            yield from ((images, None) for images in batches)
            return
        others = (images for images, _ in target.batches(self.rows[partners(len(self.rows))]))
        yield from zip(batches, others, strict=True)


def partners(count: int) -> Array:
    """Return the position of another image for each, every image being one's partner: the next in a random ring, always
    the same. Its class is not asked for."""
    ring = np.random.default_rng(0).permutation(count)
    partner = np.empty(count, dtype=np.int64)
    partner[ring] = np.roll(ring, -1)
    return partner


@dataclass(frozen=True)
class AverageMaps:
    """The weights of each layer averaged over images, and which queries are a class token that the model reads."""

    weights: dict[str, Tensor]  # layer name -> [head, query, key]; not of layers beyond MAX_MEAN_BYTES
    class_queries: dict[str, int | slice | None]  # of every layer; None where there are none

    @property
    def is_complete(self) -> bool:
        return self.weights.keys() == self.class_queries.keys()

    @property
    def has_class_queries(self) -> bool:
        return self.is_complete and any(each is not None for each in self.class_queries.values())

    def average(self, layer: str) -> Edit:
        return replace_by_mean(layer, None, self.weights[layer])

    def average_class_queries(self, layer: str) -> Edit:
        queries = self.class_queries[layer]
        return unchanged if queries is None else replace_by_mean(layer, None, self.weights[layer], queries)


def unchanged(layer: AttentionLayer, weights: Tensor) -> Tensor:
    return weights


def class_queries(layer: AttentionLayer) -> int | slice | None:
    """Return which queries of a layer are the class token that the model reads: its row, all of a layer that only pools
    into it; None where there is no such token or its position is not known."""
    geometry = layer.geometry
    if geometry is None or not geometry.num_prefix_tokens or geometry.class_token != "read":
        return None
    if layer.weights.shape[-2] != layer.weights.shape[-1]:
        return slice(None)
    return min(set(range(geometry.num_tokens)) - set(geometry.order or range(1, geometry.num_tokens)))


def whole_model_trials(maps: AverageMaps) -> list[Trial]:
    """Return the interventions in all layers at once."""
    trials = []
    if maps.is_complete:
        trials.append(Trial("average map", in_all_layers(maps.average)))
    if maps.has_class_queries:
        trials.append(Trial("average map, class token's row only", in_all_layers(maps.average_class_queries)))
    return [
        *trials,
        Trial("another image's attention", in_all_layers(attend_as_partner), with_partners=True, num_passes=2),
        Trial("all on the largest weight", in_all_layers(attend_to_maximum)),
        Trial("uniform attention", in_all_layers(make_uniform)),
        Trial("no attention", in_all_layers(switch_off)),
    ]
