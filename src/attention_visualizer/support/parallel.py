"""Independent passes of a model on the CPU, each on one core rather than one after the other on all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def on_all_cores(function: Callable[[Item], Result], items: Iterable[Item], device: torch.device) -> list[Result]:
    """Return `function` of each item, in order.

    Cores that share every operation wait for each other after each of them, and on a busy machine for as long as the
    slowest is kept waiting; on a GPU there is nothing to share.
    """
    cores = torch.get_num_threads()
    if device.type != "cpu" or cores == 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(cores, "pass", torch.set_num_threads, (1,)) as threads:
        return list(threads.map(function, items))
