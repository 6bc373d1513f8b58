"""From what keys answer to, to a grid of patches: each rule by itself, on keys that random models seldom have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from attention_visualizer.attention.placement import Lines, PlacedKeys, Unplaced, place
from attention_visualizer.attention.places import without_selections
from attention_visualizer.attention.probe import CallPlaces
from attention_visualizer.attention.receptive_fields import ReceptiveFields, local_part

Extent = tuple[int, int]  # the first pixel that a key answers to, and the one behind the last


def answers(extents: Sequence[Extent], size: int) -> NDArray[Any]:
    """Answers to pixels, the same to all that a key sees: [pixel, key]."""
    pixels = np.arange(size)[:, None]
    first, last = np.array(extents).T
    return ((pixels >= first) & (pixels < last)).astype(float)


def fields(rows: NDArray[Any], columns: NDArray[Any]) -> ReceptiveFields:
    return ReceptiveFields(rows, columns, tuple(range(len(rows) + 1)), tuple(range(len(columns) + 1)))


def one_row(columns: NDArray[Any]) -> ReceptiveFields:
    """Keys that see all of four rows."""
    return fields(np.ones((4, columns.shape[1])), columns)


def strided(step: int, width: int, number: int, start: int, size: int) -> list[Extent]:
    """The extents of a convolution's patches, cut off at the edges of the image."""
    firsts = [start + step * each for each in range(number)]
    return [(max(first, 0), min(first + width, size)) for first in firsts]


def bell(centres: Sequence[float], size: int, width: float) -> NDArray[Any]:
    """Answers that grow less with the distance from a key's patch, and end nowhere."""
    return np.exp(-((np.arange(size)[:, None] + 0.5 - np.array(centres)) ** 2) / (2 * width**2))


@pytest.mark.parametrize(
    ("extents", "size", "lines"),
    [
        pytest.param(strided(4, 4, 3, 0, 12), 12, Lines(3, 0.0, 4.0), id="patch beside patch"),
        pytest.param(strided(4, 4, 3, -2, 8), 8, Lines(3, -2.0, 4.0), id="first and last cut off"),
        pytest.param(strided(4, 4, 2, 0, 6), 6, Lines(2, 0.0, 4.0), id="the last of two cut off"),
        pytest.param(strided(4, 3, 4, 0, 16), 16, Lines(4, 0.0, 4.0), id="a pixel between them unseen"),
        pytest.param(strided(4, 8, 6, 0, 28), 28, Lines(6, 2.0, 4.0), id="half of each over the next"),
        pytest.param(strided(4, 8, 4, 0, 20), 20, Lines(4, 2.0, 4.0), id="four, half of each over the next"),
        pytest.param(strided(4, 8, 6, -3, 24), 24, Lines(6, 0.0, 4.0), id="padded by one pixel less"),
        pytest.param(strided(4, 16, 6, -6, 24), 24, Lines(6, 0.0, 4.0), id="most of them cut off"),
    ],
)
def test_lines_of_a_convolution_are_where_its_patches_are(extents: list[Extent], size: int, lines: Lines) -> None:
    found = place(one_row(answers(extents, size)))
    assert isinstance(found, PlacedKeys)
    assert (found.rows, found.columns) == (Lines(1, 0.0, 4.0), lines)
    assert found.order.tolist() == list(range(len(extents)))


def test_patches_that_see_the_whole_picture_are_told_apart_by_what_they_see_most_of() -> None:
    found = place(one_row(bell([2, 6, 10, 14], 16, 6.0)))
    assert isinstance(found, PlacedKeys)
    assert found.columns == Lines(4, 0.0, 4.0) and found.order.tolist() == [0, 1, 2, 3]


def test_all_patches_are_found_where_most_see_the_whole_picture() -> None:
    columns = bell([2, 6, 10, 14], 16, 6.0)
    columns[15, 0] = 0.0
    found = place(one_row(columns))
    assert isinstance(found, PlacedKeys)
    assert found.columns == Lines(4, 0.0, 4.0) and found.order.tolist() == [0, 1, 2, 3]


def test_it_does_not_matter_which_pixels_of_its_patch_a_key_answers_to_most() -> None:
    extents = [(0, 8), (0, 8), (8, 16), (8, 16)]
    rows = answers(extents, 16)
    rows[[0, 7, 8, 15], [0, 1, 2, 3]] = 10.0
    found = place(fields(rows, answers([(0, 8), (8, 16)] * 2, 16)))
    assert isinstance(found, PlacedKeys)
    assert (found.rows, found.columns, found.order.tolist()) == (Lines(2, 0.0, 8.0), Lines(2, 0.0, 8.0), [0, 1, 2, 3])


def test_keys_in_one_line_are_not_divided_into_two() -> None:
    found = place(fields(answers([(0, 3), (1, 4)] * 2, 4), answers([(0, 5)] * 2 + [(3, 8)] * 2, 8)))
    assert isinstance(found, PlacedKeys)
    assert (found.rows.number, found.columns.number, found.order.tolist()) == (2, 2, [0, 2, 1, 3])


