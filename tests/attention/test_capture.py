"""What is captured is the model's own attention, and capturing it changes nothing."""

from __future__ import annotations

import copy
import math
import threading
import weakref
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import timm.models.vision_transformer as timm_vit
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from attention_visualizer.attention import calls, layer_geometry, policies, proof, recording
from attention_visualizer.attention.capture import AttentionLayer, CapturedAttention, CaptureError, capture, intervene
from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.attention.hand_written import HandWrittenAttention
from attention_visualizer.attention.places import is_measuring
from attention_visualizer.models.vision_transformer import VisionTransformer
from tests.helpers.models import HandWritten, random_vit

BATCH, LAYERS, HEADS, TOKENS, HEAD_DIM = 2, 5, 3, 26, 7  # 5 x 5 patches and the class token


def images(batch: int = BATCH, seed: int = 1) -> Tensor:
    return torch.randn(batch, 1, 15, 15, generator=torch.Generator().manual_seed(seed))


def run(model: nn.Module, *inputs: Tensor) -> CapturedAttention:
    with torch.no_grad(), capture(model) as attention:
        model(*(inputs or (images(),)))
    return attention


def blocks_of(model: Any) -> list[Any]:
    return list(model.blocks)


def inputs_of_attention(model: VisionTransformer) -> list[Tensor]:
    """What each block's attention is given, by the model's own steps: [batch, token, embed] a layer."""
    found = []
    with torch.no_grad():
        tokens = model.embed(images())
        for block in blocks_of(model):
            found.append(block.norm1(tokens))
            tokens = block(tokens)
    return found


# --- the weights are the real ones ---


def test_weights_equal_an_explicit_softmax_of_the_models_own_projections() -> None:
    model = random_vit()
    attention = run(model)
    assert len(attention) == LAYERS
    for layer, block, tokens in zip(attention, blocks_of(model), inputs_of_attention(model), strict=True):
        assert layer.weights.shape == (BATCH, HEADS, TOKENS, TOKENS)
        assert layer.values.shape == (BATCH, HEADS, TOKENS, HEAD_DIM)
        matrix = block.attn.qkv.weight.detach().double().numpy()
        bias = block.attn.qkv.bias.detach().double().numpy()
        for image, head in product(range(BATCH), range(HEADS)):
            query, key, value = (
                tokens[image].double().numpy() @ matrix[rows].T + bias[rows]
                for start in (0, HEADS * HEAD_DIM, 2 * HEADS * HEAD_DIM)
                for rows in (slice(start + head * HEAD_DIM, start + (head + 1) * HEAD_DIM),)
            )
            expected = np.exp(query @ key.T / math.sqrt(HEAD_DIM))
            expected /= expected.sum(axis=1, keepdims=True)
            np.testing.assert_allclose(layer.weights[image, head], expected, atol=1e-5)
            np.testing.assert_allclose(layer.values[image, head], value, atol=1e-5)


def test_weights_equal_those_of_torchs_multihead_attention() -> None:
    model = random_vit()
    attention = run(model)
    for layer, block, tokens in zip(attention, blocks_of(model), inputs_of_attention(model), strict=True):
        reference = nn.MultiheadAttention(HEADS * HEAD_DIM, HEADS, batch_first=True).eval()
        reference.load_state_dict(
            {
                "in_proj_weight": block.attn.qkv.weight,
                "in_proj_bias": block.attn.qkv.bias,
                "out_proj.weight": block.attn.proj.weight,
                "out_proj.bias": block.attn.proj.bias,
            }
        )
        with torch.no_grad():
            output, weights = reference(tokens, tokens, tokens, need_weights=True, average_attn_weights=False)
            mixed = (layer.weights @ layer.values).transpose(1, 2).flatten(2)
            torch.testing.assert_close(block.attn.proj(mixed), output, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.weights, weights, rtol=0, atol=1e-5)


