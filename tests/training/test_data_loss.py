"""What no command may lose: runs whose files cannot be read for now, or that are moved, stopped or given a mistake."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning import Callback, Trainer

from attention_visualizer.files import plain_files, tensor_files
from attention_visualizer.runs.checkpoint import load_checkpoint
from attention_visualizer.support.errors import UnreadableError, UserError
from attention_visualizer.training import saving, stopping
from attention_visualizer.training.classifier import Classifier
from tests.helpers.runs import (
    BARE,
    BRIEF,
    PROJECT,
    Outcome,
    assert_same_training,
    last,
    only_run,
    run_folders,
    run_train,
)

SETTINGS = (*BRIEF, *BARE, "trainer.max_epochs=2", "test=false")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    outcome = run_train(*SETTINGS, folder=folder)
    assert outcome.exit_code == 0, outcome.err
    return only_run(folder)


@pytest.fixture
def killed(trained: Path, tmp_path: Path) -> Path:
    """A run as a kill leaves it."""
    run = Path(shutil.copytree(trained, tmp_path / "runs" / trained.name))
    change_manifest(run, status="running")
    return run


def change_manifest(run: Path, **fields: Any) -> None:
    path = run / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def contents(run: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def refused(outcome: Outcome, *words: str) -> None:
    assert outcome.exit_code == 2, outcome.out + outcome.err
    assert outcome.err.startswith("error: ") and len(outcome.err.splitlines()) == 1, outcome.err
    for word in words:
        assert word in outcome.err


# --- what cannot be read for now ---------------------------------------------------------------------------------

NOT_NOW = {
    "permission": PermissionError(errno.EACCES, "Permission denied"),
    "I/O error": OSError(errno.EIO, "Input/output error"),
    "open files": OSError(errno.EMFILE, "Too many open files"),
    "memory": MemoryError(),
    "PyTorch's memory": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 10 bytes"),
}


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("error", NOT_NOW.values(), ids=NOT_NOW)
def test_a_checkpoint_that_cannot_be_read_for_now_is_neither_replaced_nor_passed_over(
    killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    before = contents(killed)
    with monkeypatch.context() as patched:
        patched.setattr(zipfile.ZipFile, "testzip", failing(error))
        outcome = run_train(*SETTINGS, "resume=auto", folder=tmp_path)
    refused(outcome, "last.ckpt cannot be read at the moment", "it may be whole")
    assert only_run(tmp_path) == killed
    assert contents(killed) == before


def test_memory_that_ends_while_torch_loads_is_no_damage(killed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files.torch, "load", failing(NOT_NOW["PyTorch's memory"]))
    with pytest.raises(UnreadableError, match="not enough memory"):
        load_checkpoint(last(killed))


def test_offsets_that_a_damaged_archive_holds_are_damage(killed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile.ZipFile, "testzip", failing(OSError(errno.EINVAL, "Invalid argument")))
    with pytest.raises(UserError, match="corrupt"):
        load_checkpoint(last(killed))


@pytest.mark.parametrize("name", ["config.yaml", "run.json"])
def test_a_run_of_which_it_cannot_be_told_whether_it_is_meant_is_not_begun_anew(
    killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    open_file = plain_files.open_file

    def fail_for_one(path: Path) -> Any:
        if path.name == name:
            raise NOT_NOW["permission"]
        return open_file(path)

    monkeypatch.setattr(plain_files, "open_file", fail_for_one)
    refused(run_train(*SETTINGS, "resume=auto", folder=tmp_path), f"{name} cannot be read at the moment")
    assert only_run(tmp_path) == killed


def test_what_another_data_set_would_begin_anew_is_refused(killed: Path, tmp_path: Path) -> None:
    """MNIST was there when the run began, and is not when it is to go on: the digits do not take its place."""
    config = yaml.safe_load((killed / "config.yaml").read_text())
    config["data"] |= {"name": "mnist", "fallback": "digits", "data_dir": str(tmp_path / "none"), "batch_size": 256}
    config["trainer"]["max_epochs"] = 10  # MNIST's own defaults
    (killed / "config.yaml").write_text(yaml.safe_dump(config))
    change_manifest(killed, data=json.loads((killed / "run.json").read_text())["data"] | {"name": "mnist"})
    others = [each for each in SETTINGS if not each.startswith(("data", "trainer.max_epochs"))]
    mnist = (*others, "data=mnist", f"data.data_dir={tmp_path}/none", "resume=auto")
    environment = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    outcome = run_train(*mnist, folder=tmp_path, **environment)
    assert outcome.exit_code == 2 and only_run(tmp_path) == killed
    assert "was trained on mnist, which cannot be had now" in outcome.err.splitlines()[-1]


# --- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mistake", ["trainer.max_epochs=1", "trainer.max_steps=3"])
def test_less_than_was_trained_is_refused_and_the_printed_command_still_works(
    killed: Path, tmp_path: Path, mistake: str
) -> None:
    before = contents(killed)
    refused(run_train(f"ckpt_path={last(killed)}", mistake, folder=tmp_path), mistake, "give at least that")
    assert contents(killed) == before
    assert run_train(*SETTINGS, "resume=auto", folder=tmp_path).exit_code == 0
    assert only_run(tmp_path) == killed


def test_what_fails_before_the_first_step_leaves_the_settings_as_they_were(
    killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (killed / "config.yaml").read_bytes()
    monkeypatch.setattr(Classifier, "setup", failing(ValueError("cannot begin")), raising=False)
    outcome = run_train(f"ckpt_path={last(killed)}", "trainer.max_epochs=7", folder=tmp_path)
    assert outcome.exit_code == 1 and (killed / "config.yaml").read_bytes() == before


def test_places_that_move_with_the_working_directory_are_refused(tmp_path: Path) -> None:
    refused(run_train(*SETTINGS, "hydra.job.chdir=true", folder=tmp_path), "hydra.job.chdir=true")
    assert not run_folders(tmp_path)


# --- what happens while it trains --------------------------------------------------------------------------------


def after_epoch(number: int, action: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Do something to the run in `folder` when so many epochs are behind it, with their checkpoints."""
    done = 0
    plain = saving.LastCheckpoint.on_train_epoch_end

    def and_act(self: saving.LastCheckpoint, trainer: Trainer, *rest: Any) -> None:
        nonlocal done
        plain(self, trainer, *rest)
        done += 1
        if done == number:
            action(only_run(folder))

    monkeypatch.setattr(saving.LastCheckpoint, "on_train_epoch_end", and_act)


