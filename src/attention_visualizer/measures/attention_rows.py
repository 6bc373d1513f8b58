"""All rows of a layer's attention, as pages and files keep them: which tokens they are of, and their weights in 8 bits.

Of large models every row of every head is too much to keep. With a stride, patches are kept as cells of stride x stride
patches: as a query by its middle patch, as a key by the sum of its patches. Inside windows, and where queries are no
patches, fewer queries are kept, and all keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attention_visualizer.attention.capture import AttentionLayer
from attention_visualizer.attention.geometry import Geometry, Size
from attention_visualizer.measures.map_measures import attention_entropy
from attention_visualizer.measures.quantised_rows import QuantisedRows, concatenated, stacked

Array = NDArray[Any]


@dataclass(frozen=True)
class RowLayout:
    """Which tokens the rows of a layer's attention are of. Numbers are those of one window."""

    num_windows: int
    num_queries: int  # of the model
    num_keys: int
    geometry: Geometry | None  # of the keys, in the usual order
    unplaced: str | None  # why there is none
    stride: int = 1  # patches to a side of a cell

    @classmethod
    def of(cls, layer: AttentionLayer, num_images: int, stride: int) -> RowLayout:
        """The layer must be in the usual order."""
        batch, _, queries, keys = layer.weights.shape
        return cls(batch // num_images, queries, keys, layer.geometry, layer.unplaced, stride)

    @property
    def are_queries_patches(self) -> bool:
        """Whether queries are the tokens that the keys are, and these have their places."""
        return self.geometry is not None and self.num_queries == self.num_keys

    @property
    def has_cells(self) -> bool:
        """Whether keys are kept as cells of patches."""
        return self.stride > 1 and self.are_queries_patches and self.num_windows == 1

    @property
    def side(self) -> Size:
        """The rows and columns of patches that a query attends to."""
        assert self.geometry is not None
        return self.geometry.window or self.geometry.grid

    @property
    def cells(self) -> Size:
        """The rows and columns of cells in `side`."""
        return -(-self.side[0] // self.stride), -(-self.side[1] // self.stride)

    @property
    def kept_geometry(self) -> Geometry | None:
        """The geometry of the keys as they are kept: of cells instead of patches, the last ones beyond the edge."""
        if self.geometry is None or not self.has_cells:
            return self.geometry
        height, width = self.geometry.patch_size
        return replace(self.geometry, grid=self.cells, patch_size=(height * self.stride, width * self.stride))

    @property
    def kept_queries(self) -> Array:
        """The numbers of the queries that are kept: [row]."""
        if self.stride == 1:
            return np.arange(self.num_queries)
        if not self.are_queries_patches:
            return np.arange(0, self.num_queries, self.stride**2)
        assert self.geometry is not None
        middles = [
            np.minimum(np.arange(count) * self.stride + self.stride // 2, side - 1)
            for count, side in zip(self.cells, self.side, strict=True)
        ]
        patches = middles[0][:, None] * self.side[1] + middles[1]
        prefix = self.geometry.num_prefix_tokens
        return np.concatenate([np.arange(prefix), prefix + patches.ravel()])

    @property
    def num_kept_keys(self) -> int:
        if not self.has_cells:
            return self.num_keys
        assert self.geometry is not None
        return self.geometry.num_prefix_tokens + math.prod(self.cells)

    @property
    def keys_in_each(self) -> Array | None:
        """The number of the model's keys in each that is kept, [key]; None where that is one."""
        if not self.has_cells:
            return None
        assert self.geometry is not None
        counts = [
            np.minimum(self.stride, side - np.arange(count) * self.stride)
            for count, side in zip(self.cells, self.side, strict=True)
        ]
        return np.concatenate([np.ones(self.geometry.num_prefix_tokens, int), np.outer(*counts).ravel()])

    @property
    def row_of_key(self) -> Array | None:
        """The row that shows what a key attends to, [key]; None where rows are keys, one by one, or no keys at all."""
        if self.stride == 1 or self.has_cells or not self.are_queries_patches:
            return None
        row, column = np.divmod(np.arange(self.num_keys), self.side[1])  # windows have no tokens but patches
        return row // self.stride * self.cells[1] + column // self.stride

    @property
    def key_of_row(self) -> Array | None:
        """The key that a row is of, where `row_of_key` is told."""
        return None if self.row_of_key is None else self.kept_queries

    @property
    def key_of_patch(self) -> Array | None:
        """The key of each patch, row by row, the keys of all windows one after the other; None without windows."""
        if self.geometry is None or self.geometry.window is None:
            return None
        keys = torch.arange(self.num_windows * self.num_keys).view(self.num_windows, self.num_keys)
        return self.geometry.to_map(keys)[0].flatten().numpy()

    def nbytes(self, num_heads: int) -> int:
        """The bytes of one image's rows."""
        return num_heads * self.num_windows * len(self.kept_queries) * (self.num_kept_keys + 4)

    def kept(self, weights: Tensor) -> QuantisedRows:
        """weights: [window of an image, head, query, key]; returns [image, head, row, key], the rows of all windows one
        after the other. Entropies are those of the model's own rows."""
        rows = weights.unflatten(0, (-1, self.num_windows)).movedim(1, 2)  # image, head, window, query, key
        if self.stride > 1:
            rows = rows.index_select(-2, torch.from_numpy(self.kept_queries).to(weights.device))
        rows = rows.flatten(2, 3)
        return QuantisedRows.of(self._cells_of(rows) if self.has_cells else rows, attention_entropy(rows))

    def _cells_of(self, rows: Tensor) -> Tensor:
        assert self.geometry is not None
        prefix, (height, width) = self.geometry.num_prefix_tokens, self.geometry.grid
        (down, across), stride = self.cells, self.stride
        patches = rows[..., prefix:].unflatten(-1, (height, width))
        patches = torch.nn.functional.pad(patches, (0, across * stride - width, 0, down * stride - height))
        cells = patches.unflatten(-1, (across, stride)).sum(dim=-1).unflatten(-2, (down, stride)).sum(dim=-2)
        return torch.cat([rows[..., :prefix], cells.flatten(-2)], dim=-1)


@dataclass(frozen=True)
class LayerRows:
    """One layer's rows."""

    name: str
    layout: RowLayout
    rows: QuantisedRows  # [image, head, row, key]


class RowCollector:
    """Keep the rows of layers, until they take more than `max_bytes`: then there are none, only what they are of."""

    def __init__(self, max_bytes: int, stride: int = 1, whole: str | None = None) -> None:
        self.max_bytes, self.stride = max_bytes, stride
        self.whole = whole  # the name of a layer that every row is kept of
        self.layers: list[LayerRows] | None = []
        self.layouts: list[tuple[str, RowLayout, int]] = []  # of all layers: name, layout, number of heads
        self.taken = 0

    def add(self, layer: AttentionLayer, num_images: int) -> None:
        """The layer must be in the usual order, prefix tokens first. Weights below 0, of heads that are mixed, are no
        shares of attention: such layers are passed over, and so is what is not of each image."""
        if len(layer.weights) % num_images or float(layer.weights.min()) < 0:
            return
        layout = RowLayout.of(layer, num_images, 1 if layer.name == self.whole else self.stride)
        num_heads = layer.weights.shape[1]
        self.layouts.append((layer.name, layout, num_heads))
        self.taken += num_images * layout.nbytes(num_heads)
        if self.taken > self.max_bytes:
            self.layers = None
        if self.layers is not None:
            self.layers.append(LayerRows(layer.name, layout, layout.kept(layer.weights)))


def of_one_layout(layers: Sequence[LayerRows] | None) -> QuantisedRows | None:
    """Return the rows of all layers, [image, layer, head, query, key]; None where these are not the same in each, with
    windows, or not all."""
    if not layers:
        return None
    layout, shape = layers[0].layout, layers[0].rows.codes.shape
    if layout.num_windows > 1 or layout.stride > 1 or not layout.are_queries_patches:
        return None
    if any(each.layout != layout or each.rows.codes.shape != shape for each in layers):
        return None
    return stacked([each.rows for each in layers], axis=1)


def of_all_images(parts: Sequence[Sequence[LayerRows]]) -> tuple[LayerRows, ...]:
    """Return the rows of all images from those of some each."""
    return tuple(
        replace(layers[0], rows=concatenated([each.rows for each in layers])) for layers in zip(*parts, strict=True)
    )
