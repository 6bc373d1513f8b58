"""Where things are kept: files written whole or not at all, run folders and their manifest."""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import filelock

from attention_visualizer.files import plain_files
from attention_visualizer.files.atomic import PARTIAL, missing_folders, remove_empty, write_json
from attention_visualizer.support.errors import UserError

TIME_FORMAT = "%Y-%m-%d_%H-%M-%S-%f"  # no "=" and no ":", which command lines and file systems dislike
TIME_PATTERN = re.compile(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d-\d{1,6}")


LOG_BYTES = 20_000_000  # events, history and figures of a run


class RunExistsError(UserError):
    """What is asked for would be written over another run."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of one training run; `path` need not exist yet."""

    path: Path

    @classmethod
    def create(cls, root: str | Path) -> RunFolder:
        """Makes a folder under `root`, named after the time, that no other run has. Raises UserError if it cannot."""
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
        return self.checkpoints / "best.ckpt"

    @property
    def last(self) -> Path:
        return self.checkpoints / "last.ckpt"

    @property
    def manifest_path(self) -> Path:
        return self.path / "run.json"

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def history_path(self) -> Path:
        return self.path / "attention_history.npz"

    @property
    def exists(self) -> bool:
        """Whether a run has left its marks here."""
        return self.manifest_path.is_file() or self.checkpoints.is_dir()

    def lock(self) -> filelock.BaseFileLock:
        """Makes the run this process's own until the lock is released or the process ends, however it does. Raises
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
        """Raises UserError for a link to what is outside: a run that comes from elsewhere would be written there."""
        inside = self.path.resolve()
        for path in self.path.rglob("*"):
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                raise UserError(f"{path} leads out of the run's folder: put the files themselves there")

    def read_manifest(self) -> dict[str, Any]:
        """What run.json says; empty if there is none. Raises UserError if it is no JSON object."""
        try:
            manifest = plain_files.read_json(self.manifest_path)
        except FileNotFoundError:
            return {}
        if not isinstance(manifest, dict):
            raise UserError(f"{self.manifest_path} holds no JSON object: repair or delete it")
        return manifest

    def update_manifest(self, **fields: Any) -> None:
        """Adds `fields` to run.json or replaces them there."""
        write_json(self.manifest_path, self.read_manifest() | fields)


def start_manifest(folder: RunFolder, **fields: Any) -> None:
    """Writes a starting run's run.json: status "running", when, by which versions, and `fields`.

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


def check_memory(num_parameters: int) -> None:
    """Raises UserError where a model of so many parameters cannot be trained in this machine's memory."""
    # Weights, gradients and Adam's two moments in float32.
    needed, there = 4 * 4 * num_parameters, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UserError(
            f"a model of {num_parameters:,} parameters needs {needed / 1e9:,.0f} GB of memory to train, and this "
            f"machine has {there / 1e9:,.0f}: lower model.embed_dim, model.mlp_dim or model.num_layers"
        )


def check_space(folder: Path, num_parameters: int) -> None:
    """Raises UserError where a run's files would not fit into the file system of `folder`, which need not exist."""
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


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # used from a folder on the path, not installed
        return None


def git_commit(folder: Path) -> str | None:
    """Commit of the checkout that `folder` lies in, with "-dirty" after it if files differ; else None."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def lock_folder(path: Path) -> filelock.BaseFileLock:
    """Holds the folder until the lock is released or the process ends. Raises UserError if another one holds it."""
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
    """The run or sweep whose folder is `path`; None if it is neither."""
    run = RunFolder(path)
    if run.exists:
        return RunGroup(path, (run,))
    if (path / "multirun.yaml").is_file():
        jobs = sorted((RunFolder(job) for job in path.iterdir()), key=lambda job: (job_number(job), job.name))
        jobs = [job for job in jobs if job.exists]
        return RunGroup(path, tuple(jobs)) if jobs else None
    return None


def job_number(job: RunFolder) -> float:
    """The number that a sweep job's folder name starts with, so that 10_... comes after 9_..."""
    digits = re.match(r"\d+", job.name)
    return int(digits.group()) if digits else math.inf


def find_runs(root: str | Path) -> list[RunGroup]:
    """The runs and sweeps directly under `root`, newest first; none if there is no such folder."""
    root = Path(root)
    if not root.is_dir():
        return []
    try:
        paths = list(root.iterdir())
    except OSError as error:
        raise UserError(f"cannot search for runs in {root}: {error.strerror or error}") from error
    groups = []
    for path in paths:
        with suppress(PermissionError):  # somebody else's
            if group := group_at(path):
                groups.append(group)
    return sorted(groups, key=lambda group: (created_at(group), group.path.name), reverse=True)


def created_at(group: RunGroup) -> float:
    """Seconds since 1970, from the folder's name; else, if it was renamed, from a manifest; else its own time."""
    with suppress(ValueError):
        if stamp := TIME_PATTERN.match(group.path.name):
            return datetime.strptime(stamp.group(), TIME_FORMAT).timestamp()
    with suppress(KeyError, TypeError, ValueError):  # UserError is a ValueError
        return datetime.fromisoformat(group.runs[0].read_manifest()["created"]).timestamp()
    return group.path.stat().st_mtime
