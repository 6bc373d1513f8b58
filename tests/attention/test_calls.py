"""Attention written by hand is seen in every spelling, and nothing else is taken for it."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_visualizer.attention.calls import HeadLayout
from attention_visualizer.attention.capture import CapturedAttention, CaptureError, capture
from attention_visualizer.attention.places import is_measuring

BATCH, HEADS, QUERIES, KEYS, DIM, COLUMNS = 2, 3, 5, 7, 11, 13
Spelling = Callable[[Tensor, Tensor, Tensor], Tensor]


class Module(nn.Module):
    """Computes what a function says; it may have parameters and state its heads as models do."""

    def __init__(self, function: Callable[..., Any], num_heads: int | None = HEADS, **children: Any) -> None:
        super().__init__()
        self.function = function
        if num_heads is not None:
            self.num_heads = num_heads
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def qkv(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(BATCH, HEADS, QUERIES, DIM, generator=generator).to(dtype),
        torch.randn(BATCH, HEADS, KEYS, DIM, generator=generator).to(dtype),
        torch.randn(BATCH, HEADS, KEYS, COLUMNS, generator=generator).to(dtype),
    )


def explicit(query: Tensor, key: Tensor, bias: Tensor | float = 0.0) -> np.ndarray[Any, Any]:
    """Head by head in float64 with numpy: [batch, head, query, key]."""
    weights = np.zeros((*query.shape[:2], query.shape[2], key.shape[2]))
    biases = np.broadcast_to(np.asarray(bias, dtype=np.float64), weights.shape)
    for image in range(weights.shape[0]):
        for head in range(weights.shape[1]):
            scores = query[image, head].double().numpy() @ key[image, head].double().numpy().T / math.sqrt(DIM)
            exponentials = np.exp(scores + biases[image, head])
            weights[image, head] = exponentials / exponentials.sum(axis=1, keepdims=True)
    return weights


def run(model: nn.Module, *inputs: Tensor, **options: Any) -> tuple[Any, CapturedAttention]:
    """Output and attention; the output must be the unwatched one to the bit."""
    with torch.no_grad():
        torch.manual_seed(7)
        expected = model(*inputs)
        state = torch.get_rng_state()
        torch.manual_seed(7)
        with capture(model, **options) as attention:
            output = model(*inputs)
        assert torch.equal(output, expected)
        assert torch.equal(torch.get_rng_state(), state)
    return output, attention


MASK = torch.rand(QUERIES, KEYS, generator=torch.Generator().manual_seed(1)) < 0.7
MASK[:, 0] = True
BIAS = torch.randn(HEADS, QUERIES, KEYS, generator=torch.Generator().manual_seed(2)) * 2
SCALE = 1 / math.sqrt(DIM)


def with_bmm(_: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.bmm(F.softmax(torch.bmm(q, k.transpose(1, 2)) * SCALE, dim=-1), v).unflatten(0, (BATCH, HEADS))


def with_baddbmm(_: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    bias = BIAS.repeat(BATCH, 1, 1)
    return torch.baddbmm(bias, q, k.mT, alpha=SCALE).softmax(-1).bmm(v)


def turned_values(_: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    attn = (q @ k.transpose(-2, -1) * SCALE).softmax(dim=-1)
    return (v.transpose(-2, -1) @ attn.transpose(-2, -1)).transpose(-2, -1)


def softmax_of_turned_scores(_: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    attn = (k @ q.mT * SCALE).softmax(dim=-2)  # [key, query]
    return attn.transpose(-1, -2) @ v


def turned_scores_and_values(_: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return v.mT @ (k @ q.mT * SCALE).softmax(dim=-2)


def filled(_: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT * SCALE).masked_fill(~MASK, -math.inf)
    return scores.softmax(-1) @ v


def filled_in_place(_: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q.matmul(k.swapaxes(-1, -2)).mul_(SCALE)
    scores.masked_fill_(~MASK, torch.finfo(scores.dtype).min)
    return torch.matmul(torch.softmax(scores, -1), v)


def set_by_index(_: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.permute(0, 1, 3, 2)) / math.sqrt(DIM)
    scores[..., ~MASK] = -1e9
    return torch.special.softmax(scores, -1) @ v


def added(_: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores *= SCALE
    scores += BIAS
    return nn.Softmax(dim=3)(scores) @ v


def added_to_the_bias(_: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (BIAS + (q * SCALE) @ k.mT).softmax(dim=3) @ v


def relative_positions_of_rows_and_columns(_: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As in Segment Anything: scores are looked at as a grid of keys, and made flat again."""
    scores = (q @ k.mT * SCALE).view(BATCH, HEADS, QUERIES, 1, KEYS)
    scores = scores + BIAS[:, :, None, :]
    return scores.view(BATCH, HEADS, QUERIES, KEYS).softmax(-1) @ v


