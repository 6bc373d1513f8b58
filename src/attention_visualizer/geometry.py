"""Where tokens lie on the image: the patch grid, the prefix tokens before it, the size of a patch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attention_visualizer.errors import UserError


@dataclass(frozen=True)
class Geometry:
    """Token layout of one attention layer: `num_prefix_tokens` (class token, registers), then a row-major grid.

    grid: patches as (height, width); patch_size: pixels as (height, width).
    """

    grid: tuple[int, int]
    num_prefix_tokens: int
    patch_size: tuple[int, int]

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_tokens(self) -> int:
        return self.num_prefix_tokens + self.num_patches

    def patch_centers(self, device: torch.device | str | None = None) -> Tensor:
        """Centres of the patches in pixels, [patch, 2] as (y, x)."""
        rows = (torch.arange(self.grid[0], device=device) + 0.5) * self.patch_size[0]
        columns = (torch.arange(self.grid[1], device=device) + 0.5) * self.patch_size[1]
        return torch.cartesian_prod(rows, columns)

    def token_of_patch(self, row: int, column: int) -> int:
        """Token index of the patch in `row`, `column` (both from 0)."""
        height, width = self.grid
        if not (0 <= row < height and 0 <= column < width):
            raise UserError(
                f"query=[{row},{column}] is outside the {height} x {width} patch grid: "
                f"rows are 0 to {height - 1}, columns 0 to {width - 1}"
            )
        return self.num_prefix_tokens + row * width + column

    def to_map(self, patch_values: Tensor) -> Tensor:
        """[..., patch] -> [..., grid height, grid width]."""
        return patch_values.unflatten(-1, self.grid)


def find_geometry(model: torch.nn.Module) -> Geometry | None:
    """The geometry that `model`, or the first module inside it, states in timm's attribute names; else None."""
    for module in model.modules():
        patch_embed = getattr(module, "patch_embed", None)
        patch_size = getattr(patch_embed, "patch_size", None)
        grid = getattr(patch_embed, "grid_size", None) or getattr(module, "grid_size", None)
        if grid is not None and patch_size is not None:
            prefix = int(getattr(module, "num_prefix_tokens", 0))
            return Geometry((grid[0], grid[1]), prefix, (patch_size[0], patch_size[1]))
    return None
