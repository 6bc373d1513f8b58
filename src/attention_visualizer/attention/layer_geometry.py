"""The geometry of each layer of a forward pass, or the reason why it has none."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from attention_visualizer.attention.geometry import Geometry, Size, as_size, declared_layout
from attention_visualizer.support.errors import UserError

Grid = tuple[Size, Size]  # patches, and the pixels of a patch


@dataclass(frozen=True)
class LayerShape:
    """What is known of an attention layer when it is put on the image."""

    index: int  # in its pass
    weights: torch.Size  # [batch, head, query, key]
    columns: int  # of its values
    callers: Sequence[nn.Module]  # innermost first
    images: torch.Size | None  # [batch, channel, height, width]
    is_text: bool = False

    @property
    def keys(self) -> int:
        return self.weights[-1]


@dataclass(frozen=True)
class Unplaced:
    """Why maps of a layer cannot be put on the image."""

    reason: str


Place = Geometry | Unplaced


class GeometryFinder:
    """Find the geometry of each layer from what the model declares, the images and the layer's sizes.

    `given` is the user's, for models that declare nothing; it goes to every layer of as many keys.
    """

    def __init__(self, model: nn.Module, given: Geometry | None) -> None:
        self.given = given
        self.declared = declared_layout(model)
        # Hiera keeps its tokens in the order of its pooling, masked autoencoders shuffle them.
        reordering = ("unroll", "reroll", "random_masking")
        self.is_reordered = any(hasattr(module, name) for module in model.modules() for name in reordering)
        self.is_dynamic = any(getattr(module, "dynamic_img_size", False) for module in model.modules())
        self.has_met_whole_grid = False  # in this pass, a layer with a query for every patch
        self.misfit: int | None = None  # the number of keys that the given geometry did not fit
        self.is_given_used = False

    def of_layer(self, layer: LayerShape) -> Place:
        """Return the answer of the first rule that has one."""
        rules = (self._given, self._order_of_tokens, self._without_images)
        for rule in rules:
            place = rule(layer)
            if place is not None:
                return place
        assert layer.images is not None
        return self._on_images(layer, layer.images)

    # --- rules -----------------------------------------------------------------------------------------------------

    def _given(self, layer: LayerShape) -> Place | None:
        if layer.is_text:
            return Unplaced("it attends over text")
        if self.given is None:
            return None
        if self.given.num_tokens != layer.keys:
            self.misfit = layer.keys
            return Unplaced(f"the given geometry has {self.given.num_tokens} tokens, the layer {layer.keys} keys")
        self._check_given(layer.images)
        self.is_given_used = True
        return self.given

    def _order_of_tokens(self, layer: LayerShape) -> Unplaced | None:
        if self.declared.num_prefix_tokens is None:
            return Unplaced("the model has registers but no class token: they may stand before or behind the patches")
        if self.is_reordered:
            return Unplaced("the model changes the order of its tokens")
        for caller in layer.callers:
            name = type(caller).__name__
            if "decoder" in name.lower() and "encoder" not in name.lower():
                return Unplaced(f"it is part of {name}: a decoder's tokens are queries, or not in patch order")
        return None

    def _without_images(self, layer: LayerShape) -> Place | None:
        if layer.images is not None:
            return None
        geometry = self.declared.geometry
        if self.is_dynamic or geometry is None:
            return Unplaced("the model was called without images, and declares no grid of patches")
        if geometry.num_tokens == layer.keys:
            return geometry
        return Unplaced(f"it has {layer.keys} keys, but the model declares {geometry.num_tokens} tokens")

    def _on_images(self, layer: LayerShape, images: torch.Size) -> Place:
        size, prefix = (images[-2], images[-1]), self.declared.num_prefix_tokens or 0
        if layer.index == 0:
            self.has_met_whole_grid = False
        whole = list(self._whole_grids(size))
        patch_counts = {math.prod(grid) for grid, _ in whole}
        if _attends_between_channels(layer, prefix, patch_counts):
            return Unplaced("it attends between channels")
        queries = layer.weights[-2] * (layer.weights[0] // max(images[0], 1))  # those of all windows of an image
        if not patch_counts or {queries, queries - prefix} & patch_counts:
            self.has_met_whole_grid = True
        # Fewer tokens than patches: deeper stages, or keys that were pooled. In a model that has not shown all of its
        # patches before, they are a selection (masking, patch dropout), whose places nobody knows.
        grids = [*whole, *(self._reduced_grids(size) if self.has_met_whole_grid else ())]
        if layer.weights[0] != images[0]:
            return _windows(layer, grids, images[0])
        geometry = self._fitting_grid(layer.keys, grids)
        if geometry is not None:
            return geometry
        if self.has_met_whole_grid:
            return Unplaced(f"its {layer.keys} keys are no grid of patches of {size[0]} x {size[1]} pixels")
        return Unplaced(f"its {layer.keys} keys are not the image's {max(patch_counts)} patches: perhaps a selection")

    # --- grids of an image -----------------------------------------------------------------------------------------

    def _fitting_grid(self, keys: int, grids: Sequence[Grid]) -> Geometry | None:
        """Return the first grid with as many tokens as keys, with the declared prefix tokens or else without."""
        for before in dict.fromkeys((self.declared.num_prefix_tokens or 0, 0)):
            for grid, patch_size in grids:
                if before + math.prod(grid) == keys:
                    class_token = self.declared.class_token if before else "read"
                    return Geometry(grid, before, patch_size, class_token=class_token)
        return None

    def _whole_grids(self, image: Size) -> Iterator[Grid]:
        """Yield the declared patch grid on such an image."""
        if self.declared.patch_size is not None:
            height, width = self.declared.patch_size
            yield (image[0] // height, image[1] // width), (height, width)
            if self.declared.grid is not None and math.prod(self.declared.grid) > 1:
                grid = self.declared.grid  # where patches overlap, their number is not the quotient
                yield grid, (image[0] // grid[0], image[1] // grid[1])

    def _reduced_grids(self, image: Size) -> Iterator[Grid]:
        """Yield coarser grids, as those of deeper stages."""
        strides = [(2**power, 2**power) for power in range(1, 7)]
        if self.declared.patch_size is not None:
            height, width = self.declared.patch_size
            strides = [*((height * factor, width * factor) for factor in (2, 4, 8, 16)), *strides]
        for height, width in strides:
            grid = -(-image[0] // height), -(-image[1] // width)
            if math.prod(grid) > 1:
                yield grid, (height, width)

    # --- the given geometry ----------------------------------------------------------------------------------------

    def _check_given(self, images: torch.Size | None) -> None:
        """Raise UserError if the given geometry does not cover images of that size."""
        assert self.given is not None
        if images is None:
            return
        sides = zip(self.given.grid, self.given.patch_size, images[-2:], strict=True)
        if any(abs(count * pixels - side) >= max(pixels, 2) for count, pixels, side in sides):
            grid, patch = self.given.grid, self.given.patch_size
            raise UserError(
                f"the given geometry covers {grid[0] * patch[0]} x {grid[1] * patch[1]} pixels, but the images have "
                f"{images[-2]} x {images[-1]}: give another grid or patch_size"
            )

    def finish(self) -> None:
        """Raise UserError if the given geometry fitted none of the layers."""
        if self.given is not None and not self.is_given_used:
            given = self.given
            raise UserError(
                f"the given geometry has {given.num_tokens} tokens ({given.num_prefix_tokens} before a grid of "
                f"{given.grid[0]} x {given.grid[1]}), but the model's layers have {self.misfit}: give another one"
            )


def _attends_between_channels(layer: LayerShape, prefix: int, patch_counts: set[int]) -> bool:
    """Whether the columns of its values, not its keys, are as many as the patches."""
    queries, keys, columns = layer.weights[-2], layer.keys, layer.columns
    is_spatial = bool({keys, keys - prefix} & patch_counts)
    return queries == keys and not is_spatial and bool({columns, columns - prefix} & patch_counts)


def _windows(layer: LayerShape, grids: Sequence[Grid], num_images: int) -> Place:
    """Place a layer whose batch holds windows, by the window size and shift that the modules around it declare."""
    batch = layer.weights[0]
    window = _declared_window(layer.callers)
    if window is None:
        return Unplaced(f"its batch is {batch} for {num_images} images, and no windows are declared")
    if math.prod(window) != layer.keys:
        return Unplaced(f"its {layer.keys} keys are not a window of {window[0]} x {window[1]}")
    if num_images == 0 or batch % num_images:
        return Unplaced(f"its batch of {batch} windows cannot be divided between {num_images} images")
    shift = _declared_shift(layer.callers)
    for grid, patch_size in grids:
        geometry = Geometry(grid, 0, patch_size, window)
        if math.prod(geometry.windows) * num_images == batch:
            is_covered = grid[0] % window[0] == 0 and grid[1] % window[1] == 0
            if any(shift) and not is_covered:
                return Unplaced("its shifted windows are padded, and libraries differ in which comes first")
            moved = [0 if side <= edge else by for side, edge, by in zip(grid, window, shift, strict=True)]
            return replace(geometry, shift=(moved[0], moved[1]))
    return Unplaced(f"{batch // num_images} windows of {window[0]} x {window[1]} cover no grid of the image's patches")


def _declared_window(callers: Sequence[nn.Module]) -> Size | None:
    """Return the window size, in patches, of the innermost module that declares one."""
    # In modules of other libraries, window_size may be that of scattered patches (CrossFormer).
    trusted = [module for module in callers if _declares_windows(module)]
    sizes = (as_size(getattr(module, "window_size", None)) for module in trusted)
    return next((size for size in sizes if size is not None), None)


def _declared_shift(callers: Sequence[nn.Module]) -> Size:
    """Return by how many patches, down and across, the innermost module that declares it shifts its windows."""
    shifts: Any = (getattr(module, "shift_size", None) for module in callers)
    declared = next((size for size in shifts if size is not None), 0)
    return (declared, declared) if isinstance(declared, int) else (int(declared[0]), int(declared[1]))


def _declares_windows(module: nn.Module) -> bool:
    name, library = type(module).__name__.lower(), type(module).__module__.partition(".")[0]
    return library in ("timm", "torchvision", "transformers") or "window" in name or "swin" in name
