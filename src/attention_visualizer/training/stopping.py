"""Ctrl-C, SIGTERM and their like: the first ends training in order, where it can go on exactly; the second at once."""

from __future__ import annotations

import os
import signal
import stat
import threading
from contextlib import AbstractContextManager
from types import FrameType, TracebackType
from typing import Any

# A terminal that is closed sends SIGHUP, a scheduler before its time limit SIGUSR1; Windows has neither.
NAMES = {
    getattr(signal, name): "Ctrl-C" if name == "SIGINT" else name
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)
}


def signal_of(exit_code: object) -> str | None:
    """Return the name of the signal that ended a program with this exit code; None if it was none of these."""
    return next((name for number, name in NAMES.items() if exit_code == 128 + number), None)


class StopRequest(AbstractContextManager["StopRequest"]):
    """Handler of these signals while entered. Code that can end at a good place sets `deferred` and calls
    `end_if_requested` there; at any other time, and the second time, a signal raises SystemExit with 128 and its
    number: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self) -> None:
        self.deferred = False
        self.requested: int | None = None  # the signal that came
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self.install_handlers()
        return self

    def install_handlers(self) -> None:
        """Handle the signals, also if other code has done so meanwhile. What is ignored stays so: Ctrl-C by a job in
        the background, SIGHUP under nohup."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python delivers signals to the main thread alone
        for number in NAMES:
            handler = signal.getsignal(number)
            if handler is not signal.SIG_IGN and handler != self._handle:
                self._earlier.setdefault(number, handler)
                signal.signal(number, self._handle)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._earlier = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if NAMES[number] == "SIGHUP":
            leave_terminal()
        if self.deferred and self.requested is None:
            self.requested = number
            again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
            print(f"\n{NAMES[number]}: stopping after this batch, with a checkpoint{again}", flush=True)
            return
        raise SystemExit(128 + number)

    def end_if_requested(self) -> None:
        """Raise SystemExit if a signal came. To be called where everything is saved."""
        if self.requested is not None:
            raise SystemExit(128 + self.requested)


def leave_terminal() -> None:
    """Write no more to a terminal that was closed: each attempt would be an error, and end what is still to be done."""
    with open(os.devnull, "wb") as nowhere:
        for descriptor in (1, 2):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(nowhere.fileno(), descriptor)
