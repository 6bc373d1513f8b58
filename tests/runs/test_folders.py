"""Files are written whole or not at all; runs never share a folder; a manifest always reads."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Self

import numpy as np
import pytest
import torch

from attention_visualizer.files.atomic import atomic_path, write_json, write_text
from attention_visualizer.runs import folders
from attention_visualizer.runs.folders import RunFolder, find_runs, group_at, start_manifest
from attention_visualizer.support.errors import UserError


def test_atomic_path_shows_nothing_before_the_end(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "picture.png"
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"half")
        assert temporary.parent == target.parent and temporary.suffix == ".png" and temporary.name.startswith(".")
        assert not target.exists()
    assert target.read_bytes() == b"half"
    assert os.listdir(target.parent) == ["picture.png"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_an_exception_leaves_the_old_file_and_no_litter(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "notes.txt"
    write_text(target, "old")
    with pytest.raises(error):
        with atomic_path(target) as temporary:
            temporary.write_text("new")
            raise error
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_a_kill_in_mid_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "weights.ckpt"
    write_text(target, "old")
    script = (
        "import sys, time; from attention_visualizer.runs.folders import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('new'); print('written', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(target)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
    assert target.read_text() == "old"


def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    target = tmp_path / "big.txt"
    write_text(target, "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1009, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*big\.txt: File too large") as caught:
            write_text(target, "x" * 4001)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(caught.value.__cause__, OSError)
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["big.txt"]


def test_a_target_that_cannot_be_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for target in (tmp_path / "file" / "below.txt", tmp_path / "folder"):
        with pytest.raises(UserError, match=f"cannot write {target}: "):
            write_text(target, "text")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_new_file_is_as_readable_as_any(tmp_path: Path) -> None:
    write_text(tmp_path / "atomic.txt", "Ziffer 注意力")
    (tmp_path / "plain.txt").write_text("")
    assert (tmp_path / "atomic.txt").stat().st_mode == (tmp_path / "plain.txt").stat().st_mode
    assert (tmp_path / "atomic.txt").read_text(encoding="utf-8") == "Ziffer 注意力"


def test_json_has_no_nan_and_keeps_its_order(tmp_path: Path) -> None:
    write_json(
        tmp_path / "data.json",
        {
            "z": math.nan,
            "a": [1.5, -math.inf, np.float32(0.25), np.float64("nan")],
            7: torch.tensor([[2.0, math.inf]]),
            "path": tmp_path,
            "tuple": (np.int64(3), None, True),
        },
    )
    text = (tmp_path / "data.json").read_text()
    assert list(json.loads(text).items()) == [
        ("z", None),
        ("a", [1.5, None, 0.25, None]),
        ("7", [[2.0, None]]),
        ("path", str(tmp_path)),
        ("tuple", [3, None, True]),
    ]
    assert "NaN" not in text and text.startswith('{\n  "z"')


def test_json_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "data.json", {"model": object()})
    assert os.listdir(tmp_path) == []


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
    with pytest.raises(UserError, match=r"run\.json .*mend or delete it"):
        run.read_manifest()


def test_commit_of_a_checkout_and_of_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert folders.git_commit(tmp_path) is None
    assert folders.git_commit(tmp_path / "nowhere") is None
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "code.py").write_text("1")
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    head = subprocess.run(["git", "-C", str(tmp_path), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert folders.git_commit(tmp_path) == head.stdout.strip()
    (tmp_path / "code.py").write_text("2")
    assert folders.git_commit(tmp_path) == head.stdout.strip() + "-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    assert folders.git_commit(tmp_path) is None


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
