"""What single heads follow, always look at, and share with each other, as numbers; and the names that these carry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attention_visualizer.measures import intervals, map_measures
from attention_visualizer.measures.intervals import Interval

Array = NDArray[Any]

# Stated before anything was measured: what a role needs at least. A share of 0.05 is one patch's worth of uniform
# attention on a 4 x 4 grid; a nat is a factor of 2.7 in the number of patches.
LEAST_INK = 0.05  # share of the attention on patches
LEAST_SELECTIVE = 0.5  # nats
LEAST_ON_CLASS_TOKEN = 0.5  # share of the row
LEAST_ON_BORDER = 0.5  # of an even share, more than empty patches of the interior get
OFTEN_EMPTY = 0.5  # share of the interior's patches without ink, from which border and interior are compared
NEAR = 0.5  # of the distance that uniform attention has
MOSTLY = 0.8  # the part of a head's selectivity that one cause must have to give it its name
# Times the largest of any head with random weights. At 1.5, 2 to 3 % of other models with random weights would have a
# head beyond three of them; at 2, fewer than 1 in 100.
BEYOND_CONTROLS = 2.0
NO_ROLE = "no distinct role"

MOST_PICTURES = 2000  # for pairs of heads and for intervals of selectivity
ALIKE = 0.1  # nats: two heads that diverge less, on average over pictures, are called alike
ROLES = ("ink", "background", "fixed place", "varies with the picture", "class token", "neighbours", "border")


@dataclass(frozen=True)
class Selectivity:
    """How far a head's row is from uniform, in nats: ln N - mean entropy = place + content.

    place: ln N - H(mean row), what it looks at on every picture; content: H(mean row) - mean H(row) >= 0, what an
    average map hides. [layer, head] each; content_of_layers: the mean over heads, [layer].
    """

    place: Interval
    content: Interval
    content_of_layers: Interval


def entropy(rows: Array) -> Array:
    """Nats, over the last axis; NaN where rows are, such as those of a head that a layer does not have."""
    terms = np.where(rows == 0, 0.0, rows * np.log(np.maximum(rows, 1e-30)))
    return np.asarray(-np.sum(terms, axis=-1, dtype=np.float64))


def ink_followed(shares: Array, inked: Array) -> Array:
    """How much more each picture's inked patches get than by position: shares [image, ..., patch], inked [image, patch]
    -> [image, ...].

    The mean over images is sum_p cov(share_p, inked_p): exactly 0 for a head that looks at the same places on every
    picture, whatever these places are.
    """
    centred = (inked - inked.mean(axis=0)).astype(np.float32)
    centred = centred.reshape(len(inked), *[1] * (shares.ndim - 2), -1)
    return ((shares - shares.mean(axis=0)) * centred).sum(axis=-1, dtype=np.float64)


def selectivity(rows: Array, num_keys: Array, seed: int = 0) -> Selectivity:
    """rows: distributions [image, layer, head, key]; num_keys: [layer].

    Intervals are of the linearised parts (von Mises expansion: H(mean row) moves by -sum_j log(mean_j) (row_j -
    mean_j) with each image), so that no replicate needs the entropies of all mean rows again.
    """
    mean_row = rows.mean(axis=0, dtype=np.float64)
    entropies = entropy(rows)
    of_mean = entropy(mean_row)
    place = np.log(num_keys)[:, None] - of_mean
    content = of_mean - entropies.mean(axis=0)
    slopes = np.log(np.maximum(mean_row, 1e-30))
    moves = np.einsum("ilhk,lhk->ilh", rows, slopes, optimize=True) - (mean_row * slopes).sum(axis=-1)
    content_moves = -moves - (entropies - entropies.mean(axis=0))

    def moved(value: Array, by: Array) -> Interval:
        around = intervals.bootstrap_mean(by, seed)
        return Interval(value, value + around.low, value + around.high, len(rows))

    return Selectivity(
        moved(place, moves),
        moved(content, content_moves),
        moved(nan_mean(content), nan_mean(content_moves)),
    )


def nan_mean(values: Array) -> Array:
    """Mean over the last axis without NaN; NaN where all are."""
    there = ~np.isnan(values)
    count = there.sum(axis=-1)
    total = np.where(there, values, 0.0).sum(axis=-1, dtype=np.float64)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def name_roles(
    follows: Interval,
    p_value: float,
    place: Interval,
    content: Interval,
    class_token: Interval,
    distance: Interval,
    border: Interval,
    bounds: dict[str, float],
) -> list[str]:
    """The roles that one head's numbers carry: each beyond its bound, its whole interval beyond the least effect.

    follows, place, content, border: of the attention on patches alone, so that what a head gives to the class token
    has its own name. distance: relative to uniform attention, its bound from above.
    """
    found = []
    if abs(follows.value) >= bounds["ink"] and p_value < intervals.LEVEL:
        if follows.low >= LEAST_INK:
            found.append("ink")
        elif follows.high <= -LEAST_INK:
            found.append("background")
    total = place.value + content.value
    if place.value >= bounds["place"] and place.low >= LEAST_SELECTIVE and place.value >= MOSTLY * total:
        found.append("fixed place")
    if content.value >= bounds["content"] and content.low >= LEAST_SELECTIVE and content.value >= MOSTLY * total:
        found.append("varies with the picture")
    if class_token.value >= bounds["class token"] and class_token.low >= LEAST_ON_CLASS_TOKEN:
        found.append("class token")
    if distance.value <= bounds["distance"] and distance.high <= NEAR:
        found.append("neighbours")
    if border.value >= bounds["border"] and border.low >= LEAST_ON_BORDER:
        found.append("border")
    return found or [NO_ROLE]


def border_excess(shares: Array, inked: Array, border: Array) -> Array:
    """How much more an empty patch at the border gets than an empty one of the interior, in even shares, of each
    picture: shares [image, ..., patch], inked [image, patch], border [patch] -> [image, ...]; NaN for pictures that
    lack one or the other."""

    def on(patches: Array) -> Array:
        empty = (patches & ~inked).astype(np.float32)
        count = empty.sum(axis=-1, dtype=np.float64)
        total = np.einsum("i...p,ip->i...", shares, empty, optimize=True)
        count = count.reshape(-1, *[1] * (total.ndim - 1))
        return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)

    return (on(border) - on(~border)) * shares.shape[-1]


def divergences(rows: Array) -> tuple[Array, Array]:
    """Jensen-Shannon divergence between every two heads, of all layers, in nats: [image, head, key] -> its mean over
    images [head, head], and its mean over pairs of different heads [image], NaN for one head."""
    given = torch.from_numpy(rows)
    heads = given.shape[1]
    found, total = [], torch.zeros(len(given), dtype=torch.float64)
    for head in range(heads):
        each = map_measures.jensen_shannon_divergence(given[:, head : head + 1], given).double()
        found.append(each.mean(dim=0))
        total += each.sum(dim=1) - each[:, head]
    of_images = total.numpy() / (heads * (heads - 1) or np.nan)
    return torch.stack(found).numpy() if found else np.zeros((0, 0)), of_images


def clustered(divergence: Array) -> tuple[Array, Array]:
    """Order of the heads along the tree of average linkage on the square root of the divergence, which is a distance
    (Endres and Schindelin, 2003), and each head's cluster: groups are joined while the mean distance between their
    heads is at most the square root of ALIKE."""
    from scipy.cluster.hierarchy import fcluster, leaves_list, linkage
    from scipy.spatial.distance import squareform

    if len(divergence) < 2:
        return np.zeros(len(divergence), np.int64), np.ones(len(divergence), np.int64)  # no tree of one head
    distance = np.sqrt(np.clip((divergence + divergence.T) / 2, 0, None))
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), "average", optimal_ordering=True)
    return leaves_list(tree), fcluster(tree, np.sqrt(ALIKE), "distance")
