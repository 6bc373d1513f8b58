"""Attention on like patches: the estimate, its interval and its test, against other code and by error rate."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression

from attention_visualizer.measures.matched_patches import (
    OUTSIDE,
    above_median,
    centre_within_strata,
    excess,
    members_by_stratum,
    permuted_excess,
    strata_of,
)

IMAGES, PATCHES = 131, 6


def example(seed: int = 0, effect: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shares that sum to 1 over patches, a feature whose patches lie together, and strata by place and ink.

    The shares depend on the place and the ink, the feature depends on both, and the shares on the feature by `effect`.
    """
    generator = np.random.default_rng(seed)
    amount = generator.random((IMAGES, PATCHES))
    strata = strata_of(np.round(amount * 3), amount > 0.1, levels=4)
    ink = np.round(amount * 3)
    where = generator.random((IMAGES, 1)) + generator.normal(size=(IMAGES, PATCHES)) * 0.3
    feature = where + 0.2 * ink + np.linspace(0, 0.5, PATCHES) > 1.1
    weights = generator.gamma(3.0, size=(IMAGES, PATCHES)) * (1 + ink) * (1 + np.arange(PATCHES))
    shares = weights / weights.sum(axis=1, keepdims=True)
    return shares + effect * feature, feature, strata


def test_the_excess_is_a_regression_with_an_intercept_for_each_stratum() -> None:
    values, feature, strata = example()
    compared = strata != OUTSIDE
    dummies = np.eye(strata.max() + 1)[strata[compared]]
    fitted = LinearRegression(fit_intercept=False).fit(np.column_stack([feature[compared], dummies]), values[compared])
    assert excess(values[:, None], feature, strata).value == pytest.approx(fitted.coef_[0])


def test_the_excess_by_hand() -> None:
    """Two strata: a difference of 3 of one patch with and one without (weight 1/2), and of 1 of two and two (weight 1):
    (3 / 2 + 1) / (3 / 2) = 5 / 3. What is outside does not count."""
    values = np.array([[5.0, 2.0], [2.0, 2.0], [9.0, 1.0], [9.0, 1.0]])
    feature = np.array([[True, True], [False, True], [True, False], [True, False]])
    strata = np.array([[0, 1], [0, 1], [OUTSIDE, 1], [OUTSIDE, 1]])
    found = excess(values[:, None, None], feature, strata)
    assert found.value.shape == (1, 1) and found.value[0, 0] == pytest.approx(5 / 3)
    observed, null = permuted_excess(values, feature, strata, 99)
    assert observed == pytest.approx(5 / 3) and set(np.round(null * 3, 6)) <= {5.0, 3.0, 1.0, -1.0, -3.0, -5.0}


def test_no_patch_to_compare_with_is_no_number() -> None:
    values, feature, strata = example()
    assert np.isnan(excess(values[:, None], np.ones_like(feature), strata).value).all()
    assert np.isnan(permuted_excess(values, np.zeros_like(feature), strata)[0])


def test_influences_give_the_interval_of_resampled_images() -> None:
    """Their spread is that of the estimate over images drawn anew, strata made anew."""
    values, feature, strata = example(effect=0.05)
    found = excess(values[:, None], feature, strata)
    assert found.influences.sum() == pytest.approx(0, abs=1e-12)
    generator = np.random.default_rng(1)
    drawn = [generator.integers(IMAGES, size=IMAGES) for _ in range(600)]
    again = [float(excess(values[rows][:, None], feature[rows], strata[rows]).value[0]) for rows in drawn]
    assert np.sqrt((found.influences**2).sum()) == pytest.approx(np.std(again), rel=0.15)


def test_intervals_hold_the_truth_and_the_test_keeps_its_level() -> None:
    """Attention that depends on place and ink, as the feature does, but not on the feature: in 300 data sets 5% are
    significant, and 95% of intervals hold 0, within what 300 draws can tell (three standard errors)."""
    p_values, covered = [], []
    for seed in range(300):
        values, feature, strata = example(seed)
        observed, null = permuted_excess(values, feature, strata, 199, seed)
        p_values.append(((np.abs(null) >= abs(observed)).sum() + 1) / 200)
        found = excess(values[:, None], feature, strata)
        covered.append(abs(found.value[0]) < 1.96 * np.sqrt((found.influences**2).sum()))
    assert np.mean(np.array(p_values) <= 0.05) == pytest.approx(0.05, abs=0.038)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.038)


def test_permuting_breaks_the_feature_only_within_strata() -> None:
    """Turning rings has the moments of permuting at random, and a real effect stands out of both."""
    values, feature, strata = example()
    turned = np.concatenate([permuted_excess(values, feature, strata, 199, seed)[1] for seed in range(40)])
    generator = np.random.default_rng(5)
    shuffled = []
    for _ in range(400):
        mixed = feature.copy()
        for members in members_by_stratum(strata):
            mixed.ravel()[members] = generator.permutation(mixed.ravel()[members])
        shuffled.append(float(excess(values[:, None], mixed, strata).value[0]))
    assert np.std(turned) == pytest.approx(np.std(shuffled), rel=0.12)
    assert np.mean(turned) == pytest.approx(0, abs=0.1 * np.std(turned))
    observed, null = permuted_excess(*example(effect=0.1))
    assert observed > 1.5 * np.abs(null).max()


def test_strata_are_places_and_ranks() -> None:
    amount = np.array([[0.1, 5.0], [0.2, 6.0], [0.3, 7.0], [0.4, 8.0]])
    among = np.array([[True, True], [True, True], [True, True], [True, False]])
    assert strata_of(amount, among, 2).tolist() == [[0, 2], [0, 3], [1, 3], [1, OUTSIDE]]
    assert strata_of(amount, among, 1).tolist() == [[0, 1], [0, 1], [0, 1], [0, OUTSIDE]]
    assert above_median(amount, strata_of(amount, among, 1)).tolist() == [
        [False, False],
        [False, False],
        [True, True],
        [True, False],
    ]


def test_centred_features_sum_to_nothing_in_each_stratum() -> None:
    _, feature, strata = example()
    deviations = centre_within_strata(feature, strata)
    assert all(deviations.ravel()[members].sum() == pytest.approx(0) for members in members_by_stratum(strata))
    assert not deviations[strata == OUTSIDE].any()
