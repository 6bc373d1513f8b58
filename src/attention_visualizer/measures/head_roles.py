"""Measures of single heads: what each follows and always attends to, which are alike, and the roles that result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attention_visualizer.measures import intervals, map_measures
from attention_visualizer.measures.intervals import Interval

Array = NDArray[Any]

# Declared before anything was measured: what a role needs at least. A share of 0.05 is one patch's worth of uniform
# attention on a 4 x 4 grid; a nat is a factor of 2.7 in the number of patches.
MIN_INK = 0.05  # share of the attention on patches
MIN_SELECTIVITY = 0.5  # nats
MIN_ON_CLASS_TOKEN = 0.5  # share of the row
MIN_ON_BORDER = 0.5  # of a uniform share, more than empty patches of the interior get
OFTEN_EMPTY = 0.5  # share of the interior's patches without ink, from which border and interior are compared
NEAR = 0.5  # of the distance that uniform attention has
MOSTLY = 0.8  # the part of a head's selectivity that one cause must have to give it its name
# Times the largest of any head with random weights. At 1.5, 2 to 3 % of other models with random weights would have a
# head beyond three of them; at 2, fewer than 1 in 100.
CONTROL_FACTOR = 2.0
NO_ROLE = "no distinct role"

MAX_IMAGES = 2000  # for pairs of heads and for intervals of selectivity
# Nats of at most 0.69 between two heads, on average over images: a reader would take maps that diverge less for one
# head's.
MAX_DIVERGENCE = 0.1
ROLES = ("ink", "background", "fixed position", "content-dependent", "class token", "neighbours", "border")


@dataclass(frozen=True)
class Selectivity:
    """How far heads' rows are from uniform, in nats: ln N - mean entropy = place + content."""

    place: Interval  # ln N - H(mean row), what a head attends to on every image: [layer, head]
    content: Interval  # H(mean row) - mean H(row) >= 0, what an average map hides: [layer, head]
    content_of_layers: Interval  # mean over heads: [layer]


def entropy(rows: Array) -> Array:
    """Return the entropy of distributions [..., key] in nats: float64 [...], NaN where a row has NaN.

    `map_measures.attention_entropy` is the same of tensors.
    """
    terms = np.where(rows == 0, 0.0, rows * np.log(np.maximum(rows, 1e-30)))
    return np.asarray(-np.sum(terms, axis=-1, dtype=np.float64))


def ink_followed(shares: Array, inked: Array) -> Array:
    """Return how much more each image's inked patches get than by position: [image, ...].

    shares: [image, ..., patch]; inked: [image, patch]. The mean over images is sum_p cov(share_p, inked_p): exactly 0
    for a head with the same map on every image, whatever that map is.
    """
    centred = (inked - inked.mean(axis=0)).astype(np.float32)
    centred = centred.reshape(len(inked), *[1] * (shares.ndim - 2), -1)
    return ((shares - shares.mean(axis=0)) * centred).sum(axis=-1, dtype=np.float64)


def selectivity(rows: Array, num_keys: Array) -> Selectivity:
    """Split the selectivity of each head into place and content.

    rows: distributions [image, layer, head, key]; num_keys: the N of each layer, [layer].

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

    def interval(value: Array, influences: Array) -> Interval:
        around = intervals.bootstrap_mean(influences)
        return Interval(value, value + around.low, value + around.high, len(rows))

    return Selectivity(
        interval(place, moves),
        interval(content, content_moves),
        interval(nan_mean(content), nan_mean(content_moves)),
    )


def nan_mean(values: Array) -> Array:
    """Return the mean over the last axis without NaN; NaN where all are."""
    defined = ~np.isnan(values)
    count = defined.sum(axis=-1)
    total = np.where(defined, values, 0.0).sum(axis=-1, dtype=np.float64)
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
    """Return one head's roles: each value beyond its bound, its whole interval beyond the least effect.

    follows, place, content, border: of the attention on patches alone, so that what a head gives to the class token
    has its own name. distance: relative to uniform attention, its bound from above.
    """
    roles = []
    if abs(follows.value) >= bounds["ink"] and p_value < intervals.LEVEL:
        if follows.low >= MIN_INK:
            roles.append("ink")
        elif follows.high <= -MIN_INK:
            roles.append("background")
    total = place.value + content.value
    if place.value >= bounds["place"] and place.low >= MIN_SELECTIVITY and place.value >= MOSTLY * total:
        roles.append("fixed position")
    if content.value >= bounds["content"] and content.low >= MIN_SELECTIVITY and content.value >= MOSTLY * total:
        roles.append("content-dependent")
    if class_token.value >= bounds["class token"] and class_token.low >= MIN_ON_CLASS_TOKEN:
        roles.append("class token")
    if distance.value <= bounds["distance"] and distance.high <= NEAR:
        roles.append("neighbours")
    if border.value >= bounds["border"] and border.low >= MIN_ON_BORDER:
        roles.append("border")
    return roles or [NO_ROLE]


def border_excess(shares: Array, inked: Array, border: Array) -> Array:
    """Return how much more an empty patch at the border gets than an empty one of the interior, in uniform shares:
    [image, ...], NaN for images that lack one or the other.

    shares: [image, ..., patch]; inked: bool [image, patch]; border: bool [patch].
    """

    def mean_over_empty(patches: Array) -> Array:
        empty = (patches & ~inked).astype(np.float32)
        count = empty.sum(axis=-1, dtype=np.float64)
        total = np.einsum("i...p,ip->i...", shares, empty, optimize=True)
        count = count.reshape(-1, *[1] * (total.ndim - 1))
        return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)

    return (mean_over_empty(border) - mean_over_empty(~border)) * shares.shape[-1]


def divergences(rows: Array) -> tuple[Array, Array]:
    """Return the Jensen-Shannon divergence between every two heads in nats: its mean over images [head, head], and its
    mean over pairs of different heads [image], NaN for one head.

    rows: distributions [image, head, key], heads of all layers.
    """
    tensor = torch.from_numpy(rows)
    heads = tensor.shape[1]
    means, total = [], torch.zeros(len(tensor), dtype=torch.float64)
    for head in range(heads):
        from_head = map_measures.jensen_shannon_divergence(tensor[:, head : head + 1], tensor).double()
        means.append(from_head.mean(dim=0))
        total += from_head.sum(dim=1) - from_head[:, head]
    of_images = total.numpy() / (heads * (heads - 1) or np.nan)
    return torch.stack(means).numpy() if means else np.zeros((0, 0)), of_images


def clustered(divergence: Array) -> tuple[Array, Array]:
    """Return the order of heads along a tree, and the cluster of each: [head, head] -> [head] twice.

    The tree is of average linkage on the square root of the divergence, which is a distance (Endres and Schindelin,
    2003); clusters are joined while the mean distance between their heads is at most the square root of MAX_DIVERGENCE.
    """
    from scipy.cluster.hierarchy import fcluster, leaves_list, linkage
    from scipy.spatial.distance import squareform

    if len(divergence) < 2:
        return np.zeros(len(divergence), np.int64), np.ones(len(divergence), np.int64)  # no tree of one head
    distance = np.sqrt(np.clip((divergence + divergence.T) / 2, 0, None))
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), "average", optimal_ordering=True)
    return leaves_list(tree), fcluster(tree, np.sqrt(MAX_DIVERGENCE), "distance")