def test_weights_equal_timms_unfused_ones_also_with_registers() -> None:
    model = timm_vit.VisionTransformer(
        img_size=(9, 15), patch_size=3, in_chans=1, embed_dim=21, depth=3, num_heads=3, num_classes=7, reg_tokens=4
    ).eval()
    attention = run(model, torch.randn(2, 1, 9, 15))
    assert [layer.name for layer in attention] == ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]
    assert attention[0].geometry == Geometry((3, 5), 5, (3, 3))

    unfused: list[Tensor] = []
    for block in blocks_of(model):
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _module, _inputs, weights: unfused.append(weights))
    torch.manual_seed(0)
    inputs = torch.randn(2, 1, 9, 15)
    with torch.no_grad():
        model(inputs)
    for block in blocks_of(model):
        block.attn.fused_attn = True
    for layer, expected in zip(run(model, inputs), unfused, strict=True):
        torch.testing.assert_close(layer.weights, expected, rtol=0, atol=1e-5)


class Recording(nn.Module):
    """Calls the fused attention with options of every kind."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, **self.options)


def plain_weights(
    query: Tensor, key: Tensor, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> NDArray[np.float64]:
    """Row by row in float64. Heads of `query` share those of `key` in turn: [batch, head, query, key]."""
    batch, heads, num_queries, head_dim = query.shape
    num_keys, group = key.shape[2], heads // key.shape[1]
    weights = np.zeros((batch, heads, num_queries, num_keys))
    bias = torch.zeros(num_queries, num_keys) if mask is None else mask
    bias = torch.where(bias, 0.0, -math.inf) if bias.dtype == torch.bool else bias
    bias = bias.expand(batch, heads, num_queries, num_keys)
    for image, head, i in product(range(batch), range(heads), range(num_queries)):
        scores = [
            float(query[image, head, i].double() @ key[image, head // group, j].double())
            * (1 / math.sqrt(head_dim) if scale is None else scale)
            + float(bias[image, head, i, j])
            if not (causal and j > i)
            else -math.inf
            for j in range(num_keys)
        ]
        exponentials = np.exp(np.array(scores) - max(scores))
        weights[image, head, i] = exponentials / exponentials.sum()
    return weights


def random_mask(*shape: int) -> Tensor:
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(5)) < 0.6
    mask[..., 0] = True  # each query may look at something
    return mask


OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "scale": {"scale": 0.83},
    "causal": {"is_causal": True},
    "bool mask": {"attn_mask": random_mask(5, 7)},
    "bool mask for each image": {"attn_mask": random_mask(2, 1, 1, 7)},
    "bool mask for each head": {"attn_mask": random_mask(2, 6, 5, 7)},
    "float mask": {"attn_mask": torch.linspace(-3, 2, 35).view(5, 7)},
    "float mask with scale": {"attn_mask": torch.linspace(-3, 2, 35).view(5, 7), "scale": 0.31},
    "grouped": {"enable_gqa": True},
    "grouped, causal, scale": {"enable_gqa": True, "is_causal": True, "scale": 1.3},
    "grouped with a mask for each head": {"enable_gqa": True, "attn_mask": random_mask(2, 6, 5, 7)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_weights_follow_every_option_of_the_fused_attention(options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(3)
    key_heads = 2 if options.get("enable_gqa") else 6
    query = torch.randn(2, 6, 5, 11, generator=generator)
    key = torch.randn(2, key_heads, 7, 11, generator=generator)
    value = torch.randn(2, key_heads, 7, 13, generator=generator)
    layer = run(Recording(**options), query, key, value)[0]
    expected = plain_weights(
        query, key, options.get("attn_mask"), options.get("is_causal", False), options.get("scale")
    )
    np.testing.assert_allclose(layer.weights, expected, atol=1e-6)
    assert layer.values.shape == (2, 6, 7, 13)
    assert 0 <= layer.error < 1e-5


def test_arguments_may_be_named_or_in_order() -> None:
    class Positional(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(query, key, value, None, 0.5, True, scale=0.4)

    class Named(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(
                query=query, key=key, value=value, dropout_p=0.5, is_causal=True, scale=0.4
            )

    qkv = [torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    expected = plain_weights(qkv[0], qkv[1], causal=True, scale=0.4)
    for model in (Positional(), Named()):
        np.testing.assert_allclose(run(model, *qkv)[0].weights, expected, atol=1e-6)


def test_a_query_that_may_look_at_nothing_attends_to_nothing() -> None:
    """The fused attention gives it zeros, as in a batch with padding."""
    mask = random_mask(5, 7)
    mask[3] = False
    query, key = torch.randn(2, 3, 5, 11), torch.randn(2, 3, 7, 11)
    layer = run(Recording(attn_mask=mask), query, key, key)[0]
    assert not layer.weights[:, :, 3].any()
    np.testing.assert_allclose(layer.weights[:, :, :3].sum(dim=-1), 1.0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 5e-2)])
def test_half_precision_models_give_float32_weights(dtype: torch.dtype, tolerance: float) -> None:
    expected = run(random_vit())
    attention = run(random_vit().to(dtype), images().to(dtype))
    for layer in attention:
        assert layer.weights.dtype == torch.float32 and layer.values.dtype == torch.float32
        np.testing.assert_allclose(layer.weights.sum(dim=-1), 1.0, atol=1e-5)
    torch.testing.assert_close(attention[0].weights, expected[0].weights, rtol=0, atol=tolerance)
    assert len(attention) == LAYERS


def test_autocast_gives_float32_weights() -> None:
    model = random_vit()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), capture(model) as attention:
        logits = model(images())
        assert torch.is_autocast_enabled("cpu")
    assert logits.dtype == torch.bfloat16
    for layer in attention:
        assert layer.weights.dtype == torch.float32
        np.testing.assert_allclose(layer.weights.sum(dim=-1), 1.0, atol=1e-5)
    torch.testing.assert_close(attention[0].weights, run(model)[0].weights, rtol=0, atol=0.05)


def test_weights_come_before_dropout() -> None:
    """Rows of weights taken after dropout would not sum to one; the same seed gives the weights of eval mode."""
    model = random_vit(dropout=0.0, attention_dropout=0.5)
    expected = run(model)
    attention = run(model.train())
    for layer in attention:
        np.testing.assert_allclose(layer.weights.sum(dim=-1), 1.0, atol=1e-5)
        assert layer.error < 1e-4
    torch.testing.assert_close(attention[0].weights, expected[0].weights)  # later layers see what was dropped
    assert not torch.allclose(attention[1].weights, expected[1].weights, atol=1e-2)


def test_the_measured_error_is_that_of_the_reconstruction() -> None:
    model = random_vit()
    outputs = []
    fused = F.scaled_dot_product_attention
    with torch.no_grad():
        for block, tokens in zip(blocks_of(model), inputs_of_attention(model), strict=True):
            query, key, value = block.attn.qkv(tokens).view(BATCH, TOKENS, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
            outputs.append(fused(query, key, value))
    attention = run(model)
    for layer, output in zip(attention, outputs, strict=True):
        assert layer.error == pytest.approx(float((layer.weights @ layer.values - output).abs().max()), abs=1e-6)
        assert layer.error < 1e-4
    assert attention.reconstruction_error == max(layer.error for layer in attention)


# --- models built of torch's own attention ---


def test_torchs_multihead_attention_is_seen() -> None:
    class OfTorch(nn.Module):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(HEADS * HEAD_DIM, HEADS, batch_first=True)
            self.options = options

        def forward(self, tokens: Tensor) -> Tensor:
            return self.attention(tokens, tokens, tokens, **self.options)[0]

    torch.manual_seed(0)
    tokens = torch.randn(BATCH, 11, HEADS * HEAD_DIM)
    for need_weights in (False, True):
        model = OfTorch(need_weights=need_weights).eval()
        with torch.no_grad():
            _, expected = model.attention(tokens, tokens, tokens, average_attn_weights=False)
        attention = run(model, tokens)
        assert [layer.name for layer in attention] == ["attention"]
        torch.testing.assert_close(attention[0].weights, expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_torchs_transformer_encoder_is_seen() -> None:
    layer = nn.TransformerEncoderLayer(HEADS * HEAD_DIM, HEADS, 11, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    attention = run(model, torch.randn(BATCH, 11, HEADS * HEAD_DIM))
    assert [layer.weights.shape for layer in attention] == [(BATCH, HEADS, 11, 11)] * 2
    assert [layer.name.split(".")[:2] for layer in attention] == [["layers", "0"], ["layers", "1"]]


# --- what cannot be trusted is refused ---

WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "keys in another order": lambda weights: weights.flip(-1),
    "queries in another order": lambda weights: weights.roll(1, dims=-2),
    "heads in another order": lambda weights: weights.roll(1, dims=1),
    "images in another order": lambda weights: weights.flip(0),
    "uniform": lambda weights: torch.full_like(weights, 1 / weights.shape[-1]),
    "averaged over heads": lambda weights: weights.mean(dim=1, keepdim=True).expand_as(weights),
    "not a number": lambda weights: weights * math.nan,
    "infinite": lambda weights: weights * math.inf,
    "one per cent too large": lambda weights: weights * 1.01,
}


@pytest.mark.parametrize("magnitude", [1.0, 1e-6, 1e4], ids=["values", "small values", "large values"])
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_weights_that_do_not_reproduce_the_output_are_refused(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Tensor], Tensor], magnitude: float
) -> None:
    """The bound is relative to the values, so small values are no excuse."""
    rebuild = calls.attention_weights

    def rebuild_wrongly(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        weights, values = rebuild(*args, **kwargs)
        return wrong(weights), values

    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(2, 3, 5, 7, generator=generator) for _ in range(3))
    assert run(Recording(), query, key, value * magnitude)[0].error < 1e-5 * magnitude  # the right ones pass
    monkeypatch.setattr(calls, "attention_weights", rebuild_wrongly)
    with pytest.raises(CaptureError, match="do not reproduce|is not finite"):
        run(Recording(), query, key, value * magnitude)


def test_a_refusal_names_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    rebuild = calls.attention_weights
    rebuilt = []

    def third_is_wrong(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        weights, values = rebuild(*args, **kwargs)
        if is_measuring():
            return weights, values
        rebuilt.append(args)
        return (weights.flip(-1) if len(rebuilt) == 3 else weights), values

    monkeypatch.setattr(calls, "attention_weights", third_is_wrong)
    with pytest.raises(CaptureError, match=r"blocks\.2\.attn"):
        run(random_vit())


def test_no_attention_seen_is_an_error_that_names_the_model() -> None:
    with pytest.raises(CaptureError, match="no attention of Linear was captured"):
        run(nn.Linear(3, 5), torch.randn(2, 3))
    with pytest.raises(CaptureError, match="not run inside the block"), capture(random_vit()):
        pass


def test_an_error_inside_the_block_is_not_replaced() -> None:
    with pytest.raises(ZeroDivisionError), capture(random_vit()):
        raise ZeroDivisionError


# --- capturing changes nothing ---


def state_around(model: nn.Module) -> dict[str, Any]:
    """All that a capture could leave behind."""
    return {
        "modes": torch._C._len_torch_function_stack(),
        "hooks": [
            {name: len(value) for name, value in vars(module).items() if name.endswith("hooks")}
            for module in model.modules()
        ],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "training": [module.training for module in model.modules()],
        "weights": [parameter.detach().clone().numpy().tobytes() for parameter in model.parameters()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "random": torch.get_rng_state().numpy().tobytes(),
        "gradients on": torch.is_grad_enabled(),
        "autocast on": torch.is_autocast_enabled("cpu"),
        "fused": (id(F.scaled_dot_product_attention), torch.backends.cuda.flash_sdp_enabled()),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
    }


def fail(_: AttentionLayer) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("training", [False, True])
def test_outputs_gradients_and_random_numbers_are_the_same_to_the_bit(training: bool) -> None:
    model = random_vit(dropout=0.2, attention_dropout=0.3).train(training)
    watched = copy.deepcopy(model)
    torch.manual_seed(11)
    logits = model(images())
    logits.square().sum().backward()
    after = torch.get_rng_state()
    torch.manual_seed(11)
    with capture(watched) as attention:
        watched_logits = watched(images())
        watched_logits.square().sum().backward()
    assert len(attention) == LAYERS
    assert torch.equal(logits, watched_logits)
    assert torch.equal(after, torch.get_rng_state())
    for parameter, other in zip(model.parameters(), watched.parameters(), strict=True):
        assert parameter.grad is not None and other.grad is not None and torch.equal(parameter.grad, other.grad)
    assert not any(layer.weights.requires_grad for layer in attention)  # holds on to no graph


@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_left_behind(training: bool) -> None:
    model = random_vit(dropout=0.0).train(training)
    model.blocks[1].eval()  # flags that differ must stay different
    before = state_around(model)
    with capture(model):
        model(images())
    assert state_around(model) == before


def test_nothing_is_left_behind_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_vit()
    before = state_around(model)
    with pytest.raises(ZeroDivisionError), capture(model):  # in the block
        model(images())
        raise ZeroDivisionError
    assert state_around(model) == before
    with pytest.raises(ZeroDivisionError), capture(model, consume=fail):  # in the consumer
        model(images())
    assert state_around(model) == before
    with pytest.raises(ValueError), capture(model):  # in the model
        model(torch.zeros(2, 3, 4))
    assert state_around(model) == before
    monkeypatch.setitem(proof.ERROR_BOUND, torch.float32, -1.0)
    with pytest.raises(CaptureError), capture(model):  # in the proof
        model(images())
    assert state_around(model) == before


def test_captures_nest() -> None:
    model = random_vit()
    expected = run(model)
    before = state_around(model)
    with torch.no_grad(), capture(model) as outer:
        with capture(model) as inner:
            model(images())
        assert torch._C._len_torch_function_stack() == 1
    for attention in (outer, inner):
        assert [layer.name for layer in attention] == [layer.name for layer in expected]
        assert all(torch.equal(layer.weights, other.weights) for layer, other in zip(attention, expected, strict=True))
    assert state_around(model) == before


def test_nested_captures_see_each_layer_once_also_with_dropout() -> None:
    """The inner one's comparison without dropout is no attention of the model."""
    model = random_vit(attention_dropout=0.3).train()
    with torch.no_grad(), capture(model) as outer, capture(model) as inner:
        model(images())
    assert [layer.name for layer in inner] == [f"blocks.{number}.attn" for number in range(LAYERS)]
    assert [layer.name for layer in outer] == [layer.name for layer in inner]


