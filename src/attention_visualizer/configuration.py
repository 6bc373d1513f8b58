"""The configuration of a training run: schemas from the constructors' signatures, saving it, and resuming with it."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra_zen import builds
from lightning import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from omegaconf import DictConfig, OmegaConf

from attention_visualizer import storage
from attention_visualizer.callbacks import AttentionLogger
from attention_visualizer.classifier import Classifier
from attention_visualizer.data import ImageDataModule
from attention_visualizer.errors import UserError
from attention_visualizer.model import VisionTransformer


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
    compile: bool = False  # the model by torch.compile while training: for GPUs; it slows CPUs down
    test: bool | None = None  # test best.ckpt at the end; null: yes, but not for a sweep's jobs
    runs_dir: str = "runs"
    run_folder: str | None = None  # set by the program, for loggers and callbacks to refer to


def register_schemas() -> None:
    """Makes the signatures the schemas of the groups: typed, and with each default in one place."""

    def signature(target: Any, *exclude: str) -> Any:
        return builds(target, populate_full_signature=True, zen_exclude=exclude)

    add = ConfigStore.instance().store
    add("train_options", TrainOptions)
    add("vision_transformer", signature(VisionTransformer), group="model")
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
    container = OmegaConf.to_container(config[group], resolve=True)
    assert isinstance(container, dict)
    chosen = {str(key): value for key, value in container.items() if key != "_target_"}
    for name in chosen.keys() - inspect.signature(target).parameters.keys():  # added with "+"
        raise UserError(f"{group}.{name}: there is no such field; see --help for those there are")
    return chosen


def check_options(config: DictConfig) -> None:
    """Raises UserError for values that Lightning would take for something else, take too late, or not take at all."""
    for name in {str(key) for key in config} - TrainOptions.__dataclass_fields__.keys():  # added with "+"
        raise UserError(f"{name}: there is no such field; see --help for those there are")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"seed={config.seed}: give a whole number from 0 to {2**32 - 1}")
    trainer = config.trainer
    for name in ("max_epochs", "check_val_every_n_epoch", "log_every_n_steps", "accumulate_grad_batches"):
        if trainer[name] is not None and trainer[name] < 1:
            raise UserError(f"trainer.{name}={trainer[name]}: give a whole number of at least 1")
    if trainer.max_steps != -1 and trainer.max_steps < 1:
        raise UserError(f"trainer.max_steps={trainer.max_steps}: give a whole number of at least 1, or -1 for no limit")
    interval = trainer.val_check_interval
    if isinstance(interval, int | float) and not interval > 0:
        raise UserError(f"trainer.val_check_interval={interval}: give a number of batches, or a share of an epoch")
    if str(trainer.precision) in ("16-true", "16"):
        raise UserError(f"trainer.precision={trainer.precision} cannot train this model: use trainer=bf16")
    decay = (config.callbacks or {}).get("ema", {}).get("decay", 0.0)
    if not (isinstance(decay, int | float) and 0 <= decay < 1):
        raise UserError(f"callbacks.ema.decay={decay}: give a share from 0 up to, but not, 1")
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
    if isinstance(interval, int) and every is not None and interval > batches:
        raise UserError(f"trainer.val_check_interval={interval}: an epoch has {batches} batches: give at most that")


def save(config: DictConfig, folder: storage.RunFolder) -> None:
    """config.yaml as it is used, every reference resolved; .hydra/ as Hydra composed it, for Hydra's own tools."""
    storage.write_text(folder.config_path, OmegaConf.to_yaml(config, resolve=True))
    composed = folder.path / ".hydra"
    if not composed.exists():  # a resumed run keeps its first
        composed.mkdir()
        storage.write_text(composed / "config.yaml", OmegaConf.to_yaml(config))
        storage.write_text(composed / "hydra.yaml", OmegaConf.to_yaml(OmegaConf.create({"hydra": HydraConfig.get()})))
        storage.write_text(composed / "overrides.yaml", OmegaConf.to_yaml(HydraConfig.get().overrides.task))


# --- resuming --------------------------------------------------------------------------------------------------

# What a run cannot change on the way, beside the model and the data set: another order, split or random state.
FIXED = ("seed", "data.name", "data.batch_size", "data.split_seed", "optimizer.muon")
# Fields that runs may lack which began before there were any, and what such a run goes on with: as it began.
BEFORE_THEY_WERE_ADDED = {"data.elastic": 0.0, "data.fade": 0.0, "optimizer.muon": False}


def of_resumed_run(config: DictConfig, conf: Path) -> DictConfig:
    """The interrupted run's own config, with this command's overrides on top. conf: the folder of config files."""
    folder = storage.RunFolder(Path(config.ckpt_path).resolve().parent.parent)
    if not folder.config_path.is_file():
        raise UserError(f"{config.ckpt_path} is not inside a run folder: {folder.config_path} is missing")
    own = OmegaConf.load(folder.config_path)
    assert isinstance(own, DictConfig)
    for name, value in BEFORE_THEY_WERE_ADDED.items():
        if OmegaConf.select(own, name) is None:
            OmegaConf.update(own, name, value, force_add=True)
    own = relocated(own, str(own.run_folder), str(folder.path))
    before = {name: OmegaConf.select(own, name) for name in FIXED}
    for override in OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task)):
        key = override.key_or_group.split("@")[0]
        if key not in config and "." not in key:
            raise UserError(f"{key}= cannot be changed when a run is resumed: give the fields that should differ")
        OmegaConf.update(own, key, OmegaConf.select(config, key), merge=False, force_add=True)
    for name, value in before.items():
        if OmegaConf.select(own, name) not in (value, None):
            raise UserError(f"{name}={OmegaConf.select(own, name)} cannot resume a run that began with {value}")
        OmegaConf.update(own, name, value)
    foreign = targets(own) - targets(config) - shipped_targets(conf)
    if foreign:  # a config file must not decide which code runs
        raise UserError(f"{folder.config_path} names classes that this program does not know: {', '.join(foreign)}")
    own.ckpt_path = str(Path(config.ckpt_path).resolve())
    own.run_folder = str(folder.path)
    return own


def relocated(config: DictConfig, old: str, new: str) -> DictConfig:
    """The config of a run that may have been moved, or is resumed from another folder than it began in."""

    def follow(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: follow(item) for key, item in value.items()}
        if isinstance(value, list):
            return [follow(item) for item in value]
        return new + value[len(old) :] if isinstance(value, str) and value.startswith(old) else value

    return OmegaConf.create(follow(OmegaConf.to_container(config)))


def targets(config: Any) -> set[str]:
    """Every `_target_` in a config."""
    if OmegaConf.is_config(config):
        config = OmegaConf.to_container(config, resolve=False)
    if isinstance(config, dict):
        own = {str(value) for key, value in config.items() if key == "_target_"}
        return own.union(*(targets(value) for value in config.values()))
    return set().union(*(targets(value) for value in config)) if isinstance(config, list) else set()


def shipped_targets(conf: Path) -> set[str]:
    """Every `_target_` in the config files of `conf` and in the schemas."""

    def stored(entry: Any) -> list[Any]:
        if isinstance(entry, dict):
            return [node for item in entry.values() for node in stored(item)]
        return [entry.node]

    files = [OmegaConf.load(file) for file in conf.rglob("*.yaml")]
    return set().union(*(targets(node) for node in [*files, *stored(ConfigStore.instance().repo)]))
