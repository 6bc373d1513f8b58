"""Run somebody's LightningModule without a trace: in its state, in what it logs, in its loggers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from attention_visualizer.attention.undisturbed import undisturbed
from attention_visualizer.watching.lightning_package import DummyLogger, LightningModule, Trainer


@contextmanager
def unnoticed(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Let the module run inside in eval mode; afterwards all that it keeps is as it was, and nothing was logged."""
    loggers = trainer.loggers
    with undisturbed(pl_module, hooks=True):
        for module in pl_module.modules():
            if hasattr(module, "log_dict"):  # which is restored, as every attribute
                module.log = _log_nothing  # type: ignore[assignment]
        trainer.loggers = [DummyLogger() for _ in loggers]
        try:
            yield
        finally:
            trainer.loggers = loggers


def _log_nothing(*args: Any, **options: Any) -> None:
    pass
