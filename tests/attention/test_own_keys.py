"""Of which token a query is made where there are fewer queries than keys: of the one that moves as it does."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from attention_visualizer.attention.own_keys import key_of_each_query

#: [picture, key]: the first is a class token, which no change of the picture moves.
KEYS = np.array(
    [[0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0], [0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 1]], float
)
OWN = [0, 2, 3]


def own(queries: NDArray[np.float64], keys: NDArray[np.float64] = KEYS) -> list[int] | None:
    found = key_of_each_query(queries, keys)
    return None if found is None else found.tolist()


def test_it_moves_in_the_same_pictures_by_whatever_length() -> None:
    assert own(KEYS[:, OWN]) == OWN
    assert own(1e3 * KEYS[:, OWN] * [1, 0.5, 2]) == OWN


def test_what_rounding_moves_stays() -> None:
    rounding = 5e-3 * np.random.default_rng(0).random((5, 3))
    assert own(KEYS[:, OWN] + rounding) == OWN
    assert own(KEYS[:, OWN], KEYS + 5e-3 * np.random.default_rng(1).random(KEYS.shape)) == OWN


def test_a_query_that_moves_as_no_key_does_tells_nothing() -> None:
    """It may be made of several tokens, or of a part of one."""
    several, part = KEYS[:, [1]] + KEYS[:, [5]], KEYS[:, [5]] * [[1], [1], [1], [1], [0]]
    assert own(np.hstack([KEYS[:, [0, 4]], several])) is None
    assert own(np.hstack([KEYS[:, [0, 4]], part])) is None


def test_a_query_that_moves_as_several_keys_do_tells_nothing() -> None:
    twins = np.hstack([KEYS, KEYS[:, [2]]])
    assert own(KEYS[:, OWN], twins) is None


def test_two_queries_of_one_key_tell_nothing() -> None:
    assert own(KEYS[:, [2, 2, 3]]) is None


def test_moves_that_are_not_known_tell_nothing() -> None:
    assert own(np.full((5, 3), np.nan)) is None
