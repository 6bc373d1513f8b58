"""Pages of models whose layers attend over other tokens each: windows, stages, pooled keys, cells, matrices, lists."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.explorer.contents import Contents, Group, Layer, Moment, Picture
from attention_visualizer.explorer.page import render
from attention_visualizer.measures.attention_rows import RowLayout
from tests.helpers.explorer_pages import CHROMIUM, chromium, opened, wait_until

pytest.importorskip("playwright")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

IMAGE = (40, 60)
FINE, COARSE = (10.0, 10.0), (20.0, 20.0)
WINDOWS = Geometry((4, 6), 0, FINE, window=(2, 3), shift=(1, 1))
STAGE = Geometry((2, 3), 1, COARSE)
REASON = "its keys answer to no part of the picture"
STAGES = {
    "windows": (RowLayout(4, 6, 6, WINDOWS, None), 2),
    "pooled keys": (RowLayout(1, 24, 6, Geometry((2, 3), 0, COARSE), None), 1),
    "a stage": (RowLayout(1, 7, 7, STAGE, None), 3),
    "a matrix": (RowLayout(1, 5, 9, None, REASON), 2),
    "latents": (RowLayout(1, 3, 24, Geometry((4, 6), 0, FINE), None), 2),
}
#: Of a grid of 5 x 7 patches, the last cells beyond its edge.
CELLS = {
    "cells": (RowLayout(1, 36, 36, Geometry((5, 7), 1, (8.0, 60 / 7)), None, stride=2), 2),
    "windows": (RowLayout(4, 16, 16, Geometry((8, 8), 0, (5.0, 7.5), window=(4, 4)), None, stride=2), 2),
}
Weights = dict[str, Tensor]  # of the model: [window, head, query, key] of the second of two pictures


def contents_of(layers: dict[str, tuple[RowLayout, int]]) -> tuple[Contents, Weights]:
    generator, weights, rows = torch.Generator().manual_seed(0), {}, []
    for name, (layout, heads) in layers.items():
        shape = 2 * layout.num_windows, heads, layout.num_queries, layout.num_keys
        both = (3 * torch.randn(shape, generator=generator)).softmax(dim=-1)
        rows.append(layout.kept(both))
        weights[name] = both[layout.num_windows :]
    pictures = [Picture(np.full((*IMAGE, 3), 40 * number, np.uint8), f"image {number}", None) for number in range(2)]
    group = Group("samples", "Samples", pictures, [Moment("weights", None, rows, ["a", "b"], [None, 0.5])])
    of_page = [Layer(name, *each, number) for number, (name, each) in enumerate(layers.items(), 1)]
    return Contents("Explorer", [], [], of_page, IMAGE, False, [group]), weights


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def stages(browser: Any, tmp_path: Path) -> Iterator[tuple[Any, Weights]]:
    yield from page_of(browser, tmp_path, STAGES)


@pytest.fixture
def cells(browser: Any, tmp_path: Path) -> Iterator[tuple[Any, Weights]]:
    yield from page_of(browser, tmp_path, CELLS)


def page_of(browser: Any, folder: Path, layers: dict[str, tuple[RowLayout, int]]) -> Iterator[tuple[Any, Weights]]:
    contents, weights = contents_of(layers)
    (folder / "page.html").write_text(render(contents), encoding="utf-8")
    with opened(browser, folder / "page.html") as page:
        page.locator(".picture").nth(1).click()
        yield page, weights
        assert page.errors == []


def choose(page: Any, layer: int, head: int, **changes: Any) -> NDArray[np.float64] | None:
    """Show a head; return what the page shows of it, a number for each token, NaN for what is outside of a window."""
    page.evaluate("(changes) => explorer.page.show(changes)", {"layer": layer, "head": head, **changes})
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    found = page.evaluate("explorer.page.map.weights && [...explorer.page.map.weights].map((each) => each + '')")
    return None if found is None else np.array(found, float)


def hover(page: Any, down: float, across: float) -> None:
    box = page.locator("#map").bounding_box()
    page.mouse.move(box["x"] + across * box["width"], box["y"] + down * box["height"])


def assert_close(found: NDArray[np.float64] | None, expected: Any) -> None:
    assert found is not None
    expected = np.asarray(expected, float)
    np.testing.assert_allclose(found, expected, atol=float(np.nanmax(expected)) / 255 + 1e-6)


def test_a_hovered_patch_shows_its_window(stages: tuple[Any, Weights]) -> None:
    page, weights = stages
    keys = WINDOWS.to_map(torch.arange(24).view(4, 6))[0]  # the window and key of each patch
    choose(page, 0, 1)
    for row, column in ((0, 0), (1, 2), (3, 5), (2, 3)):
        hover(page, (row + 0.5) / 4, (column + 0.5) / 6)
        window, query = divmod(int(keys[row, column]), 6)
        for direction in ("row", "column"):
            found = choose(page, 0, 1, direction=direction)
            of = weights["windows"][window, 1]
            expected = np.full(24, np.nan)
            inside = (keys.flatten() // 6 == window).numpy()
            at = (keys.flatten() % 6).numpy()[inside]
            expected[inside] = (of[query] if direction == "row" else of[:, query])[at]
            assert_close(found, expected)
        choose(page, 0, 1, direction="row")
    assert "It attends inside 4 windows" in page.locator("#about-layer").inner_text()
    numbers = page.locator("#numbers").inner_text()
    assert f"nats of {np.log(6):.2f}" in numbers and "mean distance" in numbers


def test_what_lies_outside_of_a_window_is_bare(stages: tuple[Any, Weights]) -> None:
    page, _ = stages
    choose(page, 0, 0, query=1, opacity=100)  # the first patch
    pixels = page.evaluate(
        "(() => {const canvas = document.getElementById('map'), {width, height} = canvas;"
        "return [[0.45, 0.45], [0.04, 0.04]].map(([x, y]) => [...canvas.getContext('2d')"
        ".getImageData(Math.floor(x * width), Math.floor(y * height), 1, 1).data]); })()"
    )
    assert pixels[0] == [40, 40, 40, 255] and pixels[1] != [40, 40, 40, 255]


def test_a_coarser_stage_shows_the_patch_around_the_pointer(stages: tuple[Any, Weights]) -> None:
    page, weights = stages
    choose(page, 2, 2)
    hover(page, 0.9, 0.4)  # row 4, column 3 of the finest grid; row 2, column 2 of this one
    assert_close(choose(page, 2, 2), weights["a stage"][0, 2, 1 + 3 + 1])
    assert "the patch in row 2, column 2" in page.locator("#caption").inner_text()
    page.locator("#tokens button").first.click()  # the class token, which only this stage has
    assert_close(choose(page, 2, 2), weights["a stage"][0, 2, 0])
    assert choose(page, 0, 0) is None and "It has no such query." in page.locator("#about-layer").inner_text()
    assert "there is no such map" in page.locator("#numbers").inner_text()


def test_queries_that_are_no_keys_are_a_list(stages: tuple[Any, Weights]) -> None:
    page, weights = stages
    choose(page, 1, 0)
    assert page.locator("#items").is_visible()
    page.locator("#item").fill("18")
    assert_close(choose(page, 1, 0), weights["pooled keys"][0, 0, 17])
    assert page.locator("#item-name").inner_text() == "query 18 of 24"
    assert "query 18 of 24" in page.locator("#caption").inner_text()
    # What attends to a key of theirs is not shown, and not claimed to be.
    assert_close(choose(page, 1, 0, direction="column"), weights["pooled keys"][0, 0, 17])
    assert "what query 18 of 24 attends to" in page.locator("#caption").inner_text()
    choose(page, 1, 0, direction="row")
    page.locator("#map").focus()
    page.keyboard.press("ArrowUp")
    assert_close(choose(page, 1, 0), weights["pooled keys"][0, 0, 16])
    page.keyboard.press("ArrowDown")
    choose(page, 1, 0)
    before = page.evaluate("explorer.page.state.query")
    hover(page, 0.2, 0.2)
    choose(page, 1, 0)
    assert page.evaluate("explorer.page.state.query") == before
    assert_close(choose(page, 4, 1), weights["latents"][0, 1, 2])  # of three, the last
    assert page.locator("#item-name").inner_text() == "query 3 of 3"
    wait_until(page, "location.hash.includes('item=18')")
    page.reload()
    wait_until(page, "window.explorer !== undefined")
    assert_close(choose(page, 1, 0), weights["pooled keys"][0, 0, 17])
    choose(page, 0, 0)
    assert page.locator("#items").is_hidden()


def test_a_layer_without_places_is_a_matrix_and_says_why(stages: tuple[Any, Weights]) -> None:
    page, weights = stages
    choose(page, 3, 1)
    hover(page, 0.7, 0.2)  # the fourth of five rows
    assert_close(choose(page, 3, 1), weights["a matrix"][0, 1, 3])
    matrix = page.evaluate("[...explorer.page.map.values]")
    assert_close(np.array(matrix), weights["a matrix"][0, 1].flatten())
    about = page.locator("#about-layer").inner_text()
    assert REASON in about and "matrix" in about
    page.locator("#map").focus()
    page.keyboard.press("ArrowUp")
    assert_close(choose(page, 3, 1), weights["a matrix"][0, 1, 2])
    assert "largest" in page.locator("#numbers").inner_text() and "key " in page.locator("#numbers").inner_text()
    mean = choose(page, 3, 3)
    assert_close(mean, weights["a matrix"][0].mean(dim=0)[2])


def test_arrows_go_from_patch_to_patch_of_the_layer_that_is_shown(stages: tuple[Any, Weights]) -> None:
    page, weights = stages
    choose(page, 2, 0, query=1)  # the first patch
    page.locator("#map").focus()
    for key, token in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowRight", 2), ("ArrowDown", 5), ("ArrowLeft", 4)):
        page.keyboard.press(key)
        assert_close(choose(page, 2, 0), weights["a stage"][0, 0, 1 + token])


def test_layers_have_as_many_columns_as_heads(stages: tuple[Any, Weights]) -> None:
    page, _ = stages
    assert page.locator(".thumbnail").count() == sum(heads + 1 for _, heads in STAGES.values())
    labels = page.locator(".thumbnail").evaluate_all("(all) => all.map((each) => each.getAttribute('aria-label'))")
    assert labels[:3] == ["layer 1, mean over heads", "head 1.1", "head 1.2"] and "head 2.2" not in labels
    page.locator('.thumbnail[aria-label="head 1.2"]').focus()
    page.keyboard.press("ArrowDown")  # to the last head of a layer with one
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "head 2.1"
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "layer 2, mean over heads"
    page.evaluate("location.hash = '#layer=2&head=3'")
    wait_until(page, "document.getElementById('notice').textContent.includes('head=3')")


def test_layers_of_other_tokens_have_no_difference(stages: tuple[Any, Weights]) -> None:
    page, _ = stages
    choose(page, 0, 0)
    page.locator("#keep").click()
    choose(page, 2, 0)
    assert page.locator("#comparison").is_visible() and page.locator("#difference").is_hidden()
    assert "attend to other tokens" in page.locator("#difference-caption").inner_text()
    choose(page, 0, 1)
    assert page.locator("#difference").is_visible() and "total variation" in page.locator("#distance").inner_text()


def test_whatever_is_shown_is_saved(stages: tuple[Any, Weights]) -> None:
    page, weights = stages
    for layer, lines in ((0, 6), (1, 6), (2, 7), (3, 9), (4, 24)):
        choose(page, layer, 0)
        page.locator("#copy").click()
        text = page.evaluate("navigator.clipboard.readText()")
        assert sum(not line.startswith("#") for line in text.splitlines()) == lines + 1
        drawing = page.evaluate("savedDrawing(explorer.page)")
        assert drawing.startswith("<svg") and "NaN" not in drawing and "undefined" not in drawing
        assert page.evaluate("savedPicture(explorer.page).width") == 760


def test_nothing_is_wider_than_a_phone(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(render(contents_of(STAGES)[0]), encoding="utf-8")
    with opened(browser, tmp_path / "page.html", viewport={"width": 390, "height": 844}, has_touch=True) as page:
        for layer in range(len(STAGES)):
            choose(page, layer, 0)
            assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_cells_show_their_middle_patchs_row(cells: tuple[Any, Weights]) -> None:
    page, weights = cells
    choose(page, 0, 1)
    found = choose(
        page, 0, 1, query=page.evaluate("tokenAt(0.4, 0.5, explorer.page.layout, explorer.page.header.image)")
    )
    row = weights["cells"][0, 1, 1 + 3 * 7 + 3]  # of rows 3 and 4, columns 3 and 4: the patch in the middle
    patches = np.pad(row[1:].reshape(5, 7).numpy(), ((0, 1), (0, 1)))
    expected = [float(row[0]), *patches.reshape(3, 2, 4, 2).sum(axis=(1, 3)).ravel()]
    assert_close(found, expected)
    times = page.evaluate("[...explorer.page.map.values].map((each, cell) => explorer.page.map.times(cell))")
    assert times == [36 / count for count in (4, 4, 4, 2, 4, 4, 4, 2, 2, 2, 2, 1)]
    assert "middle of the cell in row 2, column 2" in page.locator("#caption").inner_text()
    entropy = -float((row * row.log()).sum())
    assert f"{entropy:.2f} nats of {np.log(36):.2f}" in page.locator("#numbers").inner_text()


def test_in_windows_some_queries_stand_for_all(cells: tuple[Any, Weights]) -> None:
    page, weights = cells
    choose(page, 1, 0)
    hover(page, 4.5 / 8, 6.5 / 8)  # in the fourth window, its first row and third column
    found = choose(page, 1, 0)
    assert found is not None
    keys = CELLS["windows"][0].geometry.to_map(torch.arange(64).view(4, 16))[0].flatten().numpy()  # type: ignore[union-attr]
    expected = np.full(64, np.nan)
    expected[keys // 16 == 3] = weights["windows"][3, 0, 1 * 4 + 3][keys[keys // 16 == 3] % 16]
    assert_close(found, expected)
    # The page says of which patch the row is: not of the one under the pointer.
    assert "what the patch in row 6, column 8 attends to" in page.locator("#caption").inner_text()
    assert page.evaluate("boxOfQuery(explorer.page, explorer.page.map, 8, 8)") == [7, 5, 1, 1]
    column = choose(page, 1, 0, direction="column")  # of the patch itself, from those whose rows are here
    assert (
        column is not None and "what attends to the patch in row 5, column 7" in page.locator("#caption").inner_text()
    )
    own = keys.reshape(8, 8)[4, 6] % 16
    assert column[5 * 8 + 7] == pytest.approx(float(weights["windows"][3, 0, 1 * 4 + 3, own]), abs=0.01)


def test_methods_beside_the_attention_are_columns_where_they_are_known(browser: Any, tmp_path: Path) -> None:
    layout = RowLayout(1, 7, 7, STAGE, None)
    weights = (3 * torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(0))).softmax(dim=-1)
    picture = Picture(np.zeros((*IMAGE, 3), np.uint8), "image", None)
    seen, others = layout.kept(weights[:1]), layout.kept(weights[1:, :2])
    groups = [
        Group("samples", "With", [picture], [Moment("", None, [seen], [None], [None])], ("value-weighted",)),
        Group("run1", "Without", [picture], [Moment("", None, [others], [None], [None])]),
    ]
    contents = Contents("Explorer", [], [], [Layer("attn", layout, 2, 1)], IMAGE, True, groups)
    (tmp_path / "page.html").write_text(render(contents), encoding="utf-8")
    with opened(browser, tmp_path / "page.html") as page:
        heads = page.locator("#heads .head").all_inner_texts()
        assert heads == ["head 1", "head 2", "mean", "rollout", "value-weighted"]
        assert_close(choose(page, 0, 2, query=5), weights[0, :2, 5].mean(dim=0))
        assert_close(choose(page, 0, 4, query=5), weights[0, 2, 5])
        caption = "layer 1, value-weighted · what contributes to the patch in row 2, column 2"
        assert caption in page.locator("#caption").inner_text()
        assert "entropy of value-weighted" in page.locator("#numbers").inner_text()
        page.locator(".picture").nth(1).click()
        assert choose(page, 0, 4) is None and "of the samples only" in page.locator("#about-layer").inner_text()
        assert_close(choose(page, 0, 1, query=3), weights[1, 1, 3])
        assert page.locator(".thumbnail").last.is_hidden() and page.locator("#heads .head").last.is_hidden()
        page.locator('.thumbnail[aria-label="rollout up to layer 1"]').focus()
        page.keyboard.press("ArrowRight")  # to nothing that is not seen
        assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "rollout up to layer 1"
        assert page.errors == []


def test_rows_of_nothing_and_long_names(browser: Any, tmp_path: Path) -> None:
    layout = RowLayout(1, 7, 7, STAGE, None)
    picture = Picture(np.zeros((*IMAGE, 3), np.uint8), "n" * 200, None)
    group = Group(
        "samples",
        "Samples",
        [picture],
        [Moment("w" * 150, None, [layout.kept(torch.zeros(1, 2, 7, 7))], [None], [None])],
    )
    contents = Contents(
        "Explorer", [("data", "d" * 200)], ["w" * 300], [Layer("attn", layout, 2, 4)], IMAGE, True, [group]
    )
    (tmp_path / "page.html").write_text(render(contents), encoding="utf-8")
    with opened(browser, tmp_path / "page.html", viewport={"width": 390, "height": 844}) as page:
        choose(page, 0, 0, query=3)
        assert "every weight is 0 here" in page.locator("#numbers").inner_text()
        assert "effective" not in page.locator("#numbers").inner_text()
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert "head 4.1" in page.locator("#caption").inner_text()  # as figures count layers
        wait_until(page, "location.hash.includes('layer=4')")
        assert "n" * 200 not in page.evaluate("savedDrawing(explorer.page)")  # cut into lines
