"""The film of training: probe images by layer, step after step, over the curves of entropy."""

from __future__ import annotations

import numpy as np

from attention_visualizer.analysis.evolution.figure import chosen_frames
from attention_visualizer.figures import film
from attention_visualizer.figures.attention_figures import (
    class_name,
    moment,
    probe_overlays,
    probe_titles,
    probe_unit,
    query_name,
    query_of,
)
from attention_visualizer.figures.color_scales import attention_scale
from attention_visualizer.figures.film import CHART_HEIGHT, FILM, HEIGHT, WIDTH
from attention_visualizer.figures.fonts import text_width
from attention_visualizer.figures.panels import GREY, RED, PanelFigure, PlacedImage, as_rgb, fitting_size
from attention_visualizer.figures.tile_grid import bar_width, place_bar
from attention_visualizer.measures.map_measures import uniform_entropy
from attention_visualizer.runs.history import AttentionHistory

MILLISECONDS = 600  # a frame
MAX_FRAMES = 24
MAX_LAYERS = 12  # side by side
MIN_ROWS, MAX_ROWS = 3, 5  # probe images
MAX_TITLE_WIDTH = 200  # pixels, beside a row
SMALL_TITLE = 16  # pixels, above a column
MIN_ROW, MIN_BAR = 52, 180  # pixels: for two lines beside a row, and for the colour bar's labels


def draw_frames(history: AttentionHistory, note: str = "") -> list[PanelFigure]:
    """Draw a frame for each moment: a few probe images down, the input, layers and the rollout across, and below them
    the entropy of every layer over training. note: stands in red on each."""
    probe, shown = history.probe, chosen_frames(history, MAX_FRAMES)
    first, scale = shown[0], attention_scale(probe_unit(history.probe, history.frames[0]))
    num_layers, num_images = first["maps"].shape[1], len(probe["images"])
    layers = np.unique(np.linspace(0, num_layers - 1, min(num_layers, MAX_LAYERS)).round().astype(int)).tolist()
    pictures_of = [*layers, num_layers] if "rollout" in first else layers
    num_columns = 1 + len(pictures_of)

    # Places, the same in all frames.
    names = [str(name) for name in probe["class_names"]]
    words = [f"{kind} {name}" for name in names for kind in ("true", "→")] + probe_titles(probe)
    beside = min(MAX_TITLE_WIDTH, max(text_width(word, FILM.label) for word in words))
    left = FILM.margin + beside + 14
    top = film.slide("-", "-", note).header + FILM.label + FILM.gap + film.SWATCH + FILM.gap
    room = HEIGHT - CHART_HEIGHT - top
    aspect = probe["images"].shape[1] / probe["images"].shape[2]
    across = (WIDTH - FILM.margin - bar_width(scale, FILM) - left) // num_columns - FILM.gap
    width = max(1, min(across, round((room // min(MIN_ROWS, num_images) - FILM.gap) / aspect)))
    height = max(1, round(width * aspect))
    pitch = max(height, MIN_ROW) + FILM.gap
    rows = max(1, min(num_images, MAX_ROWS, room // pitch))
    bottom = top + max(rows * pitch, MIN_BAR)
    places = [left + column * (width + FILM.gap) for column in range(num_columns)]

    in_words, in_short = ([f"{word}{layer + 1}" for layer in layers] for word in ("layer ", "L"))
    titles = ["input", *film.fitting(in_words, in_short, SMALL_TITLE, width), "rollout"][:num_columns]
    size = fitting_size(titles, FILM.label, width + FILM.gap - 2, SMALL_TITLE)

    steps = history.column("frames", "step").astype(float)
    entropy = np.nanmean(history.column("frames", "entropy"), axis=2)
    num_keys = {int(keys) for keys in np.atleast_1d(probe["num_keys"])}
    chart = film.entropy_over_training(
        steps,
        entropy,
        [int(np.flatnonzero(steps == frame["step"])[0]) for frame in shown],
        f"Entropy of each layer (nats), mean over heads and {num_images} probe images",
        uniform_entropy(num_keys.pop()) if len(num_keys) == 1 else None,
        HEIGHT - bottom,
    )
    swatches = film.layer_swatches(num_layers)
    frames = []
    for number, frame in enumerate(shown):
        figure = film.slide(
            f"During training: {query_name(query_of(probe))}",
            moment(float(frame["epoch"]), int(frame["step"])),
            note,
            "maps: mean over heads",
        )
        y = top - film.SWATCH - FILM.gap
        for x, title in zip(places, titles, strict=True):
            film.place_line(figure, title, x + width // 2, y - FILM.gap, size, width + FILM.gap - 2, anchor="ms")
        for x, layer in zip(places[1:], layers, strict=False):
            figure.images.append(PlacedImage(x, y, width, film.SWATCH, swatches[layer]))
        y = top
        for row, title in enumerate(probe_titles(probe)[:rows]):
            label, predicted = int(probe["labels"][row]), int(frame["predicted"][row])
            middle, end = y + height // 2, left - 14
            about = f"true {title}" if label >= 0 else title
            film.place_line(figure, about, end, middle - 5, FILM.label, beside, anchor="rs")
            if predicted >= 0:
                color = RED if 0 <= label != predicted else GREY
                answer = f"→ {class_name(names, predicted)}"
                film.place_line(figure, answer, end, middle + 19, FILM.label, beside, color, anchor="rs")
            overlays = probe_overlays(probe, frame, row)
            pictures = [as_rgb(probe["images"][row]), *(overlays[index] for index in pictures_of)]
            figure.images += [
                PlacedImage(x, y, width, height, picture) for x, picture in zip(places, pictures, strict=True)
            ]
            y += pitch
        place_bar(figure, scale, places[-1] + width, top, bottom - FILM.gap - top)
        film.place_chart(figure, chart.at(number))
        frames.append(figure)
    return frames
