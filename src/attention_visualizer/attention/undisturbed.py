"""Run a model for our own purposes and leave it, and the random numbers, as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from torch import nn

from attention_visualizer.attention.kept_state import is_foreign, kept_state


@contextmanager
def undisturbed(model: nn.Module, *others: Any, hooks: bool = False) -> Iterator[None]:
    """Let `model` run inside in eval mode; afterwards everything that it and `others` keep is as it was.

    That is the attributes of its modules, parameters, buffers and other tensors among them, containers, generators, the
    training flags, gradients, and the random state of PyTorch, NumPy and Python.
    hooks: whether forward hooks of the user's own are called, which may be part of the model.
    """
    with kept_state(model, *others):
        if not hooks:
            for module in model.modules():
                for each in (module._forward_hooks, module._forward_pre_hooks):
                    for number in [number for number, hook in each.items() if not _belongs_to_torch(hook)]:
                        del each[number]
        if any(module.training and _has_own_mode(module) for module in model.modules()):
            with suppress(NotImplementedError):  # a program of torch.export
                model.eval()
        for module in model.modules():
            module.training = False
        yield


@contextmanager
def both_undisturbed(one: nn.Module, other: nn.Module) -> Iterator[None]:
    """Let both run as `undisturbed` does, once each also where one is a part of the other, or both are the same."""
    outer = [each for each, rest in ((one, other), (other, one)) if not any(part is each for part in rest.modules())]
    with ExitStack() as stack:
        for each in outer or [one]:
            stack.enter_context(undisturbed(each))
        yield


def _belongs_to_torch(hook: Callable[..., Any]) -> bool:
    """Whether the model cannot run without this hook: weight_norm, for instance, computes the weight in one."""
    return (getattr(hook, "__module__", None) or "").partition(".")[0] == "torch"


def _has_own_mode(module: nn.Module) -> bool:
    """Whether more than a flag may change with the mode: a `train()` of its own may put weights together."""
    return not is_foreign(module) and type(module).train is not nn.Module.train
