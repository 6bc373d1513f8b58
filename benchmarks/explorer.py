"""The explorer's size, the time until it is open, and the time of a hover, in the system's Chromium.

    python benchmarks/explorer.py                 the default model, 30 moments of 10 images, random weights
    python benchmarks/explorer.py --page PAGE     a page that an analysis wrote

Prints kilobytes, milliseconds until the first picture (from the page's script to its first drawing), and the median
and the 95th percentile of a hover: from a query to all maps drawn, without what the browser then takes to show them.
Memory: the browser's JavaScript heap before and after all hovers.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from tables import machine, table, versions

MODELS = {  # layers, heads, side of the grid, pixels, images, moments, patches to a side of a cell
    "default model, 28 pixels": (6, 4, 4, 28, 10, 30, 1),
    "ViT-Ti/16, 224 pixels": (12, 3, 14, 224, 4, 1, 1),
    "ViT-B/16, 224 pixels": (12, 12, 14, 224, 2, 1, 1),
    "DINOv2-S/14, 518 pixels, cells of 3 x 3": (12, 6, 37, 518, 8, 1, 3),
}
HOVERS = """(count) => {
  const page = explorer.page, { prefix, grid } = page.layout, times = [];
  for (let number = 0; number < count; number++) {
    page.state.query = prefix + number % (grid[0] * grid[1]);
    const began = performance.now();
    page.draw();
    times.push(performance.now() - began);
  }
  return [times, performance.memory?.usedJSHeapSize ?? NaN];
}"""


def page_of(layers: int, heads: int, side: int, pixels: int, images: int, moments: int, stride: int) -> str:
    """A page of random weights, made as an analysis makes it."""
    import numpy as np
    import torch

    from attention_visualizer.explorer.contents import Contents, Group, Layer, Moment, Picture
    from attention_visualizer.explorer.page import render
    from attention_visualizer.measures.observation import RowOptions, observe
    from attention_visualizer.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    pictures = [Picture(np.zeros((pixels, pixels, 1), np.uint8), f"image {number}", None) for number in range(images)]
    seen = []
    for number in range(moments):
        model = VisionTransformer(
            img_size=pixels, patch_size=pixels // side, num_layers=layers, num_heads=heads, embed_dim=16 * heads
        ).eval()
        with torch.no_grad():
            for block in model.blocks:
                block.attn.qkv.weight.mul_(2.0)  # type: ignore[operator, union-attr]
            observation = observe(model, torch.randn(images, 1, pixels, pixels), rows=RowOptions(2**30, stride))
        assert observation.rows is not None
        unknown = [None] * images
        seen.append(Moment(f"step {number}", number, [each.rows for each in observation.rows], unknown, unknown))
    group = Group("images", "images", pictures, seen)
    shown = [Layer(each.name, each.layout, heads, number) for number, each in enumerate(observation.rows, 1)]
    return render(Contents("Explorer", [], [], shown, (pixels, pixels), stride == 1, [group]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, help="measure this page")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--hovers", type=int, default=10_000)
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        raise SystemExit("there is no Chromium: apt-get install chromium")
    print(f"{versions('torch', 'playwright')}; {machine()}\n", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        given = {options.page.name: None} if options.page else MODELS
        for name, sizes in given.items():
            path = options.page
            if sizes is not None:
                path = Path(folder) / "page.html"
                path.write_text(page_of(*sizes), encoding="utf-8")
            rows.append([name, f"{path.stat().st_size / 1000:,.0f}", *measured(browser, path, options.hovers)])
        browser.close()
    header = ["page", "kB", "open, ms", "hover, ms", "95%", f"heap after 100 and {options.hovers:,} hovers, MB"]
    print(table(header, rows, options.markdown))


def measured(browser: Any, path: Path, hovers: int) -> list[str]:
    """Open a page, hover, and return the cells of its row."""
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.goto(path.resolve().as_uri())
    while not page.evaluate("window.explorer !== undefined"):
        page.wait_for_timeout(10)
    opened = page.evaluate("explorer.milliseconds")
    _, before = page.evaluate(HOVERS, 100)
    times, after = page.evaluate(HOVERS, hovers)
    page.close()
    half, most = statistics.median(times), statistics.quantiles(times, n=20)[-1]
    return [f"{opened:.0f}", f"{half:.1f}", f"{most:.1f}", f"{before / 1e6:.0f}, {after / 1e6:.0f}"]


if __name__ == "__main__":
    main()
