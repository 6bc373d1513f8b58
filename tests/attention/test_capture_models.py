"""Models that others have written: their attention is the one they compute themselves, and watching moves no bit."""

from __future__ import annotations

import copy
import importlib
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers.halo_attn import HaloAttn
from torch import Tensor, nn

from attention_visualizer.attention.capture import AttentionLayer, CapturedAttention, CaptureError, capture
from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.support.errors import UserError
from tests.helpers.models import random_vit

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def spread_out(model: nn.Module, seed: int = 0) -> Any:
    """Random parameters large enough for attention to be far from uniform; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.5 / math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 0.3
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise + 1 if parameter.ndim == 1 and name.endswith("weight") else noise)
    return model.eval()


def pictures(*size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def output_of(result: Any) -> Tensor:
    result = getattr(result, "last_hidden_state", getattr(result, "logits", result))
    return result[0] if isinstance(result, tuple) else result


def run(model: nn.Module, *inputs: Tensor, moves: bool = False, **options: Any) -> CapturedAttention:
    """Checks what holds for all: the same output to the bit (where it is said to), a small error, rows that are shares,
    attention that is not uniform."""
    with torch.no_grad():
        expected = output_of(model(*inputs, **options))
        with capture(model) as attention:
            output = output_of(model(*inputs, **options))
    if moves:
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    else:
        assert torch.equal(output, expected)
    assert all(layer.same_output is not moves for layer in attention)
    assert attention.reconstruction_error < 1e-4
    for layer in attention:
        assert layer.weights.dtype == torch.float32
        assert float(layer.weights.std(dim=-1).mean()) > 1e-3 or layer.weights.shape[-1] == 1
    return attention


def summary(attention: CapturedAttention) -> list[tuple[str, Geometry | None]]:
    return [(layer.name, layer.geometry) for layer in attention]


# --- timm ---

WHOLE = Geometry((2, 3), 0, (16, 16))
TINY: dict[str, Any] = {"img_size": (32, 48), "embed_dim": 24, "depth": 2, "num_heads": 3}
TIMM: dict[str, tuple[str, dict[str, Any], Geometry]] = {
    "class token": ("vit_tiny_patch16_224", {}, Geometry((2, 3), 1, (16, 16))),
    "average": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, WHOLE),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 4}, Geometry((2, 3), 5, (16, 16))),
    "q/k norm": ("vit_tiny_patch16_224", {"qk_norm": True}, Geometry((2, 3), 1, (16, 16))),
    "relative positions": ("vit_relpos_small_patch16_224", {}, WHOLE),
    "distilled": ("deit_tiny_distilled_patch16_224", {}, Geometry((2, 3), 2, (16, 16))),
    "beit": ("beit_base_patch16_224", {}, Geometry((2, 3), 1, (16, 16), class_token="unread")),
    "eva": ("eva02_tiny_patch14_224", {"img_size": (28, 42)}, Geometry((2, 3), 1, (14, 14), class_token="unread")),
}


@pytest.mark.parametrize(("name", "options", "geometry"), TIMM.values(), ids=TIMM.keys())
def test_timms_fused_weights_are_those_of_its_own_unfused_path(
    name: str, options: dict[str, Any], geometry: Geometry
) -> None:
    model = spread_out(timm.create_model(name, **(TINY | options)))
    images = pictures(*options.get("img_size", TINY["img_size"]))
    fused = run(model, images)
    own: list[Tensor] = []
    for block in model.blocks:
        assert block.attn.fused_attn
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _module, _inputs, weights: own.append(weights))
    unfused = run(model, images)
    assert summary(fused) == summary(unfused) == [("blocks.0.attn", geometry), ("blocks.1.attn", geometry)]
    for one, other, expected in zip(fused, unfused, own, strict=False):
        torch.testing.assert_close(one.weights, expected, rtol=0, atol=1e-5)
        assert torch.equal(other.weights, expected)  # the very tensor
    assert {layer.source for layer in fused} == {"rebuilt"} and {layer.source for layer in unfused} == {"multiplied"}
    assert fused[0].projection is model.blocks[0].attn.proj.weight


def hooked(model: nn.Module, name: str) -> list[Tensor]:
    """What the modules of that name put out: attention dropouts and softmaxes are such modules."""
    found: list[Tensor] = []
    for own, module in model.named_modules():
        if own.split(".")[-1] == name:
            module.register_forward_hook(lambda _module, _inputs, output: found.append(output))
    return found


def unfuse(model: nn.Module) -> Any:
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


@pytest.mark.parametrize("fused", [True, False])
def test_timms_attention_pooling_and_registers(fused: bool) -> None:
    model = timm.create_model(
        "vit_base_patch16_siglip_224", img_size=(32, 48), embed_dim=24, depth=1, num_heads=3, reg_tokens=2
    )
    model = spread_out(model if fused else unfuse(model))
    found = summary(run(model, pictures(32, 48)))
    registers = Geometry((2, 3), 2, (16, 16), class_token="absent")
    assert found[0] == ("blocks.0.attn", registers)
    assert found[1][0] == "attn_pool" and found[1][1] in (WHOLE, registers)
    pooled = run(model, pictures(32, 48))[1]
    assert pooled.weights.shape[2] == 1 and pooled.geometry is not None
    assert pooled.geometry.num_tokens == pooled.weights.shape[-1]


def test_timms_swin_in_windows() -> None:
    model = spread_out(
        timm.create_model(
            "swin_tiny_patch4_window7_224",
            img_size=(32, 64),
            window_size=4,
            embed_dim=12,
            depths=(2, 1),
            num_heads=(2, 3),
        )
    )
    own = hooked(unfuse(model), "softmax")
    attention = run(model, pictures(32, 64))
    window = Geometry((8, 16), 0, (4, 4), (4, 4))
    assert summary(attention) == [
        ("layers.0.blocks.0.attn", window),
        ("layers.0.blocks.1.attn", Geometry((8, 16), 0, (4, 4), (4, 4), (2, 2))),
        ("layers.1.blocks.0.attn", Geometry((4, 8), 0, (8, 8), (4, 4))),
    ]
    assert [layer.weights.shape[:2] for layer in attention] == [(16, 2), (16, 2), (4, 3)]
    for layer, expected in zip(attention, own, strict=False):
        assert torch.equal(layer.weights, expected)


def test_a_shifted_window_is_drawn_where_its_patches_are() -> None:
    """A patch whose keys are made to stand out is where the map of its layer is bright: timm's own roll and windows."""
    model = spread_out(
        timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=12, depths=(2,), num_heads=(2,)
        )
    )
    block, row, column = model.layers[0].blocks[1], 5, 1
    marked = torch.zeros(1, 8, 8, 12)
    marked[:, row, column] = torch.randn(12, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        block.attn.qkv.bias.zero_()
        block.attn.qkv.weight[12:24] = 0.0
        block.attn.qkv.weight[24:] = torch.eye(12)
        block.norm1 = nn.Identity()
        with capture(model) as attention:
            model(pictures(32, 32, batch=1))
        geometry = attention[1].geometry
        with capture(block) as alone:
            block(marked)
    assert geometry is not None and geometry.shift == (2, 2)
    values = alone[0].values.abs().sum(dim=(1, 3))  # [window, key]: of the marked patch alone
    assert geometry.to_map(values)[0].nonzero().tolist() == [[row, column]]


def test_timms_cait_with_talking_heads_and_class_attention() -> None:
    model = spread_out(timm.create_model("cait_xxs24_224", **(TINY | {"depth": 1})))
    own = hooked(model, "attn_drop")
    attention = run(model, pictures(32, 48))
    assert summary(attention) == [
        ("blocks.0.attn", WHOLE),
        ("blocks_token_only.0.attn", Geometry((2, 3), 1, (16, 16))),
        ("blocks_token_only.1.attn", Geometry((2, 3), 1, (16, 16))),
    ]
    assert torch.equal(attention[0].weights, own[0])


def test_timms_levit_has_places_behind_its_poolings() -> None:
    """Tokens there are what attention made of others, without a residual connection: they lie where its queries do."""
    model = spread_out(
        timm.create_model(
            "levit_128s", img_size=128, embed_dim=(48, 64, 96), depth=(1, 1, 1), num_heads=(4, 4, 4), key_dim=16
        )
    )
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)):
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        model(pictures(128, 128))  # batch norms measure their input
    found = [geometry for _, geometry in summary(run(model.eval(), pictures(128, 128)))]
    assert found[:4] == [Geometry((8, 8), 0, (16, 16))] * 2 + [Geometry((4, 4), 0, (32, 32))] * 2
    assert found[4] is None  # two rows of tokens: no grid is told from a selection


