"""Streaming accumulators: statistics of attention over any number of images in memory that does not grow.

Each is `update` / `compute`; sums are kept in float64 and counts exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attention_visualizer.attention.capture import AttentionLayer
from attention_visualizer.attention.geometry import NO_GEOMETRY, Geometry
from attention_visualizer.measures import map_measures
from attention_visualizer.support.double_precision import exact_device, has_float64, in_float64
from attention_visualizer.support.errors import UserError

NUM_BINS = 512
MAX_RAW = 256  # images of which the values themselves are kept, and quantiles are exact


class Reduce(Protocol):
    """A sum or maximum of a tensor over processes, such as `trainer.strategy.reduce`."""

    def __call__(self, tensor: Tensor, *, reduce_op: str) -> Tensor: ...


class Distribution:
    """Histogram, sum and sum of squares of values in a known range, for each head.

    Quantiles come from the histogram, so they are exact to one bin: (high - low) / NUM_BINS.
    """

    def __init__(self, num_heads: int, low: float, high: float, device: torch.device | str = "cpu") -> None:
        self.low, self.high = low, high
        device = exact_device(device)
        self.counts = torch.zeros(num_heads, NUM_BINS, dtype=torch.float64, device=device)
        self.first_bins = torch.arange(num_heads, device=device) * NUM_BINS  # each head's, with all counts in one row
        self.sums = torch.zeros(num_heads, dtype=torch.float64, device=device)
        self.sums_of_squares = torch.zeros(num_heads, dtype=torch.float64, device=device)
        self.raw_values: list[Tensor] | None = []  # all values, None as soon as they are of more than MAX_RAW images
        self.smallest = torch.full((num_heads,), math.inf, dtype=torch.float64, device=device)
        self.largest = torch.full((num_heads,), -math.inf, dtype=torch.float64, device=device)

    def update(self, values: Tensor) -> None:
        """values: [batch, head]."""
        values, num_heads = values.to(self.counts.device), len(self.counts)
        bins = ((values - self.low) * (NUM_BINS / (self.high - self.low))).long().clamp_(0, NUM_BINS - 1)
        bins += self.first_bins
        self.counts += torch.bincount(bins.flatten(), minlength=num_heads * NUM_BINS).view_as(self.counts)
        if self.raw_values is not None:
            self.raw_values.append(values)
            if sum(map(len, self.raw_values)) > MAX_RAW:
                self.raw_values = None
        values = values.double()
        self.sums += values.sum(dim=0)
        self.sums_of_squares += values.square().sum(dim=0)
        if len(values):
            smallest, largest = torch.aminmax(values, dim=0)
            self.smallest = torch.minimum(self.smallest, smallest)
            self.largest = torch.maximum(self.largest, largest)

    def reduce(self, over_processes: Reduce) -> None:
        for sums in (self.counts, self.sums, self.sums_of_squares):
            sums.copy_(over_processes(sums, reduce_op="sum"))
        self.raw_values = None  # each process has its own
        self.largest = over_processes(self.largest, reduce_op="max")
        self.smallest = -over_processes(-self.smallest, reduce_op="max")


@dataclass(frozen=True)
class MeasureSummary:
    """One measure over images, by layer and head."""

    mean: NDArray[np.float64]  # [layer, head], NaN where a layer has fewer heads or the measure does not apply
    deviation: NDArray[np.float64]  # as the mean
    counts: NDArray[np.float64]  # [layer, head, bin]
    edges: NDArray[np.float64]  # [bin + 1]
    extremes: NDArray[np.float64]  # [layer, 2], the smallest and the largest value
    n: int  # images
    raw_values: tuple[NDArray[np.float64], ...] | None = None  # of each layer, where there are at most MAX_RAW images

    def of_layers(self, chosen: NDArray[np.bool_]) -> MeasureSummary:
        """Return the same with nothing of the other layers. chosen: [layer]."""
        return replace(
            self,
            mean=np.where(chosen[:, None], self.mean, np.nan),
            deviation=np.where(chosen[:, None], self.deviation, np.nan),
            counts=np.where(chosen[:, None, None], self.counts, 0),
            raw_values=self.raw_values
            and tuple(each if keep else each[:0] for each, keep in zip(self.raw_values, chosen, strict=True)),
        )

    def quantiles(self, shares: tuple[float, ...]) -> NDArray[np.float64]:
        """Return quantiles over images and heads together: [layer, share]."""
        if self.raw_values is not None:
            nothing = np.full(len(shares), np.nan)
            return np.stack([np.quantile(values, shares) if len(values) else nothing for values in self.raw_values])
        binned = np.stack([histogram_quantiles(layer.sum(axis=0), self.edges, shares) for layer in self.counts])
        # Where all values lie within one bin, its edges would say more than they do.
        return np.clip(binned, self.extremes[:, :1], self.extremes[:, 1:])


def histogram_quantiles(
    counts: NDArray[np.float64], edges: NDArray[np.float64], shares: tuple[float, ...]
) -> NDArray[np.float64]:
    """Return quantiles of a histogram, linear within a bin: counts [bin], edges [bin + 1] -> [share]; NaN if empty."""
    if not counts.any():
        return np.full(len(shares), np.nan)
    cumulative = np.concatenate([[0.0], np.cumsum(counts)])
    targets = np.asarray(shares) * cumulative[-1]
    bins = np.clip(np.searchsorted(cumulative, targets, side="left") - 1, np.flatnonzero(counts)[0], len(counts) - 1)
    # A target at a run of empty bins' edge belongs to the next bin that holds something.
    inside = (targets - cumulative[bins]) / np.maximum(counts[bins], 1e-300)
    return edges[bins] + np.clip(inside, 0.0, 1.0) * (edges[bins + 1] - edges[bins])


@dataclass(frozen=True)
class Measure:
    """A number for each image and head."""

    name: str
    label: str
    unit: str
    function: Callable[[Tensor, Geometry], Tensor]  # of weights [batch, head, query, key] -> [batch, head]
    upper_bound: Callable[[Geometry], float]  # it lies between 0 and this
    applies: Callable[[Tensor, Geometry], bool] = lambda weights, geometry: True  # whether a layer has it
    of_all_queries: bool = False  # whether it is a mean over all (patch) queries, read or not


def _max_distance(geometry: Geometry) -> float:
    centers = geometry.patch_centers()
    return max(float(torch.linalg.vector_norm(centers[-1] - centers[0])), 1.0)


LOGGED_MEASURES = (
    Measure(
        "entropy",
        "attention entropy",
        "nats",
        map_measures.readout_entropy,
        lambda geometry: max(map_measures.uniform_entropy(geometry.num_tokens), 1e-6),
    ),
    Measure("maximum", "maximum attention to a patch", "share", map_measures.maximum_attention, lambda _: 1.0),
    Measure(
        "mean",
        "mean attention to a patch",
        "share",
        map_measures.mean_attention,
        lambda geometry: 1.0 / geometry.num_patches,
    ),
    Measure(
        "distance",
        "mean attention distance",
        "pixels",
        map_measures.mean_attention_distance,
        _max_distance,
        map_measures.is_self_attention,
        of_all_queries=True,
    ),
)
# Together with those that cost more, for what is measured once.
REPORTED_MEASURES = (
    *LOGGED_MEASURES,
    Measure(
        "effective_tokens",
        "effective tokens",
        "keys",
        map_measures.readout_effective_tokens,
        lambda geometry: float(geometry.num_tokens),
    ),
    Measure("confidence", "head confidence", "share", map_measures.head_confidence, lambda _: 1.0, of_all_queries=True),
    Measure(
        "class_token",
        "class token's attention to itself",
        "share",
        map_measures.class_token_self_attention,
        lambda _: 1.0,
        map_measures.reads_class_token,
    ),
    Measure("sink", "attention sink strength", "share", map_measures.sink_strength, lambda _: 1.0, of_all_queries=True),
    Measure(
        "divergence",
        "divergence from other heads",
        "nats",
        map_measures.head_divergence,
        lambda _: math.log(2),
        lambda weights, _: weights.shape[1] > 1,
    ),
)


class AttentionStatistics:
    """Measures over a stream of images: hand `update` to `capture(model, consume=...)`.

    Layers whose place on the image is not known, or that come again with images of another size, are left out;
    `left_out` has their names. Windows of one image count as one value, their mean. `also`, if given, is called with
    each measure's name, each layer's position and their values [image, head].
    """

    def __init__(
        self, chosen: Sequence[Measure] = LOGGED_MEASURES, also: Callable[[str, int, Tensor], None] | None = None
    ) -> None:
        self.measures = tuple(chosen)
        self.also = also
        self.layer_names: list[str] = []
        self.geometries: list[Geometry] = []
        self.distributions: dict[str, list[Distribution]] = {measure.name: [] for measure in self.measures}
        self.left_out: dict[str, None] = {}

    def update(self, layer: AttentionLayer) -> None:
        if layer.geometry is None:
            self.left_out[layer.name] = None
            return
        layer = layer.in_usual_order()
        assert layer.geometry is not None
        if layer.name not in self.layer_names:
            self._add_layer(layer, layer.geometry)
        position = self.layer_names.index(layer.name)
        if layer.geometry != self.geometries[position]:
            self.left_out[layer.name] = None
            return
        for measure in self.measures:
            if measure.applies(layer.weights, layer.geometry):
                values = layer.geometry.per_image(measure.function(layer.weights, layer.geometry))
                self.distributions[measure.name][position].update(values)
                if self.also is not None:
                    self.also(measure.name, position, values)

    def _add_layer(self, layer: AttentionLayer, geometry: Geometry) -> None:
        self.layer_names.append(layer.name)
        self.geometries.append(geometry)
        for measure in self.measures:
            self.distributions[measure.name].append(
                Distribution(layer.weights.shape[1], 0.0, measure.upper_bound(geometry), layer.weights.device)
            )

    def reduce(self, over_processes: Reduce) -> None:
        """Make these the statistics of all processes, each of which calls this after its share of the images."""
        for distributions in self.distributions.values():
            for distribution in distributions:
                distribution.reduce(over_processes)

    def compute(self) -> dict[str, MeasureSummary]:
        """Return measure name -> MeasureSummary. Raise UserError if no layer's place on the image was known."""
        if not self.layer_names:
            raise UserError(NO_GEOMETRY)
        return {name: _summary(distributions) for name, distributions in self.distributions.items()}


