"""Compute a training batch on the CPU in two halves, each on its own thread with half of the cores.

The operations of a small model are too short to be spread over cores, which would synchronise after each of them;
halves synchronise once a step. The gradients are the same sums, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from attention_visualizer.models.vision_transformer import random_numbers_from

Loss = Callable[[Tensor, Tensor], Tensor]  # of logits and labels: their mean


class Halves:
    """The two threads, started by the first batch; each gets half of the cores that PyTorch uses at that time."""

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None

    def __reduce__(self) -> Any:
        """Copy without the threads, which cannot be copied: the copy starts its own."""
        return Halves, ()

    def applies_to(self, model: nn.Module, images: Tensor) -> bool:
        """Whether there are at least two cores, and dropout per thread is reproducible with this model."""
        ready = getattr(model, "draws_by_thread", False)
        return ready and images.device.type == "cpu" and len(images) > 1 and torch.get_num_threads() > 1

    def loss(self, model: nn.Module, loss: Loss, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss, with gradients for the model's parameters, and the logits [image, class], without."""
        if self._threads is None:
            cores = torch.get_num_threads() // 2
            self._threads = ThreadPoolExecutor(2, "half of a batch", torch.set_num_threads, (cores,))
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        outputs: tuple[Tensor, Tensor] = _MeanLoss.apply(self._threads, model, loss, images, labels, *parameters)
        return outputs


class _MeanLoss(torch.autograd.Function):
    """Forward and backward pass in one, so that the halves need not wait for each other in between."""

    @staticmethod
    def forward(
        context: Any,
        threads: ThreadPoolExecutor,
        model: nn.Module,
        loss: Loss,
        images: Tensor,
        labels: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        # Threads know nothing of the caller's mixed precision.
        mixed, precision = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

        def run(images: Tensor, labels_of_half: Tensor, seed: int) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
            with random_numbers_from(seed):
                with torch.autocast("cpu", precision, enabled=mixed, cache_enabled=False):
                    logits = model(images)
                    share = loss(logits, labels_of_half) * (len(labels_of_half) / len(labels))
                gradients = torch.autograd.grad(share, parameters, allow_unused=True)
            return share.detach(), logits.detach(), gradients

        seeds = torch.randint(2**63 - 1, (2,)).tolist()
        halves = threads.map(run, images.chunk(2), labels.chunk(2), seeds)
        shares, logits, gradients = zip(*halves, strict=True)
        context.gradients = [
            first if first is None or second is None else first + second  # not in place: gradients may share memory
            for first, second in zip(*gradients, strict=True)
        ]
        all_logits = torch.cat(logits)
        context.mark_non_differentiable(all_logits)
        return shares[0] + shares[1], all_logits

    @staticmethod
    def backward(context: Any, scale: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients, context.gradients = context.gradients, None
        if scale != 1:
            gradients = [gradient if gradient is None else gradient * scale for gradient in gradients]
        return (*[None] * 5, *gradients)
