"""How much of the maps goes with the class beyond ink: functions of ink must not pass, what the class makes must."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.model_selection import cross_val_predict

from attention_visualizer.measures import ink_regression
from attention_visualizer.measures.class_variance import ClassShare, class_variance, smallest
from attention_visualizer.measures.ink_regression import (
    ALL_INKS,
    NOTHING,
    OWN_INK,
    PIXELS,
    SOFTMAX,
    SQUARES,
    Residuals,
    out_of_fold,
    residuals_of,
    softmax,
)
from tests.helpers.ink_only import INK_ONLY, PATCHES, ink_of_digits

LEAST = 0.06  # of the claim that attention differs between classes


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return ink_of_digits()


def relative(shares: np.ndarray) -> np.ndarray:
    """[image, patch] -> [image, one layer, patch], relative to a uniform share."""
    return (PATCHES * shares[:, None]).astype(np.float32)


def by_name(shares: list[ClassShare]) -> dict[str, float]:
    return {each.taken_out: float(each.share.value) for each in shares}


@pytest.mark.parametrize("attention", INK_ONLY.values(), ids=INK_ONLY.keys())
def test_attention_that_is_inks_alone_is_no_matter_of_class(
    digits: tuple[np.ndarray, ...], attention: Callable[[np.ndarray], np.ndarray]
) -> None:
    amount, pixels, labels = digits
    shares = class_variance(relative(attention(amount)), amount, labels, pixels, resampled=False)
    found = by_name(shares)
    assert list(found) == [NOTHING, OWN_INK, ALL_INKS, SQUARES, SOFTMAX, PIXELS]
    assert found[NOTHING] > LEAST, "the planted maps must differ between classes, or nothing is tested"
    assert float(smallest(shares).share.value) < LEAST / 4
    assert found[SOFTMAX] < LEAST / 4


def test_what_the_class_makes_is_found_whatever_is_taken_out(digits: tuple[np.ndarray, ...]) -> None:
    """A third of the attention on a place of the class, the rest on ink; of three images in ten the class is another
    than their ink says."""
    amount, pixels, labels = digits
    generator = np.random.default_rng(1)
    others = generator.integers(0, 10, len(labels))
    labels = np.where(generator.random(len(labels)) < 0.3, others, labels)
    place = np.random.default_rng(0).permutation(PATCHES)[:10]
    maps = relative(0.35 * np.eye(PATCHES)[place[labels]] + 0.65 * softmax(14 * amount))
    still = relative(softmax(14 * amount))
    shares = class_variance(np.concatenate([maps, still], axis=1), amount, labels, pixels)
    least = smallest(shares)
    first, second = least.by_layer.value
    assert first > LEAST and least.p_value == least.p_by_layer[0] == 1 / 1000
    assert abs(second) < LEAST / 4
    for each in shares:
        assert each.share.low < each.share.value < each.share.high
        assert (each.by_layer.low < each.by_layer.value).all() and (each.by_layer.value < each.by_layer.high).all()
    # What each regression leaves of maps that the class alone makes: of digits whose class their ink tells, little.
    labels = digits[2]
    alone = class_variance(relative(np.eye(PATCHES)[place[labels]]), amount, labels, pixels, resampled=False)
    for each in alone:
        assert float(each.share.value) == pytest.approx(each.kept, abs=0.05)
    assert alone[0].kept == pytest.approx(1) and alone[3].kept < 0.1 < alone[2].kept < alone[1].kept < 1


def test_shares_are_of_the_variance_before_and_chance_is_taken_off() -> None:
    generator = np.random.default_rng(1)
    labels = np.arange(400) % 4
    maps = generator.standard_normal((400, 2, 3)).astype(np.float32)
    maps[:, 1] += 2 * np.eye(4)[labels][:, :3]
    amount = generator.random((400, 3))
    nothing = class_variance(maps, amount, labels, resampled=False)[0]
    groups = np.stack([maps[labels == each].mean(axis=0) for each in range(4)])[labels]
    total = ((maps - maps.mean(axis=0)) ** 2).sum(axis=(0, 2))
    expected = ((groups - maps.mean(axis=0)) ** 2).sum(axis=(0, 2))
    chance = total * 3 / 399
    np.testing.assert_allclose(nothing.by_layer.value, (expected - chance) / total, rtol=1e-4)
    assert float(nothing.share.value) == pytest.approx((expected - chance).sum() / total.sum(), rel=1e-4)
    permuted = [
        class_variance(maps, amount, generator.permutation(labels), resampled=False)[0].share.value for _ in range(30)
    ]
    assert abs(np.mean(permuted)) < 3 * np.std(permuted) / np.sqrt(30)
    assert np.isnan(nothing.p_value) and len(nothing.replicates) == 0


def test_p_values_are_at_their_level_where_class_says_nothing_beyond_ink() -> None:
    """Classes that are made by the ink, maps that follow it in a line, and noise that differs between classes."""
    p_values = []
    for seed in range(40):
        generator = np.random.default_rng(seed)
        amount = generator.random((150, 4))
        labels = (amount @ [3, -2, 1, 0] + 0.3 * generator.standard_normal(150) > 1).astype(np.int64)
        noise = generator.standard_normal((150, 2, 4)) * (1 + labels)[:, None, None]
        shares = class_variance((noise + 3 * amount[:, None]).astype(np.float32), amount, labels)
        assert shares[0].p_value == 1 / 1000
        p_values.append([each.p_value for each in shares[1:]])
    rejected = (np.array(p_values) < 0.1).mean(axis=0)
    assert (rejected <= 0.25).all() and rejected.max() > 0, rejected  # 40 tests of 10%: three standard errors


def test_intervals_cover_the_share() -> None:
    """Of a population of known share, 1 / 3: a class effect of variance 1 and noise of variance 2."""
    covered = 0
    for seed in range(40):
        generator = np.random.default_rng(seed)
        labels = np.arange(200) % 2
        maps = np.stack([2 * labels - 1 + 2**0.5 * generator.standard_normal(200) for _ in range(6)], axis=1)
        (interval,) = [class_variance(maps[:, None].astype(np.float32), np.zeros((200, 6)), labels)[0].share]
        covered += interval.low <= 1 / 3 <= interval.high
    assert covered >= 33


def test_residuals_of_another_regression_are_a_rung_of_their_own(digits: tuple[np.ndarray, ...]) -> None:
    amount, _, labels = digits
    maps = relative(softmax(14 * amount))
    shares = class_variance(maps, amount, labels, given={"a perfect prediction": np.zeros_like(maps)}, resampled=False)
    assert shares[-1].taken_out == "a perfect prediction" and shares[-1].regressors is None
    assert abs(shares[-1].share.value) < 1e-9 and shares[-1].predicted == 1 and np.isnan(shares[-1].kept)
    assert [each.regressors for each in shares[:-1]] == [0, 1, 16, 152, 216]


def test_regressions_are_out_of_fold_and_scikit_learns() -> None:
    generator = np.random.default_rng(5)
    design = generator.standard_normal((90, 7)) @ generator.standard_normal((7, 7)) + 3
    targets = design[:, :2] + generator.standard_normal((90, 2))
    folds = np.arange(90) % ink_regression.FOLDS
    left, classes = out_of_fold(design, targets, targets[:, :1], folds, 0)
    splits = [(np.flatnonzero(folds != each), np.flatnonzero(folds == each)) for each in range(ink_regression.FOLDS)]
    scaled = (design - design.mean(axis=0)) / design.std(axis=0)
    expected = []
    for penalty in ink_regression.PENALTIES:
        ridge = Ridge(penalty * 72)  # images that each fit is of
        expected.append(targets - cross_val_predict(ridge, scaled, targets, cv=splits))
    for column in range(2):
        best = min((each[:, column] for each in expected), key=lambda each: float((each**2).sum()))
        np.testing.assert_allclose(left[:, column], best - best.mean(), atol=1e-4)
    np.testing.assert_array_equal(left[:, 0], classes[:, 0])


def test_regressors_that_predict_nothing_take_nothing_out() -> None:
    generator = np.random.default_rng(6)
    maps = generator.standard_normal((60, 2, 16)).astype(np.float32)
    for residuals in residuals_of(maps, generator.random((60, 16)), np.arange(60) % 3):
        assert 0.9 < residuals.maps.var() / maps.var() < 1.25, residuals.taken_out


def test_effects_of_classes_are_those_of_a_regression_with_them() -> None:
    """Frisch and Waugh (1933): residuals on residuals give the coefficients of the whole regression."""
    generator = np.random.default_rng(7)
    labels = generator.integers(0, 3, 80)
    design = np.column_stack([np.ones(80), generator.random((80, 2)) + labels[:, None]])
    maps = generator.standard_normal((80, 1, 2)) + labels[:, None, None]
    project = np.eye(80) - design @ np.linalg.pinv(design)
    indicators = np.eye(3)[labels]
    residuals = Residuals("", 2, np.tensordot(project, maps, 1).astype(np.float32), (project @ indicators)[:, :, None])
    effects = np.einsum("nkp,nlp->klp", np.broadcast_to(residuals.class_effects, (80, 3, 2)), residuals.maps)
    whole = np.linalg.lstsq(np.column_stack([design, indicators[:, 1:]]), maps[:, 0], rcond=None)[0][3:]
    np.testing.assert_allclose(effects[1:, 0] - effects[0, 0], whole, atol=1e-4)
    with_classes = np.column_stack([design, indicators])
    np.testing.assert_allclose(
        residuals.noise[:, 0], maps[:, 0] - with_classes @ np.linalg.pinv(with_classes) @ maps[:, 0], atol=1e-4
    )
