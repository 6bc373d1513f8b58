"""Deletion and insertion: areas in closed form, hidden patches really hidden, dropped tokens really gone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from attention_visualizer.measures.perturbation import Curves, Perturbation, ranking_of, step_sizes
from attention_visualizer.models.vision_transformer import VisionTransformer

WITHOUT_QUANTUS = "python -m pip install --no-deps quantus==0.6.0"  # see .ci/run
SIZES = {"img_size": 12, "patch_size": 3, "embed_dim": 10, "num_heads": 2, "num_layers": 2, "mlp_dim": 14}


def to_input(pictures: Tensor) -> Tensor:
    return pictures.float() / 255


@pytest.fixture
def pictures() -> Tensor:
    return torch.randint(0, 256, (5, 1, 12, 12), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def model_of(**changes: object) -> VisionTransformer:
    torch.manual_seed(3)
    return VisionTransformer(**{**SIZES, **changes}).eval()  # type: ignore[arg-type]


def some_kept(num_kept: int, n: int = 5) -> np.ndarray:
    order = np.random.default_rng(1).permuted(np.tile(np.arange(16), (n, 1)), axis=1)
    return order < num_kept


def test_areas_of_known_curves() -> None:
    shares = np.array([0.0, 0.5, 1.0])
    falling, rising = np.array([[1.0, 0.5, 0.0], [1.0, 0.0, 0.0]]), np.array([[0.0, 0.5, 1.0], [0.0, 1.0, 1.0]])
    curves = Curves(shares, falling, rising)
    np.testing.assert_allclose(curves.deletion_area, [0.5, 0.25])
    np.testing.assert_allclose(curves.insertion_area, [0.5, 0.75])


def test_rankings_put_the_highest_first_and_break_ties_by_lot() -> None:
    maps = np.array([[0.1, 0.7, 0.3], [0.5, 0.2, 0.9]])
    assert ranking_of(maps).tolist() == [[1, 2, 0], [2, 0, 1]]
    tied = ranking_of(np.zeros((3000, 4)), seed=5)
    assert np.abs((tied[:, 0][:, None] == np.arange(4)).mean(axis=0) - 0.25).max() < 0.04
    assert (ranking_of(np.zeros((6, 4)), seed=5) == tied[:6]).all()


def test_steps_go_from_none_to_all() -> None:
    assert step_sizes(4).tolist() == [0, 1, 2, 3, 4]
    many = step_sizes(49)
    assert many[0] == 0 and many[-1] == 49 and len(many) == 17 and (np.diff(many) > 0).all()


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_filled_patches_are_background_and_nothing_else_changes(pooling: str, pictures: Tensor) -> None:
    model, kept = model_of(pooling=pooling), some_kept(7)
    classes = np.array([0, 3, 9, 1, 1])
    painted = pictures.clone()
    for image, mask in zip(painted, kept, strict=True):
        for patch in np.flatnonzero(~mask):
            row, column = divmod(int(patch), 4)
            image[:, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3] = 0
    with torch.no_grad():
        expected = model(to_input(painted)).softmax(dim=-1)[torch.arange(5), torch.from_numpy(classes)]
    found = Perturbation(model, pictures, classes, to_input).probabilities(kept, "fill")
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_dropped_tokens_are_as_if_they_had_never_been(pooling: str, pictures: Tensor) -> None:
    """Against the same attention with those keys masked in every layer, and those tokens left out of a mean."""
    model, kept = model_of(pooling=pooling), some_kept(6)
    classes, prefix = np.array([2, 2, 0, 5, 7]), int(pooling == "cls")
    mask = torch.cat([torch.ones(5, prefix, dtype=torch.bool), torch.from_numpy(kept)], dim=1)
    with torch.no_grad():
        tokens = model.embed(to_input(pictures))
        for block in model.blocks:
            normed = block.norm1(tokens)
            query, key, value = block.attn.split_heads(block.attn.qkv(normed), 3)
            scores = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(~mask[:, None, None], -torch.inf)
            tokens = tokens + block.attn.proj((scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2))
            tokens = tokens + block.mlp(block.norm2(tokens))
        tokens = model.norm(tokens)
        pooled = tokens[:, 0] if prefix else torch.stack([each[keep].mean(dim=0) for each, keep in zip(tokens, mask)])  # noqa: B905
        expected = model.head(pooled).softmax(dim=-1)[torch.arange(5), torch.from_numpy(classes)]
    found = Perturbation(model, pictures, classes, to_input).probabilities(kept, "drop")
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4)


@pytest.mark.parametrize("operator", ["fill", "drop"])
def test_curves_begin_and_end_at_the_whole_and_the_empty_picture(operator: str, pictures: Tensor) -> None:
    model, classes = model_of(), np.array([4, 4, 4, 0, 1])
    perturbation = Perturbation(model, pictures, classes, to_input)
    (curves,) = perturbation.curves(ranking_of(np.random.default_rng(0).random((5, 16)))[None], operator)  # type: ignore[arg-type]
    with torch.no_grad():
        whole = model(to_input(pictures)).softmax(dim=-1)[torch.arange(5), torch.from_numpy(classes)].numpy()
    np.testing.assert_allclose(curves.deletion[:, 0], whole, rtol=1e-5)
    np.testing.assert_allclose(curves.insertion[:, -1], whole, rtol=1e-5)
    np.testing.assert_allclose(curves.deletion[:, -1], curves.insertion[:, 0])
    assert curves.deletion.shape == (5, 17)


def test_removing_in_one_order_is_restoring_in_the_other(pictures: Tensor) -> None:
    perturbation = Perturbation(model_of(), pictures, np.zeros(5, np.int64), to_input)
    ranking = ranking_of(np.random.default_rng(4).random((5, 16)))
    forward, backward = perturbation.curves(np.stack([ranking, ranking[:, ::-1]]), "fill")
    np.testing.assert_allclose(forward.deletion, backward.insertion[:, ::-1], rtol=1e-6)


def test_a_model_that_needs_one_patch_falls_when_it_goes(pictures: Tensor) -> None:
    """Planted: the answer is the brightness of patch 5, whatever the rest."""

    class OnePatch(VisionTransformer):
        def forward(self, images: Tensor) -> Tensor:
            bright = images[:, 0, 3:6, 3:6].mean(dim=(1, 2))
            return torch.stack([20 * bright, torch.zeros_like(bright)], dim=1)

    perturbation = Perturbation(OnePatch(**SIZES), pictures | 64, np.zeros(5, np.int64), to_input)  # type: ignore[arg-type]
    known = np.tile((np.arange(16) == 5).astype(float), (5, 1))
    right, wrong = perturbation.curves(np.stack([ranking_of(known), ranking_of(-known)]), "fill")
    assert (right.deletion[:, 1:] == 0.5).all() and (right.insertion[:, 1:] > 0.9).all()
    assert (wrong.deletion[:, :16] > 0.9).all() and (wrong.insertion[:, :16] == 0.5).all()
    assert (right.deletion_area < wrong.deletion_area - 0.3).all()


def test_deletion_is_quantus_pixel_flipping(pictures: Tensor) -> None:
    quantus = pytest.importorskip("quantus", reason=WITHOUT_QUANTUS)

    model, classes = model_of(), np.array([0, 3, 9, 1, 1])
    maps = np.random.default_rng(6).random((5, 16))
    (found,) = Perturbation(model, pictures, classes, to_input).curves(ranking_of(maps)[None], "fill")
    flipping = quantus.PixelFlipping(
        features_in_step=9, perturb_baseline=0.0, normalise=False, abs=False, disable_warnings=True
    )
    pixels = maps.reshape(5, 1, 4, 4).repeat(3, axis=2).repeat(3, axis=3)
    images = to_input(pictures).numpy()
    expected = np.array(flipping(model, images, classes, pixels, device="cpu", softmax=True, channel_first=True))
    assert expected.std(axis=1).min() > 1e-3
    np.testing.assert_allclose(found.deletion[:, 1:], expected, atol=1e-6)


def test_a_patch_less_is_captums_ablation(pictures: Tensor) -> None:
    from captum.attr import FeatureAblation

    model, classes = model_of(), np.array([0, 3, 9, 1, 1])
    number = torch.arange(16).view(4, 4).repeat_interleave(3, dim=0).repeat_interleave(3, dim=1)
    with torch.no_grad():
        ablated = FeatureAblation(lambda images: model(images).softmax(dim=-1)).attribute(
            to_input(pictures), baselines=0.0, target=torch.from_numpy(classes), feature_mask=number
        )
    perturbation = Perturbation(model, pictures, classes, to_input)
    whole = perturbation.probabilities(np.ones((5, 16), bool), "fill")
    found = [whole - perturbation.probabilities(np.tile(np.arange(16) != patch, (5, 1)), "fill") for patch in range(16)]
    assert np.abs(found).max() > 1e-3
    np.testing.assert_allclose(np.stack(found, axis=1), ablated[:, 0, ::3, ::3].flatten(1).numpy(), atol=1e-6)


def test_background_goes_through_the_model_once_and_counts_all_the_same(pictures: Tensor) -> None:
    """Removing what is background already: each picture is asked for as often as it differs."""
    pictures[:, :, 3:9] = 0  # patches 4 to 11
    model, classes = model_of(), np.zeros(5, np.int64)
    perturbation = Perturbation(model, pictures, classes, to_input)
    ranking = ranking_of(np.random.default_rng(0).random((5, 16)))
    sizes: list[int] = []
    model.patch_embed.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    (found,) = perturbation.curves(ranking[None], "fill")
    # Of the 8 drawn patches, 7 pictures each way, and the whole and the empty one.
    assert sum(sizes) <= 5 * 16
    asked = len(sizes)
    perturbation.curves(np.stack([ranking, ranking]), "fill")
    assert len(sizes) == asked
    places = np.argsort(ranking, axis=1)
    for step in range(17):
        np.testing.assert_allclose(
            found.deletion[:, step], perturbation.probabilities(places >= step, "fill"), atol=1e-6
        )
        np.testing.assert_allclose(
            found.insertion[:, step], perturbation.probabilities(places < step, "fill"), atol=1e-6
        )
