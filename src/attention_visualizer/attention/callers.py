"""Which modules are computing an attention call, read off the call stack, and what they state about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from attention_visualizer.attention.calls import DeclaredHeads, tensors_of

NUM_HEADS_ATTRIBUTES = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_head", "nheads", "nhead", "heads")
CHECKPOINT_FILE = torch.utils.checkpoint.__file__
MODULE_CALL = nn.Module._call_impl.__code__


@dataclass(frozen=True)
class Stack:
    """Who is calling: the model's modules that are running, innermost first, the outermost one's frame, the shape of
    the images that the model was called with, that of the innermost module's own input, and whether a compiled module
    or torch.utils.checkpoint is among the callers. of_text: words, as numbers, were given to a module closer to the
    call than the one with the images."""

    modules: list[nn.Module]
    outermost: FrameType | None
    images: torch.Size | None
    inputs: torch.Size | None
    compiled: bool
    checkpointed: bool
    of_text: bool


def calling_stack(names: Mapping[int, str], channels: set[int], frame: FrameType | None) -> Stack:
    """Reads the call stack from `frame` outwards. names: of the watched modules, by id; channels: of images."""
    modules: list[nn.Module] = []
    outermost, images, inputs, compiled, checkpointed, of_text = None, None, None, False, False, False
    while frame is not None:
        checkpointed = checkpointed or frame.f_code.co_filename == CHECKPOINT_FILE
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            compiled = compiled or is_compiled(owner)
            if id(owner) in names:
                outermost = frame
                if not modules or modules[-1] is not owner:
                    modules.append(owner)
                if frame.f_code is MODULE_CALL:
                    given = list(tensors_of((*frame.f_locals["args"], *frame.f_locals["kwargs"].values())))
                    images = next((tensor.shape for tensor in given if are_images(tensor, channels)), images)
                    if len(modules) == 1 and inputs is None and given:
                        inputs = given[0].shape
                    words = any(tensor.ndim == 2 and tensor.dtype in (torch.int64, torch.int32) for tensor in given)
                    of_text = of_text or (words and images is None)
        frame = frame.f_back
    return Stack(modules, outermost, images, inputs, compiled, checkpointed, of_text)


def are_images(tensor: Tensor, channels: set[int]) -> bool:
    return tensor.ndim == 4 and tensor.is_floating_point() and tensor.shape[1] in channels


def is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


def stated_heads(stack: Stack) -> DeclaredHeads:
    """The number of heads, as the calling module or the one around it states it; the batch that it was given."""
    numbers = (num_heads_of(module) for module in stack.modules[:2])
    number = next((number for number in numbers if number is not None), None)
    given = stack.inputs if stack.inputs is not None and len(stack.inputs) > 2 else stack.images
    if given is None or isinstance(stack.modules[0], nn.MultiheadAttention):  # which may put the batch second
        return number, None
    return number, given[0]


def num_heads_of(module: nn.Module) -> int | None:
    for name in NUM_HEADS_ATTRIBUTES:
        number = getattr(module, name, None)
        if isinstance(number, int) and number > 0:
            return number
    return None


def output_projection(callers: Sequence[nn.Module], values: Tensor) -> Tensor | None:
    """The weight of the linear map that is applied to the heads' outputs, where its name and its size say so.

    callers: the modules that compute the attention, innermost first; in some models of Hugging Face the map belongs to
    the second.
    """
    module = callers[0]
    candidates = [getattr(module, name, None) for name in ("proj", "out_proj", "o_proj", "to_out", "c_proj")]
    candidates += [getattr(getattr(parent, "output", None), "dense", None) for parent in callers[:2]]
    for found in candidates:
        found = found[0] if isinstance(found, nn.Sequential) and len(found) else found
        weight = getattr(found, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[1] == values.shape[1] * values.shape[3]:
            return weight
    return None


def fast_path_output(frame: FrameType, names: Mapping[int, str]) -> Any:
    """What nn.MultiheadAttention computes where it takes its fast path, which it leaves while a function mode is on.

    frame: of its forward. None where it would not have taken it.
    """
    module, given = frame.f_locals.get("self"), frame.f_locals
    if not isinstance(module, nn.MultiheadAttention) or id(module) not in names or module.training:
        return None
    if not (given.get("query") is given["key"] is given["value"] and given["is_batched"] and module.batch_first):
        return None
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters()):
        return None
    # It has turned its arguments by now; those of its call, if they were its own, are as they were.
    call: FrameType | None = frame
    while call is not None and not (call.f_code is MODULE_CALL and call.f_locals["self"] is module):
        call = call.f_back
    arguments, options = (given["query"].transpose(0, 1),) * 3, {}
    if call is not None and type(module).forward is nn.MultiheadAttention.forward:
        arguments, options = call.f_locals["args"], call.f_locals["kwargs"]
    elif given["attn_mask"] is None and given["key_padding_mask"] is None:
        options = {name: given[name] for name in ("need_weights", "average_attn_weights")}
    else:
        return None
    with torch._C.DisableTorchFunction():
        output, weights = nn.MultiheadAttention.forward(module, *arguments, **options)
    return output.transpose(0, 1), weights


def leaves_fast_path(module: nn.Module) -> bool:
    """Whether watching makes `module` compute its attention in another way than it does unwatched."""
    if not isinstance(module, nn.TransformerEncoderLayer) or module.training or not module.self_attn.batch_first:
        return False
    return not (torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters()))
