"""One pass over many images for all chapters: statistics of each, and the maps of as many as fit a bound."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attention_visualizer.attention.capture import AttentionLayer, capture
from attention_visualizer.attention.classifiers import watched_head
from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.attention.outputs import predict
from attention_visualizer.measures import map_measures
from attention_visualizer.measures.head_roles import MAX_IMAGES, Selectivity, nan_mean, selectivity
from attention_visualizer.measures.intervals import BootstrapMeans, Interval, stratified
from attention_visualizer.measures.observation import Observation, ObservationCollector, RolloutOptions
from attention_visualizer.measures.streaming import REPORTED_MEASURES, AttentionStatistics, MeanWeights, MeasureSummary

Array = NDArray[Any]
Batch = tuple[Tensor, Tensor | None]
MAX_BYTES = 64 * 2**20  # of the maps that are kept
MEASURE_NAMES = tuple(measure.name for measure in REPORTED_MEASURES)
OF_ALL_QUERIES = np.array([measure.of_all_queries for measure in REPORTED_MEASURES])  # [measure]


@dataclass(frozen=True, kw_only=True)
class Survey:
    """One model's attention over many images; arrays have NaN where a layer has fewer heads or no such measure.

    Measures of all queries are NaN where `patch_queries_count` says that most queries cannot affect the prediction.
    """

    all_summaries: dict[str, MeasureSummary]  # measure -> over all images, by layer and head, of every layer
    geometries: list[Geometry]
    layer_names: list[str]
    left_out: list[str]  # layers whose keys have no place on the image
    mean_weights: dict[str, Tensor]  # layer name -> [head, query, key], tokens in the usual order; of small layers
    labels: Array  # [image], -1 where not known
    predicted: Array  # [image], -1 where nothing is classified
    probability: Array  # [image], of the predicted class, NaN where it is not known
    means: BootstrapMeans  # of each measure, [measure, layer, head + 1]; the last column is the mean over heads
    means_by_class: BootstrapMeans  # a group for each class, [measure, layer]
    means_by_outcome: BootstrapMeans  # group 0 wrong, group 1 correct, [measure, layer]
    kept: Array  # positions of the images whose maps are kept
    grid: tuple[int, int]  # the finest, (height, width)
    maps: Array  # [kept, layer, head, patch], the readout query's attention, not renormalised, on the finest grid
    rollouts: Array | None  # [kept, layer, patch]; None where layers do not work on the same tokens
    reconstruction_error: float

    @property
    def num_images(self) -> int:
        return len(self.predicted)

    @property
    def reads_class_token(self) -> bool:
        """Return whether the last layer has a class token to read: its patch queries then cannot affect the
        prediction."""
        return self.geometries[-1].num_prefix_tokens > 0 and self.geometries[-1].class_token == "read"

    @property
    def patch_queries_count(self) -> Array:
        """Return whether the prediction depends on each layer's patch queries: bool [layer].

        It does not on those of a last layer of which only the class token is read: their distance says nothing.
        """
        counts = np.ones(len(self.geometries), dtype=bool)
        counts[-1] = not self.reads_class_token
        return counts

    @cached_property
    def has_measure(self) -> Array:
        """Return whether a measure says something of a layer: bool [measure, layer]."""
        return ~OF_ALL_QUERIES[:, None] | self.patch_queries_count

    @cached_property
    def summaries(self) -> dict[str, MeasureSummary]:
        """Return measure -> over all images, by layer and head."""
        return {
            name: summary.of_layers(has_measure)
            for (name, summary), has_measure in zip(self.all_summaries.items(), self.has_measure, strict=True)
        }

    @cached_property
    def uniform_distances(self) -> Array:
        """Return the mean attention distance of uniform attention in pixels: [layer], NaN where patch queries do not
        count."""
        distances = np.array([map_measures.uniform_distance(geometry) for geometry in self.geometries])
        return np.where(self.patch_queries_count, distances, np.nan)

    @property
    def relative_distances(self) -> Interval:
        """Return the mean attention distance in multiples of uniform attention's: [layer, head + 1], the last column
        the mean over heads; NaN where patch queries do not count."""
        measured, uniform = self.mean_of("distance"), self.uniform_distances[:, None]
        return Interval(measured.value / uniform, measured.low / uniform, measured.high / uniform, measured.n)

    @property
    def correct(self) -> Array | None:
        """Return whether each image was classified correctly; None where classes are not known."""
        return None if (self.labels < 0).any() or (self.predicted < 0).any() else self.labels == self.predicted

    @property
    def accuracy(self) -> float | None:
        return None if self.correct is None else float(self.correct.mean())

    @cached_property
    def shares(self) -> Array:
        """The kept maps renormalised over the patches: [kept, layer, head, patch]."""
        return self.maps / np.maximum(self.maps.sum(axis=-1, keepdims=True), np.finfo(np.float32).tiny)

    @property
    def num_keys(self) -> Array:
        """The length of each layer's `readout_rows`: the patches of the finest grid, and one for all prefix tokens."""
        patches = self.maps.shape[-1]
        return np.array([patches + (geometry.num_prefix_tokens > 0) for geometry in self.geometries])

    def readout_rows(self, kept: Array | slice = slice(None)) -> Array:
        """The kept maps as distributions [kept, layer, head, 1 + patch]; in front, what prefix tokens take together.

        A coarser layer's shares are spread evenly over the finest grid, and windows count alike.
        """
        maps = self.maps[kept]
        rows = np.empty((*maps.shape[:-1], maps.shape[-1] + 1), np.float32)
        for layer, geometry in enumerate(self.geometries):
            if geometry.num_prefix_tokens:
                spread = maps.shape[-1] / np.prod(geometry.grid)
                rows[:, layer, :, 1:] = maps[:, layer] / spread
                rows[:, layer, :, 0] = np.clip(1 - rows[:, layer, :, 1:].sum(axis=-1), 0, None)
            else:
                rows[:, layer, :, 1:] = maps[:, layer] / maps[:, layer].sum(axis=-1, keepdims=True)
                rows[:, layer, :, 0] = np.where(np.isnan(rows[:, layer, :, 1]), np.nan, 0)
        return rows

    @property
    def uniform_entropy(self) -> float | None:
        """Return the entropy of uniform attention in nats; None where layers have different numbers of keys."""
        counts = {geometry.num_tokens for geometry in self.geometries}
        return map_measures.uniform_entropy(counts.pop()) if len(counts) == 1 else None

    @property
    def subsample(self) -> Array:
        """Return the positions of at most MAX_IMAGES of the kept images, evenly spaced."""
        return np.unique(np.linspace(0, len(self.kept) - 1, min(len(self.kept), MAX_IMAGES)).astype(np.int64))

    @cached_property
    def selectivity(self) -> Selectivity:
        """The selectivity of each head, over the subsample, with the class token a key like the patches."""
        return selectivity(self.readout_rows(self.subsample), self.num_keys)

    @cached_property
    def patch_selectivity(self) -> Selectivity:
        """The selectivity of the attention on patches alone: how much the class token takes is no place."""
        return selectivity(self.shares[self.subsample], np.full(len(self.geometries), self.maps.shape[-1]))

    def mean_of(self, measure: str) -> Interval:
        """Return the mean over images: [layer, head + 1]; the last column is the mean over heads."""
        return self._means[MEASURE_NAMES.index(measure)]

    @cached_property
    def _means(self) -> Interval:
        return self.means.of_group().where(self.has_measure[..., None])


