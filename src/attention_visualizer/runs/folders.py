"""Run folders: their names, manifest and locks, and how they are found."""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import filelock

from attention_visualizer.files import plain_files
from attention_visualizer.files.atomic import PARTIAL, missing_folders, remove_empty, write_json
from attention_visualizer.support.errors import UserError
from attention_visualizer.support.machine import git_commit, installed_version

TIME_FORMAT = "%Y-%m-%d_%H-%M-%S-%f"  # no "=" and no ":", which command lines and file systems dislike
TIME_PATTERN = re.compile(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d-\d{1,6}")

BEST, LAST = "best.ckpt", "last.ckpt"  # checkpoints, in the folder `checkpoints`
HISTORY = "attention_history.npz"
ANALYSIS = "attention_analysis"  # the folder of a report
LOG_BYTES = 20_000_000  # events, history and figures of a run


class RunExistsError(UserError):
    """What is asked for would be written over another run."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of one training run; `path` need not exist yet."""

    path: Path

    @classmethod
    def create(cls, root: str | Path) -> RunFolder:
        """Make a folder under `root`, named after the time, that no other run has. Raise UserError if it cannot."""
        made: list[Path] = []
        try:
            made = missing_folders(Path(root))
            Path(root).mkdir(parents=True, exist_ok=True)
            while True:
                path = Path(root) / datetime.now().strftime(TIME_FORMAT)
                with suppress(FileExistsError):  # another run took this microsecond: take the next
                    path.mkdir()
                    return cls(path)
        except OSError as error:
            remove_empty(made)
            reason = "it is not a folder" if isinstance(error, FileExistsError) else error.strerror or error
            raise UserError(f"cannot make a run folder in {root}: {reason}") from error

    @classmethod
    def of_checkpoint(cls, path: Path) -> RunFolder:
        """Return the folder of the run that the checkpoint at `path` belongs to, if it belongs to one."""
        return cls(path.parent.parent)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        return self.checkpoints / BEST

    @property
    def last(self) -> Path:
        return self.checkpoints / LAST

    @property
    def manifest_path(self) -> Path:
        return self.path / "run.json"

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def history_path(self) -> Path:
        return self.path / HISTORY

    @property
    def exists(self) -> bool:
        """Whether a run has left its marks here."""
        return self.manifest_path.is_file() or self.checkpoints.is_dir()

    @property
    def identity(self) -> tuple[int, int] | None:
        """What tells the folder from another one that has come to its path; None where there is none."""
        with suppress(OSError):
            status = self.path.stat()
            return status.st_dev, status.st_ino
        return None

    @property
    def is_locked(self) -> bool:
        """Whether a process is at work in the folder, or could not be told to be."""
        try:
            lock_folder(self.path).release()
        except UserError:
            return True
        return False

    def lock(self) -> filelock.BaseFileLock:
        """Lock the run for this process until the lock is released or the process ends, however it does. Raise
        UserError if another one trains it, or if nothing can be written."""
        self.refuse_links_out()
        for folder in (self.path, self.checkpoints):
            if folder.is_dir() and not os.access(folder, os.W_OK):
                raise UserError(f"cannot write to {folder}: it is read-only")
        lock = lock_folder(self.path)
        for folder in (self.path, self.checkpoints, self.path / ".hydra"):
            for left in folder.glob(PARTIAL.format(stem="*", token="*", suffix="")):
                with suppress(OSError):
                    left.unlink()  # by a process that was killed while it wrote
        return lock

    def refuse_links_out(self) -> None:
        """Raise UserError for a link to what is outside: a run that comes from elsewhere would be written there."""
        inside = self.path.resolve()
        for path in self.path.rglob("*"):
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                raise UserError(f"{path} leads out of the run's folder: put the files themselves there")

    def read_manifest(self) -> dict[str, Any]:
        """Return what run.json holds; empty if there is none. Raise UserError if it is no JSON object."""
        try:
            manifest = plain_files.read_json(self.manifest_path)
        except FileNotFoundError:
            return {}
        if not isinstance(manifest, dict):
            raise UserError(f"{self.manifest_path} holds no JSON object: repair or delete it")
        return manifest

    def manifest_or_empty(self) -> dict[str, Any]:
        """Return what run.json holds; empty also where it cannot be read."""
        try:
            return self.read_manifest()
        except UserError:
            return {}

    def update_manifest(self, **fields: Any) -> None:
        """Add `fields` to run.json or replace them there."""
        write_json(self.manifest_path, self.read_manifest() | fields)


def start_manifest(folder: RunFolder, **fields: Any) -> None:
    """Write a starting run's run.json: status "running", when, by which versions, and `fields`.

    A resumed run keeps the time at which it was created; all else is written anew.
    """
    packages = ("torch", "lightning", "attention-visualizer")
    manifest = {
        "status": "running",  # later "completed", "interrupted" or "failed"
        "created": folder.read_manifest().get("created", datetime.now().astimezone().isoformat()),
        "versions": {"python": platform.python_version(), **{name: installed_version(name) for name in packages}},
        "commit": git_commit(Path(__file__).parent),
    }
    write_json(folder.manifest_path, manifest | fields)


def check_space(folder: Path, num_parameters: int) -> None:
    """Raise UserError where a run's files would not fit into the file system of `folder`, which need not exist."""
    while not folder.exists():
        folder = folder.absolute().parent
    # Weights, averages and Adam's two moments in float32; best, last, and a third while it is being written.
    needed = 3 * 4 * 4 * num_parameters + LOG_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} has {free / 1e6:,.0f} MB left and a run needs about {needed / 1e6:,.0f} MB: make room, or "
            "choose another folder with runs_dir="
        )


