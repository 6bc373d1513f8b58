"""Where tokens lie on the image: the patch grid, the prefix tokens before it, the size of a patch."""

from __future__ import annotations

import math
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Geometry:
    """Token layout of one attention layer's keys: prefix tokens (class token, registers), then a row-major grid."""

    grid: Size  # patches
    num_prefix_tokens: int
    patch_size: Size  # pixels
    #: Patches, where attention stays inside windows: the windows of an image then follow each other in the batch, row
    #: by row, over a grid that was rolled by `shift` towards its start.
    window: Size | None = None
    shift: Size = (0, 0)
    #: Whether the first prefix token is a class token that the classification reads ("read"), or one that it leaves for
    #: the mean of the patches ("unread"); "absent" where the prefix tokens are registers only.
    class_token: ClassToken = "read"

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
        return self.num_prefix_tokens + row * width + column

    def per_image(self, values: Tensor) -> Tensor:
        """Average over an image's windows: [batch, ...] -> [image, ...]."""
        return values if self.window is None else values.unflatten(0, (-1, math.prod(self.windows))).mean(dim=1)

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
    """Token layout declared by a model's attributes; None where it is not declared."""

    patch_size: Size | None
    num_prefix_tokens: int | None
    grid: Size | None
    class_token: ClassToken = "read"

    @property
    def geometry(self) -> Geometry | None:
        """The geometry of the whole grid; None where a part of it is not declared."""
        if self.grid is None or self.patch_size is None or self.num_prefix_tokens is None:
            return None
        return Geometry(self.grid, self.num_prefix_tokens, self.patch_size, class_token=self.class_token)


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
            prefix = num_prefix_tokens(model, module)
            return DeclaredLayout(patch_size, prefix, grid, class_token_of(module) if prefix else "read")
    return DeclaredLayout(None, num_prefix_tokens(model, model), None)


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


def num_prefix_tokens(model: nn.Module, owner: nn.Module) -> int | None:
    """Count the class, distillation and register tokens before the patches. None where their place is not known.

    Wherever there is a class token it comes first and registers follow it; registers alone may stand at the end.
    """
    declared = getattr(owner, "num_prefix_tokens", None)
    if isinstance(declared, int):
        return declared
    for module in (owner, model, *model.modules()):
        tokens = {name: value for name, value in module.named_parameters(recurse=False) if name in PREFIX_TOKENS}
        if tokens:  # of one embedding module; others inside (a decoder's) are not this one's
            if not any(name.startswith("cl") for name in tokens):
                return None
            return sum(value.shape[-2] if value.ndim > 1 else 1 for value in tokens.values())
    return 0


def class_token_of(owner: nn.Module) -> ClassToken:
    """Return "read" unless attributes of timm or Hugging Face tell otherwise."""
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
