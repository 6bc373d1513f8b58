"""Whatever is drawn lies inside the figure and overlaps nothing, and both ways to draw it give the same."""

from __future__ import annotations

import io
from xml.etree import ElementTree

import cv2
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from attention_visualizer.figures import panels
from attention_visualizer.figures.color_scales import attention_scale, difference_scale, sequential_scale
from attention_visualizer.figures.panels import PanelFigure, PlacedImage, PlacedText
from attention_visualizer.figures.tile_grid import BAR_WIDTH, Tile, tile_grid
from tests.helpers.figures import assert_tidy, boxes

NUM_KEYS = 17
LONG = "Schleiereule (Tyto alba), im Flug über dem Kornfeld"
NON_ASCII = "Ωμέγα č é ß → ½×"


# --- maps over images ---


def test_each_patch_has_its_place_over_the_image() -> None:
    """2 x 5 patches of 7 x 3 pixels: nothing is transposed."""
    attention = np.arange(1, 11).reshape(2, 5) / 55
    drawn = panels.overlay(np.zeros((14, 15, 1), np.uint8), attention, 11)
    assert drawn.shape == (14, 15, 3) and drawn.dtype == np.uint8
    expected = np.repeat(np.repeat(attention_scale(11).to_rgb(attention), 7, axis=0), 3, axis=1)
    np.testing.assert_array_equal(drawn, expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_ink_is_dark_over_the_colours(channels: int) -> None:
    image = np.zeros((14, 15, channels), np.uint8)
    image[3, 4] = 255
    image[5, 6] = 100
    plain = panels.overlay(np.zeros_like(image), np.full((2, 5), 1 / 11), 11).astype(int)
    drawn = panels.overlay(image, np.full((2, 5), 1 / 11), 11).astype(int)
    assert drawn[3, 4].max() < 0.25 * plain[3, 4].min()
    assert (drawn[3, 4] < drawn[5, 6]).all() and (drawn[5, 6] < plain[5, 6]).all()
    untouched = image.max(axis=2) == 0
    np.testing.assert_array_equal(drawn[untouched], plain[untouched])


@pytest.mark.parametrize("grid", [(1, 1), (12, 12), (2, 7)])
def test_patches_stay_sharp_when_enlarged(grid: tuple[int, int]) -> None:
    small = np.random.default_rng(0).integers(0, 256, (*grid, 3), dtype=np.uint8)
    large = panels.resize(small, 5 * grid[1], 3 * grid[0])
    np.testing.assert_array_equal(large, np.repeat(np.repeat(small, 3, axis=0), 5, axis=1))
    assert not np.array_equal(panels.resize(small, 50, 30, smooth=True), panels.resize(small, 50, 30)) or grid == (1, 1)


# --- layout ---


def grid_of_tiles(rows: int, columns: int, shape: tuple[int, ...] = (11, 11, 1), words: str = "") -> PanelFigure:
    tile = np.full(shape, 90, np.uint8)
    return tile_grid(
        [[Tile(tile, words, f"H 2.83 {words}") for _ in range(columns)] for _ in range(rows)],
        f"headline {words}",
        f"subtitle {words}",
        column_titles=[f"{words} head {column + 1}" for column in range(columns)],
        row_titles=[f"{words} layer {row + 1}" for row in range(rows)],
        scale=attention_scale(NUM_KEYS),
        second_scale=difference_scale(3.0, "change from previous layer"),
    ).with_watermark(f"random weights {words}")


@pytest.mark.parametrize("words", ["", LONG, NON_ASCII], ids=["plain", "long", "not ASCII"])
@pytest.mark.parametrize("shape", [(11, 11, 1), (7, 31, 3), (31, 7, 1)], ids=["square", "wide", "tall"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 7), (5, 2), (12, 12)])
def test_nothing_overlaps_or_leaves_the_picture(rows: int, columns: int, shape: tuple[int, ...], words: str) -> None:
    picture = grid_of_tiles(rows, columns, shape, words)
    assert_tidy(picture)
    assert len(picture.images) == rows * columns + 4  # two bars and their titles


