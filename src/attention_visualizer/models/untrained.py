"""Control models: the same architecture with weights that have learnt nothing."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.support.errors import UserError

SEEDING = threading.Lock()  # control models are made on all cores at once, and there is one global random state
SETTLING_STEPS = 15  # of the power method, by which spectral norms follow new weights


def random_weights(model: nn.Module, seed: int) -> nn.Module:
    """Return `model` as before any training, in eval mode on its device; the global random state stays as it is.

    This project's model is initialised as for training. Of any other, modules that can reset themselves do, and the
    numbers of whatever that leaves as it was (class token, positions, weights behind a weight norm) are shuffled, so
    that their size stays; a single number, such as a temperature, stays itself. Raise UserError for a model that cannot
    be copied, or whose weights are packed.
    """
    device = next(model.parameters()).device
    with SEEDING, torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed the GPUs too, whose state is not put back.
        torch.default_generator.manual_seed(seed)
        if isinstance(model, VisionTransformer):
            return VisionTransformer(**model.config).eval().to(device)
        fresh = copied(model).cpu()
        with torch.no_grad():
            for module in fresh.modules():
                reset(module)
            settle(fresh)
        return fresh.eval().to(device)


def copied(model: nn.Module) -> nn.Module:
    """Return a copy; of what a forward pass left in the model's attributes, without the graph of its computation."""
    try:
        with DetachedCopies():
            return copy.deepcopy(model)
    except Exception as error:  # whatever the parts of a model raise
        raise UserError(f"{type(model).__name__} cannot be copied, so it has no control models: {error}") from error


class DetachedCopies(TorchFunctionMode):
    """Copy tensors that were computed, which PyTorch refuses, as plain ones."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[0].detach().clone()
        return function(*args, **(kwargs or {}))


def reset(module: nn.Module) -> None:
    """Reset a module's own weights, those of modules inside it left alone."""
    if hasattr(module, "_packed_params"):
        raise UserError(f"the weights of {type(module).__name__} are packed, so the model has no control models")
    own = [*module.parameters(recurse=False), *stored_weights(module)]
    before = [each.clone() for each in own]
    method = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if own and callable(method):
        with suppress(TypeError):  # of one that asks for arguments
            method()
    for tensor, learnt in zip(own, before, strict=True):
        if torch.equal(tensor, learnt):
            tensor.copy_(shuffled(learnt))


def shuffled(tensor: Tensor) -> Tensor:
    """Return the same numbers in another order."""
    numbers = tensor.flatten()
    other = numbers[torch.randperm(numbers.numel())]
    return (other.roll(1) if torch.equal(other, numbers) else other).view_as(tensor)


def stored_weights(module: nn.Module) -> list[Tensor]:
    """Return matrices that a module keeps as buffers, as quantised layers do; tables of positions are no weights."""
    return [buffer for name, buffer in module.named_buffers(recurse=False) if "weight" in name and buffer.ndim > 1]


def settle(model: nn.Module) -> None:
    """Compute anew what depends on weights: those that PyTorch's own hooks and parametrizations make of others."""
    model.train()
    for _ in range(SETTLING_STEPS):
        for module in model.modules():
            for hook in module._forward_pre_hooks.values():
                if type(hook).__module__.startswith("torch.nn.utils"):
                    hook(module, ())
            for name in getattr(module, "parametrizations", ()) if parametrize.is_parametrized(module) else ():
                getattr(module, name)
