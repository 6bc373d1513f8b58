"""From measured places to a layer's geometry: what may be drawn of a pass, and what contradicts a given one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.attention.layer_geometry import GeometryFinder, LayerShape, geometry_of, is_same_place
from attention_visualizer.attention.placement import Lines, PlacedKeys, Unplaced
from attention_visualizer.attention.places import MeasuredPlaces
from attention_visualizer.attention.probe import CallPlaces

SIDE, GRID, PATCH = 24, 6, 4
USUAL = Geometry((GRID, GRID), 1, (PATCH, PATCH))


def found(order: np.ndarray, num_windows: int = 1, num_keys: int | None = None, number: int = GRID) -> CallPlaces:
    lines = Lines(number, 0.0, SIDE / number)
    return CallPlaces(PlacedKeys(lines, lines, order), num_windows, num_keys or len(order), (SIDE, SIDE))


def of_layer(measured: CallPlaces, windows: int, keys: int, images: int = 2) -> Geometry | Unplaced:
    finder = GeometryFinder(nn.Identity(), None, lambda call, policy: {})
    finder.measured = MeasuredPlaces(({"layer": measured},))
    shape = LayerShape("layer", torch.Size([windows, 1, keys, keys]), [torch.Size([images, 1, SIDE, SIDE])])
    return finder.of_layer(shape)


def test_what_was_measured_holds_for_as_many_keys_and_windows() -> None:
    whole = found(np.arange(GRID * GRID))
    assert isinstance(of_layer(whole, windows=2, keys=GRID * GRID), Geometry)
    for windows, keys in ((2, GRID * GRID - 4), (4, GRID * GRID)):
        refused = of_layer(whole, windows, keys)
        assert isinstance(refused, Unplaced) and f"it has {keys} keys for {windows} images" in refused.reason


def test_a_class_token_is_one_only_where_tokens_stand_beside_the_patches() -> None:
    without = of_layer(found(np.arange(GRID * GRID)), windows=2, keys=GRID * GRID)
    assert isinstance(without, Geometry) and without.num_prefix_tokens == 0 and without.class_token == "read"
    finder = GeometryFinder(nn.Identity(), None, lambda call, policy: {})
    finder.class_token = "absent"
    for prefix, expected in ((0, "read"), (1, "absent")):
        places = found(np.arange(GRID * GRID) + prefix, num_keys=GRID * GRID + prefix)
        finder.measured = MeasuredPlaces(({"layer": places},))
        keys = GRID * GRID + prefix
        shape = LayerShape("layer", torch.Size([2, 1, keys, keys]), [torch.Size([2, 1, SIDE, SIDE])])
        geometry = finder.of_layer(shape)
        assert isinstance(geometry, Geometry) and geometry.class_token == expected


def windowed(window: tuple[int, int], number: int = GRID) -> np.ndarray:
    """The key of each patch, row by row, where windows follow each other row by row."""
    tiles = np.arange(number * number).reshape(number // window[0], number // window[1], *window)
    return tiles.transpose(0, 2, 1, 3).reshape(-1)


def test_windows_of_neighbours_are_told() -> None:
    geometry = geometry_of(found(windowed((3, 2)), num_windows=6, num_keys=6))
    assert isinstance(geometry, Geometry) and (geometry.window, geometry.shift) == ((3, 2), (0, 0))


def test_windows_of_patches_that_are_no_neighbours_are_refused() -> None:
    """Every third row and column: each window has two rows and two columns, but what lies between is another's."""
    number = np.arange(GRID)
    of_window = (number[:, None] % 3) * 3 + number % 3
    inside = number[:, None] // 3 * 2 + number // 3
    refused = geometry_of(found((of_window * 4 + inside).ravel(), num_windows=9, num_keys=4))
    assert isinstance(refused, Unplaced) and refused.reason == "its windows of 2 x 2 patches are not neighbours"


def test_windows_whose_keys_are_not_all_patches_are_refused() -> None:
    order = windowed((3, 3)) // 9 * 10 + 1 + windowed((3, 3)) % 9  # a token before each window's patches
    refused = geometry_of(found(order, num_windows=4, num_keys=10))
    assert isinstance(refused, Unplaced) and "are no windows of (6, 6) patches" in refused.reason


def test_windows_that_do_not_make_up_the_grid_are_refused() -> None:
    """Of 4 x 4 patches each, of a grid of 6 x 6: there would be four, the last ones beyond its edge, not five."""
    row, column = np.divmod(np.arange(GRID * GRID), GRID)
    order = (row // 4 * 2 + column // 4) * 16 + row % 4 * 4 + column % 4
    assert isinstance(geometry_of(found(order, num_windows=4, num_keys=16)), Geometry)
    refused = geometry_of(found(order, num_windows=5, num_keys=16))
    assert isinstance(refused, Unplaced) and "not neighbours" in refused.reason


@pytest.mark.parametrize(
    "other",
    [
        replace(USUAL, order=tuple(range(36))),  # the class token stands at the end
        replace(USUAL, offset=(0.0, PATCH / 2)),
        replace(USUAL, patch_size=(PATCH + 0.5, PATCH)),
        replace(USUAL, num_prefix_tokens=2),
        replace(USUAL, grid=(4, 9)),
    ],
)
def test_a_given_place_that_is_another_contradicts(other: Geometry) -> None:
    assert is_same_place(USUAL, USUAL) and not is_same_place(USUAL, other) and not is_same_place(other, USUAL)


def test_less_than_a_pixel_contradicts_nothing() -> None:
    assert is_same_place(USUAL, replace(USUAL, offset=(0.5, -0.5), patch_size=(PATCH + 0.05, PATCH)))
