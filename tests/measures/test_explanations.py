"""Relevance and gradient x attention are those of the papers' equations on the model's own attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor, nn

from attention_visualizer.measures import explanations
from attention_visualizer.measures.explanations import explain
from attention_visualizer.measures.observation import RolloutOptions
from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.support.errors import UserError

IMAGES, HEADS = 3, 2


def spread_out(model: nn.Module) -> Any:
    """Attention far from uniform, predictions far from even; eval mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def pictures(channels: int = 3, height: int = 15, width: int = 10) -> Tensor:
    return torch.randn(IMAGES, channels, height, width, generator=torch.Generator().manual_seed(1))


def timm_model(**options: Any) -> Any:
    sizes = {"img_size": (15, 10), "patch_size": 5, "embed_dim": 14, "depth": 3, "num_heads": HEADS, "num_classes": 7}
    return spread_out(timm.models.vision_transformer.VisionTransformer(**(sizes | options)))


def explicit_attention(model: Any, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits and each layer's softmax, of a forward written here: [image, head, query, key], part of the graph."""
    maps = []
    tokens = model._pos_embed(model.patch_embed(images)) if hasattr(model, "_pos_embed") else model.embed(images)
    for block in model.blocks:
        query, key, value = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1)
        maps.append(weights)
        tokens = tokens + block.attn.proj((weights @ value).transpose(1, 2).flatten(2))
        tokens = tokens + block.mlp(block.norm2(tokens))
    if hasattr(model, "forward_head"):
        return model.forward_head(model.norm(tokens)), maps
    tokens = model.norm(tokens)
    return model.head(tokens[:, 0] if model.num_prefix_tokens else tokens.mean(dim=1)), maps


def explicit_torchvision(model: Any, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The same for torchvision's, whose attention is nn.MultiheadAttention."""
    maps = []
    tokens = model._process_input(images)
    tokens = torch.cat([model.class_token.expand(len(tokens), -1, -1), tokens], dim=1) + model.encoder.pos_embedding
    for block in model.encoder.layers:
        attention = block.self_attention
        joined = nn.functional.linear(block.ln_1(tokens), attention.in_proj_weight, attention.in_proj_bias)
        query, key, value = joined.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1)
        maps.append(weights)
        tokens = tokens + attention.out_proj((weights @ value).transpose(1, 2).flatten(2))
        tokens = tokens + block.mlp(block.ln_2(tokens))
    return model.heads(model.encoder.ln(tokens)[:, 0]), maps


