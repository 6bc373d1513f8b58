"""Maps of what a prediction rests on by several methods: attention, rollout, values, gradients, relevance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attention_visualizer.attention.capture import AttentionLayer, capture
from attention_visualizer.attention.classifiers import watched_head
from attention_visualizer.attention.geometry import NO_GEOMETRY, Geometry
from attention_visualizer.attention.layers import joined
from attention_visualizer.measures import map_measures
from attention_visualizer.measures.map_measures import Query
from attention_visualizer.measures.observation import RolloutOptions
from attention_visualizer.support.errors import UserError

VALUE_WEIGHTED, GRADIENT, RELEVANCE = METHODS = "value-weighted", "gradient x attention", "relevance"
MAX_BYTES = 16 * 2**20  # of weights and values at once; their gradients and the graph take some times that


@dataclass(frozen=True)
class Explanations:
    """The maps of a few images by several methods."""

    maps: dict[str, NDArray[Any]]  # method -> [image, grid height, grid width], at least 0, each on a scale of its own
    target: NDArray[np.int64]  # the class that gradients are of, [image]; -1 where the model classifies nothing


def explain(
    model: nn.Module,
    images: Tensor,
    target: Tensor | None = None,
    query: Query | None = None,
    geometry: Geometry | None = None,
    rollout: RolloutOptions | None = None,
) -> Explanations:
    """Explain by every method that applies to `model`, for the query (None: the one that it reads out) and the class
    `target` [image] (None: the predicted one).

    images: [image, channel, height, width], as the model expects them; as many at a time as MAX_BYTES allows, because
    gradients need all layers at once. The model should be in eval mode; no gradient is left in its parameters. Raise
    UserError when no layer's place on the image is known.
    """
    options = rollout or RolloutOptions()
    maps: list[dict[str, Tensor]] = []
    targets: list[Tensor] = []
    start, size = 0, 1  # the first image alone tells how many bytes one takes
    while start < len(images):
        batch = slice(start, start + size)
        batch_target = None if target is None else target[batch]
        batch_maps, batch_target, num_bytes = _explain_batch(
            model, images[batch], batch_target, query, geometry, options
        )
        maps.append(batch_maps)
        targets.append(batch_target)
        start += size
        size = max(1, MAX_BYTES * size // num_bytes) if size == 1 else size
    return Explanations(
        {method: torch.cat([each[method] for each in maps]).cpu().numpy() for method in maps[0]},
        torch.cat(targets).cpu().numpy(),
    )


@dataclass(frozen=True)
class Differentiated:
    """A pass whose attention was captured with the gradients of a class's score."""

    layers: list[AttentionLayer]  # those with a place, in the usual order of tokens
    gradients: list[Tensor] | None  # of their weights; None where the model classifies nothing
    classes: Tensor  # that the gradients are of, [image]; -1 where there are none
    is_single_stream: bool  # whether they are the whole model, each on the same tokens as the one before
    num_bytes: int  # of weights and values


def differentiated(
    model: nn.Module, images: Tensor, target: Tensor | None, geometry: Geometry | None
) -> Differentiated:
    with torch.enable_grad():
        with capture(model, geometry=geometry, gradients=True) as attention, watched_head(model) as head:
            output = model(images)
        scores = head.class_scores(images, output)
    layers = [layer for layer in attention if layer.geometry is not None]
    if not layers:
        raise UserError(NO_GEOMETRY)
    gradients: list[Tensor] | None = None
    classes = torch.full((len(images),), -1)
    if scores is not None:
        logits = scores.logits
        classes = logits.argmax(dim=1) if target is None else target.to(logits.device)
        outside = classes[(classes < 0) | (classes >= logits.shape[1])]
        if len(outside):
            raise UserError(f"target={int(outside[0])}: give a class from 0 to {logits.shape[1] - 1}")
        # Images do not meet inside the model, so the gradient of the sum is each image's own.
        score = logits.gather(1, classes[:, None]).sum()
        of_score = torch.autograd.grad(score, [layer.weights for layer in layers], allow_unused=True)
        gradients = [
            torch.zeros_like(layer.weights) if gradient is None else gradient
            for layer, gradient in zip(layers, of_score, strict=True)
        ]
        of_gradients = [replace(layer, weights=each) for layer, each in zip(layers, gradients, strict=True)]
        gradients = [layer.in_usual_order().weights for layer in whole_layers(of_gradients)]
    is_whole_model = len(layers) == len(attention) and not attention.unseen
    num_bytes = sum(layer.weights.nbytes + layer.values.nbytes for layer in attention)
    layers = [layer.in_usual_order() for layer in whole_layers(layers)]
    geometry = layers[-1].geometry
    assert geometry is not None
    is_single_stream = (
        is_whole_model
        and geometry.window is None
        and all(layer.in_sequence for layer in layers)
        and all(layer.geometry == geometry and layer.weights.shape[-2] == layer.weights.shape[-1] for layer in layers)
    )
    return Differentiated(layers, gradients, classes, is_single_stream, num_bytes)


