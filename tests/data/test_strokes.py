"""End points, junctions, bends and edges of strokes that are drawn with known counts, and of real digits."""

from __future__ import annotations

import numpy as np
import pytest
from skimage.draw import disk, line
from skimage.morphology import skeletonize

from attention_visualizer.data.datasets import load_digits
from attention_visualizer.data.strokes import (
    Strokes,
    amount_in_patches,
    crossing_numbers,
    edges_of,
    find_strokes,
    patches_with,
    skeletons,
    turns_of,
)

Point = tuple[int, int]


def drawn(*strokes: tuple[Point, Point], width: int = 1, size: tuple[int, int] = (28, 28)) -> np.ndarray:
    """Straight strokes: bool [height, width]."""
    ink = np.zeros(size, dtype=bool)
    for start, end in strokes:
        for row, column in zip(*line(*start, *end), strict=True):
            ink[row : row + width, column : column + width] = True
    return ink


def ring(radius: float, inner: float) -> np.ndarray:
    ink = np.zeros((28, 28), dtype=bool)
    ink[disk((13.5, 13.5), radius)] = True
    ink[disk((13.5, 13.5), inner)] = False
    return ink


def counts(found: Strokes, image: int = 0) -> tuple[int, int, int]:
    return tuple(int(each[image].sum()) for each in (found.ends, found.junctions, found.bends))  # type: ignore[return-value]


DRAWINGS = {
    "line": (drawn(((5, 13), (22, 13))), (2, 0, 0)),
    "slanted line": (drawn(((4, 6), (23, 15))), (2, 0, 0)),
    "two lines": (drawn(((5, 6), (22, 6)), ((5, 20), (22, 20))), (4, 0, 0)),
    "L": (drawn(((4, 6), (22, 6)), ((22, 6), (22, 20))), (2, 0, 1)),
    "V": (drawn(((4, 4), (23, 13)), ((23, 13), (4, 22))), (2, 0, 1)),
    "Z": (drawn(((4, 5), (4, 22)), ((4, 22), (23, 5)), ((23, 5), (23, 22))), (2, 0, 2)),
    "T": (drawn(((4, 4), (4, 23)), ((4, 13), (23, 13))), (3, 1, 0)),
    "plus": (drawn(((13, 3), (13, 24)), ((3, 13), (24, 13))), (4, 1, 0)),
    "X": (drawn(((3, 3), (24, 24)), ((3, 24), (24, 3))), (4, 1, 0)),
    "H": (drawn(((3, 6), (24, 6)), ((3, 21), (24, 21)), ((13, 6), (13, 21))), (4, 2, 0)),
    "ring": (ring(11, 8), (0, 0, 0)),
    "nothing": (np.zeros((28, 28), dtype=bool), (0, 0, 0)),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_known_counts(name: str) -> None:
    ink, expected = DRAWINGS[name]
    assert counts(find_strokes(ink[None])) == expected


@pytest.mark.parametrize("name", ["line", "L", "V", "T", "plus", "H"])
def test_thick_strokes_have_the_same_points(name: str) -> None:
    from scipy.ndimage import binary_dilation

    ink, expected = DRAWINGS[name]
    assert counts(find_strokes(binary_dilation(ink, np.ones((3, 3)))[None])) == expected


def test_points_lie_where_they_were_drawn() -> None:
    ink = drawn(((4, 6), (22, 6)), ((22, 6), (22, 20)))
    found = find_strokes(ink[None])
    assert sorted(map(tuple, np.argwhere(found.ends[0]).tolist())) == [(4, 6), (22, 20)]
    ((row, column),) = np.argwhere(found.bends[0])
    assert abs(row - 22) <= 1 and abs(column - 6) <= 1
    middle = find_strokes(drawn(((13, 3), (13, 24)), ((3, 13), (24, 13)))[None])
    assert np.argwhere(middle.junctions[0]).tolist() == [[13, 13]]


def test_images_do_not_touch_each_other() -> None:
    """One call for many images gives what each of them gives alone, also where strokes end at the picture's border."""
    inks = np.stack([ink for ink, _ in DRAWINGS.values()] + [drawn(((0, 0), (27, 0)), ((27, 0), (27, 27)))])
    together = find_strokes(inks)
    for image, ink in enumerate(inks):
        alone = find_strokes(ink[None])
        for field in ("skeleton", "ends", "junctions", "bends", "edges"):
            assert np.array_equal(getattr(together, field)[image], getattr(alone, field)[0]), field
        assert np.array_equal(skeletons(inks)[image], skeletonize(ink))


def test_blocks_of_images_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    inks = np.stack([ink for ink, _ in DRAWINGS.values()])
    whole = find_strokes(inks)
    monkeypatch.setattr("attention_visualizer.data.strokes.IMAGE_BATCH", 5)
    assert np.array_equal(find_strokes(inks).bends, whole.bends)


@pytest.mark.parametrize("angle", [90, 120, 135])
def test_a_corner_turns_by_its_angle(angle: int) -> None:
    """180 less the angle between the two strokes, to what pixels can show."""
    far = np.radians(angle)
    end = round(14 - 10 * np.cos(far)), round(14 + 10 * np.sin(far))
    ink = drawn(((4, 14), (14, 14)), ((14, 14), end))
    corner = np.zeros_like(ink)
    corner[14, 14] = True
    assert turns_of(ink[None], corner[None], 6)[0, 14, 14] == pytest.approx(180 - angle, abs=12)


def test_no_straight_line_bends() -> None:
    ends = [(14 + round(12 * np.sin(turn)), 14 + round(12 * np.cos(turn))) for turn in np.linspace(0, np.pi, 37)]
    inks = np.stack([drawn((end, (28 - end[0] - 1, 28 - end[1] - 1)), size=(29, 29)) for end in ends])
    found = find_strokes(inks)
    assert found.bends.sum() == 0 and (found.ends.sum(axis=(1, 2)) == 2).all()


def test_crossing_numbers_by_hand() -> None:
    plus = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], dtype=bool)
    corner = np.array([[0, 1, 0], [0, 1, 1], [0, 0, 0]], dtype=bool)
    end = np.array([[0, 0, 0], [0, 1, 0], [0, 1, 0]], dtype=bool)
    found = crossing_numbers(np.stack([plus, corner, end]))
    assert found[:, 1, 1].tolist() == [4, 2, 1]


