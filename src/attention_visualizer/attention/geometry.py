"""Where tokens lie on the image: the patch grid, the prefix tokens before it, the size of a patch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attention_visualizer.support.errors import UserError

NO_GEOMETRY = (
    "it is not known where this model's tokens lie on the image: say it from Python with "
    "geometry=Geometry(grid=(rows, columns), num_prefix_tokens=..., patch_size=(height, width))"
)

Size = tuple[int, int]  # height, width
ClassToken = Literal["read", "unread", "absent"]
LARGEST_CHANNELS = 16  # of images; a convolution of more works on features


@dataclass(frozen=True)
class Geometry:
    """Token layout of one attention layer's keys: `num_prefix_tokens` (class token, registers), then a row-major grid.

    grid: patches as (height, width); patch_size: pixels as (height, width).
    class_token: the first prefix token is one, and the classification reads it ("read") or pools the patches instead
    ("unread"); "absent" where the prefix tokens are registers only.
    window: patches as (height, width) where attention stays inside windows; the windows of an image then follow each
    other in the batch, row by row, over a grid that was rolled by `shift` towards its start.
    """

    grid: Size
    num_prefix_tokens: int
    patch_size: Size
    window: Size | None = None
    shift: Size = (0, 0)
    class_token: ClassToken = "read"

    @property
    def num_patches(self) -> int:
        """In a row of weights: of the window, if there are windows."""
        return math.prod(self.window or self.grid)

    @property
    def num_tokens(self) -> int:
        return self.num_prefix_tokens + self.num_patches

    @property
    def windows(self) -> Size:
        """How many windows cover the grid, the last ones beyond its edge; 1 x 1 without windows."""
        height, width = self.window or self.grid
        return -(-self.grid[0] // height), -(-self.grid[1] // width)

    def patch_centers(self, device: torch.device | str | None = None) -> Tensor:
        """Centres of a row's patches in pixels, [patch, 2] as (y, x)."""
        height, width = self.window or self.grid
        rows = (torch.arange(height, device=device) + 0.5) * self.patch_size[0]
        columns = (torch.arange(width, device=device) + 0.5) * self.patch_size[1]
        return torch.cartesian_prod(rows, columns)

    def token_of_patch(self, row: int, column: int) -> int:
        """Token index of the patch in `row`, `column` (both from 0)."""
        height, width = self.grid
        if not (0 <= row < height and 0 <= column < width):
            raise UserError(
                f"query=[{row},{column}] is outside the {height} x {width} patch grid: "
                f"rows are 0 to {height - 1}, columns 0 to {width - 1}"
            )
        if self.window is not None:
            raise UserError(f"query=[{row},{column}]: this model attends inside windows: use query=patches")
        return self.num_prefix_tokens + row * width + column

    def per_image(self, values: Tensor) -> Tensor:
        """[batch, ...] -> [image, ...]: the mean over an image's windows."""
        return values if self.window is None else values.unflatten(0, (-1, math.prod(self.windows))).mean(dim=1)

    def to_map(self, patch_values: Tensor) -> Tensor:
        """[batch, ..., patch] -> [image, ..., grid height, grid width]."""
        if self.window is None:
            return patch_values.unflatten(-1, self.grid)
        down, across = self.windows
        tiles = patch_values.unflatten(-1, self.window).unflatten(0, (-1, down, across))
        tiles = tiles.movedim(1, -3).movedim(1, -2)  # image, ..., down, window height, across, window width
        whole = tiles.flatten(-2).flatten(-3, -2)
        whole = whole.roll(self.shift, dims=(-2, -1))
        return whole[..., : self.grid[0], : self.grid[1]]


@dataclass(frozen=True)
class DeclaredLayout:
    """What a model says of its tokens in its attributes. None: it does not say."""

    patch_size: Size | None
    num_prefix_tokens: int | None
    grid: Size | None
    class_token: ClassToken = "read"


def find_geometry(model: nn.Module) -> Geometry | None:
    """The geometry that `model`, or the first Vision Transformer inside it, states for its images; else None."""
    layout = stated_layout(model)
    if layout.grid is None or layout.patch_size is None or layout.num_prefix_tokens is None:
        return None
    return Geometry(layout.grid, layout.num_prefix_tokens, layout.patch_size, class_token=layout.class_token)


def stated_layout(model: nn.Module) -> DeclaredLayout:
    """In the attribute names of timm, torchvision, Hugging Face, vit-pytorch and this project."""
    for module in model.modules():
        embedding = patch_embedding(module)
        if embedding is None:
            continue
        patch_size = size_of_patch(embedding) or size_of_patch(module)
        grid = as_size(getattr(embedding, "grid_size", None)) or as_size(getattr(module, "grid_size", None))
        image_size = as_size(getattr(embedding, "image_size", None)) or as_size(getattr(module, "image_size", None))
        if grid is None and image_size is not None and patch_size is not None:
            grid = image_size[0] // patch_size[0], image_size[1] // patch_size[1]
        if patch_size is not None:
            prefix = num_prefix_tokens(model, module)
            return DeclaredLayout(patch_size, prefix, grid, class_token_of(module) if prefix else "read")
    return DeclaredLayout(None, num_prefix_tokens(model, model), None)


