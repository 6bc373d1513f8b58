"""Attention on tensors that are no plain ones: what can be read is captured, the rest is refused in one line that says
why."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from attention_visualizer.attention.capture import AttentionLayer, CaptureError, InternalCaptureError, capture

QUERIES, KEYS = 5, 7
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Owned(Tensor):
    """A class of somebody's own."""


class Around(nn.Module):
    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention
        self.num_heads = 3

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.attention(query, key, value)


@pytest.fixture(autouse=True)
def prototypes() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors|Sparse", UserWarning)
        yield


def layer_of(attention: Attention) -> AttentionLayer:
    generator = torch.Generator().manual_seed(3)
    tensors = (torch.randn(2, 3, number, 8, generator=generator) for number in (QUERIES, KEYS, KEYS))
    model = Around(attention)
    with torch.no_grad(), capture(model) as seen:
        model(*tensors)
    (layer,) = seen
    return layer


FUSED = F.scaled_dot_product_attention
BIAS = torch.randn(QUERIES, KEYS, generator=torch.Generator().manual_seed(4))
VISIBLE = torch.ones(QUERIES, KEYS, dtype=torch.bool)


@pytest.mark.parametrize(
    ("mask", "same"),
    [
        (lambda: causal_upper_left(QUERIES, KEYS), VISIBLE.tril()),
        (lambda: causal_lower_right(QUERIES, KEYS), VISIBLE.tril(KEYS - QUERIES)),
        (lambda: BIAS.as_subclass(Owned), BIAS),
        (lambda: VISIBLE.triu().as_subclass(Owned), VISIBLE.triu()),
        (lambda: nn.Parameter(BIAS), BIAS),
    ],
    ids=["upper left", "lower right", "a bias of a class", "a mask of a class", "a parameter"],
)
def test_a_mask_of_another_class_is_what_it_does(mask: Callable[[], Tensor], same: Tensor) -> None:
    layer, plain = (layer_of(partial(FUSED, attn_mask=each)) for each in (mask(), same))
    assert type(layer.weights) is Tensor
    torch.testing.assert_close(layer.weights, plain.weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "attention",
    [
        lambda query, key, value: torch.mm((query[0, 0] @ key[0, 0].T).softmax(-1).to_sparse(), value[0, 0]),
        lambda query, key, value: torch.sparse.mm(
            torch.sparse.softmax((query[0, 0] @ key[0, 0].T).to_sparse(), -1), value[0, 0]
        ),
        lambda query, key, value: FUSED(query.as_subclass(Owned), key, value)[:1, :1],
    ],
    ids=["sparse weights", "sparse scores", "queries of a class"],
)
def test_what_can_be_read_is_captured(attention: Attention) -> None:
    layer = layer_of(attention)
    torch.testing.assert_close(layer.weights.sum(dim=-1), torch.ones(layer.weights.shape[:-1]))
    assert layer.error < 1e-5


def nested(tensor: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(tensor))


def jagged(tensor: Tensor) -> Tensor:
    each = [image.transpose(0, 1) for image in tensor]
    return torch.nested.nested_tensor(each, layout=torch.jagged).transpose(1, 2)


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (lambda *tensors: FUSED(*map(nested, tensors)), "nested tensors"),
        (lambda *tensors: FUSED(*map(jagged, tensors)), "nested tensors"),
        (lambda *tensors: FUSED(*(tensor.to("meta") for tensor in tensors)), "meta device"),
        (
            lambda query, key, value: (query.to("meta") @ key.to("meta").mT).softmax(-1) @ value.to("meta"),
            "meta device",
        ),
    ],
    ids=["nested", "jagged", "meta", "meta, by hand"],
)
def test_what_has_no_numbers_to_read_is_refused(attention: Attention, reason: str) -> None:
    with pytest.raises(CaptureError, match=reason) as raised:
        layer_of(attention)
    assert not isinstance(raised.value, InternalCaptureError)
