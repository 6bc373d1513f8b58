"""Resuming a run that was interrupted, or further with one that is finished."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from attention_visualizer.files import tensor_files
from attention_visualizer.files.tensor_files import read_torch
from attention_visualizer.runs.history import AttentionHistory
from attention_visualizer.support.training_progress import batches_done
from attention_visualizer.training import checkpoint_io
from attention_visualizer.training.classifier import Classifier
from tests.helpers.runs import (
    BARE,
    BATCHES,
    BRIEF,
    EPOCHS,
    LOGGED,
    TINY,
    Outcome,
    TrainedRun,
    assert_same_training,
    last,
    only_run,
    read_checkpoint,
    run_folders,
    run_train,
    trained_run,
)


def interrupt_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C when so many batches are done."""

    def maybe_interrupt(self: Classifier, *_: Any) -> None:
        if batches_done(self.trainer) == batches:
            raise KeyboardInterrupt

    monkeypatch.setattr(Classifier, "on_train_batch_end", maybe_interrupt, raising=False)


@dataclass(frozen=True)
class Resumed:
    path: Path
    interrupted: Outcome
    manifest_then: dict[str, Any]
    outcome: Outcome


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Resumed]:
    """The command of `trained_run`, interrupted within its third epoch and resumed."""
    folder = tmp_path_factory.mktemp("interrupted")
    # TensorBoard reads event files in the order of their names: the second they began in, the process, and its count
    # of files, as text. A run's own process counts from 0; the tests' would put its 100th before its 99th.
    pytest.MonkeyPatch().setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_after(2 * BATCHES + 5, monkeypatch)
        interrupted = run_train(*TINY, f"trainer.max_epochs={EPOCHS}", *LOGGED, folder=folder)
    path = only_run(folder)
    manifest = TrainedRun(path, interrupted).manifest
    outcome = run_train(f"ckpt_path={path}/checkpoints/last.ckpt", folder=folder)
    assert outcome.exit_code == 0, outcome.err
    assert run_folders(folder) == [path]
    yield Resumed(path, interrupted, manifest, outcome)


def test_an_interrupted_run_says_how_to_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(3, monkeypatch)
    outcome = run_train(*BRIEF, *BARE, "trainer.max_epochs=5", folder=tmp_path)
    path = only_run(tmp_path)
    assert outcome.exit_code != 0 and "Traceback" not in outcome.err
    assert TrainedRun(path, outcome).manifest["status"] == "interrupted"
    (command,) = re.findall(r"Resume: +(python .*train.py .+)", outcome.out)
    key, _, value = shlex.split(command)[-1].partition("=")
    assert key == "ckpt_path" and (tmp_path / value).resolve() == (path / "checkpoints" / "last.ckpt").resolve()


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(resumed: Resumed) -> None:
    assert resumed.interrupted.exit_code != 0 and resumed.manifest_then["status"] == "interrupted"
    for name in ("best.ckpt", "last.ckpt"):
        assert_same_training(trained_run().path / "checkpoints" / name, resumed.path / "checkpoints" / name)


def test_precision_and_optimiser_are_kept_and_halves_of_batches_go_on_as_they_would_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropout = ("model.dropout=0.1", "model.attention_dropout=0")
    command = (*TINY, *BARE, *dropout, "trainer=bf16", "trainer.accelerator=cpu", "optimizer=muon", "test=false")
    brief = ("trainer.max_epochs=2", "trainer.limit_train_batches=4")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    folders = {name: tmp_path / name for name in ("whole", "interrupted")}
    for folder in folders.values():
        folder.mkdir()
    try:
        assert run_train(*command, *brief, folder=folders["whole"]).exit_code == 0
        with monkeypatch.context() as patch:
            interrupt_after(6, patch)
            assert run_train(*command, *brief, folder=folders["interrupted"]).exit_code != 0
        path = only_run(folders["interrupted"])
        outcome = run_train(f"ckpt_path={last(path)}", folder=folders["interrupted"])
        assert outcome.exit_code == 0, outcome.err
    finally:
        torch.set_num_threads(threads)
    assert_same_training(last(only_run(folders["whole"])), last(path))
    assert read_checkpoint(last(path))["attention_visualizer"]["precision"] == "bf16-mixed"
    refused = run_train("optimizer.muon=false", f"ckpt_path={last(path)}", folder=tmp_path)
    assert refused.exit_code == 2 and "cannot resume a run that began with True" in refused.err


def test_a_resumed_run_reports_like_any_other(resumed: Resumed) -> None:
    ours, theirs = TrainedRun(resumed.path, resumed.outcome).manifest, trained_run().manifest
    assert ours["status"] == "completed" and "error" not in ours
    assert ours["created"] == resumed.manifest_then["created"]
    for name, value in theirs["metrics"].items():
        assert name == "seconds" or ours["metrics"][name] == value, name
    assert f"tensorboard --logdir runs/{resumed.path.name} " in resumed.outcome.out


