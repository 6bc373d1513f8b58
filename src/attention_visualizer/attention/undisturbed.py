"""Run a model for our own purposes and leave it, and the random numbers, as they were."""

from __future__ import annotations

import copy
import functools
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CONTAINERS = (list, dict, set, deque)
MAX_DEPTH = 3  # of containers in containers


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Let `model` run inside in eval mode; afterwards everything that it keeps is as it was.

    That is the attributes of its modules, buffers and other tensors among them, containers, generators, the training
    flags, gradients, and the random state of PyTorch, NumPy and Python. Forward hooks of the user's own are not called.
    Modes are set as flags: a `train()` of a module's own may do anything.
    """
    with ExitStack() as stack:
        devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type == "cuda"}
        stack.enter_context(torch.random.fork_rng(devices=list(devices)))
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        for module in list(model.modules()):
            for restore in _attributes(module):
                stack.callback(restore)
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                stack.callback(_refill, hooks, type(hooks)(hooks))
                for number in [number for number, hook in hooks.items() if not _belongs_to_torch(hook)]:
                    del hooks[number]
            module.training = False
        yield


def _belongs_to_torch(hook: Callable[..., Any]) -> bool:
    """Whether the model cannot run without this hook: weight_norm, for instance, computes the weight in one."""
    return (getattr(hook, "__module__", None) or "").partition(".")[0] == "torch"


def _refill(container: Any, content: Any) -> None:
    container.clear()
    container.extend(content) if isinstance(container, list | deque) else container.update(content)


def _copy_back(tensor: Tensor, content: Tensor) -> None:
    with torch.no_grad():
        if tensor.shape != content.shape:
            tensor.resize_(content.shape)
        tensor.copy_(content)


def _set_state(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)


def _attributes(module: nn.Module) -> Iterator[Callable[[], None]]:
    """Yield what brings back each attribute of a module, and then that the module has just these."""
    names = module.__dict__
    before = dict(names)

    def restore() -> None:
        names.clear()
        names.update(before)

    yield restore
    for name, value in before.items():
        if name != "_modules":
            yield from _state(value, MAX_DEPTH)


def _state(value: Any, depth: int) -> Iterator[Callable[[], None]]:
    """Yield what brings `value`, which is changed in place, back to its present state."""
    if isinstance(value, nn.Parameter):
        return  # which no forward changes; a copy of all would double the memory
    if isinstance(value, Tensor):
        if value.device.type != "meta" and value.is_leaf and value.layout is torch.strided and not value.is_quantized:
            yield functools.partial(_copy_back, value, value.detach().clone())
    elif isinstance(value, torch.Generator):
        state = value.get_state()
        yield functools.partial(_set_state, value, state)
    elif isinstance(value, np.random.Generator):
        numbers = copy.deepcopy(value.bit_generator.state)
        yield lambda: setattr(value.bit_generator, "state", numbers)
    elif isinstance(value, random.Random):
        python_state = value.getstate()
        yield lambda: value.setstate(python_state)
    elif isinstance(value, CONTAINERS) and depth:
        yield functools.partial(_refill, value, copy.copy(value))
        for part in list(value.values() if isinstance(value, dict) else value):
            yield from _state(part, depth - 1)
