"""When checkpoints are written: best.ckpt and last.ckpt, each whole and in step with what was logged."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from attention_visualizer.files import atomic
from attention_visualizer.runs.checkpoint import load_checkpoint
from attention_visualizer.runs.folders import RunFolder
from attention_visualizer.support.errors import UserError
from attention_visualizer.support.text import print_sanitised
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


class BestCheckpoint(RunCheckpoint):
    """Save the best by validation accuracy. Where its file was deleted, the best since then takes its place."""

    def __init__(self, folder: RunFolder) -> None:
        super().__init__(
            str(folder.checkpoints),
            filename=folder.best.stem,
            monitor="validation/accuracy",
            mode="max",
            enable_version_counter=False,
        )
        self.folder = folder

    @property
    def state_key(self) -> str:
        """The name of its state in checkpoints: that of the class in version 2.0.0, whose runs go on."""
        return super().state_key.replace(type(self).__qualname__, RunCheckpoint.__qualname__, 1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forget_missing()
        super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forget_missing()
        super().on_validation_end(trainer, pl_module)

    def _forget_missing(self) -> None:
        if self.best_k_models and not self.folder.best.exists():
            self.best_k_models, self.kth_best_model_path = {}, ""

    def replace_missing(self) -> None:
        """Let last.ckpt take the place of a file that was deleted since the last validation. Raise UserError where
        that is missing, too."""
        if self.folder.best.exists():
            return
        if not self.folder.last.exists():
            raise UserError(f"{self.folder.checkpoints} has no checkpoint any more: was it deleted, or the run moved?")
        print_sanitised(f"{self.folder.best} is missing: {self.folder.last.name} takes its place")
        accuracy = load_checkpoint(self.folder.last).validation_accuracy
        atomic.copy(self.folder.last, self.folder.best)
        self.best_model_score = torch.tensor(float("nan") if accuracy is None else accuracy)


class LastCheckpoint(RunCheckpoint):
    """Save after every validation, between two batches whenever `seconds` have passed, and when the user wants to
    stop. Before any checkpoint is written, all that was logged up to it is on the disk."""

    def __init__(self, folder: RunFolder, stop: StopRequest, seconds: float = SAVE_SECONDS) -> None:
        super().__init__(str(folder.checkpoints), filename=folder.last.stem, enable_version_counter=False)
        self.folder = folder
        self.identity = folder.identity
        self.stop = stop
        self.seconds = seconds
        self._saved_at = time.monotonic()

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
            lightning_internals.save_checkpoint(self, trainer, str(self.folder.last))
        self.stop.end_if_requested()

    @property
    def is_due(self) -> bool:
        return self.stop.requested is not None or time.monotonic() - self._saved_at >= self.seconds

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save also where the epoch had no validation, or had it earlier: the checkpoint begins with the next epoch."""
        super().on_train_epoch_end(trainer, pl_module)
        saved = lightning_internals.saves_after_training_epoch(self, trainer) and self._has_saved_this_step(trainer)
        if not saved and self.is_due:
            lightning_internals.save_checkpoint(self, trainer, str(self.folder.last))
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

    def require_folder(self) -> None:
        """Raise UserError where the run's folder is not the one in which it began: half a run would be left in each."""
        if self.folder.identity != self.identity:
            raise UserError(
                f"{self.folder.path} was moved or deleted while its run trained: resume it where it is now, with "
                f"ckpt_path=<its folder>/checkpoints/{self.folder.last.name}"
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.require_folder()  # before anything of the validation is written

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.require_folder()
        self._saved_at = time.monotonic()
        flush(trainer.loggers)
        lightning_internals.forget_fetched_batch(checkpoint)

    def _has_saved_this_step(self, trainer: Trainer) -> bool:
        return lightning_internals.last_saved_step(self) == trainer.global_step


def checkpoint_callbacks(folder: RunFolder, stop: StopRequest) -> list[ModelCheckpoint]:
    """Return the savers of best.ckpt, by validation accuracy, and of last.ckpt. `fit` asks the first one."""
    return [BestCheckpoint(folder), LastCheckpoint(folder, stop)]
