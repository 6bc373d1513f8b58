"""How far training has come: the one count that order, augmentation, random state and charts go by."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning import Trainer


def batches_done(trainer: Trainer) -> int:
    """Return the number of training batches done, over all epochs and, where training was resumed, over all runs."""
    total: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return int(total.processed)


def total_batches(trainer: Trainer, batches_per_epoch: int) -> int | None:
    """Return the number of training batches from start to end; None where that is not set beforehand."""
    limits = []
    if trainer.max_epochs not in (None, -1):
        limits.append(trainer.max_epochs * batches_per_epoch)
    if trainer.max_steps != -1:
        limits.append(trainer.max_steps * trainer.accumulate_grad_batches)
    return min(limits, default=None)


def progress_in_epochs(trainer: Trainer) -> float:
    """Return how far training has come: 0.25 a quarter through the first epoch; whole if its length is unknown."""
    if math.isinf(trainer.num_training_batches):
        return float(trainer.current_epoch)
    return batches_done(trainer) / max(1, trainer.num_training_batches)
