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
from attention_visualizer.watching.loggers import flush

SAVE_SECONDS = 60.0  # between checkpoints: what a killed run loses at most; saving the default model takes 0.05


class RunCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint of one file, which still knows its best after the run's folder was moved."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the scores alone: the file is where this one writes it."""
        scores = {name: state_dict.get(name) for name in ("best_model_score", "current_score")}
        for name, score in scores.items():
            if score is not None:
                check_like(torch.zeros(()), score, f"callbacks.{name}")
        best = scores["best_model_score"]
        path = str(Path(str(self.dirpath)) / f"{self.filename}{self.FILE_EXTENSION}")
        known = (
            {"best_k_models": {path: best}, "kth_best_model_path": path, "kth_value": best} if best is not None else {}
        )
        fresh = {**self.state_dict(), "best_model_path": path}
        super().load_state_dict({**fresh, **scores, **known})


class LastCheckpoint(RunCheckpoint):
    """Saves after every validation, between two batches whenever `seconds` have passed, and when the user wants to
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
        """Here, and not at a batch's end: there its own numbers are not logged yet."""
        # Gradients that wait for the rest of their batches are in no checkpoint. Between epochs: on_train_epoch_end.
        if not self.is_due or batch_idx == 0 or batch_idx % trainer.accumulate_grad_batches:
            return
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_checkpoint(trainer, self._path)
        self.stop.end_if_requested()

    @property
    def is_due(self) -> bool:
        return self.stop.requested is not None or time.monotonic() - self._saved_at >= self.seconds

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Also where the epoch had no validation, or had it earlier: what is saved then begins with the next epoch."""
        super().on_train_epoch_end(trainer, pl_module)
        saved = self._should_save_on_train_epoch_end(trainer) and self._last_global_step_saved == trainer.global_step
        if not saved and self.is_due:
            self._save_checkpoint(trainer, self._path)
            saved = True
        if saved:
            self.stop.end_if_requested()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if self._last_global_step_saved == trainer.global_step:
            self.stop.end_if_requested()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self.stop.deferred = False
        if self._last_global_step_saved == trainer.global_step:  # a signal since the epoch's end
            self.stop.end_if_requested()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._saved_at = time.monotonic()
        flush(trainer.loggers)
        # A batch that was fetched and has not begun will be fetched again.
        for count in checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"].values():
            if isinstance(count, dict):
                count["ready"] = count["completed"] if count["started"] == count["completed"] else count["ready"]


def checkpoint_callbacks(folder: RunFolder, stop: StopRequest) -> list[ModelCheckpoint]:
    """best.ckpt by validation accuracy, and last.ckpt. The best comes first: it is `fit`'s."""
    best = RunCheckpoint(
        str(folder.checkpoints),
        filename=folder.best.stem,
        monitor="validation/accuracy",
        mode="max",
        enable_version_counter=False,
    )
    return [best, LastCheckpoint(folder, stop)]
