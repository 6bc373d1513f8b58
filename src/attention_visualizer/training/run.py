"""One training run: fit, keep the manifest true whatever happens, test once, say where things are."""

from __future__ import annotations

import csv
import io
import os
import shlex
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attention_visualizer.data.datamodule import ImageDataModule
from attention_visualizer.data.images import DatasetDescription
from attention_visualizer.figures import charts
from attention_visualizer.files import atomic
from attention_visualizer.models.vit_config import ViTConfig
from attention_visualizer.runs.checkpoint import LoadedCheckpoint
from attention_visualizer.runs.folders import RunFolder
from attention_visualizer.support.errors import UserError
from attention_visualizer.support.invocation import invocation
from attention_visualizer.support.text import printable
from attention_visualizer.training import resuming, slurm
from attention_visualizer.training.classifier import Classifier
from attention_visualizer.training.components import Components
from attention_visualizer.training.overrides import override
from attention_visualizer.training.progress import RunLog
from attention_visualizer.training.saving import BestCheckpoint
from attention_visualizer.training.stopping import signal_of
from attention_visualizer.training.tensorboard import (
    TensorBoardLogger,
    shown_parameters,
    wait_for_a_later_second,
)
from attention_visualizer.training.training_state import check_training_state
from attention_visualizer.watching.attention_logger import AttentionLogger
from attention_visualizer.watching.lightning_internals import is_tensorboard
from attention_visualizer.watching.log_guard import LogGuard
from attention_visualizer.watching.probes import first_of_each_class
from attention_visualizer.watching.tags import tensorboard_command


def check_resumable(loaded: LoadedCheckpoint, classifier: Classifier, trainer: Trainer) -> None:
    """Raise UserError where training cannot go on from what the checkpoint, read with its content, holds."""
    assert loaded.content is not None
    try:
        check_training_state(loaded.content, classifier, classifier.build_optimizer(), trainer)
    except UserError as error:
        raise UserError(f"{loaded.path}: {error}") from error
    epochs = loaded.content["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    for unit, done, limit in (("epochs", epochs, trainer.max_epochs), ("steps", loaded.step, trainer.max_steps)):
        if limit is not None and limit != -1 and done is not None and done > limit:
            raise UserError(f"trainer.max_{unit}={limit}: {loaded.path} has trained {done} {unit}: give at least that")


@contextmanager
def open_logs(trainer: Trainer, resumed_step: int | None) -> Iterator[LogGuard]:
    """Open all logs, so that what cannot be written shows before any work, and from where the checkpoint was saved;
    guard them inside. Raise UserError where one cannot be opened."""
    with LogGuard(trainer.loggers) as guard:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, AttentionLogger):
                callback.log_guard, callback.owns_folder = guard, True
        for log in trainer.loggers:
            try:
                if resumed_step is not None and isinstance(log, CSVLogger):
                    keep_csv_rows(log, resumed_step)
                if resumed_step is not None and isinstance(log, TensorBoardLogger):
                    wait_for_a_later_second(Path(log.log_dir))
                log.experiment  # type: ignore[attr-defined]  # noqa: B018
            except UserError:
                raise
            except Exception as error:  # of many kinds
                raise UserError(f"{type(log).__name__}: {error}") from error
        yield guard


def keep_csv_rows(logger: CSVLogger, step: int) -> None:
    """Lightning's CSVLogger deletes the file it finds; a resumed run goes on with the rows up to `step`."""
    path = Path(logger.log_dir) / "metrics.csv"
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no file that can be written: delete it")
    kept = path.with_name(".metrics.kept.csv")  # what a kill on the way cannot take
    source = path if path.is_file() or not kept.is_file() else kept
    rows, names = [], []
    if source.is_file():
        with source.open(newline="") as file:
            reader = csv.DictReader(file)
            # The last row may have been cut off by a kill.
            rows = [row for row in reader if None not in row.values() and is_before(row.get("step"), step)]
            names = list(reader.fieldnames or [])
    text = io.StringIO()
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(rows)
    atomic.write_text(kept, text.getvalue())
    with warnings.catch_warnings(action="ignore"):
        experiment = logger.experiment
    if rows:
        experiment.metrics_keys = names
        os.replace(kept, path)
    kept.unlink(missing_ok=True)


def is_before(text: str | None, step: int) -> bool:
    return text is not None and text.isdecimal() and int(text) <= step


@contextmanager
def recorded(folder: RunFolder) -> Iterator[None]:
    """Record in the manifest what ends a run early, and tell the user how to go on."""
    identity = folder.identity
    try:
        yield
    except BaseException as error:
        if folder.identity != identity:  # moved or deleted: there may be another one at its path
            raise
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
        reason = signal_of(error.code) if isinstance(error, SystemExit) else None
        with suppress(UserError):  # on a full disk; what ended the run is what is to be reported
            folder.update_manifest(
                status="interrupted" if interrupted else "failed",
                error=reason or f"{type(error).__name__}: {error}".rstrip(": "),
            )
        log = RunLog(folder)
        log.write(f"stopped early: {reason or printable(f'{type(error).__name__}: {error}').rstrip(': ')}")
        if folder.last.exists():
            print()
            log.say(f"Stopped early. Resume:  {resuming.resume_command(folder)}")
        elif interrupted:
            log.say("Stopped before the first checkpoint: there is nothing to resume")
        if isinstance(error, SystemExit):
            slurm.requeue_after(error.code)
        raise


