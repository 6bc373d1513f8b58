"""train.py from end to end: what a run leaves behind."""

from __future__ import annotations

import csv
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning import Trainer
from torch import Tensor

from attention_visualizer.data.datamodule import ImageDataModule
from attention_visualizer.runs.checkpoint import load_checkpoint
from attention_visualizer.training.classifier import Classifier
from tests.helpers.runs import (
    BARE,
    BATCHES,
    BRIEF,
    EPOCHS,
    PROJECT,
    TINY,
    Outcome,
    TrainedRun,
    assert_same_training,
    compose_train,
    leaves,
    only_run,
    read_checkpoint,
    run_train,
    train_function,
    trained_run,
)

STEPS = EPOCHS * BATCHES


@pytest.fixture
def run() -> TrainedRun:
    return trained_run()


def test_a_run_folder_holds_what_the_design_promises(run: TrainedRun) -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d-\d{6}", run.path.name)
    files = {str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file()}
    expected = {"checkpoints/best.ckpt", "checkpoints/last.ckpt", "config.yaml", "run.json", "attention_history.npz"}
    expected |= {".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml", "csv/metrics.csv"}
    assert expected <= files
    assert any(name.startswith("events.out.tfevents") for name in files)
    assert not any("=" in name or "partial" in name for name in files)
    assert {path.name for path in run.path.parent.parent.iterdir()} == {"runs"}  # nothing beside it


def test_the_manifest_says_how_it_went(run: TrainedRun) -> None:
    manifest = run.manifest
    assert manifest["status"] == "completed"
    assert manifest["data"]["name"] == "digits"
    assert manifest["data"]["sizes"] == {"train": 1297, "validation": 200, "test": 300}
    assert manifest["versions"]["torch"] == version("torch")
    assert {"python", "lightning", "attention-visualizer"} <= set(manifest["versions"])
    assert "commit" in manifest and "created" in manifest and manifest["seed"] == 0
    assert manifest["metrics"]["epochs"] == EPOCHS and manifest["metrics"]["seconds"] > 0


def test_the_manifest_names_the_checkpoints_relative_to_itself(run: TrainedRun) -> None:
    named = run.manifest["checkpoints"]
    assert {"best", "last"} <= set(named)
    for path in named.values():
        assert not Path(path).is_absolute()
        assert (run.path / path).is_file()
    assert str(run.path.parent) not in (run.path / "run.json").read_text()


def test_what_is_printed_at_the_end_can_be_pasted(run: TrainedRun) -> None:
    out = run.outcome.out
    where = f"runs/{run.path.name}"
    assert f"tensorboard --logdir {where} --samples_per_plugin images=200\n" in out
    assert f"python {PROJECT / 'analyze.py'} run={where} ckpt=best\n" in out
    assert f"Run folder:   {where}\n" in out
    metrics = run.manifest["metrics"]
    assert f"{metrics['validation_accuracy']:.2%}" in out and f"{metrics['test_accuracy']:.2%}" in out
    assert "Traceback" not in run.outcome.err


def test_the_saved_config_is_resolved(run: TrainedRun) -> None:
    text = (run.path / "config.yaml").read_text()
    assert "${" not in text
    config = yaml.safe_load(text)
    assert config["model"]["embed_dim"] == 24 and config["data"]["name"] == "digits"
    assert config["data"]["batch_size"] == 103 and config["trainer"]["max_epochs"] == EPOCHS
    overrides = yaml.safe_load((run.path / ".hydra" / "overrides.yaml").read_text())
    assert set(TINY) <= set(overrides)
    assert "hydra" in yaml.safe_load((run.path / ".hydra" / "hydra.yaml").read_text())


def test_defaults_that_depend_on_the_data_are_recorded(tmp_path: Path) -> None:
    small = ("data=digits", "model.embed_dim=8", "model.num_layers=1", *BARE, "test=false")
    outcome = run_train(*small, "trainer.limit_train_batches=1", "trainer.max_steps=2", folder=tmp_path)
    assert outcome.exit_code == 0, outcome.err
    config = yaml.safe_load((only_run(tmp_path) / "config.yaml").read_text())
    assert (config["data"]["batch_size"], config["trainer"]["max_epochs"]) == (32, 60)


@pytest.mark.parametrize("name", ["best", "last"])
def test_checkpoints_hold_only_tensors_and_plain_values(run: TrainedRun, name: str) -> None:
    content = read_checkpoint(run.path / "checkpoints" / f"{name}.ckpt")  # with weights_only=True
    kinds = {type(value) for _, value in leaves(content)}
    assert kinds <= {Tensor, int, float, str, bool, type(None)}
    assert content["attention_visualizer"]["data"]["name"] == "digits"
    assert content["attention_visualizer"]["model"]["embed_dim"] == 24


