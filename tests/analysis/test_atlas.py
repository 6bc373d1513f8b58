"""The class atlas: planted differences in their place, ink's own share taken out, chance at its level."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression

from attention_visualizer.analysis.atlas import chapter as atlas_chapter
from attention_visualizer.analysis.atlas import measure as atlas_measure
from attention_visualizer.analysis.atlas.measure import (
    chosen_pairs,
    class_means,
    describe_images,
    measure_difference,
    resampled_differences,
    without_ink,
)
from attention_visualizer.analysis.study.budget import Budget
from attention_visualizer.analysis.study.output import Output
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.analysis.study.target import Target
from attention_visualizer.data.datamodule import ImageDataModule
from attention_visualizer.data.image_sets import LabelledImageSet
from attention_visualizer.models.vision_transformer import VisionTransformer

N, LAYERS, PATCHES = 120, 3, 5


def noise(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Maps, ink and labels that have nothing to do with each other."""
    generator = np.random.default_rng(seed)
    maps = generator.dirichlet(np.ones(PATCHES), (N, LAYERS)).astype(np.float32)
    return maps, generator.random((N, PATCHES)).astype(np.float32), np.arange(N) % 2


def test_a_planted_difference_is_found_in_its_place_only() -> None:
    maps, amount, labels = noise(0)
    maps[labels == 0, 1, 3] += 0.2
    found = measure_difference(maps, amount, labels, 0, 1)
    expected = np.zeros((LAYERS, PATCHES), dtype=bool)
    expected[1, 3] = True
    assert (found.differs() == expected).all() and (found.differs_beyond_ink() == expected).all()
    assert found.attention.value[1, 3] == pytest.approx(0.2, abs=0.08) and found.counts == (60, 60)
    assert not (found.ink_p_value < 0.05).any()


def test_a_difference_that_is_inks_alone_goes_with_the_ink() -> None:
    maps, amount, labels = noise(1)
    amount[labels == 0, 2] += 0.8
    maps[:, 0, 2] += 0.5 * amount[:, 2]
    found = measure_difference(maps, amount, labels, 0, 1)
    assert found.differs()[0, 2] and not found.differs_beyond_ink()[0, 2]
    assert (
        found.ink_p_value[2] < 0.05 and np.abs(found.beyond_ink.value[0, 2]) < np.abs(found.attention.value[0, 2]) / 3
    )


def test_what_is_too_small_is_no_difference_however_sure() -> None:
    maps, amount, labels = noise(2)
    maps[:, 0, 0] = 0.1 + 0.005 * (labels == 0) + 1e-4 * np.random.default_rng(0).standard_normal(N)
    found = measure_difference(maps, amount, labels, 0, 1)
    assert found.p_value[0, 0] < 0.05 and not found.differs()[0, 0]


def test_chance_is_at_its_level_for_all_places_together() -> None:
    found = [measure_difference(*noise(seed), 0, 1) for seed in range(10, 110)]
    for p_values in ([each.p_value.min() for each in found], [each.beyond_ink_p_value.min() for each in found]):
        assert 0.03 <= np.mean(np.array(p_values) < 0.1) <= 0.19  # 100 tests of 10 %: three standard errors


def test_what_ink_predicts_is_a_line_for_each_place() -> None:
    maps, amount, _ = noise(3)
    maps[:, 1, 4] += amount[:, 4]
    left = without_ink(maps, amount)
    for layer in range(LAYERS):
        for patch in range(PATCHES):
            line = LinearRegression().fit(amount[:, [patch]], maps[:, layer, patch])
            expected = maps[:, layer, patch] - line.predict(amount[:, [patch]])
            np.testing.assert_allclose(left[:, layer, patch], expected, atol=1e-5)
    amount[:, 0] = 0  # a place without any ink predicts nothing
    np.testing.assert_allclose(without_ink(maps, amount)[:, 0, 0], maps[:, 0, 0] - maps[:, 0, 0].mean(), atol=1e-6)


