"""What several methods say a model's answer rests on: attention, rollout, values, gradients, relevance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attention_visualizer import measures
from attention_visualizer.capture import AttentionLayer, capture
from attention_visualizer.errors import UserError
from attention_visualizer.geometry import Geometry
from attention_visualizer.measures import Query
from attention_visualizer.observation import RolloutOptions
from attention_visualizer.prediction import has_head, logits_of
from attention_visualizer.statistics import NO_GEOMETRY


@dataclass(frozen=True)
class Explanations:
    """maps: method -> [image, grid height, grid width], each at least 0 and on a scale of its own.

    target: [image], the class that gradients are of; -1 where the model classifies nothing.
    """

    maps: dict[str, NDArray[Any]]
    target: NDArray[np.int64]


def explain(
    model: nn.Module,
    images: Tensor,
    target: Tensor | None = None,
    query: Query | None = None,
    geometry: Geometry | None = None,
    rollout: RolloutOptions | None = None,
) -> Explanations:
    """Every method that applies to `model`, for the query (None: the one that it reads out) and the class `target`
    [image] (None: the predicted one).

    images: [image, channel, height, width], as the model takes them; one at a time, because gradients need all layers
    at once. The model should be in eval mode; nothing is left in its parameters. Raises UserError when no layer's place
    on the image is known.
    """
    options = rollout or RolloutOptions()
    answers = [
        _explain_one(model, image[None], None if target is None else int(target[number]), query, geometry, options)
        for number, image in enumerate(images)
    ]
    methods = answers[0][0]
    maps = {method: torch.cat([found[method] for found, _ in answers]).cpu().numpy() for method in methods}
    return Explanations(maps, np.array([chosen for _, chosen in answers]))


def _explain_one(
    model: nn.Module,
    image: Tensor,
    target: int | None,
    query: Query | None,
    geometry: Geometry | None,
    options: RolloutOptions,
) -> tuple[dict[str, Tensor], int]:
    with torch.enable_grad(), capture(model, geometry=geometry, gradients=True) as attention:
        output = model(image)
    logits = logits_of(output) if has_head(model) else None
    layers = [layer for layer in attention if layer.geometry is not None]
    if not layers:
        raise UserError(NO_GEOMETRY)
    gradients: list[Tensor] | None = None
    chosen = -1
    if logits is not None:
        chosen = int(logits.argmax(dim=1)) if target is None else target
        if not 0 <= chosen < logits.shape[1]:
            raise UserError(f"target={chosen}: give a class from 0 to {logits.shape[1] - 1}")
        found = torch.autograd.grad(logits[0, chosen], [layer.weights for layer in layers], allow_unused=True)
        gradients = [
            torch.zeros_like(layer.weights) if gradient is None else gradient
            for layer, gradient in zip(layers, found, strict=True)
        ]
    with torch.no_grad():
        return _methods(layers, gradients, query, options, whole=len(layers) == len(attention)), chosen


def _methods(
    layers: list[AttentionLayer],
    gradients: list[Tensor] | None,
    query: Query | None,
    options: RolloutOptions,
    whole: bool,
) -> dict[str, Tensor]:
    """whole: these are all layers of the model, so that what runs through all of them can be followed."""
    last = layers[-1]
    assert last.geometry is not None
    geometry = last.geometry
    asked = query
    if asked is None or (asked == "cls" and (not geometry.num_prefix_tokens or geometry.class_token == "absent")):
        asked = measures.readout_query(geometry)

    def on_image(rows: Tensor) -> Tensor:
        """[batch, head, query, key] -> [image, grid height, grid width]."""
        row = measures.query_attention(rows, geometry, asked).mean(dim=1)
        return geometry.to_map(measures.patch_attention(row, geometry))

    weighted = measures.value_weighted_attention(last.weights, last.values, last.projection)
    # The lengths are averaged over heads, so this is one number for each pair of tokens.
    name = "value-weighted" if last.projection is not None else "value-weighted, before projection"
    maps = {"attention, last layer": on_image(last.weights), name: on_image(weighted)}
    one_stream = (
        whole
        and geometry.window is None
        and all(layer.geometry == geometry and layer.weights.shape[-2] == layer.weights.shape[-1] for layer in layers)
    )
    if one_stream:
        rolled = measures.attention_rollout((layer.weights for layer in layers), options.fusion, options.discard)
        maps["rollout"] = on_image(rolled[:, None])
    if gradients is not None:
        maps["gradient x attention"] = on_image(
            measures.positive_gradient_attention(last.weights, gradients[-1])[:, None]
        )
        if one_stream:
            relevance = None
            for layer, gradient in zip(layers, gradients, strict=True):
                relevance = measures.relevance_step(relevance, layer.weights, gradient)
            assert relevance is not None
            maps["relevance"] = on_image(relevance[:, None])
    return maps
