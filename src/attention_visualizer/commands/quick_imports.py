"""Import the libraries without garbage collection, and let Ctrl-C end the process without a traceback."""

from __future__ import annotations

import atexit
import gc
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silent_interrupt() -> Iterator[None]:
    """Let Ctrl-C end the process in silence, where Python would print a traceback."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, handler)


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import without garbage collection, which takes a sixth of the time, and exempt what was imported from later ones,
    which would take 0.2 s in the middle of a step."""
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
        atexit.register(gc.unfreeze)  # or Triton says at the end that they leaked
    finally:
        gc.enable()