def fit(trainer: Trainer, classifier: Classifier, data: ImageDataModule, ckpt_path: str | None) -> dict[str, Any]:
    """Train and return the metrics. Raise UserError where nothing was validated."""
    began = time.perf_counter()
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, AttentionLogger) and callback.probe_images is None:
            first_batch = next(data.evaluation_batches("validation"))
            callback.probe_images, callback.probe_labels = first_of_each_class([first_batch])
    trainer.fit(classifier, data, ckpt_path=ckpt_path, weights_only=True)
    saver = trainer.checkpoint_callback
    assert isinstance(saver, BestCheckpoint)
    if saver.best_model_score is None:
        raise UserError("training ended before its first validation: nothing was saved; give it more steps or time")
    saver.replace_missing()
    return {
        "validation_accuracy": float(saver.best_model_score),
        "epochs": trainer.current_epoch,
        "seconds": time.perf_counter() - began,
    }


def test_best(
    trainer: Trainer, classifier: Classifier, data: ImageDataModule, folder: RunFolder, log_guard: LogGuard
) -> dict[str, Any]:
    """Test best.ckpt, once: accuracy over all images and by class, and the confusion matrix [true][predicted]."""
    logs, trainer.loggers = trainer.loggers, []  # Lightning would log it at the last step of training
    scores = trainer.test(classifier, data, ckpt_path=folder.best, weights_only=True, verbose=False)[0]
    trainer.loggers = logs
    confusion = classifier.test_confusion.compute().cpu()
    by_class = confusion.diag() / confusion.sum(dim=1).clamp_min(1)
    figure = Figure(figsize=(7.5, 6.5), layout="constrained")
    charts.confusion_matrix(confusion.numpy(), list(data.description.class_names), figure.subplots())
    charts.with_watermark(charts.with_headline(figure, "Test set"), data.description.watermark)
    with atomic.atomic_path(folder.path / "test_confusion.png") as temporary:
        figure.savefig(temporary, dpi=120)
    step = step_behind(trainer)
    for logger in trainer.loggers:
        logger.log_metrics(dict(scores), step=step)
        if is_tensorboard(logger):
            log_guard.attempt(logger, None, partial(logger.experiment.add_figure, "test/confusion", figure, step))
    return {
        "test_accuracy": scores["test/accuracy"],
        "test_loss": scores["test/loss"],
        "test_accuracy_by_class": [round(float(share), 4) for share in by_class],
        "test_confusion": confusion.tolist(),
    }


def step_behind(trainer: Trainer) -> int:
    """Return the step at which a run's end is logged: after all checkpoints, so that a resumed run's charts begin
    before it."""
    return trainer.global_step + 1


def log_hyperparameters(trainer: Trainer, config: DictConfig, num_parameters: int, metrics: dict[str, Any]) -> None:
    """Write the run's settings to every logger, for TensorBoard together with how well they did."""
    settings: Any = OmegaConf.to_container(config, resolve=True)
    recorded = {part: settings[part] for part in ("model", "data", "optimizer", "trainer", "seed")}
    names = {"test_accuracy": "test/accuracy", "validation_accuracy": "validation/best_accuracy"}
    scores = {tag: metrics[name] for name, tag in names.items() if name in metrics}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            shown = shown_parameters(config) | {"parameters": num_parameters}
            logger.log_hyperparams(shown, scores, step=step_behind(trainer))
        else:
            logger.log_hyperparams(recorded | {"parameters": num_parameters})
        logger.save()
        logger.finalize("success")


def describe(components: Components) -> list[str]:
    """Return the model, the data and the length of the training, a line each."""
    model, data, config = ViTConfig(**components.model.config), components.data, components.config
    sizes = data.description.sizes
    shape = f"{model.num_layers} layers x {model.num_heads} heads, {model.num_tokens} tokens"
    splits = ", ".join(f"{sizes[split]:,} {split}" for split in ("train", "validation", "test"))
    epochs, batches = config.trainer.max_epochs, data.batches_in(config.trainer.limit_train_batches)
    return [
        f"Model:      Vision Transformer, {components.num_parameters:,} parameters, {shape}",
        f"Data:       {data.description.title}: {splits} images",
        f"Training:   {epochs} epochs of {batches:,} batches of {data.batch_size} images",
    ]


def print_report(folder: RunFolder, description: DatasetDescription, metrics: dict[str, Any]) -> None:
    """Print the end of a run: how good, where, and what to do next, each command ready to paste."""
    log = RunLog(folder)
    rows = [("validation (best epoch)", metrics["validation_accuracy"], description.sizes["validation"])]
    if "test_accuracy" in metrics:
        by_class = zip(
            description.class_names, metrics["test_accuracy_by_class"], metrics["test_confusion"], strict=True
        )
        rows.append(("test (best.ckpt, once)", metrics["test_accuracy"], sum(map(sum, metrics["test_confusion"]))))
        rows += [(f"  class {name}", share, sum(row)) for name, share, row in by_class]
    table = Table(box=None)
    table.add_column(Text(printable(description.title)))
    table.add_column("accuracy", justify="right")
    table.add_column("images", justify="right")
    for name, accuracy, images in rows:
        table.add_row(Text(printable(name)), f"{accuracy:.2%}", f"{images:,}")
        log.write(f"{name.strip()}: {accuracy:.2%} of {images:,} images")
    Console().print(table)
    path = atomic.short_path(folder.path)
    # Plain lines, never wrapped, so that they can be pasted.
    log.say(f"Run folder:   {shlex.quote(str(path))}")
    log.say(f"TensorBoard:  {tensorboard_command(str(path))}")
    log.say(f"Analyse:      {shlex.join([*invocation('analyze'), override('run', path), 'ckpt=best'])}")