def test_resampled_differences_are_those_of_the_line_and_of_a_full_bootstrap() -> None:
    maps, amount, labels = noise(4)
    order = np.argsort(labels, kind="stable")
    maps, amount, labels = maps[order], amount[order], labels[order]
    amount[labels == 0, 2] += 0.4
    maps[:, 0, 2] += 0.3 * amount[:, 2]
    maps[labels == 0, 1, 3] += 0.1
    count = int((labels == 0).sum())

    def plainly(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        left, first = without_ink(maps[rows], amount[rows]), labels[rows] == 0
        attention = maps[rows][first].mean(axis=0) - maps[rows][~first].mean(axis=0)
        beyond = left[first].mean(axis=0) - left[~first].mean(axis=0)
        return attention, beyond, 1 - (beyond**2).sum() / (attention**2).sum()

    attention, beyond, with_ink, of_ink = resampled_differences(maps, amount, count)
    for interval, value in zip((attention, beyond, with_ink), plainly(np.arange(N)), strict=True):
        np.testing.assert_allclose(interval.value, value, atol=1e-5)
        assert interval.n == N
    np.testing.assert_allclose(of_ink.value, amount[:count].mean(axis=0) - amount[count:].mean(axis=0), atol=1e-6)
    generator = np.random.default_rng(0)
    groups = np.flatnonzero(labels == 0), np.flatnonzero(labels == 1)
    drawn = [plainly(np.concatenate([generator.choice(rows, len(rows)) for rows in groups])) for _ in range(600)]
    for number, interval in enumerate((attention, beyond, with_ink)):
        low, high = np.quantile(np.array([each[number] for each in drawn]), [0.025, 0.975], axis=0)
        np.testing.assert_allclose(interval.high - interval.low, high - low, rtol=0.25)
    assert attention.low[1, 3] > 0 and beyond.low[1, 3] > 0 and 0 < with_ink.low < 0.4 < with_ink.high < 1


def test_pairs_are_those_that_look_alike_then_those_that_are_confused() -> None:
    names = [str(digit) for digit in range(10)]
    labels, predicted = np.array([0, 0, 6, 2, 7, 1, 4]), np.array([6, 6, 0, 7, 7, 1, 9])
    assert chosen_pairs(names, labels, predicted) == [(4, 9), (3, 5), (3, 8), (7, 9), (0, 6), (2, 7)]
    assert chosen_pairs(["cat", "dog"], np.array([0, 1]), np.array([1, 1])) == [(0, 1)]
    assert chosen_pairs(["cat", "dog"], np.array([0, 1]), np.array([0, 1])) == []


def test_it_is_said_which_images_a_mean_is_of(monkeypatch: pytest.MonkeyPatch) -> None:
    survey = SimpleNamespace(kept=np.arange(1234), num_images=1234)
    assert describe_images(survey, "test image") == "1,234 test images"  # type: ignore[arg-type]
    survey.num_images = 50_000
    expected = "1,234 test images of 50,000, each class in its share"
    assert describe_images(survey, "test image") == expected  # type: ignore[arg-type]
    monkeypatch.setattr(atlas_measure, "MAX_OF_CLASS", 50)
    monkeypatch.setattr(atlas_chapter, "MAX_OF_CLASS", 50)
    found = measure_difference(*noise(0), 0, 1)
    assert found.counts == (50, 50) and atlas_chapter.of_each_class([found]) == "the first 50 images of each class"


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
    assert json.dumps(chapter.numbers, allow_nan=False) == json.dumps(atlas_chapter.CHAPTER(study).numbers)
    assert all((tmp_path / figure.name).is_file() for figure in chapter.figures) and len(chapter.tables[0].rows) == 6
    assert np.shape(chapter.numbers["mean_rollouts"]) == np.shape(chapter.numbers["mean_maps"]) == (10, 2, 16)
    np.testing.assert_allclose(np.sum(chapter.numbers["mean_rollouts"], axis=-1), 1, atol=1e-4)
    assert all("300 test images" in figure.caption for figure in chapter.figures[:2])
    assert "all images of both classes" in chapter.tables[0].caption
    nameless = Study(
        Target(model, LabelledImageSet(data.description, pictures.images, None)), Output(tmp_path), "weights"
    )
    assert not atlas_chapter.CHAPTER(nameless).figures
