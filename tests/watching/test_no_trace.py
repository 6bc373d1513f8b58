"""A run with AttentionLogger is the run without it, to the bit, also where a forward or a mode does more than usual."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn

from attention_visualizer.support.errors import UserError
from attention_visualizer.watching.attention_logger import AttentionLogger
from tests.helpers.models import Merging
from tests.helpers.trainers import CLASSES, SIZE, Recorder, Steps, attention_warnings, fit, kept_in, vit

PROBES = torch.randn(3, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


class Whole(Steps):
    """With a forward of its own, so that it is run as a whole."""

    def __init__(self, model: nn.Module | None = None) -> None:
        torch.manual_seed(5)
        super().__init__(model or vit(num_layers=1))
        self.told: list[Any] = []

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


class Counts(Whole):
    calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(images) / (1 + 0.1 * self.calls)


class Measures(Whole):
    def __init__(self) -> None:
        super().__init__()
        self.sure = torchmetrics.MeanMetric()

    def forward(self, images: Tensor) -> Tensor:
        output = super().forward(images)
        self.sure.update(output.detach().softmax(dim=-1).amax(dim=-1))
        return output

    def on_train_epoch_end(self) -> None:
        self.told.append((float(self.sure.compute()), float(self.sure.weight)))


class Logs(Whole):
    def forward(self, images: Tensor) -> Tensor:
        output = super().forward(images)
        self.log("largest", output.detach().max())
        self.log_dict({"smallest": output.detach().min()})
        for logger in self.loggers:
            logger.log_metrics({"written": float(output.detach().max())}, step=self.global_step)
        return output


class Queue(Whole):
    """Of features of earlier batches, which the loss draws on; a buffer and a number tell where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.zeros(8, CLASSES))
        self.at = 0

    def forward(self, images: Tensor) -> Tensor:
        output = super().forward(images)
        places = torch.arange(self.at, self.at + len(output)) % len(self.queue)
        self.queue[places] = output.detach()[-len(places) :]
        self.at = (self.at + len(output)) % len(self.queue)
        return output + self.queue.mean(dim=0)


class Normalizes(Whole):
    """Its head's weights, in place, whenever it runs."""

    def forward(self, images: Tensor) -> Tensor:
        weight = self.model.head.weight
        weight.data = F.normalize(weight.data, dim=1)
        return super().forward(images)


class FollowsSlowly(Whole):
    """Has a second model whose weights follow the first one's with each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = nn.Linear(6, CLASSES).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            self.slow.weight.lerp_(self.model.head.weight, 0.1)
        return super().forward(images) + self.slow.weight.sum(dim=1)


class Merges(Whole):
    def __init__(self) -> None:
        super().__init__()
        self.model.head = Merging(6, CLASSES)


class Hooked(Whole):
    """With a hook that remembers, and one that is a part of the model."""

    def __init__(self) -> None:
        super().__init__()
        told = self.told
        self.model.head.register_forward_hook(lambda *given: told.append(len(given[-1])))
        self.model.head.register_forward_hook(lambda *given: given[-1] / (1 + 0.01 * len(told)))


def left_by(folder: Path, make: Callable[[], Whole], *callbacks: Any) -> list[Any]:
    """All that a training leaves: weights, buffers, logged values, what was written, what the module was told."""
    module, service = make(), Recorder()
    trainer = fit(folder, module, *callbacks, logger=service, max_epochs=1, limit_val_batches=2)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    written = [
        (step, values)
        for step, values in service.metrics
        if not any(name.startswith(("vit_", "watching")) for name in values)
    ]
    numbers = [module.told, getattr(module, "calls", 0), getattr(module, "at", 0), metrics, written]
    return [*module.state_dict().values(), torch.rand(2), *numbers]


@pytest.mark.parametrize("make", [Counts, Measures, Logs, Queue, Normalizes, FollowsSlowly, Merges, Hooked])
def test_nothing_is_changed(tmp_path: Path, make: Callable[[], Whole]) -> None:
    with attention_warnings() as lines:
        watched = left_by(tmp_path, make, AttentionLogger(probe_images=PROBES, head_grids=0))
    for one, other in zip(left_by(tmp_path, make), watched, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
    assert lines == [] and kept_in(tmp_path).column("frames", "step").tolist() == [0, 1, 2, 4, 5]


# --- a forward that asks for gradients -------------------------------------------------------------------------


class Asking(Whole):
    """Keeps what a backward pass says of an activation: fails where no gradients are recorded."""

    validation_step = None  # type: ignore[assignment]
    ask: Callable[[Tensor], Any] = Tensor.retain_grad

    def forward(self, images: Tensor) -> Tensor:
        self.output = super().forward(images)
        self.ask(self.output)
        return self.output


@pytest.mark.parametrize("ask", [Tensor.retain_grad, lambda output: output.register_hook(lambda gradient: None)])
def test_a_forward_that_asks_for_gradients_gets_them(tmp_path: Path, ask: Any) -> None:
    make = type("Module", (Asking,), {"ask": staticmethod(ask)})
    states = []
    for watching in ([], [AttentionLogger(probe_images=PROBES)]):
        module = make()
        fit(tmp_path, module, *watching, max_epochs=1)
        states.append(module.state_dict())
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    assert kept_in(tmp_path).column("frames", "step").tolist() == [0, 1, 2, 4]


def test_a_forward_that_fails_is_named_before_training(tmp_path: Path) -> None:
    class Failing(Whole):
        def forward(self, images: Tensor) -> Tensor:
            raise KeyError("mask")

    with pytest.raises(UserError, match="KeyError: 'mask'") as caught:
        fit(tmp_path, Failing(), AttentionLogger(probe_images=PROBES, model=""))
    assert "size" not in str(caught.value)
