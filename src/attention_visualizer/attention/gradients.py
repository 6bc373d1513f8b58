"""Forward passes for our own purposes: without gradients, and with them for models whose forward asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def gradients_only(if_needed: bool) -> Iterator[None]:
    """Record gradients inside if they are needed, also within `torch.inference_mode`; else record none."""
    if not if_needed:
        with torch.no_grad():
            yield
        return
    with torch.inference_mode(False), torch.enable_grad():
        yield


def asks_for_gradients(error: Exception) -> bool:
    """Return whether PyTorch raised this where gradients are not recorded: a hook on an activation, for instance."""
    return isinstance(error, RuntimeError) and "grad" in str(error)
