"""Every config composes, states only differences from the constructors' defaults, and trains."""

from __future__ import annotations

import csv
import functools
import inspect
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.utils import get_class
from lightning import Trainer
from omegaconf import OmegaConf
from omegaconf.errors import ReadonlyConfigError
from torch import nn

from attention_visualizer.data import datasets
from attention_visualizer.data.datamodule import ImageDataModule
from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.training.classifier import Classifier
from attention_visualizer.training.configuration import with_values
from attention_visualizer.watching.attention_logger import AttentionLogger
from tests.helpers.runs import BARE, BRIEF, PROJECT, compose_train, read_checkpoint, run_folders, run_train

CONF = PROJECT / "conf"
EXPERIMENTS = sorted((CONF / "experiment").glob("*.yaml"))
# group -> the class that its fields go to, and the parameters that train.py fills in itself
GROUPS: dict[str, tuple[Any, set[str]]] = {
    "model": (VisionTransformer, set()),
    "data": (ImageDataModule, {"seed"}),
    "optimizer": (Classifier, {"model", "num_classes", "seed"}),
    "trainer": (
        Trainer,
        {"logger", "callbacks", "default_root_dir", "plugins", "enable_checkpointing", "fast_dev_run"},
    ),
}


def defaults_of(target: Any) -> dict[str, Any]:
    parameters = inspect.signature(target).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters}


def targets_in(node: Any) -> list[dict[str, Any]]:
    """Every part of a config that names a `_target_`."""
    if isinstance(node, dict):
        own = [node] if "_target_" in node else []
        return own + [part for value in node.values() for part in targets_in(value)]
    return [part for item in node for part in targets_in(item)] if isinstance(node, list) else []


@pytest.fixture(autouse=True)
def digits_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_digits", read_digits)


read_digits = functools.cache(datasets.load_digits)


# --- composing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["data=digits"],
        ["data=mnist"],
        ["logger=[tensorboard,csv]"],
        ["logger=[csv]"],
        ["logger=csv"],
        ["logger=none"],
        ["callbacks=none"],
        ["callbacks=ema"],
        ["trainer=cpu"],
        ["trainer=gpu"],
        ["trainer=bf16"],
    ],
    ids=" ".join,
)
def test_group_choices_compose_and_name_real_classes(overrides: list[str]) -> None:
    config = compose_train(*overrides)
    for part in targets_in(OmegaConf.to_container(config)):
        known = set(inspect.signature(get_class(part["_target_"])).parameters)
        assert set(part) - {"_target_"} <= known, part["_target_"]


def test_group_choices_choose() -> None:
    assert compose_train("data=digits").data.name == "digits"
    assert set(compose_train("logger=[tensorboard,csv]").logger) == {"tensorboard", "csv"}
    assert set(compose_train("logger=csv").logger) == {"csv"}
    assert not compose_train("logger=none").logger
    assert not compose_train("callbacks=none").callbacks
    assert set(compose_train().callbacks) == {"attention_logger"}
    assert compose_train("trainer=cpu").trainer.accelerator == "cpu"
    assert compose_train("trainer=gpu").trainer.accelerator == "gpu"
    assert compose_train("trainer=gpu").trainer.precision == "bf16-mixed"
    assert compose_train("trainer=bf16").trainer.precision == "bf16-mixed"
    assert compose_train("trainer=bf16").trainer.gradient_clip_val == compose_train().trainer.gradient_clip_val


def test_ema_comes_on_top_of_the_attention_logger() -> None:
    assert set(compose_train("callbacks=ema").callbacks) == {"attention_logger", "ema"}


def test_the_default_model_is_the_documented_one() -> None:
    fields = OmegaConf.to_container(compose_train().model)
    model = VisionTransformer(**{name: value for name, value in fields.items() if name != "_target_"})
    assert sum(parameter.numel() for parameter in model.parameters()) == 805_130


@pytest.mark.parametrize("group", GROUPS)
def test_a_groups_fields_are_its_constructors_parameters_with_their_defaults(group: str) -> None:
    target, ours = GROUPS[group]
    config = OmegaConf.to_container(compose_train()[group])
    defaults = defaults_of(target)
    assert set(config) - {"_target_"} == set(defaults) - ours
    stated = yaml.safe_load((CONF / group / f"{chosen(group)}.yaml").read_text())
    for name, value in config.items():
        if name != "_target_" and name not in stated:
            assert value == defaults[name], name


def chosen(group: str) -> str:
    choices = yaml.safe_load((CONF / "train.yaml").read_text())["defaults"]
    return next(choice[group] for choice in choices if isinstance(choice, dict) and group in choice)


def another(name: str, value: Any) -> Any:
    """A value of the same type that is not the default."""
    words = {
        "positional_embedding": "sincos",
        "pooling": "mean",
        "stem": "convolutions",
        "name": "digits",
        "fallback": None,
    }
    if name in words:
        return words[name]
    if isinstance(value, bool):
        return not value
    return value * 2 + 3 if isinstance(value, int | float) else 1


@pytest.mark.parametrize("group", GROUPS)
def test_every_field_can_be_overridden(group: str) -> None:
    before = OmegaConf.to_container(compose_train()[group])
    wanted = {name: another(name, value) for name, value in before.items() if name != "_target_"}
    written = [f"{group}.{name}={'null' if value is None else value}" for name, value in wanted.items()]
    after = OmegaConf.to_container(compose_train(*written)[group])
    for name, value in wanted.items():
        assert before[name] != value  # the test's own mistake
        # A 1 for what is null becomes whatever type the field has.
        assert str(after[name]).lower() == str(value).lower() or (before[name] is None and after[name]), name


