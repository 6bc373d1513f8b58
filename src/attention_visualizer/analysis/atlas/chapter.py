"""The mean map of each class by layer, and where the maps of easily confused classes differ, beside their ink."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from attention_visualizer.analysis.atlas.measure import LEAST_SHARE, MOST_OF_CLASS, Difference, difference
from attention_visualizer.analysis.needs import ChapterWriter, Need
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.analysis.study.survey import Survey
from attention_visualizer.data import ink
from attention_visualizer.figures.attention_figures import query_name
from attention_visualizer.figures.panels import PanelFigure, Tile, attention_scale, overlay, signed_scale, tile_grid
from attention_visualizer.measures import intervals
from attention_visualizer.measures.intervals import Interval
from attention_visualizer.report.chapter import Chapter, FigureFile, Finding, Table, escape_markdown

Array = NDArray[Any]

ALIKE_DIGITS = (("4", "9"), ("3", "5"), ("3", "8"), ("7", "9"))
MOST_CONFUSED = 2  # pairs of this model's own, besides
MARKED_SIZE = 224


def layer_maps(survey: Survey) -> Array:
    """Mean over heads of the shares: [kept, layer, patch]."""
    return np.nanmean(survey.shares, axis=2)


def class_means(maps: Array, labels: Array, num_classes: int) -> Array:
    """[image, ...] -> [class, ...]; NaN for a class without an image."""
    with np.errstate(invalid="ignore"):
        return np.stack([maps[labels == each].sum(axis=0) / (labels == each).sum() for each in range(num_classes)])


def chosen_pairs(names: list[str], labels: Array, predicted: Array) -> list[tuple[int, int]]:
    """Digits that look alike, and those that this model confuses most, in either direction."""
    alike = [pair for pair in ALIKE_DIGITS if set(pair) <= set(names)]
    pairs = [(names.index(first), names.index(second)) for first, second in alike]
    confused = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(confused, (labels, predicted), 1)
    both = np.triu(confused + confused.T, 1)
    order = np.argsort(-both, axis=None, kind="stable")
    own = [(int(each // len(names)), int(each % len(names))) for each in order if both.flat[each] > 0]
    return pairs + [pair for pair in own if pair not in pairs][:MOST_CONFUSED]


def write(study: Study) -> Chapter:
    survey = study.survey
    labels = survey.labels[survey.kept]
    names = list(study.target.images.class_names)
    maps = layer_maps(survey)
    amount = np.concatenate(
        [
            ink.ink_amount(study.target.images.read(survey.kept[start : start + 1000].tolist()), survey.grid).numpy()
            for start in range(0, len(survey.kept), 1000)
        ]
    )
    means = class_means(maps, labels, len(names))
    rollouts = None
    if survey.rollouts is not None:
        rollouts = class_means(survey.rollouts / survey.rollouts.sum(axis=-1, keepdims=True), labels, len(names))
    of_ink = class_means(amount, labels, len(names))
    differences = []
    for first, second in chosen_pairs(names, labels, survey.predicted[survey.kept]):
        study.progress(f"classes {names[first]} and {names[second]}")
        differences.append(difference(maps, amount, labels, first, second))
    counts = np.bincount(labels, minlength=len(names))
    rows = [f"{name} (n = {count:,})" for name, count in zip(names, counts, strict=True)]
    digits = mean_pictures(study, survey.kept, labels, len(names))
    which = which_images(survey, study.target.images.kind)
    columns = [f"layer {layer + 1}" for layer in range(means.shape[1])]
    whole = study.output.save(
        atlas_figure(
            means,
            digits,
            rows,
            columns,
            "Mean attention by class and layer",
            f"{query_name(readout(survey))}, mean over heads and {which}",
            study,
        ),
        "attention_atlas",
    )
    figures = [
        FigureFile(
            whole,
            "Mean picture and mean attention on each patch by class (down) and layer (across), mean over heads and "
            f"{which}, as a share of the attention on patches.",
        )
    ]
    if rollouts is not None:
        flow = study.output.save(
            atlas_figure(
                rollouts,
                digits,
                rows,
                [f"up to {column}" for column in columns],
                "Mean attention rollout by class and layer",
                f"from the input up to each layer, mean over {which}",
                study,
            ),
            "attention_atlas_rollout",
        )
        figures.append(
            FigureFile(
                flow,
                "Mean picture and mean attention rollout from the input up to each layer (across) by class (down), "
                f"mean over {which}, as a share of what reaches the patches.",
            )
        )
    pairs = study.output.save(difference_figure(differences, names, study), "attention_atlas_differences")
    n = len(survey.kept)
    return Chapter(
        CHAPTER.title,
        TEXT.format(which=which, least=LEAST_SHARE, permutations=intervals.PERMUTATIONS),
        [
            *figures,
            FigureFile(
                pairs,
                "Differences between the mean maps of two classes, in shares of the attention on patches "
                f"({of_each_class(differences)}). Ring: beyond "
                f"chance (p < 0.05 for all places of a pair together) and at least {LEAST_SHARE:.0%}; full dot: also "
                "without what goes with the place's ink. Last: the difference of the ink, rings where it is beyond "
                "chance.",
            ),
        ],
        [difference_table(differences, names, survey.grid)],
        {
            "images": n,
            "class_names": names,
            "mean_maps": rounded(means),
            "mean_rollouts": None if rollouts is None else rounded(rollouts),
            "ink": rounded(of_ink),
            "pairs": [
                {
                    "classes": [names[each.first], names[each.second]],
                    "images": list(each.counts),
                    "attention": interval_values(each.attention),
                    "p_value": each.p_value.tolist(),
                    "beyond_ink": interval_values(each.beyond_ink),
                    "beyond_ink_p_value": each.beyond_ink_p_value.tolist(),
                    "with_ink": interval_values(each.with_ink),
                    "ink": interval_values(each.ink),
                    "ink_p_value": each.ink_p_value.tolist(),
                }
                for each in differences
            ],
        },
        finding=finding_of(differences, names, pairs) if differences else None,
        caution="Mean maps of two classes differ where their ink does. Only what is left after each place's own ink is "
        "taken out can be attention's own, and that line through the ink is a rough model of it.",
    )


def rounded(values: Array) -> Any:
    """For JSON, which knows no NaN."""
    return np.where(np.isnan(values), None, np.round(values.astype(np.float64), 6)).tolist()  # type: ignore[call-overload]


def interval_values(interval: Interval) -> dict[str, Any]:
    ends = {"value": interval.value, "low": interval.low, "high": interval.high}
    return {name: rounded(each) for name, each in ends.items()} | {"n": interval.n}


def which_images(survey: Survey, kind: str) -> str:
    """Of which images the maps are: "10,000 test images", and how they were chosen if they are not all."""
    n = len(survey.kept)
    chosen = f" of {survey.num_images:,}, each class in its share" if n < survey.num_images else ""
    return f"{n:,} {kind}s{chosen}"


def of_each_class(differences: list[Difference]) -> str:
    """Which images a class's mean is of."""
    most = max((count for each in differences for count in each.counts), default=0)
    return (
        f"the first {MOST_OF_CLASS:,} images of each class" if most == MOST_OF_CLASS else "all images of both classes"
    )


