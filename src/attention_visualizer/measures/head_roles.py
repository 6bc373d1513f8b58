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

# Declared before anything was measured: what a role needs at least. None of these is larger only because a head is
# sharper; in return, all but the last are asked of selective heads only.
MIN_CORRELATION = 0.5  # with the amount of ink: Cohen (1988) calls it large
MIN_ON_BRIGHTEST = 0.5  # share of images whose most attended patch is the brightest
MIN_CLOSENESS = 0.5  # short of the distance that uniform attention has
MIN_PART = 0.8  # of a head's selectivity that is position, or content
MIN_SELECTIVITY = 0.5  # nats: a factor of 1.6 in the number of patches
# Part of the way from the largest value of any control to 1 that a role must lie beyond it. A model that is such a
# control itself is often the largest of all: of sharpened random weights beside 6 others, resampled from 72 models,
# 34% had a role at 0, 14% at 0.3, 6% at 0.4 and 3.5% at this distance (docs/findings.md).
BEYOND_CONTROLS = 0.5
NO_ROLE = "no distinct role"

MAX_IMAGES = 2000  # for pairs of heads and for intervals of selectivity
# Nats of at most 0.69 between two heads, on average over images: a reader would take maps that diverge less for one
# head's.
MAX_DIVERGENCE = 0.1
ROLES = ("ink", "background", "brightest patch", "fixed position", "content-dependent", "neighbours")


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


def ink_correlation(shares: Array, amount: Array) -> tuple[Array, Array]:
    """Compute the correlation of a head's attention with the amount of ink within positions: [head], and what each
    image moves it by, [image, head]. 0 for a head with the same map on every image, whatever that map is.

    shares: [image, head, patch]; amount: [image, patch]. Unlike a covariance, it is not larger for a sharper head.
    """
    moving = (shares - shares.mean(axis=0)).astype(np.float64)
    ink = (amount - amount.mean(axis=0)).astype(np.float64)
    products = np.einsum("ihp,ip->ih", moving, ink)
    squares, of_ink = np.einsum("ihp,ihp->ih", moving, moving), (ink**2).sum(axis=1)[:, None]
    norm = np.sqrt(squares.sum(axis=0) * of_ink.sum())
    varies = squares.sum(axis=0) > 1e-9 * len(shares)
    norm = np.where(varies, norm, 1.0)
    value = np.where(varies, products.sum(axis=0) / norm, 0.0)
    relative = squares / np.where(varies, squares.sum(axis=0), 1.0) + of_ink / max(of_ink.sum(), 1e-30)
    moves = np.where(varies, products / norm - value * relative / 2, 0.0)
    undefined = np.isnan(shares).any(axis=(0, 2))
    return np.where(undefined, np.nan, value), np.where(undefined, np.nan, moves)


def on_brightest(shares: Array, amount: Array) -> Array:
    """Return whether a head's most attended patch is the brightest, or as bright: [image, head], NaN for heads that a
    layer does not have. shares: [image, head, patch]; amount: [image, patch]."""
    most = np.where(np.isnan(shares), -1, shares).argmax(axis=-1)
    hit = np.take_along_axis(amount, most, axis=1) >= amount.max(axis=1, keepdims=True) - 1e-6
    return np.where(np.isnan(shares).any(axis=-1), np.nan, hit)


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
    brightest: Interval,
    place: Interval,
    content: Interval,
    closeness: Interval,
    bounds: dict[str, float],
) -> list[str]:
    """Return one head's roles: each value beyond its bound, its whole interval beyond the least effect.

    follows: the correlation with ink, p_value: its own; brightest: a share of images; place, content: of the
    selectivity, nats; closeness: how far the mean distance falls short of uniform attention's; bounds: see
    `role_bounds`.
    """
    roles = []
    total = float(place.value + content.value)
    is_selective = total >= MIN_SELECTIVITY
    if is_selective and abs(follows.value) > bounds["ink"] and p_value < intervals.CHAPTER_LEVEL:
        if follows.low >= MIN_CORRELATION:
            roles.append("ink")
        elif follows.high <= -MIN_CORRELATION:
            roles.append("background")
    if is_selective and brightest.value > bounds["brightest patch"] and brightest.low >= MIN_ON_BRIGHTEST:
        roles.append("brightest patch")
    for name, part in (("fixed position", place), ("content-dependent", content)):
        if is_selective and part.value > bounds[name] * total and part.low >= MIN_PART * total:
            roles.append(name)
    if closeness.value > bounds["neighbours"] and closeness.low >= MIN_CLOSENESS:
        roles.append("neighbours")
    return roles or [NO_ROLE]


def role_bounds(reached: dict[str, float]) -> dict[str, float]:
    """Return what each value must reach: the least effect, and BEYOND_CONTROLS of the way from the largest value of any
    control, `reached`, to 1."""
    least = {
        "ink": MIN_CORRELATION,
        "brightest patch": MIN_ON_BRIGHTEST,
        "fixed position": MIN_PART,
        "content-dependent": MIN_PART,
        "neighbours": MIN_CLOSENESS,
    }
    return {
        name: max(minimum, reached[name] + BEYOND_CONTROLS * (1 - reached[name])) for name, minimum in least.items()
    }


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
