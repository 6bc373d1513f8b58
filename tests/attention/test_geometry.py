"""Tokens are found where they lie: row-major patches after the prefix tokens."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import timm.models.vision_transformer as timm_vit
import torch
from torch import nn

from attention_visualizer.attention.geometry import DeclaredLayout, Geometry, declared_layout
from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.support.errors import UserError

GEOMETRY = Geometry(grid=(3, 5), num_prefix_tokens=2, patch_size=(7, 11))


def test_token_counts() -> None:
    assert GEOMETRY.num_patches == 15
    assert GEOMETRY.num_tokens == 17


def test_it_is_said_in_words() -> None:
    assert str(GEOMETRY) == "3 x 5 patches of 7 x 11 pixels, and 2 prefix tokens"
    one = dataclasses.replace(GEOMETRY, num_prefix_tokens=1, window=(2, 2))
    assert str(one) == "3 x 5 patches of 7 x 11 pixels, and the class token, in windows of 2 x 2"


def test_patch_centres_are_in_pixels_row_by_row() -> None:
    centers = GEOMETRY.patch_centers()
    expected = [((row + 0.5) * 7, (column + 0.5) * 11) for row in range(3) for column in range(5)]
    np.testing.assert_allclose(centers, expected)
    assert centers[0].tolist() == [3.5, 5.5]


@pytest.mark.parametrize(("row", "column"), [(0, 0), (0, 4), (1, 3), (2, 0), (2, 4)])
def test_a_patchs_token_lands_on_its_place_in_the_map(row: int, column: int) -> None:
    tokens = torch.zeros(13, GEOMETRY.num_tokens)
    tokens[:, GEOMETRY.token_of_patch(row, column)] = 1.0
    drawn = GEOMETRY.to_map(tokens[:, GEOMETRY.num_prefix_tokens :])
    assert drawn.shape == (13, 3, 5)
    assert drawn[7].nonzero().tolist() == [[row, column]]


def test_a_patchs_token_by_hand() -> None:
    assert GEOMETRY.token_of_patch(1, 3) == 2 + 5 + 3


@pytest.mark.parametrize(("row", "column"), [(3, 0), (0, 5), (-1, 0), (0, -1), (4, 2)])
def test_a_patch_outside_the_grid_is_refused_and_the_grid_named(row: int, column: int) -> None:
    with pytest.raises(UserError, match="rows are 0 to 2, columns 0 to 4") as caught:
        GEOMETRY.token_of_patch(row, column)
    assert f"query=[{row},{column}]" in str(caught.value) and "\n" not in str(caught.value)


def test_a_map_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(RuntimeError):
        GEOMETRY.to_map(torch.zeros(2, 16))


def test_it_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GEOMETRY.grid = (5, 3)  # type: ignore[misc]


def test_a_declared_layout_is_found_also_inside_a_wrapper() -> None:
    model = VisionTransformer(img_size=15, patch_size=3, num_layers=1)
    assert declared_layout(nn.Sequential(nn.Identity(), model)) == DeclaredLayout((3, 3), (5, 5))
    oblong = timm_vit.VisionTransformer(
        img_size=(15, 55), patch_size=(5, 11), embed_dim=8, depth=1, num_heads=2, num_classes=3
    )
    assert declared_layout(oblong) == DeclaredLayout((5, 11), (3, 5))
    assert declared_layout(nn.TransformerEncoderLayer(8, 2, 16)) == DeclaredLayout(None, None)


# --- other orders, other extents ---


def test_tokens_in_another_order_are_put_in_the_usual_one() -> None:
    geometry = Geometry((2, 2), 2, (4, 4), order=(5, 0, 2, 3))  # keys 1 and 4 are other tokens
    assert geometry.token_of_patch(0, 0) == 5 and geometry.token_of_patch(1, 0) == 2
    assert geometry.in_usual_order(torch.arange(6)).tolist() == [1, 4, 5, 0, 2, 3]
    weights = torch.arange(36).view(1, 1, 6, 6)
    usual = geometry.in_usual_order(weights, (-2, -1))
    assert usual[0, 0, 2, 3] == weights[0, 0, 5, 0]
    assert geometry.usual == Geometry((2, 2), 2, (4, 4)) == geometry.usual.usual


@pytest.mark.parametrize(
    ("grid", "patch", "image", "drawn"),
    [
        ((2, 3), (4, 4), (8, 12), (2, 3)),
        ((2, 2), (4, 4), (6, 8), (3, 2)),  # padded inside to 8 rows: two cells of 2 x 4 pixels for a patch
        ((2, 2), (4, 4), (11, 8), (11, 2)),  # the last three rows of pixels are in no patch
        ((4, 4), (2.5, 2.5), (10, 10), (4, 4)),
        ((6, 6), (8, 8), (60, 60), (15, 15)),
        ((54, 54), (4, 4), (220, 220), (54, 54)),  # 4 of 220 pixels: nearly all
    ],
)
def test_maps_are_drawn_where_their_patches_are(
    grid: tuple[int, int], patch: tuple[float, float], image: tuple[int, int], drawn: tuple[int, int]
) -> None:
    geometry = Geometry(grid, 0, patch)
    values = torch.arange(1, 1 + grid[0] * grid[1]).view(1, *grid).float()
    assert geometry.drawn_grid(image) == drawn
    result = geometry.drawn(values, image)[0]
    assert result.shape == drawn
    for row, column in np.ndindex(*drawn):
        if drawn == grid:
            assert result[row, column] == values[0, row, column]
            continue
        middle = (row + 0.5) * image[0] / drawn[0] // patch[0], (column + 0.5) * image[1] / drawn[1] // patch[1]
        inside = middle[0] < grid[0] and middle[1] < grid[1]
        assert result[row, column] == (values[0, int(middle[0]), int(middle[1])] if inside else 0)


# --- windows ---


def windows_of(grid: torch.Tensor, window: tuple[int, int], shift: tuple[int, int]) -> torch.Tensor:
    """[image, height, width] -> [image * windows, patch], patch by patch as Swin does: rolled towards the start, cut
    row by row, and filled up with -1 where windows reach beyond the edge."""
    images, height, width = grid.shape
    found = []
    for image in range(images):
        for top in range(0, height, window[0]):
            for left in range(0, width, window[1]):
                patches = []
                for row in range(top, top + window[0]):
                    for column in range(left, left + window[1]):
                        inside = row < height and column < width
                        source = ((row + shift[0]) % height, (column + shift[1]) % width)
                        patches.append(float(grid[image][source]) if inside else -1.0)
                found.append(patches)
    return torch.tensor(found)


@pytest.mark.parametrize(
    ("grid", "window", "shift"),
    [
        ((6, 10), (3, 5), (0, 0)),
        ((6, 10), (3, 5), (1, 2)),
        ((6, 10), (2, 5), (1, 0)),
        ((4, 4), (2, 2), (1, 1)),
        ((7, 11), (3, 5), (0, 0)),  # windows reach beyond the edge
        ((2, 9), (2, 3), (0, 1)),
    ],
)
def test_every_patch_of_every_window_lands_where_it_came_from(
    grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]
) -> None:
    geometry = Geometry(grid, 0, (3, 7), window, shift)
    patches = torch.arange(3 * grid[0] * grid[1], dtype=torch.float32).view(3, *grid)
    cut = windows_of(patches, window, shift)
    assert len(cut) == 3 * geometry.windows[0] * geometry.windows[1]
    assert geometry.num_patches == geometry.num_tokens == window[0] * window[1]
    assert torch.equal(geometry.to_map(cut), patches)
    with_heads = torch.stack([cut, -cut], dim=1)
    assert torch.equal(geometry.to_map(with_heads), torch.stack([patches, -patches], dim=1))


def test_an_image_is_the_mean_of_its_windows() -> None:
    geometry = Geometry((4, 6), 0, (3, 7), (2, 3))
    values = torch.randn(3 * 4, 5, generator=torch.Generator().manual_seed(0))
    expected = [
        [float(sum(values[4 * image + part, i] for part in range(4))) / 4 for i in range(5)] for image in range(3)
    ]
    torch.testing.assert_close(geometry.per_image(values), torch.tensor(expected))
    assert GEOMETRY.per_image(values) is values


def test_a_query_in_a_window_is_refused() -> None:
    with pytest.raises(UserError, match="attends inside windows"):
        Geometry((4, 6), 0, (3, 7), (2, 3)).token_of_patch(1, 2)


def test_the_centres_of_a_window_are_counted_from_its_own_corner() -> None:
    centers = Geometry((4, 6), 0, (3, 7), (2, 3)).patch_centers()
    assert centers.tolist() == [[1.5, 3.5], [1.5, 10.5], [1.5, 17.5], [4.5, 3.5], [4.5, 10.5], [4.5, 17.5]]
