"""The schemas of conf/: typed, from the constructors' signatures, so that each default has one place."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, get_type_hints

from hydra.core.config_store import ConfigStore
from hydra_zen import builds
from lightning import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging

from attention_visualizer.data.datamodule import ImageDataModule
from attention_visualizer.models.vit_config import ViTConfig
from attention_visualizer.runs.config_fields import set_by_program
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


# Each group's class: the code says which one, not the config.
CLASSES: dict[str, Any] = {
    "model": ViTConfig,
    "data": ImageDataModule,
    "optimizer": Classifier,
    "trainer": Trainer,
}
# Callbacks are chosen by the config, which names their class. A name of ours that is saved with a run must never move.
CALLBACKS: dict[str, tuple[Any, str]] = {
    "attention_logger": (AttentionLogger, "attention_visualizer.AttentionLogger"),
    "ema": (EMAWeightAveraging, f"{EMAWeightAveraging.__module__}.{EMAWeightAveraging.__qualname__}"),
}
SCHEMA_NAMES = {  # by which conf/ refers to them; with an underscore, so that they are not offered as choices
    "model": "_vision_transformer",
    "data": "_image_data_module",
    "optimizer": "_classifier",
    "trainer": "_lightning_trainer",
    "attention_logger": "_attention_logger",
    "ema": "_ema_weights",
}


def register_schemas() -> None:
    """Make the schemas known to Hydra."""
    add = ConfigStore.instance().store
    add("train_options", TrainOptions)
    for group, target in CLASSES.items():
        add(SCHEMA_NAMES[group], schema(target, set_by_program(group)), group=group)
    for name, (target, public_name) in CALLBACKS.items():
        path = f"callbacks.{name}"
        add(SCHEMA_NAMES[name], schema(target, set_by_program(path), public_name), group="callbacks", package=path)


def schema(target: Any, excluded: tuple[str, ...], public_name: str | None = None) -> type:
    """Make a dataclass of the parameters of `target`, with their types as far as OmegaConf knows them, and defaults.

    public_name: what the config shall say as `_target_`.
    """

    def parameters() -> None: ...

    parameters.__qualname__ = parameters.__name__  # builds() refuses what is not importable
    parameters.__signature__ = inspect.signature(target)  # type: ignore[attr-defined]
    parameters.__annotations__ = get_type_hints(target.__init__)  # without the bounds that Annotated adds
    typed = [each for each in fields(builds(parameters, populate_full_signature=True, zen_exclude=excluded))]
    named: list[Any] = [] if public_name is None else [("_target_", str, field(default=public_name))]
    return make_dataclass(
        target.__name__, [*named, *((each.name, each.type, each) for each in typed if each.name != "_target_")]
    )