def test_timms_pyramid_reduces_its_keys() -> None:
    model = spread_out(
        timm.create_model("pvt_v2_b0", embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4))
    )
    for layer in run(model, pictures(128, 160)):
        assert layer.geometry == Geometry((4, 5), 0, (32, 32))


def test_attention_between_channels_has_no_place_on_the_image() -> None:
    """Also with as many channels a head as there are patches in a smaller grid."""
    model = spread_out(
        timm.create_model(
            "xcit_nano_12_p16_224", img_size=(128, 128), embed_dim=16, depth=1, num_heads=4, cls_attn_layers=1
        )
    )
    attention = run(model, pictures(128, 128))
    assert attention[0].weights.shape == (2, 4, 4, 4) and attention[0].geometry is None
    assert attention[1].geometry == Geometry((8, 8), 1, (16, 16))


def test_timms_hybrid_with_a_convolutional_stem() -> None:
    model = spread_out(
        timm.create_model(
            "vit_small_r26_s32_224", img_size=(64, 96), embed_dim=24, depth=1, num_heads=3, pretrained=False
        )
    )
    with torch.no_grad(), capture(model) as attention:
        model(pictures(64, 96))
    # Its group norms and wide convolutions let each token answer to all of so small a picture.
    assert summary(attention) == [("blocks.0.attn", None)]


