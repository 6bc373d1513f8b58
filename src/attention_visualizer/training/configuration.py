"""The configuration of a training run: checking it, filling it in, saving it."""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Mapping
from typing import Any, get_type_hints

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from attention_visualizer.files import atomic
from attention_visualizer.runs import folders
from attention_visualizer.support.errors import UserError
from attention_visualizer.support.field_types import SHARE, check_fields
from attention_visualizer.training.schemas import CLASSES, TrainOptions


def with_values(config: DictConfig, values: dict[str, Any]) -> DictConfig:
    """Return a read-only copy of `config` with other values in the fields of these dotted names."""
    changed = copy.deepcopy(config)
    OmegaConf.set_readonly(changed, False)
    for name, value in values.items():
        OmegaConf.update(changed, name, value, force_add=True)
    OmegaConf.set_readonly(changed, True)
    return changed


def arguments(config: DictConfig, group: str) -> dict[str, Any]:
    """Return a typed group as arguments of its class. Raise UserError for what the class does not take."""
    chosen = {str(name): value for name, value in to_fields(config, group).items()}
    check_signature(group, chosen, CLASSES[group])
    return chosen


def to_fields(config: DictConfig, group: str) -> dict[Any, Any]:
    """Return a part of the config as a plain dictionary. Raise UserError where it is none."""
    part = config[group]
    container = OmegaConf.to_container(part, resolve=True) if OmegaConf.is_config(part) else part
    if not isinstance(container, dict):
        raise UserError(f"{group}={container}: give its fields one by one, or choose from the group; see --help")
    return container


def check_signature(name: str, values: Mapping[str, Any], target: Any) -> None:
    """Raise UserError for a field that `target` does not take, or not of that type, as far as it declares types."""
    parameters = inspect.signature(target).parameters
    try:
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
    except (NameError, TypeError):  # a user's class, with annotations for type checkers only
        hints = {}
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for field in values:
        if field not in parameters and not open_ended:  # added with "+"
            raise UserError(f"{name}.{field}: there is no such field; see --help for all fields")
    check_fields(name, values, {field: hints[field] for field in parameters.keys() & hints.keys()})


def check_parts(config: DictConfig, group: str) -> None:
    """Raise UserError for a logger or callback that is not of the form that its class takes."""
    if config[group] is None:
        return
    for name, part in to_fields(config, group).items():
        field = f"{group}.{name}"
        if part is None:
            continue
        if not (isinstance(part, dict) and isinstance(part.get("_target_"), str)):
            raise UserError(f"{field}={part}: give fields with a class as _target_, or choose from the group {group}")
        try:
            target = get_class(part["_target_"])
        except Exception as error:  # whatever the module that is named raises
            raise UserError(f"{field}._target_={part['_target_']}: {error}") from error
        check_signature(field, {key: value for key, value in part.items() if not key.startswith("_")}, target)


def check_options(config: DictConfig) -> None:
    """Raise UserError for values that Lightning would take for something else, take too late, or not take at all."""
    for name in {str(key) for key in config} - TrainOptions.__dataclass_fields__.keys():  # added with "+"
        raise UserError(f"{name}: there is no such field; see --help for all fields")
    for name in TrainOptions.__dataclass_fields__.keys() - {str(key) for key in config}:  # taken away with "~"
        raise UserError(f"{name} is needed: give a value instead of removing it")
    for group in ("trainer", "model", "data"):
        arguments(config, group)
    placed = OmegaConf.merge(config, {"run_folder": config.run_folder or "runs"})  # which loggers refer to
    assert isinstance(placed, DictConfig)
    for group in ("callbacks", "logger"):
        check_parts(placed, group)
    if not 0 <= config.seed < 2**32:
        raise UserError(f"seed={config.seed}: give a whole number from 0 to {2**32 - 1}")
    trainer = config.trainer
    for name in ("max_epochs", "check_val_every_n_epoch", "log_every_n_steps", "accumulate_grad_batches"):
        if trainer[name] is not None and trainer[name] < 1:
            raise UserError(f"trainer.{name}={trainer[name]}: give a whole number of at least 1")
    if trainer.max_steps != -1 and trainer.max_steps < 1:
        raise UserError(f"trainer.max_steps={trainer.max_steps}: give a whole number of at least 1, or -1 for no limit")
    interval = trainer.val_check_interval
    if isinstance(interval, float) and interval > 1 and not interval.is_integer():
        raise UserError(
            f"trainer.val_check_interval={interval}: give a whole number of batches, or a share of an epoch"
        )
    if isinstance(interval, int | float) and not interval > 0:
        raise UserError(f"trainer.val_check_interval={interval}: give a number of batches, or a share of an epoch")
    if re.search("spawn|fork|notebook", str(trainer.strategy)):
        raise UserError(f"trainer.strategy={trainer.strategy}: this program trains in a single process; use auto")
    if trainer.profiler == "xla":
        raise UserError("trainer.profiler=xla is for TPUs: use simple, advanced or pytorch")
    if str(trainer.precision) in ("16-true", "16"):
        raise UserError(f"trainer.precision={trainer.precision} cannot train this model: use trainer=bf16")
    decay = (config.callbacks or {}).get("ema", {}).get("decay", 0.0)
    if not (isinstance(decay, int | float) and SHARE.holds(decay)):
        raise UserError(f"callbacks.ema.decay={decay}: give {SHARE.words}")
    if config.resume not in (None, "auto"):
        raise UserError(f"resume={config.resume}: give auto, or null for a new run; ckpt_path= names a checkpoint")
    if config.resume is not None and config.ckpt_path is not None:
        raise UserError("resume=auto finds the run by itself: leave out ckpt_path=, or resume=")
    if not config.runs_dir:
        raise UserError("runs_dir= is empty: name a folder")
    clip = trainer.gradient_clip_val
    if clip is not None and not (isinstance(clip, int | float) and 0 <= clip < math.inf):
        raise UserError(f"trainer.gradient_clip_val={clip}: give 0 or a positive number, or null for no clipping")
    for name in ("limit_train_batches", "limit_val_batches", "limit_test_batches"):
        limit = trainer[name]
        if limit is not None and not (isinstance(limit, int | float) and 0 < limit < math.inf):
            raise UserError(f"trainer.{name}={limit}: give a number of batches of at least 1, or a share above 0")