def test_threads_see_their_own_model_only() -> None:
    models = [random_vit(seed, num_layers=depth) for seed, depth in ((1, 2), (2, 3))]
    expected = [run(model) for model in models]
    found: list[list[CapturedAttention]] = [[], []]
    both_inside = threading.Barrier(2, timeout=20)

    def work(number: int) -> None:
        for _ in range(3):
            with torch.no_grad(), capture(models[number]) as attention:
                both_inside.wait()
                models[number](images())
                both_inside.wait()
            found[number].append(attention)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for number in range(2):
        assert len(found[number]) == 3
        for attention in found[number]:
            assert len(attention) == (2, 3)[number]
            for layer, other in zip(attention, expected[number], strict=True):
                assert torch.equal(layer.weights, other.weights)
    assert torch._C._len_torch_function_stack() == 0


def test_another_models_attention_is_not_taken_for_this_ones() -> None:
    model, other = random_vit(1), random_vit(2)
    expected = run(model)
    with torch.no_grad(), capture(model) as attention:
        model(images())
        other(images())
        Recording()(*(torch.randn(2, 3, 5, 7) for _ in range(3)))
    assert len(attention) == LAYERS
    assert all(torch.equal(layer.weights, own.weights) for layer, own in zip(attention, expected, strict=True))
    with pytest.raises(CaptureError, match="no attention"), capture(model):
        other(images())


