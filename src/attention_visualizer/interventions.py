"""Edits for `intervene`: what a model computes when a head is switched off, averaged, made uniform or shuffled.

    with intervene(model, switch_off("blocks.3", head=1)):
        logits = model(images)

Layers are named as in `capture`, heads are counted from 0; `head=None` is all heads of the layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attention_visualizer.capture import AttentionLayer, Edit, is_named


def switch_off(layer: str, head: int | None = None) -> Edit:
    """The head attends to nothing: what it adds to the residual stream is the projection's bias alone."""
    return _edit(layer, head, torch.zeros_like)


def replace_by_mean(layer: str, head: int | None, mean: Tensor) -> Edit:
    """The head attends the same way on every image. mean: [head, query, key], over the images of a data set."""
    return _edit(layer, head, lambda weights: (mean if head is None else mean[head]).to(weights).expand_as(weights))


def make_uniform(layer: str, head: int | None = None) -> Edit:
    """The head attends to every key alike."""
    return _edit(layer, head, lambda weights: torch.full_like(weights, 1 / weights.shape[-1]))


def permute_keys(layer: str, head: int | None, permutation: Tensor) -> Edit:
    """What the head gave to key j it gives to key permutation[j]."""
    return _edit(layer, head, lambda weights: torch.empty_like(weights).index_copy_(-1, permutation, weights))


def _edit(name: str, head: int | None, change: Callable[[Tensor], Tensor]) -> Edit:
    def edit(layer: AttentionLayer, weights: Tensor) -> Tensor:
        if not is_named(layer, name):
            return weights
        if head is None:
            return change(weights)
        edited = weights.clone()
        edited[:, head] = change(weights[:, head])
        return edited

    return edit
