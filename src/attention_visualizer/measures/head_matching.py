"""Heads of two models that do the same: matched by what they attend to on the same images.

A head's index means nothing across training runs, so heads are compared only after each was given a partner. Hungarian
matching finds partners for any heads, so what it finds must be held against what it finds among unrelated ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attention_visualizer.measures.intervals import PERMUTATIONS
from attention_visualizer.measures.map_measures import jensen_shannon_divergence

Array = NDArray[Any]
CHUNK = 2**21  # numbers at once: bounds memory


def readout_rows(maps: Array) -> Array:
    """The whole row of a readout query: [..., patch], not renormalised -> [..., patch + 1], the last is the rest, what
    prefix tokens get."""
    rest = np.maximum(1 - maps.sum(axis=-1, keepdims=True), 0)
    rows = np.concatenate([maps, rest], axis=-1)
    return rows / rows.sum(axis=-1, keepdims=True)


def mean_divergences(first: Array, second: Array) -> Array:
    """Between each head of one model and each of another, the Jensen-Shannon divergence of their rows on the same image
    (nats, 0 to ln 2), mean over images: [image, head, key] and [image, other head, key] -> [head, other head]."""
    if len(first) != len(second) or first.shape[2] != second.shape[2]:
        raise ValueError(f"rows of {first.shape} and {second.shape} are not of the same images and keys")
    images, heads, keys = first.shape
    total = np.zeros((heads, second.shape[1]))
    step = max(1, CHUNK // (heads * second.shape[1] * keys))
    for start in range(0, images, step):
        ours, theirs = (
            torch.from_numpy(np.ascontiguousarray(rows[start : start + step])).double() for rows in (first, second)
        )
        total += jensen_shannon_divergence(ours[:, :, None], theirs[:, None]).sum(dim=0).numpy()
    return total / images


def partner_divergences(first: Array, second: Array, partners: Array) -> Array:
    """Of each head and its partner on each image: [image, head, key] twice, [head] -> [image, head]."""
    ours, theirs = torch.from_numpy(first).double(), torch.from_numpy(second[:, partners]).double()
    return jensen_shannon_divergence(ours, theirs).numpy()


@dataclass(frozen=True)
class Matching:
    """Partners of one model's heads in another, layer by layer.

    divergences: [layer, head, other head]; partners: [layer, head], the other model's head.
    """

    divergences: Array
    partners: Array

    @property
    def matched(self) -> Array:
        """The divergence of each head from its partner: [layer, head]."""
        return np.take_along_axis(self.divergences, self.partners[..., None], axis=2)[..., 0]

    @property
    def random_pairing(self) -> Array:
        """The mean divergence of each head from the other model's heads of its layer, as a partner drawn by lot would
        have it: [layer, head]."""
        return self.divergences.mean(axis=2)

    @property
    def gains(self) -> Array:
        """How much closer partners are than heads paired by lot, by layer: 0 not at all, 1 copies; [layer]."""
        by_lot = self.random_pairing.mean(axis=1)
        gained = by_lot - self.matched.mean(axis=1)
        return np.divide(gained, by_lot, out=np.zeros_like(by_lot), where=by_lot > 1e-12)

    def p_value(self, permutations: int = PERMUTATIONS, seed: int = 0) -> float:
        """Whether the partners suit each other better than if each head were as close to any head as to any other.

        In each permutation every head's divergences are dealt anew to the other model's heads, and the best partners
        are sought again; the statistic is the total over layers. (b + 1) / (B + 1). One head has no choice: 1.
        """
        generator = np.random.default_rng(seed)
        observed = self.matched.sum() * (1 + 1e-9)
        extreme = 0
        for _ in range(permutations):
            dealt = generator.permuted(self.divergences, axis=2)
            extreme += np.take_along_axis(dealt, best_partners(dealt)[..., None], axis=2).sum() <= observed
        return float((extreme + 1) / (permutations + 1))


def match_heads(first: Array, second: Array) -> Matching:
    """Rows of two models of one architecture on the same images, [image, layer, head, key] each."""
    divergences = np.stack([mean_divergences(first[:, layer], second[:, layer]) for layer in range(first.shape[1])])
    return Matching(divergences, best_partners(divergences))


def best_partners(divergences: Array) -> Array:
    """Each head one of its own, so that the total is least (Kuhn, 1955): [layer, head, other head] -> [layer, head]."""
    from scipy.optimize import linear_sum_assignment

    return np.stack([linear_sum_assignment(layer)[1] for layer in divergences])
