"""Train a Vision Transformer on MNIST and watch its attention. `python train.py --help` shows what can be set."""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from hydra_zen import builds, make_config
from lightning import Trainer, seed_everything
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from attention_visualizer import checkpoint, command_line, storage, training
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
    test: bool | None = None  # test best.ckpt at the end; null: yes, but not for a sweep's jobs
    runs_dir: str = "runs"
    run_folder: str | None = None  # set by this program, for loggers and callbacks to refer to


def register_schemas() -> None:
    """Makes the constructors' signatures the schemas of the groups: typed, and with each default in one place."""

    def signature(target: Any, *exclude: str) -> Any:
        return builds(target, populate_full_signature=True, zen_exclude=exclude)

    add = ConfigStore.instance().store
    add("train_options", TrainOptions)
    add("vision_transformer", signature(VisionTransformer), group="model")
    add("image_data_module", signature(ImageDataModule, "seed"), group="data")
    add("classifier", signature(Classifier, "model", "num_classes", "seed"), group="optimizer")
    add("lightning_trainer", signature(Trainer, "logger", "callbacks", "default_root_dir", "plugins"), group="trainer")
    logger = signature(AttentionLogger, "probe_images", "probe_labels")
    add("attention_logger", make_config(attention_logger=logger), group="callbacks")


register_schemas()


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> float:
    sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        return train(config, sweeping)
    except Exception as error:
        if not sweeping:
            if isinstance(error, UserError):
                command_line.fail(error)
            raise
        # The sweep's other jobs go on; its table names this one.
        folder = storage.RunFolder(Path(HydraConfig.get().runtime.output_dir))
        folder.update_manifest(status="failed", error=f"{type(error).__name__}: {error}")
        logging.getLogger("train").error("job failed: %s", error, exc_info=not isinstance(error, UserError))
        return math.nan


def train(config: DictConfig, sweeping: bool) -> float:
    """One run, from a composed config to its report; returns the best validation accuracy, for Hydra's sweepers."""
    quieten()
    resumed = None
    if config.ckpt_path is not None:
        if sweeping:
            raise UserError("ckpt_path= resumes one run: it does not go with a sweep (-m)")
        resumed = checkpoint.load_checkpoint(Path(config.ckpt_path))
        config = resumed_config(config)

    # Whatever can be wrong is found out here, before a folder is made.
    check_options(config)
    seed_everything(config.seed, verbose=False)
    data = ImageDataModule(**arguments(config, "data", ImageDataModule), seed=config.seed)
    model = VisionTransformer(**arguments(config, "model", VisionTransformer))
    classifier = Classifier(
        model, model.config["num_classes"], **arguments(config, "optimizer", Classifier), seed=config.seed
    )
    data.load()
    check_model_fits_data(model, data)
    classifier.checkpoint_block = checkpoint.block_for(
        model.config,
        data.description.to_dict(),
        data_dir=str(data.data_dir.absolute()),
        split_seed=data.split_seed,
        seed=config.seed,
    )
    if resumed is not None:
        checkpoint.refuse_other_settings(resumed, model.config, data.description.to_dict())
    # Defaults that depend on the data set are known now.
    config.data.batch_size = data.batch_size
    config.trainer.max_epochs = config.trainer.max_epochs or data.default_epochs

    if resumed is not None:
        folder = storage.RunFolder(Path(config.run_folder))
    elif sweeping:
        folder = storage.RunFolder(Path(HydraConfig.get().runtime.output_dir))
    else:
        folder = storage.RunFolder.create(Path(config.runs_dir))
    config.run_folder = str(folder.path)
    try:
        trainer = build_trainer(config, folder, None if resumed is None else resumed.step)
    except BaseException:
        if resumed is None and not sweeping:
            folder.path.rmdir()  # nothing has been written yet
        raise

    save_config(config, folder)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    storage.start_manifest(
        folder, status="running", data=data.description.to_dict(), parameters=num_parameters, seed=config.seed
    )
    print(f"Run folder: {folder.path}")
    metrics = training.fit(trainer, classifier, data, folder, config.ckpt_path)
    if config.test or (config.test is None and not sweeping):
        metrics |= training.test_best(trainer, classifier, data, folder)
    folder.update_manifest(status="completed", metrics=metrics)
    settings = OmegaConf.to_container(config, resolve=True)
    assert isinstance(settings, dict)
    recorded: dict[str, Any] = {part: settings[part] for part in ("model", "data", "optimizer", "trainer", "seed")}
    training.log_hyperparameters(trainer, recorded | {"parameters": num_parameters}, metrics)
    training.print_report(folder, data.description, metrics)
    return float(metrics["validation_accuracy"])


