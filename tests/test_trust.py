"""Trust: planted good and bad maps come out right, random weights never do, and the chapter repeats itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from attention_visualizer import inference
from attention_visualizer.analysis import trials, trust
from attention_visualizer.analysis.study import Effort, Study
from attention_visualizer.analysis.trials import (
    AMOUNT,
    INKED,
    LEAST_GAIN,
    METHODS,
    RANDOM,
    cascade,
    judged,
    rank_correlations,
    try_methods,
)
from attention_visualizer.data import ImageDataModule
from attention_visualizer.inference import Interval
from attention_visualizer.model import VisionTransformer
from attention_visualizer.perturbation import OPERATORS, Curves
from attention_visualizer.pictures import LabelledImages

SMALL = {"embed_dim": 22, "num_heads": 2, "num_layers": 2, "mlp_dim": 29}
SHARES = np.linspace(0, 1, 5)


@pytest.fixture(scope="module")
def digits() -> LabelledImages:
    data = ImageDataModule(name="digits", fallback=None)
    data.load()
    images, labels = data.splits["test"]
    return LabelledImages(data.description, images[:120], labels[:120])


def study_of(model: VisionTransformer, pictures: LabelledImages, folder: Path, count: int = 40) -> Study:
    return Study(model.eval(), pictures, folder, "weights", effort=Effort(count, 1))


def random_model(seed: int) -> VisionTransformer:
    torch.manual_seed(seed)
    return VisionTransformer(**SMALL).eval()  # type: ignore[arg-type]


def curves_of(deletion_area: float, insertion_area: float, n: int = 60, seed: int = 0) -> Curves:
    """Of a given mean area, with pictures that differ."""
    noise = 0.01 * np.random.default_rng(seed).standard_normal((n, 1))
    return Curves(SHARES, deletion_area + noise + 0 * SHARES, insertion_area + noise + 0 * SHARES)


def planted(areas: tuple[float, float], likeness: float | None = 0.1, answers: bool = True) -> trials.MethodTrust:
    """A map with these areas, beside ink rankings of 0.4 and 0.6."""
    curves = {
        (name, operator): curves_of(0.4, 0.6, seed=1) for name in (INKED, AMOUNT, RANDOM) for operator in OPERATORS
    }
    curves |= {("map", operator): curves_of(*areas, seed=2) for operator in OPERATORS}
    stages = None if likeness is None else np.array([0.9, likeness])
    told = None if stages is None else Interval(stages, stages - 0.05, stages + 0.05, 60)
    maps, inked = np.ones((60, 4)), np.tile([True, False, True, False], (60, 1))
    return judged("map", curves, maps, np.tile(np.arange(4), (60, 1)), inked, told, answers)


def test_a_map_that_beats_the_ink_and_needs_the_weights_is_trusted() -> None:
    found = planted((0.3, 0.7))
    assert found.trusted and found.reason.startswith("Trust map here")
    assert len(found.gains) == 8 and all(
        float(gain.value.value) == pytest.approx(0.1, abs=0.01) for gain in found.gains
    )


@pytest.mark.parametrize(
    ("areas", "likeness", "answers", "said"),
    [
        ((0.3, 0.55), 0.1, True, "4 of 8 comparisons"),  # finds what is needed, not what suffices
        ((0.5, 0.7), 0.1, True, "4 of 8 comparisons"),
        ((0.39, 0.61), 0.1, True, "8 of 8 comparisons"),  # significant, but too little
        ((0.3, 0.7), 0.8, True, "random weights is 0.80"),  # the map is the same without training
        ((0.3, 0.7), None, True, "is not known"),
        ((0.3, 0.7), 0.1, False, "no better than by chance"),
    ],
)
def test_a_map_that_fails_in_one_respect_is_not(
    areas: tuple[float, float], likeness: float | None, answers: bool, said: str
) -> None:
    found = planted(areas, likeness, answers)
    assert not found.trusted and found.reason.startswith("Do not trust map here") and said in found.reason


def test_significance_alone_never_suffices() -> None:
    found = planted((0.39, 0.61))
    assert all(gain.value.low > 0 and gain.value.value < LEAST_GAIN for gain in found.gains)


def test_pointing_and_mass() -> None:
    curves = {(name, each): curves_of(0.4, 0.6, n=3) for name in ("map", INKED, AMOUNT) for each in OPERATORS}
    maps = np.array([[3.0, 1.0, 0, 0], [0, 2.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    inked = np.array([[True, False, False, False], [True, False, True, False], [True, True, False, False]])
    ranking = np.array([[0, 1, 2, 3], [1, 2, 3, 0], [1, 0, 2, 3]])
    found = judged("map", curves, maps, ranking, inked, None, True)
    assert float(found.pointing.value) == pytest.approx(2 / 3)
    assert float(found.mass.value) == pytest.approx((3 / 4 + 1 / 4 + 2 / 4) / 3)


def test_rank_correlations_are_spearmans() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 5, (20, 9)).astype(float), generator.random((20, 9))
    expected = [scipy.stats.spearmanr(a, b).statistic for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(rank_correlations(first, second), expected)
    assert rank_correlations(np.ones((2, 5)), generator.random((2, 5))).tolist() == [0.0, 0.0]


def test_weights_become_random_from_the_output_down() -> None:
    model = random_model(1)
    original = {name: value.clone() for name, value in model.state_dict().items()}
    changed: set[str] = set()
    seen = []
    for stage, now in cascade(model, 7):
        differing = {name for name, value in now.state_dict().items() if not torch.equal(value, original[name])}
        assert changed <= differing
        seen.append(
            (stage, {name.split(".")[0] if not name.startswith("blocks") else name[:8] for name in differing - changed})
        )
        changed = differing
    assert [stage for stage, _ in seen] == ["head", "block 2", "block 1", "embedding"]
    assert seen[0][1] == {"head"} and seen[1][1] == {"blocks.1"} and seen[2][1] == {"blocks.0"}
    assert seen[3][1] == {"patch_embed", "cls_token", "pos_embed"}
    for name, value in model.state_dict().items():
        assert torch.equal(value, original[name])


@pytest.mark.parametrize("seed", [11, 12, 13, 14])
def test_random_weights_are_never_trusted(seed: int, digits: LabelledImages, tmp_path: Path) -> None:
    study = study_of(random_model(seed), digits, tmp_path)
    model = study.model
    assert isinstance(model, VisionTransformer)
    found = try_methods(study, model, study.subset(40), randomise=True)
    assert [each.name for each in found.methods] == list(METHODS) and not any(each.trusted for each in found.methods)


def test_the_chapter_says_the_same_twice_and_all_of_it(digits: LabelledImages, tmp_path: Path) -> None:
    chapters = [trust.write(study_of(random_model(5), digits, tmp_path, 30)) for _ in range(2)]
    first = json.dumps(chapters[0].numbers, allow_nan=False)
    assert first == json.dumps(chapters[1].numbers, allow_nan=False) and chapters[0].text == chapters[1].text
    numbers = json.loads(first)
    assert numbers["images"] == 30 and numbers["stages"] == ["head", "block 2", "block 1", "embedding"]
    assert set(numbers["rankings"]) == {*METHODS, RANDOM, INKED, AMOUNT}
    assert chapters[0].text.count("\n- Do not trust") == 4 and (tmp_path / "attention_trust.png").is_file()
    assert chapters[0].finding is not None and "None of the maps" in chapters[0].finding.text


def test_without_known_classes_the_chapter_is_one_sentence(digits: LabelledImages, tmp_path: Path) -> None:
    nameless = LabelledImages(digits.description, digits.images, None)
    chapter = trust.write(study_of(random_model(5), nameless, tmp_path))
    assert "classes are known" in chapter.text and not chapter.figures


def test_an_empty_null_is_at_its_level() -> None:
    """Maps no better than the ink: an interval lies above 0 no more often than it may (one side, 2.5 %)."""
    generator = np.random.default_rng(0)
    above = [float(inference.bootstrap_mean(generator.standard_normal(50), seed=seed).low) > 0 for seed in range(400)]
    assert 0.005 <= np.mean(above) <= 0.055
