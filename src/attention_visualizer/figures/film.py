"""Frames of films for slides, 1280 x 720 pixels: a header, pictures, and below them a chart that marks the moment.

What does not change from moment to moment stands at one place in all frames; scales are those of the whole film.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from attention_visualizer.figures import charts
from attention_visualizer.figures.color_scales import Rgb
from attention_visualizer.figures.fonts import text_width
from attention_visualizer.figures.panels import (
    GREY,
    INK,
    RED,
    Color,
    PanelFigure,
    PlacedImage,
    PlacedText,
    Style,
    fitting_size,
    shortened,
)

Array = NDArray[Any]

WIDTH, HEIGHT = 1280, 720  # pixels
CHART_HEIGHT = 256  # the least
FILM = Style(32, 8, 36, 28, 22, 20, 10, WIDTH)
LEAST_TEXT = 14  # pixels, where names are long
SWATCH = 6
PALE = 0.3  # of what is still to come


def slide(headline: str, subtitle: str, note: str = "", aside: str = "") -> PanelFigure:
    """Begin a frame with its header: `aside` stands at the right of the subtitle, `note` in red below it."""
    figure = PanelFigure(WIDTH, HEIGHT, style=FILM)
    y, room = FILM.margin - 12, WIDTH - 2 * FILM.margin
    place_line(figure, headline, FILM.margin, y, FILM.headline, room, bold=True)
    y += FILM.headline + FILM.line_spacing
    taken = text_width(aside, FILM.label) if aside else 0
    place_line(figure, subtitle, FILM.margin, y, FILM.subtitle, room - taken - 24, GREY)
    if aside:
        baseline = y + FILM.subtitle - FILM.label
        figure.texts.append(PlacedText(WIDTH - FILM.margin, baseline, aside, FILM.label, "ra", GREY))
    y += FILM.subtitle + FILM.line_spacing
    if note:
        place_line(figure, note, FILM.margin, y, FILM.label, room, RED, bold=True)
        y += FILM.label + FILM.line_spacing
    figure.header = y
    return figure


def place_line(
    figure: PanelFigure,
    text: str,
    x: int,
    y: int,
    size: int,
    room: int,
    color: Color = INK,
    bold: bool = False,
    anchor: str = "la",
) -> None:
    """Place a text that is no wider than `room`: smaller, and at last cut."""
    room = round(0.88 * room) if bold else room  # bold text is wider
    size = fitting_size([text], size, room, LEAST_TEXT)
    figure.texts.append(PlacedText(x, y, shortened(text, size, room), size, anchor, color, bold))


def fitting(words: Sequence[str], shorter: Sequence[str], size: int, room: int) -> Sequence[str]:
    """Return the words, or the shorter ones where one of them would be wider than `room`."""
    return words if all(text_width(word, size) <= room for word in words) else shorter


def place_chart(figure: PanelFigure, chart: Rgb) -> None:
    """Place a chart at the bottom, over the whole width."""
    figure.images.append(PlacedImage(0, HEIGHT - len(chart), chart.shape[1], len(chart), chart))


@dataclass(frozen=True)
class MarkedChart:
    """A chart, drawn once, and where its lines are at each moment."""

    rgb: Rgb
    area: tuple[int, int, int, int]  # inside the axes: left, top, right, bottom, pixels
    points: Array  # [moment, line, 2]: pixels from the left and the top, NaN where a line has no value
    dots: Sequence[tuple[Color, int]]  # of the lines: colour and radius, pixels

    @classmethod
    def of(cls, figure: Figure, ax: Axes, at: Array, values: Array, dots: Sequence[tuple[Any, int]]) -> MarkedChart:
        """Draw a figure. at: [moment], across; values: [moment, line]; dots: in matplotlib's colours."""
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        rgb = np.asarray(canvas.buffer_rgba())[..., :3].copy()
        places = np.stack(np.broadcast_arrays(at[:, None], values), axis=-1)
        points = ax.transData.transform(places.reshape(-1, 2)).reshape(places.shape)
        points[..., 1] = len(rgb) - points[..., 1]
        box = ax.get_window_extent()
        area = round(box.x0), round(len(rgb) - box.y1), round(box.x1), round(len(rgb) - box.y0)
        return cls(rgb, area, points, [(rgb_of(color), radius) for color, radius in dots])

    def at(self, moment: int) -> Rgb:
        """Draw a line and dots at a moment; what comes later is pale."""
        picture = self.rgb.copy()
        left, top, right, bottom = self.area
        x = round(self.points[moment, 0, 0])
        later = picture[top : bottom - 2, x + 1 : right]
        later[:] = 255 - (255 - later) * PALE
        cv2.line(picture, (x, top), (x, bottom - 1), INK, 2)
        for (_, y), (color, radius) in zip(self.points[moment], self.dots, strict=True):
            if np.isfinite(y):
                cv2.circle(picture, (x, round(y)), radius + 2, (255, 255, 255), -1, cv2.LINE_AA)
                cv2.circle(picture, (x, round(y)), radius, color, -1, cv2.LINE_AA)
        return picture


