"""Which key each query of an attention call is made of the same token as, where there are fewer queries than keys."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attention_visualizer.attention.policies import OnlyItself
from attention_visualizer.attention.probe import QUERIES, Probe
from attention_visualizer.attention.receptive_fields import Bands, pictures

Array = NDArray[Any]
# Of the median of what tokens move by at the most; the rounding of weights, from which queries are read, is less.
CLEAR_ANSWER, NO_ANSWER = 0.1, 1e-2


def own_keys(probe: Probe, bands: Sequence[Bands]) -> dict[str, Tensor]:
    """Return the number of that key for each query, [query], by the name of the call: it answers to the same changes of
    the picture, and no other key does. Calls of which that does not hold for each query are left out."""
    found: dict[str, Tensor] = {}
    probe.policy = partial(OnlyItself, found)
    changes = torch.cat([pictures(probe.image, bands[axis], axis) for axis in range(2)])
    for position, (name, num_queries) in enumerate(probe.queries.items()):
        if not 1 < num_queries < probe.keys[name] or probe.windows[name] > 1:
            continue
        probe.stop = position
        try:
            moves = probe.moves(changes)
        finally:
            probe.stop = None
        own = key_of_each_query(moves[QUERIES], moves[name])
        if own is not None:
            found[name] = torch.from_numpy(own)
    return found


def key_of_each_query(queries: Array, keys: Array) -> Array | None:
    """Return the number of the key that moves in the same pictures as each query, [query]; None unless each query has
    just one, and no two the same: [picture, query], [picture, key], NaN for what is not known."""
    queries, keys = in_typical_moves(queries), in_typical_moves(keys)
    differ = (queries > CLEAR_ANSWER).T @ (keys < NO_ANSWER) | (queries < NO_ANSWER).T @ (keys > CLEAR_ANSWER)
    same = ~differ  # [query, key]
    is_known = (same.sum(axis=1) == 1).all() and same.sum(axis=0).max() == 1
    return same.argmax(axis=1) if is_known else None


def in_typical_moves(moves: Array) -> Array:
    """Return moves [picture, token] as shares of what tokens move by at the most; NaN is what is not known."""
    scale = np.median(np.nan_to_num(moves).max(axis=0))
    return moves / scale if scale > 0 else np.full_like(moves, np.nan)
