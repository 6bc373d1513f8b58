"""The class atlas: planted differences in their place, ink's own share taken out, chance at its level."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from attention_visualizer.analysis.atlas import chapter as atlas_chapter
from attention_visualizer.analysis.atlas.measure import (
    Difference,
    chosen_pairs,
    class_means,
    compare,
    describe_images,
    largest_of_half,
)
from attention_visualizer.analysis.study.budget import Budget
from attention_visualizer.analysis.study.output import Output
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.analysis.study.target import Target
from attention_visualizer.data.datamodule import ImageDataModule
from attention_visualizer.data.image_sets import LabelledImageSet
from attention_visualizer.models.vision_transformer import VisionTransformer
from tests.helpers.ink_only import INK_ONLY, ink_of_digits

N, LAYERS, PATCHES = 120, 3, 5


def noise(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Maps, ink and labels that have nothing to do with each other."""
    generator = np.random.default_rng(seed)
    maps = generator.dirichlet(np.ones(PATCHES), (N, LAYERS)).astype(np.float32)
    return maps, generator.random((N, PATCHES)).astype(np.float32), np.arange(N) % 2


def compared(maps: np.ndarray, amount: np.ndarray, labels: np.ndarray) -> Difference:
    """The only pair, of classes 0 and 1."""
    _, (difference,) = compare(maps, amount, labels, amount[:, :3], {(0, 1): None})
    return difference


def test_a_planted_difference_is_found_in_its_place_only() -> None:
    maps, amount, labels = noise(0)
    maps[labels == 0, 1, 3] += 0.2
    found = compared(maps, amount, labels)
    expected = np.zeros((LAYERS, PATCHES), dtype=bool)
    expected[1, 3] = True
    assert (found.differs[0, 0] == expected).all() and (found.differs_in_all == expected).all()
    assert found.attention.value[0, 0, 1, 3] == pytest.approx(0.2, abs=0.08) and found.counts == (60, 60)
    assert not found.ink_differs.any()
    assert found.largest == (1, 3)


def test_a_difference_that_is_inks_alone_goes_with_the_ink() -> None:
    maps, amount, labels = noise(1)
    amount[labels == 0, 2] += 0.8
    maps[:, 0, 2] += 0.5 * amount[:, 2]
    found = compared(maps, amount, labels)
    assert found.differs[:, 0, 0, 2].all() and not found.differs[:, 1:, 0, 2].any()
    assert found.ink_differs[2]
    assert np.abs(found.attention.value[0, 1, 0, 2]) < np.abs(found.attention.value[0, 0, 0, 2]) / 3


def test_a_difference_that_is_another_places_ink_is_left_by_a_line_in_the_own_only() -> None:
    maps, amount, labels = noise(1)
    amount[labels == 0, 4] += 0.8
    maps[:, 0, 2] += 0.5 * amount[:, 4]
    found = compared(maps, amount, labels)
    assert found.differs[:, :2, 0, 2].all() and not found.differs[:, 2:, 0, 2].any() and not found.differs_in_all.any()


@pytest.mark.parametrize("attention", INK_ONLY.values(), ids=INK_ONLY.keys())
def test_no_place_differs_beyond_ink_where_attention_is_inks_alone(
    attention: Callable[[np.ndarray], np.ndarray],
) -> None:
    """On real digits, the brightest patch among them: what a parabola in the ink leaves is not the class's."""
    amount, pixels, labels = ink_of_digits()
    pairs = {(4, 9): None, (3, 5): None, (3, 8): None, (7, 9): None, (1, 8): 3}
    maps = attention(amount)[:, None].astype(np.float32)
    _, found = compare(maps, amount, labels, pixels, pairs)
    assert sum(each.differs[0, 0].sum() for each in found) > 10
    assert sum(each.differs_in_all.sum() for each in found) == 0


def test_what_a_class_does_beyond_ink_is_found_where_it_does_it() -> None:
    """Fours attend to one place more than their ink makes them; of three digits in ten the class is another than their
    ink says, since what ink tells for certain no regression leaves to the class."""
    amount, pixels, labels = ink_of_digits()
    generator = np.random.default_rng(0)
    labels = np.where(generator.random(len(labels)) < 0.3, generator.integers(0, 10, len(labels)), labels)
    maps = INK_ONLY["softmax 14"](amount)
    maps = 0.6 * maps + 0.4 * np.where(labels == 4, 1, 0.2)[:, None] * np.eye(16)[10]
    _, found = compare(maps[:, None].astype(np.float32), amount, labels, pixels, {(4, 9): None, (3, 5): None})
    assert found[0].differs_in_all.nonzero()[1].tolist() == [10] and not found[1].differs_in_all.any()


def test_what_is_too_small_is_no_difference_however_sure() -> None:
    maps, amount, labels = noise(2)
    maps[:, 0, 0] = 0.1 + 0.005 * (labels == 0) + 1e-4 * np.random.default_rng(0).standard_normal(N)
    found = compared(maps, amount, labels)
    assert found.p_value[0, 0, 0, 0] < 0.05 and not found.differs[0, 0, 0, 0]


def test_chance_is_at_its_level_for_all_places_of_all_pairs_together() -> None:
    smallest = []
    for seed in range(10, 50):
        maps, amount, _ = noise(seed)
        _, found = compare(maps, amount, np.arange(N) % 3, amount[:, :2], {(0, 1): None, (0, 2): None, (1, 2): None})
        smallest.append(np.min([each.p_value.min(axis=(2, 3)) for each in found], axis=0))
    rejected = (np.array(smallest) < 0.1).mean(axis=0)
    assert (rejected <= 0.25).all() and rejected.max() > 0, rejected  # 40 tests of 10%: three standard errors


