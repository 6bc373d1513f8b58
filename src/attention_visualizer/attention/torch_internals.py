"""The private parts of PyTorch that capturing needs: each is named here alone, with the reason and a check.

PyTorch does not promise to keep them. A missing one fails no import: `missing_internals` names it, and capture refuses
to start with one clear error.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import reduce
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
import torch.utils._python_dispatch
import torch.utils.checkpoint
import torch.utils.weak
from torch import Tensor, nn


@dataclass(frozen=True)
class Internal:
    """One private part of PyTorch."""

    path: str  # dotted, as it is written in Python
    reason: str  # what it is needed for
    is_present: Callable[[], bool]  # whether it is there and is what capturing expects


INTERNALS: list[Internal] = []


def missing_internals() -> list[str]:
    """Return the path and the reason of each part that this version of PyTorch lacks."""
    return [f"{internal.path}, which {internal.reason}" for internal in INTERNALS if not internal.is_present()]


def _missing(*args: Any) -> None:
    """Stand in for a missing part of PyTorch: capture refuses to start before anything comes of it."""


def _internal(path: str, reason: str, is_as_expected: Callable[[Any], bool] = callable) -> Any:
    """Register a part of PyTorch and return it, a stand-in where it is missing."""

    def find() -> Any:
        return reduce(getattr, path.split(".")[1:], torch)

    def is_present() -> bool:
        try:
            return is_as_expected(find())
        except AttributeError:
            return False

    INTERNALS.append(Internal(path, reason, is_present))
    return find() if is_present() else _missing


def _has_locals(*names: str) -> Callable[[Any], bool]:
    return lambda function: set(names) <= set(function.__code__.co_varnames)


# --- functions -------------------------------------------------------------------------------------------------

current_graph_task_id: Callable[[], int] = _internal(
    "torch._C._current_graph_task_id",
    "tells a forward that checkpointing repeats in the backward pass; -1 outside a backward pass",
)
is_batched_tensor: Callable[[Tensor], bool] = _internal(
    "torch._C._functorch.is_batchedtensor",
    "tells tensors inside torch.vmap, whose numbers cannot be read",
)
DisableTorchFunction: Any = _internal(
    "torch._C.DisableTorchFunction",
    "hides what capturing itself computes from an enclosing capture",
)
TensorDictionary: Any = _internal(
    "torch.utils.weak.WeakIdKeyDictionary",
    "remembers facts about tensors, by their identity, without keeping the tensors alive",
)
_internal(
    "torch.Tensor._version",
    "counts changes in place, so that an edit that changes the weights it was given is noticed",
    inspect.isdatadescriptor,
)


def unreadable(tensor: Tensor) -> str | None:
    """Return why the numbers of a tensor cannot be read one by one, to be said of an attention; None where they can."""
    if is_batched_tensor(tensor):
        return "inside torch.vmap, where it cannot be captured"
    if tensor.is_nested:
        return "on nested tensors, which cannot be captured: give it images of one size, one batch of each"
    if tensor.device.type == "meta" or "FakeTensor" in type(tensor).__name__:
        return "on the meta device, without numbers: load its weights first"
    if tensor.layout is not torch.strided or tensor.is_quantized:
        kind = "quantised" if tensor.is_quantized else "sparse"
        return (
            f"on {kind} tensors, which cannot be captured: let it compute with dense tensors of floating-point numbers"
        )
    return None


def version_of(tensor: Tensor) -> int:
    """Return how often `tensor` has been changed in place."""
    return tensor._version


_dispatch_mode = _internal(
    "torch.utils._python_dispatch.TorchDispatchMode",
    "sees what changes a tensor's memory in place, also through its .data, so that it can be changed back",
    inspect.isclass,
)
TorchDispatchMode: Any = _dispatch_mode if inspect.isclass(_dispatch_mode) else nullcontext

# --- frames of the call stack ------------------------------------------------------------------------------------

_MODULE_CALL: CodeType = _internal(
    "torch.nn.Module._call_impl",
    "is the frame of every module's call, with the module and its arguments as self, args and kwargs",
    _has_locals("self", "args", "kwargs"),
).__code__


def is_module_call(frame: FrameType) -> bool:
    return frame.f_code is _MODULE_CALL


def arguments_of(module_call: FrameType) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the named arguments of a module, from the frame of its call."""
    names = module_call.f_locals
    return names["args"], names["kwargs"]


