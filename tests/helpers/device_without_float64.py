"""A device without float64, as Apple's GPUs are, made of the CPU's memory: for a process of its own, because PyTorch
can have one such device only. `python -m tests.helpers.device_without_float64` prints what was measured on it."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from attention_visualizer.attention.capture import capture
from attention_visualizer.measures.observation import observe
from attention_visualizer.measures.streaming import AttentionStatistics, MeanWeights
from attention_visualizer.support.double_precision import has_float64, in_float64
from tests.helpers.models import random_vit

ops = torch.ops.aten


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16]


class Foreign(Tensor):
    """A tensor on the device; `held` is on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Foreign:
        if held.dtype == torch.float64:
            raise TypeError("the device has no float64")
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.size(), strides=held.stride(), dtype=held.dtype, device=torch.device("foreign", 0)
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, *args, **(kwargs or {}))


def on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.held if isinstance(value, Foreign) else value


def run(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operator on the CPU, and wrap what comes out unless it was asked for there."""
    if function in (ops._copy_from.default, ops.copy_.default):
        source, target = args[:2] if function is ops._copy_from.default else args[1::-1]
        on_cpu(target).copy_(on_cpu(source))
        return target
    if function is ops._local_scalar_dense.default:
        return args[0].held.item()
    result = function(*tree_map(on_cpu, args), **tree_map(on_cpu, kwargs))
    if kwargs.get("device") == torch.device("cpu"):
        return result
    known = {id(each.held): each for each in (*args, *kwargs.values()) if isinstance(each, Foreign)}
    return tree_map(lambda each: known.get(id(each), Foreign(each)) if isinstance(each, Tensor) else each, result)


def main() -> None:
    _setup_privateuseone_for_python_backend("foreign", backend_module=Backend())  # type: ignore[no-untyped-call]
    library = torch.library.Library("_", "IMPL")
    library.fallback(run, dispatch_key="PrivateUse1")
    images = torch.randn(3, 1, 15, 15, generator=torch.Generator().manual_seed(0))
    measured = {}
    for name in ("cpu", "foreign"):
        device = torch.device(name)
        model, statistics, means = random_vit(num_layers=2).to(device), AttentionStatistics(), MeanWeights()
        for collector in (statistics, means):
            with torch.no_grad(), capture(model, consume=collector.update):
                model(images.to(device))
        measured[name] = {
            "has float64": has_float64(device),
            "kept in float64": in_float64(torch.ones(2, device=device)).device.type,
            "statistics": {key: value.mean.tolist() for key, value in statistics.compute().items()},
            "means": [value.sum(dim=-1).cpu().flatten().double().mean().item() for value in means.compute().values()],
            "grids": [geometry.grid for geometry in observe(model, images.to(device)).geometries],
        }
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
