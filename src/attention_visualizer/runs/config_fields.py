"""What each field of a run's configuration means for resuming it and for comparing it with other runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Field:
    """What a field means beyond its value. The defaults are what most fields mean; FIELDS holds the exceptions."""

    #: Whether a run that goes on may have another value than it began with.
    may_change_on_resume: bool = True
    #: Whether the weights that training arrives at depend on it; of runs to compare, the seed is no hyperparameter.
    is_hyperparameter: bool = True
    #: Whether runs that differ in it are different runs to resume=auto; not where it says where things are.
    identifies_run: bool = True
    #: Whether the program gives the value, and not the command line.
    is_set_by_program: bool = False
    #: What runs go on with that began before the field was added; None: it was always there.
    value_before_added: Any = None
    #: Its names in the parameter groups of a saved optimiser.
    optimizer_keys: tuple[str, ...] = ()


FIXED = Field(may_change_on_resume=False)
NO_EFFECT = Field(is_hyperparameter=False)
LOCATION = Field(is_hyperparameter=False, identifies_run=False)
FROM_PROGRAM = Field(is_set_by_program=True)

# By dotted name; a group's entry stands for all its fields that have none of their own.
FIELDS: dict[str, Field] = {
    "seed": Field(may_change_on_resume=False, is_hyperparameter=False),
    "test": NO_EFFECT,
    "compile": NO_EFFECT,
    **dict.fromkeys(("ckpt_path", "resume", "export", "runs_dir", "run_folder"), LOCATION),
    "model": FIXED,
    "model.dropout": Field(),
    "model.attention_dropout": Field(),
    **dict.fromkeys(  # given by the data set
        ("model.img_size", "model.in_channels", "model.num_classes"),
        Field(may_change_on_resume=False, is_hyperparameter=False),
    ),
    "model.stem": Field(may_change_on_resume=False, value_before_added="patches"),
    "data.name": FIXED,
    "data.batch_size": FIXED,
    "data.split_seed": FIXED,
    "data.seed": Field(may_change_on_resume=False, is_set_by_program=True),
    **dict.fromkeys(("data.data_dir", "data.fallback", "data.eval_batch_size"), NO_EFFECT),
    "data.elastic": Field(value_before_added=0.0),
    "data.fade": Field(value_before_added=0.0),
    "optimizer.learning_rate": Field(optimizer_keys=("lr", "initial_lr")),
    "optimizer.weight_decay": Field(optimizer_keys=("weight_decay",)),
    "optimizer.beta1": Field(optimizer_keys=("betas",)),
    "optimizer.beta2": Field(optimizer_keys=("betas",)),
    "optimizer.muon": Field(may_change_on_resume=False, value_before_added=False),
    **dict.fromkeys(("optimizer.model", "optimizer.num_classes", "optimizer.seed"), FROM_PROGRAM),
    **dict.fromkeys(
        [
            *("trainer.accelerator", "trainer.devices", "trainer.log_every_n_steps", "trainer.enable_progress_bar"),
            *("trainer.enable_autolog_hparams", "trainer.limit_test_batches"),
            "trainer.num_sanity_val_steps",
        ],
        NO_EFFECT,
    ),
    **dict.fromkeys(
        ("trainer.default_root_dir", "trainer.enable_checkpointing"),
        Field(is_hyperparameter=False, is_set_by_program=True),
    ),
    **dict.fromkeys(("trainer.logger", "trainer.callbacks", "trainer.plugins", "trainer.fast_dev_run"), FROM_PROGRAM),
    "logger": NO_EFFECT,
    # What changed its default since version 2.0.0: runs of then are still those of these settings.
    **dict.fromkeys(("logger.tensorboard", "trainer.enable_model_summary"), LOCATION),
    "callbacks.attention_logger": NO_EFFECT,
    **dict.fromkeys(
        [f"callbacks.attention_logger.{name}" for name in ("probe_images", "probe_labels", "geometry")],
        Field(is_hyperparameter=False, is_set_by_program=True),
    ),
    "callbacks.attention_logger.per_head_scalars": Field(is_hyperparameter=False, value_before_added=False),
    "callbacks.ema.device": FROM_PROGRAM,
}


def field_named(name: str) -> Field:
    """Return the entry of the field with this dotted name, or of the group nearest above it, or the default."""
    while name:
        if name in FIELDS:
            return FIELDS[name]
        name = name.rpartition(".")[0]
    return Field()


def is_architecture(field: str) -> bool:
    """Whether a model's weights depend on this field of its configuration (its dropout may change on resuming)."""
    return not field_named(f"model.{field}").may_change_on_resume


def set_by_program(group: str) -> tuple[str, ...]:
    """Return the names, without the group's, of the arguments that the command line does not give."""
    return tuple(
        name.removeprefix(f"{group}.")
        for name, field in FIELDS.items()
        if field.is_set_by_program and name.startswith(f"{group}.")
    )


def values_before_added(group: str = "") -> dict[str, Any]:
    """Return what runs go on with that lack fields of `group`, by dotted name; all groups' without one."""
    return {
        name: field.value_before_added
        for name, field in FIELDS.items()
        if field.value_before_added is not None and name.startswith(group)
    }
