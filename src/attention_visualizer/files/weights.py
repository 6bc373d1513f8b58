"""Check weights that come from a file before anything is computed with them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attention_visualizer.support.errors import UserError

PREFIXES = re.compile(r"^((model|module|_orig_mod)\.)+")  # Lightning's, DataParallel's and torch.compile's

WEIGHT_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def bare_names(state_dict: Any, path: Path) -> dict[str, Tensor]:
    """Return the tensors under the names that they have inside the model. Raise UserError, which names `path`."""
    if not isinstance(state_dict, Mapping) or not state_dict:
        raise UserError(f"{path} holds no dictionary of weights")
    weights: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            reason = f"holds {name!r:.60} where weights were expected: it is no checkpoint of this project"
            raise UserError(f"{path} {reason}")
        bare = PREFIXES.sub("", name)
        if bare in weights:
            raise UserError(f"{path} holds the weights {bare!r:.60} twice")
        weights[bare] = tensor
    return weights


def check_weights(
    weights: Mapping[str, Tensor], path: Path, file_size: int, types: tuple[torch.dtype, ...] = WEIGHT_TYPES
) -> None:
    """Raise UserError unless all are ordinary tensors that together fit into the file that they came from.

    A file of a kilobyte can hold a tensor of 10^12 elements (all strides 0, or sparse): nothing else is done with
    the weights before this.
    """
    for name, tensor in weights.items():
        if tensor.layout != torch.strided or tensor.is_nested or tensor.device.type != "cpu":
            raise UserError(f"{path} holds {name!r:.60} as a sparse or otherwise special tensor: save dense weights")
        if tensor.dtype not in types:
            raise UserError(f"{path} holds {name!r:.60} as {tensor.dtype}: save floating-point weights")
    declared = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    if declared > file_size:
        difference = f"declares {declared:,} bytes of weights in a file of {file_size:,}"
        raise UserError(f"{path} {difference}: choose another checkpoint")


def finite_weights(weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the weights as float32. Raise UserError if one is NaN or infinite."""
    converted = {name: tensor.detach().to(torch.float32) for name, tensor in weights.items()}
    for name, tensor in converted.items():
        if not tensor.isfinite().all():
            reason = f"has NaN or infinite values in {name:.60}: its training diverged, choose another checkpoint"
            raise UserError(f"{path} {reason}")
    return converted
