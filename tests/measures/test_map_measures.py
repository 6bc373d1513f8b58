"""Measures against closed forms, and against slow code that says what they mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import scipy.spatial.distance  # type: ignore[import-untyped]
import scipy.stats  # type: ignore[import-untyped]
import torch
from numpy.typing import NDArray
from torch import Tensor

from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.measures import map_measures
from attention_visualizer.support.errors import UserError

SEED = Geometry((4, 4), 1, (7, 7))  # the default model's
OBLONG = Geometry((3, 5), 2, (7, 11))  # 17 tokens of another layout: primes, so that nothing can be swapped
NO_PREFIX = Geometry((3, 5), 0, (7, 11))
GEOMETRIES = pytest.mark.parametrize("geometry", [SEED, OBLONG, NO_PREFIX], ids=["seed", "oblong", "no-prefix"])


def random_weights(geometry: Geometry, batch: int = 2, heads: int = 3, seed: int = 0, sharpness: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = geometry.num_tokens
    return (torch.randn(batch, heads, tokens, tokens, generator=generator) * sharpness).softmax(dim=-1)


def uniform(geometry: Geometry) -> Tensor:
    return torch.full((2, 3, geometry.num_tokens, geometry.num_tokens), 1 / geometry.num_tokens)


def identity(geometry: Geometry) -> Tensor:
    return torch.eye(geometry.num_tokens).expand(2, 3, -1, -1)


# --- entropy ---


@GEOMETRIES
def test_identity_attention_has_no_entropy(geometry: Geometry) -> None:
    entropy = map_measures.attention_entropy(identity(geometry))
    assert entropy.shape == (2, 3, geometry.num_tokens)
    assert (entropy == 0).all()  # 0 ln 0 is 0, not NaN


def test_uniform_attention_has_the_entropy_ln_n() -> None:
    entropy = map_measures.attention_entropy(uniform(SEED))
    np.testing.assert_allclose(entropy, math.log(17), rtol=1e-6)
    assert float(entropy[0, 0, 0]) == pytest.approx(2.833, abs=5e-4)
    assert map_measures.uniform_entropy(17) == pytest.approx(math.log(17))
    np.testing.assert_allclose(map_measures.effective_tokens(uniform(SEED)), 17.0, rtol=1e-5)


def test_uniform_distances_are_those_of_the_documentation() -> None:
    for grid, patch, expected in (((4, 4), 7, 14.06), ((2, 2), 14, 11.95), ((7, 7), 4, 14.44)):
        geometry = Geometry(grid, 1, (patch, patch))
        assert map_measures.uniform_distance(geometry) == pytest.approx(expected, abs=0.006)
        tokens = torch.full((1, 1, *[geometry.num_tokens] * 2), 1 / geometry.num_tokens)
        measured = map_measures.mean_attention_distance(tokens, geometry)
        assert float(measured) == pytest.approx(map_measures.uniform_distance(geometry), rel=1e-6)
    assert 0 < map_measures.uniform_distance(Geometry((1, 1), 1, (28, 28))) < 1e-6


def test_entropy_equals_scipys() -> None:
    weights = random_weights(OBLONG)
    np.testing.assert_allclose(
        map_measures.attention_entropy(weights), scipy.stats.entropy(weights.numpy(), axis=-1), atol=1e-5
    )


def test_effective_tokens_counts_the_keys_of_an_even_choice() -> None:
    row = torch.tensor([0.2] * 5 + [0.0] * 6)
    assert float(map_measures.effective_tokens(row)) == pytest.approx(5.0, rel=1e-5)


def test_entropy_of_the_query() -> None:
    weights = random_weights(OBLONG)
    rows = scipy.stats.entropy(weights.numpy(), axis=-1)  # [batch, head, query]
    np.testing.assert_allclose(map_measures.query_entropy(weights, OBLONG, "cls"), rows[:, :, 0], atol=1e-5)
    np.testing.assert_allclose(
        map_measures.query_entropy(weights, OBLONG, "patches"), rows[:, :, 2:].mean(axis=-1), atol=1e-5
    )
    np.testing.assert_allclose(map_measures.query_entropy(weights, OBLONG, (1, 3)), rows[:, :, 2 + 5 + 3], atol=1e-5)
    np.testing.assert_allclose(map_measures.readout_entropy(weights, OBLONG), rows[:, :, 0], atol=1e-5)
    without = random_weights(NO_PREFIX)
    np.testing.assert_allclose(
        map_measures.readout_entropy(without, NO_PREFIX),
        scipy.stats.entropy(without.numpy(), axis=-1).mean(-1),
        atol=1e-5,
    )


# --- queries ---


def test_attention_of_a_query() -> None:
    weights = random_weights(OBLONG)
    expected = weights.numpy()
    np.testing.assert_array_equal(map_measures.query_attention(weights, OBLONG, "cls"), expected[:, :, 0])
    np.testing.assert_array_equal(map_measures.query_attention(weights, OBLONG, (2, 4)), expected[:, :, 16])
    np.testing.assert_array_equal(map_measures.query_attention(weights, OBLONG, (0, 1)), expected[:, :, 3])
    np.testing.assert_allclose(
        map_measures.query_attention(weights, OBLONG, "patches"), expected[:, :, 2:].mean(axis=2), atol=1e-6
    )
    queries: list[map_measures.Query] = ["cls", "patches", (1, 2)]
    for query in queries:
        row = map_measures.query_attention(weights, OBLONG, query)
        assert row.shape == (2, 3, 17)
        np.testing.assert_allclose(row.sum(dim=-1), 1.0, atol=1e-5)


def test_patch_attention_leaves_out_prefix_keys_and_does_not_renormalise() -> None:
    row = torch.arange(17.0) / 136
    assert map_measures.patch_attention(row, OBLONG).tolist() == row[2:].tolist()
    assert map_measures.patch_attention(row[:15], NO_PREFIX).shape == (15,)


def test_the_readout_query_is_the_class_token_where_there_is_one() -> None:
    assert map_measures.readout_query(OBLONG) == "cls"
    assert map_measures.readout_query(NO_PREFIX) == "patches"


def test_no_class_token_to_ask_for() -> None:
    with pytest.raises(ValueError, match="no class token"):
        map_measures.query_attention(random_weights(NO_PREFIX), NO_PREFIX, "cls")


@pytest.mark.parametrize("query", [(3, 0), (0, 5), (-1, 0)])
def test_no_patch_outside_the_grid(query: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="outside the 3 x 5 patch grid"):
        map_measures.query_attention(random_weights(OBLONG), OBLONG, query)


@GEOMETRIES
def test_maximum_and_mean_attention_are_of_the_readouts_patch_keys(geometry: Geometry) -> None:
    weights, prefix = random_weights(geometry), geometry.num_prefix_tokens
    rows = weights.numpy()
    row = (rows[:, :, 0] if prefix else rows.mean(axis=2))[..., prefix:]
    np.testing.assert_allclose(map_measures.maximum_attention(weights, geometry), row.max(axis=-1), atol=1e-6)
    np.testing.assert_allclose(map_measures.mean_attention(weights, geometry), row.mean(axis=-1), atol=1e-6)


def test_maximum_attention_ignores_what_the_class_token_gives_itself() -> None:
    weights = torch.zeros(1, 1, 17, 17)
    weights[0, 0, :, 0], weights[0, 0, :, 9] = 0.7, 0.3
    assert float(map_measures.maximum_attention(weights, SEED)) == pytest.approx(0.3)
    assert float(map_measures.mean_attention(weights, SEED)) == pytest.approx(0.3 / 16)


# --- distance ---


@pytest.mark.parametrize("geometry", [SEED, OBLONG, NO_PREFIX, Geometry((14, 14), 1, (16, 16))])
def test_identity_attention_goes_no_distance(geometry: Geometry) -> None:
    distance = map_measures.mean_attention_distance(identity(geometry), geometry)
    assert distance.shape == (2, 3)
    np.testing.assert_allclose(distance, 0.0, atol=1e-4)


def test_uniform_attention_goes_the_mean_distance() -> None:
    """14.06 pixels; 13.23 would be the same with the class token's share lost."""
    distance = map_measures.mean_attention_distance(uniform(SEED), SEED)
    np.testing.assert_allclose(distance, 14.06, atol=5e-3)


