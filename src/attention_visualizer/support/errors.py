"""UserError and UnreadableError, and the text of other errors in one line."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """A mistake in what was asked for or given: one line that says what is wrong and what to do.

    The entry points print it without a traceback and exit with a non-zero code.
    """


# What the operating system says of a path or, where a damaged archive sends it to offsets that make no sense, of a
# file's content.
OF_THE_FILE = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.EINVAL),
    None,  # raised by Python code
}

# What PyTorch says where memory ends: the processor's, a GPU's, that of cuDNN.
OF_MEMORY = ("DefaultCPUAllocator", "out of memory", "CUDNN_STATUS_NOT_SUPPORTED")


class UnreadableError(OSError):
    """A file that cannot be read at the moment, for want of permission or memory or by an I/O error.

    What it holds is not known: unlike a damaged one, it must not be passed over or replaced.
    """


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise UnreadableError in the place of what keeps the file at `path` from being read at the moment, UserError in
    that of what does so for good; FileNotFoundError stays as it is."""
    try:
        yield
    except (UnreadableError, FileNotFoundError):
        raise
    except Exception as error:
        reason = "not enough memory" if is_out_of_memory(error) else getattr(error, "strerror", None) or error
        if prevents_reading(error):
            raise UnreadableError(f"{path} cannot be read at the moment ({reason}); it may be whole") from error
        if isinstance(error, OSError):
            raise UserError(f"{path}: cannot be read ({reason}): repair or delete it") from error
        raise


def prevents_reading(error: Exception) -> bool:
    """Whether the error is of the machine at the moment, and says nothing of the file."""
    return is_out_of_memory(error) or (isinstance(error, OSError) and error.errno not in OF_THE_FILE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the processor's or of a GPU's."""
    kind = type(error).__name__  # without an import of torch, whose allocators raise two kinds
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OF_MEMORY)


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out, which `error` or an error that it was raised from says."""
    while error is not None:
        if is_out_of_memory(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def summary(error: BaseException) -> str:
    """Return the first line of an error's message that is not empty, or the name of its type if there is none."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def one_line(error: BaseException) -> str:
    """Return an error's whole message in one line, or the name of its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
