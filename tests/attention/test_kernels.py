"""Kernels that hide attention are named, and what goes through all layers is left out where one is hidden."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attention_visualizer.attention.capture import CaptureError, capture
from attention_visualizer.measures.explanations import explain
from attention_visualizer.measures.observation import observe

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def operator(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]


@torch.library.custom_op("tests::somebodys_attention", mutates_args=())
def custom(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


custom.register_autograd(lambda context, gradient: (gradient, gradient, gradient))


class Extension(torch.autograd.Function):
    """A kernel of an extension, of which PyTorch sees nothing."""

    @staticmethod
    def forward(context: object, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return F.scaled_dot_product_attention(query, key, value)

    @staticmethod
    def backward(context: object, gradient: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return gradient, gradient, gradient


KERNELS: dict[str, Kernel] = {"operator": operator, "custom operator": custom, "extension": Extension.apply}


class Block(nn.Module):
    def __init__(self, attention: Kernel) -> None:
        super().__init__()
        self.num_heads, self.attention = 2, attention
        self.qkv = nn.Linear(16, 48)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(tokens).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return tokens + self.attention(query, key, value).transpose(1, 2).flatten(2)


class OtherBlock(Block):
    pass


class Classifier(nn.Module):
    def __init__(self, *blocks: Block) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(16, 3)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).mT
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(tokens.mean(dim=1))


IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SEEN = F.scaled_dot_product_attention


def test_flex_attention_is_named() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    class Flexible(Block):
        def forward(self, tokens: Tensor) -> Tensor:
            query, key, value = self.qkv(tokens).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            return flex_attention(query, key, value).transpose(1, 2).flatten(2)

    model = Classifier(Flexible(SEEN)).eval()
    with pytest.raises(CaptureError, match="flex_attention"), torch.no_grad(), capture(model):
        model(IMAGES)


@pytest.mark.parametrize("name", ["operator", "custom operator"])
def test_an_operator_is_named_where_nothing_is_seen(name: str) -> None:
    words = {"operator": "flash_attention_for_cpu", "custom operator": "tests.somebodys_attention"}
    model = Classifier(Block(KERNELS[name])).eval()
    with pytest.raises(CaptureError, match=words[name]), torch.no_grad(), capture(model):
        model(IMAGES)


def test_a_package_of_kernels_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("xformers.ops")
    package.memory_efficient_attention = Extension.apply  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers.ops", package)
    monkeypatch.setitem(globals(), "hidden_ops", package)

    class Hidden(Block):
        def forward(self, tokens: Tensor) -> Tensor:
            query, key, value = self.qkv(tokens).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            return hidden_ops.memory_efficient_attention(query, key, value).transpose(1, 2).flatten(2)  # noqa: F821

    model = Classifier(Hidden(SEEN)).eval()
    with pytest.raises(CaptureError, match="xformers.*use PyTorch's"), torch.no_grad(), capture(model):
        model(IMAGES)


def test_what_the_configuration_asks_for_is_named() -> None:
    model = Classifier(Block(Extension.apply)).eval()
    model.config = types.SimpleNamespace(_attn_implementation="flash_attention_2")  # type: ignore[assignment]
    with pytest.raises(CaptureError, match="flash_attention_2"), torch.no_grad(), capture(model):
        model(IMAGES)


@pytest.mark.parametrize(
    ("blocks", "hidden"),
    [
        (lambda: [Block(SEEN), Block(operator), Block(SEEN)], ("blocks.1",)),
        (lambda: [Block(custom), Block(SEEN)], ("blocks.0",)),
        (lambda: [Block(SEEN), Block(Extension.apply)], ("blocks.1",)),  # behind all that is seen
        (lambda: [Block(SEEN), OtherBlock(operator), Block(SEEN)], ("blocks.1",)),
        (lambda: [Block(SEEN), Block(SEEN)], ()),
    ],
    ids=["between", "before", "extension behind", "another class", "none"],
)
def test_rollout_goes_through_no_layer_unseen(blocks: Callable[[], list[Block]], hidden: tuple[str, ...]) -> None:
    looked = observe(Classifier(*blocks()).eval(), IMAGES)
    assert looked.left_out == hidden
    assert (looked.rollouts is None) == bool(hidden)
    maps = explain(Classifier(*blocks()).eval(), IMAGES).maps
    assert ("rollout" not in maps and "relevance" not in maps) == bool(hidden)


def test_operators_of_an_enclosing_mode_are_not_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another mode makes of the model's own call is no kernel of the model."""

    class Other(TorchFunctionMode):
        def __torch_function__(
            self, function: object, types: object, args: tuple = (), kwargs: object = None
        ) -> object:
            if function is SEEN:
                return operator(*args)
            return function(*args, **(kwargs or {}))  # type: ignore[operator]

    model = Classifier(Block(SEEN)).eval()
    with torch.no_grad(), Other(), capture(model) as seen:
        model(IMAGES)
    assert not seen.unseen and len(seen) == 1
