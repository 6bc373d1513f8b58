"""One pass over many pictures for all chapters: statistics of each, and the maps of as many as fit a bound."""

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


@dataclass(frozen=True)
class Survey:
    """What one model attends to over many pictures; arrays have NaN where a layer has fewer heads or no such measure.

    summaries: measure -> over all pictures, by layer and head; geometries, layer_names, left_out: of the layers;
    mean_weights: layer name -> [head, query, key], over all pictures.
    labels: [picture], -1 where not known; predicted, probability: [picture], -1 and NaN where nothing is classified.
    means: the means of each measure with intervals, [measure, layer, head + 1]; the last column is the mean over heads.
    means_by_class: a group a class, [measure, layer]; means_by_outcome: group 0 wrong, 1 right, the same.
    kept: numbers of the pictures whose maps are kept, and of these
      maps: [kept, layer, head, patch], the readout query's attention, not renormalised, on the finest grid;
      rollouts: [kept, layer, patch], None where layers do not hand on the same tokens.
    """

    summaries: dict[str, MeasureSummary]
    geometries: list[Geometry]
    layer_names: list[str]
    left_out: list[str]
    mean_weights: dict[str, Tensor]
    labels: Array
    predicted: Array
    probability: Array
    means: BootstrapMeans
    means_by_class: BootstrapMeans
    means_by_outcome: BootstrapMeans
    kept: Array
    grid: tuple[int, int]
    maps: Array
    rollouts: Array | None
    reconstruction_error: float

    @property
    def num_pictures(self) -> int:
        return len(self.predicted)

    @property
    def reads_class_token(self) -> bool:
        """Whether the last layer has a class token to read: its patch queries then cannot affect the answer."""
        return self.geometries[-1].num_prefix_tokens > 0 and self.geometries[-1].class_token == "read"

    @property
    def right(self) -> Array | None:
        """Whether each picture was classified right; None where classes are not known."""
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
        """Of `rows`, for each layer: the patches of the finest grid, and one for all prefix tokens if there are any."""
        patches = self.maps.shape[-1]
        return np.array([patches + (geometry.num_prefix_tokens > 0) for geometry in self.geometries])

    def rows(self, kept: Array | slice = slice(None)) -> Array:
        """The kept maps as distributions: [kept, layer, head, 1 + patch]; in front, what prefix tokens take together.

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
    def few(self) -> Array:
        """Rows of at most MOST_PICTURES of the kept pictures, evenly spaced: [picture]."""
        return np.unique(np.linspace(0, len(self.kept) - 1, min(len(self.kept), MOST_PICTURES)).astype(np.int64))

    @cached_property
    def selectivity(self) -> Selectivity:
        """Of each head, over `few` pictures, the class token a key like the patches."""
        return selectivity(self.rows(self.few), self.num_keys)

    @cached_property
    def patch_selectivity(self) -> Selectivity:
        """The same of the attention on patches alone: how much of it the class token takes is no place."""
        return selectivity(self.shares[self.few], np.full(len(self.geometries), self.maps.shape[-1]))

    def mean_of(self, measure: str) -> Interval:
        """[layer, head + 1]; the last column is the mean over heads."""
        return self._means[MEASURE_NAMES.index(measure)]

    @cached_property
    def _means(self) -> Interval:
        return self.means.of_group()


def take_survey(
    model: nn.Module,
    batches: Iterable[Batch],
    labels: Tensor | None,
    num_pictures: int,
    geometry: Geometry | None = None,
    rollout: RolloutOptions | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> Survey:
    """batches: model inputs [image, channel, height, width] in order, `num_pictures` in all; labels: [picture].

    advance: told of each batch's pictures, for a progress bar. Raises UserError when no layer's place is known.
    """
    known = np.full(num_pictures, -1) if labels is None else labels.cpu().numpy().astype(np.int64)
    num_classes = max(int(known.max(initial=-1)) + 1, 1)
    values: dict[tuple[str, int], Tensor] = {}
    streamed = AttentionStatistics(ALL_MEASURES, lambda name, layer, each: values.update({(name, layer): each}))
    mean_weights = MeanWeights()
    means, by_class, by_outcome = BootstrapMeans(), BootstrapMeans(num_classes), BootstrapMeans(2)
    answers: list[tuple[Array, Array]] = []
    kept: Array | None = None
    observed: list[Observation] = []
    start, error = 0, 0.0
    with torch.no_grad():
        for batch, _ in batches:
            values.clear()
            collector = ObservationCollector(rollout=rollout)
            with capture(model, consumers(streamed.update, mean_weights.update, collector), geometry) as attention:
                output = model(batch)
            error = max(error, attention.reconstruction_error)
            predicted, probability = predict(output if has_head(model) else None, len(batch))
            answers.append((predicted, probability))
            seen = collector.observation(predicted, probability, attention.reconstruction_error)
            rows = slice(start, start + len(batch))
            if kept is None:
                kept = stratified(known, max(1, MOST_BYTES // bytes_of(seen, len(batch))))
            observed.append(only(seen, kept[(kept >= rows.start) & (kept < rows.stop)] - start))
            of_batch = table(values, len(batch), seen.head_maps.shape[1], seen.head_maps.shape[2])
            layer_means = nan_mean(of_batch)
            means.update(np.concatenate([of_batch, layer_means[..., None]], axis=-1))
            by_class.update(layer_means, known[rows])
            unknown = (known[rows] < 0) | (predicted < 0)
            by_outcome.update(layer_means, np.where(unknown, -1, known[rows] == predicted))
            start += len(batch)
            advance(len(batch))
    summaries = streamed.compute()
    assert kept is not None
    all_maps = np.concatenate([each.head_maps for each in observed])
    has_rollouts = observed[0].rollouts is not None
    return Survey(
        summaries,
        streamed.geometries,
        streamed.layer_names,
        list(streamed.left_out),
        mean_weights.compute(),
        known,
        np.concatenate([predicted for predicted, _ in answers]),
        np.concatenate([probability for _, probability in answers]),
        means,
        by_class,
        by_outcome,
        kept,
        (all_maps.shape[-2], all_maps.shape[-1]),
        all_maps.reshape(*all_maps.shape[:3], -1),
        np.concatenate([flat(each.rollouts) for each in observed]) if has_rollouts else None,
        error,
    )


def consumers(*each: Callable[[AttentionLayer], None]) -> Callable[[AttentionLayer], None]:
    """One consumer that hands a layer to several."""

    def consume(layer: AttentionLayer) -> None:
        for consumer in each:
            consumer(layer)

    return consume


def bytes_of(seen: Observation, num_images: int) -> int:
    """What one picture's maps take."""
    return max(1, (seen.head_maps.nbytes + (0 if seen.rollouts is None else seen.rollouts.nbytes)) // num_images)


def only(seen: Observation, rows: Array) -> Observation:
    """The maps and rollouts of some of the images; the rest is not kept."""
    rollouts = None if seen.rollouts is None else seen.rollouts[rows]
    return replace(seen, head_maps=seen.head_maps[rows], rollouts=rollouts)


def flat(maps: Array | None) -> Array:
    """[..., grid height, grid width] -> [..., patch]."""
    assert maps is not None
    return maps.reshape(*maps.shape[:-2], maps.shape[-2] * maps.shape[-1])  # of no picture too


def table(values: dict[tuple[str, int], Tensor], num_images: int, num_layers: int, num_heads: int) -> Array:
    """Of one batch: [image, measure, layer, head], NaN where there is none."""
    found = np.full((num_images, len(MEASURE_NAMES), num_layers, num_heads), np.nan, np.float32)
    for (name, layer), each in values.items():
        found[:, MEASURE_NAMES.index(name), layer, : each.shape[1]] = each.float().cpu().numpy()
    return found
