"""The one renderer of attention maps: arrays in, a PanelFigure out, for TensorBoard and for files alike.

A PanelFigure is a list of placed images and texts. `to_rgb` draws it with NumPy, OpenCV and Pillow, in milliseconds;
`to_figure` hands the same layout to matplotlib, for notebooks and for PDF and SVG (text stays text where
matplotlib's svg.fonttype is none).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from attention_visualizer.figures.color_scales import Rgb, attention_scale
from attention_visualizer.figures.fonts import drawable, families, text_mask, text_width
from attention_visualizer.figures.notebook_figure import NotebookFigure

Array = NDArray[Any]
Color = tuple[int, int, int]

INK, GREY, RED = (17, 17, 17), (96, 96, 96), (190, 20, 30)
LIGHTEST_INK = 0.2  # what is left of a colour under full ink


@dataclass(frozen=True)
class PlacedImage:
    x: int
    y: int
    width: int
    height: int
    rgb: Rgb
    smooth: bool = False


@dataclass(frozen=True)
class PlacedText:
    x: int
    y: int
    text: str
    size: int
    anchor: str = "la"  # Pillow's: l, m or r of the text, then a (top), m (middle) or s (baseline)
    color: Color = INK
    bold: bool = False


@dataclass(frozen=True)
class Style:
    """Distances and sizes of text, in pixels."""

    margin: int = 14
    gap: int = 6  # between tiles
    headline: int = 17
    subtitle: int = 13
    label: int = 13
    caption: int = 11
    line_spacing: int = 7
    min_width: int = 640  # usual headlines fit, so that all frames of an animation have one size
    is_card: bool = False  # for TensorBoard: texts are made to fit `min_width`, the colour bar stands below


PAGE = Style()


@dataclass
class PanelFigure:
    """Images and texts placed on a white background of `width` x `height` pixels."""

    width: int
    height: int
    images: list[PlacedImage] = field(default_factory=list)
    texts: list[PlacedText] = field(default_factory=list)
    header: int = 0  # pixels from the top to below the headline and subtitle
    style: Style = PAGE

    def with_watermark(self, text: str) -> PanelFigure:
        """Return the figure with `text` in red below its header; the figure itself where `text` is empty."""
        if not text:
            return self
        size, margin = self.style.subtitle, self.style.margin
        below = size + self.style.line_spacing
        lines = sum(placed.y < self.header for placed in self.texts)
        return PanelFigure(
            max(self.width, text_width(text, size, bold=True) + 2 * margin),
            self.height + below,
            [replace(image, y=image.y + below) for image in self.images],
            [
                *self.texts[:lines],
                PlacedText(margin, self.header, text, size, "la", RED, bold=True),
                *(replace(placed, y=placed.y + below) for placed in self.texts[lines:]),
            ],
            self.header + below,
            self.style,
        )

    def to_rgb(self) -> Rgb:
        """Draw the figure: uint8 [height, width, 3]."""
        canvas = np.full((self.height, self.width, 3), 255, np.uint8)
        for image in self.images:
            rows, columns = slice(image.y, image.y + image.height), slice(image.x, image.x + image.width)
            canvas[rows, columns] = resize(image.rgb, image.width, image.height, image.smooth)
        picture = Image.fromarray(canvas)
        for text in self.texts:
            if text.text:
                left, top, mask = text_mask(text.text, text.size, text.bold, text.anchor)
                picture.paste(text.color, (text.x + left, text.y + top), mask)
        return np.asarray(picture)

    def to_figure(self, dpi: int = 100) -> Figure:
        """Draw the figure with matplotlib, in the same size."""
        figure = NotebookFigure(figsize=(self.width / dpi, self.height / dpi), dpi=dpi, facecolor="white")
        for image in self.images:
            box = (
                image.x / self.width,
                1 - (image.y + image.height) / self.height,
                image.width / self.width,
                image.height / self.height,
            )
            axes = figure.add_axes(box)
            axes.imshow(image.rgb, aspect="auto", interpolation="bicubic" if image.smooth else "nearest")
            axes.set_axis_off()
        horizontal = {"l": "left", "m": "center", "r": "right"}
        vertical = {"a": "top", "m": "center", "s": "baseline"}
        for text in self.texts:
            figure.text(
                text.x / self.width,
                1 - text.y / self.height,
                drawable(text.text),
                fontsize=text.size * 72 / dpi,
                color=tuple(channel / 255 for channel in text.color),
                weight="bold" if text.bold else "normal",
                ha=horizontal[text.anchor[0]],
                va=vertical[text.anchor[1]],
                fontfamily=families(text.text),
                parse_math=False,
            )
        return figure


def fitting_size(texts: Sequence[str], size: int, width: int, least: int = 9) -> int:
    """Return the largest font size from `least` to `size` at which no text is wider than `width` pixels, or `least`."""
    while size > least and any(text_width(text, size) > width for text in texts):
        size -= 1
    return size


def shortened(text: str, size: int, width: int) -> str:
    """Cut `text` with an ellipsis where it would be wider than `width` pixels."""
    if text_width(text, size) <= width:
        return text
    while text and text_width(text + "…", size) > width:
        text = text[:-1]
    return text + "…"


def resize(rgb: Rgb, width: int, height: int, smooth: bool = False) -> Rgb:
    if rgb.shape[:2] == (height, width):
        return rgb
    shrinks = rgb.shape[0] > height or rgb.shape[1] > width  # a photograph in a small tile: average, or it flickers
    if not smooth and not shrinks:
        return repeated(rgb, width, height)
    interpolation = cv2.INTER_CUBIC if smooth else cv2.INTER_AREA
    return np.asarray(cv2.resize(rgb, (width, height), interpolation=interpolation), np.uint8)


def repeated(rgb: Rgb, width: int, height: int) -> Rgb:
    """Repeat each pixel of [..., height, width, channel]: the nearest one, as OpenCV's INTER_NEAREST_EXACT has it."""
    rows = (2 * np.arange(height) + 1) * rgb.shape[-3] // (2 * height)
    columns = (2 * np.arange(width) + 1) * rgb.shape[-2] // (2 * width)
    return rgb.take(columns, axis=-2).take(rows, axis=-3)  # in this order most is copied by whole rows


