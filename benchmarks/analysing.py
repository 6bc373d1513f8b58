"""How fast the offline analysis is: beside a plain forward pass, beside plain matplotlib, and what memory it takes.

    python benchmarks/analysing.py
    python benchmarks/analysing.py figures --repeats 5 --markdown
    python benchmarks/analysing.py --quick

statistics: the statistics chapter over 10,000 images, beside a forward pass of the same model on the same batches.
figures: every figure of the 8 samples as `analyze.py` writes them, forward and backward passes included, beside
`plt.subplots`, `imshow` and `savefig` with the same panels, titles, colour bars and pixels, but the maps ready made.
memory: the peak of a whole analysis of 1,000 and of 10,000 images; both hold all 10,000 pixels.
The model is the default one with random weights, the images are scikit-learn's digits over and over: speed depends on
neither. Every part is a process of its own. Times are processor time on one thread, the ways interleaved: other work on
the machine disturbs them least. A number is the median of the repeats with the smallest and the largest behind it.
"""

from __future__ import annotations

import contextlib
import io
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parts import in_child, option_parser, parse
from tables import machine, spread, table, versions

NUM_IMAGES = 10_000
FEW_IMAGES = 1_000
PARTS = ("statistics", "figures", "memory")
SAMPLE_CHAPTERS = ("patterns", "heads", "layers", "methods")
ALPHA = 0.6  # of a map over its image, in the peer
DPI = 100


