"""What is kept of a layer's attention: which rows, of which keys, and that they are the model's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from attention_visualizer.attention.capture import AttentionLayer
from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.measures.attention_rows import (
    RowCollector,
    RowLayout,
    of_all_images,
    of_one_layout,
)
from attention_visualizer.measures.map_measures import attention_entropy

GRID = Geometry((5, 7), 2, (4.0, 6.0))  # and two prefix tokens
WINDOWS = Geometry((4, 6), 0, (4.0, 4.0), window=(2, 3), shift=(1, 1))


def random_weights(*shape: int) -> Tensor:
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).softmax(dim=-1)


def layer_of(weights: Tensor, geometry: Geometry | None, name: str = "attn") -> AttentionLayer:
    values = torch.zeros(*weights.shape[:2], weights.shape[-1], 1)
    return AttentionLayer(name, 0, weights, values, geometry, 0.0, unplaced=None if geometry else "it is text")


def test_all_rows_are_kept_of_a_small_layer() -> None:
    weights = random_weights(3, 2, 37, 37)
    layout = RowLayout.of(layer_of(weights, GRID), 3, 1)
    rows = layout.kept(weights)
    assert layout.are_queries_patches and layout.kept_geometry == GRID and layout.keys_in_each is None
    assert np.abs(rows.weights() - weights.numpy()).max() <= float(weights.max()) / 255
    assert layout.nbytes(2) == rows.nbytes // 3


def test_a_cell_is_its_middle_patch_as_a_query_and_the_sum_of_its_patches_as_a_key() -> None:
    weights = random_weights(1, 2, 37, 37)
    layout = RowLayout.of(layer_of(weights, GRID), 1, 3)
    rows = layout.kept(weights)
    assert layout.cells == (2, 3) and layout.kept_geometry == Geometry((2, 3), 2, (12.0, 18.0))
    assert layout.keys_in_each is not None
    assert layout.keys_in_each.tolist() == [1, 1, 9, 9, 3, 6, 6, 2] and layout.keys_in_each.sum() == 37
    middles = [2 + row * 7 + column for row in (1, 4) for column in (1, 4, 6)]
    assert layout.kept_queries.tolist() == [0, 1, *middles]
    found = rows.weights()[0, 1]
    assert found.shape == (8, 8) and layout.nbytes(2) == rows.nbytes
    row = weights[0, 1, middles[4]]
    patches = row[2:].reshape(5, 7)
    expected = [row[0], row[1], *(patches[i : i + 3, j : j + 3].sum() for i in (0, 3) for j in (0, 3, 6))]
    np.testing.assert_allclose(found[2 + 4], expected, atol=float(max(expected)) / 255)
    # Entropies are those of the model's own rows.
    np.testing.assert_allclose(rows.entropy[0, 1, 6], attention_entropy(row), rtol=1e-3)


@pytest.mark.parametrize("stride", [1, 2])
def test_rows_of_windows_follow_each_other(stride: int) -> None:
    weights = random_weights(2 * 4, 2, 6, 6)  # two images
    layout = RowLayout.of(layer_of(weights, WINDOWS), 2, stride)
    rows = layout.kept(weights)
    queries = layout.kept_queries.tolist()
    assert layout.num_windows == 4 and queries == ([0, 1, 2, 3, 4, 5] if stride == 1 else [4, 5])
    expected = weights.view(2, 4, 2, 6, 6)[1, 2, 0][queries]
    np.testing.assert_allclose(
        rows.weights()[1, 0, 2 * len(queries) :][: len(queries)], expected, atol=float(expected.max()) / 255
    )
    assert (layout.row_of_key is None) == (stride == 1)
    if layout.row_of_key is not None:
        assert layout.row_of_key.tolist() == [0, 0, 1, 0, 0, 1]
    # The keys of patches: what is at a key lands on its patch.
    keys = torch.arange(24.0).view(4, 6)
    assert layout.key_of_patch is not None
    assert np.array_equal(layout.key_of_patch, WINDOWS.to_map(keys)[0].flatten().numpy())


@pytest.mark.parametrize("geometry", [None, Geometry((3, 3), 0, (8.0, 8.0))])
def test_some_queries_are_kept_where_they_are_no_patches(geometry: Geometry | None) -> None:
    weights = random_weights(1, 1, 20, 9)
    layout = RowLayout.of(layer_of(weights, geometry), 1, 2)
    assert not layout.are_queries_patches and layout.kept_queries.tolist() == [0, 4, 8, 12, 16]
    found = layout.kept(weights).weights()[0, 0]
    np.testing.assert_allclose(found, weights[0, 0, ::4], atol=float(weights.max()) / 255)


def test_what_is_too_much_is_not_kept_but_known() -> None:
    weights = random_weights(2, 2, 37, 37)
    of_layer = 2 * 2 * 37 * (37 + 4)
    for max_bytes, number in ((2 * of_layer, 2), (2 * of_layer - 1, None)):
        collector = RowCollector(max_bytes)
        for name in ("first", "second"):
            collector.add(layer_of(weights, GRID, name), 2)
        assert (None if collector.layers is None else len(collector.layers)) == number
        assert [layout.num_keys for _, layout, _ in collector.layouts] == [37, 37]


def test_weights_that_are_no_shares_are_passed_over() -> None:
    """Those of heads that are mixed (CaiT) can be below 0, and 8 bits of a row's maximum tell nothing of them."""
    collector = RowCollector(2**20)
    collector.add(layer_of(random_weights(2, 2, 37, 37) - 0.01, GRID, "mixed"), 2)
    collector.add(layer_of(random_weights(3, 2, 37, 37), GRID, "not each image's own"), 2)
    collector.add(layer_of(random_weights(2, 2, 37, 37), GRID, "usual"), 2)
    assert collector.layers is not None and [each.name for each in collector.layers] == ["usual"]


def test_layers_of_the_same_tokens_are_put_together() -> None:
    weights = random_weights(2, 2, 37, 37)
    collector = RowCollector(2**20)
    collector.add(layer_of(weights, GRID), 2)
    collector.add(layer_of(weights.flip(0), GRID), 2)
    together = of_one_layout(collector.layers)
    assert together is not None and together.codes.shape == (2, 2, 2, 37, 37)  # image, layer, head
    assert np.array_equal(together.codes[0, 0], together.codes[1, 1])
    assert collector.layers is not None
    twice = of_all_images([collector.layers, collector.layers])
    assert twice[1].rows.codes.shape == (4, 2, 37, 37)
    collector.add(layer_of(random_weights(2, 2, 37, 20), None), 2)
    assert of_one_layout(collector.layers) is None
    windows = RowCollector(2**20)
    windows.add(layer_of(random_weights(8, 2, 6, 6), WINDOWS), 2)
    assert of_one_layout(windows.layers) is None and of_one_layout([]) is None and of_one_layout(None) is None
