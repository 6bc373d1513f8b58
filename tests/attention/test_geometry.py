"""Tokens are found where they lie: row-major patches after the prefix tokens."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import timm.models.vision_transformer as timm_vit
import torch
from torch import nn

from attention_visualizer.attention.geometry import Geometry, declared_layout
from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.support.errors import UserError

GEOMETRY = Geometry(grid=(3, 5), num_prefix_tokens=2, patch_size=(7, 11))


def test_token_counts() -> None:
    assert GEOMETRY.num_patches == 15
    assert GEOMETRY.num_tokens == 17


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


@pytest.mark.parametrize(("pooling", "prefix"), [("cls", 1), ("mean", 0)])
def test_the_models_geometry_is_found_also_inside_a_wrapper(pooling: str, prefix: int) -> None:
    model = VisionTransformer(img_size=15, patch_size=3, num_layers=1, pooling=pooling)  # type: ignore[arg-type]
    expected = Geometry((5, 5), prefix, (3, 3))
    assert declared_layout(model).geometry == expected
    assert declared_layout(nn.Sequential(nn.Identity(), model)).geometry == expected


def test_timms_geometry_is_found_with_registers_and_an_oblong_image() -> None:
    model = timm_vit.VisionTransformer(
        img_size=(15, 55), patch_size=(5, 11), embed_dim=8, depth=1, num_heads=2, num_classes=3, reg_tokens=4
    )
    assert declared_layout(model).geometry == Geometry((3, 5), 5, (5, 11))


def test_a_model_that_states_none_has_none() -> None:
    assert declared_layout(nn.TransformerEncoderLayer(8, 2, 16)).geometry is None


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
