"""Streaming gives the same numbers as all images at once, in memory that does not grow."""

from __future__ import annotations

import copy
import math
import weakref
from itertools import product
from typing import Any

import numpy as np
import pytest
import scipy.stats  # type: ignore[import-untyped]
import torch
from numpy.typing import NDArray
from torch import Tensor

from attention_visualizer.attention.capture import AttentionLayer
from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.measures.streaming import (
    LOGGED_MEASURES,
    NUM_BINS,
    REPORTED_MEASURES,
    AttentionStatistics,
    Distribution,
    MeasureSummary,
    histogram_quantiles,
)
from attention_visualizer.support.errors import UserError

GEOMETRY = Geometry((3, 5), 2, (7, 11))
OTHER_GRID = Geometry((3, 3), 2, (7, 11))
LAYERS, HEADS, IMAGES = 2, 3, 47
NAMES = ("entropy", "maximum", "mean", "distance")


def random_weights(
    images: int = IMAGES, geometry: Geometry = GEOMETRY, heads: int = HEADS, seed: int = 0
) -> list[Tensor]:
    """One tensor a layer, [image, head, query, key]; layers and heads differ in sharpness."""
    generator = torch.Generator().manual_seed(seed)
    shape = (images, heads, geometry.num_tokens, geometry.num_tokens)
    sharpness = torch.arange(1.0, heads + 1).view(1, heads, 1, 1)
    return [(torch.randn(shape, generator=generator) * sharpness * (layer + 1)).softmax(-1) for layer in range(LAYERS)]


def layer_of(index: int, weights: Tensor, geometry: Geometry | None = GEOMETRY) -> AttentionLayer:
    return AttentionLayer(f"blocks.{index}.attn", index, weights, weights[..., :7], geometry, 0.0)


def feed(statistics: AttentionStatistics, weights: list[Tensor], geometry: Geometry = GEOMETRY) -> AttentionStatistics:
    for index, layer in enumerate(weights):
        statistics.update(layer_of(index, layer, geometry))
    return statistics


def in_batches(weights: list[Tensor], sizes: list[int]) -> AttentionStatistics:
    statistics = AttentionStatistics()
    for parts in zip(*(layer.split(sizes) for layer in weights), strict=True):
        feed(statistics, list(parts))
    return statistics


def assert_same(first: dict[str, MeasureSummary], second: dict[str, MeasureSummary]) -> None:
    assert first.keys() == second.keys()
    for name, summary in first.items():
        other = second[name]
        assert summary.n == other.n
        np.testing.assert_array_equal(summary.counts, other.counts)
        np.testing.assert_array_equal(summary.edges, other.edges)
        np.testing.assert_allclose(summary.mean, other.mean, rtol=1e-12)
        np.testing.assert_allclose(summary.deviation, other.deviation, rtol=1e-6, atol=1e-9)


def reference(weights: list[Tensor], geometry: Geometry = GEOMETRY) -> dict[str, NDArray[np.float64]]:
    """Each measure of every image, plainly: [image, layer, head]."""
    prefix, (height, width) = geometry.num_prefix_tokens, geometry.grid
    stacked = torch.stack(weights, dim=1).double().numpy()  # [image, layer, head, query, key]
    row = stacked[..., 0, :]
    places = [(r * geometry.patch_size[0], c * geometry.patch_size[1]) for r in range(height) for c in range(width)]
    lengths = np.array([[math.dist(here, there) for there in places] for here in places])
    patches = stacked[..., prefix:, prefix:]
    return {
        "entropy": scipy.stats.entropy(row, axis=-1),
        "maximum": row[..., prefix:].max(axis=-1),
        "mean": row[..., prefix:].mean(axis=-1),
        "distance": ((patches * lengths).sum(-1) / patches.sum(-1)).mean(-1),
    }


def test_the_measures_are_those_promised() -> None:
    assert tuple(measure.name for measure in LOGGED_MEASURES) == NAMES
    assert tuple(AttentionStatistics().distributions) == NAMES