def test_the_history_of_a_resumed_run_has_each_step_once(resumed: Resumed) -> None:
    ours, theirs = (
        AttentionHistory.load(path / "attention_history.npz") for path in (resumed.path, trained_run().path)
    )
    for part in ("frames", "validations"):
        names = getattr(theirs, part)[0]
        assert ours.column(part, "step").tolist() == theirs.column(part, "step").tolist()
        for name in names:
            np.testing.assert_allclose(ours.column(part, name), theirs.column(part, name), rtol=1e-6, err_msg=name)


def test_the_charts_of_a_resumed_run_have_each_step_once(resumed: Resumed) -> None:
    ours, theirs = (
        EventAccumulator(str(path), size_guidance={"scalars": 0, "images": 0}).Reload()
        for path in (resumed.path, trained_run().path)
    )
    for kind, read in (("scalars", EventAccumulator.Scalars), ("images", EventAccumulator.Images)):
        assert set(ours.Tags()[kind]) == set(theirs.Tags()[kind])
        for tag in theirs.Tags()[kind]:
            assert [event.step for event in read(ours, tag)] == [event.step for event in read(theirs, tag)], tag


def test_a_resumed_run_keeps_the_first_hydra_folder_and_its_own_config(resumed: Resumed) -> None:
    overrides = yaml.safe_load((resumed.path / ".hydra" / "overrides.yaml").read_text())
    assert set(TINY) <= set(overrides)
    ours, theirs = (yaml.safe_load((path / "config.yaml").read_text()) for path in (resumed.path, trained_run().path))
    for group in ("model", "data", "optimizer", "trainer", "callbacks", "seed"):
        assert ours[group] == theirs[group]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of two epochs, which tests copy before they resume it."""
    folder = tmp_path_factory.mktemp("finished")
    outcome = run_train(*BRIEF, "trainer.max_epochs=2", "logger=[tensorboard,csv]", "test=false", folder=folder)
    assert outcome.exit_code == 0, outcome.err
    return only_run(folder)


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "runs" / finished.name))


def epochs_in_csv(run_folder: Path) -> list[int]:
    rows = csv.DictReader((run_folder / "csv" / "metrics.csv").open())
    return [int(row["epoch"]) for row in rows if row["validation/accuracy"]]


def test_overrides_go_on_top_of_the_runs_own_config(copied: Path, tmp_path: Path) -> None:
    outcome = run_train(f"ckpt_path={last(copied)}", "trainer.max_epochs=3", "test=true", folder=tmp_path)
    assert outcome.exit_code == 0, outcome.err
    assert read_checkpoint(last(copied))["global_step"] == 6
    manifest = TrainedRun(copied, outcome).manifest
    assert manifest["metrics"]["epochs"] == 3 and "test_accuracy" in manifest["metrics"]
    config = yaml.safe_load((copied / "config.yaml").read_text())
    assert config["trainer"]["max_epochs"] == 3 and config["trainer"]["limit_train_batches"] == 2


@pytest.mark.parametrize("how", ["ckpt_path", "resume"])
def test_a_checkpoint_is_read_once_on_its_way_into_training(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    read: list[str] = []

    def reading(file: Any, *arguments: Any) -> Any:
        read.append(Path(file.name).name)
        return read_torch(file, *arguments)

    for module in (tensor_files, checkpoint_io):  # both of them read torch's archives
        monkeypatch.setattr(module, "read_torch", reading)
    if how == "resume":
        manifest = json.loads((copied / "run.json").read_text())
        (copied / "run.json").write_text(json.dumps(manifest | {"status": "interrupted"}))
    command = [*BRIEF, "trainer.max_epochs=2", "logger=[tensorboard,csv]", "test=false", "resume=auto"]
    outcome = run_train(*(command if how == "resume" else [f"ckpt_path={last(copied)}"]), folder=tmp_path)
    assert outcome.exit_code == 0, outcome.err
    assert run_folders(tmp_path) == [copied] and read == ["last.ckpt"]


def test_a_run_from_before_a_field_was_there_goes_on_without_it(copied: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((copied / "config.yaml").read_text())
    assert config["data"].pop("elastic") > 0 and config["data"].pop("fade") > 0
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    outcome = run_train(f"ckpt_path={last(copied)}", "trainer.max_epochs=3", folder=tmp_path)
    assert outcome.exit_code == 0, outcome.err
    resumed = yaml.safe_load((copied / "config.yaml").read_text())
    assert resumed["data"]["elastic"] == resumed["data"]["fade"] == 0


def test_resuming_keeps_the_csv_of_the_epochs_before(copied: Path, tmp_path: Path) -> None:
    assert epochs_in_csv(copied) == [0, 1]
    outcome = run_train(f"ckpt_path={last(copied)}", "trainer.max_epochs=3", folder=tmp_path)
    assert outcome.exit_code == 0, outcome.err
    assert epochs_in_csv(copied) == [0, 1, 2]


def test_a_run_that_was_moved_resumes_where_it_is_now(copied: Path, tmp_path: Path) -> None:
    moved, elsewhere = tmp_path / "moved", tmp_path / "elsewhere"
    copied.rename(moved)
    elsewhere.mkdir()
    outcome = run_train(f"ckpt_path={last(moved)}", "trainer.max_epochs=3", folder=elsewhere)
    assert outcome.exit_code == 0, outcome.err
    assert list(elsewhere.iterdir()) == [] and list((tmp_path / "runs").iterdir()) == []
    assert read_checkpoint(last(moved))["global_step"] == 6


def test_resuming_a_finished_run_leaves_it_finished(tmp_path: Path) -> None:
    assert run_train(*BRIEF, *BARE, "test=false", folder=tmp_path).exit_code == 0
    path = only_run(tmp_path)
    weights = read_checkpoint(last(path))["state_dict"]
    outcome = run_train(f"ckpt_path={last(path)}", folder=tmp_path)
    assert outcome.exit_code == 0, outcome.err
    assert TrainedRun(path, outcome).manifest["status"] == "completed"
    assert all(torch.equal(weights[name], value) for name, value in read_checkpoint(last(path))["state_dict"].items())


def test_a_run_that_was_moved_remembers_its_best(copied: Path, tmp_path: Path) -> None:
    before = TrainedRun(copied, Outcome(0, "", "")).manifest["metrics"]["validation_accuracy"]
    best = (copied / "checkpoints" / "best.ckpt").read_bytes()
    outcome = run_train(f"ckpt_path={last(copied)}", folder=tmp_path)
    assert outcome.exit_code == 0, outcome.err
    assert TrainedRun(copied, outcome).manifest["metrics"]["validation_accuracy"] == before
    assert (copied / "checkpoints" / "best.ckpt").read_bytes() == best


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["model.mlp_dim=31"], "model.mlp_dim=31"),
        (["model.pooling=mean"], "model.pooling=mean"),
        (["data.split_seed=5"], "data"),
        (["data.batch_size=107"], "batch_size"),
        (["seed=1"], "seed"),
        (["experiment=debug"], "experiment"),
        (["-m", "test=true,false"], "ckpt_path"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_resumed_is_refused_and_the_run_stays_as_it_was(
    copied: Path, tmp_path: Path, overrides: list[str], named: str
) -> None:
    before = contents(copied)
    outcome = run_train(*overrides, f"ckpt_path={last(copied)}", folder=tmp_path)
    assert outcome.exit_code != 0
    if "-m" not in overrides:  # a sweep's jobs report on the terminal one by one
        assert outcome.err.startswith("error: ") and len(outcome.err.splitlines()) == 1, outcome.err
    assert named in outcome.err + outcome.out and "Traceback" not in outcome.err + outcome.out
    assert contents(copied) == before


def test_a_checkpoint_outside_a_run_is_not_resumed(copied: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.ckpt"
    shutil.copy(last(copied), alone)
    outcome = run_train(f"ckpt_path={alone}", folder=tmp_path)
    assert outcome.exit_code == 2 and "not inside a run folder" in outcome.err


@pytest.mark.parametrize("damage", ["truncated", "missing", "folder"])
def test_a_checkpoint_that_cannot_be_read_is_refused(copied: Path, tmp_path: Path, damage: str) -> None:
    content = last(copied).read_bytes()
    last(copied).unlink()
    if damage == "truncated":
        last(copied).write_bytes(content[: len(content) // 2])
    elif damage == "folder":
        last(copied).mkdir()
    outcome = run_train(f"ckpt_path={last(copied)}", folder=tmp_path)
    assert outcome.exit_code == 2
    assert outcome.err.startswith("error: ") and len(outcome.err.splitlines()) == 1
    assert run_folders(tmp_path) == [copied]


def test_a_config_file_does_not_decide_which_code_runs(copied: Path, tmp_path: Path) -> None:
    path = copied / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["callbacks"]["harmful"] = {"_target_": "pathlib.Path.touch", "self": str(tmp_path / "harm")}
    path.write_text(yaml.safe_dump(config))
    outcome = run_train(f"ckpt_path={last(copied)}", folder=tmp_path)
    assert outcome.exit_code == 2 and "pathlib.Path.touch" in outcome.err
    assert not (tmp_path / "harm").exists()


def test_a_resumed_run_may_change_its_recipe(copied: Path, tmp_path: Path) -> None:
    """The optimiser's saved state does not bring the earlier learning rate back."""
    changed = ("optimizer.learning_rate=0.5", "optimizer.weight_decay=0.25", "trainer.max_epochs=4")
    outcome = run_train(f"ckpt_path={last(copied)}", *changed, folder=tmp_path)
    assert outcome.exit_code == 0, outcome.err
    state = read_checkpoint(last(copied))
    groups = state["optimizer_states"][0]["param_groups"]
    assert state["lr_schedulers"][0]["base_lrs"] == [0.5, 0.5]
    assert [group["initial_lr"] for group in groups] == [0.5, 0.5]
    assert [group["weight_decay"] for group in groups] == [0.25, 0.0]