def test_tokens_of_the_whole_picture_are_no_patches() -> None:
    patches = strided(4, 4, 4, 0, 16)
    found = place(one_row(answers([(0, 16), *patches], 16)))
    assert isinstance(found, PlacedKeys)
    assert found.columns == Lines(4, 0.0, 4.0) and found.order.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param(fields(answers([(0, 4), (4, 8), (0, 4)], 8), answers(strided(4, 4, 3, 0, 12), 12)), id="zigzag"),
        pytest.param(
            fields(answers([(0, 4)] * 2 + [(4, 8)] * 2, 8), answers([(0, 4)] * 2 + [(4, 8)] * 2, 8)),
            id="two at a place",
        ),
        pytest.param(one_row(answers([(0, 2), (4, 6), (6, 7)], 7)), id="one left out before the edge"),
        pytest.param(one_row(answers([(0, 4), (4, 8), (8, 14), (14, 18)], 18)), id="one of other size"),
        pytest.param(one_row(answers([(0, 6), (6, 10), (10, 14)], 14)), id="the first of other size"),
        pytest.param(one_row(answers([(0, 4), (4, 8), (8, 12), (16, 20)], 20)), id="one left out"),
        pytest.param(
            one_row(answers([each for each in strided(4, 8, 8, 0, 36) if each[0] != 12], 36)),
            id="one left out of those that overlap",
        ),
        pytest.param(one_row(bell([3, 5, 6, 7], 16, 6.0)), id="all in one half"),
        pytest.param(
            one_row(answers([(0, 16), (1, 19), (0, 24), (6, 30), (11, 29), (14, 30)], 30)), id="one step too wide"
        ),
        pytest.param(
            one_row(answers([(0, 10), (0, 18), (2, 24), (5, 23), (9, 27), (17, 27)], 27)), id="one step too narrow"
        ),
        pytest.param(
            fields(bell([3] * 4, 16, 6.0), answers(strided(4, 4, 4, 0, 16), 16)), id="a row that sees its side most"
        ),
        pytest.param(
            one_row(answers([(0, 5), (0, 12), (7, 12)], 12)), id="one that may be a mean, or a patch in the middle"
        ),
    ],
)
def test_keys_that_are_no_grid_have_no_place(keys: ReceptiveFields) -> None:
    found = place(keys)
    assert isinstance(found, Unplaced) and "are no grid of patches, or several" in found.reason


def test_few_keys_are_no_grid_where_all_answer_to_everything() -> None:
    keys = one_row(answers(strided(4, 4, 8, 0, 32), 32))
    assert isinstance(place(keys), PlacedKeys)
    found = place(replace(keys, has_background=True))
    assert found == Unplaced("its keys answer to no part of the picture")


def test_keys_whose_number_depends_on_the_picture_have_no_place() -> None:
    keys = replace(one_row(answers(strided(4, 4, 4, 0, 16), 16)), depends_on_picture=True)
    found = place(keys)
    assert isinstance(found, Unplaced) and "the number of its keys depends on the picture" in found.reason


def test_what_a_key_gives_to_every_group_is_left_out_where_groups_are_many() -> None:
    many, few = np.array([[1.0], [0.2], [0.2], [0.2]]), np.array([[1.0], [0.2], [0.2]])
    assert np.allclose(local_part(many), [[0.8], [0.0], [0.0], [0.0]])
    assert np.array_equal(local_part(few), few)  # a patch may answer to three groups, and there are no more
    assert np.array_equal(local_part(many + 1), many + 1)  # nor is there anything but background


# --- tokens that were selected -----------------------------------------------------------------------------------


def of_columns(number: int, start: float, step: float) -> CallPlaces:
    rows, columns = Lines(4, 0.0, 8.0), Lines(number, start, step)
    return CallPlaces(PlacedKeys(rows, columns, np.arange(4 * number)), 1, 4 * number, (32, 32))


@pytest.mark.parametrize(
    ("later", "words"),
    [
        pytest.param(of_columns(4, 0, 8), "", id="all of them"),
        pytest.param(of_columns(2, 0, 16), "", id="pooled by twos"),
        pytest.param(of_columns(4, 1, 8), "", id="moved by less than a quarter of a patch"),
        pytest.param(of_columns(3, 8, 8), "a part only", id="the first is left out"),
        pytest.param(of_columns(3, 0, 8), "a part only", id="the last is left out"),
        pytest.param(of_columns(3, 0, 32 / 3), "no whole numbers", id="no whole numbers of patches"),
    ],
)
def test_keys_that_leave_out_patches_of_an_earlier_layer_were_selected(later: CallPlaces, words: str) -> None:
    checked = without_selections({"first": of_columns(4, 0, 8), "later": later})
    assert isinstance(checked["first"], CallPlaces)
    result = checked["later"]
    assert (words in result.reason) if isinstance(result, Unplaced) else not words
