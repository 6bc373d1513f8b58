"""Attention statistics of a model over the user's validation pass, measured in its forward passes."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from attention_visualizer.attention.capture import (
    AttentionLayer,
    CapturedAttention,
    CaptureError,
    InternalCaptureError,
    capture,
)
from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.attention.model_search import FoundModel
from attention_visualizer.measures.streaming import AttentionStatistics
from attention_visualizer.support.errors import UserError, ran_out_of_memory, summary
from attention_visualizer.watching.padding import BatchShare


class ValidationWatch:
    """One validation pass: `with watch.batch():` around each of its steps. Whatever goes wrong in watching, the step
    gets what it would have got without.

    A step may run the model once, several times (all runs count), on images of another size, or not at all; `remarks`
    tells which, by kind.
    """

    def __init__(self, found: FoundModel, geometry: Geometry | None = None) -> None:
        self.found = found
        self.geometry = geometry
        self.statistics = AttentionStatistics()  # of the layers that `found` names
        self.seconds = 0.0  # that watching took
        self.failure: str | None = None  # why the rest of the pass is not watched
        self.out_of_memory = False  # whether that was the reason
        self.num_batches = 0
        self.idle_batches = 0  # in which the model did not run
        self.most_runs = 0  # of one layer in one batch
        self._runs: Counter[str] = Counter()  # of each layer, in this batch
        self._share: BatchShare | None = None
        self._capture = ExitStack()

    @contextmanager
    def batch(self, share: BatchShare | None = None) -> Iterator[None]:
        """Watch a step. `share` says which images of its batch are not to be counted."""
        self._share = share
        if self.failure is not None:
            yield
            return
        began = time.perf_counter()
        self.num_batches += 1
        self._runs.clear()
        with _ModelCalls() as calls:
            attention = self._begin_capture()
            try:
                with _Failsafe(self, calls):
                    self.seconds += time.perf_counter() - began
                    yield
            finally:
                began = time.perf_counter()
                self.end_capture()
        self.idle_batches += not self._runs
        self.most_runs = max(self.most_runs, *self._runs.values(), 0)
        self.seconds += attention.seconds + time.perf_counter() - began

    def give_up(self, error: Exception) -> None:
        self.failure = self.failure or summary(error)
        self.out_of_memory = self.out_of_memory or ran_out_of_memory(error)

    def end_capture(self) -> None:
        """Stop watching the present step, if it is being watched."""
        try:
            self._capture.close()
        except Exception as error:
            not_capturable = isinstance(error, CaptureError | UserError) and not isinstance(error, InternalCaptureError)
            if self._runs or not not_capturable:  # else `remarks` says why
                self.give_up(error)

    def remarks(self) -> dict[str, str]:
        """Return what was unusual: kind -> one line."""
        name = self.found.name or type(self.found.model).__name__
        if self.failure is not None:
            which = "any more" if self.out_of_memory else "of this validation"
            return {"failure": f"no statistics {which}: {self.failure}"}
        if not self.num_batches:
            return {}
        if self.idle_batches == self.num_batches:
            return {"idle": f'validation does not run {name}: no statistics of it (model="..." names another)'}
        lines = {}
        if self.idle_batches:
            ran = self.num_batches - self.idle_batches
            lines["idle"] = f"validation runs {name} in {ran} of {self.num_batches} batches: statistics are of those"
        if self.most_runs > 1:
            lines["runs"] = f"validation runs {name} up to {self.most_runs} times a batch: statistics are of all runs"
        left_out = [layer for layer in self.statistics.left_out if layer not in self.found.unplaced]
        if left_out:
            lines["sizes"] = (
                f"validation runs {name} on images of different sizes: statistics are of the first size "
                f"(in {', '.join(left_out[:3])}{' ...' if len(left_out) > 3 else ''})"
            )
        return lines

    def _begin_capture(self) -> CapturedAttention:
        try:
            return self._capture.enter_context(capture(self.found.model, consume=self._measure, geometry=self.geometry))
        except Exception as error:
            self.give_up(error)
            return CapturedAttention()

    def _measure(self, layer: AttentionLayer) -> None:
        name = name_in_pass(layer.name, self.found.layers)
        if name is None:
            return  # another part of the same module
        self._runs[name] += 1
        try:
            self.statistics.update(counted(replace(layer, name=name), self._share))
        except Exception as error:
            self.give_up(error)


def counted(layer: AttentionLayer, share: BatchShare | None) -> AttentionLayer:
    """Return the layer without the images at the end of its batch that another process counts."""
    if share is None or layer.geometry is None:
        return layer
    rows = len(layer.weights) // share.images  # windows of an image
    if rows * share.images != len(layer.weights) or rows != math.prod(layer.geometry.windows):
        return layer  # of other images than the batch has
    kept = (share.images - share.repeated) * rows
    return replace(layer, weights=layer.weights[:kept], values=layer.values[:kept])


def name_in_pass(name: str, layers: tuple[str, ...]) -> str | None:
    """Return which of the `layers` of one pass `name` is where several passes look like one: "attn#3" is the third
    "attn". None if it is none of them.
    """
    base, _, number = name.partition("#")
    repeats = sum(layer.partition("#")[0] == base for layer in layers)
    if repeats == 0:
        return None
    repeat = (int(number or 1) - 1) % repeats + 1
    return base if repeat == 1 else f"{base}#{repeat}"


RNGState = tuple[Tensor, list[Tensor]]  # of the CPU, and of each GPU that is in use


def rng_state() -> RNGState:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def set_rng_state(state: RNGState) -> None:
    torch.set_rng_state(state[0])
    torch.cuda.set_rng_state_all(state[1])


class _ModelCalls(TorchFunctionMode):
    """Below a capture: what the model's own call returned or raised, whatever became of watching it."""

    def __init__(self) -> None:
        super().__init__()
        self.expect(None)

    def expect(self, function: Callable[..., Any] | None) -> None:
        self.function = function
        self.returned: tuple[Any, ...] = ()  # (result,) once there is one
        self.raised: Exception | None = None

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            result = function(*args, **(kwargs or {}))
        except Exception as error:
            self.raised = error
            raise
        if function is self.function and not self.returned:
            self.returned = (result,)
        return result


class _Failsafe(TorchFunctionMode):
    """Above a capture: where watching a call fails, the model gets its own result, and the step is watched no more.

    An error of the model's own passes as it is. Where memory ends in a call of the model, what watching held may have
    been what was missing: the call is made again without.
    """

    def __init__(self, watch: ValidationWatch, calls: _ModelCalls) -> None:
        super().__init__()
        self.watch = watch
        self.calls = calls

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.watch.failure is not None:
            self.watch.end_capture()  # PyTorch has set this mode aside, so that the capture's is the last one
            return function(*args, **kwargs)
        self.calls.expect(function)
        # A capture runs its body in parts, none of which is the model's own call: that is made anew, with its dropout.
        before = rng_state() if function is F.multi_head_attention_forward else None
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if error is self.calls.raised and not ran_out_of_memory(error):
                raise
            self.watch.give_up(error)
            returned = self.calls.returned
        finally:
            self.calls.expect(None)
        self.watch.end_capture()
        if returned:
            return returned[0]
        if before is not None:
            set_rng_state(before)
        return function(*args, **kwargs)
