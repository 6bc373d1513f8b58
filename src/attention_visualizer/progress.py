"""How far training has come: the one count that order, augmentation, random state and charts go by."""

from typing import Any

from lightning import Trainer


def batches_done(trainer: Trainer) -> int:
    """Training batches behind `trainer`, over all epochs and, where it resumed, over all its runs."""
    total: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return int(total.processed)
