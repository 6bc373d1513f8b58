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
from attention_visualizer.measures.class_variance import ClassShare, class_variance, share_left, smallest
from attention_visualizer.measures.head_roles import nan_mean
from attention_visualizer.measures.ink_regression import PIXEL_COMPONENTS, main_components
from attention_visualizer.measures.intervals import REPLICATES, half_means
from attention_visualizer.measures.matched_patches import (
    Excess,
    contrast,
    permuted_excess,
    relative_excess,
)
from attention_visualizer.measures.predicted_attention import ink_features, predict_out_of_fold

Array = NDArray[Any]

IMAGES_AT_ONCE = 1000  # while resampling: bounds memory
# So many that p survives the correction for several layers and claims: 1 / 20,000 x 13 layers x 9 claims is 0.006.
FEATURE_PERMUTATIONS = 19_999
PLACE_PERMUTATIONS = 4_999
PREDICTED = "a softmax regression on all inks"  # that classes are compared beyond, see measures.predicted_attention


@dataclass(frozen=True)
class Evidence:
    """The quantities of one model over n images, of the mean attention over heads.

    Values are "coverage", "distance", "classes", and the attention on each of the content's features beyond what is
    predicted, see `gather`; what could not be measured is left out or NaN.
    """

    values: dict[str, Array]  # quantity -> [layer] or []
    replicates: dict[str, Array]  # the same with a first axis for resampled images, empty where it was not resampled
    halves: dict[str, Array]  # likewise with one for the first and second half of the images, NaN where not known
    unexplained: dict[str, Array]  # feature -> what is permuted, in the value's unit: [image, layer, patch]
    content: Content
    num_layers: int
    depth: tuple[int, ...]  # indices of the layers that depth trends may use
    n: int
    classes: tuple[ClassShare, ...] = ()  # the variance between classes on each regression, empty without labels
    permuted_places: Array | None = None  # of "distance": [1 + permutation, layer], the first with places as they are
    counts: dict[str, int] = field(default_factory=dict)  # n of the quantities that are not of all n images

    def permutation_p_value(self, feature: str, weights: Array) -> float:
        """Test sum_layer weights x the value of a feature by permuting the feature within its strata: the two-sided
        p-value, NaN where there is nothing to compare. weights: [layer]."""
        values = np.tensordot(self.unexplained[feature], weights, axes=(1, 0))  # [image, patch]
        observed, null = permuted_excess(
            values, self.content.features[feature], self.content.strata[feature], FEATURE_PERMUTATIONS
        )
        if np.isnan(observed):
            return float("nan")
        return float(((np.abs(null) >= abs(observed) * (1 - 1e-9)).sum() + 1) / (len(null) + 1))


@dataclass(frozen=True)
class Distances:
    """The mean attention distance of each layer relative to that of uniform attention, over n images; NaN for layers
    whose patch queries do not count."""

    value: Array  # [layer]
    replicates: Array  # [replicate, layer], of resampled images
    halves: Array  # [half, layer], of the images
    n: int
    permuted_places: Array | None = None  # [1 + permutation, layer], see `distances_at_permuted_places`


def gather(
    shares: Array,
    content: Content,
    labels: Array | None,
    depth: Sequence[int],
    distances: Distances | None = None,
    resampled: bool = True,
    pixels: Array | None = None,
) -> Evidence:
    """Measure all quantities.

    shares: [image, layer, head, patch], which sum to 1 over patches; labels: [image], None where not known; distances:
    of the patch queries; resampled: whether with replicates and permutations, which controls do without; pixels: their
    main components, [image, component].

    Attention on ink is contrasted with that on empty patches of the same places. Attention on edges and points is what
    goes beyond a prediction from the amounts of ink of all patches and the class, in parts of what matched patches
    without one get: shares compete, so that less ink elsewhere in an image alone makes more attention.
    """
    maps = over_heads(shares)
    parts, unexplained = attention_on_features(maps, content, labels)
    of_images = coverage(maps, content)
    values = {name: part.value for name, part in parts.items()}
    values["coverage"] = of_images.mean(axis=0, dtype=np.float64)
    replicates: dict[str, Array] = {}
    halves: dict[str, Array] = {}
    if resampled:
        influences = {name: part.influences for name, part in parts.items()}
        influences["coverage"] = (of_images - values["coverage"]) / len(of_images)
        replicates = resample(values, influences)
        # In a half each image counts twice or not at all.
        halves = {name: values[name] + len(maps) * half_means(each) for name, each in influences.items()}
    counts: dict[str, int] = {}
    placed = None
    if distances is not None and not np.isnan(distances.value).all():
        values["distance"], replicates["distance"] = distances.value, distances.replicates
        halves["distance"] = distances.halves
        counts["distance"], placed = distances.n, distances.permuted_places
    classes = class_shares(maps, content, labels, pixels, resampled)
    if classes:
        least = smallest(classes)
        values["classes"], replicates["classes"] = least.share.value, least.replicates
        halves["classes"] = np.full(2, np.nan)
    return Evidence(
        values,
        replicates,
        halves,
        unexplained,
        content,
        maps.shape[1],
        tuple(depth),
        len(shares),
        classes,
        placed,
        counts,
    )