def test_windows_have_places_and_scattered_ones_and_blocks_of_halos_have_none() -> None:
    maxvit = spread_out(timm.create_model("maxvit_rmlp_pico_rw_256", img_size=64).eval())
    with torch.no_grad(), capture(maxvit) as attention:
        maxvit(pictures(64, 64))
    placed = {layer.name: layer.geometry for layer in attention if layer.geometry is not None}
    for name, geometry in placed.items():
        stage = int(name.split(".")[1])
        window = None if stage == 3 else (2, 2)
        side = 4 * 2**stage
        assert ".attn_block." in name or stage == 3, name
        assert geometry == Geometry((64 // side, 64 // side), 0, (side, side), window=window), name
    assert {name for name in placed if "stages.0" in name} == {f"stages.0.blocks.{n}.attn_block.attn" for n in range(2)}
    halo = HaloAttn(16, num_heads=4, feat_size=(8, 8), block_size=4, halo_size=1, dim_head=4).eval()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.halo = nn.Conv2d(3, 16, 1), halo

        def forward(self, images: Tensor) -> Tensor:
            return self.halo(self.stem(images))

    layer = run(spread_out(Model()), pictures(8, 8))[0]
    assert layer.weights.shape == (2 * 4, 4, 16, 36) and layer.geometry is None


def test_an_image_of_another_size_has_its_own_grid() -> None:
    model = spread_out(timm.create_model("vit_tiny_patch16_224", **TINY, dynamic_img_size=True))
    assert run(model, pictures(48, 64))[0].geometry == Geometry((3, 4), 1, (16, 16))
    images = pictures(16, 96)  # as many patches as stated, in another grid
    assert run(model, images)[0].geometry == Geometry((1, 6), 1, (16, 16))
    with torch.no_grad(), capture(model) as attention:
        model.forward_features(images)
    assert attention[0].geometry == Geometry((1, 6), 1, (16, 16))


# --- torchvision ---


def test_torchvisions_transformer() -> None:
    model = spread_out(
        torchvision.models.VisionTransformer(32, 8, num_layers=2, num_heads=3, hidden_dim=24, mlp_dim=11, num_classes=5)
    )
    attention = run(model, pictures(32, 32))
    names = ["encoder.layers.encoder_layer_0.self_attention", "encoder.layers.encoder_layer_1.self_attention"]
    assert summary(attention) == [(name, Geometry((4, 4), 1, (8, 8))) for name in names]
    inputs: list[Tensor] = []
    for layer in model.encoder.layers:
        layer.self_attention.register_forward_pre_hook(lambda _module, given: inputs.append(given[0]))
    with torch.no_grad():
        model(pictures(32, 32))
        for layer, block, tokens in zip(attention, model.encoder.layers, list(inputs), strict=True):
            own = block.self_attention(tokens, tokens, tokens, average_attn_weights=False)[1]
            torch.testing.assert_close(layer.weights, own, rtol=0, atol=1e-5)
            assert layer.projection is block.self_attention.out_proj.weight


def test_torchvisions_swin() -> None:
    model = spread_out(
        torchvision.models.SwinTransformer([4, 4], 12, [2, 1], [2, 3], [4, 4], num_classes=5, stochastic_depth_prob=0.0)
    )
    attention = run(model, pictures(32, 64))
    assert [layer.geometry for layer in attention] == [
        Geometry((8, 16), 0, (4, 4), (4, 4)),
        Geometry((8, 16), 0, (4, 4), (4, 4), (2, 2)),
        Geometry((4, 8), 0, (8, 8), (4, 4)),
    ]


# --- Hugging Face ---

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 11,
    "image_size": 32,
    "patch_size": 8,
    "attn_implementation": "eager",
}
HUGGING_FACE = {
    "ViT": ({}, 1),
    "DeiT": ({}, 2),
    "Dinov2": ({}, 1),
    "Dinov2WithRegisters": ({"num_register_tokens": 3}, 4),
    "CLIPVision": ({}, 1),
    "SiglipVision": ({}, 0),
}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_faces_weights_are_those_it_puts_out_itself(name: str, implementation: str) -> None:
    transformers = pytest.importorskip("transformers")
    options, prefix = HUGGING_FACE[name]
    config = getattr(transformers, f"{name}Config")(**(SIZES | options))
    model = spread_out(getattr(transformers, f"{name}Model")(config))
    images = pictures(32, 32)
    with torch.no_grad():
        own = model(images, output_attentions=True).attentions
    assert len(own) == 2
    model.set_attn_implementation(implementation)
    attention = run(model, images)
    patches = [layer for layer in attention if layer.weights.shape[2] > 1]  # but for attention pooling
    assert [layer.geometry for layer in patches] == [Geometry((4, 4), prefix, (8, 8))] * 2
    assert [layer.source for layer in patches] == [{"eager": "multiplied", "sdpa": "rebuilt"}[implementation]] * 2
    for number, (layer, expected) in enumerate(zip(patches, own, strict=True)):
        assert f".{number}.attention" in layer.name or f".{number}.self_attn" in layer.name
        torch.testing.assert_close(layer.weights, expected, rtol=0, atol=1e-5)
        assert layer.projection is not None


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_hugging_faces_swin(implementation: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=12, depths=[2, 1], num_heads=[2, 3], window_size=4
    )
    config._attn_implementation = "eager"
    model = spread_out(transformers.SwinModel(config))
    with torch.no_grad():
        own = model(pictures(32, 32), output_attentions=True).attentions
    model.set_attn_implementation(implementation)
    attention = run(model, pictures(32, 32))
    assert [layer.geometry for layer in attention] == [
        Geometry((8, 8), 0, (4, 4), (4, 4)),
        Geometry((8, 8), 0, (4, 4), (4, 4), (2, 2)),
        Geometry((4, 4), 0, (8, 8)),
    ]
    own = [weights for stage in own for weights in (stage if isinstance(stage, tuple | list) else [stage])]
    torch.testing.assert_close(attention[-1].weights, own[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("share", [0.75, 0.0])
def test_patches_that_a_masked_autoencoder_has_shuffled_have_no_place(share: float) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(
        **SIZES,
        mask_ratio=share,
        decoder_hidden_size=24,
        decoder_num_attention_heads=3,
        decoder_num_hidden_layers=1,
        decoder_intermediate_size=11,
    )
    model = spread_out(transformers.ViTMAEForPreTraining(config))
    with torch.no_grad(), capture(model) as attention:
        model(pictures(32, 32))
    assert [layer.geometry for layer in attention if "decoder" not in layer.name] == [None, None]


def test_words_beside_an_image_have_no_place_on_it() -> None:
    """Sixteen of them, and sixteen patches."""
    transformers = pytest.importorskip("transformers")
    tower = {name: value for name, value in SIZES.items() if name not in ("image_size", "patch_size")}
    text = tower | {"vocab_size": 31, "max_position_embeddings": 16, "eos_token_id": 15, "bos_token_id": 14}
    config = transformers.CLIPConfig(text_config=text, vision_config=SIZES, projection_dim=5)
    model = spread_out(transformers.CLIPModel(config))
    words = torch.arange(16).expand(2, 16)
    with torch.no_grad(), capture(model) as attention:
        model(input_ids=words, pixel_values=pictures(32, 32))
    found = {layer.name.split(".")[0]: layer.geometry for layer in attention}
    assert found == {"vision_model": Geometry((4, 4), 1, (8, 8)), "text_model": None}


def test_a_text_model_has_no_geometry() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=31,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=3,
        intermediate_size=11,
        attn_implementation="eager",
    )
    model = spread_out(transformers.BertModel(config))
    tokens = torch.arange(16).expand(2, 16)  # four by four, by chance
    with torch.no_grad():
        own = model(tokens, output_attentions=True).attentions
    attention = run(model, tokens)
    torch.testing.assert_close(attention[0].weights, own[0], rtol=0, atol=1e-5)
    assert attention[0].geometry is None


# --- torch.nn ---

WIDTH, HEADS, TOKENS = 24, 4, 7  # an even number of heads: the fast path takes no other


class OfTorch(nn.Module):
    def __init__(self, batch_first: bool = True, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)
        self.options = options

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        return self.attention(query, key, value, **self.options)


def tokens_of(*shape: int) -> Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(4))


PADDING = torch.tensor([[False] * 5 + [True] * 2, [False] * 7])
CAUSAL = torch.triu(torch.ones(TOKENS, TOKENS, dtype=torch.bool), diagonal=1)
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "padding": {"key_padding_mask": PADDING},
    "float padding": {"key_padding_mask": torch.where(PADDING, -math.inf, 0.0)},
    "mask": {"attn_mask": CAUSAL},
    "mask of each head": {"attn_mask": CAUSAL.expand(2 * HEADS, -1, -1)},
    "float mask": {"attn_mask": torch.where(CAUSAL, -math.inf, 0.3)},
    "causal": {"attn_mask": CAUSAL, "is_causal": True},
    "both": {"attn_mask": CAUSAL, "key_padding_mask": PADDING},
}


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_torchs_multihead_attention(
    mask: dict[str, Any], training: bool, batch_first: bool, need_weights: bool
) -> None:
    model = spread_out(OfTorch(batch_first, need_weights=need_weights, **mask)).train(training)
    tokens = tokens_of(2, TOKENS) if batch_first else tokens_of(TOKENS, 2)
    (layer,) = run(model, tokens, tokens, tokens)
    options = {name: value for name, value in mask.items() if name != "is_causal"}
    with torch.no_grad(), torch.enable_grad():  # its explicit path
        own = model.attention(tokens, tokens, tokens, average_attn_weights=False, **options)[1]
    assert layer.name == "attention" and layer.weights.shape == (2, HEADS, TOKENS, TOKENS)
    torch.testing.assert_close(layer.weights, own.detach(), rtol=0, atol=1e-5)


