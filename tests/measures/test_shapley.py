"""Shapley values: exact on small games, equal to Captum's, and summing to the whole answer; leave-one-out."""

from __future__ import annotations

from itertools import combinations, permutations
from math import factorial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from attention_visualizer.measures.perturbation import OPERATORS, Operator, Perturbation
from attention_visualizer.measures.shapley import MAX_EVALUATIONS, antithetic_pairs, leave_one_out, shapley_values
from attention_visualizer.models.vision_transformer import VisionTransformer

Array = NDArray[Any]


def random_game(num_images: int, num_patches: int) -> Array:
    """An answer for every set of patches: [image, set], sets as bits."""
    return np.random.default_rng(3).random((num_images, 2**num_patches))


def answers(game: Array, visible: Array) -> Array:
    return game[np.arange(len(game)), visible @ (1 << np.arange(visible.shape[-1]))]


def by_subsets(game: Array, num_patches: int) -> Array:
    """Shapley's formula: weighted over all sets without the patch."""
    values = np.zeros((len(game), num_patches))
    for patch in range(num_patches):
        others = [each for each in range(num_patches) if each != patch]
        for size in range(num_patches):
            weight = factorial(size) * factorial(num_patches - size - 1) / factorial(num_patches)
            for chosen in combinations(others, size):
                without = sum(1 << each for each in chosen)
                values[:, patch] += weight * (game[:, without | 1 << patch] - game[:, without])
    return values


def all_orders(num_images: int, num_patches: int) -> Array:
    return np.array([[order] * num_images for order in permutations(range(num_patches))])


def test_all_orders_give_the_exact_values() -> None:
    game = random_game(3, 4)
    found = shapley_values(lambda visible: answers(game, visible), all_orders(3, 4))
    np.testing.assert_allclose(found, by_subsets(game, 4))
    assert np.ptp(found) > 0.3


def test_few_orders_add_up_and_come_near() -> None:
    game = random_game(40, 5)
    pairs = antithetic_pairs(40, 5)
    found = shapley_values(lambda visible: answers(game, visible), pairs.reshape(-1, 40, 5))
    np.testing.assert_allclose(found.sum(axis=1), game[:, -1] - game[:, 0])
    # Contributions of a game of noise vary by 0.41: 72 orders leave a standard error of 0.048, a mean error of 0.038.
    assert np.abs(found - by_subsets(game, 5)).mean() < 0.04


def test_a_patch_without_effect_is_worth_nothing() -> None:
    game = random_game(4, 3)
    found = shapley_values(lambda visible: answers(game, visible[..., [0, 1, 3]]), antithetic_pairs(4, 4)[:, 0])
    assert (found[:, 2] == 0).all() and (found[:, [0, 1, 3]] != 0).all()


@pytest.mark.parametrize(("num_patches", "num_pairs"), [(1, 150), (16, 10), (49, 2), (196, 2)])
def test_orders_come_with_their_reverses(num_patches: int, num_pairs: int) -> None:
    pairs = antithetic_pairs(3, num_patches)
    assert pairs.shape == (num_pairs, 2, 3, num_patches) and (np.sort(pairs) == np.arange(num_patches)).all()
    assert (pairs[:, 0] == pairs[:, 1, :, ::-1]).all()
    assert num_pairs == 2 or 2 * num_pairs * (num_patches - 1) <= MAX_EVALUATIONS
    if num_patches > 1:
        assert not (pairs[0] == pairs[1]).all() and not (pairs[:, :, 0] == pairs[:, :, 1]).all()


@pytest.mark.parametrize("operator", OPERATORS)
def test_values_of_a_model_add_up_to_its_answer(operator: Operator) -> None:
    perturbation, images, _ = perturbed_model()

    def value(visible: Array) -> Array:
        return perturbation.probabilities(visible, operator)

    found = shapley_values(value, antithetic_pairs(len(images), 4)[0])
    whole, empty = (value(np.full((len(images), 4), is_visible)) for is_visible in (True, False))
    assert np.abs(whole - empty).min() > 1e-4
    np.testing.assert_allclose(found.sum(axis=1), whole - empty, atol=1e-7)


def test_filled_patches_are_worth_what_captum_says() -> None:
    from captum.attr import FeatureAblation, ShapleyValues

    perturbation, images, model = perturbed_model()
    mask = torch.arange(4).view(2, 2).repeat_interleave(6, dim=0).repeat_interleave(6, dim=1)

    def value(visible: Array) -> Array:
        return perturbation.probabilities(visible, "fill")

    for theirs, found in (
        (ShapleyValues, shapley_values(value, all_orders(5, 4))),
        (FeatureAblation, leave_one_out(value, 5, 4)),
    ):
        with torch.no_grad():
            expected = theirs(lambda inputs: model(inputs).softmax(dim=-1)).attribute(
                images.float() / 255, baselines=0.0, target=torch.from_numpy(CLASSES), feature_mask=mask
            )
        assert np.abs(found).max() > 1e-3
        np.testing.assert_allclose(found, expected[:, 0, ::6, ::6].flatten(1).numpy(), atol=1e-6)


CLASSES = np.array([0, 3, 9, 1, 1])


def perturbed_model() -> tuple[Perturbation, torch.Tensor, VisionTransformer]:
    torch.manual_seed(3)
    model = VisionTransformer(img_size=12, patch_size=6, embed_dim=10, num_heads=2, num_layers=2, mlp_dim=14).eval()
    images = torch.randint(0, 256, (5, 1, 12, 12), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return Perturbation(model, images, CLASSES, lambda pictures: pictures.float() / 255), images, model