def test_edges_of_a_square() -> None:
    """A square of 5 pixels a side has 16 at its edge; where the picture ends there is no edge."""
    ink = np.zeros((2, 9, 7), dtype=bool)
    ink[0, 2:7, 1:6] = True
    ink[1] = True
    assert edges_of(ink).sum(axis=(1, 2)).tolist() == [16, 0]
    assert not edges_of(ink)[0, 3:6, 2:5].any()


def test_patches_by_hand() -> None:
    points = np.zeros((2, 6, 9), dtype=bool)
    points[0, 5, 0] = points[1, 0, 3] = points[1, 1, 4] = True
    assert patches_with(points, (2, 3)).tolist() == [[0, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0]]
    assert amount_in_patches(points, (2, 3))[1, 1] == pytest.approx(2 / 9)


def test_real_digits() -> None:
    """A 1 has two ends, a 0 fewer, and hardly a bend; an 8 has junctions. Averages: scans of 8 x 8 pixels are rough."""
    images, labels = load_digits()
    found = find_strokes(images >= 128)
    ends, junctions, bends = (
        np.array([each[labels == digit].sum(axis=(1, 2)).mean() for digit in range(10)])
        for each in (found.ends, found.junctions, found.bends)
    )
    assert 2 <= ends[1] < 2.7 and bends[1] < 0.2 and junctions[1] < 0.6
    assert ends[0] < 1.3 and ends[8] < 1.3 and ends[6] < 1.3
    assert junctions[8] > 1.1 and junctions[8] > 2 * max(junctions[0], junctions[1]) and junctions[4] > 1
    assert bends[8] > 1.5 and bends[0] > 1