@pytest.mark.parametrize("sizes", [[47], [1] * 47, [1, 2, 3, 5, 7, 11, 13, 5], [46, 1]])
def test_any_batch_sizes_give_the_same(sizes: list[int]) -> None:
    weights = random_weights()
    statistics = in_batches(weights, sizes)
    assert_same(statistics.compute(), feed(AttentionStatistics(), weights).compute())


def test_processes_together_have_the_statistics_of_one() -> None:
    weights = random_weights()
    whole = feed(AttentionStatistics(), weights).compute()
    shares = [
        feed(AttentionStatistics(), [layer[rows] for layer in weights])
        for rows in (slice(0, 5), slice(5, 36), slice(36, 47))
    ]
    brought: list[list[Tensor]] = [[] for _ in shares]  # what each process hands to its reductions, in order
    for share, tensors in zip(shares, brought, strict=True):

        def bring(tensor: Tensor, *, reduce_op: str, tensors: list[Tensor] = tensors) -> Tensor:
            tensors.append(tensor.clone())
            return tensor

        copy.deepcopy(share).reduce(bring)
    for share in shares:
        of_all = iter(zip(*brought, strict=True))

        def over_processes(tensor: Tensor, *, reduce_op: str, of_all: Any = of_all) -> Tensor:
            together = torch.stack(next(of_all))
            return together.sum(dim=0) if reduce_op == "sum" else together.amax(dim=0)

        share.reduce(over_processes)
        reduced = share.compute()
        assert_same(reduced, whole)
        for name, summary in reduced.items():
            np.testing.assert_array_equal(summary.extremes, whole[name].extremes)
            assert summary.raw_values is None  # each process has its own


def test_means_and_deviations() -> None:
    weights = random_weights()
    summaries = in_batches(weights, [13, 29, 5]).compute()
    for name, values in reference(weights).items():
        summary = summaries[name]
        assert summary.mean.shape == summary.deviation.shape == (LAYERS, HEADS)
        assert summary.n == IMAGES
        np.testing.assert_allclose(summary.mean, values.mean(axis=0), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(summary.deviation, values.std(axis=0), rtol=1e-5, atol=1e-6)


def test_deviation_survives_a_mean_that_is_large_beside_it() -> None:
    distribution = Distribution(1, 0.0, 300.0)
    values = 200.0 + torch.randn(997, 1, generator=torch.Generator().manual_seed(0)) * 1e-3
    distribution.update(values)
    n = float(distribution.counts.sum())
    deviation = math.sqrt(float(distribution.sums_of_squares / n - (distribution.sums / n) ** 2))
    assert deviation == pytest.approx(float(values.double().std(correction=0)), rel=1e-3)


def test_histograms_count_every_image_in_its_bin() -> None:
    weights = random_weights()
    summaries = in_batches(weights, [13, 34]).compute()
    for name, values in reference(weights).items():
        summary = summaries[name]
        assert summary.counts.shape == (LAYERS, HEADS, NUM_BINS) and summary.edges.shape == (NUM_BINS + 1,)
        assert (summary.counts.sum(axis=-1) == IMAGES).all()
        assert summary.edges[0] <= values.min() and values.max() <= summary.edges[-1]
        for layer, head in product(range(LAYERS), range(HEADS)):
            expected, _ = np.histogram(values[:, layer, head], summary.edges)
            # A value on an edge may fall on either side of it by rounding.
            assert np.abs(np.cumsum(expected) - np.cumsum(summary.counts[layer, head])).max() <= 1


def test_quantiles_are_numpys_within_one_bin() -> None:
    weights, shares = random_weights(images=701), (0.05, 0.25, 0.5, 0.75, 0.95)
    summaries = in_batches(weights, [300, 401]).compute()
    for name, values in reference(weights).items():
        summary = summaries[name]
        quantiles = summary.quantiles(shares)
        assert quantiles.shape == (LAYERS, len(shares))
        bin_width = summary.edges[1] - summary.edges[0]
        expected = np.stack([np.quantile(values[:, layer], shares) for layer in range(LAYERS)])  # heads together
        np.testing.assert_allclose(quantiles, expected, rtol=0, atol=bin_width)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])
