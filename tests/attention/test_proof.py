"""The proof where products have a reduced precision: sound models are seen, and one wrong head is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from attention_visualizer.attention import calls
from attention_visualizer.attention.capture import CapturedAttention, CaptureError, capture
from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.attention.proof import product_type
from tests.helpers.models import HAND_WRITTEN_GEOMETRY, HandWritten, random_vit

TF32, BFLOAT16 = 10, 7  # bits behind the point


class ReducedProducts(TorchDispatchMode):
    """What torch.set_float32_matmul_precision asks of tensor cores: operands of products rounded to so many bits."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.dropped = 23 - bits

    def rounded(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.ndim < 2:
            return value
        bits = value.contiguous().view(torch.int32)
        to_even = (1 << (self.dropped - 1)) - 1 + ((bits >> self.dropped) & 1)
        return ((bits + to_even) & ~((1 << self.dropped) - 1)).view(torch.float32)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm"):
            args = tuple(map(self.rounded, args))
        return function(*args, **(kwargs or {}))


class MultiHead(nn.Module):
    """nn.MultiheadAttention, with the weights that it can return and without, and on its fast path."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (nn.MultiheadAttention(21, 3, batch_first=True) for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        tokens = images[:, 0].flatten(1).unflatten(1, (-1, 21)) * 4
        tokens = self.first(tokens, tokens, tokens)[0] * 4
        return self.second(tokens, tokens, tokens, need_weights=False)[0]


def hand_written() -> nn.Module:
    torch.manual_seed(0)
    return HandWritten()


MODELS: dict[str, tuple[Callable[[], nn.Module], int, Geometry | None]] = {
    "fused": (random_vit, 15, None),
    "written by hand": (hand_written, 15, HAND_WRITTEN_GEOMETRY),
    "multi-head": (MultiHead, 21, None),
}


def seen(name: str, bits: int, kernel: SDPBackend | None = None, **options: Any) -> CapturedAttention:
    build, size, geometry = MODELS[name]
    images = torch.randn(3, 1, size, size, generator=torch.Generator().manual_seed(1))
    model = build().eval()
    with torch.set_grad_enabled("gradients" in options), ReducedProducts(bits):
        with (
            sdpa_kernel(kernel) if kernel else nullcontext(),
            capture(model, geometry=geometry, **options) as attention,
        ):
            model(images)
    return attention


@pytest.mark.parametrize("bits", [TF32, BFLOAT16])
@pytest.mark.parametrize("name", MODELS)
def test_sound_models_are_seen(name: str, bits: int) -> None:
    attention = seen(name, bits)
    assert all(layer.weights.dtype is torch.float32 for layer in attention)
    assert attention.reconstruction_error < 1e-4  # the fused kernel keeps the precision that products lose


@pytest.mark.parametrize("bits", [TF32, BFLOAT16])
def test_kernels_that_multiply_with_reduced_precision_themselves_are_seen(bits: int) -> None:
    assert seen("fused", bits, SDPBackend.MATH).reconstruction_error > 1e-4


def test_gradients_go_through_what_was_rebuilt() -> None:
    for layer in seen("fused", BFLOAT16, gradients=True):
        assert layer.weights.requires_grad and layer.weights.dtype is torch.float32


@pytest.mark.parametrize("bits", [TF32, BFLOAT16])
@pytest.mark.parametrize("kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_one_wrong_head_is_refused(monkeypatch: pytest.MonkeyPatch, kernel: SDPBackend, bits: int) -> None:
    rebuild = calls.attention_weights

    def with_a_wrong_head(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        weights, values = rebuild(*args, **kwargs)
        return torch.cat([weights[:, 1:2], weights[:, 1:]], dim=1), values

    monkeypatch.setattr(calls, "attention_weights", with_a_wrong_head)
    with pytest.raises(CaptureError, match="products of reduced precision allowed for"):
        seen("fused", bits, kernel)


@contextmanager
def asked_for(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_precision_of_products_is_measured() -> None:
    cpu = torch.device("cpu")
    assert product_type(cpu) is torch.float32
    for bits, dtype in ((TF32, torch.float16), (BFLOAT16, torch.bfloat16)):
        with ReducedProducts(bits):
            assert product_type(cpu) is dtype
    with asked_for("medium"):  # which a processor may not be able to follow
        assert product_type(cpu) in (torch.float32, torch.bfloat16)