def test_the_weights_that_multihead_attention_puts_out_are_as_unwatched() -> None:
    model = spread_out(OfTorch(need_weights=True, average_attn_weights=False))
    tokens = tokens_of(2, TOKENS)
    with torch.no_grad():
        expected = model(tokens, tokens, tokens)[1]
        with capture(model):
            found = model(tokens, tokens, tokens)[1]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("need_weights", [False, True])
def test_torchs_multihead_attention_of_one_sequence_and_of_other_keys(need_weights: bool) -> None:
    model = spread_out(OfTorch(need_weights=need_weights))
    single = run(model, tokens_of(TOKENS), tokens_of(5), tokens_of(5))
    assert single[0].weights.shape == (1, HEADS, TOKENS, 5)
    crossed = run(model, tokens_of(2, TOKENS), tokens_of(2, 5), tokens_of(2, 5))
    assert crossed[0].weights.shape == (2, HEADS, TOKENS, 5)
    torch.testing.assert_close(
        crossed[0].weights,
        model.attention(tokens_of(2, TOKENS), tokens_of(2, 5), tokens_of(2, 5), average_attn_weights=False)[1].detach(),
        rtol=0,
        atol=1e-5,
    )


class OfItself(nn.MultiheadAttention):
    def forward(self, tokens: Tensor) -> Any:  # type: ignore[override]
        return super().forward(tokens, tokens, tokens, need_weights=False)


