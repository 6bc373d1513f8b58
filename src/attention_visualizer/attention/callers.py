"""The modules that are computing an attention call, read off the call stack, and what they declare about it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from attention_visualizer.attention.calls import DeclaredHeads
from attention_visualizer.attention.function_call import FunctionCall, tensors_of
from attention_visualizer.attention.torch_internals import (
    DisableTorchFunction,
    arguments_of,
    is_checkpointing,
    is_compiled,
    is_module_call,
    multi_head_locals,
)

MAX_CHANNELS = 16  # of images; more are features
NUM_HEADS_ATTRIBUTES = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_head", "nheads", "nhead", "heads")


@dataclass(frozen=True)
class Stack:
    """Summary of the call stack around an attention call."""

    modules: list[nn.Module]  # of the model, those that are running, innermost first
    outermost: FrameType | None  # frame of the last of them
    #: The outermost call with what may be images, and its module; None if there is none.
    call: FunctionCall | None
    owner: nn.Module | None
    inputs: torch.Size | None  # shape of the innermost module's first tensor
    is_compiled: bool  # a compiled module is among the callers
    is_checkpointed: bool  # torch.utils.checkpoint is among the callers
    is_text: bool  # a module closer to the call than the one with the images received token ids

    @property
    def images(self) -> list[torch.Size]:
        """The sizes of what may be images among the arguments, [image, channel, height, width] each."""
        return [] if self.call is None else [each.shape for each in self.call.tensors() if may_be_images(each)]

    @property
    def num_images(self) -> int | None:
        return self.images[0][0] if self.images else None


@dataclass(frozen=True)
class MethodCall:
    """A method of a module that was called with images, beside the module's own call."""

    frame: FrameType
    owner: nn.Module
    call: FunctionCall


def calling_stack(names: Mapping[int, str], frame: FrameType | None, method: MethodCall | None = None) -> Stack:
    """Read the call stack from `frame` outwards. `names` are those of the model's modules, by their id; `method` is the
    last call of a method with images, whose arguments its frame may have replaced since."""
    modules: list[nn.Module] = []
    outermost, images_call, images_owner, inputs = None, None, None, None
    compiled, checkpointed, text = False, False, False
    while frame is not None:
        checkpointed = checkpointed or is_checkpointing(frame)
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            compiled = compiled or is_compiled(owner)
            if id(owner) in names:
                outermost = frame
                if not modules or modules[-1] is not owner:
                    modules.append(owner)
                if is_module_call(frame):
                    args, kwargs = arguments_of(frame)
                    tensors = list(tensors_of((*args, *kwargs.values())))
                    if any(may_be_images(tensor) for tensor in tensors):
                        images_call, images_owner = FunctionCall(owner, args, kwargs), owner
                    if len(modules) == 1 and inputs is None and tensors:
                        inputs = tensors[0].shape
                    token_ids = any(each.ndim == 2 and each.dtype in (torch.int64, torch.int32) for each in tensors)
                    text = text or (token_ids and images_call is None)
                elif method is not None and frame is method.frame:
                    images_call, images_owner = method.call, method.owner
        frame = frame.f_back
    return Stack(modules, outermost, images_call, images_owner, inputs, compiled, checkpointed, text)


def method_call(
    names: Mapping[int, str], frame: FrameType | None, images: Tensor, known: MethodCall | None
) -> MethodCall | None:
    """Return the outermost method of the model's modules that was called with `images` themselves, while it has just
    begun; None where a module's own call has them. `known`, if it is running still: what it handles are features."""
    found = None
    while frame is not None:
        if known is not None and frame is known.frame:
            return known
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            if is_module_call(frame):
                if any(tensor is images for tensor in tensors_of(arguments_of(frame)[0])):
                    found = None
            elif frame.f_code.co_name != "forward" or frame.f_back is None or not is_module_call(frame.f_back):
                call = call_of(frame, owner)
                if call is not None and any(tensor is images for tensor in call.tensors()):
                    found = MethodCall(frame, owner, call)
        frame = frame.f_back
    return found