@pytest.mark.parametrize("title", ["entropy (nats)", "attention / uniform", "change from previous layer"])
def test_a_bar_beside_one_small_row_fits_too(title: str) -> None:
    scale = sequential_scale(0.0, 3.0, title)
    assert_tidy(tile_grid([[Tile(np.zeros((1, 1, 3), np.uint8), "", "1.00")]], "h", tile_size=56, scale=scale))


def test_the_bar_shows_the_colour_of_each_tick_beside_it() -> None:
    scale = attention_scale(NUM_KEYS)
    picture = tile_grid([[Tile(np.zeros((7, 7, 1), np.uint8))]], "headline", tile_size=211, scale=scale)
    rgb = picture.to_rgb()
    bar = next(image for image in picture.images if image.width == BAR_WIDTH)
    for value, label in scale.ticks:
        text = next(text for text in picture.texts if text.text == label)
        drawn = rgb[text.y, bar.x + bar.width // 2].astype(int)
        assert np.abs(drawn - scale.to_rgb(np.array([2.0**value / NUM_KEYS]))).max() <= 6, label
        assert bar.x + bar.width < text.x


def test_tiles_stand_in_rows_and_columns_and_keep_their_shape() -> None:
    tiles: list[list[Tile | None]] = [
        [Tile(np.full((6, 10, 1), 10 * row + column, np.uint8)) for column in range(3)] for row in range(2)
    ]
    tiles[1][0] = None
    picture = tile_grid(tiles, "headline", tile_size=100)
    where = {int(image.rgb[0, 0, 0]): (image.x, image.y) for image in picture.images}
    assert where.keys() == {0, 1, 2, 11, 12}
    assert where[0][1] == where[1][1] == where[2][1] < where[11][1] == where[12][1]
    assert where[0][0] < where[1][0] < where[2][0] and where[1][0] == where[11][0]
    assert {(image.width, image.height) for image in picture.images} == {(100, 60)}


def test_row_titles_stand_at_the_middle_of_their_rows() -> None:
    picture = grid_of_tiles(5, 2)
    tiles = [image for image in picture.images if image.width == 112]
    for row in range(5):
        text = next(text for text in picture.texts if text.text.strip() == f"layer {row + 1}")
        assert text.y == tiles[2 * row].y + tiles[2 * row].height // 2


def test_the_watermark_stands_out_and_is_left_out_when_there_is_none() -> None:
    tile = Tile(np.zeros((5, 5, 1), np.uint8))
    noted = tile_grid([[tile]], "headline").with_watermark("random weights")
    (note,) = (text for text in noted.texts if text.text == "random weights")
    assert note.color == panels.RED and note.bold
    assert all(text.color != panels.RED for text in tile_grid([[tile]], "headline").texts)


def test_long_titles_are_cut_with_an_ellipsis_and_short_ones_are_not() -> None:
    assert panels.shortened("layer 1", 13, 200) == "layer 1"
    cut = panels.shortened(LONG, 13, 112)
    assert cut.endswith("…") and LONG.startswith(cut[:-1]) and panels.text_width(cut, 13) <= 112
    assert panels.shortened(LONG, 13, 1) == "…"


def test_the_fitting_size_is_the_largest_that_fits() -> None:
    texts = ["layer 1", "layer 12, head 7"]
    size = panels.fitting_size(texts, 23, 100)
    assert 9 < size < 23
    assert max(panels.text_width(text, size) for text in texts) <= 100
    assert max(panels.text_width(text, size + 1) for text in texts) > 100
    assert panels.fitting_size(texts, 13, 1000) == 13
    assert panels.fitting_size([LONG], 13, 5) == 9
    assert panels.fitting_size([], 13, 5) == 13


# --- both ways to draw ---


@pytest.fixture(scope="module")
def rich_picture() -> PanelFigure:
    gradient = np.linspace(0, 255, 5 * 7 * 3).reshape(5, 7, 3).astype(np.uint8)
    return tile_grid(
        [[Tile(gradient, "layer 1", "H 1.23  self 0.04"), Tile(gradient[::-1], "layer 2", "H 2.83")]],
        "A headline",
        "true é, predicted Ω (99.9%)",
        row_titles=["overlay"],
        scale=attention_scale(NUM_KEYS),
    ).with_watermark("random weights")


def test_to_rgb_draws_images_and_texts_where_they_are_placed(rich_picture: PanelFigure) -> None:
    rgb = rich_picture.to_rgb()
    assert rgb.shape == (rich_picture.height, rich_picture.width, 3) and rgb.dtype == np.uint8
    for image in rich_picture.images:
        block = rgb[image.y : image.y + image.height, image.x : image.x + image.width]
        np.testing.assert_array_equal(block, panels.resize(image.rgb, image.width, image.height))
    blank = rgb.copy()
    for _, left, top, right, bottom in boxes(rich_picture):
        assert blank[int(top) : int(bottom) + 1, int(left) : int(right) + 1].min() < 250  # something is there
        blank[max(0, int(top) - 1) : int(bottom) + 2, max(0, int(left) - 1) : int(right) + 2] = 255
    assert blank.min() == 255


def test_the_figure_is_the_same_picture(rich_picture: PanelFigure) -> None:
    rgb = rich_picture.to_rgb()
    file = io.BytesIO()
    rich_picture.to_figure().savefig(file, format="png")
    drawn = np.asarray(Image.open(file).convert("RGB"))
    assert drawn.shape == rgb.shape
    for image in rich_picture.images:
        inside = np.s_[image.y + 2 : image.y + image.height - 2, image.x + 2 : image.x + image.width - 2]
        assert np.abs(drawn[inside].astype(int) - rgb[inside]).mean() < 4
    # Letters differ by a pixel or two, so they are compared as smudges.
    smudged, expected = (cv2.blur(pixels.astype(np.float32), (9, 9)) for pixels in (drawn, rgb))
    assert np.abs(smudged - expected).mean() < 4
    assert np.abs(np.full_like(rgb, 255) - expected).mean() > 20  # a blank page would be told apart


def test_the_figures_texts_stay_inside(rich_picture: PanelFigure) -> None:
    figure = rich_picture.to_figure()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    assert [text.get_text() for text in figure.texts] == [text.text for text in rich_picture.texts]
    for text, placed in zip(figure.texts, rich_picture.texts, strict=True):
        box = text.get_window_extent(canvas.get_renderer())
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= rich_picture.width and box.y1 <= rich_picture.height
        assert box.width == pytest.approx(panels.text_width(placed.text, placed.size, placed.bold), rel=0.08, abs=4)


@pytest.mark.parametrize("width", [53, 991, 968, 1151])
def test_figures_have_the_pictures_size_to_the_pixel(width: int) -> None:
    file = io.BytesIO()
    PanelFigure(width, 71).to_figure().savefig(file, format="png")
    assert Image.open(file).size == (width, 71)


def test_mathematics_is_not_read_into_names() -> None:
    text = "price $5 to $7_x"
    figure = PanelFigure(300, 40, texts=[PlacedText(5, 5, text, 13)]).to_figure()
    FigureCanvasAgg(figure).draw()
    assert not figure.texts[0].get_parse_math() and figure.texts[0].get_text() == text


def test_an_svg_holds_its_texts_as_text(rich_picture: PanelFigure) -> None:
    """As `panels` says of PDF and SVG: text can be searched and edited."""
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        rich_picture.to_figure().savefig(file, format="svg")
    found = "".join(ElementTree.fromstring(file.getvalue()).itertext())
    assert "A headline" in found and "random weights" in found


def test_smooth_images_are_smooth_both_ways() -> None:
    step = np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8)
    sharp, smooth = (PanelFigure(64, 8, [PlacedImage(0, 0, 64, 8, step, smooth)]) for smooth in (False, True))
    assert len(np.unique(sharp.to_rgb())) == 2 < len(np.unique(smooth.to_rgb()))
    (image,) = smooth.to_figure().axes[0].images
    assert image.get_interpolation() == "bicubic"


def test_drawing_leaves_pyplot_and_its_settings_alone(rich_picture: PanelFigure) -> None:
    plt.get_backend()  # which pyplot chooses when first asked
    settings, figures = matplotlib.rcParams.copy(), plt.get_fignums()
    rich_picture.to_rgb()
    FigureCanvasAgg(rich_picture.to_figure()).draw()
    assert plt.get_fignums() == figures and matplotlib.rcParams == settings
