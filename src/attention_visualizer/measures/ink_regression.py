"""Maps, and the classes of their images, without what the ink of the images predicts of both.

What is taken out grows from one regression to the next, since a straight line leaves much that is still ink's:
attention is a softmax, so that a patch's share depends on the ink of all others, and not on a line. All are ridge
regressions, out of fold: each image's residuals come from a fit to other images, so that many regressors cannot take
out more than they predict. Taking the same out of the class as of the maps (Frisch and Waugh, 1933; Robinson, 1988; out
of fold: Chernozhukov et al., 2018) leaves what the class says beyond the regressors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

FOLDS = 5
PENALTIES = tuple(10.0**power for power in range(-4, 5))  # for each image; regressors have variance 1
# The inks, of which each design begins, are penalised a thousandth as much: where a line is the truth, it must not be
# shrunk together with products that mean nothing, or what is left of it looks like the class's.
INK_SCALE = 1000**0.5
MAX_INKS_IN_PRODUCTS = 25  # patches; of more, the first components of the inks are multiplied
INK_COMPONENTS = 20
PIXEL_COMPONENTS = 50
# Of the softmax of inks from 0 to 1: the darkest patches, the bright ones, sharply, almost the brightest alone.
STRENGTHS = (-10.0, 4.0, 10.0, 30.0)
NO_SPREAD = 1e-9  # of a regressor, below which it predicts nothing

NOTHING = "nothing"
OWN_INK = "the position's own ink"
ALL_INKS = "all inks, linear"
SQUARES = "all inks, squares and products"
SOFTMAX = "all inks, squares, products and softmax"
PIXELS = "all inks and the main components of the pixels"


@dataclass(frozen=True)
class Residuals:
    """What is left of maps and of the indicators of the images' classes, all of mean 0."""

    taken_out: str  # in words
    regressors: int | None  # of each place, None where another regression gave the residuals
    maps: Array  # float32 [image, layer, patch]
    classes: Array  # float32 [image, class, patch], or [image, class, 1] where it is the same for all patches

    def class_basis(self) -> Array:
        """Return an orthonormal basis of what is left of the classes: [image, dimension, patch or 1], 0 in dimensions
        that a patch lacks."""
        return self._transformed(-0.5)

    @cached_property
    def class_effects(self) -> Array:
        """Return the weights of images whose sum with the maps is the effect of each class, the regressors given:
        [image, class, patch or 1]; effects have mean 0 over the images."""
        return self._transformed(-1.0)

    def _transformed(self, power: float) -> Array:
        """Multiply the classes by their matrix of products to this power, on the dimensions that it has."""
        turned = []
        for left in np.moveaxis(self.classes, 2, 0).astype(np.float64):
            values, vectors = np.linalg.eigh(left.T @ left)
            there = values > 1e-6 * max(values.max(), 1e-12)
            scale = np.where(there, np.where(there, values, 1) ** power, 0)
            turned.append(left @ (vectors * scale if power == -0.5 else vectors * scale @ vectors.T))
        return np.stack(turned, axis=2).astype(np.float32)

    @cached_property
    def noise(self) -> Array:
        """Return what is left of the maps when the effects of the classes are taken out, too: [image, layer, patch]."""
        basis, noise = self.class_basis(), np.array(self.maps)
        for dimension in np.moveaxis(basis, 1, 0):
            noise -= dimension[:, None] * np.einsum("np,nlp->lp", np.broadcast_to(dimension, noise[:, 0].shape), noise)
        return noise


def residuals_of(maps: Array, amount: Array, labels: Array, pixels: Array | None = None) -> Iterator[Residuals]:
    """Yield the residuals of each regression, from nothing taken out to the most.

    maps: [image, layer, patch]; amount: of ink, 0 to 1, [image, patch]; labels: [image], from 0; pixels: their main
    components [image, component], None to leave that regression out.
    """
    n, num_layers, num_patches = maps.shape
    centred = (maps - maps.mean(axis=0, dtype=np.float64)).astype(np.float64)
    indicators = np.eye(int(labels.max()) + 1)[labels]
    indicators -= indicators.mean(axis=0)
    yield Residuals(NOTHING, 0, centred.astype(np.float32), indicators[:, :, None].astype(np.float32))
    folds = dealt_folds(labels)
    amount = amount.astype(np.float64)

    own = [out_of_fold(amount[:, [patch]], centred[:, :, patch], indicators, folds, 1) for patch in range(num_patches)]
    yield Residuals(
        OWN_INK, 1, np.stack([left for left, _ in own], axis=2), np.stack([classes for _, classes in own], axis=2)
    )
    products = with_products(amount)
    designs = {
        ALL_INKS: amount,
        SQUARES: products,
        SOFTMAX: np.column_stack([products, *(softmax(strength * amount) for strength in STRENGTHS)]),
    }
    if pixels is not None:
        designs[PIXELS] = np.column_stack([amount, pixels])
    for name, design in designs.items():
        left, classes = out_of_fold(design, centred.reshape(n, -1), indicators, folds, num_patches)
        yield Residuals(name, design.shape[1], left.reshape(n, num_layers, num_patches), classes[:, :, None])