def patch_embedding(module: nn.Module) -> nn.Module | None:
    """The child of `module` that cuts images into patches, by its name."""
    for name in ("patch_embed", "conv_proj", "patch_embeddings", "patch_embedding", "to_patch_embedding"):
        found = getattr(module, name, None)
        if isinstance(found, nn.Module):
            return found
    return None


def size_of_patch(module: nn.Module) -> Size | None:
    """Pixels from one patch to the next: a convolution's stride, as stated, or the lengths in einops' Rearrange."""
    own = module if isinstance(module, nn.Conv2d) else None
    for name in ("proj", "projection"):
        own = own or getattr(module, name, None)
    convolution = own if isinstance(own, nn.Conv2d) and own.in_channels <= LARGEST_CHANNELS else None
    if convolution is not None and convolution.stride != (1, 1):
        return as_size(convolution.stride)
    stated = as_size(getattr(module, "patch_size", None))
    if stated is not None:
        return stated
    for inside in module.modules():
        if isinstance(inside, nn.Conv2d) and inside.kernel_size == inside.stride != (1, 1):
            return as_size(inside.stride)
        lengths = getattr(inside, "axes_lengths", None)
        if type(inside).__name__ == "Rearrange" and isinstance(lengths, dict) and {"p1", "p2"} <= lengths.keys():
            return lengths["p1"], lengths["p2"]
    return None


def num_prefix_tokens(model: nn.Module, owner: nn.Module) -> int | None:
    """Class, distillation and register tokens before the patches. None where their place is not known.

    Wherever there is a class token it comes first and registers follow it; registers alone may stand at the end.
    """
    stated = getattr(owner, "num_prefix_tokens", None)
    if isinstance(stated, int):
        return stated
    for module in (owner, model, *model.modules()):
        own = {name: value for name, value in module.named_parameters(recurse=False) if name in PREFIX_TOKENS}
        if own:  # of one embedding module; others inside (a decoder's) are not this one's
            if not any(name.startswith("cl") for name in own):
                return None
            return sum(value.shape[-2] if value.ndim > 1 else 1 for value in own.values())
    return 0


def class_token_of(owner: nn.Module) -> ClassToken:
    """As far as timm's and Hugging Face's attributes tell that it is not read."""
    if hasattr(owner, "cls_token") and owner.cls_token is None:
        return "absent"
    pools = getattr(owner, "global_pool", None) in ("avg", "avgmax", "max", "map")
    return "unread" if pools or getattr(getattr(owner, "config", None), "use_mean_pooling", False) else "read"


PREFIX_TOKENS = {
    *("cls_token", "class_token", "class_embedding", "cls_embedding"),
    *("dist_token", "distillation_token", "register_tokens", "reg_token"),
}


def states_windows(module: nn.Module) -> bool:
    name, library = type(module).__name__.lower(), type(module).__module__.partition(".")[0]
    return library in ("timm", "torchvision", "transformers") or "window" in name or "swin" in name


def as_size(value: Any) -> Size | None:
    """A number or a pair of them as (height, width)."""
    if isinstance(value, int) and value > 0:
        return value, value
    if isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(side, int) for side in value):
        return (value[0], value[1]) if min(value) > 0 else None
    return None