# --- streaming ---


def test_a_consumer_gets_each_layer_in_order_and_nothing_is_kept() -> None:
    model = random_vit()
    kept = run(model)
    seen: list[tuple[str, int, Tensor]] = []
    references: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def consume(layer: AttentionLayer) -> None:
        references.append(weakref.ref(layer.weights))
        seen.append((layer.name, layer.index, layer.weights.sum(dim=(0, 1))))
        alive.append(sum(reference() is not None for reference in references))

    with torch.no_grad(), capture(model, consume=consume) as attention:
        model(images())
    assert alive == [1] * LAYERS  # never more than the layer in hand
    assert [reference() for reference in references] == [None] * LAYERS
    assert len(attention) == 0 and list(attention) == []
    assert attention.reconstruction_error == kept.reconstruction_error
    for (name, index, summed), layer in zip(seen, kept, strict=True):
        assert (name, index) == (layer.name, layer.index)
        assert torch.equal(summed, layer.weights.sum(dim=(0, 1)))


def test_a_consumer_sees_every_pass() -> None:
    model, indices = random_vit(), []
    with torch.no_grad(), capture(model, consume=lambda layer: indices.append(layer.index)):
        model(images())
        model(images(3))
    assert indices == [*range(LAYERS), *range(LAYERS)]


