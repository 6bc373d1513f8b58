"""Edits for `intervene`: what a model computes when a head is switched off, averaged, made uniform or shuffled.

    with intervene(model, switch_off("blocks.3", head=1)):
        logits = model(images)
    with intervene(model, in_all_layers(make_uniform)):
        logits = model(images)

Layers are named as in `capture`, heads are counted from 0; `head=None` is all heads of the layer. What a module
computes again in one pass is "name#2" and so on. A layer that the model does not run is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attention_visualizer.attention.layers import AttentionLayer, Edit, is_named
from attention_visualizer.support.errors import UserError


def switch_off(layer: str, head: int | None = None) -> Edit:
    """Let the head attend to nothing: what it adds to the residual stream is the projection's bias alone."""
    return NamedEdit(layer, head, torch.zeros_like)


def replace_by_mean(layer: str, head: int | None, mean: Tensor, queries: int | slice = slice(None)) -> Edit:
    """Let the head attend the same way on every image: `mean`, [head, query, key], over the images of a data set.

    Queries other than these keep their own attention; `queries=0` is a class token in front.
    """

    def averaged(weights: Tensor) -> Tensor:
        replacement = mean if head is None else mean[head]
        shape, expected = list(replacement.shape), list(weights.shape[1:])
        if shape != expected:
            raise UserError(f"the mean for {layer} has shape {shape}, its weights {expected}, batch left out")
        edited = weights.clone()
        edited[..., queries, :] = replacement.to(weights)[..., queries, :]
        return edited

    return NamedEdit(layer, head, averaged)


def make_uniform(layer: str, head: int | None = None) -> Edit:
    """Let the head attend to every key alike."""
    return NamedEdit(layer, head, lambda weights: torch.full_like(weights, 1 / weights.shape[-1]))


def attend_to_maximum(layer: str, head: int | None = None) -> Edit:
    """Let each query attend to the key of its largest weight alone, the first of several."""

    def one_hot(weights: Tensor) -> Tensor:
        return torch.zeros_like(weights).scatter_(-1, weights.argmax(dim=-1, keepdim=True), 1.0)

    return NamedEdit(layer, head, one_hot)


def attend_as_partner(layer: str, head: int | None = None) -> Edit:
    """Let each image of a batch's first half attend as its partner in the second half does, which is left as it is:

        with intervene(model, in_all_layers(attend_as_partner)):
            logits = model(torch.cat([images, partners]))[: len(images)]

    The partner's weights are thus those of an unedited pass, in every layer.
    """

    def of_partner(weights: Tensor) -> Tensor:
        if len(weights) % 2:
            raise UserError("the batch must hold images and then as many partners")
        return weights[len(weights) // 2 :].repeat(2, *[1] * (weights.ndim - 1))

    return NamedEdit(layer, head, of_partner)


def permute_keys(layer: str, head: int | None, permutation: Tensor) -> Edit:
    """Let the head give to key permutation[j] what it gave to key j."""

    def permuted(weights: Tensor) -> Tensor:
        if permutation.sort().values.tolist() != list(range(weights.shape[-1])):
            raise UserError(f"permutation must hold each of the {weights.shape[-1]} keys of {layer} once")
        return weights[..., permutation.argsort()]

    return NamedEdit(layer, head, permuted)


def in_all_layers(edit_of: Callable[[str], Edit]) -> Edit:
    """Edit each layer of a model by the edit of its name: `in_all_layers(switch_off)`."""
    return lambda layer, weights: edit_of(layer.name)(layer, weights)


def together(edits: Sequence[Edit]) -> Edit:
    """Edit by each in turn."""
    return EditsTogether(tuple(edits))


@dataclass(frozen=True)
class NamedEdit:
    """An edit of one layer, of one of its heads or of all."""

    layer: str
    head: int | None
    change: Callable[[Tensor], Tensor]  # of [batch, query, key] for one head, [batch, head, query, key] for all

    def __call__(self, layer: AttentionLayer, weights: Tensor) -> Tensor:
        if not is_named(layer.name, self.layer):
            return weights
        if self.head is None:
            return self.change(weights)
        if not 0 <= self.head < weights.shape[1]:
            raise UserError(f"{layer.name} has {weights.shape[1]} heads: give head=0 to {weights.shape[1] - 1}")
        edited = weights.clone()
        edited[:, self.head] = self.change(weights[:, self.head])
        return edited


@dataclass(frozen=True)
class EditsTogether:
    """Edits, each of what the one before gave."""

    edits: tuple[Edit, ...]

    def __call__(self, layer: AttentionLayer, weights: Tensor) -> Tensor:
        for edit in self.edits:
            weights = edit(layer, weights)
        return weights


def named_layers(edit: Edit) -> tuple[str, ...] | None:
    """Return the names of the layers that an edit of this module is of; None for one that may be of any layer."""
    if isinstance(edit, NamedEdit):
        return (edit.layer,)
    if not isinstance(edit, EditsTogether):
        return None
    names: dict[str, None] = {}
    for each in edit.edits:
        if (layers := named_layers(each)) is None:
            return None
        names.update(dict.fromkeys(layers))
    return tuple(names)