class GeometryFinder:
    """The geometry of each layer of a forward pass, from what the model states, the images and the layer's sizes.

    given: by the user, for models that state nothing; it goes to every layer of as many keys.
    """

    def __init__(self, model: nn.Module, given: Geometry | None) -> None:
        self.given = given
        self.stated = stated_layout(model)
        # Hiera keeps its tokens in the order of its pooling, masked autoencoders shuffle them.
        reordering = ("unroll", "reroll", "random_masking")
        self.reordered = any(hasattr(module, name) for module in model.modules() for name in reordering)
        self.dynamic = any(getattr(module, "dynamic_img_size", False) for module in model.modules())
        self.whole_seen = False  # in this pass, a layer that asks from every patch
        self.refused: int | None = None  # the number of keys that the given geometry did not fit
        self.used = False

    def of_layer(
        self, index: int, shape: torch.Size, columns: int, callers: Sequence[nn.Module], images: torch.Size | None
    ) -> Geometry | None:
        """index: of the layer in this pass; shape: [batch, head, query, key] of its weights; columns: of its values;
        callers: innermost first; images: [batch, channel, height, width].

        None where maps of this layer cannot be put on the image.
        """
        queries, keys = shape[-2:]
        if self.given is not None:
            if self.given.num_tokens != keys:
                self.refused = keys
                return None
            self.check(images)
            self.used = True
            return self.given
        prefix = self.stated.num_prefix_tokens
        kinds = [type(module).__name__.lower() for module in callers]
        decoding = any("decoder" in kind and "encoder" not in kind for kind in kinds)
        if prefix is None or self.reordered or decoding:  # a decoder's tokens are queries, or not in their places
            return None
        if images is None:
            if self.dynamic or self.stated.grid is None or self.stated.patch_size is None:
                return None
            plain = Geometry(self.stated.grid, prefix, self.stated.patch_size, class_token=self.stated.class_token)
            return plain if plain.num_tokens == keys else None
        whole = list(self._whole_grids((images[-2], images[-1])))
        windows = shape[0] // max(images[0], 1)
        if index == 0:
            self.whole_seen = False
        sizes = {math.prod(grid) for grid, _ in whole}
        if queries == keys and not {keys, keys - prefix} & sizes and {columns, columns - prefix} & sizes:
            return None  # attention between channels, over the tokens
        asked = queries * windows
        self.whole_seen = self.whole_seen or not sizes or asked in sizes or asked - prefix in sizes
        # Fewer tokens than patches: deeper stages, or keys that were pooled. In a model that has not shown all of its
        # patches before, they are a selection (masking, patch dropout), whose places nobody knows.
        grids = [*whole, *(self._reduced_grids((images[-2], images[-1])) if self.whole_seen else ())]
        if shape[0] != images[0]:
            return window_geometry(shape, callers, grids, images[0])
        for before in dict.fromkeys((prefix, 0)):
            for grid, patch_size in grids:
                if before + math.prod(grid) == keys:
                    return Geometry(grid, before, patch_size, class_token=self.stated.class_token if before else "read")
        return None

    def _whole_grids(self, image: Size) -> Iterator[tuple[Size, Size]]:
        """The stated patch grid on such an image, with the pixels of its patches."""
        if self.stated.patch_size is not None:
            height, width = self.stated.patch_size
            yield (image[0] // height, image[1] // width), (height, width)
            if self.stated.grid is not None and math.prod(self.stated.grid) > 1:
                grid = self.stated.grid  # where patches overlap, their number is not the quotient
                yield grid, (image[0] // grid[0], image[1] // grid[1])

    def _reduced_grids(self, image: Size) -> Iterator[tuple[Size, Size]]:
        strides = [(2**power, 2**power) for power in range(1, 7)]
        if self.stated.patch_size is not None:
            height, width = self.stated.patch_size
            strides = [*((height * factor, width * factor) for factor in (2, 4, 8, 16)), *strides]
        for height, width in strides:
            grid = -(-image[0] // height), -(-image[1] // width)
            if math.prod(grid) > 1:
                yield grid, (height, width)

    def check(self, images: torch.Size | None) -> None:
        """Raises UserError if the given geometry does not cover images of that size."""
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
        """Raises UserError if the given geometry fitted none of the layers."""
        if self.given is not None and not self.used:
            given = self.given
            raise UserError(
                f"the given geometry has {given.num_tokens} tokens ({given.num_prefix_tokens} before a grid of "
                f"{given.grid[0]} x {given.grid[1]}), but the model's layers have {self.refused}: give another one"
            )


def window_geometry(
    shape: torch.Size, callers: Sequence[nn.Module], grids: Sequence[tuple[Size, Size]], num_images: int
) -> Geometry | None:
    """Of a layer whose batch holds windows, from the window size and shift that the modules around it state."""
    # Where other libraries say window_size, it may be of scattered patches (CrossFormer).
    known = [module for module in callers if states_windows(module)]
    sizes = (as_size(getattr(module, "window_size", None)) for module in known)
    window = next((size for size in sizes if size is not None), None)
    if window is None or math.prod(window) != shape[-1] or num_images == 0 or shape[0] % num_images:
        return None
    shifts: Any = (getattr(module, "shift_size", None) for module in callers)
    stated = next((size for size in shifts if size is not None), 0)
    shift = (stated, stated) if isinstance(stated, int) else (int(stated[0]), int(stated[1]))
    for grid, patch_size in grids:
        geometry = Geometry(grid, 0, patch_size, window)
        if math.prod(geometry.windows) * num_images == shape[0]:
            whole = grid[0] % window[0] == 0 and grid[1] % window[1] == 0
            if any(shift) and not whole:
                return None  # libraries differ in whether they pad before or after the shift
            moved = [0 if side <= edge else by for side, edge, by in zip(grid, window, shift, strict=True)]
            return replace(geometry, shift=(moved[0], moved[1]))
    return None