# --- names, order, passes ---


def test_layers_are_found_by_number_and_by_name() -> None:
    attention = run(random_vit(num_layers=11))
    assert [layer.name for layer in attention] == [f"blocks.{number}.attn" for number in range(11)]
    assert [layer.index for layer in attention] == list(range(11))
    assert attention["blocks.3"] is attention["blocks.3.attn"] is attention[3]
    assert attention["blocks.1"] is attention[1]  # and not one of blocks.10
    assert attention[-1] is attention["blocks.10"]
    for key in ("blocks", "blocks.11", "", "attn"):
        with pytest.raises(KeyError, match=r"blocks\.0\.attn, blocks\.1\.attn"):
            attention[key]
    with pytest.raises(IndexError):
        attention[11]


def test_names_are_those_inside_the_captured_model() -> None:
    model = random_vit(num_layers=2)
    attention = run(nn.Sequential(nn.Identity(), model))
    assert [layer.name for layer in attention] == ["1.blocks.0.attn", "1.blocks.1.attn"]
    assert [layer.name for layer in run(model.blocks[1], torch.randn(2, TOKENS, HEADS * HEAD_DIM))] == ["attn"]


def test_the_geometry_is_the_models_or_the_one_given() -> None:
    model = random_vit(num_layers=2)
    assert all(layer.geometry == Geometry((5, 5), 1, (3, 3)) for layer in run(model))
    given = Geometry((5, 5), 1, (3, 3), class_token="unread")
    with torch.no_grad(), capture(model, geometry=given) as attention:
        model(images())
    assert [layer.geometry for layer in attention] == [given, given]
    unknown = run(Recording(), *(torch.randn(2, 3, 5, 7) for _ in range(3)))
    assert unknown[0].geometry is None


