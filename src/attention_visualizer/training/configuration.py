"""The configuration of a training run: schemas from the constructors' signatures, checking and saving it."""

from __future__ import annotations

import inspect
import math
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class
from hydra_zen import builds
from lightning import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from omegaconf import DictConfig, OmegaConf

from attention_visualizer.data.datamodule import ImageDataModule
from attention_visualizer.files import atomic
from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.models.vit_config import ViTConfig
from attention_visualizer.runs import folders
from attention_visualizer.support.errors import UserError
from attention_visualizer.training.classifier import Classifier
from attention_visualizer.watching.attention_logger import AttentionLogger


@dataclass
class TrainOptions:
    """The groups of conf/, and the fields outside them."""

    model: Any = None
    data: Any = None
    optimizer: Any = None
    trainer: Any = None
    callbacks: Any = None
    logger: Any = None
    seed: int = 0  # of weights, order, augmentation and dropout; the data split has its own
    ckpt_path: str | None = None  # a run's last.ckpt: resume into that run's folder
    resume: str | None = (
        None  # auto: go on with the newest unfinished run of these settings; a new one if there is none
    )
    export: bool = False  # best.ckpt's weights as checkpoints/best.safetensors too, for programs that take no pickle
    compile: bool = False  # the model by torch.compile while training: for GPUs; it slows CPUs down
    test: bool | None = None  # test best.ckpt at the end; null: yes, but not for a sweep's jobs
    runs_dir: str = "runs"
    run_folder: str | None = None  # set by the program, for loggers and callbacks to refer to


PLAIN_TYPES: dict[Any, str] = {
    type(None): "null",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a dictionary",
}


def register_schemas() -> None:
    """Makes the signatures the schemas of the groups: typed, and with each default in one place."""

    def signature(target: Any, *exclude: str) -> Any:
        return builds(target, populate_full_signature=True, zen_exclude=exclude)

    add = ConfigStore.instance().store
    add("train_options", TrainOptions)
    add("vision_transformer", builds(VisionTransformer, builds_bases=(signature(ViTConfig),)), group="model")
    add("image_data_module", signature(ImageDataModule, "seed"), group="data")
    add("classifier", signature(Classifier, "model", "num_classes", "seed"), group="optimizer")
    made_here = ("logger", "callbacks", "default_root_dir", "plugins", "enable_checkpointing", "fast_dev_run")
    add("lightning_trainer", signature(Trainer, *made_here), group="trainer")
    add(
        "attention_logger",
        signature(AttentionLogger, "probe_images", "probe_labels", "geometry"),
        group="callbacks",
        package="callbacks.attention_logger",
    )
    add("ema_weights", signature(EMAWeightAveraging, "device"), group="callbacks", package="callbacks.ema")


def arguments(config: DictConfig, group: str, target: Any) -> dict[str, Any]:
    """A typed group as arguments of `target`. `_target_` is left out: the code says which class, not the config."""
    container = to_fields(config, group)
    chosen = {str(key): value for key, value in container.items() if key != "_target_"}
    check_signature(group, chosen, target)
    return chosen


def to_fields(config: DictConfig, group: str) -> dict[Any, Any]:
    """A part of the config as a plain dictionary. Raises UserError where it is none."""
    part = config[group]
    container = OmegaConf.to_container(part, resolve=True) if OmegaConf.is_config(part) else part
    if not isinstance(container, dict):
        raise UserError(f"{group}={container}: give its fields one by one, or choose from the group; see --help")
    return container


def check_signature(name: str, fields: Mapping[str, Any], target: Any) -> None:
    """Raises UserError for a field that `target` does not take, or not of that type, as far as it states types."""
    parameters = inspect.signature(target).parameters
    try:
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError):  # somebody's class, with annotations for type checkers only
        hints = {}
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for field, value in fields.items():
        if field not in parameters and not open_ended:  # added with "+"
            raise UserError(f"{name}.{field}: there is no such field; see --help for those there are")
        if field in parameters and not fits(value, hints.get(field, Any)):
            raise UserError(f"{name}.{field}={value!r}: give {in_words(hints[field])}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value from a config, which is made of plain types, is of type `hint`."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in inner)
    if origin in (list, tuple):
        return isinstance(value, list) and all(fits(each, inner[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(each, inner[1]) for each in value.values())
    if isinstance(value, bool):
        return hint is bool
    kinds = (int, float) if hint is float else hint
    return isinstance(value, kinds) if inspect.isclass(hint) else True


def in_words(hint: Any) -> str:
    """The plain types of `hint`, as one would ask for them."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(words for each in get_args(hint) if (words := in_words(each))))
    if get_origin(hint) is Literal:
        return " or ".join(str(each) for each in get_args(hint))
    return PLAIN_TYPES.get(get_origin(hint) or hint, "")


def check_parts(config: DictConfig, group: str) -> None:
    """Raises UserError for a logger or callback that is not of the form that its class takes."""
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
    """Raises UserError for values that Lightning would take for something else, take too late, or not take at all."""
    for name in {str(key) for key in config} - TrainOptions.__dataclass_fields__.keys():  # added with "+"
        raise UserError(f"{name}: there is no such field; see --help for those there are")
    for name in TrainOptions.__dataclass_fields__.keys() - {str(key) for key in config}:  # taken away with "~"
        raise UserError(f"{name} is needed: give a value instead of taking it away")
    for group, target in (("trainer", Trainer), ("model", ViTConfig), ("data", ImageDataModule)):
        arguments(config, group, target)
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
        raise UserError(f"trainer.strategy={trainer.strategy}: this program trains in its own process; use auto")
    if trainer.profiler == "xla":
        raise UserError("trainer.profiler=xla is for TPUs: use simple, advanced or pytorch")
    if str(trainer.precision) in ("16-true", "16"):
        raise UserError(f"trainer.precision={trainer.precision} cannot train this model: use trainer=bf16")
    decay = (config.callbacks or {}).get("ema", {}).get("decay", 0.0)
    if not (isinstance(decay, int | float) and 0 <= decay < 1):
        raise UserError(f"callbacks.ema.decay={decay}: give a share from 0 up to, but not, 1")
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
    """Raises UserError for a run of `batches` training batches an epoch that would never train, validate or test.

    evaluation_batches: of the whole validation and test split.
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
    """config.yaml as it is used, every reference resolved; .hydra/ as Hydra composed it, for Hydra's own tools."""
    atomic.write_text(folder.config_path, OmegaConf.to_yaml(config, resolve=True))
    composed = folder.path / ".hydra"
    if not composed.exists():  # a resumed run keeps its first
        composed.mkdir()
        atomic.write_text(composed / "config.yaml", OmegaConf.to_yaml(config))
        atomic.write_text(composed / "hydra.yaml", OmegaConf.to_yaml(OmegaConf.create({"hydra": HydraConfig.get()})))
        atomic.write_text(composed / "overrides.yaml", OmegaConf.to_yaml(HydraConfig.get().overrides.task))
