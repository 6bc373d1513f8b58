"""Attention switched off: what a model goes on with is what it would with weights of zero, though none are rebuilt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_visualizer.attention.capture import capture, intervene
from attention_visualizer.attention.function_call import FunctionCall
from attention_visualizer.attention.layers import CapturedAttention
from attention_visualizer.attention.policies import OneCallOff, SwitchedOff
from attention_visualizer.attention.recording import Recorder

IMAGES, TOKENS, WIDTH = 4, 6, 8


class Attention(nn.Module):
    """Two heads by PyTorch's fused attention, called in one of its ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (each.unflatten(-1, (2, -1)).transpose(1, 2) for each in self.qkv(tokens).chunk(3, dim=-1))
        options: dict[str, Any] = {}
        if self.way == "masked":
            options["attn_mask"] = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
        elif self.way == "grouped":
            key, value, options["enable_gqa"] = key[:, :1], value[:, :1], True
        elif self.way == "flat":
            query, key, value = (each.flatten(0, 1) for each in (query, key, value))
        elif self.way == "by hand":
            weights = (query @ key.transpose(-2, -1)).softmax(dim=-1)
            return (weights @ value).transpose(1, 2).flatten(2)
        attended = F.scaled_dot_product_attention(query, key, value, **options)
        return attended.unflatten(0, (len(tokens), -1)).flatten(1, -3).transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(way) for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        for layer in self.layers:
            tokens = tokens + layer(tokens)
        return tokens


def run(model: nn.Module, tokens: Tensor, policy: SwitchedOff) -> Tensor:
    with torch.no_grad(), Recorder(model, CapturedAttention(), policy):
        return FunctionCall(model, (tokens,), {})()


@pytest.fixture(params=["plain", "masked", "grouped", "flat", "by hand"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return Model(request.param).eval()


def test_all_off_is_weights_of_zero(model: nn.Module) -> None:
    tokens = torch.randn(IMAGES, TOKENS, WIDTH)
    policy = SwitchedOff()
    found = run(model, tokens, policy)
    with torch.no_grad(), intervene(model, lambda layer, weights: torch.zeros_like(weights)), capture(model) as seen:
        expected = model(tokens)
    assert torch.equal(found, expected)
    for layer in seen:
        torch.testing.assert_close(policy.values[layer.name], layer.values)
        assert policy.num_queries[layer.name] == layer.weights.shape[2] == TOKENS


def test_one_call_off_for_one_picture_of_a_batch(model: nn.Module) -> None:
    """Picture 1 without the second call, picture 2 without the third, the first and the last as they are."""
    tokens = torch.randn(1, TOKENS, WIDTH).expand(IMAGES, -1, -1)
    found = run(model, tokens, OneCallOff(first=1, number=2))
    with torch.no_grad():
        plain = model(tokens[:1])[0]
        for picture, name in ((1, "layers.1"), (2, "layers.2")):
            with intervene(model, lambda layer, weights, name=name: weights * (layer.name != name)):
                torch.testing.assert_close(found[picture], model(tokens[:1])[0])
    torch.testing.assert_close(found[0], plain)
    assert torch.equal(found[0], found[3])
