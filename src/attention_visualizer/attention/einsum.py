"""The labels of an einsum's axes: where an axis goes, and which form a product of weights and values has."""

from __future__ import annotations

import string
from dataclasses import dataclass

import torch
from torch import Tensor

from attention_visualizer.attention.calls import ProductForm
from attention_visualizer.attention.function_call import FunctionCall


@dataclass(frozen=True)
class EinsumLabels:
    """The axes of an einsum's operands and of its output, one letter each."""

    inputs: list[str]
    output: str
    operands: list[Tensor]

    def axis_after(self, operand: Tensor, axis: int) -> int | None:
        """Return where an axis of one operand is in the output; None where it was summed over."""
        for labels, other in zip(self.inputs, self.operands, strict=True):
            if other is operand:
                return self.output.index(labels[axis]) if labels[axis] in self.output else None
        return None

    def last_axis_of_one_operand(self) -> int | None:
        """Return the last axis of the output that one operand alone has: the keys, where the output is scores."""
        axes = [axis for axis, letter in enumerate(self.output) if sum(letter in labels for labels in self.inputs) == 1]
        return axes[-1] if axes else None


def einsum_labels(call: FunctionCall) -> EinsumLabels | None:
    """Parse a call of torch.einsum, "..." written out; None for its form with lists of numbers."""
    equation, *operands = call.args
    if not isinstance(equation, str):
        return None
    if isinstance(operands[0], tuple | list):
        operands = list(operands[0])
    left, arrow, output = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    if len(inputs) != len(operands):
        return None
    unused = [letter for letter in string.ascii_letters if letter not in equation]
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
    if any(operand.ndim != len(labels) for labels, operand in zip(inputs, operands, strict=True)):
        return None
    return EinsumLabels(inputs, output, operands)


def einsum_form(call: FunctionCall, weights: Tensor, key_axis: int) -> ProductForm | None:
    """Return the form of an einsum of `weights` with values, summed over the weights' `key_axis`; None of others."""
    labels = einsum_labels(call)
    if labels is None or len(labels.operands) != 2:
        return None
    own, other = (0, 1) if labels.operands[0] is weights else (1, 0)
    mine, theirs, output = labels.inputs[own], labels.inputs[other], labels.output
    key = mine[key_axis]
    if key in output or key not in theirs or any(len(set(letters)) < len(letters) for letters in (mine, theirs)):
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

    def to_weights(tensor: Tensor) -> Tensor:
        moved = torch.einsum(f"{mine}->{weights_order}", tensor)
        return moved if query else moved[..., None, :]

    def from_weights(tensor: Tensor) -> Tensor:
        return torch.einsum(f"{weights_order}->{mine}", tensor if query else tensor.squeeze(-2))

    def to_values(tensor: Tensor) -> Tensor:
        moved = torch.einsum(f"{theirs}->{''.join(shared)}{key}{''.join(columns)}", tensor)
        return moved.flatten(len(shared) + 1)[tuple(gaps)] if columns else moved[(*gaps, ..., None)]

    def to_output(tensor: Tensor) -> Tensor:
        moved = torch.einsum(f"{output}->{''.join(leading)}{query}{''.join(columns)}", tensor)
        moved = moved if query else moved.unsqueeze(len(leading))
        return moved.flatten(len(leading) + 1) if columns else moved[..., None]

    return ProductForm(labels.operands[other], to_weights, from_weights, to_values, to_output)