@pytest.mark.parametrize("values", [[0.31], [0.31, 0.87], [0.31, 0.31, 0.87], [0.05, 0.31, 0.33, 0.87, 0.871]])
def test_quantiles_of_a_few_values_lie_between_their_neighbours(values: list[float], share: float) -> None:
    edges = np.linspace(0.0, 1.0, 101)
    counts, _ = np.histogram(values, edges)
    quantile = float(histogram_quantiles(counts.astype(float), edges, (share,))[0])
    low, high = (np.quantile(values, share, method=method) for method in ("lower", "higher"))
    assert low - 0.01 <= quantile <= high + 0.01


def test_quantiles_rise() -> None:
    shares = tuple(np.linspace(0.01, 0.99, 53))
    for summary in feed(AttentionStatistics(), random_weights()).compute().values():
        assert (np.diff(summary.quantiles(shares), axis=1) >= 0).all()


def test_extreme_attention_stays_inside_the_histogram() -> None:
    tokens = GEOMETRY.num_tokens
    uniform = torch.full((5, HEADS, tokens, tokens), 1 / tokens)
    one_key = torch.zeros(5, HEADS, tokens, tokens)
    one_key[..., -1] = 1.0  # the far corner
    identity = torch.eye(tokens).expand(5, HEADS, -1, -1)
    for weights in (uniform, one_key, identity):
        for summary in feed(AttentionStatistics(), [weights] * LAYERS).compute().values():
            assert (summary.counts.sum(axis=-1) == 5).all()
            assert np.isfinite(summary.mean).all() and (summary.deviation < 1e-6).all()


def test_uniform_attention_has_its_known_values() -> None:
    geometry = Geometry((4, 4), 1, (7, 7))
    weights = torch.full((5, HEADS, 17, 17), 1 / 17)
    summaries = feed(AttentionStatistics(), [weights] * LAYERS, geometry).compute()
    for name, value in {"entropy": 2.833, "maximum": 1 / 17, "mean": 1 / 17, "distance": 14.06}.items():
        np.testing.assert_allclose(summaries[name].mean, value, rtol=5e-4)


def test_without_a_class_token_the_patches_are_read_out() -> None:
    geometry = Geometry((3, 5), 0, (7, 11))
    weights = random_weights(geometry=geometry)
    summaries = feed(AttentionStatistics(), weights, geometry).compute()
    stacked = torch.stack(weights, dim=1).double().numpy()
    np.testing.assert_allclose(
        summaries["entropy"].mean, scipy.stats.entropy(stacked, axis=-1).mean(axis=(0, 3)), rtol=1e-5
    )
    np.testing.assert_allclose(summaries["mean"].mean, 1 / 15, rtol=1e-6)


def test_memory_does_not_grow_with_the_number_of_images() -> None:
    statistics = AttentionStatistics()
    batch = random_weights(7)

    def size() -> int:
        return sum(
            tensor.untyped_storage().nbytes()
            for distributions in statistics.distributions.values()
            for distribution in distributions
            for tensor in (distribution.counts, distribution.sums, distribution.sums_of_squares)
        )

    feed(statistics, batch)
    after_one = size()
    references = []
    for seed in range(11):
        weights = random_weights(7, seed=seed)
        references += [weakref.ref(layer) for layer in weights]
        feed(statistics, weights)
    del weights
    assert size() == after_one == len(NAMES) * LAYERS * HEADS * (NUM_BINS + 2) * 8
    assert all(reference() is None for reference in references)  # no map is kept
    assert statistics.compute()["entropy"].n == 12 * 7


def test_sums_are_exact_for_many_images() -> None:
    """In float32 the sum of 2^24 ones and one more would not move."""
    distribution = Distribution(1, 0.0, 1.0)
    distribution.sums += 2.0**24
    distribution.counts[0, 0] += 2.0**24
    distribution.update(torch.full((1, 1), 1e-3))
    assert float(distribution.sums[0]) - 2.0**24 == pytest.approx(1e-3, rel=1e-4)
    assert float(distribution.counts.sum()) == 2.0**24 + 1


# --- wrong use ---


