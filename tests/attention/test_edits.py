"""An edited model computes what a model with those weights computes; gradients reach the weights themselves."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention_visualizer.attention.capture import AttentionLayer, CaptureError, Edit, capture, intervene
from attention_visualizer.attention.edits import (
    attend_as_partner,
    attend_to_maximum,
    in_all_layers,
    make_uniform,
    permute_keys,
    replace_by_mean,
    switch_off,
    together,
)
from attention_visualizer.support.errors import UserError

BATCH, TOKENS, HEADS, DIM = 2, 7, 3, 5
WIDTH = HEADS * DIM


def heads_of(tokens: Tensor) -> Tensor:
    return tokens.unflatten(-1, (HEADS, DIM)).transpose(1, 2)


def fused(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


def by_hand(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    return F.dropout((q @ k.mT / math.sqrt(DIM)).softmax(-1), dropout) @ v


def by_einsum(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    weights = torch.einsum("bhqd,bhkd->bhqk", q / math.sqrt(DIM), k).softmax(-1)
    return torch.einsum("bhqk,bhkd->bqhd", F.dropout(weights, dropout), v).transpose(1, 2)


def by_bmm(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    weights = F.dropout(torch.bmm(q, k.mT).div(math.sqrt(DIM)).softmax(-1), dropout)
    return torch.bmm(weights, v).unflatten(0, (-1, HEADS))


WAYS = {"fused": fused, "by hand": by_hand, "einsum": by_einsum, "bmm": by_bmm}
Change = Callable[[int, Tensor], Tensor]  # layer, weights -> weights


class Block(nn.Module):
    """One attention with a residual and a bend after it, so that layers depend on each other."""

    def __init__(self, way: str, dropout: float) -> None:
        super().__init__()
        self.way, self.num_heads, self.dropout = way, HEADS, dropout
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (heads_of(part) for part in self.qkv(tokens).chunk(3, dim=-1))
        mixed = WAYS[self.way](query, key, value, self.dropout if self.training else 0.0)
        return torch.tanh(tokens + self.proj(mixed.transpose(1, 2).flatten(2)))


class Model(nn.Module):
    def __init__(self, way: str = "by hand", depth: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(way, dropout) for _ in range(depth))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


def inputs(seed: int = 1) -> Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def explicitly(model: Model, tokens: Tensor, change: Change = lambda layer, weights: weights) -> Tensor:
    """The model written out once more, with `change` where the weights are."""
    for number, block in enumerate(model.blocks):
        query, key, value = (heads_of(part) for part in F.linear(tokens, block.qkv.weight, block.qkv.bias).chunk(3, -1))
        scores = torch.stack([q @ k.T for q, k in zip(query.flatten(0, 1), key.flatten(0, 1), strict=True)])
        weights = change(number, torch.exp(scores / math.sqrt(DIM)).unflatten(0, (-1, HEADS)))
        weights = weights / weights.sum(-1, keepdim=True) if change.__name__ == "scores" else weights
        mixed = torch.einsum("bhqk,bhkd->bqhd", weights, value).flatten(2)
        tokens = torch.tanh(tokens + F.linear(mixed, block.proj.weight, block.proj.bias))
    return tokens


def normalized(change: Change) -> Change:
    return lambda layer, exponentials: change(layer, exponentials / exponentials.sum(-1, keepdim=True))


def in_layer(number: int, change: Callable[[Tensor], Tensor]) -> Change:
    """Changes head 1 of one layer."""

    def changed(layer: int, weights: Tensor) -> Tensor:
        if layer != number:
            return weights
        heads = list(weights.unbind(1))
        heads[1] = change(heads[1])
        return torch.stack(heads, dim=1)

    return normalized(changed)


MEAN = torch.rand(HEADS, TOKENS, TOKENS, generator=torch.Generator().manual_seed(5))
ORDER = torch.tensor([3, 0, 6, 1, 2, 5, 4])


def moved_keys(weights: Tensor) -> Tensor:
    moved = torch.zeros_like(weights)
    for key in range(TOKENS):
        moved[..., int(ORDER[key])] = weights[..., key]
    return moved


def mean_of_some_queries(weights: Tensor) -> Tensor:
    mixed = [MEAN[1, query].expand(BATCH, -1) if query in (2, 3) else weights[:, query] for query in range(TOKENS)]
    return torch.stack(mixed, dim=1)


def one_hot(weights: Tensor) -> Tensor:
    return (weights == weights.amax(dim=-1, keepdim=True)).to(weights)


EDITS: dict[str, tuple[Edit, Callable[[Tensor], Tensor]]] = {
    "off": (switch_off("blocks.0", 1), lambda weights: weights * 0),
    "mean": (replace_by_mean("blocks.0", 1, MEAN), lambda weights: MEAN[1].to(weights).expand_as(weights)),
    "mean of two queries": (replace_by_mean("blocks.0", 1, MEAN, slice(2, 4)), mean_of_some_queries),
    "one-hot": (attend_to_maximum("blocks.0", 1), one_hot),
    "partner": (attend_as_partner("blocks.0", 1), lambda weights: torch.stack([weights[1], weights[1]])),
    "uniform": (make_uniform("blocks.0", 1), lambda weights: weights * 0 + 1 / TOKENS),
    "permuted": (permute_keys("blocks.0", 1, ORDER), moved_keys),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", EDITS)
def test_an_edited_model_computes_what_the_formula_with_those_weights_does(name: str, way: str) -> None:
    model = Model(way)
    edit, change = EDITS[name]
    with torch.no_grad():
        plain = model(inputs())
        with intervene(model, edit):
            edited = model(inputs())
        expected = explicitly(model, inputs(), in_layer(0, change))
    torch.testing.assert_close(edited, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(edited, plain, atol=1e-2)
    with torch.no_grad():
        assert torch.equal(model(inputs()), plain)


@pytest.mark.parametrize("way", WAYS)
def test_all_heads_are_edited_together(way: str) -> None:
    model = Model(way)
    edits = [switch_off("blocks.1"), make_uniform("blocks.1"), replace_by_mean("blocks.1", None, MEAN)]
    changes: list[Callable[[Tensor], Tensor]] = [
        torch.zeros_like,
        lambda weights: torch.full_like(weights, 1 / TOKENS),
        lambda weights: MEAN.expand_as(weights),
    ]
    for edit, change in zip(edits, changes, strict=True):
        with torch.no_grad(), intervene(model, edit):
            edited = model(inputs())
        changed = normalized(lambda layer, weights, change=change: change(weights) if layer == 1 else weights)
        torch.testing.assert_close(edited, explicitly(model, inputs(), changed), rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_all_layers_are_edited(way: str) -> None:
    model = Model(way, depth=3)
    changes: dict[Callable[[str], Edit], Callable[[Tensor], Tensor]] = {
        switch_off: torch.zeros_like,
        make_uniform: lambda weights: torch.full_like(weights, 1 / TOKENS),
        attend_to_maximum: one_hot,
        lambda layer: replace_by_mean(layer, None, MEAN, 0): lambda weights: torch.cat(
            [MEAN[:, :1].expand(BATCH, -1, -1, -1), weights[:, :, 1:]], dim=2
        ),
    }
    for edit_of, change in changes.items():
        with torch.no_grad(), intervene(model, in_all_layers(edit_of)):
            edited = model(inputs())
        changed = normalized(lambda layer, weights, change=change: change(weights))
        torch.testing.assert_close(edited, explicitly(model, inputs(), changed), rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_images_attend_as_their_partners_do_in_an_unedited_pass(way: str) -> None:
    model, partners = Model(way, depth=3), inputs(seed=9)
    with torch.no_grad(), capture(model) as attention:
        alone = model(partners)
    clean = [layer.weights for layer in attention]
    expected = explicitly(model, inputs(), normalized(lambda layer, weights: clean[layer]))
    with torch.no_grad(), intervene(model, in_all_layers(attend_as_partner)):
        edited = model(torch.cat([inputs(), partners]))
    torch.testing.assert_close(edited[:BATCH], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(edited[BATCH:], alone, rtol=0, atol=1e-5)


def test_partners_of_images_in_windows() -> None:
    """An image's windows, nine and then four, follow each other in the batch."""
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=48, window_size=4, embed_dim=12, depths=(2, 2), num_heads=(2, 2),
        num_classes=3,
    ).eval()  # fmt: skip
    with torch.no_grad():  # attention that differs between images
        for name, parameter in model.named_parameters():
            parameter.mul_(12 if "attn" in name else 1)
    images, partners = torch.randn(2, 2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), capture(model) as attention:
        model(partners)
    clean = {layer.name: layer.weights for layer in attention}
    assert {len(weights) for weights in clean.values()} == {2 * 9, 2 * 4}
    with torch.no_grad():
        with intervene(model, lambda layer, weights: clean[layer.name]):
            expected = model(images)
        with intervene(model, in_all_layers(attend_as_partner)):
            edited = model(torch.cat([images, partners]))[:2]
        plain = model(images)
    torch.testing.assert_close(edited, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(edited, plain, atol=1e-2)


def test_images_without_partners_are_refused() -> None:
    model = Model()
    with pytest.raises(UserError, match="as many partners"), torch.no_grad():
        with intervene(model, in_all_layers(attend_as_partner)):
            model(inputs()[:1])


def test_a_layer_that_only_one_of_several_edits_names_must_be_there() -> None:
    model = Model()
    with pytest.raises(CaptureError, match="no layer 'blocks.7' to edit"):
        with torch.no_grad(), intervene(model, together([switch_off("blocks.0"), switch_off("blocks.7")])):
            model(inputs())


def test_an_edit_of_ones_own_may_have_any_attributes() -> None:
    class Own:
        layer, layers = "blocks.0", ("blocks.7",)

        def __call__(self, layer: AttentionLayer, weights: Tensor) -> Tensor:
            return torch.zeros_like(weights)

    model = Model()
    with torch.no_grad(), intervene(model, Own()):
        edited = model(inputs())
    with torch.no_grad(), intervene(model, together([Own()])):
        assert torch.equal(model(inputs()), edited)
    with torch.no_grad(), intervene(model, in_all_layers(switch_off)):
        assert torch.equal(model(inputs()), edited)


def test_edits_together_are_one_after_the_other() -> None:
    model = Model()
    edit = together([switch_off("blocks.0", 0), make_uniform("blocks.1", 2), switch_off("blocks.0", 2)])
    with torch.no_grad(), intervene(model, edit):
        edited = model(inputs())
    with torch.no_grad(), intervene(model, switch_off("blocks.0", 0)), intervene(model, switch_off("blocks.0", 2)):
        with intervene(model, make_uniform("blocks.1", 2)):
            torch.testing.assert_close(edited, model(inputs()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_a_head_switched_off_is_a_head_removed(way: str) -> None:
    """By zeros in the output projection, and in a model that has one head less."""
    model = Model(way)
    without = copy.deepcopy(model)
    head = slice(1 * DIM, 2 * DIM)
    with torch.no_grad(), intervene(model, switch_off("blocks.0", 1)):
        edited = model(inputs())
    with torch.no_grad():
        without.blocks[0].proj.weight[:, head] = 0
        torch.testing.assert_close(edited, without(inputs()), rtol=0, atol=1e-5)

    tokens, first = inputs(), model.blocks[0]
    kept = [number for number in range(WIDTH) if number not in range(*head.indices(WIDTH))]
    with torch.no_grad():  # two heads are left of the three
        query, key, value = (
            part[..., kept].unflatten(-1, (HEADS - 1, DIM)).transpose(1, 2)
            for part in F.linear(tokens, first.qkv.weight, first.qkv.bias).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        smaller = torch.tanh(tokens + F.linear(mixed, first.proj.weight[:, kept], first.proj.bias))
        torch.testing.assert_close(edited, model.blocks[1](smaller), rtol=0, atol=1e-5)


def edit_in_place(layer: AttentionLayer, weights: Tensor) -> Tensor:
    if layer.index == 0:
        weights[:, 1] = 0
    return weights


def edit_of_the_layers_own(layer: AttentionLayer, weights: Tensor) -> Tensor:
    if layer.index == 0:
        layer.weights[:, 1] = 0
    return layer.weights


@pytest.mark.parametrize("edit", [edit_in_place, edit_of_the_layers_own])
@pytest.mark.parametrize("way", WAYS)
def test_weights_may_be_edited_in_place(way: str, edit: Edit) -> None:
    model = Model(way)
    expected = explicitly(model, inputs(), in_layer(0, torch.zeros_like))
    with intervene(model, edit):
        edited = model(inputs())
    torch.testing.assert_close(edited, expected, rtol=0, atol=1e-5)
    edited.sum().backward()  # the model's own tensors were not written to


@pytest.mark.parametrize("way", WAYS)
def test_an_edited_model_can_be_trained(way: str) -> None:
    """Also queries and keys get their gradients, of the heads that were not edited."""
    model = Model(way).double()
    expected = score_of(explicitly(model, inputs().double(), in_layer(0, moved_keys)))
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    with intervene(model, permute_keys("blocks.0", 1, ORDER)), capture(model) as attention:
        found = torch.autograd.grad(score_of(model(inputs().double())), list(model.parameters()))
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other)
    assert not any(layer.weights.requires_grad or layer.values.requires_grad for layer in attention)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_an_edit_that_changes_nothing_changes_no_bit(way: str, training: bool) -> None:
    model = Model(way, dropout=0.3).train(training)
    torch.manual_seed(3)
    expected = model(inputs())
    state = torch.get_rng_state()
    torch.manual_seed(3)
    with intervene(model, lambda layer, weights: weights):
        assert torch.equal(model(inputs()), expected)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("way", WAYS)
def test_edited_weights_meet_the_dropout_that_the_model_would_have_drawn(way: str) -> None:
    """Weights that are edited to be the same: the random numbers, then and later, are those of the model."""
    model = Model(way, dropout=0.3).train()
    torch.manual_seed(3)
    expected = model(inputs())
    state = torch.get_rng_state()
    torch.manual_seed(3)
    with intervene(model, lambda layer, weights: weights + 0):
        torch.testing.assert_close(model(inputs()), expected, rtol=0, atol=1e-5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_are_edited(dtype: torch.dtype, way: str) -> None:
    model = Model(way)
    expected = explicitly(model, inputs(), in_layer(0, torch.zeros_like))
    model = model.to(dtype)
    seen = []

    def edit(layer: AttentionLayer, weights: Tensor) -> Tensor:
        seen.append(weights.dtype)
        return EDITS["off"][0](layer, weights)

    with torch.no_grad(), intervene(model, edit):
        edited = model(inputs().to(dtype))
    assert edited.dtype == dtype and seen == [torch.float32] * 2
    torch.testing.assert_close(edited.float(), expected, rtol=0, atol=0.1)


@pytest.mark.parametrize("way", WAYS)
def test_an_edit_under_autocast_keeps_its_type(way: str) -> None:
    model = Model(way)
    expected = explicitly(model, inputs(), in_layer(0, torch.zeros_like))
    types = []

    def note(_: nn.Module, given: tuple[Tensor]) -> None:
        types.append(given[0].dtype)

    hooks = [block.proj.register_forward_pre_hook(note) for block in model.blocks]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(inputs())
        with intervene(model, switch_off("blocks.0", 1)):
            edited = model(inputs())
    for hook in hooks:
        hook.remove()
    assert types[:2] == types[2:]
    torch.testing.assert_close(edited.float(), expected, rtol=0, atol=0.1)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_torchs_multihead_attention_is_edited(batch_first: bool, need_weights: bool) -> None:
    class OfTorch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.attention(tokens, tokens, tokens, need_weights=need_weights)[0]

    model = OfTorch().eval()
    without = copy.deepcopy(model)
    tokens = inputs() if batch_first else inputs().transpose(0, 1)
    with torch.no_grad():
        without.attention.out_proj.weight[:, DIM : 2 * DIM] = 0
        with intervene(model, switch_off("attention", 1)):
            torch.testing.assert_close(model(tokens), without(tokens), rtol=0, atol=1e-6)


WRONG: dict[str, Callable[[Tensor], Any]] = {
    "one head": lambda weights: weights[:, :1],
    "no head axis": lambda weights: weights[:, 0],
    "other keys": lambda weights: weights[..., 1:],
    "nothing": lambda weights: None,
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("way", ["fused", "by hand"])
def test_an_edit_of_another_shape_is_refused(way: str, wrong: Callable[[Tensor], Any]) -> None:
    model = Model(way)
    before = state_around(model)
    with pytest.raises(CaptureError, match=r"blocks\.0.*weights of shape \[2, 3, 7, 7\]"):
        with intervene(model, lambda layer, weights: wrong(weights)):
            model(inputs())
    assert state_around(model) == before


def state_around(model: nn.Module) -> list[Any]:
    return [
        torch._C._len_torch_function_stack(),
        [sorted(vars(module)) for module in model.modules()],
        [sum(len(value) for name, value in vars(m).items() if name.endswith("hooks")) for m in model.modules()],
        [module.training for module in model.modules()],
        [parameter.detach().numpy().tobytes() for parameter in model.parameters()],
        [parameter.requires_grad for parameter in model.parameters()],
        torch.get_rng_state().numpy().tobytes(),
        torch.is_grad_enabled(),
    ]


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_left_behind_also_after_an_exception(way: str) -> None:
    model = Model(way, dropout=0.0)
    before, expected = state_around(model), model(inputs())
    with intervene(model, switch_off("blocks.0")):
        model(inputs())
    assert state_around(model) == before and torch.equal(model(inputs()), expected)

    def fail(layer: AttentionLayer, weights: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), intervene(model, fail):
        model(inputs())
    assert state_around(model) == before and torch.equal(model(inputs()), expected)


def test_a_model_without_attention_is_refused() -> None:
    model = nn.Linear(3, 5)
    with pytest.raises(CaptureError, match="no attention of Linear was captured"), intervene(model, edit_in_place):
        model(torch.randn(2, 3))


@pytest.mark.parametrize("name", ["blocks.2", "block", "0", "blocks.0.attn"])
def test_a_layer_that_is_not_there_is_refused_and_those_that_are_named(name: str) -> None:
    model = Model()
    with pytest.raises(CaptureError, match=rf"no layer '{name}' to edit, only blocks\.0, blocks\.1"):
        with torch.no_grad(), intervene(model, switch_off(name)):
            model(inputs())


@pytest.mark.parametrize("permutation", [[0, 1, 2], [0, 0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7]])
def test_what_is_no_permutation_of_the_keys_is_refused(permutation: list[int]) -> None:
    model = Model()
    with pytest.raises(UserError, match="each of the 7 keys"):
        with torch.no_grad(), intervene(model, permute_keys("blocks.0", 1, torch.tensor(permutation))):
            model(inputs())


def test_a_head_that_is_not_there_is_refused() -> None:
    model = Model()
    for head in (3, -1):
        with pytest.raises(UserError, match="blocks.0 has 3 heads: give head=0 to 2"), torch.no_grad():
            with intervene(model, switch_off("blocks.0", head)):
                model(inputs())


def test_a_mean_of_another_shape_is_refused() -> None:
    model = Model()
    with pytest.raises(UserError, match=r"the mean for blocks.0 has shape \[2, 5\], its weights"), torch.no_grad():
        with intervene(model, replace_by_mean("blocks.0", 1, torch.ones(3, 2, 5))):
            model(inputs())


# --- nested ---


@pytest.mark.parametrize("way", WAYS)
def test_two_edits_add_up_in_either_order(way: str) -> None:
    model = Model(way)

    def both(weights: Tensor) -> Tensor:
        return torch.stack([weights[:, 0] * 0, weights[:, 1], weights[:, 2] * 0], dim=1)

    change = normalized(lambda layer, weights: both(weights) if layer == 0 else weights)
    expected = explicitly(model, inputs(), change)
    for first, second in ((0, 2), (2, 0)):
        with torch.no_grad(), intervene(model, switch_off("blocks.0", first)):
            with intervene(model, switch_off("blocks.0", second)):
                torch.testing.assert_close(model(inputs()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_edits_of_different_layers_add_up(way: str) -> None:
    model = Model(way)
    change = normalized(lambda layer, weights: torch.zeros_like(weights))
    with torch.no_grad(), intervene(model, switch_off("blocks.0")), intervene(model, switch_off("blocks.1")):
        torch.testing.assert_close(model(inputs()), explicitly(model, inputs(), change), rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_a_capture_inside_an_intervention_sees_the_edited_weights(way: str) -> None:
    model = Model(way)
    with torch.no_grad(), capture(model) as plain:
        unedited = model(inputs())
    with torch.no_grad(), intervene(model, EDITS["permuted"][0]), capture(model) as attention:
        edited = model(inputs())
    assert not torch.allclose(edited, unedited, atol=1e-2)
    assert [layer.name for layer in attention] == [layer.name for layer in plain]
    torch.testing.assert_close(attention[0].weights[:, 1], moved_keys(plain[0].weights[:, 1]))
    torch.testing.assert_close(attention[0].weights[:, ::2], plain[0].weights[:, ::2])
    assert not torch.allclose(attention[1].weights, plain[1].weights, atol=1e-2)  # it was computed from the edited
    assert attention.reconstruction_error < 1e-5


@pytest.mark.parametrize("way", WAYS)
def test_a_capture_around_an_intervention_sees_what_the_model_had_computed(way: str) -> None:
    model = Model(way)
    with torch.no_grad(), capture(model) as plain:
        model(inputs())
    with torch.no_grad(), capture(model) as attention, intervene(model, EDITS["permuted"][0]):
        model(inputs())
    assert len(attention) == 2
    assert torch.equal(attention[0].weights, plain[0].weights)
    assert not torch.allclose(attention[1].weights, plain[1].weights, atol=1e-2)
    assert attention.reconstruction_error < 1e-5


# --- gradients ---


def gradients_of(model: nn.Module, tokens: Tensor, score: Callable[[Tensor], Tensor]) -> list[Tensor]:
    with capture(model, gradients=True) as attention:
        value = score(model(tokens))
    return list(torch.autograd.grad(value, [layer.weights for layer in attention]))


def explicit_gradients(model: Model, tokens: Tensor, score: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """By autograd through the model written out, from weights that are marked there."""
    marked: list[Tensor] = []

    def mark(layer: int, weights: Tensor) -> Tensor:
        marked.append(weights if weights.requires_grad else weights.requires_grad_())
        return marked[-1]

    value = score(explicitly(model, tokens, normalized(mark)))
    return list(torch.autograd.grad(value, marked))


def score_of(output: Tensor) -> Tensor:
    return (output[:, 0] ** 2 * torch.arange(WIDTH)).sum()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_the_model_written_out(way: str, frozen: bool) -> None:
    model = Model(way).double().requires_grad_(not frozen)
    before = state_around(model)
    found = gradients_of(model, inputs().double(), score_of)
    expected = explicit_gradients(model, inputs().double(), score_of)
    assert len(found) == 2 and all(gradient.abs().max() > 0.1 for gradient in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert state_around(model) == before


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_finite_differences(way: str) -> None:
    model = Model(way).double()
    tokens = inputs().double()
    gradients = gradients_of(model, tokens, score_of)
    generator = torch.Generator().manual_seed(8)
    for number, gradient in enumerate(gradients):
        direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        scores = []
        for step in (1e-5, -1e-5):

            def edit(layer: AttentionLayer, weights: Tensor, step: float = step) -> Tensor:
                return weights + step * direction if layer.index == number else weights  # noqa: B023

            with torch.no_grad(), intervene(model, edit):
                scores.append(float(score_of(model(tokens))))
        assert (scores[0] - scores[1]) / 2e-5 == pytest.approx(float((gradient * direction).sum()), rel=1e-6)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_the_output_and_the_parameters_gradients_are_as_unwatched(way: str, training: bool) -> None:
    model = Model(way, dropout=0.3).double().train(training)
    torch.manual_seed(3)
    expected = model(inputs().double())
    state = torch.get_rng_state()
    gradients = torch.autograd.grad(score_of(expected), list(model.parameters()))
    torch.manual_seed(3)
    with capture(model, gradients=True) as attention:
        output = model(inputs().double())
    assert torch.equal(output, expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert attention[0].weights.requires_grad
    found = torch.autograd.grad(score_of(output), list(model.parameters()))
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_through_the_fused_dropout_are_of_the_dropout_that_was_drawn() -> None:
    found = []
    for way in ("fused", "by hand"):  # on a CPU both draw the same
        torch.manual_seed(3)
        found.append(gradients_of(Model(way, dropout=0.5).double().train(), inputs().double(), score_of))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
        assert (one == 0).float().mean() > 0.3  # dropped weights have no influence


@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_half_precision_models(way: str) -> None:
    model = Model(way, depth=1)
    expected = gradients_of(model, inputs(), score_of)
    half = copy.deepcopy(model).to(torch.float16)
    found = gradients_of(half, inputs().to(torch.float16), lambda output: score_of(output.float()))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert float((one - other).norm() / other.norm()) < 0.1


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_of_torchs_multihead_attention(frozen: bool) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval().requires_grad_(not frozen)
    model = Model("fused", depth=1)
    with torch.no_grad():
        for own, other in (("in_proj", model.blocks[0].qkv), ("out_proj", model.blocks[0].proj)):
            weight = getattr(attention, own).weight if own == "out_proj" else attention.in_proj_weight
            bias = getattr(attention, own).bias if own == "out_proj" else attention.in_proj_bias
            weight.copy_(other.weight)
            bias.copy_(other.bias)
    tokens = inputs()
    with capture(attention, gradients=True) as captured:
        output = torch.tanh(tokens + attention(tokens, tokens, tokens)[0])
    (found,) = torch.autograd.grad(score_of(output), [captured[0].weights])
    torch.testing.assert_close(found, explicit_gradients(model, tokens, score_of)[0], rtol=1e-4, atol=1e-4)


def test_gradients_need_gradients() -> None:
    for mode in (torch.no_grad, torch.inference_mode):
        model = Model()
        with pytest.raises(CaptureError, match="leave out torch.no_grad"), mode(), capture(model, gradients=True):
            model(inputs())


def test_a_consumer_gets_weights_with_gradients() -> None:
    model, kept = Model().double(), []
    with capture(model, consume=lambda layer: kept.append(layer.weights), gradients=True):
        output = model(inputs().double())
    expected = explicit_gradients(model, inputs().double(), score_of)
    for one, other in zip(torch.autograd.grad(score_of(output), kept), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_inside_an_intervention_are_of_the_edited_model() -> None:
    model = Model().double()
    change = in_layer(0, torch.zeros_like)
    with intervene(model, switch_off("blocks.0", 1)):
        found = gradients_of(model, inputs().double(), score_of)
    marked: list[Tensor] = []

    def mark(layer: int, exponentials: Tensor) -> Tensor:
        marked.append(change(layer, exponentials))
        return marked[-1]

    expected = torch.autograd.grad(score_of(explicitly(model, inputs().double(), mark)), marked)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


# --- a forward that is repeated for the backward pass ---


class Checkpointed(Model):
    use_reentrant = False

    def forward(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = checkpoint(block, tokens, use_reentrant=self.use_reentrant)
        return tokens


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_recomputation_is_not_recorded_again(way: str, use_reentrant: bool) -> None:
    plain, model = Model(way), Checkpointed(way)
    model.use_reentrant = use_reentrant
    plain(inputs().requires_grad_()).square().sum().backward()
    seen: list[str] = []
    with capture(model, consume=lambda layer: seen.append(layer.name)):
        model(inputs().requires_grad_()).square().sum().backward()
    assert seen == ["blocks.0", "blocks.1"]
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_and_edits_that_a_recomputation_would_lose_are_refused(use_reentrant: bool) -> None:
    """The backward pass would repeat the block without them."""
    model = Checkpointed()
    model.use_reentrant = use_reentrant
    with pytest.raises(CaptureError, match=r"checkpoint|leave out torch.no_grad"), capture(model, gradients=True):
        model(inputs().requires_grad_())
    with pytest.raises(CaptureError, match=r"blocks\.0 runs under torch.utils.checkpoint"):
        with intervene(model, switch_off("blocks.1", 1)):
            model(inputs().requires_grad_())
