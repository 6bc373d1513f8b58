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
from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.attention.outputs import has_head, predict
from attention_visualizer.measures import map_measures
from attention_visualizer.measures.head_roles import MOST_PICTURES, Selectivity, nan_mean, selectivity
from attention_visualizer.measures.intervals import BootstrapMeans, Interval, stratified
from attention_visualizer.measures.observation import Observation, ObservationCollector, RolloutOptions
from attention_visualizer.measures.streaming import ALL_MEASURES, AttentionStatistics, MeanWeights, MeasureSummary

Array = NDArray[Any]
Batch = tuple[Tensor, Tensor | None]
MOST_BYTES = 64 * 2**20  # of the maps that are kept
MEASURE_NAMES = tuple(measure.name for measure in ALL_MEASURES)


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What one model attends to over many images; arrays have NaN where a layer has fewer heads or no such measure."""

    summaries: dict[str, MeasureSummary]  # measure -> over all images, by layer and head
    geometries: list[Geometry]
    layer_names: list[str]
    left_out: list[str]  # layers whose keys have no place on the image
    mean_weights: dict[str, Tensor]  # layer name -> [head, query, key], over all images
    labels: Array  # [image], -1 where not known
    predicted: Array  # [image], -1 where nothing is classified
    probability: Array  # [image], of the predicted class, NaN where nothing is classified
    means: BootstrapMeans  # of each measure, [measure, layer, head + 1]; the last column is the mean over heads
    means_by_class: BootstrapMeans  # a group for each class, [measure, layer]
    means_by_outcome: BootstrapMeans  # group 0 wrong, group 1 right, [measure, layer]
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
        """Whether the last layer has a class token to read: its patch queries then cannot affect the prediction."""
        return self.geometries[-1].num_prefix_tokens > 0 and self.geometries[-1].class_token == "read"

    @property
    def patch_queries_count(self) -> Array:
        """Whether the prediction depends on each layer's patch queries: bool [layer].

        It does not on those of a last layer of which only the class token is read: their distance says nothing.
        """
        counts = np.ones(len(self.geometries), dtype=bool)
        counts[-1] = not self.reads_class_token
        return counts

    @cached_property
    def uniform_distances(self) -> Array:
        """Mean attention distance of uniform attention in pixels: [layer], NaN where patch queries do not count."""
        distances = np.array([map_measures.uniform_distance(geometry) for geometry in self.geometries])
        return np.where(self.patch_queries_count, distances, np.nan)

    @property
    def relative_distances(self) -> Interval:
        """Mean attention distance in multiples of uniform attention's: [layer, head + 1], the last column the mean over
        heads; NaN where patch queries do not count."""
        measured, uniform = self.mean_of("distance"), self.uniform_distances[:, None]
        return Interval(measured.value / uniform, measured.low / uniform, measured.high / uniform, measured.n)

    @property
    def right(self) -> Array | None:
        """Whether each image was classified right; None where classes are not known."""
        return None if (self.labels < 0).any() or (self.predicted < 0).any() else self.labels == self.predicted

    @property
    def accuracy(self) -> float | None:
        return None if self.right is None else float(self.right.mean())

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
        """None where layers have different numbers of keys."""
        counts = {geometry.num_tokens for geometry in self.geometries}
        return map_measures.uniform_entropy(counts.pop()) if len(counts) == 1 else None

    @property
    def subsample(self) -> Array:
        """Positions of at most MOST_PICTURES of the kept images, evenly spaced."""
        return np.unique(np.linspace(0, len(self.kept) - 1, min(len(self.kept), MOST_PICTURES)).astype(np.int64))

    @cached_property
    def selectivity(self) -> Selectivity:
        """Of each head, over the subsample, with the class token a key like the patches."""
        return selectivity(self.readout_rows(self.subsample), self.num_keys)

    @cached_property
    def patch_selectivity(self) -> Selectivity:
        """The same of the attention on patches alone: how much of it the class token takes is no place."""
        return selectivity(self.shares[self.subsample], np.full(len(self.geometries), self.maps.shape[-1]))

    def mean_of(self, measure: str) -> Interval:
        """[layer, head + 1]; the last column is the mean over heads."""
        return self._means[MEASURE_NAMES.index(measure)]

    @cached_property
    def _means(self) -> Interval:
        return self.means.of_group()


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
    num_classes = max(int(known.max(initial=-1)) + 1, 1)
    values: dict[tuple[str, int], Tensor] = {}
    statistics = AttentionStatistics(ALL_MEASURES, lambda name, layer, each: values.update({(name, layer): each}))
    mean_weights = MeanWeights()
    means, by_class, by_outcome = BootstrapMeans(), BootstrapMeans(num_classes), BootstrapMeans(2)
    predictions: list[tuple[Array, Array]] = []
    kept: Array | None = None
    observations: list[Observation] = []
    start, error = 0, 0.0
    with torch.no_grad():
        for batch, _ in batches:
            values.clear()
            collector = ObservationCollector(rollout=rollout)
            with capture(model, consumers(statistics.update, mean_weights.update, collector), geometry) as attention:
                output = model(batch)
            error = max(error, attention.reconstruction_error)
            predicted, probability = predict(output if has_head(model) else None, len(batch))
            predictions.append((predicted, probability))
            observation = collector.observation(predicted, probability, attention.reconstruction_error)
            rows = slice(start, start + len(batch))
            if kept is None:
                kept = stratified(known, max(1, MOST_BYTES // bytes_of(observation, len(batch))))
            observations.append(only(observation, kept[(kept >= rows.start) & (kept < rows.stop)] - start))
            of_batch = table(values, len(batch), observation.head_maps.shape[1], observation.head_maps.shape[2])
            layer_means = nan_mean(of_batch)
            means.update(np.concatenate([of_batch, layer_means[..., None]], axis=-1))
            by_class.update(layer_means, known[rows])
            unknown = (known[rows] < 0) | (predicted < 0)
            by_outcome.update(layer_means, np.where(unknown, -1, known[rows] == predicted))
            start += len(batch)
    summaries = statistics.compute()
    assert kept is not None
    maps = np.concatenate([each.head_maps for each in observations])
    has_rollouts = observations[0].rollouts is not None
    return Survey(
        summaries=summaries,
        geometries=statistics.geometries,
        layer_names=statistics.layer_names,
        left_out=list(statistics.left_out),
        mean_weights=mean_weights.compute(),
        labels=known,
        predicted=np.concatenate([predicted for predicted, _ in predictions]),
        probability=np.concatenate([probability for _, probability in predictions]),
        means=means,
        means_by_class=by_class,
        means_by_outcome=by_outcome,
        kept=kept,
        grid=(maps.shape[-2], maps.shape[-1]),
        maps=maps.reshape(*maps.shape[:3], -1),
        rollouts=np.concatenate([flat(each.rollouts) for each in observations]) if has_rollouts else None,
        reconstruction_error=error,
    )


def consumers(*each: Callable[[AttentionLayer], None]) -> Callable[[AttentionLayer], None]:
    """One consumer that hands a layer to several."""

    def consume(layer: AttentionLayer) -> None:
        for consumer in each:
            consumer(layer)

    return consume


def bytes_of(observation: Observation, num_images: int) -> int:
    """The bytes that one image's maps take."""
    rollouts = 0 if observation.rollouts is None else observation.rollouts.nbytes
    return max(1, (observation.head_maps.nbytes + rollouts) // num_images)


def only(observation: Observation, rows: Array) -> Observation:
    """The maps and rollouts of some of the images."""
    rollouts = None if observation.rollouts is None else observation.rollouts[rows]
    return replace(observation, head_maps=observation.head_maps[rows], rollouts=rollouts)


def flat(maps: Array | None) -> Array:
    """Reshape [..., grid height, grid width] to [..., patch]."""
    assert maps is not None
    return maps.reshape(*maps.shape[:-2], maps.shape[-2] * maps.shape[-1])  # of no image too


def table(values: dict[tuple[str, int], Tensor], num_images: int, num_layers: int, num_heads: int) -> Array:
    """The values of one batch as [image, measure, layer, head], NaN where there is none."""
    filled = np.full((num_images, len(MEASURE_NAMES), num_layers, num_heads), np.nan, np.float32)
    for (name, layer), each in values.items():
        filled[:, MEASURE_NAMES.index(name), layer, : each.shape[1]] = each.float().cpu().numpy()
    return filled