@dataclass(frozen=True)
class MultiHeadLocals:
    """The local variables of nn.MultiheadAttention.forward, by their names there."""

    query: Tensor
    key: Tensor
    value: Tensor
    is_batched: bool
    attn_mask: Tensor | None
    key_padding_mask: Tensor | None
    need_weights: bool
    average_attn_weights: bool


_MULTI_HEAD_LOCALS = tuple(field.name for field in fields(MultiHeadLocals))
_MULTI_HEAD_FORWARD: CodeType = _internal(
    "torch.nn.MultiheadAttention.forward",
    f"has local variables from which its fast path is computed again: {', '.join(_MULTI_HEAD_LOCALS)}",
    _has_locals("self", *_MULTI_HEAD_LOCALS),
).__code__


def multi_head_frame(frame: FrameType | None) -> FrameType | None:
    """Return the first frame of nn.MultiheadAttention.forward from `frame` outwards; None if there is none."""
    while frame is not None and frame.f_code is not _MULTI_HEAD_FORWARD:
        frame = frame.f_back
    return frame


def multi_head_locals(frame: FrameType) -> MultiHeadLocals:
    names = frame.f_locals
    return MultiHeadLocals(**{name: names[name] for name in _MULTI_HEAD_LOCALS})


_internal(
    "torch.utils.checkpoint.checkpoint",
    "runs the module from a function of its own file, which shows in the call stack",
    lambda function: inspect.unwrap(function).__code__.co_filename == torch.utils.checkpoint.__file__,
)


def is_checkpointing(frame: FrameType) -> bool:
    return frame.f_code.co_filename == torch.utils.checkpoint.__file__


# --- the body of multi_head_attention_forward --------------------------------------------------------------------


def _asks_for_modes(function: Any) -> bool:
    return all("has_torch_function" in names for names in (function.__code__.co_names, function.__globals__))


def _body_of(function: Any) -> Any:
    """Return a copy of `function` that runs although a function mode is active.

    Its own first lines would hand the call back to the mode, for ever. What it calls reaches the mode like any
    model's calls.
    """
    names = function.__globals__ | {"has_torch_function": lambda tensors: False}
    return FunctionType(function.__code__, names, argdefs=function.__defaults__)


multi_head_body: Callable[..., tuple[Tensor, Tensor | None]] = _body_of(
    _internal(
        "torch.nn.functional.multi_head_attention_forward",
        "asks the global name has_torch_function whether a function mode is active, so that a copy can be told no",
        _asks_for_modes,
    )
)


# --- torch.compile -----------------------------------------------------------------------------------------------

_internal(
    "torch.nn.Module._compiled_call_impl",
    "tells a module that was compiled in place; None in others",
    lambda default: default is None,
)
_OPTIMIZED_MODULE, _ORIGINAL_MODULE = "OptimizedModule", "_orig_mod"


_HAS_DYNAMO = importlib.util.find_spec("torch._dynamo") is not None


def dynamo_is_loaded() -> bool:
    """False as long as nothing can have been compiled: torch.compile imports it, which takes seconds."""
    return "torch._dynamo" in sys.modules


def may_compile() -> bool:
    """Whether a model may run compiled code; flex_attention compiles itself when it is called first."""
    return dynamo_is_loaded() or "torch.nn.attention.flex_attention" in sys.modules


def _dynamo_is_as_expected() -> bool:
    if not dynamo_is_loaded():
        return _HAS_DYNAMO
    wrapper = getattr(sys.modules["torch._dynamo"], _OPTIMIZED_MODULE, None)
    return wrapper is not None and _ORIGINAL_MODULE in wrapper.__init__.__code__.co_names


INTERNALS.append(
    Internal(
        f"torch._dynamo.{_OPTIMIZED_MODULE}.{_ORIGINAL_MODULE}",
        "is the module that torch.compile wrapped, under whose name its layers are reported",
        _dynamo_is_as_expected,
    )
)


def is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == _OPTIMIZED_MODULE or module._compiled_call_impl is not None


def without_wrappers(name: str) -> str:
    """Return the dotted name of a module as its author writes it: the names of torch.compile's wrappers left out."""
    return ".".join(step for step in name.split(".") if step not in ("", _ORIGINAL_MODULE))
