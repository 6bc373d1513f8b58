"""One look at a few images: what a model predicts and attends to, as arrays. Live and offline figures start here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attention_visualizer import measures
from attention_visualizer.capture import AttentionLayer, capture
from attention_visualizer.geometry import Geometry
from attention_visualizer.measures import Query


@dataclass(frozen=True)
class Observation:
    """Arrays over images; maps are shares of the query's attention by patch, not renormalised.

    head_maps: [image, layer, head, grid height, grid width]
    rollouts: [image, layer, grid height, grid width], up to and including each layer
    entropy: [image, layer, head], of the query's row (the mean of the rows for "patches"), nats
    self_attention: [image, layer, head], what the class token gives to itself; None for other queries
    distance: [image, layer, head], mean attention distance of the patch queries in pixels
    predicted, probability: [image]; reconstruction_error: the largest over layers
    """

    query: Query
    geometry: Geometry
    head_maps: NDArray[Any]
    rollouts: NDArray[Any]
    entropy: NDArray[Any]
    self_attention: NDArray[Any] | None
    distance: NDArray[Any]
    predicted: NDArray[Any]
    probability: NDArray[Any]
    reconstruction_error: float


class _Collector:
    """Takes one layer at a time and keeps only what an Observation holds of it."""

    def __init__(self, query: Query | None) -> None:
        self.query = query
        self.geometry: Geometry | None = None
        self.rollout: Tensor | None = None
        self.columns: dict[str, list[Tensor]] = {
            name: [] for name in ("maps", "rollouts", "entropy", "self", "distance")
        }

    def __call__(self, layer: AttentionLayer) -> None:
        geometry = layer.geometry
        if geometry is None:
            raise ValueError(f"the patch grid of {layer.name} is not known")
        self.geometry = geometry
        self.query = measures.readout_query(geometry) if self.query is None else self.query
        self.rollout = measures.rollout_step(self.rollout, layer.weights)
        row = measures.query_attention(layer.weights, geometry, self.query)
        rollout_row = measures.query_attention(self.rollout[:, None], geometry, self.query)[:, 0]
        self.columns["maps"].append(geometry.to_map(measures.patch_attention(row, geometry)))
        self.columns["rollouts"].append(geometry.to_map(measures.patch_attention(rollout_row, geometry)))
        self.columns["entropy"].append(measures.query_entropy(layer.weights, geometry, self.query))
        self.columns["self"].append(row[..., 0])
        self.columns["distance"].append(measures.mean_attention_distance(layer.weights, geometry))


def observe(model: nn.Module, images: Tensor, query: Query | None = None) -> Observation:
    """Runs `model` on images [image, channel, height, width]; `query` None is the one that the model reads out.

    The model should be in eval mode. Raises CaptureError when its attention cannot be seen.
    """
    collector = _Collector(query)
    with torch.no_grad(), capture(model, consume=collector) as attention:
        logits = model(images)
    probability, predicted = logits.float().softmax(dim=-1).max(dim=-1)
    columns = {name: torch.stack(layers, dim=1).cpu().numpy() for name, layers in collector.columns.items()}
    assert collector.geometry is not None and collector.query is not None
    return Observation(
        collector.query,
        collector.geometry,
        head_maps=columns["maps"],
        rollouts=columns["rollouts"],
        entropy=columns["entropy"],
        self_attention=columns["self"] if collector.query == "cls" else None,
        distance=columns["distance"],
        predicted=predicted.cpu().numpy(),
        probability=probability.cpu().numpy(),
        reconstruction_error=attention.reconstruction_error,
    )
