"""What is said while a run trains: the same numbers as in its logs, a line for each epoch, in a file and a terminal."""

from __future__ import annotations

import csv
import os
import pty
import re
import sys
from pathlib import Path

import pytest

from attention_visualizer.runs.folders import RunFolder
from attention_visualizer.training.progress import RunLog, duration
from tests.helpers.runs import BATCHES, BRIEF, ENVIRONMENT, EPOCHS, PROJECT, only_run, run_train, trained_run

LINE = re.compile(
    r"epoch (\S+)  step ([\d,]+)  loss (\d\.\d{3})  val loss (\d\.\d{3}), acc (\d+\.\d\d)% \(best (\d+\.\d\d)%\)"
)


def test_without_a_terminal_each_epoch_is_a_line_of_what_was_measured() -> None:
    run = trained_run()
    lines = [LINE.match(line) for line in run.outcome.out.splitlines() if line.startswith("epoch ")]
    rows = list(csv.DictReader((run.path / "csv" / "metrics.csv").open()))
    accuracies = [float(row["validation/accuracy"]) for row in rows if row["validation/accuracy"]]
    losses = [float(row["validation/loss"]) for row in rows if row["validation/loss"]]
    assert len(accuracies) == EPOCHS
    for number, line in enumerate(lines):
        assert line is not None
        epoch, step, _, loss, accuracy, best = line.groups()
        assert (epoch, step) == (f"{number + 1}/{EPOCHS}", str((number + 1) * BATCHES))
        assert loss == f"{losses[number]:.3f}" and accuracy == f"{accuracies[number]:.2%}"[:-1]
        assert best == f"{max(accuracies[: number + 1]):.2%}"[:-1]
    left = [", about " in line for line in run.outcome.out.splitlines() if line.startswith("epoch ")]
    assert left == [True] * (EPOCHS - 1) + [False]
    assert "FLOPs" not in run.outcome.out and "Epoch " not in run.outcome.out


def test_the_log_in_the_folder_holds_what_was_said() -> None:
    run = trained_run()
    logged = [line.partition("  ")[2] for line in (run.path / "train.log").read_text().splitlines()]
    said = [line for line in run.outcome.out.splitlines() if line in logged]
    beginnings = ["Run folder:", "Model:", "Data:", "Training:", *["epoch"] * EPOCHS]
    beginnings += ["Run folder:", "TensorBoard:", "Analyse:"]
    assert [line.split()[0] for line in said] == [text.split()[0] for text in beginnings]
    assert f"test (best.ckpt, once): {run.manifest['metrics']['test_accuracy']:.2%} of 300 images" in logged


def test_a_resumed_run_goes_on_in_the_same_log(tmp_path: Path) -> None:
    assert run_train(*BRIEF, "test=false", folder=tmp_path).exit_code == 0
    run = only_run(tmp_path)
    again = run_train(f"ckpt_path={run}/checkpoints/last.ckpt", "trainer.max_epochs=2", folder=tmp_path)
    assert again.exit_code == 0 and "epoch 1/" not in again.out and "epoch 2/2  step 4  " in again.out
    epochs = re.findall(r"  epoch (\S+) ", (run / "train.log").read_text())
    assert epochs == ["1/1", "2/2"]


def test_a_log_that_cannot_be_written_is_no_reason_to_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.log").mkdir()
    RunLog(RunFolder(tmp_path)).say("still said")
    assert capsys.readouterr().out == "still said\n"


def test_in_a_terminal_a_bar_is_drawn_and_a_line_for_each_epoch_stays(tmp_path: Path) -> None:
    columns = "80"
    written = bytearray()

    def read(terminal: int) -> bytes:
        part = os.read(terminal, 1 << 16)
        written.extend(part)
        return part

    environment = ENVIRONMENT | {"COLUMNS": columns, "TERM": "xterm", "PYTHONUNBUFFERED": "1"}
    # Batches enough for the bar, which is drawn ten times a second, to be seen between validations.
    longer = ("trainer.max_epochs=2", "trainer.limit_train_batches=80", "data.batch_size=16")
    command = [sys.executable, str(PROJECT / "train.py"), *BRIEF, "test=false", *longer]
    program = "import os, sys; os.chdir(sys.argv[1]); os.execve(sys.argv[2], sys.argv[2:], dict(os.environ))"
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        status = pty.spawn([sys.executable, "-c", program, str(tmp_path), *command], read, lambda _: b"")
    finally:
        os.environ.clear()
        os.environ.update(before)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())
    assert status == 0, text
    drawn = re.split(r"[\r\n]+", text)
    bars = [line for line in drawn if "━" in line]
    assert any("epoch 1/2" in bar and "validating" in bar for bar in bars)
    assert any(re.search(r"loss \d\.\d{3}|beginning", bar) for bar in bars)
    stayed = [line.rstrip() for line in drawn if LINE.match(line)]
    assert [line.split()[1] for line in stayed] == ["1/2", "2/2"]
    assert max(len(line.rstrip()) for line in [*stayed, *bars]) <= int(columns)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0.0 s"), (45.4, "45 s"), (420, "7 min"), (7500, "2 h 05 min"), (7170, "2 h 00 min")]
)
def test_times_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text
