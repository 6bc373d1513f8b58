"""What a model predicts and attends to on a few images, as arrays: figures while training and afterwards start here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attention_visualizer.attention.capture import AttentionLayer, capture
from attention_visualizer.attention.classifiers import watched_head
from attention_visualizer.attention.geometry import NO_GEOMETRY, Geometry, Size
from attention_visualizer.attention.gradients import gradients_only
from attention_visualizer.attention.outputs import predict
from attention_visualizer.measures import map_measures
from attention_visualizer.measures.attention_rows import LayerRows, RowCollector, RowLayout, of_all_images
from attention_visualizer.measures.map_measures import Query
from attention_visualizer.support.errors import UserError, ran_out_of_memory


@dataclass(frozen=True)
class RolloutOptions:
    """The settings of attention rollout."""

    fusion: map_measures.Fusion = "mean"  # how it joins the heads of a layer
    discard: float = 0.0  # the share of each row's keys, those of least weight, that it drops


@dataclass(frozen=True)
class RowOptions:
    """Which rows of the attention to keep."""

    max_bytes: int  # of all images together; none are kept of more
    stride: int = 1  # as in RowLayout
    whole: str | None = None  # the name of a layer that every row is kept of


@dataclass(frozen=True)
class Observation:
    """Arrays over images; maps are shares of the query's attention by patch, not renormalised.

    Only layers whose place on the image is known; where layers have different grids, maps are repeated to the finest
    one, and where they have different numbers of heads, the missing ones are NaN.
    """

    query: Query
    geometries: tuple[Geometry, ...]  # of each layer
    layer_names: tuple[str, ...]
    #: Names of the layers whose place on the image is not known, and then of those that are not seen.
    left_out: tuple[str, ...]
    head_maps: NDArray[Any]  # [image, layer, head, grid height, grid width]
    #: Up to and including each layer, [image, layer, grid height, grid width]; None where layers do not hand on the
    #: same tokens.
    rollouts: NDArray[Any] | None
    entropy: NDArray[Any]  # of the query's row (the mean of the rows for "patches"), nats, [image, layer, head]
    self_attention: NDArray[Any] | None  # of the class token, [image, layer, head]; None for other queries
    distance: NDArray[Any]  # mean attention distance of the patch queries, pixels, [image, layer, head]
    predicted: NDArray[Any]  # [image], -1 where the model classifies nothing
    probability: NDArray[Any]  # of the predicted class, [image], NaN where it is not known
    reconstruction_error: float  # the largest of all layers
    num_classes: int = 0  # that the model gives scores of
    #: All attention, also of layers without a place; None where it was not asked for or would take too much.
    rows: tuple[LayerRows, ...] | None = None
    #: Of all layers, where rows were asked for: name, layout, number of heads.
    row_layouts: tuple[tuple[str, RowLayout, int], ...] = ()

    @property
    def num_keys(self) -> tuple[int, ...]:
        """The number of keys in each layer: uniform attention gives each key one in so many."""
        return tuple(geometry.num_tokens for geometry in self.geometries)


OF_IMAGES = ("head_maps", "rollouts", "entropy", "self_attention", "distance", "predicted", "probability")
MAX_WEIGHTS = 2**22  # attention weights of a layer, of the images that are observed together


class ObservationCollector:
    """Collect an Observation layer by layer, keeping nothing else of a layer: for `capture(model, consume=...)`."""

    def __init__(
        self,
        image_size: Size | None = None,
        query: Query | None = None,
        rollout: RolloutOptions | None = None,
        rows: RowOptions | None = None,
        num_images: int = 1,
    ) -> None:
        self.image_size = image_size  # pixels, for maps that are drawn over images; None: maps are of patches
        self.query = query
        self.options = rollout or RolloutOptions()
        self.layers: list[tuple[str, Geometry]] = []
        self.left_out: list[str] = []
        self.reasons: list[str] = []  # why
        self.queries: list[Query] = []
        self.is_sequence = True  # whether each layer so far depends on what the one before gave
        self.rollout: Tensor | None = None
        self.rows = None if rows is None else RowCollector(rows.max_bytes, rows.stride, rows.whole)
        self.num_images = num_images
        self.most_weights = 0  # of one layer
        self.columns: dict[str, list[Tensor]] = {
            name: [] for name in ("maps", "rollouts", "entropy", "self", "distance")
        }

    def __call__(self, layer: AttentionLayer) -> None:
        self.most_weights = max(self.most_weights, layer.weights.numel())
        layer = layer.in_usual_order()
        if self.rows is not None:
            self.rows.add(layer, self.num_images)
        geometry, weights = layer.geometry, layer.weights
        if geometry is None:
            self.left_out.append(layer.name)
            self.reasons.append(layer.unplaced or "")
            return
        query = map_measures.readout_query(geometry) if self.query is None else self.query
        if query == "cls" and (not geometry.num_prefix_tokens or geometry.class_token == "absent"):
            query = "patches"  # in the layers before the class token joins
        self.layers.append((layer.name, geometry))
        self.queries.append(query)
        row = query_maps(weights, geometry, query)
        self.columns["maps"].append(row)
        self.columns["entropy"].append(geometry.per_image(map_measures.query_entropy(weights, geometry, query)))
        self.columns["self"].append(map_measures.query_attention(weights, geometry, query)[..., 0])
        self.columns["distance"].append(geometry.per_image(map_measures.mean_attention_distance(weights, geometry)))
        self.is_sequence = self.is_sequence and layer.in_sequence
        if self.is_sequence and self.is_single_token_stream(weights):
            self.rollout = map_measures.rollout_step(self.rollout, weights, self.options.fusion, self.options.discard)
            self.columns["rollouts"].append(query_maps(self.rollout[:, None], geometry, query)[:, 0])

    def is_single_token_stream(self, weights: Tensor) -> bool:
        """Return whether all layers so far attend over the same tokens, unwindowed, as rollout requires."""
        first, last = self.layers[0][1], self.layers[-1][1]
        return first == last and last.window is None and weights.shape[-2] == weights.shape[-1]

    def grid_of(self, geometry: Geometry) -> Size:
        return geometry.grid if self.image_size is None else geometry.drawn_grid(self.image_size)

    def drawn(self, maps: Tensor, geometry: Geometry) -> Tensor:
        return maps if self.image_size is None else geometry.drawn(maps, self.image_size)

    def observation(
        self, predicted: NDArray[Any], probability: NDArray[Any], reconstruction_error: float
    ) -> Observation:
        """Return the observation of all layers. Raise UserError where the query or every layer's place is not known."""
        if not self.layers:
            reason = f" (of {self.left_out[0]}: {self.reasons[0]})" if self.left_out else ""
            raise UserError(f"{NO_GEOMETRY}{reason}")
        names, geometries = zip(*self.layers, strict=True)
        if self.query == "cls" and "cls" not in self.queries:
            raise UserError("query=cls: this model has no class token: use query=patches")
        columns, left_out = self.columns, tuple(self.left_out)
        grid = max((self.grid_of(each) for each in geometries), key=lambda grid: grid[0] * grid[1])
        if isinstance(self.query, tuple) and grid != geometries[-1].grid:
            row, column = self.query
            raise UserError(f"query=[{row},{column}]: layers have other grids than the last: use query=patches")
        return Observation(
            self.queries[-1],
            geometries,
            names,
            left_out,
            head_maps=stack_layers(
                [
                    repeat_to_grid(self.drawn(maps, each), grid)
                    for maps, each in zip(columns["maps"], geometries, strict=True)
                ]
            ),
            rollouts=stack_layers([self.drawn(maps, geometries[0]) for maps in columns["rollouts"]])
            if len(columns["rollouts"]) == len(names) + len(left_out)
            else None,
            entropy=stack_layers(columns["entropy"]),
            self_attention=stack_layers(columns["self"]) if set(self.queries) == {"cls"} else None,
            distance=stack_layers(columns["distance"]),
            predicted=predicted,
            probability=probability,
            reconstruction_error=reconstruction_error,
            rows=tuple(self.rows.layers) if self.rows is not None and self.rows.layers is not None else None,
            row_layouts=tuple(self.rows.layouts) if self.rows is not None else (),
        )


