"""What modules give before the first edited layer, taken from a pass without edits instead of being computed again.

Of a model of L layers in sequence, with each edited in turn, that leaves out nearly half of the work.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from attention_visualizer.attention.capture import AttentionLayer, Edit, intervene
from attention_visualizer.attention.edits import named_layers
from attention_visualizer.attention.layers import is_named


class EarlierModules:
    """Which modules of a model have ended when one of its attention layers begins, seen in a pass over `images`."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.model = model
        self.clock = count()
        self.began: dict[str, int] = {}  # attention layer -> moment
        self.runs: dict[nn.Module, list[tuple[int, int]]] = {}  # module -> moments of its beginning and end
        started: dict[nn.Module, list[int]] = {}

        def starts(module: nn.Module, inputs: Any) -> None:
            started.setdefault(module, []).append(next(self.clock))

        def ends(module: nn.Module, inputs: Any, output: Any) -> None:
            # Only what is given as one tensor can be given again.
            end = next(self.clock) if isinstance(output, Tensor) else -1
            self.runs.setdefault(module, []).append((started[module].pop(), end))

        def note(layer: AttentionLayer, weights: Tensor) -> Tensor:
            self.began[layer.name] = next(self.clock)
            return weights

        handles = [module.register_forward_pre_hook(starts) for module in model.modules()]
        handles += [module.register_forward_hook(ends) for module in model.modules()]
        try:
            with torch.no_grad(), intervene(model, note):
                model(images)
        finally:
            for handle in handles:
                handle.remove()

    def of(self, edit: Edit) -> list[nn.Module]:
        """Return the modules that need not run again under an edit: the outermost of those that end before its first
        layer begins. None where the edit names no layers."""
        names = named_layers(edit) or ()
        moments = [moment for layer, moment in self.began.items() if any(is_named(layer, name) for name in names)]
        return list(self._outermost(self.model, min(moments))) if moments else []

    def _outermost(self, module: nn.Module, moment: int) -> Iterator[nn.Module]:
        for child in module.children():
            if self._is_worth_it(child) and self.runs[child][0][1] < moment:
                yield child
            else:
                yield from self._outermost(child, moment)

    def _is_worth_it(self, module: nn.Module) -> bool:
        """Whether a module runs once, with attention inside or before all attention; what lies between takes memory
        and little time."""
        if len(runs := self.runs.get(module, [])) != 1 or (end := runs[0][1]) < 0:
            return False
        return end < min(self.began.values()) or any(runs[0][0] < moment < end for moment in self.began.values())


class KeptOutputs:
    """What some modules of a model gave in one pass over a batch, to be given again in others."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = set(modules)
        self.outputs: dict[nn.Module, Tensor] = {}
        self.keeps = False
        self.thread = threading.local()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let `kept` and `given` work inside, which run modules by another forward."""
        own = {module: vars(module).get("forward") for module in self.modules}
        for module in self.modules:
            module.forward = self._forward(module, module.forward)
        try:
            yield
        finally:
            for module, forward in own.items():
                del module.forward
                if forward is not None:
                    module.forward = forward

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep what modules give inside."""
        self.keeps = True
        try:
            yield
        finally:
            self.keeps = False

    @contextmanager
    def given(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Let these modules give again what they gave, inside and in this thread."""
        self.thread.modules = set(modules)
        try:
            yield
        finally:
            self.thread.modules = set()

    def _forward(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if module in getattr(self.thread, "modules", ()):
                return self.outputs[module].clone()  # a model may go on with it in place
            output = forward(*args, **kwargs)
            if self.keeps:
                self.outputs[module] = output.clone()
            return output

        return run
