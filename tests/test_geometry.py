"""Tokens are found where they lie: row-major patches after the prefix tokens."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import timm.models.vision_transformer as timm_vit
import torch
from torch import nn

from attention_visualizer.errors import UserError
from attention_visualizer.geometry import Geometry, find_geometry
from attention_visualizer.model import VisionTransformer

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
    assert find_geometry(model) == expected
    assert find_geometry(nn.Sequential(nn.Identity(), model)) == expected


def test_timms_geometry_is_found_with_registers_and_an_oblong_image() -> None:
    model = timm_vit.VisionTransformer(
        img_size=(15, 55), patch_size=(5, 11), embed_dim=8, depth=1, num_heads=2, num_classes=3, reg_tokens=4
    )
    assert find_geometry(model) == Geometry((3, 5), 5, (5, 11))


def test_a_model_that_states_none_has_none() -> None:
    assert find_geometry(nn.TransformerEncoderLayer(8, 2, 16)) is None