def query_maps(weights: Tensor, geometry: Geometry, query: Query) -> Tensor:
    """Reshape the query's attention to maps: [batch, head, query, key] -> [image, head, grid height, grid width]."""
    row = map_measures.query_attention(weights, geometry, query)
    return geometry.to_map(map_measures.patch_attention(row, geometry))


def observe(
    model: nn.Module,
    images: Tensor,
    query: Query | None = None,
    geometry: Geometry | None = None,
    rollout: RolloutOptions | None = None,
    gradients: bool = False,
    rows: RowOptions | None = None,
) -> Observation:
    """Run `model` on images [image, channel, height, width]; `query` None is the one that the model reads out.

    The model should be in eval mode; `geometry` is for models that do not declare theirs; `gradients` for those whose
    forward asks for them; `rows` for `Observation.rows`. Large images go one by one and small ones together, so that
    memory is about one's; where even that ends, fewer go together. Raise CaptureError when
    attention cannot be captured, and UserError when no layer's place on the image is known.
    """
    size = (images.shape[-2], images.shape[-1])
    parts: list[Observation] = []
    start, number = 0, 1
    while start < len(images):
        part = images[start : start + number]
        collector = ObservationCollector(size, query, rollout, rows, len(part))
        try:
            parts.append(_observe_part(model, part, collector, geometry, gradients))
        except Exception as error:
            if len(part) > 1 and ran_out_of_memory(error):
                number = len(part) // 2
                continue
            if start or len(images) == 1 or ran_out_of_memory(error):
                raise
            collector = ObservationCollector(size, query, rollout, rows, len(images))
            parts.append(_observe_part(model, images, collector, geometry, gradients))
            break  # with one image alone, some models drop the batch axis
        start += len(part)
        number = min(number, len(part)) if start > 1 else max(1, MAX_WEIGHTS // max(collector.most_weights, 1))
    return joined(parts, rows.max_bytes if rows else 0)


def _observe_part(
    model: nn.Module, images: Tensor, collector: ObservationCollector, geometry: Geometry | None, gradients: bool
) -> Observation:
    with gradients_only(gradients):
        with capture(model, consume=collector, geometry=geometry) as attention, watched_head(model) as head:
            output = model(images)
        collector.left_out += attention.unseen
        if isinstance(output, Tensor) and len(images) == 1 and output.ndim == 1 and len(output) > 1:
            output = output[None]  # its axis of images was dropped
        scores = head.class_scores(images, output)
    observation = collector.observation(*predict(scores, len(images)), attention.reconstruction_error)
    return observation if scores is None else replace(observation, num_classes=scores.logits.shape[1])


def joined(parts: list[Observation], max_bytes: int) -> Observation:
    """Return the observation of all images from those of some each."""
    first = parts[0]
    if len(parts) == 1:
        return first
    arrays = {name: [getattr(part, name) for part in parts] for name in OF_IMAGES if getattr(first, name) is not None}
    whole: dict[str, Any] = {name: np.concatenate(each) for name, each in arrays.items()}
    rows = [part.rows for part in parts if part.rows is not None]
    is_small = len(rows) == len(parts) and sum(each.rows.nbytes for layers in rows for each in layers) <= max_bytes
    return replace(
        first,
        **whole,
        rows=of_all_images(rows) if is_small else None,
        reconstruction_error=max(part.reconstruction_error for part in parts),
    )


def stack_layers(layers: list[Tensor]) -> NDArray[Any]:
    """Stack each layer's [image, head, ...] to [image, layer, head, ...], NaN for heads that a layer does not have."""
    arrays = [layer.float().cpu().numpy() for layer in layers]
    most = max(array.shape[1] for array in arrays)
    filled = np.full((len(arrays[0]), len(arrays), most, *arrays[0].shape[2:]), np.nan, np.float32)
    for layer, array in enumerate(arrays):
        filled[:, layer, : array.shape[1]] = array
    return filled


def repeat_to_grid(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Repeat each patch of maps [..., height, width] over its part of a finer grid."""
    height, width = maps.shape[-2:]
    if (height, width) == grid:
        return maps
    rows = (torch.arange(grid[0]) + 0.5) * height / grid[0]
    columns = (torch.arange(grid[1]) + 0.5) * width / grid[1]
    return maps[..., rows.long()[:, None], columns.long()]