def largest(interval: Interval) -> tuple[tuple[int, int], Interval]:
    """Where [layer, patch] a difference is largest, and what it is there."""
    layer, patch = np.unravel_index(int(np.abs(interval.value).argmax()), interval.value.shape)
    return (int(layer), int(patch)), interval[layer, patch]


def finding_of(differences: list[Difference], names: list[str], figure: str) -> Finding:
    places = sum(each.p_value.size for each in differences)
    differing = sum(int(each.differs().sum()) for each in differences)
    beyond = sum(int(each.differs_beyond_ink().sum()) for each in differences)
    most = max(differences, key=lambda each: float(np.abs(each.beyond_ink.value).max()))
    (layer, _), there = largest(most.beyond_ink)
    return Finding(
        f"Between {len(differences)} pairs of easily confused classes, {differing} of {places} places (layer and "
        f"patch) get different attention, {beyond} also when what goes with the place's ink is taken out; most for "
        f"{escape_markdown(names[most.first])} and {escape_markdown(names[most.second])} in layer {layer + 1}, "
        f"{there.text()} of the attention (n = {most.counts[0]} and {most.counts[1]}).",
        figure,
    )


def difference_table(differences: list[Difference], names: list[str], grid: tuple[int, int]) -> Table:
    rows = []
    for each in differences:
        (layer, patch), most = largest(each.attention)
        row, column = divmod(patch, grid[1])
        rows.append(
            [
                f"{names[each.first]} minus {names[each.second]}",
                f"{each.counts[0]:,} and {each.counts[1]:,}",
                most.text(),
                f"layer {layer + 1}, row {row + 1}, column {column + 1}",
                f"{int(each.differs().sum())} of {each.p_value.size}",
                f"{int(each.differs_beyond_ink().sum())} of {each.p_value.size}",
                each.with_ink.text(0, percent=True),
                f"{int((each.ink_p_value < intervals.LEVEL).sum())} of {each.ink_p_value.size}",
            ]
        )
    columns = [
        "classes",
        "images",
        "largest difference (share)",
        "where",
        "places that differ",
        "without their ink",
        "of the squares, goes with ink",
        "patches whose ink differs",
    ]
    return Table(
        "Pairs of classes: digits that look alike, then those that this model confuses most, over "
        f"{of_each_class(differences)}, with 95 % intervals over images. The largest difference was picked for its "
        "size, so that another test set would show somewhat less there.",
        columns,
        rows,
    )


