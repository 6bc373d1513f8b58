"""Streaming accumulators: statistics of attention over any number of images in memory that does not grow.

Each is `update` / `merge` / `compute`; sums are kept in float64 and counts exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attention_visualizer import measures
from attention_visualizer.capture import AttentionLayer
from attention_visualizer.geometry import Geometry

NUM_BINS = 512


class Distribution:
    """Histogram, sum and sum of squares of values in a known range, for each head.

    Quantiles come from the histogram, so they are exact to one bin: (high - low) / NUM_BINS.
    """

    def __init__(self, num_heads: int, low: float, high: float, device: torch.device | str = "cpu") -> None:
        self.low, self.high = low, high
        self.counts = torch.zeros(num_heads, NUM_BINS, dtype=torch.float64, device=device)
        self.sums = torch.zeros(num_heads, dtype=torch.float64, device=device)
        self.sums_of_squares = torch.zeros(num_heads, dtype=torch.float64, device=device)
        self.smallest = torch.full((num_heads,), math.inf, dtype=torch.float64, device=device)
        self.largest = torch.full((num_heads,), -math.inf, dtype=torch.float64, device=device)

    def update(self, values: Tensor) -> None:
        """values: [batch, head]."""
        num_heads = len(self.counts)
        bins = ((values - self.low) * (NUM_BINS / (self.high - self.low))).long().clamp_(0, NUM_BINS - 1)
        bins = bins + torch.arange(num_heads, device=values.device) * NUM_BINS
        self.counts += torch.bincount(bins.flatten(), minlength=num_heads * NUM_BINS).view_as(self.counts)
        values = values.double()
        self.sums += values.sum(dim=0)
        self.sums_of_squares += values.square().sum(dim=0)
        if len(values):
            self.smallest = torch.minimum(self.smallest, values.amin(dim=0))
            self.largest = torch.maximum(self.largest, values.amax(dim=0))

    def state(self) -> list[Tensor]:
        """The sums that `merge` and a reduction over processes add up."""
        return [self.counts, self.sums, self.sums_of_squares]

    def merge(self, other: Distribution) -> None:
        for mine, theirs in zip(self.state(), other.state(), strict=True):
            mine += theirs
        self.smallest = torch.minimum(self.smallest, other.smallest)
        self.largest = torch.maximum(self.largest, other.largest)


@dataclass(frozen=True)
class Summary:
    """One measure over images, by layer and head.

    mean, deviation: [layer, head]; counts: [layer, head, bin] over edges: [bin + 1]; extremes: [layer, 2], the
    smallest and largest value; n: images.
    """

    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]
    counts: NDArray[np.float64]
    edges: NDArray[np.float64]
    extremes: NDArray[np.float64]
    n: int

    def quantiles(self, shares: tuple[float, ...]) -> NDArray[np.float64]:
        """Over images and heads together: [layer, share]."""
        binned = np.stack([histogram_quantiles(layer.sum(axis=0), self.edges, shares) for layer in self.counts])
        # Where all values lie within one bin, its edges would say more than they do.
        return np.clip(binned, self.extremes[:, :1], self.extremes[:, 1:])


def histogram_quantiles(
    counts: NDArray[np.float64], edges: NDArray[np.float64], shares: tuple[float, ...]
) -> NDArray[np.float64]:
    """Quantiles of a histogram, linear within a bin: counts [bin], edges [bin + 1] -> [share]."""
    cumulative = np.concatenate([[0.0], np.cumsum(counts)])
    targets = np.asarray(shares) * cumulative[-1]
    bins = np.clip(np.searchsorted(cumulative, targets, side="left") - 1, np.flatnonzero(counts)[0], len(counts) - 1)
    # A target at a run of empty bins' edge belongs to the next bin that holds something.
    inside = (targets - cumulative[bins]) / np.maximum(counts[bins], 1e-300)
    return edges[bins] + np.clip(inside, 0.0, 1.0) * (edges[bins + 1] - edges[bins])


@dataclass(frozen=True)
class Measure:
    """A number for each image and head: what it is called, its unit, how it is computed, where it can lie."""

    name: str
    label: str
    unit: str
    function: Callable[[Tensor, Geometry], Tensor]
    upper_bound: Callable[[Geometry], float]


def _longest_distance(geometry: Geometry) -> float:
    centers = geometry.patch_centers()
    return max(float(torch.linalg.vector_norm(centers[-1] - centers[0])), 1.0)


MEASURES = (
    Measure(
        "entropy",
        "attention entropy",
        "nats",
        measures.readout_entropy,
        lambda geometry: max(measures.uniform_entropy(geometry.num_tokens), 1e-6),
    ),
    Measure("maximum", "maximum attention to a patch", "share", measures.maximum_attention, lambda _: 1.0),
    Measure(
        "mean",
        "mean attention to a patch",
        "share",
        measures.mean_attention,
        lambda geometry: 1.0 / geometry.num_patches,
    ),
    Measure("distance", "mean attention distance", "pixels", measures.mean_attention_distance, _longest_distance),
)


class AttentionStatistics:
    """All measures over a stream of images: hand `update` to `capture(model, consume=...)`."""

    def __init__(self) -> None:
        self.layer_names: list[str] = []
        self.distributions: dict[str, list[Distribution]] = {measure.name: [] for measure in MEASURES}
        self.geometry: Geometry | None = None
        self.num_images = 0

    def update(self, layer: AttentionLayer) -> None:
        if layer.geometry is None:
            raise ValueError(f"the patch grid of {layer.name} is not known")
        if layer.index == len(self.layer_names):
            self._add_layer(layer)
        if layer.index == 0:
            self.num_images += len(layer.weights)
        for measure in MEASURES:
            self.distributions[measure.name][layer.index].update(measure.function(layer.weights, layer.geometry))

    def _add_layer(self, layer: AttentionLayer) -> None:
        assert layer.geometry is not None
        self.geometry = layer.geometry
        self.layer_names.append(layer.name)
        for measure in MEASURES:
            self.distributions[measure.name].append(
                Distribution(layer.weights.shape[1], 0.0, measure.upper_bound(layer.geometry), layer.weights.device)
            )

    def merge(self, other: AttentionStatistics) -> None:
        if other.layer_names != self.layer_names or other.geometry != self.geometry:
            raise ValueError("statistics of different layers cannot be merged")
        self.num_images += other.num_images
        for name, distributions in self.distributions.items():
            for mine, theirs in zip(distributions, other.distributions[name], strict=True):
                mine.merge(theirs)

    def compute(self) -> dict[str, Summary]:
        """measure name -> Summary."""
        return {name: _summary(distributions) for name, distributions in self.distributions.items()}


def _summary(distributions: list[Distribution]) -> Summary:
    counts = torch.stack([distribution.counts for distribution in distributions]).cpu().numpy()
    sums = torch.stack([distribution.sums for distribution in distributions]).cpu().numpy()
    squares = torch.stack([distribution.sums_of_squares for distribution in distributions]).cpu().numpy()
    n = counts[0, 0].sum()
    mean = sums / n
    deviation = np.sqrt(np.maximum(squares / n - mean**2, 0.0))
    edges = np.linspace(distributions[0].low, distributions[0].high, NUM_BINS + 1)
    extremes = [[float(each.smallest.min()), float(each.largest.max())] for each in distributions]
    return Summary(mean, deviation, counts, edges, np.array(extremes), int(n))
