"""Attention that a model writes out, softmax(query @ key) @ value: tensors are tracked from the scores to the product.

The weights are the very tensor that the model multiplies, whatever it did to them after the softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_visualizer.attention.calls import AttentionCall, DeclaredHeads, HeadLayout, ProductForm
from attention_visualizer.attention.einsum import einsum_form, einsum_labels
from attention_visualizer.attention.function_call import FunctionCall, tensors_of
from attention_visualizer.attention.proof import Proof, largest
from attention_visualizer.attention.torch_internals import DisableTorchFunction, TensorDictionary

SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax, torch.sparse.softmax}
PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.linalg.matmul}
PRODUCTS |= {torch.bmm, Tensor.bmm, torch.mm, Tensor.mm, torch.sparse.mm}
REVERSED_PRODUCTS = {Tensor.__rmatmul__}
MATRIX_PRODUCTS = PRODUCTS | REVERSED_PRODUCTS
SCORES = MATRIX_PRODUCTS | {torch.einsum, torch.baddbmm, Tensor.baddbmm, torch.cdist}
DROPOUT = {F.dropout, torch.dropout}
NORMS = {F.layer_norm, F.group_norm, F.rms_norm}
LEARNT_MAPS = {F.linear, F.conv1d, F.conv2d, F.conv3d}
REORDERINGS = {
    getattr(namespace, name)
    for namespace in (torch, Tensor)
    for name in ("transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "t", "adjoint")
}
REORDERINGS |= {Tensor.transpose_, Tensor.swapaxes_, Tensor.swapdims_, Tensor.t_}
REORDERINGS |= {getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH")}


@dataclass(frozen=True)
class TrackedTensor:
    """State of a tensor that is tracked from the score product to the value product."""

    kind: Literal["scores", "weights"]  # scores come from a product, weights from their softmax
    key_axis: int | None  # counted from 0; None for scores that were reshaped
    before: Tensor | None = None  # where there was dropout: the weights without it,
    mask: Tensor | None = None  # and what it multiplied them with


class TrackedArgument(NamedTuple):
    """An argument of a call that is being tracked."""

    tensor: Tensor
    state: TrackedTensor


@dataclass(frozen=True)
class HandWrittenProduct:
    """A call that multiplies tracked weights with values."""

    call: FunctionCall
    weights: TrackedArgument
    form: ProductForm

    def describe(self, heads: DeclaredHeads, output: Tensor) -> AttentionCall:
        """Describe the call, which returned `output`."""
        multiplied, (before, mask) = self.weights.tensor, (self.weights.state.before, self.weights.state.mask)
        dropped = multiplied if before is None or mask is None else before * mask
        dropped = dropped if dropped.layout is torch.strided else dropped.to_dense()
        left = self.form.to_weights(dropped)
        layout = HeadLayout(left.shape[:-2], *heads)
        dtype = torch.promote_types(multiplied.dtype, torch.float32)
        weights = layout.apply(left if before is None else self.form.to_weights(before)).to(dtype)
        values = self.form.to_values(self.form.values).to(dtype)
        values = values.expand(*left.shape[:-2], *values.shape[-2:])
        with torch.autocast(values.device.type, enabled=False):
            product = left.to(dtype) @ values

        def replay(other: Tensor) -> Tensor:
            tensor = self.form.from_weights(layout.restore(other)).to(multiplied.dtype)
            return self.call.replaced(multiplied, tensor if mask is None else tensor * mask)()

        # Weights that were mixed between heads need not be shares: their rows can sum to more than one.
        magnitude = largest(values) * max(1.0, largest(left.detach().abs().sum(dim=-1)))
        proof = Proof.of(product, self.form.to_output(output), magnitude)
        return AttentionCall(weights, layout.apply(values), "multiplied", proof, replay)


class HandWrittenAttention:
    """Track tensors through a model's calls: scores -> softmax -> ... -> product with values.

    None of the tensors is kept alive: they die as early as they would without being tracked.
    """

    def __init__(self) -> None:
        self.tracked: Any = TensorDictionary()  # Tensor -> TrackedTensor

    def concerns(self, function: Callable[..., Any]) -> bool:
        """Whether calls of `function` are of interest: any, while tensors are tracked, and else products alone."""
        return function in SCORES or bool(self.tracked)

    def before(self, call: FunctionCall) -> HandWrittenProduct | TrackedArgument | None:
        """Return what is known of a call that is going to run: that it multiplies weights with values, or else which
        of its arguments is tracked."""
        argument = self._tracked_argument(call)
        if argument is None or argument.state.kind == "scores":
            return argument
        if call.function in DROPOUT:
            return TrackedArgument(argument.tensor, _state_after_dropout(call, argument))
        form = self._product_form(call, argument) if call.function in SCORES else None
        return argument if form is None else HandWrittenProduct(call, argument, form)

    def after(self, call: FunctionCall, argument: TrackedArgument | None, output: Any) -> None:
        """Track what came out of a call; `argument` is what `before` returned."""
        function, kind = call.function, None if argument is None else argument.state.kind
        if function in SOFTMAX:
            if kind == "scores":
                self.tracked[output] = TrackedTensor("weights", _softmax_axis(call, output))
        elif function in SCORES and kind != "weights":
            learnt = any(isinstance(tensor, nn.Parameter) for tensor in call.tensors())
            if not learnt and isinstance(output, Tensor) and output.ndim >= 2 and output.is_floating_point():
                self.tracked[output] = TrackedTensor("scores", _key_axis_of_scores(call, output))
        elif argument is not None and function in DROPOUT and kind == "weights":
            self.tracked[output] = argument.state
        elif argument is not None and not (kind == "scores" and _makes_features(call, argument)):
            self._track_results(call, argument, output)

    def _tracked_argument(self, call: FunctionCall) -> TrackedArgument | None:
        """Return the first argument that is tracked; weights come before scores."""
        scores = None
        for tensor in call.tensors():
            state = self.tracked.get(tensor)
            if state is not None and state.kind == "weights":
                return TrackedArgument(tensor, state)
            if state is not None and scores is None:
                scores = TrackedArgument(tensor, state)
        return scores

    def _product_form(self, call: FunctionCall, argument: TrackedArgument) -> ProductForm | None:
        """Return the form of a product of tracked weights with values, over the keys; None of any other product."""
        weights, key_axis = argument.tensor, argument.state.key_axis
        if call.function is torch.einsum:
            return None if key_axis is None else einsum_form(call, weights, key_axis)
        operands = _matrices(call)
        if operands is None or all(self._is_weights(operand) for operand in operands):
            return None  # a product of attentions is itself one
        left, right = operands
        if left is weights and key_axis == weights.ndim - 1:
            return ProductForm(right)
        if right is weights and key_axis == weights.ndim - 2:
            return ProductForm.of_transposed(left)
        return None

    def _is_weights(self, tensor: Tensor) -> bool:
        state = self.tracked.get(tensor)
        return state is not None and state.kind == "weights"

    def _track_results(self, call: FunctionCall, argument: TrackedArgument, output: Any) -> None:
        """Track what a call that is neither softmax, product nor dropout made of a tracked tensor."""
        tensor, state = argument
        in_place = output is tensor or (output is None and call.args and call.args[0] is tensor)

        def tensors_in(returned: Any) -> list[Tensor]:
            if in_place:
                return [tensor]
            return list(tensors_of(returned if isinstance(returned, tuple | list) else (returned,)))

        results = tensors_in(output)
        parts: list[tuple[Tensor | None, ...]] = [(state.before, state.mask)] * len(results)
        if state.before is not None and state.mask is not None:  # the same step without dropout
            alone = [part.clone() if in_place else part for part in (state.before, state.mask)]
            with DisableTorchFunction():
                returned = [call.replaced(tensor, part)() for part in alone]
            parts = [tuple(alone)] if in_place else list(zip(*map(tensors_in, returned), strict=True))
        for result, (before, mask) in zip(results, parts, strict=False):
            axis = self._key_axis_after(call, argument, result)
            if (axis is not None or state.kind == "scores") and result.is_floating_point():
                self.tracked[result] = TrackedTensor(state.kind, axis, before, mask)

    # --- where the keys go: a rule for each kind of call -----------------------------------------------------------

    def _key_axis_after(self, call: FunctionCall, argument: TrackedArgument, result: Tensor) -> int | None:
        """Return where the keys are in `result`; None where they have been mixed or lost."""
        tensor, key_axis = argument.tensor, argument.state.key_axis
        if key_axis is None:
            return None
        if call.function in REORDERINGS:
            return _axis_after_reordering(call, tensor, key_axis)
        if call.function is torch.einsum:
            labels = einsum_labels(call)
            return None if labels is None else labels.axis_after(tensor, key_axis)
        if call.function in MATRIX_PRODUCTS:
            return self._axis_after_product(call, tensor, key_axis, result)
        if argument.state.kind == "scores" and not _keeps_rows_of_scores(tensor, key_axis, result):
            return None
        if result.ndim == tensor.ndim:
            return _axis_after_same_ndim(tensor, key_axis, result)
        return _axis_after_reshape(tensor, key_axis, result)

    def _axis_after_product(self, call: FunctionCall, tensor: Tensor, axis: int, result: Tensor) -> int | None:
        """Follow the keys of weights through a product with what is no values: a mixing of heads, or other weights."""
        operands = _matrices(call)
        if operands is None:
            return None
        left, right = operands
        if left is tensor and axis == tensor.ndim - 1:
            of_keys = self._is_weights(right) and self.tracked[right].key_axis == right.ndim - 1
            return result.ndim - 1 if of_keys else None
        if right is tensor and axis == tensor.ndim - 2:
            return None
        return result.ndim + axis - tensor.ndim


def _axis_after_reordering(call: FunctionCall, tensor: Tensor, axis: int) -> int:
    marker = torch.empty(tuple(range(2, 2 + tensor.ndim)), device="meta")  # sizes that tell where an axis goes
    with DisableTorchFunction():
        moved = call.replaced(tensor, marker)()
    return list(moved.shape).index(2 + axis)


def _keeps_rows_of_scores(tensor: Tensor, axis: int, result: Tensor) -> bool:
    """Whether the queries and keys at the end of scores are unchanged."""
    end = min(axis - tensor.ndim, -2)
    return result.shape[end:] == tensor.shape[end:]


def _axis_after_same_ndim(tensor: Tensor, axis: int, result: Tensor) -> int | None:
    """Keep the axis, unless it was reduced to a single element."""
    return None if result.shape[axis] == 1 and tensor.shape[axis] > 1 else axis


def _axis_after_reshape(tensor: Tensor, axis: int, result: Tensor) -> int | None:
    """Count the axis from the end: what is there, unchanged, stays there after a reshape or an index."""
    from_end = axis - tensor.ndim
    is_unchanged = result.shape[from_end:] == tensor.shape[from_end:]
    return result.ndim + from_end if is_unchanged and result.ndim >= -from_end else None


# --- functions ---------------------------------------------------------------------------------------------------


def _matrices(call: FunctionCall) -> tuple[Tensor, Tensor] | None:
    """Return the left and the right operand of a product of matrices; None for other calls and for vectors."""
    operands = list(call.tensors())
    if len(operands) != 2 or call.function not in MATRIX_PRODUCTS:
        return None
    if min(operand.ndim for operand in operands) < 2:
        return None
    return (operands[0], operands[1]) if call.function in PRODUCTS else (operands[1], operands[0])


def _key_axis_of_scores(call: FunctionCall, scores: Tensor) -> int:
    """Return where the keys of scores are: last, in an einsum the last axis that one operand alone has."""
    labels = einsum_labels(call) if call.function is torch.einsum else None
    axis = None if labels is None else labels.last_axis_of_one_operand()
    return scores.ndim - 1 if axis is None else axis


def _makes_features(call: FunctionCall, scores: TrackedArgument) -> bool:
    """Whether what a call makes of scores are no scores any more: a norm, or a learnt map that mixes more than heads.

    The products of linear attention lead into such a map; what the next layer makes of it has nothing to do with them.
    """
    if call.function not in LEARNT_MAPS:
        return call.function in NORMS
    weight = call.argument(1, "weight")
    return scores.state.key_axis is None or scores.state.key_axis == scores.tensor.ndim - (weight.ndim - 1)


def _softmax_axis(call: FunctionCall, output: Tensor) -> int:
    axis = call.argument(1, "dim")
    if axis is None:  # the choice of torch.nn.functional.softmax
        return 0 if output.ndim in (0, 1, 3) else 1
    return axis % output.ndim


def _state_after_dropout(call: FunctionCall, weights: TrackedArgument) -> TrackedTensor:
    """Return the state of weights after a dropout that is going to run, its mask drawn from the same random numbers."""
    tensor, state = weights
    probability = call.argument(1, "p", 0.5)
    training = call.argument(2, "training", call.kwargs.get("train", True))
    if not (training and 0 < probability <= 1):
        return state
    in_place = call.argument(3, "inplace", False)
    devices = [tensor.device.index] if tensor.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), DisableTorchFunction():
        mask = F.dropout(torch.ones_like(tensor, requires_grad=False), probability)
    return replace(state, before=tensor.clone() if in_place else tensor, mask=mask)
