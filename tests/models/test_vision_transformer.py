"""The model is timm's Vision Transformer to rounding, and refuses sizes that make no model."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pytest
import timm.models.vision_transformer as timm_vit
import torch
import torch.nn.functional as F
from torch import nn

from attention_visualizer.models.vision_transformer import Dropout, VisionTransformer, sincos_positions
from attention_visualizer.models.vit_config import ViTConfig

Model = TypeVar("Model", bound=nn.Module)

# Distinct sizes: batch 2, layers 3, heads 4, 5 x 5 patches of 3 x 3 pixels, 7 classes, head_dim 8, mlp 11.
SMALL: dict[str, Any] = {
    "img_size": 15,
    "patch_size": 3,
    "in_channels": 2,
    "num_classes": 7,
    "embed_dim": 32,
    "num_heads": 4,
    "num_layers": 3,
    "mlp_dim": 11,
    "dropout": 0.0,
}


def randomise(model: Model, seed: int = 0) -> Model:
    """Draws every parameter, biases and norms too, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model


def timm_model(**overrides: Any) -> timm_vit.VisionTransformer:
    """timm's model with the seed's sizes."""
    sizes: dict[str, Any] = {
        "img_size": 28,
        "patch_size": 7,
        "in_chans": 1,
        "num_classes": 10,
        "embed_dim": 128,
        "depth": 6,
        "num_heads": 4,
        "mlp_ratio": 2,
    }
    return timm_vit.VisionTransformer(**(sizes | overrides))


MEAN_POOLING = {"global_pool": "avg", "class_token": False, "fc_norm": False}


def images_for(batch: int = 5, channels: int = 1, size: int = 28, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


# --- the same function as timm's ---


def assert_equal_in_double(ours: nn.Module, theirs: nn.Module) -> None:
    """In float64, where rounding cannot hide a difference."""
    images = images_for().double()
    with torch.no_grad():
        logits = ours.double()(images)
        torch.testing.assert_close(logits, theirs.double()(images), rtol=0, atol=1e-12)
    assert logits.shape == (5, 10)
    assert logits.std() > 0.1  # the agreement is not one of zeros


@pytest.mark.parametrize(("pooling", "options"), [("cls", {}), ("mean", MEAN_POOLING)])
def test_logits_equal_timms_with_the_same_weights(pooling: Any, options: dict[str, Any]) -> None:
    ours = randomise(VisionTransformer(pooling=pooling)).eval()
    theirs = timm_model(**options).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_equal_in_double(ours, theirs)


def test_timms_weights_load_back() -> None:
    theirs = randomise(timm_model(), seed=3).eval()
    ours = VisionTransformer().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_equal_in_double(ours, theirs)


def test_logits_equal_timms_without_positions() -> None:
    ours = randomise(VisionTransformer(positional_embedding="none")).eval()
    theirs = timm_model(pos_embed="none").eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_equal_in_double(ours, theirs)


def test_logits_equal_timms_with_the_sincos_table_as_its_positions() -> None:
    ours = randomise(VisionTransformer(positional_embedding="sincos")).eval()
    theirs = timm_model().eval()
    assert ours.pos_embed is not None
    theirs.load_state_dict(ours.state_dict() | {"pos_embed": ours.pos_embed}, strict=True)
    assert_equal_in_double(ours, theirs)


def test_dropout_sits_where_timm_has_it() -> None:
    """With masks from timm's own modules, drawn in the same order, the logits are the same while training."""
    ours = randomise(VisionTransformer(dropout=0.3, attention_dropout=0.2, pooling="mean")).train()
    theirs = timm_model(
        class_token=False, global_pool="avg", fc_norm=False, pos_drop_rate=0.3, proj_drop_rate=0.3, attn_drop_rate=0.2
    ).train()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    # Masks are drawn in the order of memory, and timm's patches come transposed from a convolution.
    theirs.patch_embed.register_forward_hook(lambda module, inputs, output: output.contiguous())
    for name, module in list(ours.named_modules()):
        if isinstance(module, Dropout):
            parent = ours.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], nn.Dropout(module.share))
    with torch.no_grad():
        torch.manual_seed(7)
        logits = ours(images_for())
        torch.manual_seed(7)
        torch.testing.assert_close(logits, theirs(images_for()), rtol=0, atol=1e-5)
        assert not torch.allclose(logits, ours.eval()(images_for()), atol=1e-2)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean_and_drops_each_element_independently(share: float) -> None:
    torch.manual_seed(0)
    values = torch.ones(1009, 1013)
    dropped = Dropout(share).train()(values)
    count, deviation = values.numel(), math.sqrt(share * (1 - share))
    zero = (dropped == 0).double()
    assert abs(zero.mean() - share) < 4 * deviation / math.sqrt(count) + 2**-16
    torch.testing.assert_close(dropped[dropped != 0].unique(), torch.tensor([1 / (1 - share)]), rtol=1e-3, atol=0)
    # Masks of neighbours, which may share one random integer, are uncorrelated.
    for lag in (1, 2, 3, 4):
        first, second = zero.flatten()[:-lag], zero.flatten()[lag:]
        correlation = ((first - share) * (second - share)).mean() / deviation**2
        assert abs(correlation) < 4.5 / math.sqrt(count)


