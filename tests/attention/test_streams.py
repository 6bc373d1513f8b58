"""Which attention calls are parts of one layer: those that side by side are computed of the same tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attention_visualizer.attention.capture import capture
from attention_visualizer.attention.layers import AttentionLayer

GRID, WIDTH = 4, 8


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(tokens)[:, None].chunk(3, dim=-1)
        return nn.functional.scaled_dot_product_attention(query, key, value)[:, 0]


class Heads(nn.Module):
    """Three modules of one list. `way`: what the second and the third get."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.cut = nn.Conv2d(1, WIDTH, 4, 4)
        self.heads = nn.ModuleList(Head() for _ in range(3))

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.cut(images).flatten(2).mT
        other = tokens.flip(1) if self.way == "the second in another order" else tokens
        first, second = self.heads[0](tokens), self.heads[1](other)
        third = self.heads[2](tokens + first if self.way == "the third after the first" else tokens)
        return (tokens + first + second + third).mean(dim=1)


def layers(way: str) -> list[AttentionLayer]:
    torch.manual_seed(0)
    model = Heads(way).eval()
    with torch.no_grad(), capture(model) as attention:
        model(torch.rand(1, 1, 4 * GRID, 4 * GRID))
    return list(attention)


def test_heads_of_the_same_tokens_are_one_layer() -> None:
    (layer,) = layers("all of the same")
    assert layer.name == "heads" and layer.weights.shape[1] == 3


@pytest.mark.parametrize(
    ("way", "names"),
    [
        # It does not depend on the call before, but on one of the layer's.
        ("the third after the first", ["heads", "heads.2"]),
        # Their keys are other patches, so one map would show them in the wrong places.
        ("the second in another order", ["heads.0", "heads.1", "heads.2"]),
    ],
)
def test_others_are_layers_of_their_own(way: str, names: list[str]) -> None:
    assert [layer.name for layer in layers(way)] == names