def lock_folder(path: Path) -> filelock.BaseFileLock:
    """Lock the folder until the lock is released or the process ends. Raise UserError if another one holds it."""
    lock = filelock.FileLock(path / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise UserError(f"another process is training {path}: wait for it, or stop it") from error
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}") from error
    return lock


@dataclass(frozen=True)
class RunGroup:
    """What one command trained: a single run, whose folder is the group's, or the jobs of a sweep in job order."""

    path: Path
    runs: tuple[RunFolder, ...]

    @property
    def is_sweep(self) -> bool:
        return self.runs[0].path != self.path


def group_at(path: Path) -> RunGroup | None:
    """Return the run or sweep whose folder is `path`; None if it is neither."""
    run = RunFolder(path)
    if run.exists:
        return RunGroup(path, (run,))
    if (path / "multirun.yaml").is_file():
        jobs = sorted((RunFolder(job) for job in path.iterdir()), key=lambda job: (job_number(job), job.name))
        jobs = [job for job in jobs if job.exists]
        return RunGroup(path, tuple(jobs)) if jobs else None
    return None


def job_number(job: RunFolder) -> float:
    """Return the number that a sweep job's folder name starts with, so that 10_... comes after 9_..."""
    digits = re.match(r"\d+", job.name)
    return int(digits.group()) if digits else math.inf


def find_runs(root: str | Path) -> list[RunGroup]:
    """Return the runs and sweeps directly under `root`, newest first; none if there is no such folder."""
    root = Path(root)
    if not root.is_dir():
        return []
    try:
        paths = list(root.iterdir())
    except OSError as error:
        raise UserError(f"cannot search for runs in {root}: {error.strerror or error}") from error
    groups = []
    for path in paths:
        with suppress(PermissionError):  # another user's
            if group := group_at(path):
                groups.append(group)
    return sorted(groups, key=lambda group: (created_at(group), group.path.name), reverse=True)


def created_at(group: RunGroup) -> float:
    """Return its creation time in seconds since 1970, by the folder's name, a manifest, or the folder's own time."""
    with suppress(ValueError):
        if stamp := TIME_PATTERN.match(group.path.name):
            return datetime.strptime(stamp.group(), TIME_FORMAT).timestamp()
    with suppress(KeyError, TypeError, ValueError):  # UserError is a ValueError
        return datetime.fromisoformat(group.runs[0].read_manifest()["created"]).timestamp()
    return group.path.stat().st_mtime
