"""One pass over many pictures: the same numbers as a plain capture of all of them, in bounded memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from attention_visualizer import capture
from attention_visualizer.analysis.study import survey as module
from attention_visualizer.analysis.study.survey import MEASURE_NAMES, Survey, survey_model
from attention_visualizer.measures import map_measures
from attention_visualizer.models.vision_transformer import VisionTransformer

SIZES: dict[str, Any] = {
    "img_size": 12, "patch_size": 4, "embed_dim": 10, "num_heads": 2, "num_layers": 3, "mlp_dim": 14, "num_classes": 5,
}  # fmt: skip
N = 23


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(**SIZES).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(N, 1, 12, 12, generator=torch.Generator().manual_seed(1))


LABELS = torch.arange(N) % 5


def survey_of(model: VisionTransformer, images: Tensor, cut: int, labels: Tensor | None = LABELS) -> Survey:
    return survey_model(model, [(part, None) for part in images.split(cut)], labels, N)


def test_the_numbers_are_those_of_one_capture(model: VisionTransformer, images: Tensor) -> None:
    found = survey_of(model, images, 7)
    with torch.no_grad(), capture(model) as attention:
        logits = model(images)
    for layer, seen in enumerate(attention):
        assert seen.geometry is not None
        np.testing.assert_allclose(found.maps[:, layer], seen.weights[:, :, 0, 1:].numpy(), rtol=1e-5)
        np.testing.assert_allclose(found.readout_rows()[:, layer], seen.weights[:, :, 0].numpy(), atol=1e-6)
        entropy = map_measures.readout_entropy(seen.weights, seen.geometry).numpy()
        np.testing.assert_allclose(found.mean_of("entropy").value[layer, :-1], entropy.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(found.mean_of("entropy").value[layer, -1], entropy.mean(), rtol=1e-5)
        right = (logits.argmax(dim=1) == LABELS).numpy()
        for outcome in (0, 1):
            by_outcome = found.means_by_outcome.of_group(outcome)
            assert by_outcome.n == (right == outcome).sum()
            np.testing.assert_allclose(
                by_outcome.value[MEASURE_NAMES.index("entropy"), layer], entropy[right == outcome].mean(), rtol=1e-5
            )
        for label in range(5):
            by_class = found.means_by_class.of_group(label).value[MEASURE_NAMES.index("entropy"), layer]
            np.testing.assert_allclose(by_class, entropy[(LABELS == label).numpy()].mean(), rtol=1e-5)
    assert found.predicted.tolist() == logits.argmax(dim=1).tolist() and found.accuracy == pytest.approx(right.mean())
    np.testing.assert_allclose(found.shares.sum(axis=-1), 1, rtol=1e-5)
    assert found.reads_class_token and found.num_keys.tolist() == [10, 10, 10]
    # Nothing reads what the last layer's patch queries attend to.
    assert found.patch_queries_count.tolist() == [True, True, False]
    between = np.linalg.norm(np.indices((3, 3)).reshape(2, 9, 1) - np.indices((3, 3)).reshape(2, 1, 9), axis=0)
    np.testing.assert_allclose(found.uniform_distances, [4 * between.mean()] * 2 + [np.nan], rtol=1e-6)
    for end in ("value", "low", "high"):
        distances = getattr(found.mean_of("distance"), end) / found.uniform_distances[:, None]
        np.testing.assert_array_equal(getattr(found.relative_distances, end), distances)


def test_the_cut_into_batches_changes_nothing(model: VisionTransformer, images: Tensor) -> None:
    whole, parts = survey_of(model, images, N), survey_of(model, images, 4)
    np.testing.assert_allclose(parts.maps, whole.maps, atol=1e-6)
    for measure in ("entropy", "distance", "sink"):
        for end in ("value", "low", "high"):
            expected = getattr(whole.mean_of(measure), end)
            np.testing.assert_allclose(getattr(parts.mean_of(measure), end), expected, rtol=1e-4)


def test_intervals_include_what_each_half_of_the_images_gives(model: VisionTransformer, images: Tensor) -> None:
    whole, middle = survey_of(model, images, 4), N // 2
    halves = [
        survey_model(model, [(images[rows], None)], LABELS[rows], len(LABELS[rows]))
        for rows in (slice(middle), slice(middle, None))
    ]
    found, (first, second) = whole.mean_of("entropy"), (each.mean_of("entropy").value for each in halves)
    assert (found.low <= np.minimum(first, second) * (1 + 1e-6)).all()
    assert (found.high >= np.maximum(first, second) * (1 - 1e-6)).all()
    of_halves = whole.means.of_halves()[:, MEASURE_NAMES.index("entropy")]
    np.testing.assert_allclose(of_halves, [first, second], rtol=1e-5)


def test_only_as_many_maps_are_kept_as_fit(
    model: VisionTransformer, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = survey_of(model, images, 6)
    one = (whole.maps.nbytes + (whole.rollouts.nbytes if whole.rollouts is not None else 0)) // N
    monkeypatch.setattr(module, "MAX_BYTES", 10 * one)
    few = survey_of(model, images, 6)
    assert len(few.kept) == len(few.maps) == 10 and few.rollouts is not None and len(few.rollouts) == 10
    np.testing.assert_allclose(few.maps, whole.maps[few.kept], atol=1e-6)
    assert np.abs(np.bincount(LABELS.numpy()[few.kept]) - 2).max() <= 1
    np.testing.assert_allclose(few.mean_of("entropy").value, whole.mean_of("entropy").value, rtol=1e-6)
    assert few.num_images == N


def test_without_labels_there_are_no_groups(model: VisionTransformer, images: Tensor) -> None:
    found = survey_of(model, images, 8, None)
    assert found.correct is None and found.accuracy is None and (found.labels == -1).all()
    assert np.isnan(found.means_by_class.of_group(0).value).all() and found.means_by_class.of_group(0).n == 0
    assert [found.means_by_outcome.of_group(outcome).n for outcome in (0, 1)] == [0, 0]


def test_pictures_of_unknown_class_are_in_no_group(model: VisionTransformer, images: Tensor) -> None:
    labels = torch.where(torch.arange(N) < 6, -1, LABELS)
    found = survey_of(model, images, 5, labels)
    assert sum(found.means_by_class.of_group(label).n for label in range(5)) == N - 6
    assert sum(found.means_by_outcome.of_group(outcome).n for outcome in (0, 1)) == N - 6
    assert found.correct is None  # not of all


def test_a_model_without_a_head_is_neither_right_nor_wrong(images: Tensor) -> None:
    torch.manual_seed(4)
    sizes: dict[str, Any] = {"img_size": 12, "patch_size": 4, "in_chans": 1, "embed_dim": 10, "depth": 2}
    headless = timm.create_model("vit_tiny_patch16_224", num_heads=2, num_classes=0, **sizes).eval()
    found = survey_model(headless, [(part, None) for part in images.split(9)], LABELS, N)
    assert (found.predicted == -1).all() and np.isnan(found.probability).all()
    assert found.correct is None and found.accuracy is None
    assert [found.means_by_outcome.of_group(outcome).n for outcome in (0, 1)] == [0, 0]
    assert [found.means_by_class.of_group(label).n for label in range(5)] == [5, 5, 5, 4, 4]


def test_some_picture_is_kept_however_large_its_maps_are(
    model: VisionTransformer, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 1)
    found = survey_of(model, images, 6)
    assert len(found.kept) == len(found.maps) == 1 and found.num_images == N
    assert found.rollouts is not None and found.rollouts.shape == (1, 3, 9)  # though most batches gave nothing


def test_rollouts_are_of_every_batch(model: VisionTransformer, images: Tensor) -> None:
    found = survey_model(model, [(part, None) for part in images.split(10)], LABELS, N)
    with torch.no_grad(), capture(model) as attention:
        model(images)
    for depth in range(1, 4):
        expected = map_measures.attention_rollout([layer.weights for layer in list(attention)[:depth]])[:, 0, 1:]
        assert found.rollouts is not None
        np.testing.assert_allclose(found.rollouts[:, depth - 1], expected.numpy(), rtol=1e-4)


def test_a_model_that_is_always_right_has_no_wrong_group(model: VisionTransformer, images: Tensor) -> None:
    with torch.no_grad():
        found = survey_of(model, images, 8, model(images).argmax(dim=1))
    assert found.accuracy == 1.0
    assert np.isnan(found.means_by_outcome.difference(0, 1).value).all()


def test_selectivity_adds_up(model: VisionTransformer, images: Tensor) -> None:
    found = survey_of(model, images, N)
    total = found.selectivity.place.value + found.selectivity.content.value
    np.testing.assert_allclose(total, np.log(10) - found.mean_of("entropy").value[:, :-1], rtol=1e-4)


def test_mean_pooling_has_no_prefix(images: Tensor) -> None:
    torch.manual_seed(2)
    found = survey_of(VisionTransformer(**SIZES, pooling="mean").eval(), images, 9)
    assert not found.reads_class_token and found.num_keys.tolist() == [9, 9, 9]
    assert found.patch_queries_count.all()
    np.testing.assert_allclose(found.readout_rows().sum(axis=-1), 1, rtol=1e-5)
    assert (found.readout_rows()[..., 0] == 0).all()
    assert np.isnan(found.mean_of("class_token").value).all()


def test_stages_and_windows_are_distributions_on_the_finest_grid() -> None:
    torch.manual_seed(3)
    model = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)).eval()
    images = torch.randn(2, 3, 224, 224)
    found = survey_model(model, [(images, None)], None, 2)
    assert found.grid == (56, 56)
    there = ~np.isnan(found.readout_rows()).all(axis=-1)
    np.testing.assert_allclose(found.readout_rows()[there].sum(axis=-1), 1, rtol=1e-4)
    heads = [3, 6, 12, 24]
    assert there[0].sum(axis=-1).tolist() == heads and found.rollouts is None
    assert (~np.isnan(found.selectivity.place.value)).sum(axis=-1).tolist() == heads
    # What a coarse layer's patch has is spread evenly: the 8 x 8 finest patches below it have the same.
    last = found.readout_rows()[0, -1, 0, 1:].reshape(7, 8, 7, 8)
    assert np.ptp(last, axis=(1, 3)).max() == 0 and np.ptp(last) > 0