def attention_on_features(
    maps: Array, content: Content, labels: Array | None
) -> tuple[dict[str, Excess], dict[str, Array]]:
    """Return the attention on each feature, as in `gather`, and what its test permutes, in the same unit: [image,
    layer, patch]. maps: the same."""
    predicted = predict_out_of_fold(maps, ink_features(content.amount, content.inked, labels))
    parts, unexplained = {}, {}
    for name, feature in content.features.items():
        if name == "ink":
            parts[name], unit = contrast(maps, feature, content.strata[name])
            unexplained[name] = maps / unit[:, None]
        else:
            parts[name], unit = relative_excess(maps, predicted, feature, content.strata[name])
            unexplained[name] = (maps - predicted) / unit[:, None]
    return parts, unexplained


def class_shares(
    maps: Array, content: Content, labels: Array | None, pixels: Array | None, resampled: bool
) -> tuple[ClassShare, ...]:
    """Return the variance between classes beyond each regression; of a control beyond one alone, which is at least as
    large as the smallest, so that it is no easier to exceed. Empty without classes."""
    if labels is None or len(np.unique(labels)) < 2:
        return ()
    left = maps - predict_out_of_fold(maps, ink_features(content.amount, content.inked))
    if resampled:
        return tuple(class_variance(maps, content.amount, labels, pixels, {PREDICTED: left}))
    return (share_left(maps, left, labels, PREDICTED),)


def evidence_of(survey: Survey, images: torch.Tensor, resampled: bool = True) -> Evidence:
    """Gather a survey's evidence; images without ink are left out.

    images: those of which the survey kept maps, uint8 [image, channel, height, width].
    """
    content = Content.of(images, survey.grid)
    has_ink = content.inked.any(axis=1)
    if not has_ink.all():
        images = images[torch.from_numpy(has_ink)]
        content = Content.of(images, survey.grid)
    labels = survey.labels[survey.kept][has_ink]
    known = None if (labels < 0).any() else labels
    depth = np.flatnonzero(survey.patch_queries_count).tolist()
    pixels = main_components(images.amax(dim=1).flatten(1).float().numpy() / 255, PIXEL_COMPONENTS)
    distances = resampled_distances(survey, resampled)
    return gather(survey.shares[has_ink], content, known, depth, distances, resampled, pixels)


def resampled_distances(survey: Survey, resampled: bool = True) -> Distances:
    """Return the distances of all images of the survey, also of those whose maps it did not keep."""
    replicates, halves = (
        each[:, MEASURE_NAMES.index("distance"), :, -1] / survey.uniform_distances
        for each in (survey.means.resampled()[1], survey.means.of_halves())
    )
    placed = distances_at_permuted_places(survey) if resampled else None
    return Distances(survey.relative_distances.value[:, -1], replicates, halves, survey.num_images, placed)


def distances_at_permuted_places(survey: Survey, permutations: int = PLACE_PERMUTATIONS) -> Array | None:
    """Return the attention distance of the mean weights relative to uniform attention's, with the patches where they
    are and then at permuted places, where "near" has no meaning: [1 + permutation, layer], NaN for layers whose patch
    queries do not count. None where the survey keeps no mean weights, or layers differ in their grids."""
    counting = np.flatnonzero(survey.patch_queries_count)
    geometries = {survey.geometries[layer] for layer in counting}
    names = [survey.layer_names[layer] for layer in counting]
    if len(geometries) != 1 or any(name not in survey.mean_weights for name in names):
        return None
    (geometry,) = geometries
    first, patches = geometry.num_prefix_tokens, geometry.num_patches
    if geometry.window is not None or any(
        tuple(survey.mean_weights[name].shape[1:]) != (geometry.num_tokens,) * 2 for name in names
    ):
        return None
    centers = geometry.patch_centers()
    apart = torch.cdist(centers, centers).numpy()
    stacked = np.stack(
        [
            survey.mean_weights[name][:, first : first + patches, first : first + patches].mean(dim=0).cpu().numpy()
            for name in names
        ]
    )
    stacked = (stacked / stacked.sum(axis=-1, keepdims=True)).reshape(len(names), -1)
    generator = np.random.default_rng(0)
    found = np.full((1 + permutations, survey.maps.shape[1]), np.nan)
    for number in range(1 + permutations):
        order = generator.permutation(patches) if number else np.arange(patches)
        found[number, counting] = stacked @ apart[np.ix_(order, order)].ravel() / patches
    return found / survey.uniform_distances


def over_heads(maps: Array) -> Array:
    """Average over the heads that a layer has: [image, layer, head, patch] -> [image, layer, patch]."""
    return nan_mean(maps.swapaxes(2, 3))


def coverage(maps: Array, content: Content) -> Array:
    """Return the share of the inked patches that the attention on ink is spread over, 1 where all get as much: [image,
    layer, patch] -> [image, layer]."""
    on_ink = maps * content.inked[:, None]
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
