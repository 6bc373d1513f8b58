"""One look at a few images: what a model predicts and attends to, as arrays. Live and offline figures start here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attention_visualizer.attention.capture import AttentionLayer, capture
from attention_visualizer.attention.geometry import NO_GEOMETRY, Geometry
from attention_visualizer.attention.outputs import has_head, predict
from attention_visualizer.measures import map_measures
from attention_visualizer.measures.map_measures import Query
from attention_visualizer.support.errors import UserError


@dataclass(frozen=True)
class RolloutOptions:
    """How rollout joins the heads of a layer, and the share of each row's keys, those of least weight, it drops."""

    fusion: map_measures.Fusion = "mean"
    discard: float = 0.0


@dataclass(frozen=True)
class Observation:
    """Arrays over images; maps are shares of the query's attention by patch, not renormalised.

    Only layers whose place on the image is known; where layers have different grids, maps are repeated to the finest
    one, and where they have different numbers of heads, the missing ones are NaN.

    geometries, layer_names: of each layer; left_out: names of the other layers
    head_maps: [image, layer, head, grid height, grid width]
    rollouts: [image, layer, grid height, grid width], up to and including each layer; None where layers do not hand on
    the same tokens
    entropy: [image, layer, head], of the query's row (the mean of the rows for "patches"), nats
    self_attention: [image, layer, head], what the class token gives to itself; None for other queries
    distance: [image, layer, head], mean attention distance of the patch queries in pixels
    predicted, probability: [image], -1 and NaN where the model classifies nothing; reconstruction_error: the largest
    """

    query: Query
    geometries: tuple[Geometry, ...]
    layer_names: tuple[str, ...]
    left_out: tuple[str, ...]
    head_maps: NDArray[Any]
    rollouts: NDArray[Any] | None
    entropy: NDArray[Any]
    self_attention: NDArray[Any] | None
    distance: NDArray[Any]
    predicted: NDArray[Any]
    probability: NDArray[Any]
    reconstruction_error: float

    @property
    def num_keys(self) -> tuple[int, ...]:
        """Of each layer: uniform attention gives a key one in so many."""
        return tuple(geometry.num_tokens for geometry in self.geometries)


class ObservationCollector:
    """Takes one layer at a time and keeps only what an Observation holds of it: for `capture(model, consume=...)`."""

    def __init__(self, query: Query | None = None, rollout: RolloutOptions | None = None) -> None:
        self.query = query
        self.options = rollout or RolloutOptions()
        self.layers: list[tuple[str, Geometry]] = []
        self.left_out: list[str] = []
        self.asked: list[Query] = []
        self.rollout: Tensor | None = None
        self.columns: dict[str, list[Tensor]] = {
            name: [] for name in ("maps", "rollouts", "entropy", "self", "distance")
        }

    def __call__(self, layer: AttentionLayer) -> None:
        geometry, weights = layer.geometry, layer.weights
        if geometry is None:
            self.left_out.append(layer.name)
            return
        query = map_measures.readout_query(geometry) if self.query is None else self.query
        if query == "cls" and (not geometry.num_prefix_tokens or geometry.class_token == "absent"):
            query = "patches"  # of the layers before the class token joins
        self.layers.append((layer.name, geometry))
        self.asked.append(query)
        row = geometry_row(weights, geometry, query)
        self.columns["maps"].append(row)
        self.columns["entropy"].append(geometry.per_image(map_measures.query_entropy(weights, geometry, query)))
        self.columns["self"].append(map_measures.query_attention(weights, geometry, query)[..., 0])
        self.columns["distance"].append(geometry.per_image(map_measures.mean_attention_distance(weights, geometry)))
        if self.is_single_token_stream(weights):
            self.rollout = map_measures.rollout_step(self.rollout, weights, self.options.fusion, self.options.discard)
            self.columns["rollouts"].append(geometry_row(self.rollout[:, None], geometry, query)[:, 0])

    def is_single_token_stream(self, weights: Tensor) -> bool:
        """Whether all layers so far work on the same tokens, from image to image without windows."""
        first, last = self.layers[0][1], self.layers[-1][1]
        return first == last and last.window is None and weights.shape[-2] == weights.shape[-1]

    def observation(
        self, predicted: NDArray[Any], probability: NDArray[Any], reconstruction_error: float
    ) -> Observation:
        """Of all layers handed over. Raises UserError where the query or every layer's place is not known."""
        if not self.layers:
            raise UserError(NO_GEOMETRY)
        names, geometries = zip(*self.layers, strict=True)
        if self.query == "cls" and "cls" not in self.asked:
            raise UserError("query=cls: this model has no class token: use query=patches")
        columns, left_out = self.columns, tuple(self.left_out)
        grid = max((each.grid for each in geometries), key=lambda grid: grid[0] * grid[1])
        return Observation(
            self.asked[-1],
            geometries,
            names,
            left_out,
            head_maps=stacked([on_grid(maps, grid) for maps in columns["maps"]]),
            rollouts=stacked(columns["rollouts"]) if len(columns["rollouts"]) == len(names) + len(left_out) else None,
            entropy=stacked(columns["entropy"]),
            self_attention=stacked(columns["self"]) if set(self.asked) == {"cls"} else None,
            distance=stacked(columns["distance"]),
            predicted=predicted,
            probability=probability,
            reconstruction_error=reconstruction_error,
        )


def geometry_row(weights: Tensor, geometry: Geometry, query: Query) -> Tensor:
    """The query's attention as maps: [batch, head, query, key] -> [image, head, grid height, grid width]."""
    row = map_measures.query_attention(weights, geometry, query)
    return geometry.to_map(map_measures.patch_attention(row, geometry))


def observe(
    model: nn.Module,
    images: Tensor,
    query: Query | None = None,
    geometry: Geometry | None = None,
    rollout: RolloutOptions | None = None,
) -> Observation:
    """Runs `model` on images [image, channel, height, width]; `query` None is the one that the model reads out.

    The model should be in eval mode; `geometry` is for models that do not state theirs. Raises CaptureError when its
    attention cannot be seen, and UserError when no layer's place on the image is known.
    """
    collector = ObservationCollector(query, rollout)
    with torch.no_grad(), capture(model, consume=collector, geometry=geometry) as attention:
        output = model(images)
    answers = predict(output if has_head(model) else None, len(images))
    return collector.observation(*answers, attention.reconstruction_error)


def stacked(layers: list[Tensor]) -> NDArray[Any]:
    """[image, head, ...] of each layer -> [image, layer, head, ...], NaN for the heads that a layer does not have."""
    arrays = [layer.float().cpu().numpy() for layer in layers]
    most = max(array.shape[1] for array in arrays)
    filled = np.full((len(arrays[0]), len(arrays), most, *arrays[0].shape[2:]), np.nan, np.float32)
    for number, array in enumerate(arrays):
        filled[:, number, : array.shape[1]] = array
    return filled


def on_grid(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps [..., height, width] with each patch repeated over its part of a finer grid."""
    height, width = maps.shape[-2:]
    if (height, width) == grid:
        return maps
    rows = (torch.arange(grid[0]) + 0.5) * height / grid[0]
    columns = (torch.arange(grid[1]) + 0.5) * width / grid[1]
    return maps[..., rows.long()[:, None], columns.long()]
