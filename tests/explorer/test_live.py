"""The explorer with a kernel behind it: what is asked for is computed, and shown beside the model as it is."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attention_visualizer.attention.capture import capture, intervene
from attention_visualizer.interventions import switch_off
from tests.helpers.analyses import random_model
from tests.helpers.explorer_pages import CHROMIUM, chromium, wait_until
from tests.helpers.studies import first_digits, study_of

pytest.importorskip("anywidget")
from attention_visualizer.analysis.explorer.live import LiveExplorer

STUB = """
class Model {
  constructor(values) { Object.assign(this, { values, heard: {} }); }
  get(name) { return this.values[name]; }
  set(name, value) { this.values[name] = value; }
  on(name, call) { this.heard[name] = call; }
  save_changes() { window.asked = this.values.request; }
  receive(values) { Object.assign(this.values, values); for (const name in values) this.heard[`change:${name}`]?.(); }
}
window.model = new Model(VALUES);
render({ model: window.model, el: document.body });
"""


@pytest.fixture
def live(tmp_path: Path) -> Any:
    return LiveExplorer(study_of(random_model(), first_digits(20), tmp_path, 20, 1))


def ask(live: Any, action: str, **request: Any) -> None:
    live.request = {"action": action, "layer": 0, "head": 0, **request}


def titles(live: Any) -> list[str]:
    return [group["title"] for group in header_of(live)["groups"]]


def header_of(live: Any) -> dict[str, Any]:
    header = re.search(r'id="header">([^<]*)</script>', live.page)
    assert header is not None
    return json.loads(header.group(1))


def test_it_shows_one_image_and_then_another(live: Any) -> None:
    study = live.study
    assert (live.num_images, live.image, titles(live)) == (20, 0, titles(live)[:1])
    for image in (7, 19):
        ask(live, "image", image=image)
        assert live.image == image
        assert header_of(live)["groups"][0]["pictures"][0]["name"] == study.target.images.name(image)
    page = live.page
    for wrong in (None, 1.5):
        ask(live, "image", image=wrong)
        assert live.status == "Error: give the number of an image, from 0 to 19" and live.page == page
    ask(live, "image", image=20)
    assert live.status.startswith("Error: samples=[20]") and live.page == page and live.image == 19


def test_a_head_that_is_switched_off_is_shown_beside_the_model_as_it_is(live: Any) -> None:
    ask(live, "image", image=3)
    ask(live, "off", layer=1, head=1)
    model, target = live.study.target.model, live.study.target
    images = target.model_input(target.images.read([3]))
    with torch.no_grad(), capture(model) as usual:
        before = model(images).softmax(dim=1)
    name = usual[1].name
    with torch.no_grad(), intervene(model, switch_off(name, 1)), capture(model) as edited:
        after = model(images).softmax(dim=1)
    assert titles(live)[1] == "Without head 2.2"
    for group, layers in zip(live.contents.groups, (usual, edited), strict=True):
        for rows, layer in zip(group.moments[0].rows, layers, strict=True):
            expected = layer.weights.numpy()
            found = rows.weights()[:, : expected.shape[1]]
            np.testing.assert_allclose(found, expected, atol=float(expected.max()) / 255)
    assert not live.contents.groups[1].moments[0].rows[1].codes[:, 1].any()  # it attends to nothing
    said = [f"{int(scores.argmax())} ({float(scores.max()):.1%})" for scores in (before, after)]
    assert live.status == f"Without head 2.2: predicted {said[0]} → {said[1]}"
    ask(live, "off", layer=0, head=0)
    assert titles(live)[1] == "Without head 2.2, head 1.1"
    ask(live, "on")
    assert len(titles(live)) == 1


def test_what_is_no_head_is_not_switched_off(live: Any) -> None:
    page = live.page
    ask(live, "off", layer=0, head=99)
    assert "that is no head" in live.status and live.page == page and live.off == []


def test_a_layer_of_a_large_model_is_shown_whole(tmp_path: Path) -> None:
    study = study_of(random_model(), first_digits(20), tmp_path, 20, 1)
    small = LiveExplorer(study)
    whole = sum(layer.layout.nbytes(layer.num_heads + 3) for layer in small.contents.layers)
    object.__setattr__(study, "explorer_bytes", 200_000 + 700 + whole)
    live = LiveExplorer(study)
    assert live.has_cells and not small.has_cells
    ask(live, "whole", layer=1)
    strides = [layer.layout.stride for layer in live.contents.layers]
    assert strides[1] == 1 and strides[0] > 1


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_the_toolbar_asks_and_keeps_the_view(live: Any, tmp_path: Path) -> None:
    pytest.importorskip("playwright")
    code = resources.files("attention_visualizer.explorer").joinpath("live.js").read_text("utf-8")
    values = {name: getattr(live, name) for name in ("page", "status", "image", "num_images", "has_cells", "request")}
    script = code.replace(
        "export default { render };", STUB.replace("VALUES", json.dumps(values).replace("<", "\\u003c"))
    )
    (tmp_path / "notebook.html").write_text(f"<!doctype html><body><script>{script}</script>", encoding="utf-8")
    explorer = "document.querySelector('iframe').contentWindow.explorer"
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.goto((tmp_path / "notebook.html").as_uri())
        wait_until(page, f"{explorer} !== undefined")
        page.evaluate(f"{explorer}.page.show({{ layer: 1, head: 1, query: 3, opacity: 40 }})")
        assert page.get_by_text("Show every patch").is_hidden()
        page.get_by_text("Switch this head off").click()
        asked = page.evaluate("window.asked")
        assert (asked["action"], asked["layer"], asked["head"]) == ("off", 1, 1)
        live.request = asked
        page.evaluate("(values) => model.receive(values)", {"page": live.page, "status": live.status, "answered": 1})
        wait_until(page, f"{explorer}?.page.state.kept !== null && {explorer}?.page.header.groups.length === 2")
        state = page.evaluate(f"{explorer}.page.state")
        assert (state["group"], state["layer"], state["head"], state["query"], state["opacity"]) == (1, 1, 1, 3, 40)
        assert state["kept"] == {"group": 0, "picture": 0, "moment": 0, "layer": 1, "head": 1}
        assert live.status in page.locator("output").inner_text() and live.answered == 1
        page.locator("input").fill("6")
        page.locator("input").blur()
        assert page.evaluate("window.asked.image") == 6
