"""What each patch is worth to an answer, found by asking the model: Shapley values and leave-one-out.

A value function says what the model answers of some of the patches: bool [..., image, patch], which of them are
visible, equally many everywhere, -> [..., image]. `Perturbation.probabilities` is one for each way of hiding the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attention_visualizer.measures.perturbation import random_orders

Array = NDArray[Any]
ValueFunction = Callable[[Array], Array]
MAX_EVALUATIONS = 300  # of the value function for an image: 20 permutations of 16 patches


def antithetic_pairs(num_images: int, num_patches: int, seed: int = 0) -> Array:
    """Return orders of the patches and their reverses, [pair, 2, image, patch]: an even number of pairs, to be split in
    halves, as many as MAX_EVALUATIONS allows and at least 2."""
    pairs = 2 * max(1, MAX_EVALUATIONS // (4 * max(1, num_patches - 1)))
    orders = np.stack([random_orders(num_images, num_patches, (seed, pair)) for pair in range(pairs)])
    return np.stack([orders, orders[..., ::-1]], axis=1)


def shapley_values(value: ValueFunction, orders: Array) -> Array:
    """Estimate each patch's Shapley value from orders [order, image, patch]: [image, patch].

    It is the mean, over orders in which patches become visible, of what the answer gains by the patch (Castro et al.,
    2009, Computers and Operations Research 36, 1726). An order and its reverse together vary less than two of their own
    (Mitchell et al., 2022, JMLR 23, 43). The values of an image add up to the answer of the whole image minus that of
    the empty one.
    """
    places = np.argsort(orders, axis=-1)  # of each patch in the order
    answers = np.stack([value(places < count) for count in range(orders.shape[-1] + 1)], axis=-1)
    return np.asarray(np.take_along_axis(np.diff(answers, axis=-1), places, axis=-1).mean(axis=0))


def leave_one_out(value: ValueFunction, num_images: int, num_patches: int) -> Array:
    """Return what the answer loses without each patch alone (Zeiler and Fergus, 2014): [image, patch]."""
    whole = value(np.ones((num_images, num_patches), dtype=bool))
    others = np.broadcast_to(~np.eye(num_patches, dtype=bool)[:, None], (num_patches, num_images, num_patches))
    return whole[:, None] - value(others).T
