"""Ctrl-C and SIGTERM: the first one ends training in order, where it can go on exactly; the second one at once."""

from __future__ import annotations

import signal
import threading
from contextlib import AbstractContextManager
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class StopRequest(AbstractContextManager["StopRequest"]):
    """Handler of both signals while entered. Code that can end at a good place sets `deferred` and calls
    `end_if_requested` there; at any other time, and the second time, a signal raises SystemExit with 130 (Ctrl-C) or
    143 (SIGTERM).
    """

    def __init__(self) -> None:
        self.deferred = False
        self.requested: int | None = None  # the signal that came
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self.install_handlers()
        return self

    def install_handlers(self) -> None:
        """Handle the signals, also if other code has done so meanwhile; a job in the background ignores Ctrl-C."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python delivers signals to the main thread alone
        for number in SIGNALS:
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
        if self.deferred and self.requested is None:
            self.requested = number
            again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
            print(f"\n{NAMES[signal.Signals(number)]}: stopping after this batch, with a checkpoint{again}", flush=True)
            return
        raise SystemExit(128 + number)

    def end_if_requested(self) -> None:
        """Raise SystemExit if a signal came. To be called where everything is saved."""
        if self.requested is not None:
            raise SystemExit(128 + self.requested)
