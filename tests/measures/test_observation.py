"""An observation holds, image by image, what the model predicts and attends to."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import scipy.stats  # type: ignore[import-untyped]
import timm
import timm.models.swin_transformer as timm_swin
import timm.models.vision_transformer as timm_vit
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attention_visualizer.attention import layer_geometry, places
from attention_visualizer.attention.capture import CaptureError, capture
from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.measures import map_measures, observation
from attention_visualizer.measures.attention_rows import of_one_layout
from attention_visualizer.measures.map_measures import Query
from attention_visualizer.measures.observation import RolloutOptions, RowOptions, observe
from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.support.errors import UserError

# 2 images, 7 layers, 3 heads, a 5 x 11 grid: no two alike. timm's model takes oblong images, ours square ones.
IMAGES, LAYERS, HEADS, GRID = 2, 7, 3, (5, 11)
QUERIES: list[Query] = ["cls", "patches", (3, 7)]


def oblong_model(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm_vit.VisionTransformer(
        img_size=(15, 33),
        patch_size=3,
        in_chans=1,
        embed_dim=21,
        depth=LAYERS,
        num_heads=HEADS,
        num_classes=13,
        **options,
    )
    return sharpen(model)


def sharpen(model: nn.Module) -> nn.Module:
    """Attention far from uniform, and predictions far from even."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return model.eval()


def oblong_images() -> Tensor:
    return torch.randn(IMAGES, 1, 15, 33, generator=torch.Generator().manual_seed(1))


def captured_weights(model: nn.Module, images: Tensor) -> NDArray[np.float64]:
    """[image, layer, head, query, key]."""
    with torch.no_grad(), capture(model) as attention:
        model(images)
    return np.stack([layer.weights.double().numpy() for layer in attention], axis=1)


def rows_of(weights: NDArray[np.float64], query: Query, prefix: int) -> NDArray[np.float64]:
    """Rows of the query, before their mean: [..., query, key] -> [..., row, key]."""
    if query == "cls":
        return weights[..., :1, :]
    if query == "patches":
        return weights[..., prefix:, :]
    token = prefix + query[0] * GRID[1] + query[1]
    return weights[..., token : token + 1, :]


