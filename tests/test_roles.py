"""The chapter on roles: planted heads get their name, random weights none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from attention_visualizer import ink
from attention_visualizer.analysis import roles
from attention_visualizer.analysis.roles import find_roles, ink_of, relative_distance, role_bounds
from attention_visualizer.analysis.study import Effort, Study
from attention_visualizer.analysis.survey import Survey, take_survey
from attention_visualizer.controls import random_weights
from attention_visualizer.data import ImageDataModule
from attention_visualizer.head_roles import LEAST_INK, NO_ROLE
from attention_visualizer.model import VisionTransformer
from attention_visualizer.pictures import LabelledImages


@pytest.fixture(scope="module")
def digits() -> LabelledImages:
    data = ImageDataModule(name="digits", fallback=None)
    data.load()
    return LabelledImages(data.description, *data.splits["test"])


def random_model(seed: int) -> VisionTransformer:
    torch.manual_seed(seed)
    return VisionTransformer(embed_dim=32, num_heads=4, num_layers=2, mlp_dim=32).eval()


def study_of(model: VisionTransformer, pictures: LabelledImages, folder: Path) -> Study:
    return Study(model, pictures, folder, "weights", effort=Effort(40, 3))


def replaced(survey: Survey, maps: np.ndarray) -> Survey:
    """With other maps of the class token."""
    from dataclasses import replace

    return replace(survey, maps=maps.astype(np.float32))


def test_planted_heads_get_their_names(digits: LabelledImages, tmp_path: Path) -> None:
    study = study_of(random_model(0), digits, tmp_path)
    survey = study.survey
    inked = ink_of(study, survey.kept, survey)
    maps = np.full(survey.maps.shape, 1 / 17)
    maps[:, 0, 0] = 0.99 * inked / inked.sum(axis=1, keepdims=True)
    maps[:, 0, 1] = 0.99 * ~inked / (~inked).sum(axis=1, keepdims=True)
    maps[:, 0, 2] = 0.98 * np.eye(16)[5] + 0.001
    moving = np.random.default_rng(0).integers(0, 16, len(maps))
    maps[:, 1, 0] = 0.98 * np.eye(16)[moving] + 0.001  # another place on every image, whatever is in it
    controls = [(each, inked[:0]) for each in ()]
    found = find_roles(replaced(survey, maps), inked, controls)
    names = dict(zip([(layer, head) for layer in range(2) for head in range(4)], found.names, strict=True))
    assert names[0, 0] == ["ink"] and names[0, 1] == ["background"] and names[0, 2] == ["fixed place"]
    assert names[1, 0] == ["varies with the picture"]
    assert all(names[each] == [NO_ROLE] for each in [(0, 3), (1, 1), (1, 2), (1, 3)])


@pytest.mark.parametrize("seed", range(6))
def test_random_weights_have_no_role(seed: int, digits: LabelledImages, tmp_path: Path) -> None:
    study = study_of(random_model(seed), digits, tmp_path)
    inked = ink_of(study, study.survey.kept, study.survey)
    numbers = study.subset(1000)
    controls = [(each, ink_of(study, numbers[each.kept], each)) for each in study.control_surveys]
    found = find_roles(study.survey, inked, controls)
    assert all(names == [NO_ROLE] for names in found.names), (found.names, found.bounds)
    # Many follow ink significantly all the same: significance does not suffice.
    assert (found.p_value < 0.05).mean() > 0.3


def test_controls_raise_the_bounds(digits: LabelledImages, tmp_path: Path) -> None:
    study = study_of(random_model(1), digits, tmp_path)
    survey = study.survey
    inked = ink_of(study, survey.kept, survey)
    follower = np.repeat((0.99 * inked / inked.sum(axis=1, keepdims=True))[:, None, None], 2, axis=1).repeat(4, axis=2)
    bounds = role_bounds([(replaced(survey, follower), inked)])
    assert bounds["ink"] > 3 * LEAST_INK and role_bounds([])["ink"] == LEAST_INK


def test_the_last_layers_distance_is_not_counted(digits: LabelledImages, tmp_path: Path) -> None:
    study = study_of(random_model(1), digits, tmp_path)
    found = relative_distance(study.survey)
    assert not np.isnan(found[0]).any() and np.isnan(found[1]).all()
    np.testing.assert_allclose(found[0], 1, atol=0.15)  # random weights attend nearly uniformly


def test_the_chapter(digits: LabelledImages, tmp_path: Path) -> None:
    chapter = roles.write(study_of(random_model(2), digits, tmp_path))
    assert json.dumps(chapter.numbers, allow_nan=False)
    assert chapter.numbers["heads"] == [f"{layer}.{head}" for layer in (1, 2) for head in (1, 2, 3, 4)]
    assert len(chapter.tables[0].rows) == 8 and chapter.finding is not None and "No head of 8" in chapter.finding.text
    assert all((tmp_path / figure.name).is_file() for figure in chapter.figures)


def test_control_models_are_of_the_architecture_and_of_their_seed() -> None:
    model = random_model(0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    first, again, other = (random_weights(model, seed) for seed in (5, 5, 6))
    assert torch.equal(torch.random.get_rng_state(), state) and not first.training
    weights = [each.state_dict()["blocks.0.attn.qkv.weight"] for each in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_control_models_of_other_libraries_are_reset() -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_vit").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    fresh = random_weights(model, 1)
    for (name, mine), theirs in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert mine.shape == theirs.shape
        if mine.numel() > 1 and "norm" not in name:
            assert not torch.equal(mine, theirs), name
    # Bare parameters are shuffled, so that their size stays.
    assert torch.equal(model.pos_embed.flatten().sort().values, fresh.pos_embed.flatten().sort().values)
    with torch.no_grad():
        image = torch.randn(1, 3, 160, 160)
        assert torch.isfinite(fresh(image)).all()


def test_ink_by_patch() -> None:
    picture = torch.zeros(1, 1, 7, 6, dtype=torch.uint8)
    picture[0, 0, 0, 0] = 255
    picture[0, 0, 4, 5] = 127  # too dark for ink
    picture[0, 0, 6, 0] = 255  # beyond the last whole patch
    assert ink.inked_patches(picture, (2, 2)).tolist() == [[True, False, False, False]]
    amounts = ink.ink_amount(picture, (2, 2))
    np.testing.assert_allclose(amounts.numpy(), [[1 / 9, 0, 0, 127 / 255 / 9]], rtol=1e-5)
    survey = take_survey(random_model(0), [(torch.zeros(2, 1, 28, 28), None)], None, 2)
    assert survey.grid == (4, 4)