def test_of_two_passes_the_last_is_kept() -> None:
    model = random_vit()
    with torch.no_grad(), capture(model) as attention:
        model(images(3, seed=1))
        model(images(7, seed=2))
    expected = run(model, images(7, seed=2))
    assert len(attention) == LAYERS
    for layer, other in zip(attention, expected, strict=True):
        assert torch.equal(layer.weights, other.weights)
    first = run(model, images(3, seed=1))
    assert attention.reconstruction_error == max(first.reconstruction_error, expected.reconstruction_error)


def test_a_block_that_is_applied_three_times_gives_three_layers() -> None:
    """Models that share weights between layers, such as ALBERT, call one module again and again."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = random_vit(num_layers=1).blocks[0]

        def forward(self, tokens: Tensor) -> Tensor:
            return self.block(self.block(self.block(tokens)))

    model = Shared().eval()
    tokens = torch.randn(2, 11, HEADS * HEAD_DIM, generator=torch.Generator().manual_seed(0))
    expected = []
    with torch.no_grad():
        current = tokens
        for _ in range(3):
            expected.append(run(model.block, current)[0].weights)
            current = model.block(current)
    attention = run(model, tokens)
    assert [layer.index for layer in attention] == [0, 1, 2]
    for layer, weights in zip(attention, expected, strict=True):
        torch.testing.assert_close(layer.weights, weights)


def test_an_empty_batch_has_empty_maps() -> None:
    attention = run(random_vit(), images(0))
    assert [layer.weights.shape for layer in attention] == [(0, HEADS, TOKENS, TOKENS)] * LAYERS


def test_parts_that_are_called_one_by_one_are_one_pass() -> None:
    """Until a part comes again, which begins another."""
    model = random_vit(num_layers=3)
    expected = run(model)
    with torch.no_grad(), capture(model) as attention:
        for batch in (images(3), images()):
            tokens = model.embed(batch)
            for block in blocks_of(model):
                tokens = block(tokens)
    assert [(layer.name, layer.index) for layer in attention] == [(layer.name, layer.index) for layer in expected]
    for layer, other in zip(attention, expected, strict=True):
        torch.testing.assert_close(layer.weights, other.weights)
    assert [layer.name for layer in attention[1:]] == ["blocks.1.attn", "blocks.2.attn"]


# --- failures of capturing itself ---

FAILURES = {
    "a fault": AttributeError("'NoneType' object has no attribute 'shape'"),
    "an error of PyTorch": RuntimeError("shape mismatch\nand a second line"),
    "no memory on the GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "no memory on the CPU": RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"),
    "no memory for Python": MemoryError(),
}
PLACES: dict[str, tuple[Any, str, dict[str, bool]]] = {
    "reading the call stack": (recording, "calling_stack", {}),
    "rebuilding the weights": (calls, "attention_weights", {}),
    "finding the place": (layer_geometry.GeometryFinder, "of_layer", {}),
    "repeating for gradients": (policies.CaptureWithGradients, "replay", {"gradients": True}),
}


def raising(error: Exception) -> Callable[..., Any]:
    def fail_with(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail_with


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES.keys())
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
def test_a_failure_of_capturing_is_one_error_that_names_layer_and_cause(
    monkeypatch: pytest.MonkeyPatch, place: tuple[Any, str, dict[str, bool]], failure: Exception
) -> None:
    owner, name, options = place
    model = random_vit()
    before = state_around(model)
    monkeypatch.setattr(owner, name, raising(failure))
    message = rf"^the attention of blocks\.0\.attn could not be captured: {type(failure).__name__}: "
    with pytest.raises(CaptureError, match=message) as caught, capture(model, **options):
        model(images())
    assert caught.value.__cause__ is failure and "\n" not in str(caught.value)
    assert state_around(model) == before


@pytest.mark.parametrize("step", ["before", "after"])
def test_a_failure_of_tracking_is_one_error(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    failure = AttributeError("no such thing")
    monkeypatch.setattr(HandWrittenAttention, step, raising(failure))
    with pytest.raises(CaptureError, match="^the attention of HandWritten could not .*: no such thing") as caught:
        run(HandWritten(), images())
    assert caught.value.__cause__ is failure


def test_a_failure_outside_all_layers_names_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "GeometryFinder", raising(AttributeError("no such thing")))
    with pytest.raises(CaptureError, match=r"of VisionTransformer could .*: AttributeError: no such thing"):
        run(random_vit())


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES.keys())
def test_what_the_model_and_the_users_code_raise_passes_through(failure: Exception) -> None:
    model, error = random_vit(), type(failure)
    with pytest.raises(error) as caught, capture(model, consume=raising(failure)):
        model(images())
    assert caught.value is failure
    with pytest.raises(error) as caught, intervene(model, raising(failure)):
        model(images())
    assert caught.value is failure
    model.blocks[1].attn.proj.forward = raising(failure)
    with pytest.raises(error) as caught, capture(model):
        model(images())
    assert caught.value is failure


def test_a_wrong_call_of_the_model_keeps_its_error() -> None:
    query, key, value = torch.randn(2, 3, 5, 7), torch.randn(2, 3, 5, 11), torch.randn(2, 3, 5, 7)
    with pytest.raises(RuntimeError) as expected:
        Recording()(query, key, value)
    model = Recording()
    with pytest.raises(RuntimeError) as caught, capture(model):
        model(query, key, value)
    assert type(caught.value) is type(expected.value) and str(caught.value) == str(expected.value)
    by_hand = HandWritten()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), capture(by_hand):
        by_hand(torch.randn(2, 3, 15, 15))
