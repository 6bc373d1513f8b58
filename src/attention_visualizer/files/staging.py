"""A folder changes as a whole or not at all: files are written beside it and moved in when all are complete."""

from __future__ import annotations

import errno
import glob
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock

from attention_visualizer.files import atomic
from attention_visualizer.support.errors import UserError

LOCK, NEW, EARLIER, PLAN = "lock", "new", "earlier", "plan.json"


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """Yield an empty folder on `folder`'s file system for what shall go there: see `move_in`. It is gone afterwards,
    whatever happens; what a killed process left of its own goes now, and what it had begun to move is undone.

    An OSError becomes a UserError.
    """
    beside = place_beside(folder)
    made = atomic.missing_folders(beside)
    try:
        beside.mkdir(parents=True, exist_ok=True)
        lock, stage = open_stage(beside, prefix_of(folder))
    except OSError as error:
        raise UserError(f"cannot write beside {folder}: {error.strerror or error}") from error
    try:
        clear_leftovers(folder, beside, stage)
        (stage / NEW).mkdir()
        yield stage / NEW
    finally:
        lock.release()
        shutil.rmtree(stage, ignore_errors=True)
        atomic.remove_empty(made)


def place_beside(folder: Path) -> Path:
    """Where `folder` lies; inside itself where it is a file system of its own or lies where nothing may be written."""
    real = folder.resolve()
    parent = real.parent
    if real.is_dir() and (real.stat().st_dev != parent.stat().st_dev or not os.access(parent, os.W_OK)):
        return real
    return parent


def prefix_of(folder: Path) -> str:
    return f".{folder.resolve().name}.partial-"


def open_stage(beside: Path, prefix: str) -> tuple[filelock.FileLock, Path]:
    """Make a new folder, and the lock that shows, also to other machines, that its process lives."""
    while True:
        stage = beside / f"{prefix}{secrets.token_hex(4)}"
        stage.mkdir()
        lock = filelock.FileLock(stage / LOCK)
        with suppress(OSError, filelock.Timeout):
            lock.acquire(timeout=0)
            if (stage / LOCK).exists():
                return lock, stage
        # Another process took it for a leftover between these lines.


def clear_leftovers(folder: Path, beside: Path, own: Path) -> None:
    """Remove the stages of processes that are no more, after undoing what they had begun to move."""
    for stage in beside.glob(f"{glob.escape(prefix_of(folder))}*"):
        if stage == own or stage.is_symlink() or not stage.is_dir():
            continue
        lock = filelock.FileLock(stage / LOCK)
        try:
            lock.acquire(timeout=0)
        except (OSError, filelock.Timeout):
            continue  # its process is at work
        try:
            undo(stage, folder)
        except OSError as error:
            raise UserError(f"cannot bring back what is in {stage}: {error.strerror or error}") from error
        finally:
            lock.release()
        shutil.rmtree(stage, ignore_errors=True)


def move_in(new: Path, folder: Path, names: Sequence[str], obsolete: Sequence[str] = ()) -> None:
    """Move files `names` from `new` (of `staging`) into `folder`, in this order, and remove the `obsolete` ones.

    If anything fails on the way, `folder` is as it was before; where the process is killed on the way, it is so again
    when the next `staging` begins. Raise UserError for an OSError.
    """
    stage = new.parent
    try:
        existed = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        (stage / EARLIER).mkdir()
        for name in (*names, *obsolete):
            if (folder / name).is_file():
                keep(folder / name, stage / EARLIER / name)
        # Relative, so that it still holds when the folder of both was renamed meanwhile.
        atomic.write_json(stage / PLAN, {"folder": os.path.relpath(folder.resolve(), stage), "names": list(names)})
        for name in names:
            move(new / name, folder / name)
        for name in obsolete:
            (folder / name).unlink(missing_ok=True)
        # From here on a killed process leaves the new files: they are all there.
        (stage / PLAN).unlink()
    except BaseException as error:
        undo(stage, folder)
        if not existed:
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"cannot write {error.filename2 or error.filename}: {error.strerror or error}") from error
        raise
    with suppress(OSError):
        atomic.flush_to_disk(folder)


def keep(path: Path, copy: Path) -> None:
    try:
        os.link(path, copy)
    except OSError:  # a file system without links, or another one
        shutil.copy2(path, copy)


def move(path: Path, to: Path) -> None:
    try:
        os.replace(path, to)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with atomic.atomic_path(to) as temporary:  # onto another file system
            shutil.copy2(path, temporary)
        path.unlink()


def undo(stage: Path, folder: Path) -> None:
    """Undo what `move_in` had begun: restore earlier files, remove new ones that replaced none.

    Raise UserError for a plan of anything but files in `folder` or one beside it: folders that come from elsewhere may
    hold a stage that was made by hand."""
    if not (stage / PLAN).is_file():
        return
    found = atomic.read_json(stage / PLAN)
    plan = found if isinstance(found, dict) else {}
    target = Path(os.path.normpath(stage.resolve() / str(plan.get("folder"))))
    names: Any = plan.get("names")
    plain = isinstance(names, list) and all(isinstance(name, str) and Path(name).name == name for name in names)
    if not plain or target.parent != folder.resolve().parent or target.is_symlink():
        raise UserError(f"{stage} was left by no process of this program: delete it")
    if not target.is_dir():  # it was removed since
        return
    for name in names:
        if not (stage / EARLIER / name).exists() and not (stage / NEW / name).exists():
            (target / name).unlink(missing_ok=True)
    for path in (stage / EARLIER).iterdir():
        move(path, target / path.name)