def einsum(scores: str, product: str, arrange: str = "", back: str = "") -> Callable[..., Tensor]:
    def attend(_: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if arrange:
            q, k, v = (torch.einsum(f"bhnd->{arrange}", x).contiguous() for x in (q, k, v))
        weights = torch.einsum(scores, q * SCALE, k)
        output = torch.einsum(product, weights.softmax(dim=-1), v)
        return torch.einsum(back, output) if back else output

    return attend


def keys_before_heads(_: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = torch.einsum("bqhd,bkhd->bqkh", q * SCALE, k).softmax(dim=2)
    return torch.einsum("bqkh,bkhd->bqhd", weights, v)


def einsum_of_values_first(_: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhqd,bhkd->bhqk", [q * SCALE, k]).softmax(-1)
    return torch.einsum("bhkd,bhqk->bhdq", [v, weights])


def float_softmax(_: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(q @ k.mT * SCALE, dim=-1, dtype=torch.float32).to(v.dtype) @ v


SPELLINGS: dict[str, tuple[Callable[..., Tensor], Any]] = {
    "@": (lambda _, q, k, v: (q @ k.transpose(-2, -1) * SCALE).softmax(dim=-1) @ v, 0.0),
    "torch.softmax": (lambda _, q, k, v: torch.softmax(q @ k.mT * SCALE, dim=-1) @ v, 0.0),
    "F.softmax": (lambda _, q, k, v: F.softmax(input=q @ k.mT * SCALE, dim=-1) @ v, 0.0),
    "softmax without its axis": (lambda _, q, k, v: torch.matmul(F.softmax(q @ k.mT * SCALE, -1, 3), v), 0.0),
    "__matmul__": (lambda _, q, k, v: (q.__matmul__(k.mT) * SCALE).softmax(-1).__matmul__(v), 0.0),
    "torch.linalg.matmul": (lambda _, q, k, v: torch.linalg.matmul((q @ k.mT * SCALE).softmax(-1), v), 0.0),
    "bmm": (with_bmm, 0.0),
    "baddbmm": (with_baddbmm, BIAS),
    "values' @ weights'": (turned_values, 0.0),
    "softmax of turned scores": (softmax_of_turned_scores, 0.0),
    "turned scores and values": (turned_scores_and_values, 0.0),
    "masked_fill": (filled, torch.where(MASK, 0.0, -math.inf)),
    "masked_fill_": (filled_in_place, torch.where(MASK, 0.0, -math.inf)),
    "mask by index": (set_by_index, torch.where(MASK, 0.0, -math.inf)),
    "bias added": (added, BIAS),
    "added to the bias": (added_to_the_bias, BIAS),
    "seen as a grid": (relative_positions_of_rows_and_columns, BIAS),
    "einsum": (einsum("bhqd,bhkd->bhqk", "bhqk,bhkd->bhqd"), 0.0),
    "einsum with spaces": (einsum("b h i d, b h j d -> b h i j", "b h i j, b h j d -> b h i d"), 0.0),
    "einsum with dots": (einsum("...qd,...kd->...qk", "...qk,...kd->...qd"), 0.0),
    "einsum with dots in the output alone": (einsum("bh...qd,bh...kd->bh...qk", "b...qk,b...kd->...bqd"), 0.0),
    "einsum of tokens before heads": (einsum("bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd", "bnhd"), 0.0),
    "einsum into columns before queries": (einsum("bhqd,bhkd->bhqk", "bhqk,bhkd->bhdq"), 0.0),
    "einsum of values with columns first": (einsum("bhdq,bhdk->bhqk", "bhqk,bhdk->bhqd", "bhdn"), 0.0),
    "einsum into tokens first": (einsum("qbhd,kbhd->bhqk", "bhqk,kbhd->qbhd", "nbhd"), 0.0),
    "einsum of keys before heads": (keys_before_heads, 0.0),
    "einsum of a list, values first": (einsum_of_values_first, 0.0),
    "softmax in float32": (float_softmax, 0.0),
}


@pytest.mark.parametrize(("function", "bias"), SPELLINGS.values(), ids=SPELLINGS.keys())
def test_weights_are_those_of_an_explicit_softmax(function: Callable[..., Tensor], bias: Any) -> None:
    query, key, value = qkv()
    _, attention = run(Module(function), query, key, value)
    (layer,) = attention
    np.testing.assert_allclose(layer.weights, explicit(query, key, bias), atol=2e-6)
    torch.testing.assert_close(layer.values, value)
    assert layer.source == "multiplied" and layer.same_output
    assert layer.error < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_softmax_in_float32_is_reported_as_it_is_multiplied(dtype: torch.dtype) -> None:
    """Rounded to half precision, and handed over as float32."""
    query, key, value = qkv(dtype=dtype)
    multiplied = F.softmax(query @ key.mT * SCALE, dim=-1, dtype=torch.float32).to(dtype)
    _, (layer,) = run(Module(float_softmax), query, key, value)
    assert layer.weights.dtype == torch.float32
    assert torch.equal(layer.weights, multiplied.float())


def test_autocast_rounds_what_is_multiplied_and_the_weights_come_back_in_float32() -> None:
    query, key, value = qkv()
    model = Module(SPELLINGS["@"][0])
    with torch.autocast("cpu", torch.bfloat16):
        output, (layer,) = run(model, query, key, value)
    assert output.dtype == torch.bfloat16 and layer.weights.dtype == torch.float32
    np.testing.assert_allclose(layer.weights, explicit(query, key), atol=0.05)


def test_a_literal_two_dimensional_attention_is_one_head_of_one_image() -> None:
    query, key, value = (tensor[0, 0] for tensor in qkv())
    for product in (torch.matmul, torch.mm):
        model = Module(lambda _, q, k, v, product=product: product(torch.softmax(product(q, k.T) * SCALE, -1), v), None)
        _, (layer,) = run(model, query, key, value)
        np.testing.assert_allclose(layer.weights, explicit(query[None, None], key[None, None]), atol=1e-6)
        assert layer.values.shape == (1, 1, KEYS, COLUMNS)


def test_three_dimensions_without_heads_are_a_single_head() -> None:
    query, key, value = (tensor[:, 0] for tensor in qkv())
    model = Module(lambda _, q, k, v: (q @ k.mT * SCALE).softmax(-1) @ v, None)
    _, (layer,) = run(model, query, key, value)
    np.testing.assert_allclose(layer.weights, explicit(query[:, None], key[:, None]), atol=1e-6)


@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
def test_softmax_without_an_axis_takes_torchs_choice() -> None:
    query, key, value = (tensor[:, 0] for tensor in qkv())
    model = Module(lambda _, q, k, v: F.softmax((k @ q.mT * SCALE).permute(1, 0, 2)).permute(1, 2, 0) @ v, None)
    _, (layer,) = run(model, query, key, value)
    np.testing.assert_allclose(layer.weights, explicit(query[:, None], key[:, None]), atol=1e-6)


def test_a_single_query_in_einsum() -> None:
    query, key, value = qkv()

    def pool(_: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.einsum("bhd,bhkd->bhk", q[:, :, 0] * SCALE, k).softmax(-1)
        return torch.einsum("bhk,bhkd->bhd", weights, v)

    _, (layer,) = run(Module(pool), query, key, value)
    np.testing.assert_allclose(layer.weights, explicit(query[:, :, :1], key), atol=1e-6)


def test_values_that_all_images_share() -> None:
    query, key, value = qkv()
    _, (layer,) = run(Module(SPELLINGS["@"][0]), query, key[:1], value[:1])
    np.testing.assert_allclose(layer.weights, explicit(query, key[:1].expand_as(key)), atol=1e-6)
    torch.testing.assert_close(layer.values, value[:1].expand_as(value))


# --- which axis is the heads ---


def test_windows_are_counted_as_images_and_heads_keep_their_axis() -> None:
    windows, heads = 5, 3
    generator = torch.Generator().manual_seed(4)
    query, key, value = (torch.randn(BATCH, windows, heads, KEYS, DIM, generator=generator) for _ in range(3))
    attend = SPELLINGS["@"][0]
    expected = explicit(query.flatten(0, 1), key.flatten(0, 1))
    _, (layer,) = run(Module(attend, heads), query, key, value)
    np.testing.assert_allclose(layer.weights, expected, atol=1e-6)
    turned = [tensor.transpose(1, 2) for tensor in (query, key, value)]  # heads before windows
    _, (layer,) = run(Module(attend, heads), *turned)
    np.testing.assert_allclose(layer.weights, expected, atol=1e-6)
    torch.testing.assert_close(layer.values, value.flatten(0, 1))


def test_heads_that_share_keys_in_groups_are_all_heads() -> None:
    """[batch, key head, group, query, key], as grouped-query attention is written by hand."""
    generator = torch.Generator().manual_seed(4)
    query = torch.randn(BATCH, 3, 2, QUERIES, DIM, generator=generator)
    key, value = (torch.randn(BATCH, 3, 1, KEYS, DIM, generator=generator) for _ in range(2))
    _, (layer,) = run(Module(SPELLINGS["@"][0], num_heads=6), query, key, value)
    repeated = key.expand(-1, -1, 2, -1, -1).flatten(1, 2)
    np.testing.assert_allclose(layer.weights, explicit(query.flatten(1, 2), repeated), atol=1e-6)


def test_the_module_around_may_state_the_heads() -> None:
    """A product in a module of its own, of batch times heads."""
    query, key, value = qkv()
    outer = Module(lambda self, q, k, v: self.inner(q, k, v), inner=Module(with_bmm, None))
    _, (layer,) = run(outer, query, key, value)
    assert layer.name == "inner"
    np.testing.assert_allclose(layer.weights, explicit(query, key), atol=1e-6)


def test_images_are_not_taken_for_heads() -> None:
    """As many images as the model states heads, and a pooling of one head."""

    def forward(self: Any, images: Tensor) -> Tensor:
        tokens = self.embedding(images).flatten(2).mT
        return self.pool(tokens)

    pool = Module(lambda _, x: (x[:, :1] @ x.mT).softmax(-1) @ x, None)
    model = Module(forward, num_heads=3, embedding=nn.Conv2d(3, DIM, 5, stride=5), pool=pool)
    _, (layer,) = run(model, torch.randn(3, 3, 10, 15))
    assert layer.weights.shape == (3, 1, 1, 6)


@pytest.mark.parametrize(
    ("leading", "num_heads", "batch", "expected"),
    [
        ((2, 3), 3, None, (2, 3)),
        ((2, 3), None, None, (2, 3)),
        ((2, 6), 3, None, (2, 6)),  # heads that were doubled
        ((3, 6), 3, 3, (3, 6)),
        ((3, 2), 3, 2, (2, 3)),  # heads first
        ((6,), 3, None, (2, 3)),
        ((6,), 3, 6, (6, 1)),
        ((6,), None, None, (6, 1)),
        ((6,), 1, None, (6, 1)),
        ((7,), 3, None, (7, 1)),
        ((), 3, None, (1, 1)),
        ((2, 5, 3), 3, None, (10, 3)),
        ((2, 3, 5), 3, None, (10, 3)),
        ((2, 3, 2), 6, None, (2, 6)),
        ((2, 5), 1, None, (10, 1)),
        ((6, 5), 3, 2, (10, 3)),  # batch times heads, then blocks
        ((0, 3), 3, None, (0, 3)),
    ],
)
def test_a_head_layout_goes_there_and_back(
    leading: tuple[int, ...], num_heads: int | None, batch: int | None, expected: tuple[int, int]
) -> None:
    tensor = torch.arange(math.prod(leading) * 35).view(*leading, 5, 7)
    layout = HeadLayout(leading, num_heads, batch)
    applied = layout.apply(tensor)
    assert applied.shape == (*expected, 5, 7)
    assert torch.equal(layout.restore(applied), tensor)
    assert sorted(applied[..., 0, 0].flatten().tolist()) == tensor[..., 0, 0].flatten().tolist()
    flat = tensor.view(-1, 5, 7)  # no row or column has moved to another
    assert all((matrix == flat).all(dim=(1, 2)).any() for matrix in applied.flatten(0, 1))


def test_a_head_layout_takes_heads_from_the_axis_of_their_number() -> None:
    tensor = torch.arange(2 * 3 * 5).view(2, 3, 5, 1, 1)
    assert HeadLayout((2, 3, 5), 3).apply(tensor)[:, 1].flatten().tolist() == tensor[:, 1].flatten().tolist()
    blocks = torch.arange(6 * 5).view(6, 5, 1, 1)  # image 1, head 2, is row 5
    assert HeadLayout((6, 5), 3, batch=2).apply(blocks)[5:, 2].flatten().tolist() == blocks[5].flatten().tolist()


# --- heads that are mixed ---

MIXING = torch.randn(HEADS, HEADS, generator=torch.Generator().manual_seed(6))
MIXINGS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "linear": lambda self, x: self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    "conv2d": lambda self, x: self.conv(x),
    "einsum": lambda self, x: torch.einsum("b h i j, h g -> b g i j", x, MIXING),
    "matmul": lambda self, x: (x.permute(0, 2, 3, 1) @ MIXING).permute(0, 3, 1, 2),
}


@pytest.mark.parametrize("mix", MIXINGS.values(), ids=MIXINGS.keys())
def test_talking_heads_are_reported_as_they_are_multiplied(mix: Callable[[Any, Tensor], Tensor]) -> None:
    query, key, value = qkv()
    linear, conv = nn.Linear(HEADS, HEADS, bias=False), nn.Conv2d(HEADS, HEADS, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(MIXING.T)
        conv.weight.copy_(MIXING.T[..., None, None])

    def attend(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return mix(self, mix(self, q @ k.mT * SCALE).softmax(dim=-1)) @ v

    _, (layer,) = run(Module(attend, linear=linear, conv=conv), query, key, value)
    scores = np.einsum("bhqd,bhkd->bhqk", query.numpy(), key.numpy()) * SCALE
    exponentials = np.exp(np.einsum("bhqk,hg->bgqk", scores, MIXING.numpy()))
    weights = exponentials / exponentials.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(layer.weights, np.einsum("bhqk,hg->bgqk", weights, MIXING.numpy()), atol=1e-5)
    torch.testing.assert_close(layer.values, value)


def test_a_product_of_two_attentions_is_the_attention_that_is_multiplied() -> None:
    query, key, value = qkv()

    def attend(_: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        landmarks = q[:, :, :2]
        first = (q @ landmarks.mT * SCALE).softmax(-1)
        second = (landmarks @ k.mT * SCALE).softmax(-1)
        return (first @ second) @ v

    _, (layer,) = run(Module(attend), query, key, value)
    expected = explicit(query, query[:, :, :2]) @ explicit(query[:, :, :2], key)
    np.testing.assert_allclose(layer.weights, expected, atol=1e-5)


def test_a_difference_of_two_attentions_is_the_attention_that_is_multiplied() -> None:
    query, key, value = qkv()
    other, other_key, _ = qkv(seed=9)

    def attend(_: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (torch.stack([q, other], 2) @ torch.stack([k, other_key], 2).mT * SCALE).softmax(-1)
        return (weights[:, :, 0] - 0.3 * weights[:, :, 1]) @ v

    _, (layer,) = run(Module(attend), query, key, value)
    np.testing.assert_allclose(layer.weights, explicit(query, key) - 0.3 * explicit(other, other_key), atol=1e-6)


# --- the very tensor ---


@pytest.mark.parametrize("name", ["@", "einsum", "masked_fill"])
def test_the_weights_are_the_very_memory_that_is_multiplied(name: str) -> None:
    kept: list[Tensor] = []
    query, key, value = qkv()
    model = Module(SPELLINGS[name][0])
    softmaxes: list[Tensor] = []

    class Softmaxes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = function(*args, **(kwargs or {}))
            if getattr(function, "__name__", "") == "softmax":
                softmaxes.append(output)
            return output

    with torch.no_grad(), Softmaxes(), capture(model, consume=lambda layer: kept.append(layer.weights)):
        model(query, key, value)
    assert kept[0].data_ptr() == softmaxes[0].data_ptr()


def test_nothing_is_kept_alive() -> None:
    """Each softmax dies as early as it would unwatched, with dropout too."""
    alive: list[int] = []
    references: list[weakref.ref[Tensor]] = []

    def attend(_: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT).softmax(-1)
        if not is_measuring():  # in the middle of a call, whose own tensors are alive
            alive.append(sum(reference() is not None for reference in references))
            references.append(weakref.ref(weights))
        return F.dropout(weights, 0.5) @ v

    model = Module(lambda self, q, k, v: sum(attend(self, q, k, v) for _ in range(3)))
    gc.disable()  # by counting references alone
    try:
        with torch.no_grad(), capture(model, consume=lambda layer: None):
            model(*qkv())
            assert [reference() for reference in references] == [None] * 3
    finally:
        gc.enable()
    assert alive == [0, 0, 0]


# --- dropout ---


def dropped(drop: Callable[[Any, Tensor], Tensor]) -> Module:
    def attend(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return drop(self, (q @ k.mT * SCALE).softmax(-1)) @ v

    return Module(attend, dropout=nn.Dropout(0.4), in_place=nn.Dropout(0.4, inplace=True)).train()


DROPS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "module": lambda self, x: self.dropout(x),
    "in place": lambda self, x: self.in_place(x),
    "F.dropout": lambda self, x: F.dropout(x, 0.4, self.training),
    "F.dropout in place": lambda self, x: F.dropout(x, p=0.4, training=True, inplace=True),
    "torch.dropout": lambda self, x: torch.dropout(x, 0.4, True),
    "then converted": lambda self, x: self.dropout(x).to(torch.float64).to(x.dtype),
    "then transposed twice": lambda self, x: self.dropout(x).transpose(-2, -1).contiguous().mT,
    "then reshaped": lambda self, x: self.dropout(x).flatten(0, 1).unflatten(0, (BATCH, HEADS)),
    "of reshaped weights": lambda self, x: self.dropout(x.flatten(0, 1)).view(x.shape),
    "everything": lambda self, x: F.dropout(x, 1.0),
    "nothing": lambda self, x: F.dropout(x, 0.0),
}


@pytest.mark.parametrize("drop", DROPS.values(), ids=DROPS.keys())
def test_weights_come_before_dropout_and_the_output_keeps_it(drop: Callable[[Any, Tensor], Tensor]) -> None:
    """`run` has checked that output and random numbers are as unwatched."""
    query, key, value = qkv()
    output, (layer,) = run(dropped(drop), query, key, value)
    np.testing.assert_allclose(layer.weights, explicit(query, key), atol=1e-6)
    if drop is not DROPS["nothing"]:
        assert not torch.allclose(output, layer.weights @ layer.values, atol=1e-2)
    assert layer.error < 1e-5


def test_dropout_of_half_precision_weights() -> None:
    query, key, value = qkv(dtype=torch.bfloat16)
    _, (layer,) = run(dropped(DROPS["module"]), query, key, value)
    assert torch.equal(layer.weights, (query @ key.mT * SCALE).softmax(-1).float())


@pytest.mark.parametrize("name", ["@", "einsum", "bmm", "values' @ weights'"])
def test_what_is_captured_holds_on_to_no_graph(name: str) -> None:
    query, key, value = (tensor.requires_grad_() for tensor in qkv())
    model = Module(SPELLINGS[name][0])
    with capture(model) as attention:
        output = model(query, key, value)
    assert output.requires_grad
    assert not attention[0].weights.requires_grad and not attention[0].values.requires_grad


def test_gradients_flow_through_dropout_as_unwatched() -> None:
    query, key, value = (tensor.requires_grad_() for tensor in qkv())
    model = dropped(DROPS["then transposed twice"])
    found = []
    for watched in (False, True):
        torch.manual_seed(3)
        if watched:
            with capture(model):
                output = model(query, key, value)
        else:
            output = model(query, key, value)
        found.append(torch.autograd.grad(output.square().sum(), (query, key, value)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


# --- what is no attention ---

TOKENS, WIDTH = 7, 10


def linear_attention(self: Any, x: Tensor) -> Tensor:
    query, key, value = self.qkv(x).view(BATCH, TOKENS, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
    mixed = query.softmax(-1) @ (key.softmax(dim=-2).transpose(-2, -1) @ value)
    return self.proj(mixed.transpose(1, 2).flatten(2))


def linear_attention_by_einsum(self: Any, x: Tensor) -> Tensor:
    query, key, value = self.qkv(x).chunk(3, dim=-1)
    context = torch.einsum("bnd,bne->bde", key.softmax(dim=1), value)
    return self.proj(torch.einsum("bnd,bde->bne", query.softmax(dim=-1), context))


def convolutional_linear_attention(self: Any, x: Tensor) -> Tensor:
    """As in diffusion models, on images."""
    query, key, value = self.conv(x).view(BATCH, 3, 2, 2, 35).unbind(1)
    context = torch.einsum("bhdn,bhen->bhde", key.softmax(dim=-1), value)
    mixed = torch.einsum("bhde,bhdn->bhen", context, query.softmax(dim=-2))
    return x + self.back(mixed.reshape(BATCH, 4, 5, 7))


def twice(function: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """The second layer works on what the first one's products became."""
    return lambda self, x: function(self, function(self, x))


NO_ATTENTION: dict[str, tuple[Callable[[Any, Tensor], Any], tuple[int, ...]]] = {
    "classifier": (lambda self, x: self.head(x.mean(1)).softmax(-1), (BATCH, TOKENS, WIDTH)),
    "mixture of experts": (
        lambda self, x: torch.einsum("bne,bned->bnd", self.head(x).softmax(-1), x[:, :, None].expand(-1, -1, 3, -1)),
        (BATCH, TOKENS, WIDTH),
    ),
    "squeeze and excite": (lambda self, x: x * self.square(x.mean(1, keepdim=True)).sigmoid(), (BATCH, TOKENS, WIDTH)),
    "softmax gate": (lambda self, x: (x @ x.mT) @ (x * self.square(x).softmax(-1)), (BATCH, TOKENS, WIDTH)),
    "linear attention": (linear_attention, (BATCH, TOKENS, WIDTH)),
    "linear attention, two layers": (twice(linear_attention), (BATCH, TOKENS, WIDTH)),
    "linear attention by einsum, two layers": (twice(linear_attention_by_einsum), (BATCH, TOKENS, WIDTH)),
    "linear attention by convolution, two layers": (twice(convolutional_linear_attention), (BATCH, 4, 5, 7)),
    "scores that are normed features": (
        lambda self, x: self.norm(x @ x.mT @ x).softmax(dim=1).mT @ x,
        (BATCH, TOKENS, WIDTH),
    ),
    "softmax that is only added": (lambda self, x: x + (x @ x.mT).softmax(-1).sum(), (BATCH, TOKENS, WIDTH)),
}


@pytest.mark.parametrize(("function", "shape"), NO_ATTENTION.values(), ids=NO_ATTENTION.keys())
def test_what_is_no_attention_is_not_taken_for_it(
    function: Callable[[Any, Tensor], Any], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    model = Module(
        function,
        qkv=nn.Linear(WIDTH, 3 * WIDTH),
        proj=nn.Linear(WIDTH, WIDTH),
        head=nn.Linear(WIDTH, 3),
        square=nn.Linear(WIDTH, WIDTH),
        norm=nn.LayerNorm(WIDTH),
        conv=nn.Conv2d(4, 12, 1),
        back=nn.Conv2d(4, 4, 1),
    )
    with pytest.raises(CaptureError, match="no attention of Module was captured") as caught, torch.no_grad():
        with capture(model):
            model(torch.randn(*shape))
    for looked_for in ("scaled_dot_product_attention", "multi_head_attention_forward", "softmax(query @ key) @ value"):
        assert looked_for in str(caught.value)


def test_attention_beside_a_mixture_of_experts_is_seen_alone() -> None:
    query, key, value = qkv()

    def forward(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed = (q @ k.mT * SCALE).softmax(-1) @ v
        gates = self.gate(mixed).softmax(-1)
        return torch.einsum("bhqe,bhqed->bhqd", gates, torch.stack([mixed, -mixed, mixed.abs()], dim=-2))

    _, attention = run(Module(forward, gate=nn.Linear(COLUMNS, 3)), query, key, value)
    assert len(attention) == 1
    np.testing.assert_allclose(attention[0].weights, explicit(query, key), atol=1e-6)


def test_weights_that_are_changed_in_place_after_dropout_leave_the_models_own_tensors_alone() -> None:
    softmaxes: list[Tensor] = []

    def attend(_: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT * SCALE).softmax(-1)
        softmaxes.append(weights)
        weights = F.dropout(weights, 0.5)
        weights[..., 0] = 0.0
        return weights @ v

    query, key, value = qkv()
    _, (layer,) = run(Module(attend), query, key, value)
    expected = explicit(query, key)
    expected[..., 0] = 0
    np.testing.assert_allclose(layer.weights, expected, atol=1e-6)
    np.testing.assert_allclose(softmaxes[0], explicit(query, key), atol=1e-6)


@pytest.mark.parametrize("change", [lambda x: x + 1, lambda x: x * 2, lambda x: x.mul_(2)], ids=["+", "*", "mul_"])
def test_what_cannot_be_told_from_dropout_is_refused(change: Callable[[Tensor], Tensor]) -> None:
    def attend(_: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return change(F.dropout((q @ k.mT * SCALE).softmax(-1), 0.5)) @ v

    with pytest.raises(CaptureError, match="do not reproduce"):
        run(Module(attend), *qkv())


def test_attention_inside_vmap_is_refused() -> None:
    attend = SPELLINGS["@"][0]
    model = Module(lambda self, q, k, v: torch.vmap(lambda q, k, v: attend(self, q, k, v))(q, k, v))
    with pytest.raises(CaptureError, match="vmap"), torch.no_grad(), capture(model):
        model(*qkv())


class LinearAttention(nn.Module):
    """softmax of queries over channels, times (softmax of keys over tokens, times values): no query meets a key."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ParameterList(torch.randn(5, 5) for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (tokens @ weight for weight in self.maps)
        return query.softmax(dim=-1) @ (key.softmax(dim=-2).mT @ value)


def test_linear_attention_with_learnt_matrices_is_not_attention() -> None:
    with pytest.raises(CaptureError, match="no attention of LinearAttention was captured"), torch.no_grad():
        with capture(model := LinearAttention()):
            model(torch.randn(2, 7, 5))


class OneHeadAtATime(nn.Module):
    """Heads in turn, of tokens without an image: a batch that four divides is still a batch."""

    num_heads = 4

    def forward(self, tokens: Tensor) -> Tensor:
        parts = tokens.chunk(self.num_heads, dim=-1)
        return torch.cat([(part @ part.mT).softmax(dim=-1) @ part for part in parts], dim=-1)


@pytest.mark.parametrize("batch", [4, 5, 8])
def test_a_batch_is_not_taken_for_heads(batch: int) -> None:
    model = OneHeadAtATime()
    with torch.no_grad(), capture(model) as attention:
        model(torch.randn(batch, 7, 12))
    assert [tuple(layer.weights.shape) for layer in attention] == [(batch, 1, 7, 7)] * 4