def test_best_is_the_best_epoch_and_last_the_last(run: TrainedRun) -> None:
    rows = list(csv.DictReader((run.path / "csv" / "metrics.csv").open()))
    by_step = {
        int(row["step"]) + 1: float(row["validation/accuracy"]) for row in rows if row["validation/accuracy"]
    }  # Lightning counts the step in progress
    assert list(by_step) == [BATCHES, 2 * BATCHES, 3 * BATCHES]
    best, last = (load_checkpoint(run.path / "checkpoints" / f"{name}.ckpt") for name in ("best", "last"))
    assert best.validation_accuracy == max(by_step.values()) == run.manifest["metrics"]["validation_accuracy"]
    assert best.step == max(by_step, key=lambda step: by_step[step])
    assert last.step == STEPS and last.validation_accuracy == by_step[STEPS]


def test_last_is_saved_when_the_validation_accuracy_does_not_rise(tmp_path: Path) -> None:
    still = ("optimizer.learning_rate=1e-30", "optimizer.weight_decay=0", "trainer.max_epochs=3", "test=false")
    assert run_train(*BRIEF, *BARE, *still, folder=tmp_path).exit_code == 0
    checkpoints = only_run(tmp_path) / "checkpoints"
    assert read_checkpoint(checkpoints / "best.ckpt")["global_step"] == 2
    assert read_checkpoint(checkpoints / "last.ckpt")["global_step"] == 6


def test_test_metrics_are_those_of_the_best_checkpoint(run: TrainedRun) -> None:
    data = ImageDataModule(name="digits", batch_size=103)
    data.load()
    images, labels = data.splits["test"]
    pixels = (images.float() / 255 - data.description.mean) / data.description.std
    with torch.no_grad():
        predicted = load_checkpoint(run.path / "checkpoints" / "best.ckpt").build_model()(pixels).argmax(dim=1)
    confusion = np.zeros((10, 10), int)
    np.add.at(confusion, (labels.numpy(), predicted.numpy()), 1)
    metrics = run.manifest["metrics"]
    assert metrics["test_confusion"] == confusion.tolist()  # 300 in all, so tested once
    assert metrics["test_accuracy"] == pytest.approx(float((predicted == labels).float().mean()))
    by_class = [float((predicted[labels == label] == label).float().mean()) for label in range(10)]
    assert metrics["test_accuracy_by_class"] == pytest.approx(by_class, abs=1e-4)


def test_the_same_command_gives_the_same_weights_and_tests_once(
    run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tested = []
    test = Trainer.test

    def spying(self: Trainer, *positional: Any, **named: Any) -> Any:
        tested.append(Path(str(named["ckpt_path"])).name)
        return test(self, *positional, **named)

    monkeypatch.setattr(Trainer, "test", spying)
    outcome = run_train(*TINY, f"trainer.max_epochs={EPOCHS}", *BARE, folder=tmp_path)
    assert outcome.exit_code == 0, outcome.err
    assert tested == ["best.ckpt"]
    other = only_run(tmp_path)
    # That one logged attention, with dropout of attention weights and augmentation; this one did not.
    for name in ("best.ckpt", "last.ckpt"):
        assert_same_training(run.path / "checkpoints" / name, other / "checkpoints" / name)
    assert not list(other.glob("events.*")) and not (other / "attention_history.npz").exists()


def test_a_run_that_stops_before_its_first_validation_ends_in_order(tmp_path: Path) -> None:
    outcome = run_train(*BRIEF[:-1], *BARE, "trainer.max_time='00:00:00:00'", folder=tmp_path)
    assert "Traceback" not in outcome.err, outcome.err[-600:]
    assert TrainedRun(only_run(tmp_path), outcome).manifest["status"] != "running"


def test_train_returns_a_python_float(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    score = train_function(compose_train(*BRIEF, *BARE, "test=false"))
    assert type(score) is float and 0.0 <= score <= 1.0
    assert "test_accuracy" not in TrainedRun(only_run(tmp_path), Outcome(0, "", "")).manifest["metrics"]


def test_a_run_whose_training_fails_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("broken in batch")

    monkeypatch.setattr(Classifier, "on_train_batch_end", fail, raising=False)
    assert run_train(*BRIEF, *BARE, folder=tmp_path).exit_code != 0
    manifest = TrainedRun(only_run(tmp_path), Outcome(1, "", "")).manifest
    assert manifest["status"] == "failed" and manifest["error"] == "RuntimeError: broken in batch"