@pytest.mark.parametrize("number", [1, 2])
def test_a_best_checkpoint_that_is_deleted_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Before the last validation, and after it."""
    after_epoch(number, lambda run: (run / "checkpoints" / "best.ckpt").unlink(), monkeypatch, tmp_path)
    outcome = run_train(*SETTINGS, "test=true", folder=tmp_path)
    assert outcome.exit_code == 0, outcome.err
    run = only_run(tmp_path)
    best = load_checkpoint(run / "checkpoints" / "best.ckpt")
    metrics = json.loads((run / "run.json").read_text())["metrics"]
    assert best.step == 4 and metrics["validation_accuracy"] == pytest.approx(best.validation_accuracy)
    assert ("last.ckpt takes its place" in outcome.out) == (number == 2)


@pytest.mark.parametrize("what", ["moved", "deleted"])
def test_a_run_whose_folder_goes_away_ends_with_one_line_and_leaves_no_second_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def act(run: Path) -> None:
        if what == "moved":
            run.rename(tmp_path / "elsewhere")
        else:
            shutil.rmtree(run)

    with monkeypatch.context() as patched:
        after_epoch(1, act, patched, tmp_path)
        outcome = run_train(*SETTINGS, folder=tmp_path)
    refused(outcome, "was moved or deleted while its run trained")
    assert not run_folders(tmp_path)
    if what == "moved":
        goes_on = run_train(f"ckpt_path={tmp_path}/elsewhere/checkpoints/last.ckpt", folder=tmp_path)
        assert goes_on.exit_code == 0, goes_on.err


def test_memory_that_does_not_suffice_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Classifier, "training_step", failing(NOT_NOW["PyTorch's memory"]))
    refused(run_train(*SETTINGS, folder=tmp_path), "out of memory", "data.batch_size=")
    assert json.loads((only_run(tmp_path) / "run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1"])
def test_other_signals_save_and_can_be_resumed_exactly(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    number = getattr(signal, name)
    monkeypatch.setattr(stopping, "leave_terminal", lambda: None)  # which is the tests' own
    earlier = signal.signal(number, signal.SIG_DFL)  # under nohup it is ignored
    with monkeypatch.context() as patched:
        after_epoch(1, lambda _: os.kill(os.getpid(), number), patched, tmp_path)
        outcome = run_train(*SETTINGS, folder=tmp_path)
    signal.signal(number, earlier)
    assert outcome.exit_code == 128 + number and "Traceback" not in outcome.err
    run = only_run(tmp_path)
    manifest = json.loads((run / "run.json").read_text())
    assert (manifest["status"], manifest["error"]) == ("interrupted", name)
    (command,) = (line for line in outcome.out.splitlines() if line.startswith("Stopped early."))
    arguments = shlex.split(command.partition("Resume:")[2])
    assert arguments[:2] == ["python", str(PROJECT / "train.py")]
    assert run_train(*arguments[2:], folder=tmp_path).exit_code == 0
    assert_same_training(last(run), last(trained))


def test_a_requeued_slurm_job_goes_on(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in for the scheduler is its command `scontrol`, which notes what it is asked."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/asked\n")
    scontrol.chmod(0o755)
    job = {"SLURM_JOB_ID": "123", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "vit", "SLURM_PROCID": "0"}
    job |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    with monkeypatch.context() as patched:
        after_epoch(1, lambda _: os.kill(os.getpid(), signal.SIGUSR1), patched, tmp_path)
        outcome = run_train(*SETTINGS, folder=tmp_path, **job)
    assert outcome.exit_code == 128 + signal.SIGUSR1
    assert (tmp_path / "asked").read_text() == "requeue 123\n" and "Requeued job 123" in outcome.out
    outcome = run_train(*SETTINGS, folder=tmp_path, **job, SLURM_RESTART_COUNT="1")
    assert outcome.exit_code == 0, outcome.err
    assert_same_training(last(only_run(tmp_path)), last(trained))
    assert not list(tmp_path.rglob("hpc_ckpt*"))


# --- classes beside this program's -------------------------------------------------------------------------------


class Greeting(Callback):
    """One of the user's own."""


@pytest.mark.parametrize("target", ["lightning.pytorch.callbacks.Timer", f"{__name__}.Greeting"])
def test_the_printed_command_knows_the_callbacks_that_the_run_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    with monkeypatch.context() as patched:
        after_epoch(1, lambda _: os.kill(os.getpid(), signal.SIGTERM), patched, tmp_path)
        outcome = run_train(*SETTINGS, f"+callbacks.own={{_target_: {target}}}", folder=tmp_path)
    (command,) = (line for line in outcome.out.splitlines() if line.startswith("Stopped early."))
    outcome = run_train(*shlex.split(command.partition("Resume:")[2])[2:], folder=tmp_path)
    assert outcome.exit_code == 0, outcome.err
    assert json.loads((only_run(tmp_path) / "run.json").read_text())["status"] == "completed"