def survey_model(
    model: nn.Module,
    batches: Iterable[Batch],
    labels: Tensor | None,
    num_images: int,
    geometry: Geometry | None = None,
    rollout: RolloutOptions | None = None,
) -> Survey:
    """Run the model once over `num_images` images.

    batches: model inputs [image, channel, height, width] in order; labels: [image]. Raise UserError when no layer's
    place on the image is known.
    """
    known = np.full(num_images, -1) if labels is None else labels.cpu().numpy().astype(np.int64)
    accumulator = SurveyAccumulator(known)
    with torch.no_grad():
        for batch, _ in batches:
            accumulator.update(model, batch, geometry, rollout)
    return accumulator.compute()


class SurveyAccumulator:
    """A survey in the making: `update` for each batch in order, then `compute`. labels: [image], -1 where not known."""

    def __init__(self, labels: Array) -> None:
        self.labels = labels
        self.batch_values: dict[tuple[str, int], Tensor] = {}  # (measure, layer) -> [image, head]
        self.statistics = AttentionStatistics(
            REPORTED_MEASURES, lambda name, layer, values: self.batch_values.update({(name, layer): values})
        )
        self.mean_weights = MeanWeights(MAX_BYTES)
        total, num_classes = len(labels), max(int(labels.max(initial=-1)) + 1, 1)
        self.means = BootstrapMeans(num_images=total)
        self.means_by_class = BootstrapMeans(num_classes, num_images=total)
        self.means_by_outcome = BootstrapMeans(2, num_images=total)
        self.predictions: list[tuple[Array, Array]] = []
        self.kept: Array | None = None
        self.observations: list[Observation] = []  # of the kept images
        self.num_images, self.reconstruction_error = 0, 0.0

    def update(
        self, model: nn.Module, batch: Tensor, geometry: Geometry | None, rollout: RolloutOptions | None
    ) -> None:
        self.batch_values.clear()
        collector = ObservationCollector(rollout=rollout)
        consume = consumers(
            self.statistics.update, lambda layer: self.mean_weights.update(layer.in_usual_order()), collector
        )
        with capture(model, consume, geometry) as attention, watched_head(model) as head:
            output = model(batch)
        collector.left_out += attention.unseen
        self.statistics.left_out |= attention.unseen
        self.reconstruction_error = max(self.reconstruction_error, attention.reconstruction_error)
        predicted, probability = predict(head.class_scores(batch, output), len(batch))
        self.predictions.append((predicted, probability))
        observation = collector.observation(predicted, probability, attention.reconstruction_error)
        start, end = self.num_images, self.num_images + len(batch)
        if self.kept is None:
            self.kept = stratified(self.labels, max(1, MAX_BYTES // bytes_of_image(observation, len(batch))))
        rows = self.kept[(self.kept >= start) & (self.kept < end)] - start
        self.observations.append(select_images(observation, rows))
        self._update_means(predicted, self.labels[start:end], observation.head_maps.shape[1:3])
        self.num_images = end

    def _update_means(self, predicted: Array, labels: Array, heads: tuple[int, int]) -> None:
        """heads: number of layers, and of heads in a layer."""
        values = values_table(self.batch_values, len(predicted), *heads)
        layer_means = nan_mean(values)
        self.means.update(np.concatenate([values, layer_means[..., None]], axis=-1))
        self.means_by_class.update(layer_means, labels)
        unknown = (labels < 0) | (predicted < 0)
        self.means_by_outcome.update(layer_means, np.where(unknown, -1, labels == predicted))

    def compute(self) -> Survey:
        summaries = self.statistics.compute()
        assert self.kept is not None
        maps = np.concatenate([observation.head_maps for observation in self.observations])
        rollouts = [observation.rollouts for observation in self.observations if observation.rollouts is not None]
        return Survey(
            all_summaries=summaries,
            geometries=self.statistics.geometries,
            layer_names=self.statistics.layer_names,
            left_out=list(self.statistics.left_out),
            mean_weights=self.mean_weights.compute(),
            labels=self.labels,
            predicted=np.concatenate([predicted for predicted, _ in self.predictions]),
            probability=np.concatenate([probability for _, probability in self.predictions]),
            means=self.means,
            means_by_class=self.means_by_class,
            means_by_outcome=self.means_by_outcome,
            kept=self.kept,
            grid=(maps.shape[-2], maps.shape[-1]),
            maps=flatten_grid(maps),
            rollouts=flatten_grid(np.concatenate(rollouts)) if rollouts else None,
            reconstruction_error=self.reconstruction_error,
        )


def consumers(*each: Callable[[AttentionLayer], None]) -> Callable[[AttentionLayer], None]:
    """Return one consumer that hands a layer to several."""

    def consume(layer: AttentionLayer) -> None:
        for consumer in each:
            consumer(layer)

    return consume


def bytes_of_image(observation: Observation, num_images: int) -> int:
    """Return the bytes that the maps and rollouts of one image take."""
    rollouts = 0 if observation.rollouts is None else observation.rollouts.nbytes
    return max(1, (observation.head_maps.nbytes + rollouts) // num_images)


def select_images(observation: Observation, rows: Array) -> Observation:
    """Return the maps and rollouts of some of the images."""
    rollouts = None if observation.rollouts is None else observation.rollouts[rows]
    return replace(observation, head_maps=observation.head_maps[rows], rollouts=rollouts)


def flatten_grid(maps: Array) -> Array:
    """Reshape [..., grid height, grid width] to [..., patch]."""
    return maps.reshape(*maps.shape[:-2], -1)


def values_table(values: dict[tuple[str, int], Tensor], num_images: int, num_layers: int, num_heads: int) -> Array:
    """Return the values of one batch as [image, measure, layer, head], NaN where there is none."""
    table = np.full((num_images, len(MEASURE_NAMES), num_layers, num_heads), np.nan, np.float32)
    for (name, layer), of_layer in values.items():
        table[:, MEASURE_NAMES.index(name), layer, : of_layer.shape[1]] = of_layer.float().cpu().numpy()
    return table