def check_schedule(config: DictConfig, batches: int, evaluation_batches: dict[str, int]) -> None:
    """Raise UserError for a run of `batches` training batches an epoch that would never train, validate or test.

    evaluation_batches: how many the whole "validation" and "test" split have.
    """
    trainer = config.trainer
    overfit = trainer.overfit_batches  # where it is not 0, of training and validation
    if not 0 <= overfit < math.inf or (
        overfit and isinstance(overfit, float) and int(overfit * min(batches, evaluation_batches["validation"])) < 1
    ):
        raise UserError(f"trainer.overfit_batches={overfit} leaves no batch: give a number of batches, or 0 for all")
    for name, split in (("limit_val_batches", "validation"), ("limit_test_batches", "test")):
        if isinstance(trainer[name], float) and int(trainer[name] * evaluation_batches[split]) < 1:
            raise UserError(f"trainer.{name}={trainer[name]} leaves no {split} batch: give a larger share")
    if batches < 1:
        raise UserError(f"trainer.limit_train_batches={trainer.limit_train_batches} leaves no batch to train on")
    every = trainer.check_val_every_n_epoch
    if every is not None and every > trainer.max_epochs:
        raise UserError(
            f"trainer.check_val_every_n_epoch={every} is never reached in {trainer.max_epochs} epochs: give fewer"
        )
    interval = trainer.val_check_interval
    if isinstance(interval, float) and interval > 1:
        interval = int(interval)
    if isinstance(interval, int) and every is not None and interval > batches:
        raise UserError(f"trainer.val_check_interval={interval}: an epoch has {batches} batches: give at most that")
    if trainer.max_steps != -1 and every is not None and not overfit:
        within = batches if interval is None or not isinstance(interval, int | float) else interval
        first = max(1, int(batches * within)) if isinstance(within, float) else within
        steps = (every - 1) * math.ceil(batches / trainer.accumulate_grad_batches)
        steps += math.ceil(first / trainer.accumulate_grad_batches)
        if trainer.max_steps < steps:
            raise UserError(
                f"trainer.max_steps={trainer.max_steps} ends before the first validation, which is after {steps} "
                "steps: give at least that, or a smaller trainer.val_check_interval"
            )


def save(config: DictConfig, folder: folders.RunFolder) -> None:
    """Write config.yaml as used, every reference resolved, and .hydra/ as Hydra composed it, for Hydra's tools."""
    atomic.write_text(folder.config_path, OmegaConf.to_yaml(config, resolve=True))
    composed = folder.path / ".hydra"
    if not composed.exists():  # a resumed run keeps its first
        composed.mkdir()
        atomic.write_text(composed / "config.yaml", OmegaConf.to_yaml(config))
        atomic.write_text(composed / "hydra.yaml", OmegaConf.to_yaml(OmegaConf.create({"hydra": HydraConfig.get()})))
        atomic.write_text(composed / "overrides.yaml", OmegaConf.to_yaml(HydraConfig.get().overrides.task))
