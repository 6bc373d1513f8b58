"""Explorer pages of random attention, and a Chromium to look at them with."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.explorer.contents import Contents, Group, Layer, Moment, Picture
from attention_visualizer.measures.attention_rows import RowLayout
from attention_visualizer.measures.quantised_rows import QuantisedRows

LAYERS, HEADS, GRID, PREFIX = 3, 2, (3, 4), 2  # a class token and a register
TOKENS = PREFIX + GRID[0] * GRID[1]
STEPS = (0, 1, 4, 40)
HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><b>{{ 7 * 7 }}"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def random_weights(seed: int, num_pictures: int) -> Tensor:
    """Attention [picture, layer, head, query, key], sharp in some rows and nearly uniform in others."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_pictures, LAYERS, HEADS, TOKENS, TOKENS, generator=generator)
    sharpness = 6 * torch.rand(num_pictures, LAYERS, HEADS, TOKENS, 1, generator=generator)
    return (logits * sharpness).softmax(dim=-1)


def random_contents(**changes: Any) -> tuple[Contents, list[Tensor]]:
    """Three pictures at four moments and two pictures at one; and the attention [picture, ...] of each moment."""
    random = np.random.default_rng(0)
    weights = [random_weights(seed, 3) for seed in range(len(STEPS))] + [random_weights(9, 2)]

    def pictures(names: list[str], labels: list[str | None]) -> list[Picture]:
        sizes = random.integers(0, 256, (len(names), 60, 80, 3), dtype=np.uint8)
        return [Picture(*each) for each in zip(sizes, names, labels, strict=True)]

    def rows(weights: Tensor) -> list[QuantisedRows]:
        return [QuantisedRows.of(each) for each in weights.unbind(dim=1)]

    moments = [
        Moment(f"step {step}", step, rows(each), [HOSTILE, "b", "a" if step else "b"], [0.5, 0.25, None])
        for step, each in zip(STEPS, weights, strict=False)
    ]
    now = Moment("best.ckpt", None, rows(weights[-1]), ["b", None], [0.9, None])
    groups = [
        Group(
            "training",
            "Images that training was watched on",
            pictures([HOSTILE, "two", "three"], [HOSTILE, "b", "a"]),
            moments,
        ),
        Group("samples", "Samples", pictures(["four", "five"], ["a", None]), [now]),
    ]
    layout = RowLayout(1, TOKENS, TOKENS, Geometry(GRID, PREFIX, (20.0, 20.0)), None)
    layers = [Layer(f"blocks.{number}.attn", layout, HEADS, number + 1) for number in range(LAYERS)]
    given: dict[str, Any] = {"title": "Attention explorer", "facts": [("weights", HOSTILE)], "warnings": [HOSTILE]}
    given |= {"layers": layers, "image": (60, 80), "are_in_sequence": True, "groups": groups}
    return Contents(**given | changes), weights


def wait_until(page: Any, expression: str, seconds: float = 20.0) -> None:
    """Wait until an expression is true. Playwright's own way runs it in the page, whose policy does not let it."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"{expression} did not become true"
        page.wait_for_timeout(20)


@contextmanager
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, path: Path, **options: Any) -> Iterator[Any]:
    """Open a page and wait until it was drawn; `page.requests` are the addresses that it asked for and `page.errors`
    what went wrong."""
    context = browser.new_context(**{"viewport": {"width": 1400, "height": 1000}} | options)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page: Any = context.new_page()
    page.requests, page.errors = [], []
    page.on("request", lambda request: page.requests.append(request.url))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    page.goto(path.as_uri())
    wait_until(page, "window.explorer !== undefined")
    yield page
    context.close()
