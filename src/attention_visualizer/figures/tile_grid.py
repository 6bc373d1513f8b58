"""Panels in rows and columns, with titles, captions and colour bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from attention_visualizer.figures.color_scales import ColorScale, Rgb
from attention_visualizer.figures.fonts import text_mask, text_width
from attention_visualizer.figures.panels import (
    GREY,
    INK,
    PAGE,
    Color,
    PanelFigure,
    PlacedImage,
    PlacedText,
    Style,
    as_rgb,
    fitting_size,
    shortened,
)


@dataclass(frozen=True, eq=False)
class Tile:
    """One panel: an image under a title, with a caption beneath."""

    rgb: Rgb  # uint8 [height, width, 1 or 3]
    title: str = ""
    caption: str = ""


CARD_WIDTH = 343  # of a picture in TensorBoard, which scales others to it
CARD = Style(8, 4, 12, 11, 10, 9, 4, CARD_WIDTH, is_card=True)
MIN_CARD_TILE = 20
MIN_BAR_HEIGHT, MAX_BAR_HEIGHT = 7 * 14, 260  # seven ticks fit


def card_tile_size(columns: int, row_titles: Sequence[str] = ()) -> int:
    """Return the size of tiles of which a card takes `columns` side by side."""
    room = CARD_WIDTH - title_width(row_titles, CARD) - CARD.margin + CARD.gap
    return max(MIN_CARD_TILE, room // columns - CARD.gap)


def title_width(row_titles: Sequence[str], style: Style) -> int:
    """Return the width of the margin and of titles beside the rows."""
    return style.margin + (max(text_width(each, style.label) for each in row_titles) + 10 if row_titles else 0)


@dataclass(frozen=True)
class TileColumns:
    """Where the columns of a grid stand, in pixels."""

    left: int
    tile_width: int
    gap: int

    def x(self, column: int) -> int:
        return self.left + column * (self.tile_width + self.gap)

    def place_texts(
        self, figure: PanelFigure, texts: Sequence[str], y: int, size: int, width: int, color: Color = INK
    ) -> None:
        """Centre a text over each column, cut where it is wider than `width`; none where it is empty."""
        for column, text in enumerate(texts):
            if text:
                middle = self.x(column) + self.tile_width // 2
                figure.texts.append(PlacedText(middle, y, shortened(text, size, width), size, "ma", color))


def tile_grid(
    tiles: list[list[Tile | None]],
    headline: str,
    subtitle: str = "",
    column_titles: list[str] | None = None,
    row_titles: list[str] | None = None,
    tile_size: int = 112,
    scale: ColorScale | None = None,
    second_scale: ColorScale | None = None,
    style: Style = PAGE,
) -> PanelFigure:
    """Lay out rows of tiles with their titles, a headline, and a colour bar for each scale."""
    existing = [tile for row in tiles for tile in row if tile is not None]
    tile_height = max(1, round(tile_size * existing[0].rgb.shape[0] / existing[0].rgb.shape[1]))
    scales = [each for each in (scale, second_scale) if each is not None]
    titles = [tile.title for tile in existing if tile.title] + (column_titles or [])
    title_size = fitting_size(titles, style.label, tile_size)
    captions = [tile.caption for tile in existing if tile.caption]
    caption_size = fitting_size(captions, style.caption, tile_size + style.gap)
    left = title_width(row_titles or (), style)
    # The pictures of a card's tag have one height, whatever their texts: a slider must not jump.
    title_height, caption_height = (style.label, style.caption) if style.is_card else (title_size, caption_size)
    columns = TileColumns(left, tile_size, style.gap)
    right = columns.x(max(len(row) for row in tiles)) - style.gap
    beside = [] if style.is_card else scales
    figure = PanelFigure(right + sum(bar_width(each) for each in beside) + style.margin, 0, style=style)

    y = place_headline(figure, headline, subtitle)
    if column_titles:
        columns.place_texts(figure, column_titles, y, title_size, tile_size)
        y += title_height + 6
    top = y
    for index, row in enumerate(tiles):
        titles, captions = (
            [getattr(tile, name) if tile is not None else "" for tile in row] for name in ("title", "caption")
        )
        if any(titles):
            columns.place_texts(figure, titles, y, title_size, tile_size)
            y += title_height + 5
        if row_titles:
            figure.texts.append(PlacedText(left - 10, y + tile_height // 2, row_titles[index], style.label, "rm"))
        for column, tile in enumerate(row):
            if tile is not None:
                figure.images.append(PlacedImage(columns.x(column), y, tile_size, tile_height, as_rgb(tile.rgb)))
        y += tile_height + style.gap // 2
        if any(captions):
            columns.place_texts(figure, captions, y, caption_size, tile_size + style.gap, GREY)
            y += caption_height + 5
        y += style.gap // 2
    bottom = y - style.gap
    if beside:
        bottom = max(bottom, top + MIN_BAR_HEIGHT)
        for each in beside:
            place_bar(figure, each, right, top, min(bottom - top, MAX_BAR_HEIGHT))
            right += bar_width(each)
    elif scale is not None:
        bottom = place_bar_below(figure, scale, style.margin, bottom + style.margin)
    figure.height = bottom + style.margin
    return figure


def place_headline(figure: PanelFigure, headline: str, subtitle: str) -> int:
    """Place the header, widening the figure where the texts need it; return the y below it."""
    style = figure.style
    lines = [(headline, style.headline, True, INK)]
    lines += [(subtitle, style.subtitle, False, GREY)] if subtitle else []
    if style.is_card:  # a card, whose width is given
        room = round(0.88 * (max(figure.width, style.min_width) - 2 * style.margin))  # bold text is wider
        fitted = [(text, fitting_size([text], size, room), bold, color) for text, size, bold, color in lines]
        lines = [(shortened(text, size, room), size, bold, color) for text, size, bold, color in fitted]
    text_needs = max(text_width(text, size, bold) for text, size, bold, _ in lines) + 2 * style.margin
    figure.width = max(figure.width, text_needs, style.min_width)
    figure.header = style.margin - 2
    for (text, size, bold, color), height in zip(lines, (style.headline, style.subtitle), strict=False):
        figure.texts.append(PlacedText(style.margin, figure.header, text, size, "la", color, bold))
        figure.header += height + style.line_spacing
    return figure.header + 4


BAR_WIDTH, BAR_GAP = 14, 18


def bar_width(scale: ColorScale, style: Style = PAGE) -> int:
    """The width that a colour bar takes beside the grid."""
    labels = max(text_width(label, style.caption) for _, label in scale.ticks)
    return BAR_GAP + style.caption + 8 + BAR_WIDTH + 6 + labels


def place_bar(figure: PanelFigure, scale: ColorScale, x: int, y: int, height: int) -> None:
    """Place a vertical colour bar with its ticks; its title stands upright beside it."""
    x += BAR_GAP
    size = figure.style.caption
    title = upright(scale.title, fitting_size([scale.title], size, height, least=7))
    figure.images.append(PlacedImage(x, y + (height - title.shape[0]) // 2, title.shape[1], title.shape[0], title))
    x += size + 8
    figure.images.append(PlacedImage(x, y, BAR_WIDTH, height, np.ascontiguousarray(scale.table[::-1, None])))
    for value, label in scale.ticks:
        share = (value - scale.low) / (scale.high - scale.low)
        figure.texts.append(PlacedText(x + BAR_WIDTH + 5, round(y + (1 - share) * (height - 1)), label, size, "lm"))


def place_bar_below(figure: PanelFigure, scale: ColorScale, x: int, y: int) -> int:
    """Place a horizontal colour bar, its title before it and its ticks under it; return the y below them."""
    size, height = figure.style.caption, 8
    figure.texts.append(PlacedText(x, y, scale.title, size, "la", GREY))
    x += text_width(scale.title, size) + 20
    width = max(60, min(200, figure.width - x - 20))
    figure.images.append(PlacedImage(x, y, width, height, np.ascontiguousarray(scale.table[None])))
    room, taken = width // max(1, len(scale.ticks) - 1), max(text_width(label, size) for _, label in scale.ticks)
    # All of them, or as many as there is room for, with both ends and the middle.
    middle = max(1, (len(scale.ticks) - 1) // 2)
    enough = 1.5 * taken + 4  # the outer labels stand inwards
    every = next((step for step in range(1, middle) if middle % step == 0 and step * room > enough), middle)
    for value, label in scale.ticks[::every]:
        share = (value - scale.low) / (scale.high - scale.low)
        anchor = {0.0: "la", 1.0: "ra"}.get(share, "ma")  # the outermost end where the bar does
        figure.texts.append(PlacedText(round(x + share * (width - 1)), y + height + 3, label, size, anchor, GREY))
    return y + height + 3 + size


@cache
def upright(text: str, size: int) -> Rgb:
    """Draw text that reads from bottom to top, as an image: the titles of colour bars are the only ones."""
    image = Image.new("RGB", (text_width(text, size), size + 5), "white")
    left, top, mask = text_mask(text, size, False, "la")
    image.paste(INK, (left, top), mask)
    return np.asarray(image.transpose(Image.Transpose.ROTATE_90))
