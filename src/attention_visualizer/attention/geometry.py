"""The positions of tokens on the image: the patch grid, the tokens beside it, the size of a patch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attention_visualizer.support.errors import UserError

NO_GEOMETRY = (
    "the positions of this model's tokens on the image are unknown: give them from Python with "
    "geometry=Geometry(grid=(rows, columns), num_prefix_tokens=..., patch_size=(height, width))"
)

Size = tuple[int, int]  # height, width
ClassToken = Literal["read", "unread", "absent"]
MAX_CHANNELS = 16  # of images; a convolution of more works on features
NEARLY = 0.03  # of an image's side: patches that cover it but for this are drawn over all of it


@dataclass(frozen=True)
class Geometry:
    """Token layout of one attention layer's keys: prefix tokens (class token, registers), then a row-major grid, or
    another order of them."""

    grid: Size  # patches
    num_prefix_tokens: int
    patch_size: tuple[float, float]  # pixels of the image that the model is called with: height, width
    #: Patches, where attention stays inside windows: the windows of an image then follow each other in the batch, row
    #: by row, over a grid that was rolled by `shift` towards its start.
    window: Size | None = None
    shift: Size = (0, 0)
    #: Whether the first prefix token is a class token that the classification reads ("read"), or one that it leaves for
    #: the mean of the patches ("unread"); "absent" where the prefix tokens are registers only.
    class_token: ClassToken = "read"
    #: The first patch's top left corner, in pixels: negative where the model pads its images.
    offset: tuple[float, float] = (0.0, 0.0)
    #: The key of each patch, row by row, where prefix tokens and patches stand in another order than the usual one.
    order: tuple[int, ...] | None = None
    #: How it is known: "measured", "given and confirmed", or "given, not confirmed" with the reason.
    evidence: str = field(default="", compare=False)

    def __str__(self) -> str:
        """Say it in words: "4 x 4 patches of 7 x 7 pixels, and the class token"."""
        text = f"{self.grid[0]} x {self.grid[1]} patches of {self.patch_size[0]:g} x {self.patch_size[1]:g} pixels"
        prefix = self.num_prefix_tokens
        if prefix == 1:
            text += ", and one prefix token" if self.class_token == "absent" else ", and the class token"
        elif prefix:
            text += f", and {prefix} prefix tokens"
        return text + (f", in windows of {self.window[0]} x {self.window[1]}" if self.window else "")

    @property
    def num_patches(self) -> int:
        """The number of patches in a row of weights: those of a window, if there are windows."""
        return math.prod(self.window or self.grid)

    @property
    def num_tokens(self) -> int:
        return self.num_prefix_tokens + self.num_patches

    @property
    def windows(self) -> Size:
        """The number of windows that cover the grid, the last ones beyond its edge; 1 x 1 without windows."""
        height, width = self.window or self.grid
        return -(-self.grid[0] // height), -(-self.grid[1] // width)

    def patch_centers(self, device: torch.device | str | None = None) -> Tensor:
        """Return the centres of a row's patches in pixels, [patch, 2] as (y, x)."""
        height, width = self.window or self.grid
        rows = (torch.arange(height, device=device) + 0.5) * self.patch_size[0]
        columns = (torch.arange(width, device=device) + 0.5) * self.patch_size[1]
        return torch.cartesian_prod(rows, columns)

    def token_of_patch(self, row: int, column: int) -> int:
        """Return the token index of the patch in `row`, `column`, both from 0; raise UserError outside the grid."""
        height, width = self.grid
        if not (0 <= row < height and 0 <= column < width):
            raise UserError(
                f"query=[{row},{column}] is outside the {height} x {width} patch grid: "
                f"rows are 0 to {height - 1}, columns 0 to {width - 1}"
            )
        if self.window is not None:
            raise UserError(f"query=[{row},{column}]: this model attends inside windows: use query=patches")
        return (self.order or range(self.num_prefix_tokens, self.num_tokens))[row * width + column]

    def per_image(self, values: Tensor) -> Tensor:
        """Average over an image's windows: [batch, ...] -> [image, ...]."""
        return values if self.window is None else values.unflatten(0, (-1, math.prod(self.windows))).mean(dim=1)

    def drawn_grid(self, image: Size) -> Size:
        """Return the grid that a map is drawn on over an image of that height and width: cells of equal size, which
        cover just the image. It is the patches' own unless these end before the image's edge or beyond it."""
        sizes = []
        for count, pixels, side in zip(self.grid, self.patch_size, image, strict=True):
            is_whole = abs(count * pixels - side) <= max(1, NEARLY * side) or pixels != int(pixels)
            sizes.append(count if is_whole else side // math.gcd(side, int(pixels)))
        return sizes[0], sizes[1]

    def fits(self, image: Size) -> bool:
        """Return whether the grid ends less than a patch from the edges of an image of that height and width."""
        sides = zip(self.offset, self.grid, self.patch_size, image, strict=True)
        return all(abs(start + count * pixels - side) < max(pixels, 2) for start, count, pixels, side in sides)

    def drawn(self, maps: Tensor, image: Size) -> Tensor:
        """Put maps of patches on that grid: [..., grid height, grid width] -> [..., drawn height, drawn width].

        Cells have their patch's value; those without a patch, which the model does not see, 0.
        """
        for axis, (drawn, count, side) in enumerate(zip(self.drawn_grid(image), self.grid, image, strict=True)):
            if drawn == count:
                continue
            middles = (torch.arange(drawn, device=maps.device) + 0.5) * side / drawn
            patches = (middles // self.patch_size[axis]).long()
            maps = maps.index_select(axis - 2, patches.clamp_max(count - 1))
            shape = (-1, 1) if axis == 0 else (-1,)
            maps = maps.where((patches < count).view(shape), torch.zeros((), dtype=maps.dtype, device=maps.device))
        return maps

    def in_usual_order(self, values: Tensor, axes: tuple[int, ...] = (-1,)) -> Tensor:
        """Put prefix tokens first and then the patches, row by row, along axes of keys."""
        if self.order is None:
            return values
        patches = torch.tensor(self.order, device=values.device)
        others = torch.ones(self.num_tokens, dtype=torch.bool, device=values.device)
        others[patches] = False
        tokens = torch.cat([others.nonzero()[:, 0], patches])
        for axis in axes:
            values = values.index_select(axis, tokens)
        return values

    @property
    def usual(self) -> Geometry:
        """The geometry of tokens that were put in the usual order."""
        return self if self.order is None else replace(self, order=None)

    def to_map(self, patch_values: Tensor) -> Tensor:
        """Put values back on the image: [batch, ..., patch] -> [image, ..., grid height, grid width]."""
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
    """The patches of the images that a model declares by its attributes; None where it declares none."""

    patch_size: Size | None
    grid: Size | None


def declared_layout(model: nn.Module) -> DeclaredLayout:
    """Read the layout from the attributes of timm, torchvision, Hugging Face, vit-pytorch and this project."""
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
            return DeclaredLayout(patch_size, grid)
    return DeclaredLayout(None, None)


def patch_embedding(module: nn.Module) -> nn.Module | None:
    """Return the child of `module` that cuts images into patches, known by its name; None if there is none."""
    for name in ("patch_embed", "conv_proj", "patch_embeddings", "patch_embedding", "to_patch_embedding"):
        child = getattr(module, name, None)
        if isinstance(child, nn.Module):
            return child
    return None


def size_of_patch(module: nn.Module) -> Size | None:
    """Return the pixels from one patch to the next: a convolution's stride, an attribute, or einops' axis lengths."""
    convolution = module if isinstance(module, nn.Conv2d) else None
    for name in ("proj", "projection"):
        convolution = convolution or getattr(module, name, None)
    if isinstance(convolution, nn.Conv2d) and convolution.in_channels <= MAX_CHANNELS:
        if convolution.stride != (1, 1):
            return as_size(convolution.stride)
    declared = as_size(getattr(module, "patch_size", None))
    if declared is not None:
        return declared
    for part in module.modules():
        if isinstance(part, nn.Conv2d) and part.kernel_size == part.stride != (1, 1):
            return as_size(part.stride)
        lengths = getattr(part, "axes_lengths", None)
        if type(part).__name__ == "Rearrange" and isinstance(lengths, dict) and {"p1", "p2"} <= lengths.keys():
            return lengths["p1"], lengths["p2"]
    return None


def declared_class_token(model: nn.Module) -> ClassToken:
    """Return "read" unless parameters by their names, or attributes of timm or Hugging Face, tell otherwise."""
    named = {name for module in model.modules() for name, _ in module.named_parameters(recurse=False)}
    tokens = named & PREFIX_TOKENS
    if tokens and not any(name.startswith("cl") for name in tokens):
        return "absent"
    owner = next((module for module in model.modules() if patch_embedding(module) is not None), model)
    if hasattr(owner, "cls_token") and owner.cls_token is None:
        return "absent"
    pools = getattr(owner, "global_pool", None) in ("avg", "avgmax", "max", "map")
    return "unread" if pools or getattr(getattr(owner, "config", None), "use_mean_pooling", False) else "read"


PREFIX_TOKENS = {
    *("cls_token", "class_token", "class_embedding", "cls_embedding"),
    *("dist_token", "distillation_token", "register_tokens", "reg_token"),
}


def as_size(value: Any) -> Size | None:
    """Return a positive number, or a pair of them, as (height, width); None for anything else."""
    if isinstance(value, int) and value > 0:
        return value, value
    if isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(side, int) for side in value):
        return (value[0], value[1]) if min(value) > 0 else None
    return None
