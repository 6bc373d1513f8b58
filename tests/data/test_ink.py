"""Ink by pixel and by patch, on pictures small enough to count by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from attention_visualizer.data import ink
from attention_visualizer.data.image_sets import LabelledImageSet
from attention_visualizer.data.images import DatasetDescription
from attention_visualizer.data.ink import (
    BRIGHT,
    INKED,
    border_patches,
    in_blocks,
    in_patches,
    ink_amount,
    ink_pixels,
    inked_patches,
    patch_shares,
)

# A 2 x 3 grid of patches of 2 x 2 pixels, with a row and a column over.
DRAWN = torch.tensor(
    [
        [255, 0, 0, 0, 51, 102, 255],
        [0, 128, 0, 0, 153, 204, 255],
        [127, 127, 255, 255, 0, 0, 255],
        [127, 127, 255, 255, 0, 1, 255],
        [255, 255, 255, 255, 255, 255, 255],
    ],
    dtype=torch.uint8,
)[None, None]
GRID = (2, 3)


def picture(*inked: tuple[int, int], size: tuple[int, int] = (14, 21)) -> Tensor:
    """Black, with single white pixels."""
    drawn = torch.zeros(1, 1, *size, dtype=torch.uint8)
    for row, column in inked:
        drawn[0, 0, row, column] = 255
    return drawn


def test_ink_is_bright() -> None:
    assert BRIGHT == 128
    expected = [
        [1, 0, 0, 0, 0, 0, 1],
        [0, 1, 0, 0, 1, 1, 1],
        [0, 0, 1, 1, 0, 0, 1],
        [0, 0, 1, 1, 0, 0, 1],
        [1, 1, 1, 1, 1, 1, 1],
    ]
    assert ink_pixels(DRAWN)[0].int().tolist() == expected


def test_shares_of_each_patch_leave_out_what_is_over() -> None:
    assert patch_shares(ink_pixels(DRAWN), GRID).tolist() == [[0.5, 0.0, 0.5, 0.0, 1.0, 0.0]]


def test_amounts_are_mean_brightness() -> None:
    expected = torch.tensor([[383 / 4, 0, 510 / 4, 127, 255, 0.25]]) / 255
    torch.testing.assert_close(ink_amount(DRAWN, GRID), expected)


def test_patches_hold_ink_from_two_pixels_of_49_on() -> None:
    assert 1 / 49 < INKED <= 2 / 49
    drawn = picture((0, 0), (6, 6), (3, 7), (13, 20), (12, 19), (11, 18))
    assert inked_patches(drawn, (2, 3)).tolist() == [[True, False, False, False, False, True]]


def test_any_channel_can_hold_the_ink() -> None:
    coloured = torch.zeros(2, 3, 4, 6, dtype=torch.uint8)
    coloured[0, 2, :2, :2] = 200
    coloured[1, 0, 2:, 4:] = 200
    coloured[1, 1, 2:, 4:] = 90
    assert inked_patches(coloured, GRID).int().tolist() == [[1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]]
    assert ink_amount(coloured, GRID)[1, 5].item() == pytest.approx(200 / 255)


def test_whole_patches_are_average_pooling() -> None:
    pictures = torch.randint(0, 256, (3, 1, 15, 22), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pooled = torch.nn.functional.avg_pool2d(pictures.float() / 255, (5, 11)).flatten(1)
    torch.testing.assert_close(ink_amount(pictures, (3, 2)), pooled)


def test_a_set_of_images_is_read_in_blocks_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(0, 256, (7, 1, 4, 6), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    image_set = LabelledImageSet(DatasetDescription("digits", 28, 1, (), 0.1, 0.3, {}), images, None)
    rows = np.array([6, 0, 3, 3, 1, 2, 5])
    monkeypatch.setattr(ink, "IMAGES_AT_ONCE", 3)
    assert [(block.start, len(part)) for block, part in in_blocks(image_set, rows)] == [(0, 3), (3, 3), (6, 1)]
    for measure in (ink_amount, inked_patches):
        np.testing.assert_array_equal(in_patches(measure, image_set, rows, GRID), measure(images[rows], GRID))


def test_the_border_is_the_outermost_patches() -> None:
    expected = [[1, 1, 1, 1, 1], [1, 0, 0, 0, 1], [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]]
    assert border_patches((4, 5)).reshape(4, 5).astype(int).tolist() == expected
    assert border_patches((2, 7)).all() and border_patches((7, 1)).all()
