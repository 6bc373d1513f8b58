"""Sums in double precision, also of tensors on devices that have none, such as Apple's GPUs."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def has_float64(device: torch.device) -> bool:
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True


def exact_device(device: torch.device | str) -> torch.device:
    """Return where sums of what is on `device` are kept: there, or on the CPU where that device has no float64."""
    device = torch.device(device)
    return device if has_float64(device) else torch.device("cpu")


def in_float64(tensor: Tensor) -> Tensor:
    return tensor.to(exact_device(tensor.device)).double()
