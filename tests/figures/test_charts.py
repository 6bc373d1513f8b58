"""Charts draw the numbers that they are given, and every word of them can be read."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import combinations
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import StepPatch
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from attention_visualizer.figures import charts

LAYERS, HEADS, BINS = 3, 5, 512
LONG_NAMES = ["Schleiereule (Tyto alba)", "ένα πολύ μακρύ όνομα", "$5 to $7"]


def quantiles() -> np.ndarray:
    return np.array([[0.1, 0.2, 0.3, 0.5, 0.9], [0.0, 0.1, 0.4, 0.45, 0.5], [0.6, 0.7, 0.8, 0.8, 0.8]])


def histogram(*values: np.ndarray, low: float = 0.0, high: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Counts [layer, bin] over edges [bin + 1]."""
    counts = np.stack([np.histogram(layer, BINS, (low, high))[0] for layer in values])
    return counts, np.linspace(low, high, BINS + 1)


def lines_of(ax: Axes, color: str) -> list[Line2D]:
    return [line for line in ax.get_lines() if to_hex(line.get_color()) == color]


def xs(line: Line2D) -> np.ndarray:
    return np.asarray(line.get_xdata())


def ys(line: Line2D) -> np.ndarray:
    return np.asarray(line.get_ydata())


def drawn_by(ax: Axes) -> FigureCanvasAgg:
    """The whole figure of `ax`, drawn."""
    assert isinstance(ax.figure, Figure)
    canvas = FigureCanvasAgg(ax.figure)
    canvas.draw()
    return canvas


class RecordingRenderer(RendererAgg):
    """Draws, and remembers each text that it drew with its box, in pixels from the lower left."""

    def __init__(self, figure: Figure) -> None:
        super().__init__(*figure.canvas.get_width_height(), figure.dpi)
        self.texts: list[tuple[str, Bbox]] = []
        figure.draw(self)

    def draw_text(
        self,
        gc: Any,
        x: float,
        y: float,
        s: str,
        prop: Any,
        angle: float,
        ismath: Any = False,
        mtext: Text | None = None,
    ) -> None:
        assert mtext is not None
        self.texts.append((mtext.get_text(), mtext.get_window_extent(self)))
        super().draw_text(gc, x, y, s, prop, angle, ismath, mtext)


def assert_readable(figure: Figure) -> None:
    """No text reaches over the figure's edge, and no two texts overlap."""
    drawn = RecordingRenderer(figure).texts
    width, height = figure.canvas.get_width_height()
    assert drawn
    for name, box in drawn:
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
        assert inside, f"{name!r} at {box} leaves the figure of {width} x {height}"
    for (name, box), (other_name, other) in combinations(drawn, 2):
        across = min(box.x1, other.x1) - max(box.x0, other.x0)
        down = min(box.y1, other.y1) - max(box.y0, other.y0)
        assert across <= 1 or down <= 1, f"{name!r} overlaps {other_name!r}"


# --- box plots ---


def test_boxes_stand_at_their_quantiles_in_the_order_of_layers() -> None:
    ax = charts.box_by_layer(quantiles(), "entropy (nats)")
    boxes = [np.asarray(patch.get_path().vertices) for patch in ax.patches]
    assert len(boxes) == LAYERS
    medians = lines_of(ax, charts.MEDIAN)
    for layer, (low, first, middle, third, high) in enumerate(quantiles()):
        assert (boxes[layer][:, 1].min(), boxes[layer][:, 1].max()) == pytest.approx((first, third))
        assert boxes[layer][:, 0].mean() == pytest.approx(layer + 1, abs=0.15)
        assert np.unique(ys(medians[layer])) == pytest.approx([middle])
        whiskers = np.concatenate(
            [ys(line) for line in lines_of(ax, charts.REFERENCE) if layer + 0.5 < np.mean(xs(line)) < layer + 1.5]
        )
        assert (whiskers.min(), whiskers.max()) == pytest.approx((low, high))
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2", "3"]
    assert "5 to 95%" in ax.get_xlabel() and ax.get_ylabel() == "entropy (nats)"


