"""The mean map of each class by layer, and where the maps of easily confused classes differ, beside their ink."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from attention_visualizer.analysis.atlas.figure import draw_differences, draw_maps, draw_rollouts
from attention_visualizer.analysis.atlas.measure import MAX_OF_CLASS, MIN_SHARE, Atlas, Difference, measure
from attention_visualizer.analysis.needs import ChapterWriter, Need
from attention_visualizer.analysis.study.output import Output
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.measures import intervals
from attention_visualizer.measures.intervals import Interval
from attention_visualizer.report.chapter import Chapter, FigureFile, Finding, Table, escape_markdown

Array = NDArray[Any]


def write(study: Study) -> Chapter:
    atlas = measure(study)
    files = save_figures(atlas, study.output)
    return Chapter(
        CHAPTER.title,
        TEXT.format(which=atlas.images, least=MIN_SHARE, permutations=intervals.PERMUTATIONS),
        files,
        [difference_table(atlas)],
        numbers_of(atlas),
        finding=finding_of(atlas, files[-1].name) if atlas.differences else None,
        caution="Mean maps of two classes differ where their ink does. Only what remains after the ink at each "
        "position is regressed out can be due to attention itself, and a linear regression on ink is a rough model.",
    )


def save_figures(atlas: Atlas, output: Output) -> list[FigureFile]:
    files = [
        FigureFile(
            output.save(draw_maps(atlas), "attention_atlas"),
            "Mean image and mean attention on each patch by class (down) and layer (across), mean over heads and "
            f"{atlas.images}, as a share of the attention on patches.",
        )
    ]
    if atlas.rollouts is not None:
        files.append(
            FigureFile(
                output.save(draw_rollouts(atlas), "attention_atlas_rollout"),
                "Mean image and mean attention rollout from the input up to each layer (across) by class (down), "
                f"mean over {atlas.images}, as a share of what reaches the patches.",
            )
        )
    files.append(
        FigureFile(
            output.save(draw_differences(atlas), "attention_atlas_differences"),
            "Differences between the mean maps of two classes, in shares of the attention on patches "
            f"({of_each_class(atlas.differences)}). Ring: significant "
            f"(p < 0.05, corrected over all positions of a pair) and at least {MIN_SHARE:.0%}; full dot: also with "
            "the ink at that position regressed out. Last: the difference of the ink, rings where it is significant.",
        )
    )
    return files


def numbers_of(atlas: Atlas) -> dict[str, Any]:
    return {
        "images": atlas.num_images,
        "class_names": atlas.names,
        "mean_maps": rounded(atlas.maps),
        "mean_rollouts": None if atlas.rollouts is None else rounded(atlas.rollouts),
        "ink": rounded(atlas.ink),
        "pairs": [
            {
                "classes": [atlas.names[each.first], atlas.names[each.second]],
                "images": each.counts,
                "attention": rounded_interval(each.attention),
                "p_value": each.p_value,
                "beyond_ink": rounded_interval(each.beyond_ink),
                "beyond_ink_p_value": each.beyond_ink_p_value,
                "with_ink": rounded_interval(each.with_ink),
                "ink": rounded_interval(each.ink),
                "ink_p_value": each.ink_p_value,
            }
            for each in atlas.differences
        ],
    }


def rounded(values: Array) -> Array:
    return np.round(values.astype(np.float64), 6)


def rounded_interval(interval: Interval) -> dict[str, Any]:
    value, low, high = map(rounded, (interval.value, interval.low, interval.high))
    return Interval(value, low, high, interval.n).numbers()


def of_each_class(differences: list[Difference]) -> str:
    """Return which images of a class its mean is over."""
    most = max((count for each in differences for count in each.counts), default=0)
    return f"the first {MAX_OF_CLASS:,} images of each class" if most == MAX_OF_CLASS else "all images of both classes"


def largest(interval: Interval) -> tuple[tuple[int, int], Interval]:
    """Return where [layer, patch] a difference is largest, and what it is there."""
    layer, patch = np.unravel_index(int(np.abs(interval.value).argmax()), interval.value.shape)
    return (int(layer), int(patch)), interval[layer, patch]


def finding_of(atlas: Atlas, figure: str) -> Finding:
    differences, names = atlas.differences, atlas.names
    places = sum(each.p_value.size for each in differences)
    differing = sum(int(each.differs().sum()) for each in differences)
    beyond = sum(int(each.differs_beyond_ink().sum()) for each in differences)
    most = max(differences, key=lambda each: float(np.abs(each.beyond_ink.value).max()))
    (layer, _), value = largest(most.beyond_ink)
    return Finding(
        f"Between {len(differences)} pairs of easily confused classes, {differing} of {places} positions (layer "
        f"and patch) get different attention, {beyond} also with the ink at that position regressed out; most for "
        f"{escape_markdown(names[most.first])} and {escape_markdown(names[most.second])} in layer {layer + 1}, "
        f"{value.text()} of the attention (n = {most.counts[0]} and {most.counts[1]}).",
        figure,
    )


def difference_table(atlas: Atlas) -> Table:
    rows = []
    for each in atlas.differences:
        (layer, patch), most = largest(each.attention)
        row, column = divmod(patch, atlas.grid[1])
        rows.append(
            [
                f"{atlas.names[each.first]} minus {atlas.names[each.second]}",
                f"{each.counts[0]:,} and {each.counts[1]:,}",
                most.text(),
                f"layer {layer + 1}, row {row + 1}, column {column + 1}",
                f"{int(each.differs().sum())} of {each.p_value.size}",
                f"{int(each.differs_beyond_ink().sum())} of {each.p_value.size}",
                each.with_ink.text(0, percent=True),
                f"{int(each.ink_differs().sum())} of {each.ink_p_value.size}",
            ]
        )
    columns = [
        "classes",
        "images",
        "largest difference (share)",
        "where",
        "positions that differ",
        "ink regressed out",
        "of the squares, explained by ink",
        "patches whose ink differs",
    ]
    return Table(
        "Pairs of classes: similar-looking digits, then those that this model confuses most, over "
        f"{of_each_class(atlas.differences)}, with 95 % intervals over images. The largest difference was "
        "selected for its size, so another test set would show a somewhat smaller one there.",
        columns,
        rows,
    )


NO_CLASSES = "Classes are compared on a test set of digits whose classes are known."
CHAPTER = ChapterWriter(
    "Class by class",
    write,
    ("attention_atlas", "attention_atlas_rollout", "attention_atlas_differences"),
    {Need.INK: NO_CLASSES, Need.LABELS: NO_CLASSES},
)

TEXT = """Mean maps over {which}, as shares of the attention on patches. A class's mean map resembles its mean
image, because some heads follow ink; differences between classes are therefore tested twice. First as they are:
positions with a ring differ significantly, corrected over all layers and patches of a pair ({permutations} permutations
of the classes' labels, the largest standardised difference, p < 0.05), and by at least {least:.0%} of the attention.
Then without ink: the attention at each position is regressed linearly on its own ink, and the residuals are tested in
the same way (full dots). The regression is rough: attention may follow ink elsewhere in the image, so a full dot is a
difference that the ink at this position does not explain, not one that no ink explains."""
