"""The explorer in a real Chromium: what a hand does with it, and what it then shows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from attention_visualizer.explorer.page import render
from attention_visualizer.measures.map_measures import attention_entropy, attention_rollout
from tests.helpers.explorer_pages import (
    CHROMIUM,
    GRID,
    HEADS,
    HOSTILE,
    LAYERS,
    PREFIX,
    STEPS,
    TOKENS,
    chromium,
    opened,
    random_contents,
    wait_until,
)

pytest.importorskip("playwright")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("explorer") / "page.html"
    path.write_text(render(random_contents()[0]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def weights() -> list[Tensor]:
    return random_contents()[1]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Any, file: Path) -> Iterator[Any]:
    with opened(browser, file) as page:
        yield page
        assert page.errors == []
        fetched = {address for address in page.requests if not address.startswith(("data:", "blob:"))}
        assert fetched == {file.as_uri()}


def state(page: Any) -> dict[str, Any]:
    """The state, once what was done is drawn."""
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return page.evaluate("({...explorer.page.state, shown: explorer.page.direction})")


def shown(page: Any) -> np.ndarray:
    state(page)
    return np.array(page.evaluate("[...explorer.page.map.weights]"))


def at_patch(page: Any, row: int, column: int) -> tuple[float, float]:
    box = page.locator("#map").bounding_box()
    return box["x"] + (column + 0.5) * box["width"] / GRID[1], box["y"] + (row + 0.5) * box["height"] / GRID[0]


def assert_decoded(found: np.ndarray, expected: Tensor) -> None:
    """expected: [key], the row; equal to 1/255 of its maximum."""
    assert np.abs(found - expected.numpy()).max() <= float(expected.max()) / 255 + 1e-6


# --- a picture and a query ---


def test_it_opens_with_the_readout_query_of_the_last_layer_at_the_last_moment(page: Any, weights: list[Tensor]) -> None:
    assert (state(page)["query"], state(page)["layer"], state(page)["moment"]) == (0, LAYERS - 1, len(STEPS) - 1)
    np.testing.assert_allclose(shown(page), weights[3][0, -1].mean(dim=0)[0], atol=1 / 255)
    assert page.locator("main").is_visible() and page.title() == "Attention explorer"


def test_hovering_a_patch_shows_its_row_and_shift_its_column(page: Any, weights: list[Tensor]) -> None:
    page.locator(".thumbnail").nth(1 * (HEADS + 2) + 1).click()  # head 2.2
    page.mouse.move(*at_patch(page, 2, 1))
    token = PREFIX + 2 * GRID[1] + 1
    assert state(page)["query"] == token
    assert_decoded(shown(page), weights[3][0, 1, 1, token])
    page.keyboard.down("Shift")
    assert state(page)["shown"] == "column" and "what attends to the patch in row 3, column 2" in caption(page)
    column = weights[3][0, 1, 1]
    assert (np.abs(shown(page) - column[:, token].numpy()) <= column.amax(dim=1).numpy() / 255 + 1e-6).all()
    page.keyboard.up("Shift")
    assert state(page)["shown"] == "row"


def test_tokens_that_are_no_patches_are_queries_too(page: Any, weights: list[Tensor]) -> None:
    page.locator("#tokens button").nth(1).hover()
    assert state(page)["query"] == 1 and "prefix token 2" in caption(page)
    share = float(weights[3][0, -1].mean(dim=0)[1, 1])
    assert float(page.locator("#tokens button").nth(1).inner_text().split()[-1][:-1]) == pytest.approx(
        100 * share, abs=0.3
    )


def test_a_pinned_query_stays_until_it_is_let_go(page: Any) -> None:
    page.mouse.click(*at_patch(page, 1, 2))
    pinned = state(page)
    page.mouse.move(*at_patch(page, 0, 0))
    page.locator(".picture").nth(1).click()
    page.locator(".thumbnail").first.click()
    after = state(page)
    assert pinned["pinned"] and after["query"] == pinned["query"] == PREFIX + GRID[1] + 2
    assert (after["picture"], after["layer"], after["head"]) == (1, 0, 0)
    page.mouse.click(*at_patch(page, 1, 2))
    page.mouse.move(*at_patch(page, 0, 0))
    assert state(page)["query"] == PREFIX and not state(page)["pinned"]


def test_keys_alone_do_all_of_it(page: Any) -> None:
    page.locator("#map").focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowLeft", "ArrowRight"):
        page.keyboard.press(key)
    assert state(page)["query"] == PREFIX + GRID[1] + 1
    page.keyboard.press("Enter")
    assert state(page)["pinned"]
    page.keyboard.press("Escape")
    page.keyboard.press("Home")
    page.keyboard.press(",")
    assert (state(page)["query"], state(page)["moment"], state(page)["pinned"]) == (0, len(STEPS) - 2, False)
    page.locator('.thumbnail[aria-pressed="true"]').focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowLeft")
    assert (state(page)["layer"], state(page)["head"]) == (LAYERS - 2, HEADS - 1)
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == f"head {LAYERS - 1}.{HEADS}"
    names = page.evaluate(
        "[...document.querySelectorAll('button, input, select, [tabindex]')].filter((each) => !(each.innerText || "
        "each.getAttribute('aria-label') || each.title || each.labels?.length)).map((each) => each.outerHTML)"
    )
    assert names == []


def caption(page: Any) -> str:
    state(page)
    return page.locator("#caption").inner_text()


# --- all layers and heads ---


def test_each_thumbnail_is_the_map_of_its_head(page: Any, weights: list[Tensor]) -> None:
    """Read back from the canvas: the order of colours is that of weights relative to uniform."""
    table = np.array(page.evaluate("[...explorer.page.tables.relative]")).reshape(256, 3)
    for layer in range(LAYERS):
        for head in range(HEADS):
            pixels = page.evaluate(
                "(number) => { const {context} = explorer.page.thumbnails[number];"
                "return [...context.getImageData(0, 0, context.canvas.width, context.canvas.height).data]; }",
                layer * (HEADS + 2) + head,
            )
            row = weights[3][0, layer, head, 0].numpy()
            codes = np.round(row / row.max() * 255) / 255 * row.max()
            with np.errstate(divide="ignore"):
                place = np.clip((np.log2(codes[PREFIX:] * TOKENS) + 3) / 6, 0, 1)
            expected = table[np.round(place * 255).astype(int)]
            found = np.array(pixels).reshape(-1, 4)[:, :3]
            assert np.abs(found - expected).max() <= 3, (layer, head)


def test_the_rollout_is_the_reports(page: Any, weights: list[Tensor]) -> None:
    page.locator(".thumbnail").last.click()
    expected = attention_rollout(list(weights[3][:1].unbind(dim=1)))[0, 0]
    np.testing.assert_allclose(shown(page), expected, atol=2e-3)


def test_numbers_stand_beside_the_map(page: Any, weights: list[Tensor]) -> None:
    page.locator(".thumbnail").nth(1).click()
    row = weights[3][0, 0, 1, 0]
    state(page)
    numbers = page.locator("#numbers").inner_text()
    assert f"{float(attention_entropy(row)):.2f} nats of {np.log(TOKENS):.2f}" in numbers
    assert f"{float(row.max()):.1%}" in numbers and f"{float(row[0]):.1%}" in numbers


# --- time ---


def test_one_slider_moves_everything_and_the_chart_is_one(page: Any, weights: list[Tensor]) -> None:
    page.locator(".thumbnail").first.click()
    page.locator("#moment").fill("1")
    assert_decoded(shown(page), weights[1][0, 0, 0, 0])
    assert "step 1" in caption(page) and page.locator("#when").inner_text() == "step 1"
    verdicts = page.locator(".picture .verdict").all_inner_texts()
    assert verdicts[1] == "b" and verdicts[3] == "a → b" and verdicts[2] == "a"
    box = page.locator("#chart").bounding_box()
    page.mouse.click(box["x"] + 36, box["y"] + 60)
    assert state(page)["moment"] == 0 and page.locator(".picture .verdict").nth(2).inner_text() == "a → b"


def test_arrows_go_through_the_images_that_pass_the_filter(page: Any) -> None:
    page.locator("#filter").select_option("right")
    page.locator(".picture").first.focus()
    seen = []
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
        seen.append((state(page)["group"], state(page)["picture"]))
    assert seen == [(0, 1), (0, 2), (0, 2), (0, 1)]  # the others are wrong, or not known
    assert page.evaluate("document.querySelectorAll('.picture[tabindex=\"0\"]').length") == 1


def test_playing_goes_to_the_end_and_stops(page: Any) -> None:
    page.locator("#speed").select_option("12")
    page.locator("#play").click()
    assert page.locator("#play").inner_text() == "Pause"
    wait_until(page, f"explorer.page.state.moment === {len(STEPS) - 1} && !explorer.page.timer")
    assert page.locator("#play").inner_text() == "Play"


def test_a_hand_on_the_slider_or_another_group_ends_playing(page: Any) -> None:
    for action in (lambda: page.locator("#moment").fill("2"), lambda: page.locator(".picture").nth(3).click()):
        page.locator("#play").click()
        action()
        assert page.evaluate("!explorer.page.timer") and page.locator("#play").text_content() == "Play"
    page.locator(".picture").first.click()
    assert state(page)["moment"] in (2, 3)  # that the group was left at


def test_keys_that_mean_something_else_are_left_alone(page: Any) -> None:
    page.locator("#map").focus()
    page.keyboard.press("ArrowDown")
    for _ in range(GRID[1]):
        page.keyboard.press("ArrowRight")
    assert state(page)["query"] == PREFIX + GRID[1] - 1  # a row's end is no way into the next
    before = state(page)
    for keys in ("Alt+ArrowDown", "Control+ArrowDown", "Control+,"):
        page.keyboard.press(keys)
    page.locator("#speed").focus()
    page.keyboard.press(",")
    assert state(page) == before
    page.locator("#opacity").focus()
    page.keyboard.down("Shift")
    assert state(page)["shown"] == "row"  # elsewhere, it means other things
    page.keyboard.up("Shift")


def test_pictures_of_one_moment_have_no_slider(page: Any, weights: list[Tensor]) -> None:
    page.locator(".picture").nth(4).click()
    page.locator(".thumbnail").first.click()
    assert_decoded(shown(page), weights[4][1, 0, 0, 0])
    assert page.locator("#time").is_hidden() and "five" in caption(page)


# --- beside each other ---


def test_a_kept_map_is_compared_with_another_head_and_moment(page: Any, weights: list[Tensor]) -> None:
    page.locator(".thumbnail").first.click()
    page.locator("#keep").click()
    page.locator(".thumbnail").nth(HEADS + 3).click()  # head 2.2
    page.locator("#moment").fill("1")
    page.mouse.move(*at_patch(page, 0, 1))
    token = PREFIX + 1
    before, now = weights[3][0, 0, 0, token].numpy(), weights[1][0, 1, 1, token].numpy()
    assert_decoded(shown(page), weights[1][0, 1, 1, token])
    words = [page.locator(f"#{each}-caption").inner_text() for each in ("kept", "now")]
    assert words == ["head 1.1 · step 40", "head 2.2 · step 1"]
    distance = page.locator("#distance").inner_text()
    assert f"{np.abs(before - now).sum() / 2:.1%}"[:3] in distance and f"class token {before[0]:.1%}"[:14] in distance
    entropies = [float(attention_entropy(each)) for each in (weights[3][0, 0, 0, token], weights[1][0, 1, 1, token])]
    assert f"Entropy {entropies[0]:.2f} → {entropies[1]:.2f} nats" in distance
    numbers = page.locator("#numbers").inner_text()
    assert f"{entropies[1]:.2f} nats of" in numbers
    width, height, pixels = page.evaluate(
        "(({width, height}, {data}) => [width, height, [...data]])(...((canvas) => [canvas, canvas.getContext('2d')"
        ".getImageData(0, 0, canvas.width, canvas.height)])(document.getElementById('difference')))"
    )
    rows, columns = ((np.arange(count) + 0.5) * side / count for count, side in zip(GRID, (height, width), strict=True))
    drawn = np.array(pixels).reshape(height, width, 4)[rows.astype(int)][:, columns.astype(int), :3].reshape(-1, 3)
    table = np.array(page.evaluate("[...explorer.page.tables.difference]")).reshape(256, 3)
    doublings = np.log2(np.maximum(now * TOKENS, 1 / 8)) - np.log2(np.maximum(before * TOKENS, 1 / 8))
    expected = table[np.round(255 * np.clip((doublings[PREFIX:] / 3 + 1) / 2, 0, 1)).astype(int)]
    assert np.abs(drawn.astype(int) - expected).max() <= 6


def test_a_comparison_swaps_ends_and_is_in_the_address(page: Any) -> None:
    page.locator(".picture").nth(4).click()
    page.locator("#keep").click()
    page.locator(".picture").nth(1).click()
    state(page)
    assert page.locator("#kept-caption").inner_text() == "five · best.ckpt"
    page.locator("#swap").click()
    assert (state(page)["group"], state(page)["picture"]) == (1, 1)
    assert state(page)["kept"] == {"group": 0, "picture": 1, "moment": 3, "layer": LAYERS - 1, "head": HEADS}
    wait_until(page, "location.hash.includes('kept=training.2.step40.3.mean')")
    page.reload()
    wait_until(page, "window.explorer !== undefined")
    assert state(page)["kept"] is not None and page.locator("#comparison").is_visible()
    page.locator("#end").click()
    assert state(page)["kept"] is None and page.locator("#comparison").is_hidden()


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [("wrong", [3]), ("right", [0, 1, 2]), ("class a", [2, 3]), ("confused a, b", [3]), ("all", [0, 1, 2, 3, 4])],
)
def test_images_are_filtered(page: Any, kind: str, numbers: list[int]) -> None:
    page.locator("#filter").select_option(kind)
    state(page)
    pictures = page.locator(".picture")
    # The one that is shown stays, and is told from the others.
    assert [number for number in range(5) if pictures.nth(number).is_visible()] == sorted({0, *numbers})
    assert pictures.nth(0).evaluate("(each) => each.classList.contains('other')") == (0 not in numbers)


# --- the address, and what is taken along ---


def test_the_address_shows_the_same_again(page: Any, file: Path) -> None:
    page.mouse.click(*at_patch(page, 2, 3))
    page.locator(".picture").nth(2).click()
    page.locator(".thumbnail").nth(2).click()
    page.locator("#moment").fill("2")
    page.locator("#colors").select_option("share")
    page.locator("#direction").select_option("column")
    expected = state(page)
    wait_until(page, "location.hash.includes('query=3%2C4')")
    other = page.context.new_page()
    other.goto(page.url)
    wait_until(other, "window.explorer !== undefined")
    assert state(other) == expected
    other.evaluate("location.hash = '#layer=1&head=mean&query=token1&direction=row'")
    wait_until(other, "explorer.page.state.query === 0")
    # What an address does not say is as usual, whatever was shown before.
    changed = {"layer": 0, "picture": 0, "moment": 3, "head": HEADS, "colors": "relative", "pinned": False}
    assert state(other) == expected | changed | {"query": 0, "direction": "row", "shown": "row"}


@pytest.mark.parametrize(
    ("address", "unknown"),
    [
        ("#layer=99&head=0&query=9,9&moment=-1", ["layer=99", "head=0", "query=9,9", "moment=-1"]),
        ("#kept=training.9.1.1.1", ["kept=training.9.1.1.1"]),
        ("#images=gone&image=2&moment=1", ["images=gone"]),
        ("#image=x&opacity=101&smooth=yes&filter=bogus", ["image=x", "opacity=101", "smooth=yes", "filter=bogus"]),
        ("#moment=step3&head=rolling", ["moment=step3", "head=rolling"]),
        ("#__proto__=1&a&%%=&&", []),
        ("#filter=%", ["filter=%"]),
    ],
)
def test_what_an_address_asks_for_and_is_not_here_is_named(page: Any, address: str, unknown: list[str]) -> None:
    before = state(page)
    page.evaluate("(address) => (location.hash = address)", address)
    page.wait_for_timeout(100)
    after = state(page)
    assert sorted(after.pop("unknown")) == sorted(unknown)
    assert after == {name: value for name, value in before.items() if name != "unknown"}
    assert all(each in page.locator("#notice").inner_text() for each in unknown)


def test_a_finding_leads_to_a_moment_by_its_step(page: Any) -> None:
    page.evaluate("location.hash = '#images=training&layer=2&head=mean&moment=step4'")
    wait_until(page, "explorer.page.state.layer === 1")
    assert state(page)["moment"] == 2 and state(page)["unknown"] == []


def test_numbers_are_copied_as_csv(page: Any, weights: list[Tensor]) -> None:
    page.locator(".thumbnail").nth(1).click()
    page.locator("#copy").click()
    lines = page.evaluate("navigator.clipboard.readText()").splitlines()
    assert lines[0] == "# Attention explorer" and f"# Warning. {HOSTILE}" in lines and "# weights " in lines[2]
    assert lines[4] == "token,row,column,weight"
    cells = [line.split(",") for line in lines[5:]]
    assert len(cells) == TOKENS and cells[0][:3] == ["1", "", ""] and cells[-1][:3] == [str(TOKENS), "3", "4"]
    assert_decoded(np.array([float(row[3]) for row in cells]), weights[3][0, 0, 1, 0])


def saved(page: Any, button: str, folder: Path) -> Path:
    with page.expect_download() as download:
        page.locator(button).click()
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def test_the_view_is_saved_as_a_picture(page: Any, tmp_path: Path) -> None:
    path = saved(page, "#png", tmp_path)
    with Image.open(path) as picture:
        assert path.name == "attention.png" and picture.size[0] == 760
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 50


def test_the_view_is_saved_as_a_drawing(page: Any, tmp_path: Path) -> None:
    page.mouse.click(*at_patch(page, 1, 1))
    state(page)
    path = saved(page, "#svg", tmp_path)
    drawing = ElementTree.parse(path).getroot()
    kinds = [each.tag.rpartition("}")[2] for each in drawing.iter()]
    assert path.name == "attention.svg" and kinds.count("rect") == 1 + GRID[0] * GRID[1] + 2 + 1
    texts = [each.text or "" for each in drawing.iter() if each.tag.endswith("}text")]
    assert "1×" in texts and "step 40" in texts and HOSTILE in " ".join(texts) and "b" not in kinds


# --- others' names, small screens, much use ---


def test_a_hostile_name_is_text(page: Any) -> None:
    page.locator(".picture").first.click()
    assert HOSTILE in caption(page) and HOSTILE in page.locator("#warnings").inner_text()
    assert page.title() == "Attention explorer" and page.locator("img[src=x]").count() == 0


def test_a_tap_chooses_a_patch_and_nothing_is_wider_than_a_phone(browser: Any, file: Path) -> None:
    with opened(browser, file, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        page.locator("#map").scroll_into_view_if_needed()
        page.touchscreen.tap(*at_patch(page, 1, 3))
        assert state(page)["query"] == PREFIX + GRID[1] + 3 and state(page)["pinned"]
        assert page.errors == []


def test_the_layout_stays_where_it_is(page: Any) -> None:
    """What is hovered must not move under the pointer."""
    page.mouse.move(*at_patch(page, 0, 0))
    state(page)
    boxes = [page.locator(each).bounding_box() for each in ("#map", "#heads", "#time", "#options")]
    for row in range(GRID[0]):
        for column in range(GRID[1]):
            page.mouse.move(*at_patch(page, row, column))
            state(page)
            assert boxes == [page.locator(each).bounding_box() for each in ("#map", "#heads", "#time", "#options")]


def test_a_damaged_page_says_so(browser: Any, file: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.html"
    packed = re.search(r'id="rows">([^<]*)<', file.read_text("utf-8"))
    assert packed is not None
    damaged.write_text(file.read_text("utf-8").replace(packed.group(1), "AwA="), "utf-8")  # nothing, deflated
    page = browser.new_page()
    page.goto(damaged.as_uri())
    page.wait_for_selector("#failure:visible")
    assert "it is damaged" in page.locator("#failure").inner_text() and page.locator("main").is_hidden()
    page.close()


def test_pure_functions(page: Any) -> None:
    half = np.array([0, 1, 6e-8, 0.1, 1 / 3, 65504, -2.5], np.float16)
    found = page.evaluate("(bits) => bits.map(explorer.pure.half)", half.view(np.uint16).tolist())
    np.testing.assert_array_equal(found, half.astype(float))
    for way in ("", "Uint8Array.fromBase64 = undefined;"):  # of older browsers
        assert page.evaluate(f"(() => {{ {way} return [...explorer.pure.bytesOf('AP+AAQ==')]; }})()") == [
            0,
            255,
            128,
            1,
        ]
    assert page.evaluate("explorer.pure.onRelativeScale(0, 10, 3)") == 0
    assert page.evaluate("explorer.pure.onRelativeScale(0.1, 10, 3)") == 0.5
    assert page.evaluate("explorer.pure.onRelativeScale(1, 10, 3)") == 1
    layout = {"grid": [2, 3], "patch": [10, 10], "offset": [-5, 0], "prefix": 1}
    cases = {(0.0, 0.0): 1, (0.3, 0.0): 2, (0.0, 0.9): 4, (0.9, 0.5): None}
    for (across, down), token in cases.items():
        assert page.evaluate(
            "([across, down, layout]) => explorer.pure.tokenAt(across, down, layout, [15, 40])", [across, down, layout]
        ) == token, (across, down)  # fmt: skip
    weights = [0.5, 0.5, 0, 0, 0, 0, 0]
    assert page.evaluate("(w) => explorer.pure.entropyOf(w)", weights) == pytest.approx(np.log(2))
    distance = "([w, layout]) => explorer.pure.distanceOf(w, 6, layout)"
    assert page.evaluate(distance, [weights, layout]) == pytest.approx(np.hypot(10, 20))
