"""How PyTorch models compute attention, each way as one AttentionCall: its weights, and what other weights would give.

There are three: the fused `scaled_dot_product_attention`, from whose arguments the weights are rebuilt; attention
written by hand, a softmax of scores that is later multiplied with values, found by following tensors from one to the
other; and `multi_head_attention_forward`, whose body is made of the first two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Source = Literal["rebuilt", "multiplied"]
DeclaredHeads = tuple[
    int | None, int | None
]  # number of heads, and the batch that the module was given; None: not known


@dataclass(frozen=True)
class AttentionCall:
    """One computation of attention inside a model.

    weights: [batch, head, query, key], at least float32, after softmax and before dropout, differentiable.
    values: [batch, head, key, head_dim].
    source: "rebuilt" from queries and keys, or "multiplied": the very tensor that the model multiplies.
    product: of weights and values; expected: the same as the model computed it. Dropout is left out of both, or in
    both. magnitude: of the numbers that are summed, to judge a difference by.
    replay: other weights of the same shape -> what the model then goes on with, its dropout included.
    """

    weights: Tensor
    values: Tensor
    source: Source
    product: Tensor
    expected: Tensor
    magnitude: float
    replay: Callable[[Tensor], Tensor]


def largest(values: Tensor) -> float:
    """The largest magnitude; NaN if there is one, 0 of nothing."""
    if not values.numel():
        return 0.0
    low, high = torch.aminmax(values.detach())  # one pass and no copy, unlike abs().max()
    return abs(float(torch.maximum(-low, high)))


class HeadLayout:
    """Brings [..., row, column] into [batch, head, row, column] and back.

    num_heads, batch: as the module and its input state them, None where they do not. One leading axis is the batch,
    or batch times heads where `num_heads` divides it; of several, the one of that size is the heads, or all but the
    first together (groups of heads that share keys), and the others count as the batch.
    """

    def __init__(self, leading: Sequence[int], num_heads: int | None, batch: int | None = None) -> None:
        self.leading = tuple(leading)
        split = self.leading
        if num_heads is not None and num_heads > 1:
            if len(split) == 1 and split[0] % num_heads == 0 and split[0] != batch:
                split = (split[0] // num_heads, num_heads)
            elif num_heads not in split[1:] and math.prod(split[1:]) == num_heads:
                split = (split[0], num_heads)
            elif len(split) > 1 and num_heads not in split and batch is not None and split[0] == batch * num_heads:
                split = (batch, num_heads, *split[1:])  # blocks of an image follow
        self.leading_split = split
        fitting = [axis for axis, size in enumerate(split) if axis > 0 and size == num_heads]
        self.head_axis: int | None = len(split) - 1
        if fitting:
            self.head_axis = fitting[-1]
        elif len(split) < 2 or num_heads == 1:
            self.head_axis = None
        elif split[0] == num_heads and split[1] == batch:
            self.head_axis = 0

    def apply(self, tensor: Tensor) -> Tensor:
        tail = tensor.shape[-2:]
        tensor = tensor.expand(*self.leading, *tail)
        if self.head_axis is None:
            return tensor.reshape(-1 if tensor.numel() else math.prod(self.leading), 1, *tail)
        split = tensor.reshape(*self.leading_split, *tail).movedim(self.head_axis, -3)
        others = math.prod(split.shape[:-3])
        return split.reshape(others, *split.shape[-3:])

    def restore(self, tensor: Tensor) -> Tensor:
        """The inverse of `apply`."""
        tail = tensor.shape[-2:]
        if self.head_axis is None:
            return tensor.reshape(*self.leading, *tail)
        others = [size for axis, size in enumerate(self.leading_split) if axis != self.head_axis]
        split = tensor.reshape(*others, self.leading_split[self.head_axis], *tail)
        return split.movedim(-3, self.head_axis).reshape(*self.leading, *tail)


# --- fused -----------------------------------------------------------------------------------------------------


def fused_dropout(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    return args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)


def random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def random_numbers(device: torch.device, state: Tensor | None) -> Iterator[None]:
    """Inside, random numbers follow `state` (None: the present one); afterwards they go on as if nothing was drawn."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if state is not None and device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        elif state is not None:
            torch.set_rng_state(state)
        yield


def fused_call(
    heads: DeclaredHeads, output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], before: Tensor | None = None
) -> AttentionCall:
    """From the arguments of `scaled_dot_product_attention` and its output. before: the random state of its dropout."""
    weights, values = attention_weights(*args, **kwargs)
    layout = HeadLayout(weights.shape[:-2], *heads)
    values = values.expand(*weights.shape[:-2], *values.shape[-2:])
    dropout = fused_dropout(args, kwargs)
    expected = output
    if dropout:  # the model's own output without its random part, to compare with
        args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
        kwargs = kwargs if len(args) > 4 else {**kwargs, "dropout_p": 0.0}
        with random_numbers(output.device, None):
            expected = F.scaled_dot_product_attention(*args, **kwargs)

    def multiply(weights: Tensor) -> Tensor:
        with torch.autocast(values.device.type, enabled=False):  # which would round the product
            return weights @ values

    def replay(other: Tensor) -> Tensor:
        with random_numbers(output.device, before):
            return multiply(F.dropout(layout.restore(other), dropout)).to(output.dtype)

    return AttentionCall(
        layout.apply(weights), layout.apply(values), "rebuilt", multiply(weights), expected, largest(values), replay
    )


def attention_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """What `scaled_dot_product_attention` multiplies, for its arguments: (weights before dropout, values).

    Both at least float32; with grouped queries, values are repeated for each query head.
    """
    with torch.autocast(query.device.type, enabled=False):
        dtype = torch.promote_types(query.dtype, torch.float32)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if enable_gqa:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
            value = value.repeat_interleave(query.shape[-3] // value.shape[-3], dim=-3)
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        # Contiguous heads multiply in less than half the time, copies included; and a layer that is kept keeps its
        # values alone, not the queries and keys that they were projected together with.
        value = value.contiguous()
        scores = (query.contiguous() @ key.contiguous().transpose(-2, -1)).mul_(scale)
        if is_causal:
            causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~causal, -math.inf)
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                scores = scores.masked_fill(~attn_mask, -math.inf)
            else:
                scores = scores + attn_mask
        if not is_causal and attn_mask is None:
            return scores.softmax(dim=-1), value
        # A query that may look at no key attends to nothing, as in the fused attention.
        return scores.softmax(dim=-1).masked_fill((scores == -math.inf).all(dim=-1, keepdim=True), 0.0), value


# --- multi-head ------------------------------------------------------------------------------------------------

# The body of multi_head_attention_forward, entered although a function mode is active: its own first lines would hand
# the call back to the mode. What it calls is seen by the mode like any model's calls.
multi_head_body = FunctionType(
    F.multi_head_attention_forward.__code__,
    F.multi_head_attention_forward.__globals__ | {"has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


# --- arguments ---------------------------------------------------------------------------------------------------


def replace_tensor(arguments: Any, old: Tensor, new: Any) -> Any:
    """Arguments with `new` in place of `old`, also inside lists, tuples and dictionaries."""
    if isinstance(arguments, dict):
        return {name: replace_tensor(value, old, new) for name, value in arguments.items()}
    if isinstance(arguments, tuple | list):
        return type(arguments)(replace_tensor(value, old, new) for value in arguments)
    return new if arguments is old else arguments


def tensors_of(arguments: Any) -> Iterator[Tensor]:
    """The tensors among arguments, and in lists and tuples among them."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, tuple | list):
            yield from tensors_of(argument)