def test_layers_without_a_known_grid_are_left_out_and_named() -> None:
    statistics = AttentionStatistics()
    weights = random_weights()
    statistics.update(layer_of(0, weights[0], geometry=None))
    with pytest.raises(UserError, match=r"are unknown: .* geometry=Geometry"):
        statistics.compute()
    statistics.update(layer_of(1, weights[1]))
    assert list(statistics.left_out) == ["blocks.0.attn"] and statistics.layer_names == ["blocks.1.attn"]
    expected = feed(AttentionStatistics(), [weights[1]]).compute()
    assert_same(statistics.compute(), expected)


def test_images_of_another_size_are_left_out_and_named() -> None:
    weights = random_weights()
    statistics = feed(AttentionStatistics(), weights)
    before = statistics.compute()
    feed(statistics, random_weights(geometry=OTHER_GRID), OTHER_GRID)
    assert_same(statistics.compute(), before)
    assert set(statistics.left_out) == set(statistics.layer_names)


def test_layers_of_other_grids_and_heads_stand_side_by_side() -> None:
    """What a layer lacks is NaN and without counts; the others are as if they were alone."""
    first, second = random_weights()[0], random_weights(geometry=OTHER_GRID, heads=2)[0]
    both = AttentionStatistics(REPORTED_MEASURES)
    both.update(layer_of(0, first))
    both.update(layer_of(1, second, OTHER_GRID))
    alone = AttentionStatistics(REPORTED_MEASURES)
    alone.update(layer_of(1, second, OTHER_GRID))
    for name, summary in both.compute().items():
        expected = alone.compute()[name]
        np.testing.assert_array_equal(summary.mean[1, :2], expected.mean[0])
        assert np.isnan(summary.mean[1, 2:]).all() and not summary.counts[1, 2:].any()
        assert summary.counts[1].sum() == 2 * IMAGES
        np.testing.assert_allclose(
            summary.quantiles((0.3, 0.9))[1], expected.quantiles((0.3, 0.9))[0], atol=2 * np.diff(summary.edges)[0]
        )


def test_windows_of_an_image_count_once() -> None:
    geometry = Geometry((4, 6), 0, (2, 2), window=(2, 3))
    weights = torch.rand(5 * 4, HEADS, 6, 6).softmax(dim=-1)
    statistics = AttentionStatistics(REPORTED_MEASURES)
    statistics.update(layer_of(0, weights, geometry))
    summary = statistics.compute()["entropy"]
    assert summary.n == 5
    rows = -(weights * weights.log()).sum(dim=-1).mean(dim=-1)
    np.testing.assert_allclose(summary.mean[0], rows.mean(dim=0), rtol=1e-5)


def test_measures_that_do_not_apply_are_nan() -> None:
    """A pooling query has no place, and a single head no others to differ from."""
    statistics = AttentionStatistics(REPORTED_MEASURES)
    statistics.update(layer_of(0, random_weights(heads=1)[0][:, :, :1]))
    summaries = statistics.compute()
    for name in ("distance", "divergence"):
        assert np.isnan(summaries[name].mean).all() and np.isnan(summaries[name].quantiles((0.5,))).all()
    assert not np.isnan(summaries["sink"].mean).any()


def test_another_number_of_heads_is_refused() -> None:
    statistics = feed(AttentionStatistics(), random_weights())
    with pytest.raises((RuntimeError, ValueError)):
        feed(statistics, random_weights(heads=2))


def test_statistics_of_no_images_are_refused() -> None:
    with pytest.raises((RuntimeError, ValueError)):
        AttentionStatistics().compute()


def test_no_warning_is_given(recwarn: Any) -> None:
    feed(AttentionStatistics(), random_weights()).compute()["entropy"].quantiles((0.5,))
    assert len(recwarn) == 0


def test_quantiles_of_few_images_are_exact_and_of_many_come_from_the_histogram() -> None:
    parts = [random_weights(seed=seed) for seed in range(7)]
    few = feed(feed(AttentionStatistics(), parts[0]), parts[1])
    values = np.concatenate([reference(part)["entropy"] for part in parts[:2]])
    expected = np.quantile(values[:, 0].flatten(), (0.25, 0.5))
    np.testing.assert_allclose(few.compute()["entropy"].quantiles((0.25, 0.5))[0], expected, rtol=1e-5)
    for part in parts[2:]:
        feed(few, part)
    summary = few.compute()["entropy"]
    assert summary.raw_values is None and summary.n == 7 * IMAGES
