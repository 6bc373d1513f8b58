"""Statistics over a few units, such as training runs with different seeds: intervals and exact tests."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attention_visualizer.measures.intervals import LEVEL, Interval

Array = NDArray[Any]

MAX_EXACT_UNITS = 14  # units of which all sign flips are counted


def student_interval(values: Array) -> Interval:
    """Return the mean over a few units (seeds), [unit, ...] -> [...], with Student's interval; n is their number."""
    import scipy.stats

    n, mean = len(values), np.mean(values, axis=0)
    half = scipy.stats.t.ppf(1 - LEVEL / 2, n - 1) * np.std(values, axis=0, ddof=1) / math.sqrt(n)
    return Interval(np.asarray(mean), mean - half, mean + half, n)


def sign_flip_test(values: Array) -> Array:
    """Return two-sided p-values that the means of a few units (seeds) are 0, for all means together: [unit, mean] ->
    [mean], NaN where any unit is.

    All ways to give the units signs (Fisher, 1935) are tried on all means at once. A p-value is the share of them where
    the largest of all, relative to its root mean square, is as large as the observed one (Westfall and Young, 1993).
    Exact up to MAX_EXACT_UNITS units, beyond by 2^MAX_EXACT_UNITS - 1 random ways.
    """
    n = len(values)
    squares = np.sqrt((values**2).sum(axis=0))
    relative = np.divide(values, squares, out=np.zeros(values.shape), where=squares > 0)
    if n <= MAX_EXACT_UNITS:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = np.random.default_rng(0).choice([-1, 1], (2**MAX_EXACT_UNITS, n))
        signs[0] = 1
    largest = np.sort(np.abs(signs @ relative).max(axis=1))
    at_least = len(signs) - np.searchsorted(largest, np.abs(relative.sum(axis=0)) * (1 - 1e-9))
    return np.where(np.isnan(squares), np.nan, at_least / len(signs))


def smallest_sign_flip_p(num_units: int) -> float:
    """Return the smallest p-value that `sign_flip_test` can return for so many units: all on one side."""
    return 2.0 ** (1 - min(num_units, MAX_EXACT_UNITS + 1))