def test_attending_to_the_left_neighbour_goes_one_patch_width() -> None:
    weights = torch.zeros(1, 1, 15, 15)
    for row, column in product(range(3), range(5)):
        weights[0, 0, row * 5 + column, row * 5 + (column - 1) % 5] = 1.0
    expected = 11 * (4 * 1 + 1 * 4) / 5  # four patches look one patch far, the first of a row four
    assert float(map_measures.mean_attention_distance(weights, NO_PREFIX)) == pytest.approx(expected)


@GEOMETRIES
def test_distance_equals_the_definition(geometry: Geometry) -> None:
    weights = random_weights(geometry)
    expected = np.zeros((2, 3))
    prefix, (height, width) = geometry.num_prefix_tokens, geometry.grid
    places = [
        (row * geometry.patch_size[0], column * geometry.patch_size[1])
        for row, column in product(range(height), range(width))
    ]
    for image, head in product(range(2), range(3)):
        for i, here in enumerate(places):
            shares = [float(weights[image, head, prefix + i, prefix + j]) for j in range(len(places))]
            lengths = [math.dist(here, there) for there in places]
            expected[image, head] += np.dot(shares, lengths) / sum(shares) / len(places)
    np.testing.assert_allclose(map_measures.mean_attention_distance(weights, geometry), expected, rtol=1e-4)