def test_intervals_of_differences_are_those_of_a_bootstrap() -> None:
    maps, amount, labels = noise(4)
    maps[labels == 0, 1, 3] += 0.1
    interval = compared(maps, amount, labels).attention[0, 0]
    generator = np.random.default_rng(0)
    groups = [maps[labels == each] for each in (0, 1)]
    np.testing.assert_allclose(interval.value, groups[0].mean(axis=0) - groups[1].mean(axis=0), atol=1e-6)
    means = [[each[generator.integers(0, 60, 60)].mean(axis=0) for each in groups] for _ in range(600)]
    low, high = np.quantile([first - second for first, second in means], [0.025, 0.975], axis=0)
    np.testing.assert_allclose(interval.high - interval.low, high - low, rtol=0.2)
    assert interval.n == N and interval.low[1, 3] > 0


def test_the_largest_difference_is_chosen_on_one_half_and_reported_on_the_other() -> None:
    """Of noise, what is chosen as largest is on average 0 elsewhere."""
    chosen, elsewhere = [], []
    for seed in range(40):
        maps, _, labels = noise(seed)
        (layer, patch), interval = largest_of_half(maps, labels, (0, 1))
        half = [maps[labels == each][::2].mean(axis=0) for each in (0, 1)]
        other = [maps[labels == each][1::2].mean(axis=0) for each in (0, 1)]
        difference = half[0] - half[1]
        assert abs(difference[layer, patch]) == np.abs(difference).max() and interval.n == N // 2
        assert float(interval.value) == pytest.approx((other[0] - other[1])[layer, patch], abs=1e-6)
        chosen.append(abs(difference[layer, patch]))
        elsewhere.append(float(interval.value) * np.sign(difference[layer, patch]))
    assert abs(np.mean(elsewhere)) < 3 * np.std(elsewhere) / 40**0.5 < np.mean(chosen) / 2


def test_pairs_are_those_that_look_alike_then_those_that_are_confused() -> None:
    names = [str(digit) for digit in range(10)]
    labels = np.concatenate([[0, 0, 6, 2, 7, 1, 4], np.repeat(np.arange(10), 2)])
    predicted = np.concatenate([[6, 6, 0, 7, 7, 1, 9], np.repeat(np.arange(10), 2)])
    alike = {(4, 9): None, (3, 5): None, (3, 8): None, (7, 9): None}
    assert chosen_pairs(names, labels, predicted) == alike | {(0, 6): 3, (2, 7): 1}
    assert chosen_pairs(["cat", "dog"], np.array([0, 1, 0, 1]), np.array([1, 1, 0, 1])) == {(0, 1): 1}
    assert chosen_pairs(["cat", "dog"], np.array([0, 1]), np.array([1, 1])) == {}  # one image has no halves
    assert chosen_pairs(["cat", "dog"], np.array([0, 1, 0, 1]), np.array([0, 1, 0, 1])) == {}
    assert list(chosen_pairs(names, labels[labels != 9], predicted[labels != 9]))[:2] == [(3, 5), (3, 8)]


def test_it_is_said_which_images_a_mean_is_of() -> None:
    survey = SimpleNamespace(kept=np.arange(1234), num_images=1234)
    assert describe_images(survey, "test image") == "1,234 test images"  # type: ignore[arg-type]
    survey.num_images = 50_000
    expected = "1,234 test images of 50,000, each class in its share"
    assert describe_images(survey, "test image") == expected  # type: ignore[arg-type]


def test_means_of_classes() -> None:
    values = np.array([[1.0], [3.0], [5.0]])
    found = class_means(values, np.array([0, 0, 2]), 3)
    assert found[0, 0] == 2 and np.isnan(found[1, 0]) and found[2, 0] == 5


def test_the_chapter_on_digits(tmp_path: Path) -> None:
    data = ImageDataModule(name="digits", fallback=None)
    data.load()
    pictures = LabelledImageSet(data.description, *data.splits["test"])
    torch.manual_seed(0)
    model = VisionTransformer(embed_dim=12, num_heads=2, num_layers=2, mlp_dim=9).eval()
    study = Study(Target(model, pictures), Output(tmp_path), "weights", budget=Budget(40, 1))
    chapter = atlas_chapter.CHAPTER(study)
    assert len(chapter.numbers["pairs"]) == 6 and chapter.numbers["images"] == 300
    assert [each["regressors"] for each in chapter.numbers["taken_out"]] == [0, 1, 16, 152, 216, 66]
    regressions, pairs = chapter.tables
    assert len(regressions.rows) == 7 and regressions.caption.startswith("Of 192 positions")
    assert ["picked afterwards" in row[1] for row in pairs.rows] == [False] * 4 + [True] * 2
    assert chapter.finding is not None and "of 192 positions" in chapter.finding.text
    assert json.dumps(chapter.numbers, allow_nan=False) == json.dumps(atlas_chapter.CHAPTER(study).numbers)
    assert all((tmp_path / figure.name).is_file() for figure in chapter.figures) and len(pairs.rows) == 6
    assert np.shape(chapter.numbers["mean_rollouts"]) == np.shape(chapter.numbers["mean_maps"]) == (10, 2, 16)
    np.testing.assert_allclose(np.sum(chapter.numbers["mean_rollouts"], axis=-1), 1, atol=1e-4)
    assert all("300 test images" in figure.caption for figure in chapter.figures[:2])
    nameless = Study(
        Target(model, LabelledImageSet(data.description, pictures.images, None)), Output(tmp_path), "weights"
    )
    assert not atlas_chapter.CHAPTER(nameless).figures
