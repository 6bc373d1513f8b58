"""The four files of MNIST: found, checked by hash, downloaded once where they are missing, parsed."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import math
import os
import struct
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import filelock
import numpy as np
from rich.console import Console
from rich.progress import DownloadColumn, Progress

from attention_visualizer.files import atomic
from attention_visualizer.files.plain_files import read_bytes
from attention_visualizer.support.errors import UserError

# The extracted files, each with its MD5.
FILES = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
RAW = ("MNIST", "raw")  # where torchvision has them, too
MAX_FILE_BYTES = 47_040_016  # bytes
LOCK_SECONDS = 600.0  # longer than the four downloads that another process may be at


class MnistUnavailable(Exception):
    """MNIST is not on disk and could not be downloaded; the message is the reason."""


def load_mnist(data_dir: Path) -> dict[str, np.ndarray]:
    """Load all four files by name, uint8: images [n, 28, 28], labels [n].

    Look in `data_dir/MNIST/raw`, then in `data_dir` itself; what is missing is downloaded. Raise UserError for a
    file whose hash is not the expected one, MnistUnavailable where there is none and none can be had.
    """
    folder = find_folder(data_dir)
    arrays = {name: read_file(folder / name) for name in FILES if _exists(folder / name)}
    missing = [name for name in FILES if name not in arrays]
    if missing:
        from torchvision.datasets import MNIST  # slow to import, and needed only here

        archives = [(archive, md5) for archive, md5 in MNIST.resources if archive.removesuffix(".gz") in missing]
        download(folder, archives, MNIST.mirrors)
        arrays |= {name: read_file(folder / name) for name in missing}
    return arrays


def find_folder(data_dir: Path) -> Path:
    """Return the folder that holds MNIST files, or else the one that they shall be downloaded to."""
    raw = data_dir.joinpath(*RAW)
    holds_files = (folder for folder in (raw, data_dir) if any(_exists(folder / name) for name in FILES))
    return next(holds_files, raw)


def holds_all(data_dir: Path) -> bool:
    """Whether nothing would have to be downloaded to `data_dir`."""
    try:
        folder = find_folder(data_dir)
        return all((folder / name).is_file() for name in FILES)
    except (OSError, ValueError):  # a name too long, or with a NUL; UserError is a ValueError
        return False


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:  # a folder on the way may not be entered
        raise UserError(f"{path}: cannot be read ({error.strerror}): choose another data.data_dir") from error


def read_file(path: Path) -> np.ndarray:
    """Read one extracted file, checked by its hash."""
    content = read_bytes(path, MAX_FILE_BYTES + 1)
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if md5 != FILES[path.name]:
        raise UserError(
            f"{path}: not the MNIST file of that name, or damaged ({len(content)} bytes, MD5 {md5} instead of "
            f"{FILES[path.name]}): delete it to have it downloaded again"
        )
    return parse_idx(content, str(path))


def parse_idx(content: bytes, source: str) -> np.ndarray:
    """Parse IDX bytes (two zero bytes, type 8, number of axes, big-endian sizes, values) to a uint8 array."""
    axes = content[3] if len(content) >= 4 and content[:3] == b"\0\0\x08" else 0
    header = 4 + 4 * axes
    if axes == 0 or len(content) < header:
        raise UserError(f"{source}: not an IDX file of unsigned bytes: delete it to have it downloaded again")
    shape = struct.unpack(f">{axes}I", content[4:header])
    if math.prod(shape) != len(content) - header:
        raise UserError(
            f"{source}: its header promises {math.prod(shape)} values and {len(content) - header} follow: "
            "delete it to have it downloaded again"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def download(
    folder: Path,
    archives: Sequence[tuple[str, str]],
    mirrors: Sequence[str],
    timeout: float = 10.0,
    deadline: float = 120.0,
) -> None:
    """Download gzip `archives` (name, MD5) and extract each into `folder`, unless it is there by then.

    One process at a time does so, the others wait. timeout: seconds of silence, deadline: seconds in all for one
    file from one mirror. A file appears under its name only when it is complete. Raise MnistUnavailable.
    """
    try:
        with locked(folder):
            for archive, md5 in archives:
                target = folder / archive.removesuffix(".gz")
                if not target.exists():
                    _write(target, gzip.decompress(_fetch(archive, md5, mirrors, timeout, deadline)))
    except (OSError, EOFError) as error:
        raise MnistUnavailable(f"{folder} cannot be filled: {error}") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make `folder` this process's own. Nothing of that stays, nor the folder and its new parents if it is empty."""
    end = time.monotonic() + LOCK_SECONDS
    lock = filelock.FileLock(folder / ".download.lock")
    ours = [folder, folder.parent] if folder.parts[-2:] == RAW else []  # who waits did not make them itself
    made = ours + [path for path in atomic.missing_folders(folder) if path not in ours]
    while not lock.is_locked:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # who had the lock has just removed the folder
            lock.acquire(timeout=max(0.0, end - time.monotonic()))
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # who waits for it tries again
        lock.release()
        atomic.remove_empty(made)


def _fetch(archive: str, md5: str, mirrors: Sequence[str], timeout: float, deadline: float) -> bytes:
    """Fetch the archive's bytes from the first mirror that has them with the correct hash."""
    failures = []
    for mirror in mirrors:
        url = mirror.rstrip("/") + "/" + archive
        try:
            content = within(deadline, partial(_fetch_url, url, timeout, deadline))
        except (OSError, http.client.HTTPException, ValueError) as error:  # URLError and time-outs are OSErrors
            failures.append(f"{url}: {getattr(error, 'reason', None) or error or type(error).__name__}")
            continue
        if hashlib.md5(content, usedforsecurity=False).hexdigest() == md5:
            return content
        failures.append(f"{url}: incomplete or altered ({len(content)} bytes)")
    raise MnistUnavailable("download failed: " + "; ".join(failures))


def within(seconds: float, work: Callable[[], bytes]) -> bytes:
    """Return what `work` returns; raise TimeoutError if it takes longer, and leave its thread behind.

    A mirror that sends its headers byte by byte, or redirect after redirect, is never silent for long.
    """
    done: list[bytes] = []
    errors: list[Exception] = []

    def attempt() -> None:
        try:
            done.append(work())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not done:
        raise TimeoutError(f"not complete after {seconds:g} seconds")
    return done[0]


def _fetch_url(url: str, timeout: float, deadline: float) -> bytes:
    """Fetch the body at `url`; TimeoutError after `timeout` seconds of silence or `deadline` seconds in all."""
    end = time.monotonic() + deadline
    columns = (*Progress.get_default_columns(), DownloadColumn())
    with (
        urllib.request.urlopen(url, timeout=timeout) as response,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        length = response.headers.get("Content-Length", "")
        task = progress.add_task(url.rpartition("/")[2], total=int(length) if length.isdigit() else None)
        chunks = []
        while chunk := response.read1(1 << 16):  # one receive each, so that a trickle cannot outlast the deadline
            chunks.append(chunk)
            progress.advance(task, len(chunk))
            if time.monotonic() > end:
                raise TimeoutError(f"not complete after {deadline:g} seconds")
            if sum(map(len, chunks)) > MAX_FILE_BYTES:
                raise ValueError("more bytes than any file of MNIST has")
    return b"".join(chunks)


def _write(target: Path, content: bytes) -> None:
    """Write beside the target and rename, so that the name never stands for part of a file.

    Not by `atomic_path`: after a kill, the next download replaces this temporary file, and an OSError stays one.
    """
    temporary = target.with_name(f"{target.name}.partial")  # one name will do: the lock is held
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