class Direct(nn.Module):
    """Calls it without its hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, tokens: Tensor) -> Any:
        return self.attention.forward(tokens, tokens, tokens)


class Doubling(Direct):
    """By a hook that changes what its attention is given."""

    def __init__(self) -> None:
        super().__init__()
        self.attention.register_forward_pre_hook(lambda _, given: tuple(2 * tokens for tokens in given[:1]) * 3)

    def forward(self, tokens: Tensor) -> Any:
        return self.attention(tokens, tokens, tokens)


@pytest.mark.parametrize("build", [lambda: OfItself(WIDTH, HEADS, batch_first=True), Direct, Doubling])
def test_torchs_multihead_attention_that_is_called_in_another_way(build: Callable[[], nn.Module]) -> None:
    model, tokens = spread_out(build()), tokens_of(2, TOKENS)
    (layer,) = run(model, tokens)
    given = 2 * tokens if isinstance(model, Doubling) else tokens
    attention: Any = getattr(model, "attention", model)
    own = nn.MultiheadAttention.forward(attention, given, given, given, average_attn_weights=False)[1]
    assert own is not None
    torch.testing.assert_close(layer.weights, own.detach(), rtol=0, atol=1e-5)


def encoder(**options: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 11, batch_first=True, **options)
    return spread_out(nn.TransformerEncoder(layer, 2))


def own_weights_of_encoder(model: nn.TransformerEncoder, tokens: Tensor, **options: Any) -> list[Tensor]:
    """Step by step, with its post-norm written out."""
    found = []
    for layer in model.layers:
        attention: Any = layer.self_attn
        mixed, weights = attention(tokens, tokens, tokens, average_attn_weights=False, **options)
        tokens = layer.norm1(tokens + mixed)
        tokens = layer.norm2(tokens + layer.linear2(F.relu(layer.linear1(tokens))))
        found.append(weights.detach())
    return found


def test_torchs_encoder_leaves_its_fast_path_and_says_so() -> None:
    model, tokens = encoder(), tokens_of(2, TOKENS)
    attention = run(model, tokens, moves=True)
    assert [layer.name for layer in attention] == ["layers.0.self_attn", "layers.1.self_attn"]
    for layer, own in zip(attention, own_weights_of_encoder(model, tokens), strict=True):
        torch.testing.assert_close(layer.weights, own, rtol=0, atol=1e-5)


def test_torchs_encoder_with_padding() -> None:
    """What comes out for the padding itself differs: the fast path leaves it out."""
    model, tokens = encoder(), tokens_of(2, TOKENS)
    with torch.no_grad():
        expected = model(tokens, src_key_padding_mask=PADDING)
        with capture(model) as attention:
            output = model(tokens, src_key_padding_mask=PADDING)
    torch.testing.assert_close(output[~PADDING], expected[~PADDING], rtol=0, atol=1e-5)
    assert not any(layer.same_output for layer in attention)
    for layer, own in zip(attention, own_weights_of_encoder(model, tokens, key_padding_mask=PADDING), strict=True):
        torch.testing.assert_close(layer.weights, own, rtol=0, atol=1e-5)
        assert not layer.weights[0, ..., 5:].any()


def test_torchs_encoder_in_training_moves_by_no_bit() -> None:
    model, tokens = encoder(dropout=0.3).train(), tokens_of(2, TOKENS)
    torch.manual_seed(3)
    expected = model(tokens)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    with capture(model) as attention:
        output = model(tokens)
    assert torch.equal(output, expected) and torch.equal(torch.get_rng_state(), state)
    own = own_weights_of_encoder(copy.deepcopy(model).eval(), tokens)
    torch.testing.assert_close(attention[0].weights, own[0], rtol=0, atol=1e-5)
    assert all(layer.same_output for layer in attention)


def test_torchs_decoder() -> None:
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 11, batch_first=True)
    model = spread_out(nn.TransformerDecoder(layer, 2))
    attention = run(model, tokens_of(2, TOKENS), tokens_of(2, 5), tgt_mask=CAUSAL)
    assert [(layer.name, layer.weights.shape[-1]) for layer in attention] == [
        (f"layers.{number}.{name}", keys)
        for number in range(2)
        for name, keys in (("self_attn", TOKENS), ("multihead_attn", 5))
    ]
    assert not attention[0].weights[:, :, CAUSAL].any()


# --- compiled ---


@pytest.fixture
def compilations() -> Iterator[list[Any]]:
    """A backend that runs what it is given as it is, and notes that it did."""
    torch._dynamo.reset()
    yield []
    torch._dynamo.reset()


def compiled_by(notes: list[Any]) -> Callable[..., Any]:
    def backend(graph: Any, inputs: Any) -> Any:
        notes.append("compiled")

        def call(*args: Any) -> Any:
            notes.append("ran")
            return graph(*args)

        return call

    return backend


def two_layers() -> VisionTransformer:
    return random_vit(num_layers=2)


def grey_images() -> Tensor:
    return pictures(15, 15)[:, :1]


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_is_captured_and_stays_compiled(in_place: bool, compilations: list[Any]) -> None:
    model = two_layers()
    images = grey_images()
    with torch.no_grad(), capture(model) as plain:
        model(images)
    compiled: Any = model
    if in_place:
        model.compile(backend=compiled_by(compilations))
    else:
        compiled = torch.compile(model, backend=compiled_by(compilations))
    with torch.no_grad():
        expected = compiled(images)
        assert compilations.count("ran") >= 1
        before = list(compilations)
        with capture(compiled) as attention:
            output = compiled(images)
        assert compilations == before  # the original code ran
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
        assert torch.equal(compiled(images), expected)
    assert compilations.count("ran") == 2 * before.count("ran")
    assert compilations.count("compiled") == before.count("compiled")  # and no new compilation
    assert summary(attention) == summary(plain)
    assert [layer.same_output for layer in attention] == [False, False]
    for one, other in zip(attention, plain, strict=True):
        torch.testing.assert_close(one.weights, other.weights)


def test_a_compiled_part_is_captured_under_its_own_name(compilations: list[Any]) -> None:
    model = two_layers()
    model.blocks[1] = torch.compile(model.blocks[1], backend=compiled_by(compilations))
    with torch.no_grad():
        model(grey_images())
        with capture(model) as attention:
            model(grey_images())
    assert compilations
    assert [layer.name for layer in attention] == ["blocks.0.attn", "blocks.1.attn"]


def stance() -> str:
    return torch._dynamo.eval_frame._stance.stance


def test_compilation_is_switched_on_again_after_exceptions_and_nesting(compilations: list[Any]) -> None:
    model = two_layers()
    compiled: Any = torch.compile(model, backend=compiled_by(compilations))
    assert stance() == "default"
    with torch.no_grad():
        with capture(compiled), capture(compiled):
            assert stance() == "force_eager"
            compiled(grey_images())
        assert stance() == "default"
        with pytest.raises(ZeroDivisionError), capture(compiled):
            raise ZeroDivisionError
        assert stance() == "default"
        with pytest.raises(CaptureError, match="not run inside the block"), capture(compiled):
            pass
        assert stance() == "default"
        compiled(grey_images())
    assert "ran" in compilations


def test_a_compiled_attention_is_captured_under_its_own_name(compilations: list[Any]) -> None:
    model = two_layers()
    model.blocks[1].attn = torch.compile(model.blocks[1].attn, backend=compiled_by(compilations))
    with torch.no_grad(), capture(model) as attention:
        model(grey_images())
    assert [layer.name for layer in attention] == ["blocks.0.attn", "blocks.1.attn"]


def test_two_threads_share_the_setting_until_both_have_ended(compilations: list[Any]) -> None:
    models = [torch.compile(two_layers(), backend=compiled_by(compilations)) for _ in range(2)]
    inside, first_left = threading.Barrier(2, timeout=60), threading.Event()
    found: dict[int, CapturedAttention] = {}

    def work(number: int) -> None:
        with torch.no_grad(), capture(models[number]) as attention:
            inside.wait()
            if number == 1:
                assert first_left.wait(60)  # the other thread's block has ended
            models[number](grey_images())
        found[number] = attention
        if number == 0:
            first_left.set()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert sorted(found) == [0, 1] and all(len(attention) == 2 for attention in found.values())
    assert stance() == "default" and not compilations


def test_torchscript_is_refused() -> None:
    traced = torch.jit.trace(two_layers(), grey_images())
    with pytest.raises(CaptureError, match="TorchScript"), capture(traced):
        pass
    with pytest.raises(CaptureError, match="TorchScript"), capture(nn.Sequential(traced)):
        pass


# --- geometry of models that others have written ---


class Transformer(nn.Module):
    """Takes patches, puts tokens before or behind them, and perhaps leaves some out."""

    def __init__(self, side: int = 8, channels: int = 3, before: str = "", behind: str = "", kept: int | None = None):
        super().__init__()
        self.patch_embed = nn.Conv2d(channels, 12, side, stride=side)
        self.before, self.behind, self.kept = before, behind, kept
        for name in (before, behind):
            if name:
                self.register_parameter(name, nn.Parameter(torch.randn(2 if "reg" in name else 1, 12)))
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch_embed(images).flatten(2).mT[:, : self.kept]
        for name, first in ((self.before, True), (self.behind, False)):
            if name:
                extra = getattr(self, name).expand(len(images), -1, -1)
                tokens = torch.cat([extra, tokens] if first else [tokens, extra], dim=1)
        return self.attention(tokens, tokens, tokens, need_weights=False)[0]


def geometry_of(model: nn.Module, *size: int, channels: int = 3, **options: Any) -> Geometry | None:
    with torch.no_grad(), capture(model, **options) as attention:
        model(torch.randn(2, channels, *size))
    return attention[0].geometry


def test_tokens_before_and_behind_the_patches_are_told_from_them() -> None:
    assert geometry_of(Transformer(before="cls_token"), 32, 24) == Geometry((4, 3), 1, (8, 8))
    behind = Geometry((4, 3), 2, (8, 8), class_token="absent", order=tuple(range(12)))
    assert geometry_of(Transformer(behind="register_tokens"), 32, 24) == behind


def test_a_layer_without_a_place_says_why() -> None:
    (layer,) = run(Transformer(kept=4), pictures(32, 32))
    assert layer.geometry is None and "cover rows 0 to 8 of the image's 32" in str(layer.unplaced)


def test_a_layer_with_a_place_has_no_reason() -> None:
    assert [layer.unplaced for layer in run(Transformer(), pictures(32, 32))] == [None]


def test_patches_that_were_left_out_have_no_places_even_in_a_number_that_would_fit() -> None:
    assert geometry_of(Transformer(), 32, 32) == Geometry((4, 4), 0, (8, 8))
    assert geometry_of(Transformer(kept=7), 32, 32) is None
    assert geometry_of(Transformer(kept=4), 32, 32) is None  # two by two of twice the size


@pytest.mark.parametrize("channels", [2, 5, 12])
def test_images_of_any_number_of_channels(channels: int) -> None:
    model = Transformer(channels=channels, before="cls_token")
    assert geometry_of(model, 32, 24, channels=channels) == Geometry((4, 3), 1, (8, 8))


def test_a_given_geometry_is_checked() -> None:
    model = Transformer(before="register_tokens")
    with pytest.raises(UserError, match=r"9 tokens \(1 before a grid of 4 x 2\), but the model's layers have 14"):
        geometry_of(model, 32, 24, geometry=Geometry((4, 2), 1, (8, 8)))
    given = Geometry((4, 3), 2, (8, 8))
    found = geometry_of(model, 32, 24, geometry=given)
    assert found == given and found.evidence == "given and confirmed"
    for wrong in (Geometry((2, 7), 0, (8, 8)), Geometry((4, 3), 2, (8, 4)), Geometry((3, 4), 2, (8, 8))):
        with pytest.raises(UserError, match=r"but measured on attention it is 4 x 3 patches of 8 x 8 pixels"):
            geometry_of(model, 32, 24, geometry=wrong)
    with pytest.raises(UserError, match="among 2 other tokens, in another order"):
        geometry_of(Transformer(behind="register_tokens"), 32, 24, geometry=given)


def test_a_given_geometry_that_fits_some_layers_is_not_given_to_the_others() -> None:
    model = spread_out(timm.create_model("cait_xxs24_224", **(TINY | {"depth": 1})))
    with torch.no_grad(), capture(model, geometry=Geometry((2, 3), 0, (16, 16))) as attention:
        model(pictures(32, 48))
    assert [layer.geometry for layer in attention] == [Geometry((2, 3), 0, (16, 16)), None, None]
    assert attention[1].unplaced == "the given geometry has 6 tokens, the layer 7 keys"


def test_layers_handed_over_have_their_geometry() -> None:
    seen: list[AttentionLayer] = []
    model = Transformer(before="cls_token")
    with torch.no_grad(), capture(model, consume=seen.append):
        model(pictures(32, 24))
    assert [layer.geometry for layer in seen] == [Geometry((4, 3), 1, (8, 8))]


def test_the_package_and_its_function_have_the_same_name() -> None:
    assert importlib.import_module("attention_visualizer").capture is capture


class Decoder(nn.Module):
    """Object queries look at each other, as in DETR: sixteen of them are no grid. Then they look at the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, stride=2)
        self.queries = nn.Parameter(torch.randn(1, 16, 8))
        self.layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images).flatten(2).mT
        return self.layer(self.queries.expand(len(images), -1, -1), features)


def test_object_queries_have_no_place_on_the_image_and_what_they_look_at_has() -> None:
    attention = run(spread_out(Decoder()), pictures(32, 32))
    assert [layer.name for layer in attention] == ["layer.self_attn", "layer.multihead_attn"]
    assert [layer.geometry for layer in attention] == [None, Geometry((16, 16), 0, (2, 2))]
    assert attention[0].unplaced == "its keys answer to no part of the picture"
