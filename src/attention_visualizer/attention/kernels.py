"""Attention that capture cannot see: what other packages' kernels compute, and PyTorch's own below its functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from attention_visualizer.attention.torch_internals import without_wrappers

PACKAGES = (
    *("xformers", "flash_attn", "flash_attn_interface", "flash_attn_3", "sageattention", "natten", "triton"),
    "torch.nn.attention.flex_attention",
)
OPERATORS = type(torch.ops.aten.mul), type(torch.ops.aten.mul.Tensor)  # all overloads together, and one
WORDS = ("attention", "attn", "fmha")


def is_kernel(function: Callable[..., Any]) -> bool:
    """Whether a function that a model calls is an operator that computes attention, going by its name."""
    return isinstance(function, OPERATORS) and any(word in str(function).lower() for word in WORDS)


def kernels_of(model: nn.Module) -> list[str]:
    """Name the packages of kernels that the forward of the model's modules refers to, and the kind of attention that
    its configuration asks for, if it is not one of PyTorch's."""
    found: dict[str, None] = {}
    for kind in {type(module): None for module in model.modules()}:
        if not inspect.isfunction(kind.forward):
            continue
        names = inspect.getclosurevars(kind.forward)
        for value in (*names.globals.values(), *names.nonlocals.values()):
            origin = getattr(value, "__module__", None) or getattr(value, "__name__", None)
            for package in PACKAGES:
                if isinstance(origin, str) and f"{origin}.".startswith(f"{package}."):
                    found[package] = None
    asked = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if asked not in (None, "eager", "sdpa"):
        found[f"attn_implementation={asked!r}"] = None
    return list(found)


@contextmanager
def modules_that_run() -> Iterator[dict[nn.Module, None]]:
    """Note each module that is called inside, in this order."""
    ran: dict[nn.Module, None] = {}
    handle = register_module_forward_pre_hook(lambda module, inputs: ran.setdefault(module))
    try:
        yield ran
    finally:
        handle.remove()


def unseen_layers(model: nn.Module, ran: dict[nn.Module, None], calls: list[str]) -> list[str]:
    """Name the modules that ran and gave no attention call, although others of their class did. calls: by name."""
    names = {without_wrappers(name): module for name, module in model.named_modules()}
    seen = {id(names.get(call.partition("#")[0])) for call in calls}
    kinds = {type(module) for module in ran if id(module) in seen}
    return [
        name or type(model).__name__
        for name, module in names.items()
        if module in ran and type(module) in kinds and id(module) not in seen
    ]
