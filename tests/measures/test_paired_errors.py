"""McNemar's test is SciPy's binomial test, and what it can find is found in simulations."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from attention_visualizer.measures.paired_errors import detectable_rise, mcnemar


def test_the_p_value_is_that_of_the_binomial_test() -> None:
    pairs = [(0, 0), (1, 0), (7, 7), (82, 14), (14, 82), (0, 11), (300, 241)]
    lost, gained = np.array(pairs).T
    expected = [1.0] + [scipy.stats.binomtest(one, one + other).pvalue for one, other in pairs[1:]]
    assert mcnemar(lost, gained).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("gained", "level"), [(0.0, 0.05), (0.0, 0.05 / 30), (14.0, 0.05 / 30), (150.0, 0.01)])
def test_the_detectable_rise_is_the_smallest_that_is_found_four_times_of_five(gained: float, level: float) -> None:
    generator = np.random.default_rng(0)

    def power(rise: int) -> float:
        lost, put_right = generator.poisson(gained + rise, 40_000), generator.poisson(gained, 40_000)
        return float(((mcnemar(lost, put_right) <= level) & (lost > put_right)).mean())

    rise = detectable_rise(gained, level)
    assert power(rise) >= 0.79 and power(rise - 1) < 0.81 and power(rise // 2) < 0.6