def test_distance_of_patches_that_attend_to_no_patch_is_a_number() -> None:
    weights = torch.zeros(1, 1, 17, 17)
    weights[..., 0] = 1.0
    assert float(map_measures.mean_attention_distance(weights, SEED)) == 0.0


# --- rollout ---


def loop_rollout(layers: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Abnar and Zuidema's recursion, image by image: [batch, head, query, key] a layer -> [batch, query, key]."""
    images = []
    for image in range(len(layers[0])):
        rollout = np.eye(layers[0].shape[-1])
        for layer in layers:
            step = np.mean([layer[image, head] for head in range(layer.shape[1])], axis=0) + np.eye(len(rollout))
            for row in step:
                row /= row.sum()
            rollout = step @ rollout
        images.append(rollout)
    return np.stack(images)


def test_uniform_rollout_over_six_layers() -> None:
    rollout = map_measures.attention_rollout([uniform(SEED)] * 6)
    assert rollout.shape == (2, 17, 17)
    np.testing.assert_allclose(rollout[:, 0, 1:], (1 - 2**-6) / 17, rtol=1e-5)
    assert float(rollout[0, 0, 5]) == pytest.approx(0.0579, abs=5e-5)
    np.testing.assert_allclose(rollout[:, 0, 0], 2**-6 + (1 - 2**-6) / 17, rtol=1e-5)


def test_identity_rollout_is_the_identity() -> None:
    np.testing.assert_allclose(map_measures.attention_rollout([identity(OBLONG)] * 5)[1], np.eye(17), atol=1e-6)


def test_rollout_equals_a_plain_loop_and_keeps_the_order_of_layers() -> None:
    layers = [random_weights(OBLONG, seed=seed) for seed in range(5)]
    expected = loop_rollout([layer.double().numpy() for layer in layers])
    rollout = map_measures.attention_rollout(layers)
    np.testing.assert_allclose(rollout, expected, atol=1e-6)
    np.testing.assert_allclose(rollout.sum(dim=-1), 1.0, atol=1e-6)
    assert np.abs(map_measures.attention_rollout(layers[::-1]).numpy() - expected).max() > 1e-2


def test_rollout_steps_are_the_rollouts_so_far() -> None:
    layers = [random_weights(OBLONG, seed=seed) for seed in range(3)]
    so_far = None
    for number, layer in enumerate(layers, start=1):
        so_far = map_measures.rollout_step(so_far, layer)
        torch.testing.assert_close(so_far, map_measures.attention_rollout(iter(layers[:number])))


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
@pytest.mark.parametrize("discard", [0.0, 0.35, 0.9])
def test_rollout_with_other_fusions_drops_the_least_of_each_row_of_each_image(fusion: Any, discard: float) -> None:
    layers = [random_weights(SEED, seed=seed) for seed in range(4)]
    expected = []
    for image in range(len(layers[0])):
        rollout = np.eye(17)
        for layer in layers:
            joined = getattr(np, fusion)(layer[image].double().numpy(), axis=0)
            for row in joined:  # each row has its own least
                row[np.argsort(row)[: int(discard * 17)]] = 0
            step = joined + np.eye(17)
            rollout = step / step.sum(axis=1, keepdims=True) @ rollout
        expected.append(rollout)
    found = map_measures.attention_rollout(layers, fusion, discard)
    np.testing.assert_allclose(found, np.stack(expected), atol=1e-6)
    np.testing.assert_allclose(found.sum(dim=-1), 1.0, atol=1e-5)


def test_a_discarded_share_is_not_lost_to_rounding() -> None:
    """0.29 * 100 is a little less than 29."""
    row = torch.arange(1.0, 101.0)
    rollout = map_measures.attention_rollout([(row / row.sum()).expand(1, 1, 100, 100)], "mean", 0.29)
    assert int((rollout[0, 99] == 0).sum()) == 29


def test_a_sharp_head_shows_under_maximum_and_is_hidden_under_minimum() -> None:
    """By hand: one head looks at key 1 alone, the other evenly at all four."""
    weights = torch.full((1, 2, 4, 4), 0.25)
    weights[0, 0] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    for fusion, row in (
        ("max", [1.25 / 2.75, 1 / 2.75, 0.25 / 2.75, 0.25 / 2.75]),
        ("min", [1 / 1.25, 0.25 / 1.25, 0, 0]),
    ):
        rolled = map_measures.attention_rollout([weights], fusion)  # type: ignore[arg-type]
        np.testing.assert_allclose(rolled[0, 0], row, rtol=1e-6)


def test_rollout_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        map_measures.attention_rollout([])


# --- divergence ---


def test_divergence_equals_scipys() -> None:
    first, second = random_weights(OBLONG, seed=1), random_weights(OBLONG, seed=2)
    divergence = map_measures.jensen_shannon_divergence(first, second)
    expected = scipy.spatial.distance.jensenshannon(first.double().numpy(), second.double().numpy(), axis=-1) ** 2
    assert divergence.shape == (2, 3, 17)
    np.testing.assert_allclose(divergence, expected, atol=1e-5)
    torch.testing.assert_close(divergence, map_measures.jensen_shannon_divergence(second, first))


def test_divergence_lies_between_zero_and_ln_two() -> None:
    weights = random_weights(OBLONG)
    assert (map_measures.jensen_shannon_divergence(weights, weights) == 0).all()
    apart = map_measures.jensen_shannon_divergence(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0]))
    assert float(apart) == pytest.approx(math.log(2))
    chain = [random_weights(OBLONG, seed=seed, sharpness=9.0) for seed in range(3)]
    for first, second in pairwise(chain):
        divergence = map_measures.jensen_shannon_divergence(first, second)
        assert (divergence >= 0).all() and (divergence <= math.log(2) + 1e-6).all()