def test_overrides_outside_the_groups() -> None:
    config = compose_train("seed=7", "runs_dir=elsewhere", "test=false", "callbacks.attention_logger.head_grids=5")
    assert (config.seed, config.runs_dir, config.test) == (7, "elsewhere", False)
    assert config.callbacks.attention_logger.head_grids == 5


def test_what_the_program_fills_in_goes_into_a_copy_that_nobody_writes_to() -> None:
    config = compose_train()
    filled = with_values(config, {"run_folder": "elsewhere", "logger.tensorboard.purge_step": 3})
    assert filled.logger.tensorboard.save_dir == "elsewhere" and filled.logger.tensorboard.purge_step == 3
    assert config.run_folder is None and "purge_step" not in config.logger.tensorboard
    with pytest.raises(ReadonlyConfigError):
        filled.trainer.max_epochs = 3
    assert with_values(filled, {"seed": 7}).seed == 7


def test_configs_name_no_class_but_those_that_they_choose() -> None:
    config = OmegaConf.to_container(compose_train("callbacks=ema", "logger=[tensorboard,csv]"))
    assert {part["_target_"] for part in targets_in(config)} == {
        "attention_visualizer.AttentionLogger",
        "lightning.pytorch.callbacks.weight_averaging.EMAWeightAveraging",
        "attention_visualizer.TensorBoardLogger",
        "lightning.pytorch.loggers.CSVLogger",
    }


# --- written in one place --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_yaml_restates_a_default(path: Path) -> None:
    content = yaml.safe_load(path.read_text()) or {}
    stated = [(get_class(part["_target_"]), part) for part in targets_in(content)]
    if path.parent.name in GROUPS:
        stated.append((GROUPS[path.parent.name][0], content))
    if path.parent.name == "experiment":
        stated += [(GROUPS[group][0], content[group]) for group in GROUPS if group in content]
        stated.append((AttentionLogger, content.get("callbacks", {}).get("attention_logger", {})))
    for target, fields in stated:
        defaults = defaults_of(target)
        for name, value in fields.items():
            if name in defaults:
                assert (type(value), value) != (type(defaults[name]), defaults[name]), f"{name}: {value}"


# --- experiments -----------------------------------------------------------------------------------------------


def command_of(experiment: Path) -> list[str]:
    """The arguments of the command that the file opens with."""
    package, command, *_ = experiment.read_text().splitlines()
    assert package == "# @package _global_"
    assert command.startswith("# python train.py ")
    return shlex.split(command.removeprefix("# python train.py "))


def test_there_is_an_experiment_for_every_ablation() -> None:
    asked = {"debug", "width", "depth", "heads", "patch_size", "dropout", "positions", "pooling"} | {"seed", "accurate"}
    assert asked <= {path.stem for path in EXPERIMENTS}


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiments_train(experiment: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(experiment.read_text())
    swept = content.get("hydra", {}).get("sweeper", {}).get("params", {})
    jobs = math.prod(len(str(values).split(",")) for values in swept.values())
    small = ["data=digits", "data.batch_size=5", "trainer.max_epochs=1", "trainer.limit_train_batches=2"]
    quick = ["trainer.limit_val_batches=1", "data.eval_batch_size=7", "model.mlp_dim=29", *BARE]
    command = command_of(experiment)
    assert f"experiment={experiment.stem}" in command and ("-m" in command) == bool(swept)
    outcome = run_train(*command, *small, *quick, folder=tmp_path)
    assert outcome.exit_code == 0, outcome.err + outcome.out
    if not swept:
        assert (run_folders(tmp_path)[0] / "checkpoints" / "best.ckpt").is_file()
        return
    (sweep,) = run_folders(tmp_path)
    rows = list(csv.DictReader((sweep / "sweep.csv").open()))
    assert [row["status"] for row in rows] == ["completed"] * jobs
    configs = [OmegaConf.load(sweep / row["run"] / "config.yaml") for row in rows]
    for field, values in swept.items():
        assert {str(OmegaConf.select(config, field)) for config in configs} == set(str(values).split(","))


def test_a_compiled_model_trains_and_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []

    def compile_quickly(model: nn.Module, mode: str) -> None:
        modes.append(mode)
        nn.Module.compile(model, backend="aot_eager")  # graphs as always, without minutes of C++

    monkeypatch.setattr(VisionTransformer, "compile", compile_quickly)
    outcome = run_train(*BRIEF, "compile=true", "trainer.limit_train_batches=3", folder=tmp_path)
    assert outcome.exit_code == 0, outcome.err
    assert modes == ["default"] and "warning" not in outcome.err.lower()
    (run,) = run_folders(tmp_path)
    names = read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]
    assert "model.head.weight" in names and not any("_orig_mod" in name for name in names)
    assert (run / "attention_history.npz").is_file()


@pytest.mark.parametrize("choice", ["callbacks=ema", "trainer=bf16", "trainer=cpu"])
def test_other_choices_train(choice: str, tmp_path: Path) -> None:
    bare = ["logger=none"] if choice.startswith("callbacks") else BARE
    outcome = run_train(*BRIEF, *bare, choice, folder=tmp_path)
    assert outcome.exit_code == 0, outcome.err


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.warmup_share=0",
        "trainer.accumulate_grad_batches=2",
        "trainer.val_check_interval=0.5",
        "trainer.num_sanity_val_steps=2",
        "trainer.gradient_clip_val=null",
        "trainer.overfit_batches=2",
    ],
)
def test_unusual_but_sensible_values_train(override: str, tmp_path: Path) -> None:
    outcome = run_train(*BRIEF, "logger=none", override, folder=tmp_path)
    assert outcome.exit_code == 0, outcome.err