def loop_rollouts(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Up to and including each layer: [image, layer, query, key]."""
    found = []
    for image in weights:
        rollout, steps = np.eye(weights.shape[-1]), []
        for layer in image:
            rollout = (layer.mean(axis=0) + np.eye(len(rollout))) / 2 @ rollout
            steps.append(rollout)
        found.append(np.stack(steps))
    return np.stack(found)


@pytest.mark.parametrize("query", QUERIES, ids=str)
def test_arrays_are_those_of_the_models_attention(query: Query) -> None:
    model, images, prefix = oblong_model(reg_tokens=1), oblong_images(), 2
    seen = observe(model, images, query)
    weights = captured_weights(model, images)
    rows = rows_of(weights, query, prefix)

    assert seen.query == query and set(seen.geometries) == {Geometry(GRID, prefix, (3, 3))}
    assert seen.head_maps.shape == (IMAGES, LAYERS, HEADS, *GRID)
    expected_maps = rows.mean(axis=-2)[..., prefix:].reshape(seen.head_maps.shape)
    np.testing.assert_allclose(seen.head_maps, expected_maps, atol=1e-6)
    assert (seen.head_maps.sum(axis=(-2, -1)) < 1.0).all()  # shares, not renormalised

    assert seen.entropy.shape == (IMAGES, LAYERS, HEADS)
    np.testing.assert_allclose(seen.entropy, scipy.stats.entropy(rows, axis=-1).mean(axis=-1), atol=1e-5)

    assert seen.rollouts.shape == (IMAGES, LAYERS, *GRID)
    rollout_rows = rows_of(loop_rollouts(weights), query, prefix).mean(axis=-2)
    np.testing.assert_allclose(seen.rollouts, rollout_rows[..., prefix:].reshape(seen.rollouts.shape), atol=1e-6)

    places = np.array([(row * 3, column * 3) for row in range(GRID[0]) for column in range(GRID[1])])
    lengths = np.linalg.norm(places[:, None] - places[None], axis=-1)
    patches = weights[..., prefix:, prefix:]
    distance = ((patches * lengths).sum(-1) / patches.sum(-1)).mean(-1)
    assert seen.distance.shape == (IMAGES, LAYERS, HEADS)
    np.testing.assert_allclose(seen.distance, distance, rtol=1e-4)

    if query == "cls":
        assert seen.self_attention is not None
        np.testing.assert_allclose(seen.self_attention, weights[..., 0, 0], atol=1e-6)
    else:
        assert seen.self_attention is None


def test_predictions_are_the_models() -> None:
    model, images = oblong_model(), oblong_images()
    seen = observe(model, images)
    with torch.no_grad():
        shares = model(images).softmax(dim=-1).numpy()
    assert seen.predicted.shape == seen.probability.shape == (IMAGES,)
    np.testing.assert_array_equal(seen.predicted, shares.argmax(axis=1))
    np.testing.assert_allclose(seen.probability, shares.max(axis=1), rtol=1e-6)
    assert 0 < seen.reconstruction_error < 1e-4


@pytest.mark.parametrize(("pooling", "query"), [("cls", "cls"), ("mean", "patches")])
def test_by_default_the_query_is_the_one_that_the_model_reads_out(pooling: Any, query: Query) -> None:
    sizes: dict[str, Any] = {"img_size": 15, "patch_size": 3, "embed_dim": 21, "num_heads": 3, "num_layers": 2}
    model = sharpen(VisionTransformer(**sizes, pooling=pooling))
    images = torch.randn(7, 1, 15, 15)
    seen, asked = observe(model, images), observe(model, images, query)
    assert seen.query == asked.query == query
    assert seen.head_maps.shape == (7, 2, 3, 5, 5)
    np.testing.assert_array_equal(seen.head_maps, asked.head_maps)
    assert (seen.self_attention is None) == (pooling == "mean")


def test_images_are_seen_one_by_one() -> None:
    """A figure of one image does not depend on which others were looked at with it."""
    model, images = oblong_model(), oblong_images()
    together, alone = observe(model, images), observe(model, images[1:])
    for name in ("head_maps", "rollouts", "entropy", "self_attention", "distance", "probability"):
        np.testing.assert_allclose(getattr(together, name)[1:], getattr(alone, name), atol=1e-5, err_msg=name)


def test_rows_are_kept_where_they_were_asked_for_and_fit() -> None:
    model, images = oblong_model(), oblong_images()
    weights = captured_weights(model, images)
    size = weights.size + 4 * weights[..., 0].size
    seen = observe(model, images, rows=RowOptions(size))
    rows = of_one_layout(seen.rows)
    assert rows is not None and rows.codes.shape == weights.shape
    assert (np.abs(rows.weights() - weights) <= weights.max(axis=-1, keepdims=True) / 255 + 1e-6).all()
    less = observe(model, images, rows=RowOptions(size - 1))
    assert observe(model, images).rows is None and less.rows is None
    assert [layout for _, layout, _ in less.row_layouts] == [each.layout for each in seen.rows or ()]


def test_rows_of_windows_and_stages_are_the_models() -> None:
    model, images = swin(), torch.randn(IMAGES, 1, 12, 24)
    seen = observe(model, images, rows=RowOptions(2**20))
    with torch.no_grad(), capture(model) as attention:
        model(images)
    assert seen.rows is not None and [each.name for each in seen.rows] == [layer.name for layer in attention]
    for kept, layer in zip(seen.rows, attention, strict=True):
        heads, queries, keys = layer.weights.shape[1:]
        found = kept.rows.weights().reshape(IMAGES, heads, -1, queries, keys).swapaxes(1, 2)
        expected = layer.weights.unflatten(0, (IMAGES, -1))
        np.testing.assert_allclose(found, expected, atol=float(expected.max()) / 255)
        assert kept.layout.num_windows == layer.weights.shape[0] // IMAGES and kept.layout.geometry == layer.geometry


def test_everything_is_a_float32_array_without_a_graph() -> None:
    seen = observe(oblong_model(), oblong_images())
    for name in ("head_maps", "rollouts", "entropy", "self_attention", "distance", "probability"):
        value = getattr(seen, name)
        assert isinstance(value, np.ndarray) and value.dtype == np.float32, name
    assert np.issubdtype(seen.predicted.dtype, np.integer)


def test_looking_changes_nothing() -> None:
    model, images = oblong_model(), oblong_images()
    with torch.no_grad():
        before = model(images)
    state = torch.get_rng_state()
    observe(model, images)
    assert torch.equal(state, torch.get_rng_state()) and torch.is_grad_enabled()
    with torch.no_grad():
        assert torch.equal(model(images), before)
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())


def test_what_cannot_be_asked() -> None:
    model, images = oblong_model(), oblong_images()
    with pytest.raises(UserError, match="outside the 5 x 11 patch grid"):
        observe(model, images, (5, 0))
    without = oblong_model(class_token=False, global_pool="avg")
    with pytest.raises(UserError, match="no class token: use query=patches"):
        observe(without, images, "cls")
    with pytest.raises(CaptureError, match="no attention"):
        observe(nn.Sequential(nn.Flatten(), nn.Linear(15 * 33, 13)), images)


def test_a_model_whose_grid_is_not_known_is_refused() -> None:
    blocks: Any = oblong_model().blocks
    with pytest.raises(UserError, match=r"positions of this model.* geometry=Geometry"):
        observe(blocks, torch.randn(IMAGES, 56, 21))


# --- layers that differ ---


def swin() -> nn.Module:
    """Windows of 3 x 3 patches on a 6 x 12 grid of 2 pixels, shifted in every second layer; then 3 x 6 patches."""
    torch.manual_seed(0)
    model = timm_swin.SwinTransformer(
        img_size=(12, 24),
        patch_size=2,
        window_size=3,
        in_chans=1,
        embed_dim=8,
        depths=(2, 1),
        num_heads=(2, 4),
        num_classes=5,
    )
    return sharpen(model)


def test_windows_and_stages_are_put_together_on_the_finest_grid() -> None:
    model, images = swin(), torch.randn(IMAGES, 1, 12, 24)
    seen = observe(model, images)
    assert [geometry.grid for geometry in seen.geometries] == [(6, 12), (6, 12), (3, 6)]
    assert seen.num_keys == (9, 9, 9) and seen.left_out == () and seen.query == "patches"
    assert seen.head_maps.shape == (IMAGES, 3, 4, 6, 12) and seen.rollouts is None and seen.self_attention is None
    assert np.isnan(seen.head_maps[:, :2, 2:]).all() and not np.isnan(seen.head_maps[:, 2]).any()
    assert np.isnan(seen.entropy[:, 0]).tolist() == [[False, False, True, True]] * IMAGES
    with torch.no_grad(), capture(model) as attention:
        model(images)
    weights = attention[1].weights.double().numpy()  # (2 images x 2 x 4 windows, head, query, key)
    for image, down, across, row, column in product(range(IMAGES), range(2), range(4), range(3), range(3)):
        window = weights[(image * 2 + down) * 4 + across]
        received = window.mean(axis=1)[:, row * 3 + column]
        place = (3 * down + row + 1) % 6, (3 * across + column + 1) % 12  # rolled by one patch
        np.testing.assert_allclose(seen.head_maps[image, 1, :2, *place], received, atol=1e-6)
    last = attention[2].weights.double().numpy()
    for row, column in product(range(6), range(12)):
        y, x = row // 2, column // 2
        np.testing.assert_allclose(
            seen.head_maps[1, 2, :, row, column], last[2 + x // 3].mean(axis=1)[:, y * 3 + x % 3], atol=1e-6
        )


def test_each_windows_map_sums_to_one_and_entropy_is_the_mean_over_windows() -> None:
    model, images = swin(), torch.randn(IMAGES, 1, 12, 24)
    seen = observe(model, images)
    np.testing.assert_allclose(seen.head_maps[:, 0, :2].sum(axis=(-2, -1)), 8, atol=1e-4)  # eight windows
    with torch.no_grad(), capture(model) as attention:
        model(images)
    weights = attention[0].weights.double().numpy()
    rows = -(weights * np.log(weights)).sum(axis=-1).mean(axis=-1)
    np.testing.assert_allclose(seen.entropy[:, 0, :2], rows.reshape(IMAGES, 8, 2).mean(axis=1), atol=1e-5)


def test_a_patch_inside_windows_cannot_be_asked() -> None:
    with pytest.raises(UserError, match="inside windows: use query=patches"):
        observe(swin(), torch.randn(IMAGES, 1, 12, 24), (0, 0))


def test_layers_without_a_place_are_left_out_and_named() -> None:
    model = timm.create_model("xcit_nano_12_p8_224", img_size=32, num_classes=3, depth=2)
    seen = observe(sharpen(model), torch.randn(IMAGES, 3, 32, 32))
    assert seen.left_out == ("blocks.0.attn", "blocks.1.attn")  # attention between channels
    assert seen.layer_names == ("cls_attn_blocks.0.attn", "cls_attn_blocks.1.attn")
    assert seen.head_maps.shape[-2:] == (4, 4)


def test_a_pooling_query_is_asked_where_there_is_one() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, num_classes=3, depth=2, class_token=False, global_pool="map"
    )
    images = torch.randn(IMAGES, 3, 64, 64)
    seen = observe(sharpen(model), images)
    with torch.no_grad(), capture(model) as attention:
        model(images)
    assert attention[2].weights.shape[2] == 1
    np.testing.assert_allclose(seen.head_maps[:, 2].reshape(IMAGES, 3, 16), attention[2].weights[:, :, 0], atol=1e-6)
    assert np.isnan(seen.distance[:, 2]).all() and not np.isnan(seen.distance[:, :2]).any()


def test_a_model_that_classifies_nothing_predicts_nothing() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, depth=1)
    seen = observe(sharpen(model), torch.randn(IMAGES, 3, 32, 32))
    assert (seen.predicted == -1).all() and np.isnan(seen.probability).all()


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
def test_rollout_options_are_passed_on(fusion: Any) -> None:
    model, images = oblong_model(), oblong_images()
    seen = observe(model, images, rollout=RolloutOptions(fusion, 0.3))
    with torch.no_grad(), capture(model) as attention:
        model(images)
    rollout = map_measures.attention_rollout([layer.weights for layer in attention], fusion, 0.3)
    assert seen.rollouts is not None
    np.testing.assert_allclose(seen.rollouts[:, -1].reshape(IMAGES, -1), rollout[:, 0, 1:], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("cls", "read")),
        ({"global_pool": "avg"}, ("patches", "unread")),
        ({"class_token": False, "reg_tokens": 4, "global_pool": "avg"}, ("patches", "absent")),
    ],
    ids=["class token", "class token that is not read", "registers only"],
)
def test_the_class_token_is_asked_only_where_it_is_read(options: Any, expected: tuple[str, str]) -> None:
    seen = observe(oblong_model(**options), oblong_images())
    assert (seen.query, seen.geometries[0].class_token) == expected
    if expected[1] == "absent":
        with pytest.raises(UserError, match="no class token"):
            observe(oblong_model(**options), oblong_images(), "cls")
    else:
        assert observe(oblong_model(**options), oblong_images(), "cls").query == "cls"


# --- memory ----------------------------------------------------------------------------------------------------


class Passes(nn.Module):
    """Notes how many images each pass has; `most` at once fit the memory."""

    def __init__(self, most: int = 99, least: int = 1, drops_axis: bool = False) -> None:
        super().__init__()
        self.model = oblong_model()
        self.most, self.least, self.drops_axis = most, least, drops_axis
        self.numbers: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.numbers.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError("planted")
        if len(images) < self.least:
            raise RuntimeError("The size of tensor a must match the size of tensor b")
        output = self.model(images)
        return output.squeeze() if self.drops_axis else output


def ten_images() -> Tensor:
    return torch.randn(10, 1, 15, 33, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("most_weights", "model", "numbers"),
    [
        (2**22, Passes(), [1, 9]),
        (3 * HEADS * 56**2, Passes(), [1, 3, 3, 3]),
        (1, Passes(), [1] * 10),
        (1, Passes(drops_axis=True), [1] * 10),
        (2**22, Passes(most=5), [1, 9, 4, 4, 1]),
        (2**22, Passes(most=1), [1, 9, 4, 2] + [1] * 9),
        (2**22, Passes(least=2), [1, 10]),
    ],
    ids=str,
)
def test_memory_is_one_images_and_what_is_seen_the_same(
    monkeypatch: pytest.MonkeyPatch, most_weights: int, model: Passes, numbers: list[int]
) -> None:
    whole = observe(model.model, ten_images())
    monkeypatch.setattr(observation, "MAX_WEIGHTS", most_weights)
    monkeypatch.setattr(layer_geometry, "places_of", lambda *given: places.MeasuredPlaces(failure="not in this test"))
    model.numbers.clear()
    seen = observe(model, ten_images(), geometry=Geometry(GRID, 1, (3, 3)))
    assert model.numbers == numbers
    for name in observation.OF_IMAGES:
        np.testing.assert_allclose(getattr(seen, name), getattr(whole, name), rtol=1e-3, atol=1e-5)


def test_memory_that_ends_with_one_image() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        observe(Passes(most=0), ten_images())
