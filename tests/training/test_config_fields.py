"""The table of what fields mean names fields that exist, and every field of the schemas was decided on."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from omegaconf import OmegaConf

from attention_visualizer.data.datamodule import ImageDataModule
from attention_visualizer.runs.config_fields import FIELDS, field_named, is_architecture, values_before_added
from attention_visualizer.training.resuming import FIXED, leaves
from attention_visualizer.training.schemas import CALLBACKS, CLASSES, TrainOptions
from attention_visualizer.training.training_state import CHANGEABLE
from tests.helpers.runs import compose_train

# Fields that mean no more than their value: they may change on resuming, the trained weights depend on them, and they
# were always there. Whoever adds a field puts it here or into FIELDS.
ORDINARY = """
    model.dropout model.attention_dropout
    data.augment data.rotation data.translation data.scaling data.shear
    optimizer.warmup_share optimizer.label_smoothing
    trainer.strategy trainer.num_nodes trainer.precision trainer.max_epochs trainer.min_epochs trainer.max_steps
    trainer.min_steps trainer.max_time trainer.limit_train_batches trainer.limit_val_batches
    trainer.limit_predict_batches trainer.overfit_batches trainer.val_check_interval trainer.check_val_every_n_epoch
    trainer.accumulate_grad_batches trainer.gradient_clip_val trainer.gradient_clip_algorithm trainer.deterministic
    trainer.benchmark trainer.inference_mode trainer.use_distributed_sampler trainer.profiler trainer.detect_anomaly
    trainer.barebones trainer.sync_batchnorm trainer.reload_dataloaders_every_n_epochs trainer.model_registry
    callbacks.ema._target_ callbacks.ema.decay callbacks.ema.use_buffers callbacks.ema.update_every_n_steps
    callbacks.ema.update_starting_at_step callbacks.ema.update_starting_at_epoch
""".split()


def schema_fields() -> Iterator[str]:
    """Every field that a command line can give, and the arguments that the program gives itself."""
    config = OmegaConf.to_container(compose_train("callbacks=ema", "logger=[tensorboard,csv]"), resolve=False)
    yield from (name for name, _ in leaves(config))
    yield from TrainOptions.__dataclass_fields__
    targets = {**CLASSES, **{f"callbacks.{name}": target for name, (target, _) in CALLBACKS.items()}}
    for group, target in targets.items():
        yield from (f"{group}.{name}" for name in inspect.signature(target).parameters)


def test_every_name_in_the_table_exists() -> None:
    groups = {"logger.tensorboard", "callbacks.attention_logger"}
    assert set(FIELDS) - set(schema_fields()) - groups == set()


def test_every_field_was_decided_on() -> None:
    undecided = {name for name in schema_fields() if field_named(name) == field_named("")} - set(ORDINARY)
    assert undecided - {"callbacks", "data", "optimizer", "trainer", "callbacks.ema.kwargs"} == set()
    assert set(ORDINARY) <= set(schema_fields())


def test_what_must_stay_on_resuming() -> None:
    assert set(FIXED) == {"seed", "data.name", "data.batch_size", "data.split_seed", "optimizer.muon"}
    module = ImageDataModule("digits")
    module.load()
    order = {name if name == "seed" else f"data.{name}" for name in module._recipe()}
    assert order <= set(FIXED)
    free = {name for name in inspect.signature(CLASSES["model"]).parameters if not is_architecture(name)}
    assert free == {"dropout", "attention_dropout"}


def test_what_a_run_that_lacks_a_field_goes_on_with() -> None:
    assert values_before_added("model.") == {"model.stem": "patches"}
    assert values_before_added("data.") == {"data.elastic": 0.0, "data.fade": 0.0}


def test_what_a_resumed_run_may_change_in_its_optimiser() -> None:
    assert CHANGEABLE == {"lr", "initial_lr", "weight_decay", "betas", "fused"}
