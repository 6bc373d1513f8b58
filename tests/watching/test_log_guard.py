"""LogGuard: a logger that cannot write is warned of once and left alone, and nothing is left behind."""

from __future__ import annotations

import errno
import signal
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.summary.writer import record_writer

from attention_visualizer.watching.log_guard import GUARDED_METHODS, LogGuard
from tests.helpers.runs import BRIEF, run_train
from tests.helpers.trainers import Recorder


class Full(Recorder):
    """Writes nothing, and counts how often it was asked."""

    asked = 0

    def log_metrics(self, *_: Any, **__: Any) -> None:
        self.asked += 1
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise ValueError("I/O operation on closed file") from error


def test_what_lightning_asks_of_a_logger_is_guarded() -> None:
    full, whole = Full(), Recorder()
    with warnings.catch_warnings(record=True) as caught, LogGuard([full, whole]):
        warnings.simplefilter("always")
        for step in range(3):
            for logger in (full, whole):
                logger.log_metrics({"loss": 1.0}, step)
        full.save()
    lines = [str(each.message) for each in caught]
    assert lines == ["Full writes no more, training continues: [Errno 28] No space left on device"]
    assert full.asked == 1 and [step for step, _ in whole.metrics] == [0, 1, 2]


def test_a_kind_that_fails_takes_nothing_from_the_others() -> None:
    guard, logger, written = LogGuard(), Recorder(), []

    def fail() -> None:
        written.append("tried")
        raise ConnectionError("away\nTraceback")

    with pytest.warns(UserWarning, match="^AttentionLogger: Recorder gets no more images: away$") as caught:
        for _ in range(3):
            guard.attempt(logger, "images", fail)
    assert guard.attempt(logger, "numbers", lambda: 3) == 3 and written == ["tried"] and len(caught) == 1


def test_a_full_disk_ends_all_of_tensorboard(tmp_path: Path) -> None:
    guard, logger = LogGuard(), TensorBoardLogger(tmp_path)

    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.warns(UserWarning, match="^TensorBoardLogger writes no more, training continues"):
        guard.attempt(logger, "images", fail)
    assert guard.attempt(logger, "numbers", lambda: 3) is None


def test_interrupts_pass() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LogGuard().attempt(Recorder(), None, interrupt)


@pytest.mark.parametrize("error", [None, RuntimeError("training failed")])
def test_everything_is_put_back(tmp_path: Path, error: Exception | None) -> None:
    loggers = [TensorBoardLogger(tmp_path), CSVLogger(tmp_path), Recorder()]
    loggers[2].save = own = lambda: None  # type: ignore[method-assign]
    before, hook = [dict(vars(logger)) for logger in loggers], threading.excepthook
    try:
        with LogGuard(loggers), LogGuard(loggers):
            assert threading.excepthook is not hook
            assert all(name in vars(logger) for logger in loggers for name in GUARDED_METHODS)
            if error is not None:
                raise error
    except RuntimeError as raised:
        assert raised is error
    assert [dict(vars(logger)) for logger in loggers] == before and loggers[2].save is own
    assert threading.excepthook is hook


def test_runs_in_one_process_leave_it_as_it_was(tmp_path: Path) -> None:
    def state() -> list[Any]:
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        return [*handlers, threading.excepthook, record_writer.masked_crc32c]

    before = state()
    for seed in (0, 1):
        outcome = run_train(*BRIEF, "test=false", f"seed={seed}", folder=tmp_path)
        assert outcome.exit_code == 0 and state() == before, outcome.err