def dealt_folds(labels: Array) -> Array:
    """Deal the images of each class to the folds in turn: [image]."""
    folds = np.zeros(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = labels == label
        folds[members] = np.arange(members.sum()) % FOLDS
    return folds


def with_products(amount: Array) -> Array:
    """Return inks [image, patch] with their squares and products, of many patches those of their first components."""
    factors = amount - amount.mean(axis=0)
    if amount.shape[1] > MAX_INKS_IN_PRODUCTS:
        factors = main_components(amount, INK_COMPONENTS)
    first, second = np.triu_indices(factors.shape[1])
    return np.column_stack([amount, factors[:, first] * factors[:, second]])


def softmax(logits: Array) -> Array:
    """Along the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def main_components(values: Array, count: int) -> Array:
    """Return the first principal components: [image, value] -> [image, component]."""
    centred = values - values.mean(axis=0)
    _, vectors = np.linalg.eigh(centred.T @ centred)  # from the smallest
    return np.asarray(centred @ vectors[:, ::-1][:, :count])


def out_of_fold(design: Array, maps: Array, indicators: Array, folds: Array, num_inks: int) -> tuple[Array, Array]:
    """Return maps [image, column] and indicators of classes [image, class] without what a ridge regression on the
    design [image, regressor], fitted to the other folds, predicts of them: float32, of mean 0.

    The penalty of each column and class is that of PENALTIES with which it is predicted best.
    """
    n, deviation = len(design), design.std(axis=0)
    kept = deviation > NO_SPREAD
    scale = np.where(np.arange(design.shape[1]) < num_inks, INK_SCALE, 1)[kept] / deviation[kept]
    scaled = np.column_stack([np.ones(n), (design - design.mean(axis=0))[:, kept] * scale])
    targets = np.column_stack([maps, indicators])
    products, together, fits = [], [], []
    for fold in range(FOLDS):
        those = folds == fold
        products.append(scaled[those].T @ scaled[those])
        together.append(scaled[those].T @ targets[those])
    errors = np.zeros((len(PENALTIES), targets.shape[1]))
    for held_products, held_together in zip(products, together, strict=True):
        fit = ridge_fits(sum(products) - held_products, sum(together) - held_together)
        fits.append(fit)
        # The squared error on the held fold, but for what is the same for all penalties.
        errors += ((held_products @ fit - 2 * held_together) * fit).sum(axis=1)
    best = errors.argmin(axis=0)[None, None]
    left = np.empty_like(targets)
    for fold, fit in enumerate(fits):
        those = folds == fold
        left[those] = targets[those] - scaled[those] @ np.take_along_axis(fit, best, axis=0)[0]
    left = (left - left.mean(axis=0)).astype(np.float32)
    return left[:, : maps.shape[1]], left[:, maps.shape[1] :]


def ridge_fits(products: Array, together: Array) -> Array:
    """Solve for each penalty, the first regressor (the constant) without one: [regressor, regressor] and [regressor,
    target] -> [penalty, regressor, target]."""
    n = max(products[0, 0], 1)  # images
    mean, level = products[1:, 0] / n, together[0] / n
    values, vectors = np.linalg.eigh(products[1:, 1:] - n * np.outer(mean, mean))
    turned = vectors.T @ (together[1:] - n * np.outer(mean, level))
    fits = []
    for penalty in PENALTIES:
        slopes = vectors @ (turned / (np.maximum(values, 0) + n * penalty)[:, None])
        fits.append(np.vstack([level - mean @ slopes, slopes]))
    return np.stack(fits)