# --- maps over images -----------------------------------------------------------------------------------------


def overlay(image: Rgb, attention: Array, num_keys: int) -> Rgb:
    """Colour attention by patch, [..., grid height, grid width], with the image's ink drawn dark over it.

    image: uint8 [height, width, 1 or 3]. It only darkens, and only where it has strokes or edges, so that the colours
    are those of the scale everywhere else. Returns uint8 [..., height, width, 3].
    """
    height, width = image.shape[:2]
    # Repeated beforehand: NumPy is slow at widening a last axis.
    ink = np.clip(ink_transmission(image), LIGHTEST_INK, 1)[..., None].repeat(3, axis=2)
    colors = attention_scale(num_keys).to_rgb(attention)
    grids = colors.reshape(-1, *colors.shape[-3:])
    if height >= grids.shape[1] and width >= grids.shape[2]:
        sized = repeated(grids, width, height)
    else:
        sized = np.stack([resize(grid, width, height) for grid in grids])
    darkened = (sized * ink + np.float32(0.5)).astype(np.uint8)
    return darkened.reshape(*colors.shape[:-3], height, width, 3)


def ink_transmission(image: Rgb) -> NDArray[np.float32]:
    """Return the share of light that an image's ink lets through, 1 where there is none: [height, width, 1 or 3] ->
    [height, width]."""
    return _ink_transmission(image.tobytes(), image.shape)


@lru_cache(maxsize=32)  # the probe images of a training run are the same each time
def _ink_transmission(pixels: bytes, shape: tuple[int, ...]) -> NDArray[np.float32]:
    image = np.frombuffer(pixels, np.uint8).reshape(shape)
    ink = _compute_ink_transmission(image)
    ink.flags.writeable = False
    return ink


def _compute_ink_transmission(image: Rgb) -> NDArray[np.float32]:
    luminance = image.mean(axis=2, dtype=np.float32) / 255
    ground = np.median(np.concatenate([luminance[0], luminance[-1], luminance[:, 0], luminance[:, -1]]))
    if (image == image[..., :1]).all() and not 0.25 < ground < 0.75:  # grey on a plain ground: a drawing
        ink = luminance if ground <= 0.25 else 1 - luminance
        return 1 - (1 - LIGHTEST_INK) * ink
    # A photograph becomes a pencil drawing: dark where it is darker than its surroundings.
    surroundings = cv2.GaussianBlur(luminance, (0, 0), max(luminance.shape) / 28)
    return 0.3 + 0.7 * (luminance + 0.05) / (surroundings + 0.05)


def mark_patch(image: Rgb, grid: tuple[int, int], row: int, column: int) -> Rgb:
    """Return a copy, enlarged by a whole factor, with a box around one patch of the grid (rows, columns)."""
    factor = -(-224 // max(image.shape[:2]))
    marked = np.ascontiguousarray(as_rgb(image).repeat(factor, axis=0).repeat(factor, axis=1))
    top, bottom = (round(edge * marked.shape[0] / grid[0]) for edge in (row, row + 1))
    left, right = (round(edge * marked.shape[1] / grid[1]) for edge in (column, column + 1))
    # Two lines, so that the box shows on any colour.
    cv2.rectangle(marked, (left, top), (right - 1, bottom - 1), (0, 0, 0), 8)
    cv2.rectangle(marked, (left, top), (right - 1, bottom - 1), (255, 221, 0), 4)
    return marked


def as_rgb(image: Rgb) -> Rgb:
    image = image[..., None] if image.ndim == 2 else image
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image


def encode_png(rgb: Rgb) -> bytes:
    """Encode [height, width, 3] without loss. Plain surfaces and text need no filter: without one they are as small,
    and take half the time."""
    options = [cv2.IMWRITE_PNG_COMPRESSION, 3, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE]
    succeeded, encoded = cv2.imencode(".png", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), options)
    if not succeeded:
        raise ValueError("OpenCV cannot write PNG")
    return encoded.tobytes()
