"""What a logger that cannot write costs: one warning, and never the training."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial, wraps
from types import TracebackType
from typing import Any

from attention_visualizer.support.errors import summary
from attention_visualizer.watching.lightning_internals import is_event_writer, is_tensorboard
from attention_visualizer.watching.lightning_package import Logger, rank_zero_warn

# What Lightning itself asks of a logger.
GUARDED_METHODS = ("log_metrics", "log_hyperparams", "save", "finalize", "after_save_checkpoint")


class LogGuard(AbstractContextManager["LogGuard"]):
    """Owner of what `loggers` failed at: each is warned of once and not asked again; training goes on.

    `attempt` guards one call. While entered, the guard also stands before what Lightning asks of the loggers, and
    silences the traceback of TensorBoard's own thread; on leaving, everything is put back.
    """

    def __init__(self, loggers: Sequence[Logger] = ()) -> None:
        self.loggers = loggers
        self._failed: set[tuple[int, str | None]] = set()  # (id of a logger, what it cannot write; None: anything)
        self._undo = ExitStack()

    def attempt(self, logger: Logger, kind: str | None, write: Callable[[], Any]) -> Any:
        """Return what `write` returns, None where it fails or `logger` failed before, at this kind or at everything.

        kind: what is written, in the plural, as the warning names it; None for what `logger` cannot do without.
        """
        if {(id(logger), None), (id(logger), kind)} & self._failed:
            return None
        try:
            return write()
        except Exception as error:  # of a logging service: its network, its disk, its version
            name = type(logger).__name__
            # TensorBoard's thread has ended with its first OSError, and nothing more can be written.
            if kind is None or (is_tensorboard(logger) and isinstance(error, OSError)):
                self._failed.add((id(logger), None))
                rank_zero_warn(f"{name} writes no more, training continues: {first_cause(error)}")
            else:
                self._failed.add((id(logger), kind))
                rank_zero_warn(f"AttentionLogger: {name} gets no more {kind}: {summary(error)}")

    def __enter__(self) -> LogGuard:
        for logger in self.loggers:
            for name in GUARDED_METHODS:
                self._guard_method(logger, name)
        if any(is_tensorboard(logger) for logger in self.loggers):
            self._silence_writer_threads()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def _guard_method(self, logger: Logger, name: str) -> None:
        write, own = getattr(logger, name), vars(logger).get(name)

        @wraps(write)
        def guarded(*arguments: Any, **named: Any) -> Any:
            return self.attempt(logger, None, partial(write, *arguments, **named))

        setattr(logger, name, guarded)
        if own is None:
            self._undo.callback(delattr, logger, name)
        else:
            self._undo.callback(setattr, logger, name, own)

    def _silence_writer_threads(self) -> None:
        """TensorBoard's thread hands its errors on to the next call, and shows them as a traceback, too."""
        show = threading.excepthook

        def show_others(arguments: Any) -> None:
            if not (isinstance(arguments.exc_value, OSError) and is_event_writer(arguments.thread)):
                show(arguments)

        threading.excepthook = show_others
        self._undo.callback(setattr, threading, "excepthook", show)


def first_cause(error: BaseException) -> str:
    """Return the summary of the error that others were raised from: TensorBoard makes a ValueError of a full disk."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return summary(error)