# --- all of them ---


@pytest.mark.parametrize(
    "measure",
    [
        map_measures.readout_entropy,
        map_measures.maximum_attention,
        map_measures.mean_attention,
        map_measures.mean_attention_distance,
    ],
)
@GEOMETRIES
def test_each_image_and_head_is_measured_by_itself(
    measure: Callable[[Tensor, Geometry], Tensor], geometry: Geometry
) -> None:
    weights = random_weights(geometry)
    before = weights.clone()
    together = measure(weights, geometry)
    assert together.shape == (2, 3)
    for image, head in product(range(2), range(3)):
        alone = measure(weights[image : image + 1, head : head + 1], geometry)
        torch.testing.assert_close(together[image : image + 1, head : head + 1], alone)
    assert torch.equal(weights, before)


# --- sinks, divergence, values, gradients ---


def test_uniform_attention_has_no_sink_and_copies_do_not_diverge() -> None:
    np.testing.assert_allclose(map_measures.sink_strength(uniform(SEED), SEED), 1 / 17, rtol=1e-6)
    np.testing.assert_allclose(map_measures.head_divergence(uniform(SEED), SEED), 0, atol=1e-7)


def test_a_sink_is_what_the_most_attended_key_receives_from_all_queries() -> None:
    weights = random_weights(OBLONG)
    expected = weights.double().numpy().mean(axis=2)
    np.testing.assert_allclose(map_measures.column_mass(weights), expected, rtol=1e-5)
    np.testing.assert_allclose(map_measures.sink_strength(weights, OBLONG), expected.max(axis=-1), rtol=1e-5)


