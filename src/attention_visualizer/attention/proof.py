"""How far what was found may be from the model's own output, by the precision in which both were computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Largest accepted |weights @ values - the model's output|, relative to the largest |value|, by dtype of the model's
# attention: some hundred times its rounding.
ERROR_BOUND = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
SIDE = 128  # of the matrices whose product shows a device's precision: smaller ones may be multiplied in another way


@dataclass(frozen=True)
class Proof:
    """The difference between what was found and the model's own output, and how large it may be."""

    error: float
    bound: float
    dtype: torch.dtype  # of the model's output
    is_reduced: bool = False  # whether it may be larger because products have a reduced precision here

    @classmethod
    def of(cls, found: Tensor, expected: Tensor, magnitude: float) -> Proof:
        """magnitude: of the numbers that are summed, to judge the difference by."""
        error = largest(found.detach() - expected.detach())
        bound = usual = ERROR_BOUND[expected.dtype]
        if error > usual * magnitude and expected.dtype is not torch.float64:
            bound = max(usual, ERROR_BOUND[product_type(expected.device)])
        return cls(error, bound * magnitude, expected.dtype, bound > usual)


def largest(values: Tensor) -> float:
    """Return the largest magnitude; NaN if there is a NaN, 0 for an empty tensor."""
    if not values.numel():
        return 0.0
    low, high = torch.aminmax(values.detach())  # one pass and no copy, unlike abs().max()
    return abs(float(torch.maximum(-low, high)))


def product_type(device: torch.device) -> torch.dtype:
    """Return the type in whose precision `device` multiplies matrices of float32, measured: that of bfloat16, or of
    TF32, which has float16's, where torch.set_float32_matmul_precision or another setting asks for it."""
    ones = torch.ones(SIDE, SIDE, device=device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for dtype, digits in ((torch.float32, 12), (torch.float16, 9)):  # binary ones, which the next type rounds away
            factor = 1 + 2.0**-digits
            if bool((ones * factor @ ones == SIDE * factor).all()):
                return dtype
    return torch.bfloat16