def by_the_paper(model: Any, image: Tensor, target: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """R and (gradient * attention)^+ of the last layer, mean over heads: [query, key], in loops over heads."""
    explicit = explicit_torchvision if isinstance(model, torchvision.models.VisionTransformer) else explicit_attention
    logits, maps = explicit(model, image[None])
    torch.testing.assert_close(logits, model(image[None]), rtol=1e-4, atol=1e-4)  # it is the same model
    gradients = torch.autograd.grad(logits[0, target], maps)
    relevance = np.eye(maps[0].shape[-1])
    for attention, gradient in zip(maps, gradients, strict=True):
        joined = np.zeros_like(relevance)
        for head in range(HEADS):
            product = attention[0, head].detach().double().numpy() * gradient[0, head].double().numpy()
            joined += np.where(product > 0, product, 0) / HEADS
        relevance = relevance + joined @ relevance
    return relevance, joined


MODELS: dict[str, tuple[Any, Any]] = {
    "class token": (lambda: timm_model(), 1),
    "registers": (lambda: timm_model(reg_tokens=4), 5),
    "mean over patches": (lambda: timm_model(class_token=False, global_pool="avg"), 0),
    "class token that is not read": (lambda: timm_model(global_pool="avg"), 1),
    "this project's": (
        lambda: spread_out(
            VisionTransformer(img_size=15, patch_size=5, embed_dim=14, num_heads=HEADS, num_layers=3, mlp_dim=11)
        ),
        1,
    ),
    "this project's default": (lambda: spread_out(VisionTransformer(num_heads=HEADS)), 1),
    "torchvision's": (
        lambda: spread_out(torchvision.models.VisionTransformer(15, 5, 3, HEADS, 14, 11, num_classes=7)),
        1,
    ),
}


def pictures_for(model: nn.Module) -> Tensor:
    if isinstance(model, VisionTransformer):
        return pictures(1, model.config["img_size"], model.config["img_size"])
    return pictures(3, 15, 15) if isinstance(model, torchvision.models.VisionTransformer) else pictures()


@pytest.mark.parametrize(("build", "prefix"), MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_relevance_and_gradient_attention_are_those_of_the_equations(
    build: Any, prefix: int, frozen: bool, dtype: torch.dtype
) -> None:
    model = build().to(dtype)
    images = pictures_for(model)
    reads_patches = not prefix or getattr(model, "global_pool", "token") == "avg"
    images = images.to(dtype)
    expected: dict[str, list[NDArray[Any]]] = {"relevance": [], "gradient x attention": []}
    for image in images:
        target = int(model(image[None]).argmax())
        for name, found in zip(expected, by_the_paper(model, image, target), strict=True):
            row = found[prefix:].mean(axis=0) if reads_patches else found[0]
            expected[name].append(row[prefix:])
    for parameter in model.parameters():
        parameter.requires_grad_(not frozen)
    found = explain(model, images)
    for name, rows in expected.items():
        scale = np.abs(rows).max()
        assert scale > 1e-4
        bound = scale * (1e-5 if dtype == torch.float32 else 1e-9)
        np.testing.assert_allclose(found.maps[name].reshape(IMAGES, -1), rows, atol=bound, rtol=0, err_msg=name)
    assert found.target.tolist() == model(images).argmax(dim=1).tolist()
    assert all(parameter.grad is None for parameter in model.parameters()) and not model.training


def test_the_class_can_be_chosen() -> None:
    model, images = timm_model(), pictures()
    target = torch.tensor([4, 0, 6])
    found = explain(model, images, target)
    assert found.target.tolist() == [4, 0, 6]
    for number, image in enumerate(images):
        relevance, _ = by_the_paper(model, image, int(target[number]))
        np.testing.assert_allclose(found.maps["relevance"][number].flatten(), relevance[0, 1:], atol=1e-5)


def test_a_class_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=r"target=7: give a class from 0 to 6"):
        explain(timm_model(), pictures(), torch.tensor([0, 7, 1]))


def test_the_query_can_be_chosen() -> None:
    """Of a patch, the last layer's gradient is 0: nothing that it asks for there reaches the class token."""
    model, images = timm_model(reg_tokens=4), pictures()
    patch, patches = explain(model, images, query=(2, 1)), explain(model, images, query="patches")
    assert not patch.maps["gradient x attention"].any()
    for number, image in enumerate(images):
        relevance, _ = by_the_paper(model, image, int(patch.target[number]))
        scale = np.abs(relevance[:, 5:]).max()
        np.testing.assert_allclose(
            patch.maps["relevance"][number].flatten(), relevance[5 + 2 * 2 + 1, 5:], atol=1e-5 * scale
        )
        np.testing.assert_allclose(
            patches.maps["relevance"][number].flatten(), relevance[5:, 5:].mean(axis=0), atol=1e-5 * scale
        )


@pytest.mark.parametrize(("fusion", "discard"), [("mean", 0.0), ("max", 0.4), ("min", 0.7)])
def test_rollout_is_that_of_the_models_own_attention(fusion: Any, discard: float) -> None:
    model, images = timm_model(reg_tokens=4), pictures()
    found = explain(model, images, rollout=RolloutOptions(fusion, discard)).maps["rollout"]
    _, maps = explicit_attention(model, images)
    for number in range(IMAGES):
        rollout = np.eye(11)
        for layer in maps:
            step = getattr(np, fusion)(layer[number].detach().double().numpy(), axis=0)
            for row in step:
                row[np.argsort(row)[: int(discard * 11)]] = 0
            step = (step + np.eye(11)) / (step + np.eye(11)).sum(axis=1, keepdims=True)
            rollout = step @ rollout
        np.testing.assert_allclose(found[number].flatten(), rollout[0, 5:], atol=1e-6)


def test_values_are_weighed_with_the_projection_where_it_is_known() -> None:
    model, images = timm_model(), pictures()
    found = explain(model, images)
    captured: list[Tensor] = []
    block = model.blocks[-1]
    block.register_forward_pre_hook(lambda module, inputs: captured.append(inputs[0]))
    with torch.no_grad():
        model(images)
        qkv = block.attn.qkv(block.norm1(captured[0])).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    query, key, value = qkv.double().numpy()
    projection = block.attn.proj.weight.detach().double().numpy()
    expected = np.zeros((IMAGES, 6))
    for image in range(IMAGES):
        for head in range(HEADS):
            scores = query[image, head, 0] @ key[image, head].T / 7**0.5
            weights = np.exp(scores) / np.exp(scores).sum()
            for patch in range(6):
                length = np.linalg.norm(projection[:, 7 * head : 7 * head + 7] @ value[image, head, 1 + patch])
                expected[image, patch] += weights[1 + patch] * length / HEADS
    np.testing.assert_allclose(found.maps["value-weighted"].reshape(IMAGES, 6), expected, rtol=1e-4)

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_embed = model.patch_embed
            self.maps = nn.Linear(14, 42)

        def forward(self, images: Tensor) -> Tensor:
            query, key, value = self.maps(self.patch_embed(images)).chunk(3, dim=-1)
            return nn.functional.scaled_dot_product_attention(query, key, value).mean(dim=1)

    assert "value-weighted, before projection" in explain(Bare().eval(), images).maps


def test_torchvisions_relevance_follows_the_rollout_option_and_its_own_attention() -> None:
    model = spread_out(torchvision.models.VisionTransformer(10, 5, 3, HEADS, 14, 11, num_classes=7))
    images = pictures(3, 10, 10)
    plain, cut = explain(model, images), explain(model, images, rollout=RolloutOptions("max", 0.6))
    assert plain.maps.keys() == {
        "attention, last layer",
        "value-weighted",
        "rollout",
        "gradient x attention",
        "relevance",
    }
    assert np.abs(plain.maps["rollout"] - cut.maps["rollout"]).max() > 1e-3
    np.testing.assert_array_equal(plain.maps["relevance"], cut.maps["relevance"])


def test_methods_that_do_not_apply_are_left_out() -> None:
    images = torch.randn(2, 3, 16, 16)
    windows = timm.models.swin_transformer.SwinTransformer(
        img_size=16, patch_size=2, window_size=4, embed_dim=8, depths=(2,), num_heads=(2,), num_classes=5
    )
    assert "rollout" not in explain(windows.eval(), images).maps
    assert "relevance" not in explain(windows.eval(), images).maps
    headless = timm_model(num_classes=0)
    found = explain(headless, pictures())
    assert not {"relevance", "gradient x attention"} & found.maps.keys() and found.target.tolist() == [-1] * IMAGES


def test_layers_without_a_place_stop_what_runs_through_all_layers() -> None:
    """XCiT's last layers are in one grid, its others between channels; a rollout of these alone would not be the
    model's."""
    model = timm.create_model("xcit_nano_12_p16_224", img_size=64, num_classes=3).eval()
    maps = explain(model, torch.randn(1, 3, 64, 64)).maps
    assert "gradient x attention" in maps and not {"rollout", "relevance"} & maps.keys()


@pytest.mark.parametrize("build", [each for each, _ in MODELS.values()], ids=MODELS.keys())
def test_batches_give_what_single_images_give(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build().double()
    images = pictures_for(model).double().repeat(3, 1, 1, 1) * torch.linspace(0.5, 2, 9)[:, None, None, None]
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    together = explain(model, images)
    assert sizes == [1, 8]
    target = torch.from_numpy(together.target)
    monkeypatch.setattr(explanations, "MAX_BYTES", 1)
    alone = explain(model, images)
    assert sizes[2:] == [1] * 9
    assert together.maps.keys() == alone.maps.keys() and together.target.tolist() == alone.target.tolist()
    for name, maps in together.maps.items():
        np.testing.assert_allclose(maps, alone.maps[name], rtol=1e-6, atol=1e-9 * np.abs(maps).max())
    chosen = explain(model, images, (target + 1) % 7)
    assert chosen.target.tolist() == ((target + 1) % 7).tolist()


def test_images_do_not_affect_each_other_and_nothing_is_left_behind() -> None:
    model, images = timm_model(), pictures()
    model.head.weight.grad = torch.full_like(model.head.weight, 3)
    model.blocks[1].train()
    state = torch.get_rng_state()
    together, alone = explain(model, images), explain(model, images[1:2])
    for name, maps in together.maps.items():
        np.testing.assert_allclose(maps[1:2], alone.maps[name], atol=1e-6)
    assert [module.training for module in model.blocks] == [False, True, False]
    assert (model.head.weight.grad == 3).all() and model.norm.weight.grad is None
    assert torch.equal(state, torch.get_rng_state()) and torch._C._len_torch_function_stack() == 0
