"""The attention of a model, layer by layer, while its own forward runs, with proof that it is the real one.

    with capture(model) as attention:
        logits = model(images)
    attention["blocks.3"].weights  # [batch, head, query, key]

Fused attention hides its weights and bypasses hooks. A `TorchFunctionMode` sees the call itself: it lets the model
have its own output, takes or rebuilds the weights from the same arguments, and measures how far what they give is from
that output. Nothing in the model is touched, so nothing can be left behind.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.attention.layers import (
    AttentionLayer,
    CapturedAttention,
    CaptureError,
    Edit,
    InternalCaptureError,
)
from attention_visualizer.attention.policies import Capture, CaptureWithGradients, Intervention
from attention_visualizer.attention.recording import Recorder
from attention_visualizer.attention.torch_internals import may_compile

__all__ = [
    "AttentionLayer",
    "CaptureError",
    "CapturedAttention",
    "Edit",
    "InternalCaptureError",
    "capture",
    "force_eager",
    "intervene",
]


@contextmanager
def capture(
    model: nn.Module,
    consume: Callable[[AttentionLayer], None] | None = None,
    geometry: Geometry | None = None,
    gradients: bool = False,
) -> Iterator[CapturedAttention]:
    """Record every attention call that `model` makes inside the block.

    With `consume`, each layer is handed over as it is computed and none is kept, so memory is one layer's.
    `geometry` says where tokens lie, for models that do not declare it themselves.
    With `gradients`, the weights are part of the computation: `torch.autograd.grad(score, layer.weights)` works on
    them, also in a model whose parameters are frozen. The model's output is the same to the bit all the same.

    Raise CaptureError when weights do not reproduce the model's output, when a block that ended normally saw no
    attention at all, or when capturing itself fails, out of memory for instance; UserError when `geometry` fits no
    layer. What the model and `consume` raise passes through as it is.
    """
    attention = CapturedAttention()
    policy = (CaptureWithGradients if gradients else Capture)(consume or attention.layers.append)
    with _recording(Recorder(model, attention, policy, geometry)):
        yield attention


@contextmanager
def intervene(model: nn.Module, edit: Edit) -> Iterator[CapturedAttention]:
    """Let `model` go on with the weights that `edit(layer, weights)` returns, inside the block: what it then computes
    is what it would have computed with them.

    `weights` and what is returned: [batch, head, query, key], before dropout; returning `weights` as they came changes
    nothing. Ready-made edits are in `attention_visualizer.interventions`. A capture or another intervention
    inside the block gets the edited weights; a capture around it gets those that the model had computed.
    Raise CaptureError as `capture` does. What the model and `edit` raise passes through as it is.
    """
    attention = CapturedAttention()
    with _recording(Recorder(model, attention, Intervention(edit))):
        yield attention


@contextmanager
def _recording(recorder: Recorder) -> Iterator[None]:
    with force_eager(), recorder:
        yield
    recorder.finish()


class _ForceEager:
    """Let compiled modules run their original code inside: what torch.compile has fused cannot be captured.

    The setting belongs to the whole process, so the first of several blocks makes it, and the last one ends it.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.blocks = 0
        self.setting = ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if not may_compile():
            yield
            return
        with self.lock:
            if self.blocks == 0:
                self.setting.enter_context(torch.compiler.set_stance("force_eager"))
            self.blocks += 1
        try:
            yield
        finally:
            with self.lock:
                self.blocks -= 1
                if self.blocks == 0:
                    self.setting.close()


force_eager = _ForceEager()
