"""Attention calls: the weights, the values, and what the model would go on with if it had other weights.

There are three ways in which models of PyTorch compute attention: the fused `scaled_dot_product_attention`, from whose
arguments the weights are rebuilt here; a softmax of scores that is later multiplied with values, which
`hand_written.py` tracks from the one to the other; and `multi_head_attention_forward`, whose body is made of these two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_visualizer.attention.function_call import FunctionCall
from attention_visualizer.attention.proof import Proof, largest
from attention_visualizer.support.double_precision import has_float64

# Of scaled_dot_product_attention: their positions and names.
QUERY_KEY_VALUE = (0, "query"), (1, "key"), (2, "value")
DROPOUT_ARGUMENT = 4, "dropout_p"

#: Whether weights were rebuilt from queries and keys, or are the very tensor that the model multiplies.
Source = Literal["rebuilt", "multiplied"]


class DeclaredHeads(NamedTuple):
    """What a module declares of its heads and its batch; None where it is not known."""

    num_heads: int | None
    batch_size: int | None


@dataclass(frozen=True)
class AttentionCall:
    """One computation of attention inside a model."""

    weights: Tensor  # [batch, head, query, key], at least float32, after softmax and before dropout, differentiable
    values: Tensor  # [batch, head, key, head_dim]
    source: Source
    #: Of weights @ values against the same product as the model computed it, dropout left out in both or in neither.
    proof: Proof
    #: Other weights of that shape -> the output passed on to the model, dropout included.
    replay: Callable[[Tensor], Tensor]
    #: The same for weights that are times so much in each head, [batch, head, 1, 1]; None where only `replay` tells.
    scale: Callable[[Tensor], Tensor] | None = None


class HeadLayout:
    """The way from [..., row, column] to [batch, head, row, column] and back.

    `num_heads` and `batch` are what the module and its input declare, None where they do not. A single leading axis is
    the batch, or batch times heads where `num_heads` divides it. Of several, the axis of that size is the heads, or all
    but the first together (groups of heads that share keys); the others count as the batch.
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
        """Undo `apply`."""
        tail = tensor.shape[-2:]
        if self.head_axis is None:
            return tensor.reshape(*self.leading, *tail)
        others = [size for axis, size in enumerate(self.leading_split) if axis != self.head_axis]
        split = tensor.reshape(*others, self.leading_split[self.head_axis], *tail)
        return split.movedim(-3, self.head_axis).reshape(*self.leading, *tail)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(-2, -1)


@dataclass(frozen=True)
class ProductForm:
    """How a product of weights and values, in whatever order of axes, becomes [..., query, key] @ [..., key, column].

    Unless others are given, the steps are those of weights @ values, which has that form.
    """

    values: Tensor  # the operand that is not the weights, as the model has it
    to_weights: Callable[[Tensor], Tensor] = _same
    from_weights: Callable[[Tensor], Tensor] = _same  # the inverse of to_weights
    to_values: Callable[[Tensor], Tensor] = _same
    to_output: Callable[[Tensor], Tensor] = _same  # from the model's own output to that of the product

    @classmethod
    def of_transposed(cls, values: Tensor) -> ProductForm:
        """Return the form of values' @ weights'."""
        return cls(values, _transposed, _transposed, _transposed, _transposed)


# --- fused attention ---------------------------------------------------------------------------------------------


def fused_dropout(call: FunctionCall) -> float:
    return call.argument(*DROPOUT_ARGUMENT, 0.0)


