"""Where figures go, and what stands on each of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
from matplotlib.figure import Figure

from attention_visualizer.figures import charts
from attention_visualizer.figures.panels import PanelFigure, encode_png
from attention_visualizer.files.atomic import atomic_path
from attention_visualizer.files.films import FilmFormat, write_film

log = logging.getLogger(__name__)

FileFormat = Literal["png", "pdf", "svg"]
FIRST_HELD, LAST_HELD = 3, 5  # times as long as another frame of a film


@dataclass(frozen=True)
class Output:
    folder: Path
    file_format: FileFormat = "png"
    watermark: str = ""  # what the reader must know of the data or the weights, in red on every figure
    film_format: FilmFormat = "webp"

    def save(self, figure: PanelFigure | Figure, stem: str) -> str:
        """Write a figure with its watermark, whole or not at all; return its file name."""
        path = self.folder / f"{stem}.{self.file_format}"
        with atomic_path(path) as temporary:
            if isinstance(figure, PanelFigure) and self.file_format == "png":
                temporary.write_bytes(encode_png(figure.with_watermark(self.watermark).to_rgb()))
            else:
                is_chart = isinstance(figure, Figure)
                with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text
                    chart = self.as_matplotlib(figure)
                    charts.without_math(chart)
                    chart.savefig(temporary, dpi=150 if is_chart else "figure")
        log.debug("wrote %s", path.name)
        return path.name

    def save_film(self, frames: Sequence[PanelFigure], stem: str, milliseconds: int) -> str:
        """Write frames, which have the watermark on them, as a film that rests on the first and the last; return its
        file name. milliseconds: how long each of the others stays."""
        path = self.folder / f"{stem}.{self.film_format}"
        durations = [milliseconds] * len(frames)
        durations[0] *= FIRST_HELD
        durations[-1] = LAST_HELD * milliseconds
        write_film(path, self.film_format, (frame.to_rgb() for frame in frames), durations)
        log.debug("wrote %s", path.name)
        return path.name

    def as_matplotlib(self, figure: PanelFigure | Figure) -> Figure:
        """The figure with its watermark, as matplotlib's."""
        if isinstance(figure, PanelFigure):
            return figure.with_watermark(self.watermark).to_figure()
        return charts.with_fonts(charts.with_watermark(figure, self.watermark))
