"""The output projection that is handed out is what is applied to the heads' outputs, or none is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_visualizer.attention.capture import capture
from attention_visualizer.measures.explanations import explain

HEADS, WIDTH, TOKENS = 3, 12, 5


class Attention(nn.Module):
    """Attention with something behind the heads, [image, head, token, column] -> [image, token, WIDTH]."""

    def __init__(self, make: Callable[[Any], None], use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.num_heads, self.use = HEADS, use
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        make(self)

    def forward(self, tokens: Tensor) -> Tensor:
        parts = self.qkv(tokens).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        self.inputs = tokens
        return self.use(self, F.scaled_dot_product_attention(*parts))


class LowRank(nn.Module):
    """A low-rank part beside a linear map, which shows the map's own weight as its `weight`."""

    def __init__(self, inside: nn.Linear) -> None:
        super().__init__()
        self.inside, self.down, self.up = inside, nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)
        self.weight = inside.weight

    def forward(self, heads: Tensor) -> Tensor:
        return self.inside(heads) + self.up(self.down(heads))


class LowRankSubclass(nn.Linear):
    def forward(self, heads: Tensor) -> Tensor:
        return super().forward(heads) + heads @ self.weight[:2].T @ self.weight[:2]


class WholeNumbers(nn.Module):
    """Whole numbers as weights, and a scale for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-9, 9, (WIDTH, WIDTH), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(WIDTH, 1))

    def forward(self, heads: Tensor) -> Tensor:
        return F.linear(heads, self.weight * self.scale)  # type: ignore[operator]


def nothing(module: Any) -> None:
    pass


def put(make: Callable[[Any], nn.Module]) -> Callable[[Any], None]:
    """Put another module in the place of the projection."""

    def change(module: Any) -> None:
        module.proj = make(module.proj)

    return change


def side_by_side(heads: Tensor) -> Tensor:
    return heads.transpose(1, 2).flatten(2)


def projected(module: Any, heads: Tensor) -> Tensor:
    return module.proj(side_by_side(heads))


def hooked(hook: Callable[[Any, Tensor, Tensor], Tensor]) -> Callable[[Any], None]:
    def change(module: Any) -> None:
        more = nn.Linear(WIDTH, WIDTH)
        module.proj.register_forward_hook(lambda part, given, output: hook(more, given[0], output))

    return change


Use = Callable[[Any, Tensor], Tensor]
KNOWN: dict[str, tuple[Callable[[Any], None], Use]] = {
    "a linear layer": (nothing, projected),
    "with dropout": (put(lambda inside: nn.Sequential(inside, nn.Dropout(0.5))), projected),
    "whole numbers": (put(lambda inside: WholeNumbers()), projected),
    "weight norm": (put(lambda inside: nn.utils.parametrizations.weight_norm(inside)), projected),
    "a product": (nothing, lambda module, heads: side_by_side(heads) @ module.proj.weight),
    "addmm": (
        nothing,
        lambda module, heads: torch.addmm(
            module.proj.bias, side_by_side(heads).flatten(0, 1), module.proj.weight
        ).unflatten(0, (-1, TOKENS)),
    ),
    "tokens first": (
        nothing,
        lambda module, heads: module.proj(heads.permute(2, 0, 1, 3).reshape(-1, WIDTH)).view(TOKENS, -1, WIDTH),
    ),
    "a sum behind": (nothing, lambda module, heads: module.inputs + projected(module, heads)),
    "a norm behind the sum": (
        nothing,
        lambda module, heads: F.layer_norm(module.inputs + projected(module, heads), (WIDTH,)),
    ),
}
NOT_KNOWN: dict[str, tuple[Callable[[Any], None], Use]] = {
    "low rank": (put(LowRank), projected),
    "low rank, subclass": (put(lambda inside: LowRankSubclass(WIDTH, WIDTH)), projected),
    "a hook that adds": (hooked(lambda more, heads, output: output + more(heads)), projected),
    "a hook that scales": (hooked(lambda more, heads, output: output * 2), projected),
    "a hook before": (
        lambda module: module.proj.register_forward_pre_hook(lambda part, given: (given[0].relu(),)),
        projected,
    ),
    "a hook on the module": (
        lambda module: module.register_forward_hook(lambda part, given, output: output.tanh()),
        projected,
    ),
    "a norm before": (nothing, lambda module, heads: module.proj(F.layer_norm(side_by_side(heads), (WIDTH,)))),
    "a gate": (nothing, lambda module, heads: module.proj(side_by_side(heads) * module.inputs.sigmoid())),
    "a gain behind": (nothing, lambda module, heads: projected(module, heads) * module.proj.bias),
    "heads interleaved": (nothing, lambda module, heads: module.proj(heads.permute(0, 2, 3, 1).flatten(2))),
    "each head by itself": (
        lambda module: setattr(module, "proj", nn.Linear(WIDTH // HEADS, WIDTH // HEADS)),
        lambda module, heads: side_by_side(module.proj(heads)),
    ),
    "none": (nothing, lambda module, heads: side_by_side(heads)),
    "an adapter behind": (
        nothing,
        lambda module, heads: (lambda output: output + module.proj(output).relu())(projected(module, heads)),
    ),
}
TOKENS_OF_IMAGES = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))


def projection_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor | None:
    model.eval().to(dtype)
    with torch.no_grad(), capture(model) as attention:
        model(TOKENS_OF_IMAGES.to(dtype))
    return attention[0].projection


def applied(model: Any) -> Tensor:
    """What each number of the heads' outputs, side by side, does to the output for its token, at one point."""

    def use(row: Tensor) -> Tensor:
        heads = row.view(1, 1, HEADS, -1).expand(1, TOKENS, -1, -1).transpose(1, 2)
        model.inputs = torch.zeros(1, TOKENS, WIDTH)
        output = model.use(model, heads)
        return (output if output.shape[0] == 1 else output.transpose(0, 1))[0, 0]

    return torch.autograd.functional.jacobian(use, torch.randn(WIDTH))


@pytest.mark.parametrize("kind", KNOWN)
def test_one_linear_map_is_found_as_it_is_applied(kind: str) -> None:
    model = Attention(*KNOWN[kind])
    found = projection_of(model)
    assert found is not None and found.shape == (WIDTH, WIDTH)
    if "norm behind" in kind:  # which belongs to what follows
        assert found is model.proj.weight
    else:
        torch.testing.assert_close(found, applied(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", NOT_KNOWN)
def test_anything_else_is_not_taken_for_one(kind: str) -> None:
    assert projection_of(Attention(*NOT_KNOWN[kind])) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_of_numbers(dtype: torch.dtype) -> None:
    model = Attention(nothing, projected)
    assert projection_of(model, dtype) is model.proj.weight
    assert projection_of(Attention(*NOT_KNOWN["heads interleaved"]), dtype) is None


def test_it_is_known_behind_the_attention_and_nothing_is_kept() -> None:
    model, seen = Attention(nothing, projected).eval(), []
    with torch.no_grad(), capture(model, consume=lambda layer: seen.append((layer, layer.projection))):
        model(TOKENS_OF_IMAGES)
    ((layer, during),) = seen
    assert during is None and layer.projection is model.proj.weight


def test_the_map_says_what_it_was_made_with() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=WIDTH, depth=1, num_heads=HEADS, num_classes=2
    ).eval()
    images = torch.randn(1, 3, 16, 16)
    assert "value-weighted" in explain(model, images).maps
    model.blocks[0].attn.norm = nn.LayerNorm(WIDTH)  # as in some larger models
    assert "value-weighted, before projection" in explain(model, images).maps