def study_in(folder: str, num_images: int, num_samples: int) -> Any:
    """What `analyze.py ckpt=random` makes, over `num_images` of 10,000 digits."""
    from attention_visualizer.analysis.preparation import make_study
    from attention_visualizer.analysis.study.analysed_weights import Weights, random_model
    from attention_visualizer.analysis.study.samples import SampleChoice
    from attention_visualizer.data.datamodule import ImageDataModule
    from attention_visualizer.data.image_sets import LabelledImageSet

    data = ImageDataModule(name="digits")
    data.load()
    weights = Weights(random_model(), "random weights", random=True)
    digits = LabelledImageSet(data.description, *data.splits["test"])
    assert digits.labels is not None
    copies = -(-NUM_IMAGES // len(digits))
    images, labels = digits.images.repeat(copies, 1, 1, 1), digits.labels.repeat(copies)
    pictures = replace(digits, images=images[:num_images], labels=labels[:num_images])
    return make_study(weights, pictures, Path(folder), SampleChoice(num_samples), device="cpu")


def timed(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each way, interleaved, after one turn that is not counted."""
    import torch

    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, run in ways.items():
            began = time.process_time()
            run()
            if turn:
                seconds[name].append(time.process_time() - began)
    return seconds


# --- one measurement, in a process of its own -------------------------------------------------------------------


def measure_statistics(num_images: int, repeats: int) -> dict[str, list[float]]:
    import torch

    with tempfile.TemporaryDirectory() as folder:
        study = study_in(folder, num_images, 1)

        def plain() -> None:
            with torch.no_grad():
                for images, _ in study.target.batches():
                    study.target.model(images)

        def ours() -> None:
            study.target.survey()

        return timed({"plain": plain, "ours": ours}, repeats)


def measure_figures(num_samples: int, repeats: int) -> dict[str, list[float]]:
    from attention_visualizer.analysis.chapters import CHAPTERS
    from attention_visualizer.analysis.methods import chapter as methods_chapter

    with tempfile.TemporaryDirectory() as folder:
        study = study_in(folder, 300, num_samples)
        known = [
            (number, subject, methods_chapter.measure(study, sample))
            for number, (sample, subject) in enumerate(zip(study.samples, study.explained_images, strict=True))
        ]
        sizes = {stem: read_size(folder, study, chapter, stem) for chapter, stem in STEMS.items()}

        def ours() -> None:
            fresh = replace(study)  # without what it has already looked at
            for chapter in SAMPLE_CHAPTERS:
                CHAPTERS[chapter](fresh)

        def peer(layout: str | None) -> Callable[[], None]:
            def run() -> None:
                for number, subject, maps in known:
                    for stem, figure in figures_of(subject, maps).items():
                        draw_plainly(figure, sizes[stem], Path(folder) / f"peer_{stem}_{number}.png", layout)

            return run

        return timed({"ours": ours, "plain": peer(None), "constrained": peer("constrained")}, repeats)


def measure_memory(num_images: int) -> dict[str, list[float]]:
    from attention_visualizer.analysis.writing import write_analysis

    with tempfile.TemporaryDirectory() as folder:
        study = study_in(folder, num_images, 8)
        with contextlib.redirect_stdout(io.StringIO()):
            write_analysis(study, "python benchmarks/analysing.py")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"mebibytes": [peak / (2**20 if sys.platform == "darwin" else 2**10)]}


# --- the peer of the figures: what a user of matplotlib would write ---------------------------------------------


@dataclass(frozen=True)
class Panel:
    """A map [row, column] in its scale, over an image [height, width] where there is one, or the image alone."""

    values: Any = None
    image: Any = None
    title: str = ""
    caption: str = ""
    scale: int = 0  # which of the figure's


@dataclass(frozen=True)
class PlainFigure:
    """rows: panels, None where there is none; scales: (colour map, label) of -3 to 3 doublings each."""

    rows: list[list[Panel | None]]
    row_titles: Sequence[str]
    headline: str
    scales: Sequence[tuple[str, str]]


STEMS = {
    "patterns": "attention_pattern",
    "heads": "attention_heads",
    "layers": "layer_comparison",
    "methods": "attention_methods",
}


def read_size(folder: str, study: Any, chapter: str, stem: str) -> tuple[int, int]:
    """Width and height in pixels of our figure."""
    from PIL import Image

    from attention_visualizer.analysis.chapters import CHAPTERS

    CHAPTERS[chapter](study)
    with Image.open(Path(folder) / f"{stem}_sample_0.png") as picture:
        return picture.size


def figures_of(subject: Any, maps: dict[str, Any]) -> dict[str, PlainFigure]:
    """The panels of our four figures of a sample."""
    import numpy as np

    image, layers, heads = subject.image[..., 0], range(len(subject.maps)), range(subject.head_maps.shape[1])
    relative = np.log2(subject.maps * subject.unit)
    by_head = np.log2(subject.head_maps * subject.unit)

    def share(values: Any) -> Any:
        return np.log2(np.maximum(values / values.sum() * values.size, 1e-30))

    captions = [subject.layer_caption(layer) for layer in layers]
    names = [f"layer {layer + 1}" for layer in layers]
    attention = ("RdBu_r", "attention / uniform (doublings)")
    shown = Panel(image=image, title="input")
    over_layers: list[Panel | None] = [Panel(relative[layer], image, names[layer], captions[layer]) for layer in layers]
    plain_layers = [Panel(relative[layer], None, names[layer], captions[layer]) for layer in layers]
    return {
        "attention_pattern": PlainFigure(
            [[shown, *plain_layers], [None, *(Panel(relative[layer], image) for layer in layers)]],
            ("map", "overlay"),
            f"By layer: CLS attention, mean over heads\n{subject.verdict}",
            [attention],
        ),
        "attention_heads": PlainFigure(
            [
                [
                    Panel(
                        by_head[layer, head],
                        image,
                        "" if layer else f"head {head + 1}",
                        subject.head_caption(layer, head),
                    )
                    for head in heads
                ]
                for layer in layers
            ],
            names,
            f"Heads of each layer: CLS attention\n{subject.verdict}",
            [attention],
        ),
        "layer_comparison": PlainFigure(
            [
                over_layers,
                [Panel(share(subject.rollouts[layer]), image) for layer in layers],
                [Panel(relative[layer] - relative[layer - 1], None, scale=1) if layer else None for layer in layers],
            ],
            ("attention", "rollout over patches", "change"),
            f"From shallow to deep: CLS attention, mean over heads\n{subject.verdict}",
            [attention, ("PuOr_r", "change from previous layer")],
        ),
        "attention_methods": PlainFigure(
            [
                [shown, *(Panel(share(values), None, name) for name, values in maps.items())],
                [None, *(Panel(share(values), image) for values in maps.values())],
            ],
            ("map", "overlay"),
            f"By method: CLS attention\n{subject.verdict}",
            [("RdBu_r", "share / uniform share (doublings)")],
        ),
    }


def draw_plainly(figure: PlainFigure, size: tuple[int, int], path: Path, layout: Any) -> None:
    import matplotlib
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplots(
        len(figure.rows),
        len(figure.rows[0]),
        figsize=(size[0] / DPI, size[1] / DPI),
        dpi=DPI,
        squeeze=False,
        layout=layout,
    )
    drawn.suptitle(figure.headline, x=0.01, ha="left", fontsize=10)
    for row, panels in enumerate(figure.rows):
        for column, panel in enumerate(panels):
            axis = axes[row, column]
            axis.set(xticks=[], yticks=[])
            if column == 0:
                axis.set_ylabel(figure.row_titles[row], fontsize=8)
            if panel is None:
                axis.set_frame_on(False)
                continue
            if panel.image is not None:
                axis.imshow(panel.image, cmap="gray")
            if panel.values is not None:
                height, width = panel.values.shape if panel.image is None else panel.image.shape
                axis.imshow(
                    panel.values,
                    cmap=figure.scales[panel.scale][0],
                    vmin=-3,
                    vmax=3,
                    alpha=1 if panel.image is None else ALPHA,
                    extent=(-0.5, width - 0.5, height - 0.5, -0.5),
                )
            axis.set_title(panel.title, fontsize=8)
            axis.set_xlabel(panel.caption, fontsize=7)
    for color_map, label in figure.scales:
        colors = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(-3, 3), color_map)
        drawn.colorbar(colors, ax=axes, label=label)
    drawn.savefig(path)
    plt.close(drawn)


# --- tables -----------------------------------------------------------------------------------------------------


def statistics_table(num_images: int, repeats: int, markdown: bool) -> str:
    seconds = in_child(__file__, "statistics", num_images, repeats)
    speeds = {way: [num_images / each for each in found] for way, found in seconds.items()}
    share = statistics.median(ours / plain for ours, plain in zip(speeds["ours"], speeds["plain"], strict=True))
    rows = [
        ("plain forward pass", spread(speeds["plain"], ",.0f"), "1.00"),
        ("statistics of analyze.py", spread(speeds["ours"], ",.0f"), f"{share:.2f}"),
    ]
    return table((f"{num_images:,} images in batches of 500", "images/s", "of plain"), rows, markdown)


def figures_table(num_samples: int, repeats: int, markdown: bool) -> str:
    seconds = in_child(__file__, "figures", num_samples, repeats)
    titles = {
        "plain": "matplotlib: subplots, imshow, savefig",
        "constrained": 'the same with layout="constrained"',
        "ours": "figures of analyze.py",
    }
    middle = {way: statistics.median(found) for way, found in seconds.items()}
    rows = [
        (title, spread(seconds[way], ".2f"), f"{middle[way] / middle['plain']:.2f}") for way, title in titles.items()
    ]
    return table((f"{4 * num_samples} figures of {num_samples} samples", "seconds", "of matplotlib"), rows, markdown)


def memory_table(counts: Sequence[int], repeats: int, markdown: bool) -> str:
    found: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(repeats):
        for count in counts:
            found[count] += in_child(__file__, "memory", count)["mebibytes"]
    first = statistics.median(found[counts[0]])
    rows = [
        (f"{count:,} images", spread(numbers, ",.0f"), f"{statistics.median(numbers) / first:.2f}")
        for count, numbers in found.items()
    ]
    return table(("a whole analysis of", "peak, MiB", f"of {counts[0]:,} images"), rows, markdown)


def main() -> None:
    options = parse(option_parser(__doc__, PARTS, "few images", repeats=5), PARTS)
    if options.child:
        part, *numbers = options.child
        measure: Any = {"statistics": measure_statistics, "figures": measure_figures, "memory": measure_memory}[part]
        print(json.dumps(measure(*numbers)))
        return
    print(f"{versions('torch', 'matplotlib', 'opencv-python-headless')}; {machine()}\n", flush=True)
    repeats, markdown = options.repeats, options.markdown
    for part in options.parts:
        if part == "statistics":
            print(statistics_table(600 if options.quick else NUM_IMAGES, repeats, markdown))
        elif part == "figures":
            print(figures_table(1 if options.quick else 8, repeats, markdown))
        else:
            print(memory_table((20, 600) if options.quick else (FEW_IMAGES, NUM_IMAGES), repeats, markdown))
        print(flush=True)


if __name__ == "__main__":
    main()
