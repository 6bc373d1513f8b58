"""Match the heads of two models by what they attend to on the same images.

A head's index means nothing across training runs, so heads are compared only after each was given a partner. Hungarian
matching finds partners for any heads, so its partners must be compared with those that it finds for unrelated heads.
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
CHUNK = 2**21  # array elements at once: bounds memory


def complete_rows(maps: Array) -> Array:
    """Complete a readout query's attention on patches, [..., patch] and not renormalised, to rows that sum to 1,
    [..., patch + 1]: the last element is the attention on prefix tokens."""
    rest = np.maximum(1 - maps.sum(axis=-1, keepdims=True), 0)
    rows = np.concatenate([maps, rest], axis=-1)
    return rows / rows.sum(axis=-1, keepdims=True)


def mean_divergences(first: Array, second: Array) -> Array:
    """Return the Jensen-Shannon divergence (nats, 0 to ln 2) between each head of one model and each of another, of
    their rows on the same image, mean over images.

    first: [image, head, key]; second: [image, other head, key] -> [head, other head]. Raise ValueError where they are
    not of the same images and keys.
    """
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


@dataclass(frozen=True)
class Matching:
    """The partners of one model's heads in another, layer by layer."""

    divergences: Array  # [layer, head, other head], nats
    partners: Array  # [layer, head], the other model's head

    @property
    def matched(self) -> Array:
        """Return the divergence of each head from its partner: [layer, head]."""
        return np.take_along_axis(self.divergences, self.partners[..., None], axis=2)[..., 0]

    @property
    def random_pairing(self) -> Array:
        """The expected divergence of each head from a partner drawn uniformly at random from its layer: [layer,
        head]."""
        return self.divergences.mean(axis=2)

    @property
    def gains(self) -> Array:
        """Return how much closer partners are than randomly paired heads: [layer], 0 for not at all, 1 for copies."""
        random = self.random_pairing.mean(axis=1)
        gained = random - self.matched.mean(axis=1)
        return np.divide(gained, random, out=np.zeros_like(random), where=random > 1e-12)

    def p_value(self, permutations: int = PERMUTATIONS, seed: int = 0) -> float:
        """Test whether partners are closer than if each head were as close to any head as to any other.

        In each permutation every head's divergences are permuted over the other model's heads, and the best partners
        are found again; the statistic is the total over layers. (b + 1) / (B + 1). One head has no choice: 1.
        """
        generator = np.random.default_rng(seed)
        observed = self.matched.sum() * (1 + 1e-9)
        extreme = 0
        for _ in range(permutations):
            permuted = generator.permuted(self.divergences, axis=2)
            extreme += np.take_along_axis(permuted, best_partners(permuted)[..., None], axis=2).sum() <= observed
        return float((extreme + 1) / (permutations + 1))


def match_heads(first: Array, second: Array) -> Matching:
    """Match the heads of two models of one architecture, layer by layer.

    first, second: their rows on the same images, [image, layer, head, key].
    """
    divergences = np.stack([mean_divergences(first[:, layer], second[:, layer]) for layer in range(first.shape[1])])
    return Matching(divergences, best_partners(divergences))


def best_partners(divergences: Array) -> Array:
    """Assign each head another one, so that the total divergence is least (Kuhn, 1955): [layer, head, other head] ->
    [layer, head]."""
    from scipy.optimize import linear_sum_assignment

    return np.stack([linear_sum_assignment(layer)[1] for layer in divergences])