def test_dropout_is_the_identity_in_eval_mode_and_passes_the_masked_gradient() -> None:
    values = torch.randn(7, 11, requires_grad=True)
    assert Dropout(0.5).eval()(values) is values
    dropped = Dropout(0.5).train()(values)
    dropped.sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad * values, dropped)


@pytest.mark.parametrize("shape", [(1,), (5,), (3, 7, 11)])
def test_dropout_repeats_with_the_seed_for_any_number_of_elements(shape: tuple[int, ...]) -> None:
    masks = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        masks.append([Dropout(0.5).train()(torch.ones(shape)) for _ in range(8)])
    first, again, other = (torch.stack(mask) for mask in masks)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.std(dim=0).max() > 0  # each call draws anew


def test_in_bfloat16_gradients_are_those_of_float32_but_for_rounding() -> None:
    model = randomise(VisionTransformer(**(SMALL | {"dropout": 0.0}))).train()
    images, labels = images_for(5, channels=2, size=15), torch.tensor([0, 1, 2, 4, 6])
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = model(images)
        assert logits.dtype == (torch.bfloat16 if enabled else torch.float32)
        F.cross_entropy(logits.float(), labels).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))  # type: ignore[union-attr]
    cosine = F.cosine_similarity(gradients[0], gradients[1], dim=0)
    assert 0.995 < cosine < 1.0


