"""What claims about attention are judged by: quantities of one model's maps, resampled and permuted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attention_visualizer.analysis.study.survey import MEASURE_NAMES, Survey, nan_mean
from attention_visualizer.data import ink, strokes
from attention_visualizer.measures.head_roles import OFTEN_EMPTY, border_excess
from attention_visualizer.measures.intervals import PERMUTATION_BATCH, PERMUTATIONS, REPLICATES
from attention_visualizer.measures.matched_patches import above_median, excess, permuted_excess, strata_of

Array = NDArray[Any]

POINTS = ("end points", "junctions", "bends")
KEY_POINTS = "key points"  # any of these
IMAGES = 1000  # at once, while resampling: bounds memory


@dataclass(frozen=True)
class Content:
    """What is in the patches of images: float [image, patch] and, of each feature by its name, bool [image, patch]
    with the strata [image, patch] within which patches are compared."""

    grid: tuple[int, int]
    amount: Array
    inked: Array
    features: dict[str, Array]
    strata: dict[str, Array]

    @classmethod
    def of(cls, pictures: torch.Tensor, grid: tuple[int, int]) -> Content:
        """pictures: uint8 [image, channel, height, width]."""
        found = strokes.find_strokes(ink.ink_pixels(pictures).numpy())
        points = {
            name: strokes.patches_with(pixels, grid)
            for name, pixels in zip(POINTS, (found.ends, found.junctions, found.bends), strict=True)
        }
        inked = ink.inked_patches(pictures, grid).numpy()
        edges = strokes.amount_in_patches(found.edges, grid)
        return cls.stratified(grid, ink.ink_amount(pictures, grid).numpy(), inked, points, edges)

    @classmethod
    def stratified(
        cls, grid: tuple[int, int], amount: Array, inked: Array, points: dict[str, Array], edges: Array
    ) -> Content:
        """edges: [image, patch], the share of pixels. Ink is compared at one place; edges and points at one place among
        patches with about as much ink; points with ink that holds none of them."""
        anywhere = np.ones(inked.shape, dtype=bool)
        like = strata_of(amount, inked)
        key = np.any(list(points.values()), axis=0)
        features = {"ink": inked, "edges": above_median(edges, like), **points, KEY_POINTS: key}
        strata = {"ink": strata_of(amount, anywhere, 1), "edges": like, KEY_POINTS: like}
        strata |= {name: np.where(has | ~key, like, -1) for name, has in points.items()}
        return cls(grid, amount, inked, features, strata)


@dataclass(frozen=True)
class Evidence:
    """Of one model over n images. values: quantity -> [layer, head], [layer] or []; replicates: the same with a first
    axis for resampled images, empty where it was not resampled.

    relative: [image, layer, patch], mean over heads of the attention relative to an even share. depth: numbers of the
    layers that depth trends may use. p_classes: of the label permutations, None without labels. emptiness: share of
    the interior's patches without ink, NaN where all patches lie at the border. counts: n of quantities that are not
    of all n images.
    """

    values: dict[str, Array]
    replicates: dict[str, Array]
    relative: Array
    content: Content
    depth: tuple[int, ...]
    n: int
    p_classes: float | None = None
    emptiness: float = float("nan")
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        return self.relative.shape[1]

    @property
    def num_heads(self) -> int:
        return self.values["ink"].shape[1]

    def permutation_p_value(self, feature: str, weights: Array) -> float:
        """Of the excess on a feature of sum_layer weights x attention, by permuting the feature within its strata."""
        values = np.tensordot(self.relative, weights, axes=(1, 0))  # image, patch
        observed, null = permuted_excess(values, self.content.features[feature], self.content.strata[feature])
        if np.isnan(observed):
            return float("nan")
        return float(((np.abs(null) >= abs(observed) * (1 - 1e-9)).sum() + 1) / (len(null) + 1))


@dataclass(frozen=True)
class Distances:
    """Mean attention distance of each layer relative to that of uniform attention, over n images: value [layer],
    replicates [replicate, layer]."""

    value: Array
    replicates: Array
    n: int


def gather(
    shares: Array,
    content: Content,
    labels: Array | None,
    depth: Sequence[int],
    distances: Distances | None = None,
    resampled: bool = True,
) -> Evidence:
    """shares: [image, layer, head, patch], sums of 1 over patches; labels: [image]; distances: of the patch queries;
    resampled: with replicates and permutations."""
    n, patches = len(shares), shares.shape[-1]
    relative = shares * np.float32(patches)
    parts = {name: excess(relative, content.features[name], content.strata[name]) for name in content.features}
    means: dict[str, Array] = {"spread": spread(shares), "coverage": coverage(over_heads(shares), content)}
    counts: dict[str, int] = {}
    emptiness = float(ink.interior_emptiness(content.inked, content.grid).mean())
    if emptiness >= OFTEN_EMPTY:
        # Among empty patches, so that it is not ink again; of images that have some at the border and some inside.
        border = border_excess(shares, content.inked, ink.border_patches(content.grid))
        means["border"] = border[~np.isnan(border).all(axis=(1, 2))]
        counts["border"] = len(means["border"])
    values = {name: part.value for name, part in parts.items()}
    values |= {name: each.mean(axis=0, dtype=np.float64) for name, each in means.items()}
    replicates = {}
    if resampled:
        influences = {name: part.influences for name, part in parts.items()}
        influences |= {name: (each - values[name]) / len(each) for name, each in means.items() if name != "border"}
        replicates = resample(values, influences)
        if "border" in means:
            replicates |= resample(values, {"border": (means["border"] - values["border"]) / counts["border"]})
    layers = over_heads(relative)
    if distances is not None and not np.isnan(distances.value).all():
        values["distance"], replicates["distance"] = distances.value, distances.replicates
        counts["distance"] = distances.n
    p_classes = None
    if labels is not None and len(np.unique(labels)) > 1:
        share, repeated, p_classes = between_classes(layers, content.amount, labels, resampled)
        values["classes"], replicates["classes"] = np.array(share), repeated
    return Evidence(values, replicates, layers, content, tuple(depth), n, p_classes, emptiness, counts)


def evidence_of(survey: Survey, pictures: torch.Tensor, resampled: bool = True) -> Evidence:
    """pictures: those of which the survey kept maps, uint8 [image, channel, height, width]. Images without ink are
    left out."""
    content = Content.of(pictures, survey.grid)
    drawn = content.inked.any(axis=1)
    if not drawn.all():
        content = Content.of(pictures[torch.from_numpy(drawn)], survey.grid)
    num_layers = len(survey.layer_names)
    depth = range(num_layers - 1 if survey.reads_class_token else num_layers)
    labels = survey.labels[survey.kept][drawn]
    known = None if (labels < 0).any() else labels
    return gather(survey.shares[drawn], content, known, depth, relative_distances(survey), resampled)


def relative_distances(survey: Survey) -> Distances:
    """Of all images of the survey, also those whose maps it did not keep."""
    column, means = MEASURE_NAMES.index("distance"), survey.means
    uniform = np.array([uniform_distance(geometry.patch_centers()) for geometry in survey.geometries])
    assert means.sums is not None
    replicates = means.sums[0][:, column, :, -1] / np.maximum(means.counts[0][:, None], 1)
    return Distances(means.of_group().value[column, :, -1] / uniform, replicates / uniform, survey.num_images)


def uniform_distance(centers: torch.Tensor) -> float:
    """Between two patches drawn at random, in pixels."""
    return max(float(torch.cdist(centers, centers).mean()), 1e-12)


def over_heads(maps: Array) -> Array:
    """[image, layer, head, patch] -> [image, layer, patch], heads that a layer does not have left out."""
    return nan_mean(maps.swapaxes(2, 3))


def spread(shares: Array) -> Array:
    """Over how many of the patches attention is spread, as exp(entropy) / patches: [..., patch] -> [...], 0 to 1."""
    return effective(shares) / shares.shape[-1]


def coverage(shares: Array, content: Content) -> Array:
    """The same of the attention on ink, relative to the inked patches there are: [image, layer, patch] -> [image,
    layer]. 1 where all ink gets as much."""
    on_ink = shares * content.inked[:, None]
    on_ink = on_ink / np.maximum(on_ink.sum(axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    return effective(on_ink) / content.inked.sum(axis=-1)[:, None]


def effective(shares: Array) -> Array:
    logs = np.log(np.where(shares > 0, shares, 1.0))
    return np.exp(-(shares * logs).sum(axis=-1))


def resample(values: dict[str, Array], influences: dict[str, Array]) -> dict[str, Array]:
    """Poisson bootstrap of images by their influences [image, ...]: [replicate, ...] of each quantity."""
    n = len(next(iter(influences.values())))
    flat = np.concatenate([each.reshape(n, -1) for each in influences.values()], axis=1).astype(np.float32)
    generator = np.random.default_rng(0)
    moved = np.zeros((REPLICATES, flat.shape[1]))
    for start in range(0, n, IMAGES):
        rows = flat[start : start + IMAGES]
        moved += (generator.poisson(1.0, (REPLICATES, len(rows))).astype(np.float32) - 1) @ rows
    ends = np.cumsum([each[0].size for each in influences.values()])[:-1]
    return {
        name: values[name] + part.reshape(REPLICATES, *values[name].shape)
        for name, part in zip(influences, np.split(moved, ends, axis=1), strict=True)
    }


def between_classes(relative: Array, amount: Array, labels: Array, resampled: bool) -> tuple[float, Array, float]:
    """Of what maps [image, layer, patch] vary between images, the share that lies between classes after a linear
    regression of each patch on the ink of all patches, less the mean of permuted labels: share, [replicate], p-value.
    """
    n = len(relative)
    flat = relative.reshape(n, -1).astype(np.float64)
    flat = flat - flat.mean(axis=0)
    total = float((flat**2).sum())
    design = np.column_stack([np.ones(n), amount])
    left = (flat - design @ np.linalg.lstsq(design, flat, rcond=None)[0]).astype(np.float32)
    classes, members = np.unique(labels, return_inverse=True)
    counts = np.bincount(members)

    def between(sums: Array, weights: Array) -> Array:
        """sums: [..., class, column]; weights: [..., class]."""
        own = (sums.astype(np.float64) ** 2).sum(axis=-1) / np.maximum(weights, 1e-12)
        grand = (sums.sum(axis=-2, dtype=np.float64) ** 2).sum(axis=-1) / weights.sum(axis=-1)
        return (own.sum(axis=-1) - grand) / max(total, 1e-12)

    one_hot = np.eye(len(classes), dtype=np.float32)[members]
    observed = between(one_hot.T @ left, counts)
    generator = np.random.default_rng(0)
    permuted = []
    for start in range(0, PERMUTATIONS, PERMUTATION_BATCH):
        orders = [generator.permutation(n) for _ in range(min(PERMUTATION_BATCH, PERMUTATIONS - start))]
        sums = np.concatenate([one_hot[order] for order in orders], axis=1).T @ left
        permuted.append(between(sums.reshape(len(orders), len(classes), -1), counts))
    null = np.concatenate(permuted)
    p_value = float(((null >= observed * (1 - 1e-9)).sum() + 1) / (len(null) + 1))
    chance = float(null.mean())
    if not resampled:
        return float(observed) - chance, np.empty(0), p_value
    sums = np.zeros((REPLICATES, len(classes), left.shape[1]))
    weights = np.zeros((REPLICATES, len(classes)))
    for number in range(len(classes)):
        rows = left[members == number]
        for start in range(0, len(rows), IMAGES):
            some = rows[start : start + IMAGES]
            times = generator.poisson(1.0, (REPLICATES, len(some))).astype(np.float32)
            sums[:, number] += times @ some
            weights[:, number] += times.sum(axis=1)
    # Resampling adds as much chance again as the sample has.
    repeated = between(sums, weights) * n / weights.sum(axis=1)
    return float(observed) - chance, repeated - 2 * chance, p_value
