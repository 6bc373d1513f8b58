"""Runs never share a folder; a manifest always reads; runs and sweeps are found, newest first."""

from __future__ import annotations

import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Self

import pytest
import torch

from attention_visualizer.runs import folders
from attention_visualizer.runs.folders import RunFolder, find_runs, group_at, start_manifest
from attention_visualizer.support.errors import UserError


def test_runs_started_together_never_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class CoarseClock(datetime):
        """A clock of milliseconds, so that runs do collide."""

        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            now = super().now(tz)
            return now.replace(microsecond=now.microsecond // 1000 * 1000)

    monkeypatch.setattr(folders, "datetime", CoarseClock)
    with ThreadPoolExecutor(7) as pool:
        made = list(pool.map(lambda _: RunFolder.create(tmp_path / "runs"), range(29)))
    assert len({folder.path for folder in made}) == 29
    assert len(os.listdir(tmp_path / "runs")) == 29
    assert all("=" not in folder.name and folders.TIME_PATTERN.fullmatch(folder.name) for folder in made)


def test_a_root_that_cannot_hold_runs_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot make a run folder in .*file: it is not a folder"):
        RunFolder.create(tmp_path / "file")
    with pytest.raises(UserError, match="Not a directory"):
        RunFolder.create(tmp_path / "file" / "runs")


def test_manifest_from_start_to_end(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    assert run.read_manifest() == {} and not run.exists
    start_manifest(run, command="python train.py", data={"name": "mnist"})
    first = run.read_manifest()
    assert run.exists and first["status"] == "running" and first["command"] == "python train.py"
    assert first["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(first["versions"]) == {"python", "torch", "lightning", "attention-visualizer"}
    assert "commit" in first

    run.update_manifest(status="completed", metrics={"validation_accuracy": math.nan, "epochs": 3})
    last = run.read_manifest()
    assert last == first | {"status": "completed", "metrics": {"validation_accuracy": None, "epochs": 3}}

    start_manifest(run)  # resumed
    resumed = run.read_manifest()
    assert resumed["created"] == first["created"] and resumed["status"] == "running" and "metrics" not in resumed


@pytest.mark.parametrize("text", ["{", "[1]", "\udcff", "[" * 100_000])
def test_a_broken_manifest_is_one_clear_line(tmp_path: Path, text: str) -> None:
    run = RunFolder(tmp_path)
    run.manifest_path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"run\.json .*repair or delete it"):
        run.read_manifest()


def make_run(path: Path, **manifest: object) -> RunFolder:
    path.mkdir(parents=True)
    run = RunFolder(path)
    run.update_manifest(**manifest)
    return run


def test_runs_and_sweeps_are_found_newest_first(tmp_path: Path) -> None:
    assert find_runs(tmp_path / "nowhere") == []
    make_run(tmp_path / "2025-01-02_03-04-05-000007")
    make_run(tmp_path / "2025-01-02_03-04-05-000011")
    make_run(tmp_path / "renamed", created="2025-01-02T03:04:05.000009")
    sweep = tmp_path / "2025-06-01_00-00-00-000000_sweep"
    for job in ("10_model.embed_dim-32", "2_model.embed_dim-16", "0_model.embed_dim-8"):
        make_run(sweep / job)
    (sweep / "3_killed_before_it_began").mkdir()
    (sweep / "multirun.yaml").write_text("")
    interrupted = tmp_path / "2024-12-31_23-59-59-999999"
    (interrupted / "checkpoints").mkdir(parents=True)
    old = tmp_path / "no_time_at_all"
    make_run(old).manifest_path.write_text("broken")
    os.utime(old, (time.time() - 10**9, time.time() - 10**9))
    (tmp_path / "2026-01-01_00-00-00-000000").mkdir()  # empty: no run
    (tmp_path / "notes.txt").write_text("")

    groups = find_runs(tmp_path)
    assert [group.path.name for group in groups] == [
        "2025-06-01_00-00-00-000000_sweep",
        "2025-01-02_03-04-05-000011",
        "renamed",
        "2025-01-02_03-04-05-000007",
        "2024-12-31_23-59-59-999999",
        "no_time_at_all",
    ]
    assert [run.name.split("_")[0] for run in groups[0].runs] == ["0", "2", "10"]
    assert groups[0].is_sweep and not groups[1].is_sweep
    assert group_at(tmp_path / "notes.txt") is None and group_at(tmp_path) is None