def rgb_of(color: Any) -> Color:
    red, green, blue = (round(255 * channel) for channel in to_rgb(color))
    return red, green, blue


def layer_swatches(num_layers: int) -> list[Rgb]:
    """One pixel in the colour of each layer's line."""
    return [np.array([[rgb_of(color)]], np.uint8) for color in charts.layer_colors(num_layers)]


def entropy_over_training(
    steps: Array, entropy: Array, moments: Sequence[int], title: str, uniform: float | None, height: int
) -> MarkedChart:
    """Draw a line for each layer, from entropy [time, layer] in nats, to be marked at `moments`: indices of time."""
    figure, ax = new_chart(height)
    colors = charts.layer_colors(entropy.shape[1])
    for layer, color in enumerate(colors):
        ax.plot(steps + 1, entropy[:, layer], color=color, linewidth=3)
    charts.step_axis(ax, int(steps[-1]))
    finish(ax, title, "training step (logarithmic)", uniform, float(np.nanmax(entropy)))
    at = np.array(moments)
    return MarkedChart.of(figure, ax, steps[at] + 1, entropy[at], [(color, 7) for color in colors])


def entropy_over_depth(entropy: Array, title: str, uniform: float | None, height: int) -> MarkedChart:
    """Draw the mean over heads as a line and each head as a dot, from entropy [layer, head] in nats."""
    figure, ax = new_chart(height)
    layers, mean = np.arange(1, len(entropy) + 1), np.nanmean(entropy, axis=1)
    for heads in entropy.T:
        ax.plot(layers, heads, "o", color=charts.REFERENCE, markersize=5, alpha=0.6)
    ax.plot(layers, mean, color="black", linewidth=3)
    ax.set_xlim(0.8, len(entropy) + 0.2)
    ax.xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
    finish(ax, title, "layer", uniform, float(np.nanmax(entropy)))
    dots = [(charts.REFERENCE, 4)] * entropy.shape[1] + [(charts.MEDIAN, 7)]
    return MarkedChart.of(figure, ax, layers, np.column_stack([entropy, mean]), dots)


def new_chart(height: int) -> tuple[Figure, Axes]:
    """An empty chart over the width of a frame, with text as large as the frame's."""
    dpi = 100
    with matplotlib.rc_context({"font.size": FILM.caption * 72 / dpi}):
        figure = Figure(figsize=(WIDTH / dpi, height / dpi), dpi=dpi, layout="constrained", facecolor="white")
        figure.get_layout_engine().set(w_pad=FILM.margin / dpi, h_pad=0.06)  # type: ignore[union-attr, call-arg]
        return figure, figure.subplots()


def finish(ax: Axes, title: str, label: str, uniform: float | None, highest: float) -> None:
    """Add words, and a dashed line for uniform attention; the axis begins at 0, or small changes would look large."""
    top = max(highest, uniform or 0.0, 0.1)
    ax.set_ylim(-0.05 * top, 1.05 * top)
    size = FILM.caption * 72 / 100
    ax.set_title(title, loc="left", fontsize=size)
    ax.set_xlabel(label, fontsize=size, labelpad=0)
    ax.tick_params(labelsize=size)
    ax.yaxis.set_major_locator(MaxNLocator(4))
    if uniform is not None:
        ax.axhline(uniform, color=charts.REFERENCE, linestyle="--", linewidth=1.5, label=f"uniform: {uniform:.2f}")
        ax.legend(loc="lower right", bbox_to_anchor=(1, 1), fontsize=size, frameon=False, borderaxespad=0)
    charts.clean(ax)
