"""Control models: the same architecture with weights that have learnt nothing."""

from __future__ import annotations

import copy

import torch
from torch import nn

from attention_visualizer.models.vision_transformer import VisionTransformer


def random_weights(model: nn.Module, seed: int) -> nn.Module:
    """Return `model` as before any training, in eval mode on its device; the global random state stays as it is.

    This project's model is initialised as for training. Of any other, modules that can reset themselves do, and the
    numbers of each remaining parameter (class token, positions) are shuffled, so that their size stays.
    """
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed the GPUs too, whose state is not put back.
        torch.default_generator.manual_seed(seed)
        if isinstance(model, VisionTransformer):
            return VisionTransformer(**model.config).eval().to(device)
        fresh = copy.deepcopy(model).cpu()
        with torch.no_grad():
            for module in fresh.modules():
                reset(module)
        return fresh.eval().to(device)


def reset(module: nn.Module) -> None:
    """Reset a module's own parameters, those of modules inside it left alone."""
    own = list(module.parameters(recurse=False))
    method = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if not own:
        return
    if callable(method):
        method()
        return
    for parameter in own:
        parameter.copy_(parameter.flatten()[torch.randperm(parameter.numel())].view_as(parameter))
