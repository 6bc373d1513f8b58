"""The number types of images, and which of them a model takes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attention_visualizer.attention.proof import ERROR_BOUND
from attention_visualizer.support.errors import UserError

MAPS = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


def check_has_numbers(model: nn.Module) -> None:
    """Raise UserError for a model that was never loaded: the first weights that images meet are on the meta device."""
    weight = first_weight(model)
    if weight is not None and weight.is_meta:
        raise UserError(f"{type(model).__name__} is on the meta device, without numbers: load its weights")


def holds_pixels(tensor: Tensor) -> bool:
    """Whether a tensor's numbers may be pixels: floats, or whole numbers that the model makes floats of."""
    return tensor.dtype is not torch.bool and not tensor.is_complex()


def as_input(images: Tensor, model: nn.Module) -> Tensor:
    """Return images in the type of the model's weights; whole numbers as they are."""
    return images.to(input_type(model)) if images.is_floating_point() else images


def input_type(model: nn.Module) -> torch.dtype:
    """Return the type of the weights that images meet first: of the first convolution or linear map, or of the first
    parameter; float32 where there is none of floating point, as in a quantised model."""
    weight = first_weight(model)
    return torch.float32 if weight is None else weight.dtype


def first_weight(model: nn.Module) -> Tensor | None:
    firsts = [module.weight for module in model.modules() if isinstance(module, MAPS)]
    known = (each for each in (*firsts, *model.parameters()) if isinstance(each, Tensor) and each.dtype in ERROR_BOUND)
    return next(known, None)
