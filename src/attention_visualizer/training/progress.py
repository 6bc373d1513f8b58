"""What is said while a run trains: in a terminal a bar over the whole run, everywhere a line for each validation."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch import callbacks
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Column

from attention_visualizer.runs.folders import RunFolder
from attention_visualizer.support.text import print_sanitised, printable
from attention_visualizer.support.training_progress import batches_done, progress_in_epochs, total_batches

BATCHES_BETWEEN_DRAWINGS = 10  # the loss is asked for when it is shown: on a GPU that waits for it


class RunLog:
    """RUN/train.log: what was said about a run, a line each, with the time. One that cannot be written is no reason to
    end a run."""

    def __init__(self, folder: RunFolder) -> None:
        self.path = folder.path / "train.log"

    def write(self, line: str) -> None:
        with suppress(OSError), self.path.open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {printable(line)}\n")

    def say(self, line: str) -> None:
        """Print the line as well."""
        print_sanitised(line)
        self.write(line)


class Pace:
    """How fast a training goes, since this process began it."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.total = total_batches(trainer, int(trainer.num_training_batches))
        self._began, self._done_before = time.monotonic(), batches_done(trainer)

    def seconds_left(self) -> float | None:
        """Return how long the rest will take; None where that cannot be told, or nothing is left."""
        done = batches_done(self.trainer)
        if self.total is None or not self.total > done > self._done_before:
            return None
        return (time.monotonic() - self._began) / (done - self._done_before) * (self.total - done)


def shows_bar(wanted: bool | None) -> bool:
    """Whether there is a terminal that a bar can be drawn in. wanted: `trainer.enable_progress_bar`."""
    return wanted is not False and sys.stdout.isatty()


class EpochLines(Callback):
    """Say after each validation how far training has come, how good the model is, and how long the rest takes."""

    def __init__(self, run_log: RunLog) -> None:
        self.run_log = run_log
        self._loss: Any = 0.0  # summed over the batches since the last line; a tensor, so that a GPU need not wait
        self._batches = 0
        self._last_line = 0.0
        self._pace: Pace | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_line, self._pace = time.monotonic(), Pace(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is not None:
            self._loss = self._loss + loss.detach()
            self._batches += 1

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or not trainer.is_global_zero:
            return
        now = time.monotonic()
        scores = {name: float(value) for name, value in trainer.callback_metrics.items()}
        best = getattr(trainer.checkpoint_callback, "best_model_score", None)
        parts = [f"{epoch_text(trainer)}  step {trainer.global_step:,}"]
        if self._batches:
            parts.append(f"loss {float(self._loss) / self._batches:.3f}")
        if "validation/accuracy" in scores:
            accuracy = scores["validation/accuracy"]
            highest = accuracy if best is None else max(accuracy, float(best))
            parts.append(f"val loss {scores['validation/loss']:.3f}, acc {accuracy:.2%} (best {highest:.2%})")
        took = duration(now - self._last_line)
        left = None if self._pace is None else self._pace.seconds_left()
        if left is not None:
            took += f", about {duration(left)} left"
        self._loss, self._batches, self._last_line = 0.0, 0, now
        line = "  ".join([*parts, took])
        bar = trainer.progress_bar_callback
        if isinstance(bar, RunBar):
            bar.print("  ".join(parts))  # it shows the time itself, and this fits 80 columns
            self.run_log.write(line)
        else:
            self.run_log.say(line)


class RunBar(callbacks.ProgressBar):
    """One bar from the start of a run to its end, with the time left of all of it."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: Progress | None = None
        self._task: Any = None
        self._pace: Pace | None = None
        self._is_enabled = True

    # --- what Lightning asks of a bar ---

    def disable(self) -> None:
        self._is_enabled = False

    def enable(self) -> None:
        self._is_enabled = True

    @property
    def is_enabled(self) -> bool:
        return self._is_enabled

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print a line that stays above the bar."""
        text = " ".join(map(str, args))
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    # --- when it is drawn ---

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._is_enabled:
            return
        self._bar = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(20),
            TaskProgressColumn("{task.percentage:>3.0f}%", table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True)),
            console=Console(),
            transient=True,
        )
        self._pace = Pace(trainer)
        self._task = self._bar.add_task("", total=self._pace.total, text="")
        self._bar.start()
        self._draw(trainer, "beginning")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batches_done(trainer) % BATCHES_BETWEEN_DRAWINGS == 0:
            self._draw(trainer)

    def _draw(self, trainer: Trainer, doing: str = "") -> None:
        if self._bar is None or self._pace is None:
            return
        texts = [doing] if doing else [f"loss {float(trainer.callback_metrics.get('train/loss', float('nan'))):.3f}"]
        left = self._pace.seconds_left()
        if left is not None and not doing:
            texts.append(f"{duration(left)} left")
        description = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        self._bar.update(self._task, completed=batches_done(trainer), description=description, text="  ".join(texts))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._draw(trainer, "validating")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def epoch_text(trainer: Trainer) -> str:
    """Return the epoch, counted from 1, of how many: `epoch 3/10`, or `epoch 2.5/10` in its middle."""
    of = "" if trainer.max_epochs in (None, -1) else f"/{trainer.max_epochs}"
    return f"epoch {round(progress_in_epochs(trainer), 2):g}{of}"


def duration(seconds: float) -> str:
    """Return a time to read: `45 s`, `7 min`, `2 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
