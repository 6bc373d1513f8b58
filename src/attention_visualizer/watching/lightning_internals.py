"""The private parts of Lightning and TensorBoard that this package uses: each once, with what it is used for.

Without a part for saving, `require_saving` ends a run before it trains. Without one for watching, a function here
raises AttributeError, which `LogGuard` turns into a warning.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, TypeGuard

from attention_visualizer.support.errors import UserError
from attention_visualizer.watching.lightning_package import Logger, ModelCheckpoint, TensorBoardLogger, Trainer

# --- saving: Lightning has no public way to save between two batches under a callback's own name -------------------

SAVER_PARTS = (
    "_should_skip_saving_checkpoint",
    "_should_save_on_train_epoch_end",
    "_save_checkpoint",
    "_last_global_step_saved",
)
BATCH_PROGRESS = "epoch_loop.batch_progress"  # in the state of the fit loop


def should_skip_saving(saver: ModelCheckpoint, trainer: Trainer) -> bool:
    """Return whether nothing is to be saved now: no training, a sanity check, or this step is saved already."""
    return saver._should_skip_saving_checkpoint(trainer)


def saves_after_training_epoch(saver: ModelCheckpoint, trainer: Trainer) -> bool:
    """Return whether `saver` saves when an epoch's training ends rather than when its validation ends."""
    return saver._should_save_on_train_epoch_end(trainer)


def save_checkpoint(saver: ModelCheckpoint, trainer: Trainer, path: str) -> None:
    """Save to `path` and remember the step as saved."""
    saver._save_checkpoint(trainer, path)


def last_saved_step(saver: ModelCheckpoint) -> int:
    return saver._last_global_step_saved


def forget_fetched_batch(checkpoint: dict[str, Any]) -> None:
    """Count a batch that was fetched and has not begun as not fetched: a run that goes on fetches it again."""
    for count in checkpoint["loops"]["fit_loop"][BATCH_PROGRESS].values():
        if isinstance(count, dict) and count["started"] == count["completed"]:
            count["ready"] = count["completed"]


def missing_for_saving(trainer: Trainer) -> list[str]:
    """Name the parts above that the installed Lightning does not have."""
    savers = [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
    missing = [f"ModelCheckpoint.{name}" for name in SAVER_PARTS if not all(hasattr(saver, name) for saver in savers)]
    progress = trainer.fit_loop.state_dict().get(BATCH_PROGRESS, {})
    counts = [count for count in progress.values() if isinstance(count, dict)]
    if not counts or not all({"ready", "started", "completed"} <= count.keys() for count in counts):
        missing.append(f"{BATCH_PROGRESS} in the fit loop's state")
    return missing


def require_saving(trainer: Trainer) -> None:
    """Raise UserError where checkpoints could not be saved exactly with the installed Lightning."""
    if missing := missing_for_saving(trainer):
        raise UserError(f"lightning {version('lightning')} has no {', '.join(missing)}: install lightning>=2.6.6,<2.7")


# --- watching: the validation loaders, which Lightning sets up only for the first validation ----------------------


def validation_loaders(trainer: Trainer) -> Any:
    """Return the validation loaders, from where Lightning will take them if it did not yet; None if there are none."""
    if trainer.val_dataloaders is not None:
        return trainer.val_dataloaders
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    return source.dataloader() if source.instance is not None and source.is_defined() else None


# --- watching: the same classes in two packages -----------------------------------------------------------------

PACKAGES = ("lightning", "pytorch_lightning")  # the same code under two names, which knows nothing of each other


def is_kind(logger: Logger, name: str) -> bool:
    """Whether a logger is of the class of that name, in either package."""
    kinds = type(logger).__mro__
    return any(kind.__name__ == name and kind.__module__.partition(".")[0] in PACKAGES for kind in kinds)


def is_tensorboard(logger: Logger) -> TypeGuard[TensorBoardLogger]:
    return is_kind(logger, "TensorBoardLogger")


# --- watching: what TensorBoard's public calls do at several times the cost, or not at all ------------------------


def add_summary(logger: TensorBoardLogger, summary: Any, step: int) -> None:
    """Write a finished protocol buffer: SummaryWriter.add_image encodes images itself, three times as slowly."""
    logger.experiment._get_file_writer().add_summary(summary, step)


def is_event_writer(thread: threading.Thread | None) -> bool:
    """Return whether TensorBoard writes its event files in this thread (its class is private)."""
    return "Writer" in type(thread).__name__


def replace_checksums(checksum: Callable[[bytes], int]) -> Callable[[bytes], int]:
    """Let `checksum` compute the checksums of event files from now on; return what computed them until now.

    Raise ImportError or AttributeError where TensorBoard does not compute them in Python there.
    """
    from tensorboard.summary.writer import record_writer  # type: ignore[import-untyped]

    earlier = record_writer.masked_crc32c
    record_writer.masked_crc32c = checksum
    return earlier