def test_a_reference_is_drawn_and_named() -> None:
    ax = charts.box_by_layer(quantiles(), "entropy", reference=2.833, reference_label="uniform")
    dashed = [line for line in ax.get_lines() if line.get_linestyle() == "--"]
    assert len(dashed) == 1 and np.unique(ys(dashed[0])) == pytest.approx([2.833])
    legend = ax.get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == ["uniform (2.83)"]
    low, high = ax.get_ylim()
    assert low < 2.833 < high
    assert charts.box_by_layer(quantiles(), "entropy").get_legend() is None


# --- distributions ---


def test_ridges_are_root_shares_on_one_scale() -> None:
    """The squared heights of each ridge add up to the same: all of a layer's images, cut ends apart."""
    random = np.random.default_rng(0)
    counts, edges = histogram(random.uniform(0, 2, 9001), random.uniform(0.5, 1.0, 701), random.normal(1, 0.1, 4001))
    ax = charts.distribution_by_layer(counts, edges, "entropy")
    filled = [patch for patch in ax.patches if isinstance(patch, StepPatch) and patch.get_fill()]
    sums, tops = [], []
    for patch in filled:
        values, bounds, baseline = patch.get_data()
        np.testing.assert_allclose(np.diff(bounds), bounds[1] - bounds[0])  # or heights would not compare
        sums.append(((values - baseline) ** 2).sum())
        tops.append((values - baseline).max())
    assert len(filled) == LAYERS and sums == pytest.approx([sums[0]] * LAYERS, rel=0.02)
    assert tops[1] / tops[0] == pytest.approx(2, rel=0.25)  # four times as narrow
    assert max(tops) < 1  # into the layer above
    assert [patch.get_data()[2] for patch in filled] == [3, 2, 1]  # the first layer on top
    assert [label.get_text() for label in ax.get_yticklabels()] == ["3", "2", "1"]


@pytest.mark.parametrize("spread", [1.9, 0.2, 0.02, 0.0005])
def test_the_red_line_is_the_median(spread: float) -> None:
    random = np.random.default_rng(0)
    layers = [0.04 + random.uniform(0, spread, 2001), 0.04 + spread * random.uniform(0, 1, 2001) ** 9]
    ax = charts.distribution_by_layer(*histogram(*layers), "entropy")
    for line, values in zip(lines_of(ax, charts.MEDIAN), layers, strict=True):
        (x,) = np.unique(xs(line))
        assert x == pytest.approx(np.median(values), abs=max(2 / BINS, spread / 60))