def random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def random_numbers(device: torch.device, state: Tensor | None) -> Iterator[None]:
    """Draw random numbers from `state` (None: the present one) inside, and restore the present state afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if state is not None and device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        elif state is not None:
            torch.set_rng_state(state)
        yield


def fused_call(heads: DeclaredHeads, output: Tensor, call: FunctionCall, before: Tensor | None = None) -> AttentionCall:
    """Describe a call of `scaled_dot_product_attention` that returned `output`.

    `before` is the random state before the call, which its dropout started from; None if it need not be repeated.
    """
    dropout = fused_dropout(call)
    expected = output
    if dropout:  # the model's own output without its random part, to compare with
        with random_numbers(output.device, None):
            expected = call.with_argument(*DROPOUT_ARGUMENT, 0.0)()

    def multiply(weights: Tensor) -> Tensor:
        with torch.autocast(values.device.type, enabled=False):  # which would round the product
            return weights.to(values.dtype) @ values

    weights, values = attention_weights(*call.args, **call.kwargs)
    dtype = weights.dtype
    proof = Proof.of(multiply(weights), expected, largest(values))
    if proof.is_reduced and has_float64(output.device):  # fused kernels keep the precision that products lose
        query, key, value = (call.argument(*each).double() for each in QUERY_KEY_VALUE)
        others = {name: given for name, given in call.kwargs.items() if name not in ("query", "key", "value")}
        weights, values = attention_weights(query, key, value, *call.args[3:], **others)
        proof = Proof.of(multiply(weights), expected, largest(values))
    values = values.expand(*weights.shape[:-2], *values.shape[-2:])
    layout = HeadLayout(weights.shape[:-2], *heads)

    def replay(other: Tensor) -> Tensor:
        with random_numbers(output.device, before):
            return multiply(F.dropout(layout.restore(other), dropout)).to(output.dtype)

    return AttentionCall(layout.apply(weights).to(dtype), layout.apply(values).to(dtype), "rebuilt", proof, replay)


def unweighted_call(heads: DeclaredHeads, output: Tensor, call: FunctionCall) -> AttentionCall:
    """Describe a call of `scaled_dot_product_attention` without dropout of which only `scale` is wanted: its weights
    are not rebuilt, only their shape and the values are known."""
    query, key, value = (call.argument(*each) for each in QUERY_KEY_VALUE)
    value = value.to(torch.promote_types(query.dtype, torch.float32))
    if value.shape[-3:-2] != output.shape[-3:-2] and call.kwargs.get("enable_gqa"):
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], dim=-3)
    layout = HeadLayout(output.shape[:-2], *heads)
    weights = value.new_zeros(()).expand(*output.shape[:-1], key.shape[-2])
    return AttentionCall(
        layout.apply(weights),
        layout.apply(value.expand(*output.shape[:-2], *value.shape[-2:])),
        "rebuilt",
        Proof(0.0, 0.0, output.dtype),
        replay=lambda other: output,
        scale=lambda factors: output * layout.restore(factors).to(output.dtype),
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
    """Return what `scaled_dot_product_attention` multiplies: weights before dropout [..., query, key], and values.

    Both are at least float32; with grouped queries, values are repeated for each query head.
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
        if attn_mask is not None and type(attn_mask) not in (Tensor, nn.Parameter):
            return weights_under(attn_mask, query, key, is_causal, scale), value
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                scores = scores.masked_fill(~attn_mask, -math.inf)
            else:
                scores = scores + attn_mask
        if not is_causal and attn_mask is None:
            return scores.softmax(dim=-1), value
        # A query that may attend to no key attends to nothing, as in the fused attention.
        return scores.softmax(dim=-1).masked_fill((scores == -math.inf).all(dim=-1, keepdim=True), 0.0), value


def weights_under(mask: Tensor, query: Tensor, key: Tensor, is_causal: bool, scale: float | None) -> Tensor:
    """Return the weights under a mask of a class of its own, such as torch.nn.attention.bias.CausalBias, which says
    itself what attention does with it: the output for values that are one in one column each."""
    identity = torch.eye(key.shape[-2], dtype=key.dtype, device=key.device).expand(*key.shape[:-1], -1)
    arguments = {"attn_mask": mask, "is_causal": is_causal, "scale": scale}
    weights = type(mask).__torch_function__(
        F.scaled_dot_product_attention, (type(mask),), (query, key, identity), arguments
    )
    return weights.as_subclass(Tensor)
