"""Write files whole or not at all, whatever kills the writer."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from attention_visualizer.files import plain_files
from attention_visualizer.support.errors import UserError

PARTIAL = ".{stem}.partial-{token}{suffix}"  # a file that is being written


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with its suffix; what was written there becomes `path` at the end.

    Readers see the old file or the new one, never a part, whatever kills the writer. An exception removes the
    temporary file and leaves `path` as it was. An OSError (disk full, read-only folder) becomes a UserError.
    """
    path = Path(path)
    temporary = path.with_name(PARTIAL.format(stem=path.stem, token=secrets.token_hex(4), suffix=path.suffix))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        flush_to_disk(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        raise
    with suppress(OSError):  # the file is in place; not every file system can flush a folder
        flush_to_disk(path.parent)


def missing_folders(folder: Path) -> list[Path]:
    """Return those of `folder` and its parents that do not exist yet, for `remove_empty`."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(folders: list[Path]) -> None:
    for path in folders:
        with suppress(OSError):  # something is in it by now
            path.rmdir()


def flush_to_disk(path: Path) -> None:
    """Wait until the file or folder at `path` would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` atomically as UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def copy(source: Path, path: Path) -> None:
    """Copy a file atomically."""
    with atomic_path(path) as temporary:
        shutil.copyfile(source, temporary)


def write_json(path: str | Path, data: Any) -> None:
    """Write `data` atomically as JSON; NaN and infinity, which JSON lacks, become null."""
    write_text(path, json.dumps(json_ready(data), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON. Raise UserError for a file that is missing or is not JSON."""
    try:
        return plain_files.read_json(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} cannot be read as JSON: {error.strerror}") from error


def short_path(path: Path) -> Path:
    """Return `path` relative to the current folder where it lies inside, else absolute."""
    path = path.absolute()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def json_ready(value: Any) -> Any:
    """Convert `value` to JSON's own types: paths become strings, arrays and tensors lists, NaN and infinity None."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy arrays and scalars, tensors
        return json_ready(value.tolist())
    return value
