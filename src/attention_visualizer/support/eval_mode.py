"""Run a model that is being trained without leaving a trace in its training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Temporarily switch to eval mode; restore each part's training flag and all RNG states on exit."""
    training = [part for part in module.modules() if part.training]
    rng = isolate_rng()
    rng.__enter__()
    try:
        module.eval()
        yield
    finally:
        rng.__exit__(None, None, None)  # given an exception, Lightning's would not restore them
        for part in training:
            part.training = True