def test_values_that_are_all_one_still_give_a_picture() -> None:
    """An untrained model's entropy is uniform everywhere: all in the last bin."""
    counts, edges = histogram(np.full(101, 2.0), np.full(101, 2.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax = charts.distribution_by_layer(counts, edges, "entropy")
    for line in lines_of(ax, charts.MEDIAN):
        assert 2 - 2 / BINS - 1e-9 <= xs(line)[0] <= 2 + 1e-9


def test_a_few_outliers_do_not_squeeze_the_rest() -> None:
    """One value in ten thousand must not take half of the axis."""
    values = np.append(np.random.default_rng(0).normal(1.8, 0.02, 9999), 0.01)
    ax = charts.distribution_by_layer(*histogram(values), "mean attention")
    low, high = ax.get_xlim()
    assert high - low < 10 * (np.quantile(values, 0.99) - np.quantile(values, 0.01))


# --- heat maps ---


def test_a_heat_map_has_layers_down_and_heads_across() -> None:
    values = np.arange(LAYERS * HEADS).reshape(LAYERS, HEADS) / 7
    ax = charts.heat_map(values, "entropy (nats)", low=0.0, high=3.0)
    (mesh,) = ax.collections
    np.testing.assert_allclose(np.asarray(mesh.get_array(), float), values)
    assert mesh.get_clim() == (0.0, 3.0)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["1", "2", "3"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2", "3", "4", "5"]
    assert [text.get_text() for text in ax.texts] == [f"{value:.2f}" for value in values.flat]
    low, high = ax.get_ylim()
    assert low > high  # the first layer on top


def test_a_large_heat_map_has_no_numbers() -> None:
    assert not charts.heat_map(np.zeros((24, 16)), "entropy").texts


# --- over training ---


def history(times: tuple[int, ...] = (0, 1, 2, 4, 8, 12, 24)) -> tuple[np.ndarray, np.ndarray]:
    return np.array(times), np.random.default_rng(0).uniform(1, 2, (len(times), LAYERS, HEADS))


def test_each_layer_has_its_mean_and_its_heads_over_time() -> None:
    steps, values = history()
    ax = charts.lines_over_training(steps, values, "entropy")
    drawn = [line for line in ax.get_lines() if len(xs(line)) == len(steps)]
    assert len(drawn) == LAYERS * (HEADS + 1)
    thick = [line for line in drawn if line.get_linewidth() > 2]
    for layer, line in enumerate(thick):
        np.testing.assert_allclose(ys(line), values[:, layer].mean(axis=1))
        np.testing.assert_array_equal(xs(line), steps + 1)
    colors = [to_hex(line.get_color()) for line in thick]
    assert colors == [to_hex(color) for color in charts.layer_colors(LAYERS)] and len(set(colors)) == LAYERS
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["layer 1", "layer 2", "layer 3", "single heads"]


def test_probe_images_are_dotted_and_named() -> None:
    steps, values = history((12, 24, 36))
    early, early_values = history()
    ax = charts.lines_over_training(steps, values, "entropy", None, 2.0, early, early_values)
    dotted = [line for line in ax.get_lines() if line.get_linestyle() == ":"]
    for layer, line in enumerate(dotted):
        np.testing.assert_allclose(ys(line), early_values[:, layer].mean(axis=1))
    assert len(dotted) == LAYERS
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()][-2:] == ["probe images only", "uniform (2.00)"]


def test_a_layer_without_values_is_left_out_and_the_others_keep_their_colours() -> None:
    steps, values = history()
    values[:, -1] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax = charts.lines_over_training(steps, values, "distance")
    legend = ax.get_legend()
    assert legend is not None
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["layer 1", "layer 2", "single heads"]
    assert to_hex(legend.get_lines()[1].get_color()) == to_hex(charts.layer_colors(LAYERS)[1])


@pytest.mark.parametrize("last", [1, 3, 24, 2140, 100_000])
def test_steps_are_written_as_they_are(last: int) -> None:
    times = tuple(sorted({0, 1, last // 3, last}))
    steps, values = history(times)
    ax = charts.lines_over_training(steps, values, "entropy")
    drawn_by(ax)
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert labels[0] == "0" and labels[-1] == f"{last:,}" and len(set(labels)) == len(labels)
    positions = [int(label.replace(",", "")) + 1 for label in labels]
    assert list(ax.get_xticks()) == positions


# --- confusion ---


def test_a_confusion_matrix_has_true_classes_down_and_predicted_across() -> None:
    counts = np.array([[7, 2, 1], [0, 11, 0], [0, 5, 15]])
    ax = charts.confusion_matrix(counts, ["a", "b", "c"])
    written = {
        (round(text.get_position()[1] - 0.5), round(text.get_position()[0] - 0.5)): text.get_text()
        for text in ax.texts
        if text.get_text()
    }
    assert written == {(i, j): str(counts[i, j]) for i, j in np.ndindex(3, 3) if counts[i, j]}
    shares: np.ndarray = np.ma.filled(np.ma.asarray(ax.collections[0].get_array(), float), np.nan).reshape(3, 3)
    np.testing.assert_allclose(shares, [[np.nan, 20, 10], [0, np.nan, 0], [0, 25, np.nan]])
    assert ax.get_ylabel() == "true class" and ax.get_xlabel() == "predicted class"
    assert ax.get_title() == "accuracy 80.49%, n = 41"


@pytest.mark.parametrize("counts", [np.diag([3, 5, 7]), np.array([[3, 0, 0], [0, 0, 0], [1, 0, 7]])])
def test_a_perfect_matrix_and_an_empty_class_are_drawn_without_complaint(counts: np.ndarray) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax = charts.confusion_matrix(counts, ["a", "b", "c"])
        drawn_by(ax)


# --- the whole figure ---


def test_the_note_stands_on_the_face_in_red() -> None:
    figure = charts.with_watermark(charts.with_headline(Figure(), "the headline"), "random weights")
    assert figure.get_suptitle() == "the headline"
    (note,) = (text for text in figure.texts if text.get_text() == "random weights")
    assert to_hex(note.get_color()) == charts.NOTE
    assert [
        text.get_text() for text in charts.with_watermark(charts.with_headline(Figure(), "the headline"), "").texts
    ] == ["the headline"]


def boxes(layers: int) -> Axes:
    rows = np.sort(np.random.default_rng(0).uniform(0, 2.8, (layers, 5)), axis=1)
    return charts.box_by_layer(rows, "maximum attention to a patch (share)", None, 2.833, "uniform attention")


def ridges(layers: int) -> Axes:
    values = np.random.default_rng(0).normal(1, 0.1, (layers, 101))
    return charts.distribution_by_layer(*histogram(*values), "attention entropy (nats)")


def training(layers: int) -> Axes:
    random = np.random.default_rng(0)
    steps = np.array([0, 1, 2, 4, 8, 16, 32, 64, 128, 214, 428, 2140])
    ax = Figure(figsize=(12, 4.5), layout="constrained").subplots()
    values = random.uniform(0, 2.8, (len(steps), layers, 4))
    return charts.lines_over_training(steps, values, "attention entropy (nats)", ax, 2.83, steps, values)


def heat(layers: int) -> Axes:
    return charts.heat_map(np.random.default_rng(0).uniform(0, 2.8, (layers, 12)), "attention entropy (nats)")


def confusion(layers: int) -> Axes:
    names = LONG_NAMES if layers == 3 else [str(number) for number in range(layers)]
    ax = Figure(figsize=(9, 8), layout="constrained").subplots()
    return charts.confusion_matrix(np.random.default_rng(0).integers(0, 1000, (layers, layers)), names, ax)


@pytest.mark.parametrize("layers", [1, 3, 12])
@pytest.mark.parametrize("draw", [boxes, ridges, training, heat, confusion])
def test_every_text_can_be_read(draw: Callable[[int], Axes], layers: int) -> None:
    figure = draw(layers).figure
    assert isinstance(figure, Figure)
    assert_readable(figure)


def test_a_long_note_and_the_headline_stand_side_by_side() -> None:
    figure = Figure(figsize=(12, 8.5), layout="constrained")
    charts.box_by_layer(quantiles(), "entropy", figure.subplots())
    note = "random weights (untrained); data: scikit-learn digits (not MNIST)"
    assert_readable(
        charts.with_watermark(charts.with_headline(figure, "Attention over 10,000 test images, all heads"), note)
    )


@pytest.mark.parametrize("draw", [boxes, ridges, training, heat, confusion])
def test_pyplot_and_its_settings_are_left_alone(draw: Callable[[int], Axes]) -> None:
    plt.get_backend()  # which pyplot chooses when first asked
    settings, figures = matplotlib.rcParams.copy(), plt.get_fignums()
    drawn_by(draw(2))
    assert plt.get_fignums() == figures and matplotlib.rcParams == settings


def test_charts_draw_into_the_axes_that_they_are_given() -> None:
    figure = Figure()
    axes = figure.subplots(1, 2)
    assert charts.box_by_layer(quantiles(), "entropy", axes[1]) is axes[1]
    assert not axes[0].has_data() and axes[1].has_data()
    assert len(figure.axes) == 2


def test_dollars_in_names_are_dollars_and_powers_stay_powers() -> None:
    r"""$\frac$ is no formula, and would end the drawing."""
    figure = Figure(figsize=(6, 4))
    names, powers = figure.subplots(1, 2)
    names.set_yticks([0, 1], [r"$\frac$", "$5 to $7"])
    names.set_title(r"$\frac$")
    powers.set_yscale("log")
    powers.set_ylim(1e-9, 1)
    charts.without_math(figure)
    FigureCanvasAgg(figure).draw()
    assert [label.get_parse_math() for label in names.get_yticklabels()] == [False, False]
    shown = powers.get_yticklabels()
    assert len(shown) > 3 and all(label.get_parse_math() and "10^" in label.get_text() for label in shown)