class MeanWeights:
    """The mean of all weights over a stream of images, tokens in the model's own order: hand `update` to
    `capture(model, consume=...)`.

    Layers for which `max_bytes` do not suffice are left out.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        self.max_bytes = max_bytes
        self.sums: dict[str, Tensor] = {}  # layer name -> [head, query, key], float64
        self.counts: dict[str, int] = {}

    def update(self, layer: AttentionLayer) -> None:
        weights = layer.weights
        if self.max_bytes is not None and layer.name not in self.sums:
            needed = 8 * weights[0].numel() + sum(total.nbytes for total in self.sums.values())
            if needed > self.max_bytes:
                return
        total = in_float64(weights.sum(dim=0, dtype=torch.float64 if has_float64(weights.device) else None))
        self.sums[layer.name] = self.sums[layer.name] + total if layer.name in self.sums else total
        self.counts[layer.name] = self.counts.get(layer.name, 0) + len(layer.weights)

    def compute(self) -> dict[str, Tensor]:
        """Return layer name -> [head, query, key], float32."""
        return {name: (total / self.counts[name]).float() for name, total in self.sums.items()}


def _summary(distributions: list[Distribution]) -> MeasureSummary:
    """Summarise a measure's distributions, one a layer; layers of fewer heads are filled up with NaN and no counts."""
    num_heads = max(len(distribution.counts) for distribution in distributions)
    edges = np.linspace(0.0, max(distribution.high for distribution in distributions), NUM_BINS + 1)
    n = distributions[0].counts[0].sum().item()
    mean = np.full((len(distributions), num_heads), np.nan)
    deviation, counts = mean.copy(), np.zeros((*mean.shape, NUM_BINS))
    extremes = []
    for layer, distribution in enumerate(distributions):
        heads = slice(0, len(distribution.counts))
        valid = distribution.counts.sum(dim=1).cpu().numpy()
        sums, squares = distribution.sums.cpu().numpy(), distribution.sums_of_squares.cpu().numpy()
        with np.errstate(invalid="ignore"):  # 0 / 0 where there is no value, such as the distance of a pooling query
            mean[layer, heads] = sums / valid
            deviation[layer, heads] = np.sqrt(np.maximum(squares / valid - mean[layer, heads] ** 2, 0.0))
        counts[layer, heads] = _on_edges(distribution.counts.cpu().numpy(), distribution.high, edges)
        extremes.append([float(distribution.smallest.min()), float(distribution.largest.max())])
    raw_values = [distribution.raw_values for distribution in distributions]
    joined = None
    if all(values is not None for values in raw_values):
        joined = tuple(
            torch.cat(values).flatten().double().cpu().numpy() if values else np.empty(0)
            for values in raw_values
            if values is not None
        )
    return MeasureSummary(mean, deviation, counts, edges, np.array(extremes), int(n), joined)


def _on_edges(counts: NDArray[np.float64], high: float, edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bring counts [head, bin] from 0 to `high` into the bins that all layers share, each to where its middle lies."""
    if high == edges[-1]:
        return counts
    middles = (np.arange(NUM_BINS) + 0.5) * high / NUM_BINS
    bins = np.searchsorted(edges, middles, side="right") - 1
    return np.stack([np.bincount(bins, weights=head, minlength=NUM_BINS) for head in counts])
