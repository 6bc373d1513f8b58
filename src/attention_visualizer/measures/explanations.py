"""What several methods say a model's answer rests on: attention, rollout, values, gradients, relevance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attention_visualizer.attention.capture import AttentionLayer, capture
from attention_visualizer.attention.geometry import NO_GEOMETRY, Geometry
from attention_visualizer.attention.outputs import has_head, logits_of
from attention_visualizer.measures import map_measures
from attention_visualizer.measures.map_measures import Query
from attention_visualizer.measures.observation import RolloutOptions
from attention_visualizer.support.errors import UserError

MOST_BYTES = 16 * 2**20  # of weights and values at once; their gradients and the graph take some times that


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

    images: [image, channel, height, width], as the model takes them; so many at a time as MOST_BYTES allows, because
    gradients need all layers at once. The model should be in eval mode; nothing is left in its parameters. Raises
    UserError when no layer's place on the image is known.
    """
    options = rollout or RolloutOptions()
    answers: list[tuple[dict[str, Tensor], Tensor]] = []
    start, size = 0, 1  # the first image alone tells what one takes
    while start < len(images):
        asked = None if target is None else target[start : start + size]
        maps, chosen, taken = _explain(model, images[start : start + size], asked, query, geometry, options)
        answers.append((maps, chosen))
        start += size
        size = max(1, MOST_BYTES * size // taken) if size == 1 else size
    methods = answers[0][0]
    joined = {method: torch.cat([found[method] for found, _ in answers]).cpu().numpy() for method in methods}
    return Explanations(joined, torch.cat([chosen for _, chosen in answers]).cpu().numpy())


def _explain(
    model: nn.Module,
    images: Tensor,
    target: Tensor | None,
    query: Query | None,
    geometry: Geometry | None,
    options: RolloutOptions,
) -> tuple[dict[str, Tensor], Tensor, int]:
    """Maps by method, the classes [image], and the bytes that the weights took."""
    with torch.enable_grad(), capture(model, geometry=geometry, gradients=True) as attention:
        output = model(images)
    logits = logits_of(output) if has_head(model) else None
    layers = [layer for layer in attention if layer.geometry is not None]
    if not layers:
        raise UserError(NO_GEOMETRY)
    gradients: list[Tensor] | None = None
    chosen = torch.full((len(images),), -1)
    if logits is not None:
        chosen = logits.argmax(dim=1) if target is None else target.to(logits.device)
        outside = chosen[(chosen < 0) | (chosen >= logits.shape[1])]
        if len(outside):
            raise UserError(f"target={int(outside[0])}: give a class from 0 to {logits.shape[1] - 1}")
        # Images do not meet inside the model, so the gradient of the sum is each image's own.
        score = logits.gather(1, chosen[:, None]).sum()
        found = torch.autograd.grad(score, [layer.weights for layer in layers], allow_unused=True)
        gradients = [
            torch.zeros_like(layer.weights) if gradient is None else gradient
            for layer, gradient in zip(layers, found, strict=True)
        ]
    taken = sum(layer.weights.nbytes + layer.values.nbytes for layer in attention)
    with torch.no_grad():
        return _methods(layers, gradients, query, options, whole=len(layers) == len(attention)), chosen, taken


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
        asked = map_measures.readout_query(geometry)

    def on_image(rows: Tensor) -> Tensor:
        """[batch, head, query, key] -> [image, grid height, grid width]."""
        row = map_measures.query_attention(rows, geometry, asked).mean(dim=1)
        return geometry.to_map(map_measures.patch_attention(row, geometry))

    weighted = map_measures.value_weighted_attention(last.weights, last.values, last.projection)
    # The lengths are averaged over heads, so this is one number for each pair of tokens.
    name = "value-weighted" if last.projection is not None else "value-weighted, before projection"
    maps = {"attention, last layer": on_image(last.weights), name: on_image(weighted)}
    one_stream = (
        whole
        and geometry.window is None
        and all(layer.geometry == geometry and layer.weights.shape[-2] == layer.weights.shape[-1] for layer in layers)
    )
    if one_stream:
        rolled = map_measures.attention_rollout((layer.weights for layer in layers), options.fusion, options.discard)
        maps["rollout"] = on_image(rolled[:, None])
    if gradients is not None:
        maps["gradient x attention"] = on_image(
            map_measures.positive_gradient_attention(last.weights, gradients[-1])[:, None]
        )
        if one_stream:
            relevance = None
            for layer, gradient in zip(layers, gradients, strict=True):
                relevance = map_measures.relevance_step(relevance, layer.weights, gradient)
            assert relevance is not None
            maps["relevance"] = on_image(relevance[:, None])
    return maps
