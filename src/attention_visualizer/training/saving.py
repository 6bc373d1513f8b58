"""When checkpoints are written: best.ckpt and last.ckpt, each whole and in step with what was logged."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from attention_visualizer.runs.folders import RunFolder
from attention_visualizer.training.stopping import StopRequest
from attention_visualizer.training.training_state import check_like
from attention_visualizer.watching import lightning_internals
from attention_visualizer.watching.loggers import flush

SAVE_SECONDS = 60.0  # between checkpoints: what a killed run loses at most; saving the default model takes 0.05


class RunCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint of one file, which still knows its best after the run's folder was moved."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the scores alone: the file is where this one writes it."""
        scores = {name: state_dict.get(name) for name in ("best_model_score", "current_score")}
        for name, score in scores.items():
            if score is not None:
                check_like(torch.zeros(()), score, f"callbacks.{name}")
        best = scores["best_model_score"]
        path = str(Path(str(self.dirpath)) / f"{self.filename}{self.FILE_EXTENSION}")
        best_file = (
            {"best_k_models": {path: best}, "kth_best_model_path": path, "kth_value": best} if best is not None else {}
        )
        fresh = {**self.state_dict(), "best_model_path": path}
        super().load_state_dict({**fresh, **scores, **best_file})


class LastCheckpoint(RunCheckpoint):
    """Save after every validation, between two batches whenever `seconds` have passed, and when the user wants to
    stop. Before any checkpoint is written, all that was logged up to it is on the disk."""

    def __init__(self, folder: RunFolder, stop: StopRequest, seconds: float = SAVE_SECONDS) -> None:
        super().__init__(str(folder.checkpoints), filename=folder.last.stem, enable_version_counter=False)
        self.stop = stop
        self.seconds = seconds
        self._saved_at = time.monotonic()
        self._path = str(folder.last)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._saved_at = time.monotonic()
        self.stop.install_handlers()  # Lightning has put a handler of its own before this one
        self.stop.deferred = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save before a batch starts: at the end of one, its metrics are not logged yet."""
        # Gradients that wait for the rest of their batches are in no checkpoint. Between epochs: on_train_epoch_end.
        if not self.is_due or batch_idx == 0 or batch_idx % trainer.accumulate_grad_batches:
            return
        if not lightning_internals.should_skip_saving(self, trainer):
            lightning_internals.save_checkpoint(self, trainer, self._path)
        self.stop.end_if_requested()

    @property
    def is_due(self) -> bool:
        return self.stop.requested is not None or time.monotonic() - self._saved_at >= self.seconds

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save also where the epoch had no validation, or had it earlier: the checkpoint begins with the next epoch."""
        super().on_train_epoch_end(trainer, pl_module)
        saved = lightning_internals.saves_after_training_epoch(self, trainer) and self._has_saved_this_step(trainer)
        if not saved and self.is_due:
            lightning_internals.save_checkpoint(self, trainer, self._path)
            saved = True
        if saved:
            self.stop.end_if_requested()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if self._has_saved_this_step(trainer):
            self.stop.end_if_requested()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self.stop.deferred = False
        if self._has_saved_this_step(trainer):  # a signal since the epoch's end
            self.stop.end_if_requested()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._saved_at = time.monotonic()
        flush(trainer.loggers)
        lightning_internals.forget_fetched_batch(checkpoint)

    def _has_saved_this_step(self, trainer: Trainer) -> bool:
        return lightning_internals.last_saved_step(self) == trainer.global_step


def checkpoint_callbacks(folder: RunFolder, stop: StopRequest) -> list[ModelCheckpoint]:
    """Return the savers of best.ckpt, by validation accuracy, and of last.ckpt. `fit` asks the first one."""
    best = RunCheckpoint(
        str(folder.checkpoints),
        filename=folder.best.stem,
        monitor="validation/accuracy",
        mode="max",
        enable_version_counter=False,
    )
    return [best, LastCheckpoint(folder, stop)]
