"""The film of depth: one image, layer after layer, over the curve of entropy."""

from __future__ import annotations

from attention_visualizer.figures import film
from attention_visualizer.figures.attention_figures import ExplainedImage, query_name
from attention_visualizer.figures.film import CHART_HEIGHT, FILM, HEIGHT, WIDTH
from attention_visualizer.figures.panels import PanelFigure, PlacedImage, PlacedText, as_rgb
from attention_visualizer.figures.tile_grid import bar_width, place_bar
from attention_visualizer.measures.map_measures import uniform_entropy

MILLISECONDS = 1000  # a frame
MIN_LAYERS = 3
MAX_SIDE = 330  # pixels, of the image and of the map
LABEL = 18  # pixels, above a head
BELOW = FILM.gap + LABEL + 6  # from a head to the one below it


def draw_frames(image: ExplainedImage, described: str, note: str = "") -> list[PanelFigure]:
    """Draw a frame for each layer: the image, the map over it (mean over heads) and that of every head, and below them
    the entropy of all layers. note: stands in red on each."""
    num_layers, num_heads = image.head_maps.shape[:2]
    scale = image.scale

    # Places, the same in all frames.
    top = film.slide("-", "-", note).header + FILM.label + FILM.gap
    room = HEIGHT - CHART_HEIGHT - top - FILM.gap
    aspect = image.image.shape[0] / image.image.shape[1]
    width = max(1, min(MAX_SIDE, round(room / aspect)))
    height = max(1, round(width * aspect))
    large = [FILM.margin, FILM.margin + width + 2 * FILM.gap]
    left = large[1] + width + 4 * FILM.gap
    right = WIDTH - FILM.margin - bar_width(scale, FILM)
    small, columns = best_columns(num_heads, right - left, room + LABEL + 6, aspect)
    small_height = max(1, round(small * aspect))
    numbers = [str(head + 1) for head in range(num_heads)]
    labels = film.fitting([f"head {number}" for number in numbers], numbers, LABEL, small)
    (mean,) = film.fitting(["mean over heads"], ["mean"], FILM.label, width + FILM.gap)
    right = min(right, left + columns * (small + FILM.gap))

    chart = film.entropy_over_depth(
        image.entropy,
        "Entropy (nats): mean over heads (line), single heads (dots)",
        uniform_entropy(image.unit) if image.unit > 1 else None,
        HEIGHT - top - max(height, room) - FILM.gap,
    )
    over = image.layers_over()
    frames = []
    for layer in range(num_layers):
        figure = film.slide(f"Layer {layer + 1} of {num_layers}: {query_name(image.query)}", described, note)
        for x, title, picture in zip(large, ("input", mean), (image.input_tile().rgb, over[layer]), strict=True):
            film.place_line(figure, title, x + width // 2, top - FILM.gap, FILM.label, width + FILM.gap, anchor="ms")
            figure.images.append(PlacedImage(x, top, width, height, as_rgb(picture)))
        for head, each in enumerate(image.heads_over(layer)):
            if each is not None:
                x, y = left + head % columns * (small + FILM.gap), top + head // columns * (small_height + BELOW)
                figure.texts.append(PlacedText(x + small // 2, y - 6, labels[head], LABEL, "ms"))
                figure.images.append(PlacedImage(x, y, small, small_height, each))
        place_bar(figure, scale, right, top, max(room, height))
        film.place_chart(figure, chart.at(layer))
        frames.append(figure)
    return frames


def best_columns(count: int, width: int, height: int, aspect: float) -> tuple[int, int]:
    """Return how wide so many panels, each under its label, can be to fit, and how many stand in a row."""

    def panel(columns: int) -> int:
        rows = -(-count // columns)
        across = width // columns - FILM.gap
        down = (height + FILM.gap) // rows - BELOW
        return max(1, min(across, int(down / aspect)))

    columns = max(range(1, count + 1), key=panel)
    return panel(columns), columns