def atlas_figure(
    means: Array,
    digits: Array,
    row_names: list[str],
    column_names: list[str],
    headline: str,
    subtitle: str,
    study: Study,
) -> PanelFigure:
    """A row a class: the mean picture, then its mean map in each layer over it. means: [class, layer, patch]."""
    grid = study.survey.grid
    num_patches = means.shape[-1]
    tiles: list[list[Tile | None]] = [
        [Tile(digit), *(Tile(rgb) for rgb in overlay(digit, each.reshape(-1, *grid), num_patches))]
        for digit, each in zip(digits, means, strict=True)
    ]
    return tile_grid(
        tiles,
        headline,
        subtitle,
        column_titles=["mean picture", *column_names],
        row_titles=row_names,
        tile_size=84,
        scale=replace(attention_scale(num_patches), title=f"share / even share (1/{num_patches})"),
    )


def difference_figure(differences: list[Difference], names: list[str], study: Study) -> PanelFigure:
    """A row a pair of classes: the difference by layer, then that of the ink."""
    grid = study.survey.grid
    reach = max(float(np.abs(each.attention.value).max()) for each in differences)
    ink_reach = max(float(np.abs(each.ink.value).max()) for each in differences)
    scale = signed_scale(reach, "difference of the share of attention", "PuOr_r")
    ink_scale = signed_scale(ink_reach, "difference of the ink", "RdGy_r")
    tiles: list[list[Tile | None]] = []
    for each in differences:
        row: list[Tile | None] = [
            Tile(marked(scale.to_rgb(values.reshape(grid)), differs.reshape(grid), beyond.reshape(grid)))
            for values, differs, beyond in zip(
                each.attention.value, each.differs(), each.differs_beyond_ink(), strict=True
            )
        ]
        of_ink = (each.ink_p_value < intervals.LEVEL).reshape(grid)
        row.append(Tile(marked(ink_scale.to_rgb(each.ink.value.reshape(grid)), of_ink, np.zeros(grid, bool))))
        tiles.append(row)
    return tile_grid(
        tiles,
        "Where the maps of two classes differ",
        "first class minus second; ring: beyond chance; full dot: also without what goes with the place's ink",
        column_titles=[*(f"layer {layer + 1}" for layer in range(len(differences[0].p_value))), "ink"],
        row_titles=[f"{names[each.first]} minus {names[each.second]}" for each in differences],
        tile_size=96,
        scale=scale,
        second_scale=ink_scale,
    )


def marked(rgb: Array, ring: Array, dot: Array) -> Array:
    """A grid of colours [height, width, 3], enlarged, with marks in its cells."""
    cell = max(12, MARKED_SIZE // max(rgb.shape[:2]))
    drawn = np.ascontiguousarray(rgb.repeat(cell, axis=0).repeat(cell, axis=1))
    radius, edge = cell // 7, max(1, cell // 18)
    for row, column in np.argwhere(ring | dot):
        center = (int((column + 0.5) * cell), int((row + 0.5) * cell))
        width = max(2, cell // 20)
        # A light edge, for dark cells.
        if dot[row, column]:
            cv2.circle(drawn, center, radius + edge, (255, 255, 255), -1, cv2.LINE_AA)
            cv2.circle(drawn, center, radius, (17, 17, 17), -1, cv2.LINE_AA)
        else:
            cv2.circle(drawn, center, radius, (255, 255, 255), width + 2 * edge, cv2.LINE_AA)
            cv2.circle(drawn, center, radius, (17, 17, 17), width, cv2.LINE_AA)
    return drawn


def mean_pictures(study: Study, numbers: Array, labels: Array, num_classes: int) -> Array:
    """The mean picture of each class: uint8 [class, height, width, channel]."""
    channels, height, width = study.target.images.shape
    sums = np.zeros((num_classes, channels, height, width))
    for start in range(0, len(numbers), 1000):
        pictures = study.target.images.read(numbers[start : start + 1000].tolist()).numpy()
        np.add.at(sums, labels[start : start + 1000], pictures)
    counts = np.maximum(np.bincount(labels, minlength=num_classes), 1)
    return (sums / counts[:, None, None, None]).round().astype(np.uint8).transpose(0, 2, 3, 1)


def readout(survey: Survey) -> Literal["cls", "patches"]:
    return "cls" if survey.reads_class_token else "patches"


NO_CLASSES = "Classes are compared on a test set of digits whose classes are known."
CHAPTER = ChapterWriter(
    "Class by class",
    write,
    ("attention_atlas", "attention_atlas_rollout", "attention_atlas_differences"),
    {Need.INK: NO_CLASSES, Need.LABELS: NO_CLASSES},
)

TEXT = """Mean maps over {which}, as shares of the attention on patches. A class's mean map follows its mean
picture, because heads that follow ink do; what classes differ in is shown twice. First as it is: places with a ring
differ beyond chance, for all layers and patches of a pair together ({permutations} permutations of the classes'
labels, the largest standardised difference, p < 0.05), and by at least {least:.0%} of the attention. Then without
ink: each place's attention is predicted from its own ink by a line, and what is left is tested alike (full dots). The
line is rough: attention may follow ink elsewhere in the picture, so a full dot is a difference that this place's ink
does not explain, not one that no ink explains."""
