"""Errors on the same images without and with a change: McNemar's test, and what it could have found."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def mcnemar(lost: Array, gained: Array) -> Array:
    """Return the exact two-sided p-value that as many images are lost as gained: [...] (McNemar, 1947)."""
    import scipy.stats

    lost, gained = np.asarray(lost), np.asarray(gained)
    return np.minimum(2 * scipy.stats.binom.cdf(np.minimum(lost, gained), lost + gained, 0.5), 1)


def detectable_rise(gained: float, level: float, power: float = 0.8) -> int:
    """Return the smallest rise in errors that `mcnemar` finds at this level with this power, where `gained` errors are
    put right at the same time. Lost and gained images are Poisson variables."""
    import scipy.stats

    counts = np.arange(int(scipy.stats.poisson.ppf(1e-9, gained)), int(scipy.stats.poisson.isf(1e-9, gained)) + 1)
    chances = scipy.stats.poisson.pmf(counts, gained)
    # The fewest lost images for p <= level: how many come before so many gained ones is negative binomial.
    fewest = scipy.stats.nbinom.isf(level / 2, counts + 1, 0.5) + 1
    rise = step = 1 << 24
    while step:  # the smallest is searched by bits
        step //= 2
        if chances @ scipy.stats.poisson.sf(fewest - 1, gained + rise - step) >= power:
            rise -= step
    return rise
