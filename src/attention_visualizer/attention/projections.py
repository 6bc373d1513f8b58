"""The linear map that a model applies to its heads' outputs: these are followed until something is done with them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_visualizer.attention.function_call import FunctionCall, tensors_of
from attention_visualizer.attention.proof import ERROR_BOUND, largest
from attention_visualizer.attention.torch_internals import DisableTorchFunction

NAMES_OF_REARRANGING = """
    transpose permute reshape view contiguous flatten unflatten squeeze unsqueeze movedim moveaxis swapaxes swapdims
    select narrow __getitem__ clone detach to type_as float half bfloat16
""".split()
REARRANGING = {getattr(each, name) for each in (torch, Tensor) for name in NAMES_OF_REARRANGING if hasattr(each, name)}
REARRANGING |= {Tensor.mT.__get__, Tensor.T.__get__, F.dropout}  # type: ignore[attr-defined]
PRODUCTS = {torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}
SUMS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}


class AppliedProjection:
    """The weight [embed, head * head_dim] of what becomes of one layer's heads; None where it is not known, or not
    yet."""

    def __init__(self) -> None:
        self.weight: Tensor | None = None


class ProjectionWatch:
    """Follow the output of one attention call at a time.

    The projection is known where one linear map, and nothing else, takes the heads' outputs, side by side in their
    order, and where nothing but a sum takes what it gives, within the module that applies it. A low-rank map beside it,
    a norm in front of it, a hook that changes what it returns make it unknown.
    """

    def __init__(self) -> None:
        self.end()

    def end(self) -> None:
        """Follow nothing any more: what is followed is kept alive."""
        self.applied = AppliedProjection()
        self.heads: dict[int, Tensor] = {}  # the heads' outputs, in whatever order of axes
        self.projected: dict[int, Tensor] = {}  # what the linear map made of them
        self.scope: nn.Module | None = None  # the module that applies it
        self.modules: Sequence[nn.Module] = ()
        self.first_row = torch.empty(0)
        self.bound = 0.0

    def begin(
        self,
        applied: AppliedProjection,
        output: Tensor,
        weights: Tensor,
        values: Tensor,
        modules: Sequence[nn.Module],
    ) -> None:
        """Follow the `output` that a model got for these weights and values [batch, head, ...]; `applied` is told what
        was found. modules: those that are running, innermost first."""
        self.end()
        self.applied, self.modules = applied, modules
        self.heads = {id(output): output}
        if len(weights) and weights.shape[2]:
            self.first_row = (weights[0, :, :1].detach().to(values.dtype) @ values[0].detach()).flatten()
            self.bound = ERROR_BOUND.get(output.dtype, 0.0) / 10 * largest(values)

    def see(self, function: Callable[..., Any], args: Any, kwargs: dict[str, Any], result: Any) -> None:
        """Take note of a function that the model called."""
        if not self.heads or not isinstance(result, Tensor):
            return
        given = {id(tensor) for tensor in tensors_of((*args, *kwargs.values()))}
        if given & self.heads.keys():
            self._see_heads(FunctionCall(function, args, kwargs), result)
        elif given & self.projected.keys():
            self._see_projected(function, result)

    def _see_heads(self, call: FunctionCall, result: Tensor) -> None:
        if call.function in REARRANGING:
            self.heads[id(result)] = result
            return
        weight = linear_weight(call, self.heads)
        if weight is None or self.scope is not None or not self._has_heads_side_by_side(call, weight):
            self.end_without()
            return
        running = [frame.f_locals.get("self") for frame in frames_from(sys._getframe(3))]
        self.scope = next((module for module in self.modules if any(module is each for each in running)), None)
        if self.scope is not None:
            self.applied.weight, self.projected = weight, {id(result): result}

    def _see_projected(self, function: Callable[..., Any], result: Tensor) -> None:
        if not any(frame.f_locals.get("self") is self.scope for frame in frames_from(sys._getframe(3))):
            self.projected.clear()  # the module has returned it
        elif function in REARRANGING:
            self.projected[id(result)] = result
        elif function in SUMS:
            self.projected.clear()
        else:
            self.end_without()

    def end_without(self) -> None:
        self.applied.weight = None
        self.end()

    def _has_heads_side_by_side(self, call: FunctionCall, weight: Tensor) -> bool:
        tensor = next(each for each in call.tensors() if id(each) in self.heads)
        if tensor.shape[-1] != len(self.first_row) or weight.shape[1] != len(self.first_row):
            return False
        with DisableTorchFunction():
            row = tensor.detach().reshape(-1, tensor.shape[-1])[0].to(self.first_row)
            return largest(row - self.first_row) <= self.bound


def linear_weight(call: FunctionCall, inputs: dict[int, Tensor]) -> Tensor | None:
    """Return the weight [out, in] of a linear map of one of the `inputs`; None for any other function."""
    if call.function is F.linear:
        tensor, weight = call.argument(0, "input", None), call.argument(1, "weight", None)
        return weight if id(tensor) in inputs else None
    places = (1, 2) if call.function in (torch.addmm, Tensor.addmm) else (0, 1)
    if places == (0, 1) and call.function not in PRODUCTS:
        return None
    tensor, matrix = (call.args[place] if place < len(call.args) else None for place in places)
    if id(tensor) not in inputs or not isinstance(matrix, Tensor) or matrix.ndim != 2:
        return None
    return matrix.t()


def frames_from(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
