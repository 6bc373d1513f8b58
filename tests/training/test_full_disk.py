"""A full disk and a folder that is read-only: a clear line, old files as they were, no litter."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import (
    BARE,
    BRIEF,
    PROJECT,
    Outcome,
    Training,
    only_run,
    run_folders,
    run_process,
    run_train,
)

linux = pytest.mark.skipif(sys.platform != "linux", reason="root gives up its capabilities as Linux lets it")
QUIET = ("trainer.enable_progress_bar=false", "trainer.enable_model_summary=false", "test=false")


def program(name: str, *arguments: str, folder: Path, **limits: Any) -> Outcome:
    """`python <name> ...` in a process of its own, with limits of `Program`."""
    return run_process(*arguments, folder=folder, program=str(PROJECT / name), **limits)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def last_line(outcome: Outcome) -> str:
    assert "Traceback" not in outcome.out + outcome.err, outcome.err
    return outcome.err.splitlines()[-1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    assert run_train(*BRIEF, *QUIET, folder=folder).exit_code == 0
    return folder


def test_a_disk_that_is_full_at_a_checkpoint_leaves_the_earlier_ones(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    shutil.copytree(trained, folder)
    checkpoints = only_run(folder) / "checkpoints"
    before = contents(checkpoints)
    assert min(map(len, before.values())) > 100_000
    command = ("train.py", f"ckpt_path={checkpoints / 'last.ckpt'}", "trainer.max_epochs=3")
    outcome = program(*command, folder=folder, largest=60_000)
    assert outcome.exit_code == 2 and "cannot write" in last_line(outcome) and ".ckpt" in last_line(outcome)
    assert contents(checkpoints) == before
    assert not list(folder.rglob("*partial*"))
    assert run_train(command[1], command[2], folder=folder).exit_code == 0  # with room, it goes on


@pytest.mark.long
def test_a_disk_that_is_full_at_a_figure_leaves_the_earlier_report(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    shutil.copytree(trained, folder)
    analysis = ("analyze.py", "chapters=[patterns]", "num_samples=3", "output_dir=report")
    assert program(*analysis, folder=folder).exit_code == 0
    before = contents(folder / "report")
    outcome = program(*analysis, folder=folder, largest=20_000)
    assert outcome.exit_code != 0 and "File too large" in outcome.err and "Traceback" not in outcome.err
    assert contents(folder / "report") == before  # what could be made is beside it, and says what is missing
    assert not list(folder.rglob("*partial*"))


@contextmanager
def of_mode(path: Path, mode: int) -> Iterator[None]:
    before = path.stat().st_mode
    path.chmod(mode)
    try:
        yield
    finally:
        path.chmod(before)


@pytest.mark.long
@linux
def test_folders_that_are_read_only_are_refused_before_any_work(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    shutil.copytree(trained, folder)
    run = only_run(folder)
    resumed = ("train.py", f"ckpt_path={run / 'checkpoints' / 'last.ckpt'}", "trainer.max_epochs=3")
    before = contents(folder)
    for place, arguments, named in (
        (run.parent, ("train.py", *BRIEF), "cannot make a run folder in runs"),
        (run, resumed, str(run)),
        (run / "checkpoints", resumed, "checkpoints"),
        (run, ("analyze.py", f"run={run}"), "output_dir"),
    ):
        with of_mode(place, 0o555):
            outcome = program(*arguments, folder=folder, obeying=True)
        assert outcome.exit_code == 2 and outcome.err.splitlines() == [last_line(outcome)], outcome
        assert last_line(outcome).startswith("error: ") and named in last_line(outcome)
        assert "epoch 1/" not in outcome.out
    assert contents(folder) == before


@pytest.mark.long
@linux
def test_a_run_that_may_not_be_read_hides_no_other(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    shutil.copytree(trained, folder)
    run = only_run(folder)
    shutil.copytree(run, secret := run.parent / "2999-01-01_00-00-00-000000")
    with of_mode(secret, 0):
        outcome = program("analyze.py", "chapters=[patterns]", "num_samples=1", folder=folder, obeying=True)
    assert outcome.exit_code == 0 and run.name in outcome.out, outcome


@pytest.mark.long
@pytest.mark.parametrize("runs", [2, 8])
def test_runs_started_in_the_same_instant_have_folders_of_their_own(runs: int, tmp_path: Path) -> None:
    all_at_once = [Training(*BRIEF, *QUIET, *BARE, folder=tmp_path) for _ in range(runs)]
    assert [each.end() for each in all_at_once] == [0] * runs, [each.output() for each in all_at_once]
    folders = run_folders(tmp_path)
    assert len(folders) == runs
    for path in folders:
        assert {"best.ckpt", "last.ckpt"} == {saved.name for saved in (path / "checkpoints").iterdir()}