def quieten() -> None:
    """Silences advice that does not apply here, so that what is printed is worth reading."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (".*does not have many workers.*", ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*"):
        warnings.filterwarnings("ignore", message)


def arguments(config: DictConfig, group: str, target: Any) -> dict[str, Any]:
    """A typed group as arguments of `target`. `_target_` is left out: the code says which class, not the config."""
    container = OmegaConf.to_container(config[group], resolve=True)
    assert isinstance(container, dict)
    chosen = {str(key): value for key, value in container.items() if key != "_target_"}
    for name in chosen.keys() - inspect.signature(target).parameters.keys():  # added with "+"
        raise UserError(f"{group}.{name}: there is no such field; see --help for those there are")
    return chosen


def check_options(config: DictConfig) -> None:
    """Raises UserError for trainer values that Lightning would take for something else, or take too late."""
    if not 0 <= config.seed < 2**32:
        raise UserError(f"seed={config.seed}: give a whole number from 0 to {2**32 - 1}")
    trainer = config.trainer
    for name in ("max_epochs", "check_val_every_n_epoch", "log_every_n_steps", "accumulate_grad_batches"):
        if trainer[name] is not None and trainer[name] < 1:
            raise UserError(f"trainer.{name}={trainer[name]}: give a whole number of at least 1")
    clip = trainer.gradient_clip_val
    if clip is not None and not (isinstance(clip, int | float) and 0 <= clip < math.inf):
        raise UserError(f"trainer.gradient_clip_val={clip}: give 0 or a positive number, or null for no clipping")


def check_model_fits_data(model: VisionTransformer, data: ImageDataModule) -> None:
    description = data.description
    asked = (model.config["img_size"], model.config["in_channels"], model.config["num_classes"])
    given = (description.image_size, description.channels, description.num_classes)
    for name, mine, theirs in zip(("img_size", "in_channels", "num_classes"), asked, given, strict=True):
        if mine != theirs:
            raise UserError(f"model.{name}={mine} does not fit the data set {description.name}, which needs {theirs}")


def resumed_config(config: DictConfig) -> DictConfig:
    """The interrupted run's own config, with this command's overrides on top."""
    folder = storage.RunFolder(Path(config.ckpt_path).resolve().parent.parent)
    if not folder.config_path.is_file():
        raise UserError(f"{config.ckpt_path} is not inside a run folder: {folder.config_path} is missing")
    own = OmegaConf.load(folder.config_path)
    assert isinstance(own, DictConfig)
    for override in OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task)):
        key = override.key_or_group.split("@")[0]
        if key not in config and "." not in key:
            raise UserError(f"{key}= cannot be changed when a run is resumed: give the fields that should differ")
        OmegaConf.update(own, key, OmegaConf.select(config, key), merge=False, force_add=True)
    foreign = targets(own) - targets(config) - shipped_targets()
    if foreign:  # a config file must not decide which code runs
        raise UserError(f"{folder.config_path} names classes that this program does not know: {', '.join(foreign)}")
    own.ckpt_path = str(Path(config.ckpt_path).resolve())
    own.run_folder = str(folder.path)
    return own


def targets(config: Any) -> set[str]:
    """Every `_target_` in a config."""
    if OmegaConf.is_config(config):
        config = OmegaConf.to_container(config, resolve=False)
    if isinstance(config, dict):
        own = {str(value) for key, value in config.items() if key == "_target_"}
        return own.union(*(targets(value) for value in config.values()))
    return set().union(*(targets(value) for value in config)) if isinstance(config, list) else set()


def shipped_targets() -> set[str]:
    """Every `_target_` in conf/ and in the schemas."""
    files = (Path(__file__).parent / "conf").rglob("*.yaml")
    schemas = ConfigStore.instance().repo
    stored = [node.node for group in schemas.values() if isinstance(group, dict) for node in group.values()]
    return set().union(*(targets(OmegaConf.load(file)) for file in files), *(targets(node) for node in stored))


def build_trainer(config: DictConfig, folder: storage.RunFolder, resumed_step: int | None) -> Trainer:
    loggers = dict(config.logger or {})
    if resumed_step is not None and "tensorboard" in loggers:
        # Events after the checkpoint, which this run writes again, disappear from the charts.
        OmegaConf.update(config, "logger.tensorboard.purge_step", resumed_step + 1, force_add=True)
    try:
        return Trainer(
            **arguments(config, "trainer", Trainer),
            plugins=checkpoint.AtomicCheckpointIO(),
            logger=[hydra.utils.instantiate(logger) for logger in loggers.values()],
            callbacks=[
                *(hydra.utils.instantiate(callback) for callback in (config.callbacks or {}).values()),
                training.checkpoint_callback(folder),
            ],
            default_root_dir=folder.path,
        )
    except (MisconfigurationException, ValueError, TypeError) as error:
        hint = "; no GPU was found, use trainer=cpu" if "gpu" in str(config.trainer.accelerator) else ""
        raise UserError(f"trainer: {error}{hint}") from error


def save_config(config: DictConfig, folder: storage.RunFolder) -> None:
    """config.yaml as it is used, every reference resolved; .hydra/ as Hydra composed it, for Hydra's own tools."""
    storage.write_text(folder.config_path, OmegaConf.to_yaml(config, resolve=True))
    composed = folder.path / ".hydra"
    if not composed.exists():  # a resumed run keeps its first
        composed.mkdir()
        storage.write_text(composed / "config.yaml", OmegaConf.to_yaml(config))
        storage.write_text(composed / "hydra.yaml", OmegaConf.to_yaml(OmegaConf.create({"hydra": HydraConfig.get()})))
        storage.write_text(composed / "overrides.yaml", OmegaConf.to_yaml(HydraConfig.get().overrides.task))


if __name__ == "__main__":
    command_line.run(main)
