"""Attention that a model writes out, softmax(query @ key) @ value: tensors are followed from the scores to the product.

The weights are the very tensor that the model multiplies, whatever it did to them after the softmax.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from attention_visualizer.attention.calls import (
    AttentionCall,
    DeclaredHeads,
    HeadLayout,
    largest,
    replace_tensor,
    tensors_of,
)

SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax}
PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.linalg.matmul}
PRODUCTS |= {torch.bmm, Tensor.bmm, torch.mm, Tensor.mm}
REVERSED_PRODUCTS = {Tensor.__rmatmul__}
SCORES = PRODUCTS | REVERSED_PRODUCTS | {torch.einsum, torch.baddbmm, Tensor.baddbmm, torch.cdist}
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
    """What is known of a tensor on its way: "scores" come from a product, "weights" from their softmax.

    key_axis: counted from 0, None of scores that were reshaped. Where there was dropout, `before` are the weights
    without it and `mask` what it multiplied them with.
    """

    kind: Literal["scores", "weights"]
    key_axis: int | None
    before: Tensor | None = None
    mask: Tensor | None = None


class HandWrittenAttention:
    """Follows tensors through a model's calls: scores -> softmax -> ... -> product with values.

    Of the tensors themselves nothing is held: they may die as they would unwatched.
    """

    def __init__(self) -> None:
        self.known: Any = WeakIdKeyDictionary()

    def followed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, TrackedTensor] | None:
        """The first argument that is being followed; weights come before scores."""
        found = None
        if not self.known:
            return None
        for argument in tensors_of((*args, *kwargs.values())):
            known = self.known.get(argument)
            if known is not None and (found is None or known.kind == "weights"):
                found = argument, known
                if known.kind == "weights":
                    break
        return found

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls `function` and follows what comes out of it."""
        found = self.followed(args, kwargs)
        if found is not None and function in DROPOUT and found[1].kind == "weights":
            output, known = self._dropout(function, found[0], found[1], args, kwargs)
            self.known[output] = known
            return output
        output = function(*args, **kwargs)
        if function in SOFTMAX:
            if found is not None and found[1].kind == "scores":
                self.known[output] = TrackedTensor("weights", softmax_axis(output, args, kwargs))
        elif function in SCORES and (found is None or found[1].kind == "scores"):
            learnt = any(isinstance(tensor, nn.Parameter) for tensor in tensors_of((*args, *kwargs.values())))
            if not learnt and isinstance(output, Tensor) and output.ndim >= 2 and output.is_floating_point():
                self.known[output] = TrackedTensor("scores", score_axis(function, output, args))
        elif found is not None and not (found[1].kind == "scores" and _makes_features(function, found, args, kwargs)):
            self._follow(function, *found, output, args, kwargs)
        return output

    def _follow(
        self,
        function: Callable[..., Any],
        tensor: Tensor,
        known: TrackedTensor,
        output: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        def results_of(step: Any) -> list[Tensor]:
            return [tensor] if in_place else list(tensors_of(step if isinstance(step, tuple | list) else (step,)))

        in_place = output is tensor or (output is None and args and args[0] is tensor)
        results = results_of(output)
        parts: list[tuple[Tensor | None, ...]] = [(known.before, known.mask)] * len(results)
        if known.before is not None and known.mask is not None:  # the same step without dropout
            alone = [part.clone() if in_place else part for part in (known.before, known.mask)]
            with torch._C.DisableTorchFunction():
                steps = [
                    function(*replace_tensor(args, tensor, part), **replace_tensor(kwargs, tensor, part))
                    for part in alone
                ]
            parts = [tuple(alone)] if in_place else list(zip(*map(results_of, steps), strict=True))
        for result, (before, mask) in zip(results, parts, strict=False):
            axis = self._key_axis_after(function, tensor, known, result, args, kwargs)
            if (axis is not None or known.kind == "scores") and result.is_floating_point():
                self.known[result] = TrackedTensor(known.kind, axis, before, mask)

    def _dropout(
        self,
        function: Callable[..., Any],
        tensor: Tensor,
        known: TrackedTensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, TrackedTensor]:
        share = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
        training = args[2] if len(args) > 2 else kwargs.get("training", kwargs.get("train", True))
        if not (training and share > 0):
            return function(*args, **kwargs), known
        in_place = args[3] if len(args) > 3 else kwargs.get("inplace", False)
        before = tensor.clone() if in_place else tensor
        devices = [tensor.device.index] if tensor.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch._C.DisableTorchFunction():  # the same random numbers twice
            mask = F.dropout(torch.ones_like(tensor, requires_grad=False), share)
        return function(*args, **kwargs), TrackedTensor("weights", known.key_axis, before, mask)

    def _key_axis_after(
        self,
        function: Callable[..., Any],
        tensor: Tensor,
        known: TrackedTensor,
        result: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> int | None:
        """Where the keys are in `result`; None where they have been mixed or lost."""
        if known.key_axis is None:
            return None
        if function in REORDERINGS:
            # Sizes that are all different tell where an axis goes.
            marker = torch.empty(tuple(range(2, 2 + tensor.ndim)), device="meta")
            with torch._C.DisableTorchFunction():
                moved = function(*replace_tensor(args, tensor, marker), **replace_tensor(kwargs, tensor, marker))
            return list(moved.shape).index(2 + known.key_axis)
        if function is torch.einsum:
            parsed = einsum_labels(args)
            if parsed is None:
                return None
            for labels, operand in zip(parsed.inputs, parsed.operands, strict=True):
                if operand is tensor:
                    label = labels[known.key_axis]
                    return parsed.output.index(label) if label in parsed.output else None
            return None
        if function in PRODUCTS or function in REVERSED_PRODUCTS:
            return self._key_axis_of_product(tensor, known.key_axis, result, product_operands(function, args, kwargs))
        from_end = known.key_axis - tensor.ndim
        if known.kind == "scores" and result.shape[min(from_end, -2) :] != tensor.shape[min(from_end, -2) :]:
            return None
        if result.ndim == tensor.ndim:
            axis = known.key_axis
            return None if result.shape[axis] == 1 and tensor.shape[axis] > 1 else axis
        # A reshaping or an index: what is at the end, unchanged, stays there.
        same_end = result.shape[from_end:] == tensor.shape[from_end:]
        return result.ndim + from_end if same_end and result.ndim >= -from_end else None

    def _key_axis_of_product(
        self, tensor: Tensor, key_axis: int, result: Tensor, operands: tuple[Tensor, Tensor] | None
    ) -> int | None:
        """Of weights that were multiplied with something that are no values: a mixing of heads, or other weights."""
        if operands is None or min(operand.ndim for operand in operands) < 2:
            return None
        left, right = operands
        if left is tensor and key_axis == tensor.ndim - 1:
            other = self.known.get(right)
            of_weights = other is not None and other.kind == "weights" and other.key_axis == right.ndim - 1
            return result.ndim - 1 if of_weights else None
        if right is tensor and key_axis == tensor.ndim - 2:
            return None
        return result.ndim + key_axis - tensor.ndim

    def product(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> HandWrittenProduct | None:
        """The product of followed weights with values, over the keys, if `function` is going to compute one."""
        if function not in SCORES:
            return None
        found = self.followed(args, kwargs)
        if found is None or found[1].kind != "weights":
            return None
        tensor, known = found
        if function is torch.einsum:
            return einsum_product(tensor, known, args)
        operands = product_operands(function, args, kwargs)
        if operands is None or min(operand.ndim for operand in operands) < 2:
            return None
        left, right = operands
        if all(operand in self.known and self.known[operand].kind == "weights" for operand in operands):
            return None  # a product of attentions, itself one
        if left is tensor and known.key_axis == tensor.ndim - 1:
            return HandWrittenProduct(tensor, known, _same, right, _same, _same, _same)
        if right is tensor and known.key_axis == tensor.ndim - 2:  # values' @ weights'
            return HandWrittenProduct(tensor, known, _transposed, left, _transposed, _transposed, _transposed)
        return None


@dataclass(frozen=True)
class HandWrittenProduct:
    """The operands of a product, and how each is brought into the form [..., query, key] @ [..., key, column].

    to_output brings the model's own output into the form of that product; from_weights is to_weights' inverse.
    """

    tensor: Tensor
    known: TrackedTensor
    to_weights: Callable[[Tensor], Tensor]
    other: Tensor
    to_values: Callable[[Tensor], Tensor]
    to_output: Callable[[Tensor], Tensor]
    from_weights: Callable[[Tensor], Tensor]

    def call(
        self,
        heads: DeclaredHeads,
        function: Callable[..., Any],
        output: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> AttentionCall:
        multiplied, before, mask = self.tensor, self.known.before, self.known.mask
        dropped = multiplied if before is None or mask is None else before * mask
        form = self.to_weights(dropped)
        layout = HeadLayout(form.shape[:-2], *heads)
        dtype = torch.promote_types(multiplied.dtype, torch.float32)
        weights = layout.apply(form if before is None else self.to_weights(before)).to(dtype)
        values = self.to_values(self.other).to(dtype)
        values = values.expand(*form.shape[:-2], *values.shape[-2:])
        with torch.autocast(values.device.type, enabled=False):
            product = form.to(dtype) @ values

        def replay(other: Tensor) -> Tensor:
            tensor = self.from_weights(layout.restore(other)).to(multiplied.dtype)
            tensor = tensor if mask is None else tensor * mask
            return function(*replace_tensor(args, multiplied, tensor), **replace_tensor(kwargs, multiplied, tensor))

        # Weights that were mixed between heads need not be shares: their rows can sum to more than one.
        magnitude = largest(values) * max(1.0, largest(form.detach().abs().sum(dim=-1)))
        return AttentionCall(
            weights, layout.apply(values), "multiplied", product, self.to_output(output), magnitude, replay
        )


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(-2, -1)


@dataclass(frozen=True)
class EinsumLabels:
    inputs: list[str]
    output: str
    operands: list[Tensor]


def einsum_labels(args: tuple[Any, ...]) -> EinsumLabels | None:
    """The letters of an einsum of tensors, "..." written out; None for the form with lists of numbers."""
    if not isinstance(args[0], str):
        return None
    operands = list(args[1]) if isinstance(args[1], tuple | list) else list(args[1:])
    left, arrow, output = args[0].replace(" ", "").partition("->")
    inputs = left.split(",")
    if len(inputs) != len(operands):
        return None
    unused = [letter for letter in string.ascii_letters if letter not in args[0]]
    dots = [operand.ndim - len(labels) + 3 for labels, operand in zip(inputs, operands, strict=True)]
    most = max((count for labels, count in zip(inputs, dots, strict=True) if "..." in labels), default=0)
    spelled = "".join(unused[:most])
    inputs = [
        labels.replace("...", spelled[most - count :] if count else "")
        for labels, count in zip(inputs, dots, strict=True)
    ]
    if not arrow:  # what occurs once, in alphabetical order
        letters = "".join(inputs)
        once = sorted(letter for letter in set(letters) if letters.count(letter) == 1 and letter not in spelled)
        output = spelled + "".join(once)
    output = output.replace("...", spelled)
    if any(o.ndim != len(i) for i, o in zip(inputs, operands, strict=True)):
        return None
    return EinsumLabels(inputs, output, operands)


def einsum_product(tensor: Tensor, known: TrackedTensor, args: tuple[Any, ...]) -> HandWrittenProduct | None:
    labels = einsum_labels(args)
    if labels is None or len(labels.operands) != 2 or known.key_axis is None:
        return None
    own, other = (0, 1) if labels.operands[0] is tensor else (1, 0)
    mine, theirs, output = labels.inputs[own], labels.inputs[other], labels.output
    key = mine[known.key_axis]
    if key in output or key not in theirs or any(len(set(one)) < len(one) for one in (mine, theirs)):
        return None
    rest = [letter for letter in mine if letter != key]
    query = next((letter for letter in rest if letter not in theirs), "")  # none: a single query
    columns = [letter for letter in theirs if letter not in mine]
    if any(letter not in output for letter in rest + columns):
        return None
    leading = [letter for letter in rest if letter != query]
    shared = [letter for letter in leading if letter in theirs]
    gaps = [slice(None) if letter in shared else None for letter in leading]
    weights_order = "".join([*leading, query, key])

    def to_weights(weights: Tensor) -> Tensor:
        moved = torch.einsum(f"{mine}->{weights_order}", weights)
        return moved if query else moved[..., None, :]

    def from_weights(weights: Tensor) -> Tensor:
        return torch.einsum(f"{weights_order}->{mine}", weights if query else weights.squeeze(-2))

    def to_values(values: Tensor) -> Tensor:
        moved = torch.einsum(f"{theirs}->{''.join(shared)}{key}{''.join(columns)}", values)
        return moved.flatten(len(shared) + 1)[tuple(gaps)] if columns else moved[(*gaps, ..., None)]

    def to_output(result: Tensor) -> Tensor:
        moved = torch.einsum(f"{output}->{''.join(leading)}{query}{''.join(columns)}", result)
        moved = moved if query else moved.unsqueeze(len(leading))
        return moved.flatten(len(leading) + 1) if columns else moved[..., None]

    return HandWrittenProduct(tensor, known, to_weights, labels.operands[other], to_values, to_output, from_weights)


def product_operands(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor] | None:
    """Of a matrix product, left and right."""
    operands = list(tensors_of((*args, *kwargs.values())))
    if len(operands) != 2 or function not in PRODUCTS | REVERSED_PRODUCTS:
        return None
    return (operands[0], operands[1]) if function in PRODUCTS else (operands[1], operands[0])


def score_axis(function: Callable[..., Any], output: Tensor, args: tuple[Any, ...]) -> int:
    """Where the keys of scores are: last, in an einsum where its output has an axis of one operand alone."""
    labels = einsum_labels(args) if function is torch.einsum else None
    if labels is not None:
        alone = [axis for axis, letter in enumerate(labels.output) if sum(letter in one for one in labels.inputs) == 1]
        return alone[-1] if alone else output.ndim - 1
    return output.ndim - 1


def _makes_features(
    function: Callable[..., Any], found: tuple[Tensor, TrackedTensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """What `function` makes of scores are no scores any more: a norm, or a learnt map that does not mix heads alone.

    The products of linear attention lead into such a map; what the next layer makes of it has nothing to do with them.
    """
    tensor, known = found
    if function not in LEARNT_MAPS:
        return function in NORMS
    weight = args[1] if len(args) > 1 else kwargs["weight"]
    return known.key_axis is None or known.key_axis == tensor.ndim - (weight.ndim - 1)


def softmax_axis(output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    axis = args[1] if len(args) > 1 else kwargs.get("dim")
    if axis is None:  # the choice of torch.nn.functional.softmax
        return 0 if output.ndim in (0, 1, 3) else 1
    return axis % output.ndim
