"""Random movements of whole batches of training images: affine and elastic, each image its own."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attention_visualizer.data.images import to_unit

CONTROL_POINTS = 7  # along each side, of the elastic movement


def augment_batch(
    images: Tensor,
    generator: torch.Generator,
    rotation: float,
    translation: float,
    scaling: float,
    shear: float,
    elastic: float,
) -> Tensor:
    """Move each image [batch, channel, height, width] in its own way; float32 in 0..1, zeros outside.

    Each amount but the last is the bound of a uniform draw to either side: rotation in degrees, translation in pixels
    along each axis, scaling as a share of the size, shear as pixels sideways for each pixel down. `elastic` is the
    standard deviation in pixels of a smooth displacement that differs from place to place (after Simard et al., 2003).
    The draws come from `generator` alone, so they do not depend on the device of the images.
    """
    batch, _, height, width = images.shape
    draws = 2 * torch.rand(5, batch, generator=generator, device=generator.device) - 1
    draws = to_device(draws, images.device)
    angle = draws[0] * math.radians(rotation)
    size = 1 + draws[1] * scaling
    slant = draws[2] * shear
    cosine, sine = angle.cos() / size, angle.sin() / size
    # Maps a pixel of the result to where it is read: rotation times shear, divided by the size. The grid runs from
    # -1 to 1 along both axes, hence the aspect ratios and the division by half the sides.
    across = torch.stack([cosine, (cosine * slant - sine) * height / width, draws[3] * translation * 2 / width])
    down = torch.stack([sine * width / height, sine * slant + cosine, draws[4] * translation * 2 / height])
    maps = torch.stack([across, down]).permute(2, 0, 1)  # (B, 2, 3)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)  # (B, height, width, 2)
    if elastic:
        grid = grid + elastic_displacement(batch, (height, width), elastic, generator, images.device)
    return F.grid_sample(to_unit(images), grid, align_corners=False)


def elastic_displacement(
    batch: int, size: tuple[int, int], deviation: float, generator: torch.Generator, device: torch.device
) -> Tensor:
    """Draw a smooth random field [batch, height, width, 2], across and down, in units of half a side.

    Normal draws at control points are joined by cubic B-splines, one matrix product for the whole batch. Over all
    pixels the displacement has `deviation` in pixels.
    """
    draws = torch.randn(batch, 2, CONTROL_POINTS**2, generator=generator, device=generator.device)
    half_sides = torch.tensor([size[1], size[0]], device=generator.device)[:, None] / 2
    weights = to_device(draws * (deviation / half_sides), device)
    return (weights @ spline_basis(*size, device)).view(batch, 2, *size).permute(0, 2, 3, 1)


@functools.cache
def spline_basis(height: int, width: int, device: torch.device) -> Tensor:
    """Return what each control point adds at each pixel: [control point, pixel], for draws of deviation 1 the same."""

    def along(length: int) -> Tensor:
        places = torch.linspace(0, CONTROL_POINTS - 1, length)[:, None]
        distance = (places - torch.arange(CONTROL_POINTS)).abs()
        near, far = 2 / 3 - distance**2 + distance**3 / 2, (2 - distance).clamp_min(0) ** 3 / 6
        return torch.where(distance < 1, near, far)  # [pixel, control point]

    basis = torch.einsum("ya,xb->abyx", along(height), along(width)).flatten(2).flatten(0, 1)
    return (basis / basis.square().sum(dim=0).mean().sqrt()).to(device)


def to_device(draws: Tensor, device: torch.device) -> Tensor:
    """Copy a few numbers from the CPU, without waiting for what a GPU is still doing."""
    pins = device.type == "cuda" and draws.device.type == "cpu"
    return draws.pin_memory().to(device, non_blocking=True) if pins else draws.to(device)