def test_attention_on_the_cpu_is_computed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    types = []
    fused = F.scaled_dot_product_attention

    def seen(query: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        result = fused(query, *arguments, **options)
        types.append((query.dtype, result.dtype))
        return result

    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    with torch.autocast("cpu", torch.bfloat16):
        VisionTransformer(**SMALL)(images_for(2, channels=2, size=15))
    VisionTransformer(**SMALL).bfloat16()(images_for(2, channels=2, size=15).bfloat16())
    assert set(types) == {(torch.float32, torch.float32)} and len(types) == 6


@pytest.mark.parametrize("num_layers", [1, 3])
def test_training_computes_only_the_class_token_in_the_last_block_and_nothing_changes(num_layers: int) -> None:
    model = randomise(VisionTransformer(**(SMALL | {"dropout": 0.0, "num_layers": num_layers})))
    images, labels = images_for(5, channels=2, size=15), torch.tensor([0, 1, 2, 4, 6])
    gradients = []
    for training in (True, False):
        model.train(training).zero_grad()
        logits = model(images)
        F.cross_entropy(logits, labels).backward()
        gradients.append([logits, *(parameter.grad.clone() for parameter in model.parameters())])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


# --- its parts ---


def test_a_patchs_token_sees_that_patch_only() -> None:
    model = randomise(VisionTransformer(**SMALL)).eval()
    images = images_for(2, channels=2, size=15)
    changed = images.clone()
    changed[:, :, 3:6, 12:15] += 1.0  # row 1, column 4 of the 5 x 5 grid
    moved = (model.embed(changed) - model.embed(images)).abs().amax(dim=(0, 2))
    assert moved.nonzero().flatten().tolist() == [1 + 1 * 5 + 4]


def test_patches_are_projected_as_by_a_convolution() -> None:
    patch_embed = randomise(VisionTransformer(**SMALL)).patch_embed
    images = images_for(2, channels=2, size=15)
    convolved = patch_embed.proj(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patch_embed(images), convolved, rtol=0, atol=1e-5)


def test_a_convolutional_stem_makes_a_token_of_each_patch_and_sees_as_far_beyond_on_every_side() -> None:
    model = VisionTransformer(patch_size=4, stem="convolutions", pooling="mean", num_layers=5).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == 834_570 <= 850_000
    stem = model.patch_embed
    image = torch.zeros(1, 1, 28, 28)
    changed = image.clone()
    changed[..., 4:8, 8:12] = 1.0  # the patch in row 1, column 2
    with torch.no_grad():
        before, after = stem(image), stem(changed)
    assert before.shape == (1, 49, 128)
    moved = (after != before).any(dim=2).view(7, 7)
    assert moved.sum() == 9 and moved[0:3, 1:4].all()
    images = torch.zeros(1, 1, 28, 28, requires_grad=True)
    stem(images)[0, 3 * 7 + 2].sum().backward()
    assert images.grad is not None
    rows, columns = images.grad[0, 0].nonzero().unbind(dim=1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (12 - 4, 15 + 4, 8 - 4, 11 + 4)


def test_sincos_positions_follow_the_formula() -> None:
    grid, embed_dim = (3, 5), 8
    expected = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            quarter = embed_dim // 4
            angles = [[place / 10_000 ** (k / quarter) for k in range(quarter)] for place in (column, row)]
            expected.append([f(angle) for axis in angles for f in (math.sin, math.cos) for angle in axis])
    np.testing.assert_allclose(sincos_positions(grid, embed_dim), expected, atol=1e-6)


def test_fixed_positions_are_no_parameters_and_leave_the_class_token_alone() -> None:
    model = VisionTransformer(**SMALL, positional_embedding="sincos")
    assert "pos_embed" not in model.state_dict() and "pos_embed" not in dict(model.named_parameters())
    assert model.pos_embed is not None and model.pos_embed.shape == (1, 26, 32)
    assert not model.pos_embed[0, 0].any()
    torch.testing.assert_close(model.pos_embed[0, 1:], sincos_positions((5, 5), 32))
    model.double()
    assert model.pos_embed.dtype == torch.float64  # moves with the model


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("positional_embedding", ["learned", "sincos", "none"])
def test_only_positions_tell_the_patches_apart(pooling: Any, positional_embedding: Any) -> None:
    model = randomise(VisionTransformer(**SMALL, positional_embedding=positional_embedding, pooling=pooling)).eval()
    images = images_for(2, channels=2, size=15)
    shifted = images.roll(3, dims=-1)  # by one patch: the same patches in other places
    with torch.no_grad():
        same = torch.allclose(model(images), model(shifted), atol=1e-4)
    assert same == (positional_embedding == "none")


def test_config_rebuilds_the_model() -> None:
    model = VisionTransformer(**SMALL, positional_embedding="sincos", pooling="mean", attention_dropout=0.1)
    rebuilt = VisionTransformer(**model.config)
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    assert rebuilt.config == model.config
    assert all(type(value) in (int, float, str) for value in model.config.values())  # loads with weights_only


def test_a_config_or_its_fields_make_the_same_model() -> None:
    config = ViTConfig(**SMALL)
    models = (
        VisionTransformer(config),
        VisionTransformer(**SMALL),
        VisionTransformer(replace(config, mlp_dim=5), mlp_dim=11),
    )
    assert {str(model.config) for model in models} == {str(config.to_dict())}
    assert set(inspect.signature(VisionTransformer).parameters) == set(config.to_dict())
    with pytest.raises(TypeError, match="depth"):
        VisionTransformer(depth=3)


def test_weights_start_small_and_biases_at_zero() -> None:
    torch.manual_seed(0)
    for name, parameter in VisionTransformer().named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            if name in ("cls_token", "pos_embed"):
                assert 0.8 < parameter.std() / {"cls_token": 0.02, "pos_embed": 0.5}[name] < 1.1, name
                continue
            matrix = parameter.flatten(1)
            bound = math.sqrt(6 / sum(matrix.shape))  # Glorot and Bengio, 2010
            assert 0.8 * bound < parameter.abs().max() <= bound, name


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("positional_embedding", ["learned", "sincos", "none"])
def test_a_gradient_reaches_every_parameter(pooling: Any, positional_embedding: Any) -> None:
    model = randomise(VisionTransformer(**SMALL, pooling=pooling, positional_embedding=positional_embedding))
    F.cross_entropy(model(images_for(5, channels=2, size=15)), torch.tensor([0, 1, 2, 4, 6])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


# --- dropout ---


def test_eval_mode_is_deterministic_and_train_mode_is_not() -> None:
    model = randomise(VisionTransformer(**(SMALL | {"dropout": 0.3}), attention_dropout=0.2)).eval()
    images = images_for(2, channels=2, size=15)
    with torch.no_grad():
        assert torch.equal(model(images), model(images))
        model.train()
        assert not torch.equal(model(images), model(images))


@pytest.mark.parametrize(("training", "passed"), [(True, 0.25), (False, 0.0)])
def test_attention_dropout_is_separate_from_dropout(
    monkeypatch: pytest.MonkeyPatch, training: bool, passed: float
) -> None:
    seen: list[float] = []
    fused = F.scaled_dot_product_attention

    def watch(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(kwargs["dropout_p"])
        return fused(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    model = VisionTransformer(**(SMALL | {"dropout": 0.5}), attention_dropout=0.25).train(training)
    model(images_for(2, channels=2, size=15))
    assert seen == [passed] * 3
    rates = [module.share for module in model.modules() if isinstance(module, Dropout)]
    assert rates == [0.5] * (1 + 3 * 3)  # after the embedding; three in each block