@pytest.mark.parametrize("geometry", [SEED, OBLONG], ids=["class token", "oblong"])
def test_divergence_is_the_mean_jensen_shannon_divergence_from_the_other_heads(geometry: Geometry) -> None:
    weights = random_weights(geometry)
    rows = map_measures.query_attention(weights, geometry, map_measures.readout_query(geometry)).double().numpy()
    found = map_measures.head_divergence(weights, geometry)
    heads = rows.shape[1]
    for image in range(len(rows)):
        for head in range(heads):
            others = [
                scipy.spatial.distance.jensenshannon(rows[image, head], rows[image, other]) ** 2
                for other in range(heads)
                if other != head
            ]
            assert float(found[image, head]) == pytest.approx(np.mean(others), abs=1e-6)
    assert torch.isnan(map_measures.head_divergence(weights[:, :1], geometry)).all()


def test_divergences_between_each_two_heads() -> None:
    weights = random_weights(NO_PREFIX)
    rows = weights.double().numpy().mean(axis=2)
    found = map_measures.head_divergences(weights, NO_PREFIX)
    for image, one, other in product(range(2), range(3), range(3)):
        expected = scipy.spatial.distance.jensenshannon(rows[image, one], rows[image, other]) ** 2
        assert float(found[image, one, other]) == pytest.approx(expected, abs=1e-6)


def test_heads_without_a_common_key_diverge_by_ln_two() -> None:
    weights = torch.zeros(1, 3, 17, 17)
    for head in range(3):
        weights[0, head, :, 5 * head] = 1.0
    np.testing.assert_allclose(map_measures.head_divergence(weights, SEED), math.log(2), rtol=1e-6)
    np.testing.assert_allclose(map_measures.sink_strength(weights, SEED), 1.0)


def test_windows_are_measured_one_by_one_and_averaged_by_image() -> None:
    """Two images of six windows of 2 x 3 patches, over a grid of 4 x 9."""
    geometry = Geometry((4, 9), 0, (7, 11), (2, 3))
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(12, 3, 6, 6, generator=generator).mul(3).softmax(dim=-1)
    by_window = weights.double().numpy().mean(axis=2).max(axis=-1)
    found = geometry.per_image(map_measures.sink_strength(weights, geometry))
    np.testing.assert_allclose(found, by_window.reshape(2, 6, 3).mean(axis=1), rtol=1e-5)
    alone = [map_measures.head_divergence(weights[n : n + 1], geometry) for n in range(12)]
    torch.testing.assert_close(map_measures.head_divergence(weights, geometry), torch.cat(alone))


def test_value_weighted_attention_is_the_length_of_what_is_added() -> None:
    weights = random_weights(OBLONG)
    images, heads, queries, keys = weights.shape
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(images, heads, keys, 3, generator=generator)
    projection = torch.randn(11, heads * 3, generator=generator)
    plain = map_measures.value_weighted_attention(weights, values)
    projected = map_measures.value_weighted_attention(weights, values, projection)
    for image, head, query, key in product(range(images), range(heads), (0, queries - 1), range(keys)):
        added = weights[image, head, query, key] * values[image, head, key]
        assert float(plain[image, head, query, key]) == pytest.approx(float(added.norm()), rel=1e-4)
        after = projection[:, 3 * head : 3 * head + 3] @ added
        assert float(projected[image, head, query, key]) == pytest.approx(float(after.norm()), rel=1e-4)


def test_relevance_adds_what_is_positive_mean_over_heads() -> None:
    layers = [random_weights(OBLONG, seed=seed) for seed in range(3)]
    generator = torch.Generator().manual_seed(7)
    gradients = [torch.randn(layer.shape, generator=generator) for layer in layers]
    found = None
    for weights, gradient in zip(layers, gradients, strict=True):
        found = map_measures.relevance_step(found, weights, gradient)
    assert found is not None
    for image in range(len(layers[0])):
        relevance = np.eye(layers[0].shape[-1])
        for weights, gradient in zip(layers, gradients, strict=True):
            product_ = (weights[image] * gradient[image]).double().numpy()
            relevance = relevance + np.maximum(product_, 0).mean(axis=0) @ relevance
        np.testing.assert_allclose(found[image], relevance, rtol=1e-4, atol=1e-6)
