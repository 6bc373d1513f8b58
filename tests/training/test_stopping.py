"""Real processes, really interrupted: what a signal or a kill leaves, and that going on makes no difference."""

from __future__ import annotations

import csv
import json
import os
import pty
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from attention_visualizer.runs.checkpoint import load_checkpoint
from attention_visualizer.runs.history import AttentionHistory
from attention_visualizer.training.classifier import Classifier
from tests.helpers.runs import (
    BATCHES,
    ENVIRONMENT,
    PROJECT,
    TINY,
    Training,
    assert_same_training,
    only_run,
    run_folders,
    run_train,
)

# A few seconds of training beside those that a process takes to begin; averaged weights, dropout, both logs.
STEPS = 8 * BATCHES
LONG = (*TINY, "model.dropout=0.1", "callbacks=ema", "logger=[tensorboard,csv]", "trainer.max_epochs=8", "test=false")
RUN_TRAIN = (
    f"import runpy, sys; sys.argv[0] = {str(PROJECT / 'train.py')!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
)
CLOCK = ("watching/seconds", "watching/share_of_epoch")  # the charts that no two runs share


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    outcome = run_train(*LONG, folder=folder)
    assert outcome.exit_code == 0, outcome.err
    return only_run(folder)


def rows(run: Path) -> dict[tuple[str, str], list[str]]:
    """(column, step) -> values in metrics.csv."""
    found: dict[tuple[str, str], list[str]] = {}
    with (run / "csv" / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name != "step" and name not in CLOCK:
                    found.setdefault((name, row["step"]), []).append(value)
    return found


def charts(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) of every scalar, and of every image's step."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    found = {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in tags["scalars"]}
    found |= {tag: [(each.step, 0.0) for each in events.Images(tag)] for tag in tags["images"]}
    return {tag: values for tag, values in found.items() if tag not in CLOCK}


def assert_same_run(run: Path, uninterrupted: Path) -> None:
    """Weights, optimiser, schedule, metrics, logs and history are those of a run that nothing happened to."""
    assert json.loads((run / "run.json").read_text())["status"] == "completed"
    for name in ("last.ckpt", "best.ckpt"):
        assert_same_training(run / "checkpoints" / name, uninterrupted / "checkpoints" / name)
    assert rows(run) == rows(uninterrupted)
    assert charts(run) == charts(uninterrupted)
    ours, theirs = (AttentionHistory.load(each / "attention_history.npz") for each in (run, uninterrupted))
    for part in ("frames", "validations"):
        assert [int(each["step"]) for each in getattr(ours, part)] == [int(e["step"]) for e in getattr(theirs, part)]
    metrics, expected = (json.loads((each / "run.json").read_text())["metrics"] for each in (run, uninterrupted))
    assert {**metrics, "seconds": 0} == {**expected, "seconds": 0}
    assert not list(run.rglob("*partial*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_training_between_two_batches_and_it_goes_on_exactly(
    uninterrupted: Path, tmp_path: Path, number: signal.Signals
) -> None:
    training = Training(*LONG, folder=tmp_path)
    training.wait_for_checkpoint()
    training.process.send_signal(number)
    assert training.end() == 128 + number, training.output()
    run = only_run(tmp_path)
    manifest = json.loads((run / "run.json").read_text())
    assert manifest["status"] == "interrupted" and manifest["error"] in ("Ctrl-C", "SIGTERM")
    assert "Traceback" not in training.output()
    assert f"Resume:  python {PROJECT / 'train.py'} ckpt_path=" in training.output()
    assert 0 < (load_checkpoint(run / "checkpoints" / "last.ckpt").step or 0) < STEPS
    outcome = run_train(*LONG, "resume=auto", folder=tmp_path)
    assert outcome.exit_code == 0, outcome.err
    assert only_run(tmp_path) == run and f"Resuming runs/{run.name}, step" in outcome.out
    assert_same_run(run, uninterrupted)


def test_the_second_signal_ends_at_once(tmp_path: Path) -> None:
    # No gradient is whole before an epoch ends, so there is no good place to stop within it.
    training = Training(*LONG, "trainer.accumulate_grad_batches=1000", "trainer.max_epochs=400", folder=tmp_path)
    path = training.wait_for_checkpoint()
    training.process.send_signal(signal.SIGINT)
    training.wait_until(lambda: "stopping after this batch" in training.output())
    training.process.send_signal(signal.SIGINT)
    assert training.end(20) == 130, training.output()
    assert "Traceback" not in training.output()
    load_checkpoint(path)
    assert not list(only_run(tmp_path).rglob("*partial*"))


@pytest.mark.parametrize("seconds", [0.3, 2.5])
def test_ctrl_c_before_training_leaves_nothing(tmp_path: Path, seconds: float) -> None:
    process = subprocess.Popen(
        [sys.executable, str(PROJECT / "train.py"), *LONG],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A job in the background ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    time.sleep(seconds)
    if not run_folders(tmp_path):  # on a fast machine it may have begun
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=300)[1]
        assert process.returncode in (130, -signal.SIGINT)
        assert "Traceback" not in said and not run_folders(tmp_path)
    process.kill()


def test_what_was_seen_before_a_checkpoint_within_the_first_epoch_is_kept(tmp_path: Path) -> None:
    """Killed after a checkpoint between two batches: the pictures of the first batches are in the history."""
    slow = ("data.batch_size=2", "trainer.max_epochs=1", "logger=none", "callbacks=default")
    often = "from attention_visualizer.training import saving; saving.LastCheckpoint.__init__.__defaults__ = (0.2,)"
    program = f"{often}; {RUN_TRAIN}"
    training = Training(*LONG, *slow, folder=tmp_path, program=program)
    path = training.wait_for_checkpoint()
    training.process.kill()
    training.end()
    step = load_checkpoint(path).step or 0
    kept = AttentionHistory.load(only_run(tmp_path) / "attention_history.npz")
    seen = [int(frame["step"]) for frame in kept.frames]
    assert 0 < step < 648 and seen[:3] == [0, 1, 2][: len(seen)] and seen[-1] <= step
    assert seen[-1] * 2 > step  # the last power of two


@pytest.mark.long
def test_a_terminal_that_is_closed_stops_training_in_order(uninterrupted: Path, tmp_path: Path) -> None:
    """Nothing can be printed to it any more: no progress bar, and no word on where the checkpoint is."""
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
        os.chdir(tmp_path)
        os.execve(sys.executable, [sys.executable, str(PROJECT / "train.py"), *LONG], ENVIRONMENT)
    reader = threading.Thread(target=read_all, args=(terminal,), daemon=True)  # or the bar would block
    reader.start()
    end = time.monotonic() + 300
    while not list(tmp_path.glob("runs/*/checkpoints/last.ckpt")):
        assert time.monotonic() < end and os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.02)
    os.kill(child, signal.SIGSTOP)  # all that it does from here on, it does without its terminal
    os.close(terminal)
    os.kill(child, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGHUP
    run = only_run(tmp_path)
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    assert 0 < (load_checkpoint(run / "checkpoints" / "last.ckpt").step or 0) < STEPS
    outcome = run_train(*LONG, "resume=auto", folder=tmp_path)
    assert outcome.exit_code == 0, outcome.err
    assert_same_run(run, uninterrupted)


def read_all(terminal: int) -> None:
    with suppress(OSError):
        while os.read(terminal, 10_000):
            pass


@pytest.mark.long
def test_killed_at_random_moments_and_gone_on_with_it_is_the_same_run(uninterrupted: Path, tmp_path: Path) -> None:
    """KILLS=100 in the environment kills that often."""
    chance = random.Random(0)
    killed, wanted = 0, int(os.environ.get("KILLS", "5"))
    epoch = json.loads((uninterrupted / "run.json").read_text())["metrics"]["seconds"] * BATCHES / STEPS
    while killed < wanted:
        began = time.time_ns()
        training = Training(*LONG, "resume=auto", folder=tmp_path)
        training.wait_until(lambda training=training: "Run folder:" in training.output())  # type: ignore[misc]
        if chance.random() < 3 / wanted:  # so often it gets on by an epoch or two, of eight
            training.wait_for_checkpoint(newer_than=began)
        time.sleep(chance.uniform(0, epoch / 2))
        if training.process.poll() is None:
            training.process.kill()
            killed += 1
        training.end()
        assert "Traceback" not in training.output()
        manifest = json.loads((only_run(tmp_path) / "run.json").read_text())
        if manifest["status"] == "completed":
            break
        for path in only_run(tmp_path).glob("checkpoints/*.ckpt"):
            load_checkpoint(path)
    outcome = run_train(*LONG, "resume=auto", folder=tmp_path)
    assert outcome.exit_code == 0 and killed == wanted, outcome.err
    assert_same_run(only_run(tmp_path), uninterrupted)


# --- at chosen moments ---

# Dies at its number-th renaming of a file: that is when what was written becomes what is there.
KILLED_AT_A_RENAME = """
import os, signal, sys
number, renamed, rename = int(sys.argv.pop(1)), [], os.replace
def replace(source, target):
    renamed.append(target)
    if len(renamed) == number: os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.replace = replace
"""
TO_THE_END = (*TINY, "logger=[tensorboard,csv]", "trainer.max_epochs=2", "export=true")


@pytest.fixture(scope="module")
def to_the_end(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("to_the_end")
    outcome = run_train(*TO_THE_END, folder=folder)
    assert outcome.exit_code == 0, outcome.err
    return only_run(folder)


@pytest.mark.long
@pytest.mark.parametrize("number", [8, 9, 12, 13, 14], ids=["best", "epoch's end", "test", "export", "done"])
def test_killed_between_two_files_of_a_run_s_end(to_the_end: Path, tmp_path: Path, number: int) -> None:
    training = Training(str(number), *TO_THE_END, folder=tmp_path, program=KILLED_AT_A_RENAME + RUN_TRAIN)
    assert training.end() == -signal.SIGKILL
    outcome = run_train(*TO_THE_END, "resume=auto", folder=tmp_path)
    assert outcome.exit_code == 0, outcome.err
    assert_same_run(only_run(tmp_path), to_the_end)


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_signal_in_a_validation_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    """Also in the last one, after which no batch would come."""
    plain = Classifier.validation_step

    def interrupted(self: Classifier, *arguments: Any) -> None:
        plain(self, *arguments)
        if self.current_epoch == epoch and not self.trainer.sanity_checking:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Classifier, "validation_step", interrupted)
    settings = (*TINY, "trainer.max_epochs=2", "trainer.limit_val_batches=1", "logger=none", "callbacks=none")
    outcome = run_train(*settings, folder=tmp_path)
    assert outcome.exit_code == 143, outcome.err
    run = only_run(tmp_path)
    assert load_checkpoint(run / "checkpoints" / "last.ckpt").step == 12 * (epoch + 1)
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    monkeypatch.undo()
    outcome = run_train(*settings, "resume=auto", folder=tmp_path)
    assert outcome.exit_code == 0 and "test (best.ckpt, once)" in outcome.out


def test_epochs_of_one_batch_without_validation_are_saved_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Classifier.training_step

    def interrupted(self: Classifier, *arguments: Any) -> Any:
        if self.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *arguments)

    monkeypatch.setattr(Classifier, "training_step", interrupted)
    rare = ("trainer.max_epochs=100", "trainer.limit_train_batches=1", "trainer.check_val_every_n_epoch=100")
    outcome = run_train(*TINY, *rare, "logger=none", "callbacks=none", folder=tmp_path)
    assert outcome.exit_code == 143, outcome.err
    assert load_checkpoint(only_run(tmp_path) / "checkpoints" / "last.ckpt").step == 6
