"""The class atlas: planted differences in their place, ink's own share taken out, chance at its level."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression

from attention_visualizer.analysis import atlas
from attention_visualizer.analysis.atlas import chosen_pairs, class_means, difference, without_ink
from attention_visualizer.analysis.study import Effort, Study
from attention_visualizer.data import ImageDataModule
from attention_visualizer.model import VisionTransformer
from attention_visualizer.pictures import LabelledImages

N, LAYERS, PATCHES = 120, 3, 5


def noise(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Maps, ink and labels that have nothing to do with each other."""
    generator = np.random.default_rng(seed)
    maps = generator.dirichlet(np.ones(PATCHES), (N, LAYERS)).astype(np.float32)
    return maps, generator.random((N, PATCHES)).astype(np.float32), np.arange(N) % 2


def test_a_planted_difference_is_found_in_its_place_only() -> None:
    maps, amount, labels = noise(0)
    maps[labels == 0, 1, 3] += 0.2
    found = difference(maps, amount, labels, 0, 1)
    expected = np.zeros((LAYERS, PATCHES), dtype=bool)
    expected[1, 3] = True
    assert (found.differs() == expected).all() and (found.differs_beyond_ink() == expected).all()
    assert found.attention[1, 3] == pytest.approx(0.2, abs=0.08) and found.counts == (60, 60)
    assert not (found.ink_p_value < 0.05).any()


def test_a_difference_that_is_inks_alone_goes_with_the_ink() -> None:
    maps, amount, labels = noise(1)
    amount[labels == 0, 2] += 0.8
    maps[:, 0, 2] += 0.5 * amount[:, 2]
    found = difference(maps, amount, labels, 0, 1)
    assert found.differs()[0, 2] and not found.differs_beyond_ink()[0, 2]
    assert found.ink_p_value[2] < 0.05 and np.abs(found.beyond_ink[0, 2]) < np.abs(found.attention[0, 2]) / 3


def test_what_is_too_small_is_no_difference_however_sure() -> None:
    maps, amount, labels = noise(2)
    maps[:, 0, 0] = 0.1 + 0.005 * (labels == 0) + 1e-4 * np.random.default_rng(0).standard_normal(N)
    found = difference(maps, amount, labels, 0, 1)
    assert found.p_value[0, 0] < 0.05 and not found.differs()[0, 0]


def test_chance_is_at_its_level_for_all_places_together() -> None:
    found = [difference(*noise(seed), 0, 1, seed) for seed in range(10, 110)]
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


def test_pairs_are_those_that_look_alike_then_those_that_are_confused() -> None:
    names = [str(digit) for digit in range(10)]
    labels, predicted = np.array([0, 0, 6, 2, 7, 1, 4]), np.array([6, 6, 0, 7, 7, 1, 9])
    assert chosen_pairs(names, labels, predicted) == [(4, 9), (3, 5), (3, 8), (7, 9), (0, 6), (2, 7)]
    assert chosen_pairs(["cat", "dog"], np.array([0, 1]), np.array([1, 1])) == [(0, 1)]
    assert chosen_pairs(["cat", "dog"], np.array([0, 1]), np.array([0, 1])) == []


def test_means_of_classes() -> None:
    values = np.array([[1.0], [3.0], [5.0]])
    found = class_means(values, np.array([0, 0, 2]), 3)
    assert found[0, 0] == 2 and np.isnan(found[1, 0]) and found[2, 0] == 5


def test_the_chapter_on_digits(tmp_path: Path) -> None:
    data = ImageDataModule(name="digits", fallback=None)
    data.load()
    pictures = LabelledImages(data.description, *data.splits["test"])
    torch.manual_seed(0)
    model = VisionTransformer(embed_dim=12, num_heads=2, num_layers=2, mlp_dim=9).eval()
    study = Study(model, pictures, tmp_path, "weights", effort=Effort(40, 1))
    chapter = atlas.write(study)
    assert len(chapter.numbers["pairs"]) == 6 and chapter.numbers["images"] == 300
    assert json.dumps(chapter.numbers, allow_nan=False) == json.dumps(atlas.write(study).numbers)
    assert all((tmp_path / figure.name).is_file() for figure in chapter.figures) and len(chapter.tables[0].rows) == 6
    nameless = Study(model, LabelledImages(data.description, pictures.images, None), tmp_path, "weights")
    assert not atlas.write(nameless).figures
