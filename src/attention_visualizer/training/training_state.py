"""Check what training goes on from beside the weights, before Lightning and PyTorch use it.

They check little of it themselves: a fused optimiser writes out of bounds if a moment is smaller than its parameter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning import Trainer
from packaging.version import InvalidVersion, Version
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from attention_visualizer.files.tensor_files import CHECKPOINT_KEY
from attention_visualizer.runs.config_fields import FIELDS
from attention_visualizer.support.errors import UserError
from attention_visualizer.training.muon import MuonWithAdamW

MAX_COUNT = 2**48  # sanity bound on counts of batches and steps
MOMENTS = {AdamW: {"step", "exp_avg", "exp_avg_sq"}, Muon: {"momentum_buffer"}}
# In an optimiser's parameter group: what changes while it trains or when a run is resumed. All else is as it was built.
CHANGEABLE = {"fused", *(key for field in FIELDS.values() for key in field.optimizer_keys)}


def check_training_state(content: Mapping[str, Any], model: nn.Module, optimizer: Optimizer, trainer: Trainer) -> None:
    """Raise UserError unless `content`, a Lightning checkpoint, holds what this `trainer` would save of the `model`
    and of the newly built `optimizer`: the same keys, kinds and shapes, finite numbers, counts of at least 0."""
    written_by = content.get("pytorch-lightning_version")
    try:
        Version(str(written_by))
    except InvalidVersion as error:
        raise refusal("pytorch-lightning_version", f"{written_by!r:.60}") from error
    loops = require_dictionary(content.get("loops"), "loops")
    for name in ("fit_loop", "validate_loop", "test_loop", "predict_loop"):
        expected = getattr(trainer, name).state_dict()
        found = require_dictionary(loops.get(name), f"loops.{name}")
        if found.get("state_dict") == {"combined_loader": [{}]}:  # within an epoch
            expected["state_dict"] = found["state_dict"]
        check_like(expected, found, f"loops.{name}")
    states: Any = content.get("optimizer_states")
    check_length(1, states, "optimizer_states")
    check_optimizer(states[0], optimizer, "optimizer_states.0")
    block = require_dictionary(content.get(CHECKPOINT_KEY), CHECKPOINT_KEY)
    for name in ("train_right", "train_images"):
        check_like(0, block.get(name, 0), f"{CHECKPOINT_KEY}.{name}")
    schedules: Any = content.get("lr_schedulers")
    check_length(1, schedules, "lr_schedulers")
    found = require_dictionary(schedules[0], "lr_schedulers.0")
    check_like(without_missing_flags(LambdaLR(optimizer, _constant_lr).state_dict(), found), found, "lr_schedulers.0")
    if "current_model_state" in content:  # of averaged weights, the ones that are trained
        check_like(model.state_dict(), content["current_model_state"], "current_model_state")
    if "averaging_state" in content:
        check_like({"n_averaged": torch.tensor(0)}, content["averaging_state"], "averaging_state")
    for name, state in require_dictionary(content.get("callbacks"), "callbacks").items():
        require_dictionary(state, f"callbacks.{name}")
        if name == "EMAWeightAveraging":
            check_like({"latest_update_step": 0}, state, f"callbacks.{name}")


def check_optimizer(found: Any, optimizer: Optimizer, where: str) -> None:
    found = require_dictionary(found, where)
    if isinstance(optimizer, MuonWithAdamW):
        parts: Any = found.get("parts")
        check_length(len(optimizer.parts), parts, f"{where}.parts")
        for number, each in enumerate(optimizer.parts):
            check_optimizer(parts[number], each, f"{where}.parts.{number}")
        return
    built = optimizer.state_dict()["param_groups"]
    check_length(len(built), found.get("param_groups"), f"{where}.param_groups")
    for number, expected in enumerate(built):
        place = f"{where}.param_groups.{number}"
        group = require_dictionary(found["param_groups"][number], place)
        for name, value in without_missing_flags({"initial_lr": 0.0, **expected}, group).items():
            if name not in group:
                raise refusal(f"{place}.{name}", "not there")
            check_like(value, group[name], f"{place}.{name}")
            if name in expected.keys() - CHANGEABLE and group[name] != value:
                raise refusal(f"{place}.{name}", f"{group[name]!r:.60}, expected {value!r:.60}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, state in require_dictionary(found.get("state"), f"{where}.state").items():
        place = f"{where}.state.{index}"
        if type(index) is not int or not 0 <= index < len(parameters):
            raise refusal(place, "of a parameter that does not exist")
        moments = {name: parameters[index] for name in MOMENTS[type(optimizer)]}
        check_like(moments | ({"step": torch.zeros(())} if "step" in moments else {}), state, place)


def _constant_lr(step: int) -> float:
    return 1.0


def without_missing_flags(expected: Mapping[str, Any], found: Mapping[Any, Any]) -> dict[str, Any]:
    """Leave out the flags that `found` lacks: newer versions of PyTorch have more of them, and defaults for them."""
    return {name: value for name, value in expected.items() if name in found or not isinstance(value, bool | None)}


def check_like(expected: Any, found: Any, where: str) -> None:
    """Raise UserError unless `found` has the kind, the keys, the length or the shape of `expected`."""
    if isinstance(expected, Mapping):
        if not isinstance(found, Mapping) or found.keys() != expected.keys():
            raise refusal(where, f"{describe(found)}, expected {', '.join(map(str, expected)):.120}")
        for key, value in expected.items():
            check_like(value, found[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        check_length(len(expected), found, where)
        for number, value in enumerate(expected):
            check_like(value, found[number], f"{where}.{number}")
    elif isinstance(expected, Tensor):
        if not isinstance(found, Tensor) or found.shape != expected.shape or not can_be_loaded(found.dtype, expected):
            raise refusal(where, f"{describe(found)}, expected {describe(expected)}")
        if not found.is_contiguous() or not bool(found.isfinite().all()):
            raise refusal(where, "NaN, infinite or not in one piece")
    elif isinstance(expected, float):
        if type(found) not in (int, float) or not math.isfinite(found):
            raise refusal(where, f"{found!r:.60}, expected a finite number")
    elif type(found) is not type(expected):
        raise refusal(where, f"{found!r:.60}, expected {describe(expected)}")
    elif isinstance(expected, int) and not 0 <= found < MAX_COUNT:
        raise refusal(where, f"{found!r:.60}, expected a count")


def can_be_loaded(dtype: torch.dtype, expected: Tensor) -> bool:
    """Whether such a tensor can be loaded into `expected`: a model that trains in bfloat16 is built in float32."""
    both_floating = dtype.is_floating_point and expected.is_floating_point()
    return dtype == expected.dtype or (both_floating and expected.ndim > 0)


def check_length(expected: int, found: Any, where: str) -> None:
    if not isinstance(found, list | tuple) or len(found) != expected:
        raise refusal(where, f"{describe(found)}, expected a list of {expected}")


def require_dictionary(found: Any, where: str) -> Mapping[Any, Any]:
    if not isinstance(found, Mapping):
        raise refusal(where, f"{describe(found)}, expected a dictionary")
    return found


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}, {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dictionary of {', '.join(map(str, value)) or 'nothing':.120}"
    return f"{type(value).__name__}"


def refusal(where: str, what: str) -> UserError:
    return UserError(
        f"training cannot resume from this checkpoint ({where} is {what}): it was edited, or written by another "
        "version; start a new run"
    )
