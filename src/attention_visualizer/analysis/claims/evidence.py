"""The evidence that claims are judged by: quantities of one model's maps, resampled and permuted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attention_visualizer.analysis.claims.content import Content
from attention_visualizer.analysis.study.survey import MEASURE_NAMES, Survey
from attention_visualizer.data import ink
from attention_visualizer.measures.head_roles import OFTEN_EMPTY, border_excess, nan_mean
from attention_visualizer.measures.intervals import PERMUTATION_BATCH, PERMUTATIONS, REPLICATES
from attention_visualizer.measures.matched_patches import excess, permuted_excess

Array = NDArray[Any]

IMAGES_AT_ONCE = 1000  # while resampling: bounds memory


@dataclass(frozen=True)
class Evidence:
    """The quantities of one model over n images.

    Values are "spread", "coverage", "border", "distance", "classes", and the excess attention on each of the content's
    features; what could not be measured is left out or NaN.
    """

    values: dict[str, Array]  # quantity -> [layer, head], [layer] or []
    replicates: dict[str, Array]  # the same with a first axis for resampled images, empty where it was not resampled
    relative: Array  # [image, layer, patch], mean over heads of the attention, relative to a uniform share
    content: Content
    depth: tuple[int, ...]  # indices of the layers that depth trends may use
    n: int
    p_classes: float | None = None  # of the label permutations, None without labels
    emptiness: float = float("nan")  # share of the interior's patches without ink, NaN where all lie at the border
    counts: dict[str, int] = field(default_factory=dict)  # n of the quantities that are not of all n images

    @property
    def num_layers(self) -> int:
        return self.relative.shape[1]

    @property
    def num_heads(self) -> int:
        return self.values["ink"].shape[1]

    def permutation_p_value(self, feature: str, weights: Array) -> float:
        """Test the excess on a feature of sum_layer weights x attention, by permuting the feature within its strata:
        the two-sided p-value, NaN where there is nothing to compare. weights: [layer]."""
        values = np.tensordot(self.relative, weights, axes=(1, 0))  # [image, patch]
        observed, null = permuted_excess(values, self.content.features[feature], self.content.strata[feature])
        if np.isnan(observed):
            return float("nan")
        return float(((np.abs(null) >= abs(observed) * (1 - 1e-9)).sum() + 1) / (len(null) + 1))


@dataclass(frozen=True)
class Distances:
    """The mean attention distance of each layer relative to that of uniform attention, over n images; NaN for layers
    whose patch queries do not count."""

    value: Array  # [layer]
    replicates: Array  # [replicate, layer], of resampled images
    n: int


def gather(
    shares: Array,
    content: Content,
    labels: Array | None,
    depth: Sequence[int],
    distances: Distances | None = None,
    resampled: bool = True,
) -> Evidence:
    """Measure all quantities.

    shares: [image, layer, head, patch], which sum to 1 over patches; labels: [image], None where not known; distances:
    of the patch queries; resampled: whether with replicates and permutations, which controls do without.
    """
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


def evidence_of(survey: Survey, images: torch.Tensor, resampled: bool = True) -> Evidence:
    """Gather a survey's evidence; images without ink are left out.

    images: those of which the survey kept maps, uint8 [image, channel, height, width].
    """
    content = Content.of(images, survey.grid)
    has_ink = content.inked.any(axis=1)
    if not has_ink.all():
        content = Content.of(images[torch.from_numpy(has_ink)], survey.grid)
    labels = survey.labels[survey.kept][has_ink]
    known = None if (labels < 0).any() else labels
    depth = np.flatnonzero(survey.patch_queries_count).tolist()
    return gather(survey.shares[has_ink], content, known, depth, resampled_distances(survey), resampled)


def resampled_distances(survey: Survey) -> Distances:
    """Return the distances of all images of the survey, also of those whose maps it did not keep."""
    _, replicates = survey.means.resampled()
    distances = replicates[:, MEASURE_NAMES.index("distance"), :, -1] / survey.uniform_distances
    return Distances(survey.relative_distances.value[:, -1], distances, survey.num_images)


def over_heads(maps: Array) -> Array:
    """Average over the heads that a layer has: [image, layer, head, patch] -> [image, layer, patch]."""
    return nan_mean(maps.swapaxes(2, 3))


def spread(shares: Array) -> Array:
    """Return the share of the patches that attention is spread over, perplexity / patches: [..., patch] -> [...]."""
    return perplexity(shares) / shares.shape[-1]


def coverage(shares: Array, content: Content) -> Array:
    """Return the share of the inked patches that the attention on ink is spread over, 1 where all get as much: [image,
    layer, patch] -> [image, layer]."""
    on_ink = shares * content.inked[:, None]
    on_ink = on_ink / np.maximum(on_ink.sum(axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    return perplexity(on_ink) / content.inked.sum(axis=-1)[:, None]


def perplexity(shares: Array) -> Array:
    """Return exp(entropy), the effective number of patches: [..., patch] -> [...]."""
    logs = np.log(np.where(shares > 0, shares, 1.0))
    return np.exp(-(shares * logs).sum(axis=-1))


def resample(values: dict[str, Array], influences: dict[str, Array]) -> dict[str, Array]:
    """Resample images (Poisson bootstrap) by their influences on each quantity, [image, ...]: [replicate, ...]."""
    n = len(next(iter(influences.values())))
    columns = np.concatenate([each.reshape(n, -1) for each in influences.values()], axis=1).astype(np.float32)
    generator = np.random.default_rng(0)
    changes = np.zeros((REPLICATES, columns.shape[1]))
    for start in range(0, n, IMAGES_AT_ONCE):
        block = columns[start : start + IMAGES_AT_ONCE]
        changes += (generator.poisson(1.0, (REPLICATES, len(block))).astype(np.float32) - 1) @ block
    ends = np.cumsum([each[0].size for each in influences.values()])[:-1]
    return {
        name: values[name] + change.reshape(REPLICATES, *values[name].shape)
        for name, change in zip(influences, np.split(changes, ends, axis=1), strict=True)
    }


def between_classes(relative: Array, amount: Array, labels: Array, resampled: bool) -> tuple[float, Array, float]:
    """Measure how much of the variance of maps between images lies between classes, beyond what their ink explains.

    The share that is left between classes after a linear regression of each patch on the ink of all patches, less its
    mean under permuted labels. relative: [image, layer, patch]; amount: of ink, [image, patch]; labels: [image] ->
    share, [replicate], p-value.
    """
    n = len(relative)
    maps = relative.reshape(n, -1).astype(np.float64)
    maps = maps - maps.mean(axis=0)
    total = max(float((maps**2).sum()), 1e-12)
    design = np.column_stack([np.ones(n), amount])
    residuals = (maps - design @ np.linalg.lstsq(design, maps, rcond=None)[0]).astype(np.float32)
    classes, members = np.unique(labels, return_inverse=True)
    counts = np.bincount(members)
    one_hot = np.eye(len(classes), dtype=np.float32)[members]
    observed = variance_between(one_hot.T @ residuals, counts) / total
    generator = np.random.default_rng(0)
    permuted = []
    for start in range(0, PERMUTATIONS, PERMUTATION_BATCH):
        orders = [generator.permutation(n) for _ in range(min(PERMUTATION_BATCH, PERMUTATIONS - start))]
        sums = np.concatenate([one_hot[order] for order in orders], axis=1).T @ residuals
        permuted.append(variance_between(sums.reshape(len(orders), len(classes), -1), counts) / total)
    null = np.concatenate(permuted)
    p_value = float(((null >= observed * (1 - 1e-9)).sum() + 1) / (len(null) + 1))
    chance = float(null.mean())
    if not resampled:
        return float(observed) - chance, np.empty(0), p_value
    sums, counts = resample_classes([residuals[members == index] for index in range(len(classes))], generator)
    # Resampling adds as much chance again as the sample has.
    replicates = variance_between(sums, counts) / total * n / counts.sum(axis=1) - 2 * chance
    return float(observed) - chance, replicates, p_value


def variance_between(sums: Array, counts: Array) -> Array:
    """Return the sum of squares between classes: [...].

    sums: over a class's images, [..., class, column]; counts: of them, [..., class].
    """
    of_classes = (sums.astype(np.float64) ** 2).sum(axis=-1) / np.maximum(counts, 1e-12)
    of_all = (sums.sum(axis=-2, dtype=np.float64) ** 2).sum(axis=-1) / counts.sum(axis=-1)
    return of_classes.sum(axis=-1) - of_all


def resample_classes(classes: Sequence[Array], generator: np.random.Generator) -> tuple[Array, Array]:
    """Resample the images of each class, [image, column] each: sums [replicate, class, column] and counts [replicate,
    class]."""
    sums = np.zeros((REPLICATES, len(classes), classes[0].shape[1]))
    counts = np.zeros((REPLICATES, len(classes)))
    for index, rows in enumerate(classes):
        for start in range(0, len(rows), IMAGES_AT_ONCE):
            block = rows[start : start + IMAGES_AT_ONCE]
            times = generator.poisson(1.0, (REPLICATES, len(block))).astype(np.float32)
            sums[:, index] += times @ block
            counts[:, index] += times.sum(axis=1)
    return sums, counts
