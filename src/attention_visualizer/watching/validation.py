"""Attention statistics of a model over somebody's validation pass, taken in its own forward, whatever it does."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from attention_visualizer.attention.capture import AttentionLayer, CaptureError, capture
from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.attention.model_search import FoundModel
from attention_visualizer.measures.streaming import AttentionStatistics
from attention_visualizer.support.errors import UserError, summary


class ValidationWatch:
    """One pass: `with watch.batch():` around each of its steps. It never raises because of watching.

    A step may run the model once, several times (all runs count), on images of another size, or not at all; `remarks`
    says so, by kind. statistics: of the layers that `found` names; seconds: that watching took.
    """

    def __init__(self, found: FoundModel, geometry: Geometry | None = None) -> None:
        self.found = found
        self.geometry = geometry
        self.statistics = AttentionStatistics()
        self.seconds = 0.0
        self.failure: str | None = None
        self.num_batches = 0
        self.idle_batches = 0
        self.most_runs = 0
        self._runs: Counter[str] = Counter()  # of each layer, in this batch

    @contextmanager
    def batch(self) -> Iterator[None]:
        if self.failure is not None:
            yield
            return
        self.num_batches += 1
        self._runs.clear()
        completed = False
        began = time.perf_counter()
        try:
            with (
                capture(self.found.model, consume=self._take, geometry=self.geometry) as attention,
                _Unwatched(self._fail),
            ):
                self.seconds += time.perf_counter() - began
                yield
                completed = True
                began = time.perf_counter()
        except (CaptureError, UserError) as error:  # on leaving: nothing was seen, or a geometry did not fit
            if not completed:
                raise
            if self._runs:
                self._fail(error)
        self.seconds += attention.seconds + time.perf_counter() - began
        self.idle_batches += not self._runs
        self.most_runs = max(self.most_runs, *self._runs.values(), 0)

    def remarks(self) -> dict[str, str]:
        """What was odd: kind -> one line."""
        name = self.found.name or type(self.found.model).__name__
        if self.failure is not None:
            return {"failure": f"no statistics of this validation: {self.failure}"}
        if not self.num_batches:
            return {}
        if self.idle_batches == self.num_batches:
            return {"idle": f'validation does not run {name}: no statistics of it (model="..." names another)'}
        said = {}
        if self.idle_batches:
            ran = self.num_batches - self.idle_batches
            said["idle"] = f"validation runs {name} in {ran} of {self.num_batches} batches: statistics are of those"
        if self.most_runs > 1:
            said["runs"] = f"validation runs {name} up to {self.most_runs} times a batch: statistics are of all runs"
        left_out = [layer for layer in self.statistics.left_out if layer not in self.found.unplaced]
        if left_out:
            said["sizes"] = (
                f"validation runs {name} on images of different sizes: statistics are of the first size "
                f"(in {', '.join(left_out[:3])}{' ...' if len(left_out) > 3 else ''})"
            )
        return said

    def _take(self, layer: AttentionLayer) -> None:
        name = name_in_pass(layer.name, self.found.layers)
        if name is None:
            return  # another part of the same module
        self._runs[name] += 1
        try:
            self.statistics.update(replace(layer, name=name))
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.failure = self.failure or summary(error)


def name_in_pass(name: str, layers: tuple[str, ...]) -> str | None:
    """Which of the `layers` of one pass `name` is where several passes look like one: "attn#3" is the third "attn".

    None if it is none of them.
    """
    base, _, number = name.partition("#")
    repeats = sum(layer.partition("#")[0] == base for layer in layers)
    if repeats == 0:
        return None
    repeat = (int(number or 1) - 1) % repeats + 1
    return base if repeat == 1 else f"{base}#{repeat}"


class _Unwatched(TorchFunctionMode):
    """Inside a capture: where it cannot see an attention call, the model gets its own result all the same."""

    def __init__(self, tell: Callable[[Exception], None]) -> None:
        super().__init__()
        self.tell = tell

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            return function(*args, **(kwargs or {}))
        except (CaptureError, UserError) as error:
            self.tell(error)
        with torch._C.DisableTorchFunction():
            return function(*args, **(kwargs or {}))
