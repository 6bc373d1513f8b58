"""Where the parts of a PanelFigure lie."""

from __future__ import annotations

from itertools import combinations

from attention_visualizer.figures import fonts
from attention_visualizer.figures.panels import PanelFigure


def boxes(figure: PanelFigure) -> list[tuple[str, float, float, float, float]]:
    """Name, left, top, right, bottom of all images and texts."""
    placed: list[tuple[str, float, float, float, float]] = []
    for number, image in enumerate(figure.images):
        placed.append((f"image {number}", image.x, image.y, image.x + image.width, image.y + image.height))
    for text in figure.texts:
        left, top, mask = fonts.text_mask(text.text, text.size, text.bold, text.anchor)
        left, top = text.x + left, text.y + top
        placed.append((repr(text.text), left, top, left + mask.width, top + mask.height))
    return placed


def assert_tidy(figure: PanelFigure) -> None:
    """Nothing reaches over the edge, and no two things share a pixel."""
    placed = boxes(figure)
    for name, left, top, right, bottom in placed:
        assert left >= 0 and top >= 0 and right <= figure.width and bottom <= figure.height, (
            f"{name} at {left, top, right, bottom} leaves the figure of {figure.width} x {figure.height}"
        )
    for (first, *one), (second, *other) in combinations(placed, 2):
        apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        assert apart, f"{first} at {one} overlaps {second} at {other}"