def _explain_batch(
    model: nn.Module,
    images: Tensor,
    target: Tensor | None,
    query: Query | None,
    geometry: Geometry | None,
    options: RolloutOptions,
) -> tuple[dict[str, Tensor], Tensor, int]:
    """Return maps by method, the target classes [image], and the bytes that weights and values take."""
    seen = differentiated(model, images, target, geometry)
    with torch.no_grad():
        maps = _maps_by_method(seen, query, options)
        geometry, size = seen.layers[-1].geometry, (images.shape[-2], images.shape[-1])
        assert geometry is not None
        maps = {method: geometry.drawn(each, size) for method, each in maps.items()}
    return maps, seen.classes, seen.num_bytes


def rows_by_method(model: nn.Module, image: Tensor, geometry: Geometry | None = None) -> dict[str, Tensor]:
    """Return what each key contributes to each query in each layer, by method: [layer, query, key], as shares of the
    row, 0 where nothing does. Nothing for models whose layers do not hand on the same tokens.

    image: [1, channel, height, width]. Gradients are of the predicted class. Relevance is up to and including the
    layer, without what a query starts with of itself.
    """
    seen = differentiated(model, image, None, geometry)
    if not seen.is_single_stream:
        return {}
    with torch.no_grad():
        rows: dict[str, list[Tensor]] = {VALUE_WEIGHTED: [], GRADIENT: [], RELEVANCE: []}
        relevance: Tensor | None = None
        for number, layer in enumerate(seen.layers):
            weighted = map_measures.value_weighted_attention(layer.weights, layer.values, layer.projection)
            rows[VALUE_WEIGHTED].append(weighted.mean(dim=1)[0])
            if seen.gradients is not None:
                gradient = seen.gradients[number]
                relevance = map_measures.relevance_step(relevance, layer.weights, gradient)
                own = torch.eye(relevance.shape[-1], dtype=relevance.dtype, device=relevance.device)
                rows[GRADIENT].append(map_measures.positive_gradient_attention(layer.weights, gradient)[0])
                rows[RELEVANCE].append((relevance[0] - own).clamp_min(0.0))
        found = {method: torch.stack(each) for method, each in rows.items() if each}
        return {method: each / each.sum(dim=-1, keepdim=True).clamp_min(1e-30) for method, each in found.items()}


def whole_layers(layers: Sequence[AttentionLayer]) -> list[AttentionLayer]:
    """Join attention calls that are parts of one layer."""
    whole: list[AttentionLayer] = []
    parts: list[AttentionLayer] = []
    for layer in layers:
        if layer.part is None:
            whole.append(layer)
            continue
        parts.append(layer)
        if len(parts) == layer.part.num_parts:
            whole.append(joined(parts))
            parts = []
    return whole


def _maps_by_method(seen: Differentiated, query: Query | None, options: RolloutOptions) -> dict[str, Tensor]:
    """Map each method -> [image, grid height, grid width]. Rollout and relevance run through all layers: they need the
    whole model, on one stream of tokens."""
    layers, gradients, last = seen.layers, seen.gradients, seen.layers[-1]
    assert last.geometry is not None
    geometry = last.geometry
    has_query = query != "cls" or (geometry.num_prefix_tokens and geometry.class_token != "absent")
    map_query = query if query is not None and has_query else map_measures.readout_query(geometry)

    def to_map(rows: Tensor) -> Tensor:
        """[batch, head, query, key] -> [image, grid height, grid width]."""
        row = map_measures.query_attention(rows, geometry, map_query).mean(dim=1)
        return geometry.to_map(map_measures.patch_attention(row, geometry))

    weighted = map_measures.value_weighted_attention(last.weights, last.values, last.projection)
    # The lengths are averaged over heads, so this is one number for each pair of tokens.
    name = VALUE_WEIGHTED if last.projection is not None else f"{VALUE_WEIGHTED}, before projection"
    maps = {"attention, last layer": to_map(last.weights), name: to_map(weighted)}
    if seen.is_single_stream:
        rolled = map_measures.attention_rollout((layer.weights for layer in layers), options.fusion, options.discard)
        maps["rollout"] = to_map(rolled[:, None])
    if gradients is not None:
        maps[GRADIENT] = to_map(map_measures.positive_gradient_attention(last.weights, gradients[-1])[:, None])
        if seen.is_single_stream:
            relevance = None
            for layer, gradient in zip(layers, gradients, strict=True):
                relevance = map_measures.relevance_step(relevance, layer.weights, gradient)
            assert relevance is not None
            maps[RELEVANCE] = to_map(relevance[:, None])
    return maps
