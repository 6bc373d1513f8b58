"""Statistics over a few units."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from attention_visualizer.measures.over_seeds import sign_flip_test, smallest_sign_flip_p, student_interval


def test_the_sign_flip_test_is_scipys() -> None:
    values = np.random.default_rng(0).normal(0.4, 1, (9, 4))
    for column in range(4):
        expected = scipy.stats.permutation_test(
            (values[:, column],), lambda x: x.mean(), permutation_type="samples", n_resamples=np.inf
        ).pvalue
        assert sign_flip_test(values[:, [column]])[0] == pytest.approx(expected)


@pytest.mark.parametrize("units", [3, 5, 8, 10, 20])
def test_the_smallest_p_is_reached_by_units_on_one_side(units: int) -> None:
    one_side = np.arange(1.0, units + 1)[:, None]
    assert sign_flip_test(one_side)[0] == pytest.approx(smallest_sign_flip_p(units), rel=0.7 if units > 14 else 1e-9)
    assert smallest_sign_flip_p(5) == 0.0625 and smallest_sign_flip_p(10) * 24 < 0.05
    assert np.isnan(sign_flip_test(np.array([[np.nan], [1.0]])))[0]


def test_error_rates_of_the_sign_flip_test_alone_and_of_many_together() -> None:
    generator = np.random.default_rng(1)
    alone = np.array([sign_flip_test(column[:, None])[0] for column in generator.standard_t(3, (1000, 8))])
    assert 0.03 < (alone <= 0.05).mean() < 0.065
    # Of thirty means that are all 0, any is found in one family of twenty.
    together = np.array([np.nanmin(sign_flip_test(generator.standard_t(3, (8, 30)))) for _ in range(1000)])
    assert 0.03 < (together <= 0.05).mean() < 0.065


def test_what_is_alike_in_every_seed_is_found_among_much_else() -> None:
    generator = np.random.default_rng(2)
    values = generator.standard_normal((10, 100))
    values[:, :3] = 1 + generator.normal(0, 0.1, (10, 3))
    values[:, 3] = 0
    values[0, 4] = np.nan
    p_values = sign_flip_test(values)
    np.testing.assert_allclose(p_values[:3], smallest_sign_flip_p(10), rtol=1)
    assert p_values[3] == 1 and np.isnan(p_values[4]) and np.nanmin(p_values[5:]) > 0.02
    np.testing.assert_array_equal(sign_flip_test(1e-9 * values), p_values)  # whatever the unit


def test_students_intervals_are_scipys_and_cover_the_truth() -> None:
    generator = np.random.default_rng(3)
    values = generator.normal(0.5, 2.0, (3, 2000))
    found = student_interval(values)
    expected = scipy.stats.ttest_1samp(values[:, 0], 0).confidence_interval(0.95)
    assert (float(found.low[0]), float(found.high[0])) == pytest.approx((expected.low, expected.high))
    assert 0.935 < ((found.low < 0.5) & (found.high > 0.5)).mean() < 0.965 and found.n == 3
