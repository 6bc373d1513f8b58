"""Attention as far as the amounts of ink predict it. What a model attends to beyond that is not a matter of where the
ink is, how much of it, and how sharply attention follows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attention_visualizer.measures.ink_regression import INK_COMPONENTS, MAX_INKS_IN_PRODUCTS, main_components

Array = NDArray[Any]

FOLDS = 2
WEAK = 100.0  # variance of the prior of the few coefficients that patches share; of the many others it is 1
STEPS = 60  # of L-BFGS; maps of trained models need about half of them


@dataclass(frozen=True)
class InkFeatures:
    """What attention is predicted from, each of mean 0 and deviation 1."""

    #: Of the image: a 1, the amounts of ink of all patches, which patches hold any, all products of two amounts (of
    #: many patches, of their main components), the class: float32 [image, feature].
    of_image: Array
    #: Of a patch alone: its amount of ink, that squared, whether it holds any, whether it is the brightest: float32
    #: [image, patch, feature].
    of_patch: Array


def ink_features(amount: Array, inked: Array, classes: Array | None = None) -> InkFeatures:
    """amount: of ink, [image, patch]; inked: bool [image, patch]; classes: [image], None to leave them out."""
    amounts = standardised(amount)
    factors = amounts
    if amounts.shape[1] > MAX_INKS_IN_PRODUCTS:
        factors = standardised(main_components(amounts, INK_COMPONENTS))
    first, second = np.triu_indices(factors.shape[1])
    parts = [amounts, standardised(inked), standardised(factors[:, first] * factors[:, second])]
    if classes is not None:
        parts.append(standardised(classes[:, None] == np.unique(classes)))
    brightest = amount >= amount.max(axis=1, keepdims=True)
    of_patch = np.stack([amount, amount**2, inked, brightest], axis=-1)
    flat = standardised(of_patch.reshape(-1, of_patch.shape[-1]))
    return InkFeatures(
        np.concatenate([np.ones((len(amount), 1)), *parts], axis=1).astype(np.float32),
        flat.reshape(of_patch.shape).astype(np.float32),
    )


def predict_out_of_fold(shares: Array, features: InkFeatures) -> Array:
    """Predict each image's attention from its features, by a multinomial logistic regression on the other fold's
    images: [image, ..., patch], sums over patches 1 -> the same.

    The logit of a patch is a function of its own ink that all patches share, and one of the whole image's that is the
    patch's own. So any softmax of brightness and place is predicted, at any sharpness, and attention on the brightest
    patch.
    """
    flat = np.ascontiguousarray(shares.reshape(len(shares), -1, shares.shape[-1]), dtype=np.float32)
    predicted = np.empty_like(flat)
    fold = np.arange(len(flat)) % FOLDS
    of_image, of_patch = torch.from_numpy(features.of_image), torch.from_numpy(features.of_patch)
    for held_out in range(FOLDS):
        others, own = torch.from_numpy(fold != held_out), torch.from_numpy(fold == held_out)
        fitted = fit(torch.from_numpy(flat)[others], of_image[others], of_patch[others])
        with torch.no_grad():
            predicted[own.numpy()] = logits(of_image[own], of_patch[own], *fitted).softmax(dim=-1).numpy()
    return predicted.reshape(shares.shape)


def logits(of_image: Tensor, of_patch: Tensor, own: Tensor, shared: Tensor) -> Tensor:
    """Return [image, map, patch]. own: [feature, map, patch]; shared: [feature, map]."""
    return torch.einsum("if,fmp->imp", of_image, own) + torch.einsum("ipf,fm->imp", of_patch, shared)


def fit(shares: Tensor, of_image: Tensor, of_patch: Tensor) -> tuple[Tensor, Tensor]:
    """Return the likeliest coefficients of shares [image, map, patch] under normal priors, for `logits`."""
    images, maps, patches = shares.shape
    with torch.enable_grad():
        own = torch.zeros(of_image.shape[1], maps, patches, requires_grad=True)
        shared = torch.zeros(of_patch.shape[2], maps, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [own, shared], max_iter=STEPS, tolerance_grad=1e-5, history_size=10, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            likelihood = shares * logits(of_image, of_patch, own, shared).log_softmax(dim=-1)
            penalty = own.square().sum() + shared.square().sum() / WEAK
            value = penalty / (2 * images) - likelihood.sum(dim=(1, 2)).mean()
            value.backward()
            return value

        optimizer.step(loss)
    return own.detach(), shared.detach()


def standardised(values: Array) -> Array:
    """Bring each column to mean 0 and deviation 1; one without deviation to 0."""
    centred = values - values.mean(axis=0, dtype=np.float64)
    deviation = centred.std(axis=0)
    return np.asarray(np.divide(centred, deviation, out=np.zeros_like(centred), where=deviation > 1e-9))