def call_of(frame: FrameType, owner: nn.Module) -> FunctionCall | None:
    """Return the call of a method, from the frame in which it has just begun; None where it is no plain method."""
    code = frame.f_code
    function = getattr(owner, code.co_name, None)
    if function is None or getattr(inspect.unwrap(function), "__code__", None) is not code:  # decorated ones, too
        return None
    given = frame.f_locals
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    rest = code.co_varnames[len(names) : len(names) + bool(code.co_flags & 4) + bool(code.co_flags & 8)]
    if any(name not in given for name in (*names, *rest)):
        return None
    kwargs = {name: given[name] for name in names[code.co_argcount :]}
    args: tuple[Any, ...] = tuple(given[name] for name in names[1 : code.co_argcount])
    for name in rest:
        if isinstance(given[name], tuple):
            args += given[name]
        else:
            kwargs |= given[name]
    return FunctionCall(function, args, kwargs)


def may_be_images(tensor: Tensor) -> bool:
    """Whether a tensor has the axes of images [image, channel, height, width]."""
    return tensor.ndim == 4 and 0 < tensor.shape[1] <= MAX_CHANNELS and tensor.dtype != torch.bool and len(tensor) > 0


def innermost_name(names: Mapping[int, str], frame: FrameType | None) -> str | None:
    """Return the name of the first module of the model from `frame` outwards; None outside all of them."""
    while frame is not None:
        name = names.get(id(frame.f_locals.get("self")))
        if name is not None:
            return name
        frame = frame.f_back
    return None


def declared_heads(stack: Stack) -> DeclaredHeads:
    """Return the number of heads that the calling module or the one around it declares, and its batch size."""
    declared = (num_heads_of(module) for module in stack.modules[:2])
    num_heads = next((number for number in declared if number is not None), None)
    batch = stack.inputs[0] if stack.inputs is not None and len(stack.inputs) > 2 else stack.num_images
    if isinstance(stack.modules[0], nn.MultiheadAttention):  # which may put the batch second
        batch = None
    return DeclaredHeads(num_heads, batch)


def num_heads_of(module: nn.Module) -> int | None:
    for name in NUM_HEADS_ATTRIBUTES:
        number = getattr(module, name, None)
        if isinstance(number, int) and number > 0:
            return number
    return None


def fast_path_output(frame: FrameType | None, names: Mapping[int, str]) -> Any:
    """Compute what nn.MultiheadAttention returns on its fast path, which it leaves while a function mode is on.

    `frame` is that of its forward. None where it would not have taken the fast path.
    """
    module = None if frame is None else frame.f_locals["self"]
    if frame is None or not isinstance(module, nn.MultiheadAttention) or id(module) not in names or module.training:
        return None
    given = multi_head_locals(frame)
    if not (given.query is given.key is given.value and given.is_batched and module.batch_first):
        return None
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters()):
        return None
    # It has transposed its arguments by now; those of its call, if they were its own, are as they were.
    call: FrameType | None = frame
    while call is not None and not (is_module_call(call) and call.f_locals["self"] is module):
        call = call.f_back
    if call is not None and type(module).forward is nn.MultiheadAttention.forward:
        args, kwargs = arguments_of(call)
    elif given.attn_mask is None and given.key_padding_mask is None:
        args = (given.query.transpose(0, 1),) * 3
        kwargs = {"need_weights": given.need_weights, "average_attn_weights": given.average_attn_weights}
    else:
        return None
    with DisableTorchFunction():
        output, weights = nn.MultiheadAttention.forward(module, *args, **kwargs)
    return output.transpose(0, 1), weights


def leaves_fast_path(module: nn.Module) -> bool:
    """Whether a function mode makes `module` compute its attention in another way than it does without one."""
    if not isinstance(module, nn.TransformerEncoderLayer) or module.training or not module.self_attn.batch_first:
        return False
    return not (torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters()))
