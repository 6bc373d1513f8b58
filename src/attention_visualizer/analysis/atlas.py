"""The mean map of each class by layer, and where the maps of easily confused classes differ, beside their ink."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from attention_visualizer import inference, ink
from attention_visualizer.analysis.study import Study
from attention_visualizer.analysis.survey import Survey
from attention_visualizer.attention_figures import query_name
from attention_visualizer.chapter import Chapter, FigureFile, Finding, Table, escape_markdown
from attention_visualizer.panels import Picture, Tile, attention_scale, overlay, signed_scale, tile_grid
from attention_visualizer.pictures import LabelledImages

Array = NDArray[Any]

ALIKE_DIGITS = (("4", "9"), ("3", "5"), ("3", "8"), ("7", "9"))
MOST_CONFUSED = 2  # pairs of this model's own, besides
MARKED_SIZE = 224
MOST_OF_CLASS = 1000  # pictures of one class in a permutation test: bounds memory
LEAST_SHARE = 0.01  # stated beforehand: a difference of less than this share of the attention is not shown as one


@dataclass(frozen=True)
class Difference:
    """Between the mean maps of two classes. attention, p_value: [layer, patch], shares of the attention on patches;
    ink, ink_p_value: [patch], brightness 0 to 1. beyond_ink, beyond_ink_p_value: [layer, patch], what is left of the
    difference when each place's attention is predicted from its own ink. p-values hold for all places of a pair.
    """

    first: int
    second: int
    counts: tuple[int, int]
    attention: Array
    p_value: Array
    beyond_ink: Array
    beyond_ink_p_value: Array
    ink: Array
    ink_p_value: Array

    def differs(self) -> Array:
        """bool [layer, patch]"""
        return np.asarray((self.p_value < inference.LEVEL) & (np.abs(self.attention) >= LEAST_SHARE))

    def differs_beyond_ink(self) -> Array:
        return np.asarray((self.beyond_ink_p_value < inference.LEVEL) & (np.abs(self.beyond_ink) >= LEAST_SHARE))


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


def without_ink(maps: Array, amount: Array) -> Array:
    """What the ink of a place does not predict of its attention, by a line for each layer and place.

    maps: [image, layer, patch]; amount: [image, patch] -> residuals [image, layer, patch], of mean 0.
    """
    ink_centred = (amount - amount.mean(axis=0))[:, None]
    maps_centred = maps - maps.mean(axis=0)
    spread = (ink_centred**2).sum(axis=0)
    slope = np.divide(
        (maps_centred * ink_centred).sum(axis=0), spread, out=np.zeros(maps.shape[1:]), where=spread > 1e-9
    )
    return maps_centred - slope * ink_centred


def difference(maps: Array, amount: Array, labels: Array, first: int, second: int, seed: int = 0) -> Difference:
    """maps: [image, layer, patch]; amount: ink, [image, patch]; labels: [image]."""
    rows = [np.flatnonzero(labels == each)[:MOST_OF_CLASS] for each in (first, second)]
    both = np.concatenate(rows)
    left = without_ink(maps[both], amount[both])
    count = len(rows[0])
    attention, p_value = inference.largest_difference_test(maps[rows[0]], maps[rows[1]], seed=seed)
    beyond, beyond_p_value = inference.largest_difference_test(left[:count], left[count:], seed=seed)
    of_ink, ink_p_value = inference.largest_difference_test(amount[rows[0]], amount[rows[1]], seed=seed)
    return Difference(
        first, second, (count, len(rows[1])), attention, p_value, beyond, beyond_p_value, of_ink, ink_p_value
    )


def write(study: Study) -> Chapter:
    title = "Class by class"
    if not isinstance(study.pictures, LabelledImages) or study.pictures.labels is None:
        return Chapter(title, "Classes are compared on a test set of digits whose classes are known.")
    survey = study.survey
    labels = survey.labels[survey.kept]
    names = list(study.pictures.class_names)
    maps = layer_maps(survey)
    amount = np.concatenate(
        [
            ink.ink_amount(study.pictures.read(survey.kept[start : start + 1000].tolist()), survey.grid).numpy()
            for start in range(0, len(survey.kept), 1000)
        ]
    )
    means = class_means(maps, labels, len(names))
    rollouts = None
    if survey.rollouts is not None:
        last = survey.rollouts[:, -1]
        rollouts = class_means(last / last.sum(axis=-1, keepdims=True), labels, len(names))
    of_ink = class_means(amount, labels, len(names))
    differences = []
    for first, second in chosen_pairs(names, labels, survey.predicted[survey.kept]):
        study.progress(f"classes {names[first]} and {names[second]}")
        differences.append(difference(maps, amount, labels, first, second))
    counts = np.bincount(labels, minlength=len(names))
    rows = [f"{name} (n = {count:,})" for name, count in zip(names, counts, strict=True)]
    digits = mean_pictures(study, survey.kept, labels, len(names))
    whole = study.save(atlas_figure(means, rollouts, digits, rows, study), "attention_atlas")
    pairs = study.save(difference_figure(differences, names, study), "attention_atlas_differences")
    n = len(survey.kept)
    return Chapter(
        title,
        TEXT.format(n=n, least=LEAST_SHARE, permutations=inference.PERMUTATIONS),
        [
            FigureFile(
                whole,
                "Mean picture and mean attention on each patch by class (down) and layer (across), mean over heads and "
                f"{n:,} test images, as a share of the attention on patches; last, the rollout through all layers.",
            ),
            FigureFile(
                pairs,
                "Differences between the mean maps of two classes, in shares of the attention on patches. Ring: beyond "
                f"chance (p < 0.05 for all places of a pair together) and at least {LEAST_SHARE:.0%}; full dot: also "
                "without what goes with the place's ink. Last: the difference of the ink, rings where it is beyond "
                "chance.",
            ),
        ],
        [difference_table(differences, names)],
        {
            "images": n,
            "class_names": names,
            "mean_maps": rounded(means),
            "ink": rounded(of_ink),
            "pairs": [
                {
                    "classes": [names[each.first], names[each.second]],
                    "images": list(each.counts),
                    "attention": rounded(each.attention),
                    "p_value": each.p_value.tolist(),
                    "beyond_ink": rounded(each.beyond_ink),
                    "beyond_ink_p_value": each.beyond_ink_p_value.tolist(),
                    "ink": rounded(each.ink),
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


def explained_by_ink(each: Difference) -> float:
    """The share of a difference's squares, over layers and places, that goes with the ink of the pictures."""
    total = float((each.attention**2).sum())
    return 1 - float((each.beyond_ink**2).sum()) / total if total else float("nan")


def finding_of(differences: list[Difference], names: list[str], figure: str) -> Finding:
    places = sum(each.attention.size for each in differences)
    differing = sum(int(each.differs().sum()) for each in differences)
    beyond = sum(int(each.differs_beyond_ink().sum()) for each in differences)
    most = max(differences, key=lambda each: float(np.abs(each.beyond_ink).max()))
    layer, patch = np.unravel_index(int(np.abs(most.beyond_ink).argmax()), most.beyond_ink.shape)
    return Finding(
        f"Between {len(differences)} pairs of easily confused classes, {differing} of {places} places (layer and "
        f"patch) get different attention, {beyond} also when what goes with the place's ink is taken out; most for "
        f"{escape_markdown(names[most.first])} and {escape_markdown(names[most.second])} in layer {layer + 1}, "
        f"{most.beyond_ink[layer, patch]:+.3f} of the attention (n = {most.counts[0]} and {most.counts[1]}).",
        figure,
    )


def difference_table(differences: list[Difference], names: list[str]) -> Table:
    rows = []
    for each in differences:
        rows.append(
            [
                f"{names[each.first]} and {names[each.second]}",
                f"{each.counts[0]} and {each.counts[1]}",
                f"{float(np.abs(each.attention).max()):.3f}",
                f"{int(each.differs().sum())} of {each.attention.size}",
                f"{int(each.differs_beyond_ink().sum())} of {each.attention.size}",
                f"{explained_by_ink(each):.0%}",
                f"{int((each.ink_p_value < inference.LEVEL).sum())} of {each.ink.size}",
            ]
        )
    columns = [
        "classes",
        "images",
        "largest difference (share)",
        "places that differ",
        "without their ink",
        "of the squares, goes with ink",
        "patches whose ink differs",
    ]
    return Table("Pairs of classes: digits that look alike, then those that this model confuses most.", columns, rows)


def atlas_figure(means: Array, rollouts: Array | None, digits: Array, row_names: list[str], study: Study) -> Picture:
    """A row a class: the mean picture, then its mean map by layer and the rollout, over it."""
    grid = study.survey.grid
    num_patches = means.shape[-1]
    titles = [f"layer {layer + 1}" for layer in range(means.shape[1])]
    maps = means if rollouts is None else np.concatenate([means, rollouts[:, None]], axis=1)
    tiles: list[list[Tile | None]] = [
        [Tile(digit), *(Tile(rgb) for rgb in overlay(digit, each.reshape(-1, *grid), num_patches))]
        for digit, each in zip(digits, maps, strict=True)
    ]
    scale = replace(attention_scale(num_patches), title=f"share / even share (1/{num_patches})")
    return tile_grid(
        tiles,
        "Mean attention by class and layer",
        f"{query_name(readout(study.survey))}, mean over heads and {len(study.survey.kept):,} test images",
        column_titles=["mean picture", *titles, *([] if rollouts is None else ["rollout"])],
        row_titles=row_names,
        face_note=study.face_note,
        tile_size=84,
        scale=scale,
    )


def difference_figure(differences: list[Difference], names: list[str], study: Study) -> Picture:
    """A row a pair of classes: the difference by layer, then that of the ink."""
    grid = study.survey.grid
    reach = max(float(np.abs(each.attention).max()) for each in differences)
    ink_reach = max(float(np.abs(each.ink).max()) for each in differences)
    scale = signed_scale(reach, "difference of the share of attention", "PuOr_r")
    ink_scale = signed_scale(ink_reach, "difference of the ink", "RdGy_r")
    tiles: list[list[Tile | None]] = []
    for each in differences:
        row: list[Tile | None] = [
            Tile(marked(scale.to_rgb(values.reshape(grid)), differs.reshape(grid), beyond.reshape(grid)))
            for values, differs, beyond in zip(each.attention, each.differs(), each.differs_beyond_ink(), strict=True)
        ]
        of_ink = (each.ink_p_value < inference.LEVEL).reshape(grid)
        row.append(Tile(marked(ink_scale.to_rgb(each.ink.reshape(grid)), of_ink, np.zeros(grid, bool))))
        tiles.append(row)
    return tile_grid(
        tiles,
        "Where the maps of two classes differ",
        "first class minus second; ring: beyond chance; full dot: also without what goes with the place's ink",
        column_titles=[*(f"layer {layer + 1}" for layer in range(len(differences[0].attention))), "ink"],
        row_titles=[f"{names[each.first]} minus {names[each.second]}" for each in differences],
        face_note=study.face_note,
        tile_size=96,
        scale=scale,
        second_scale=ink_scale,
    )


def marked(rgb: Array, ring: Array, dot: Array) -> Array:
    """A grid of colours [height, width, 3], enlarged, with marks in its cells."""
    cell = max(12, MARKED_SIZE // max(rgb.shape[:2]))
    drawn = np.ascontiguousarray(rgb.repeat(cell, axis=0).repeat(cell, axis=1))
    for row, column in np.argwhere(ring | dot):
        center = (int((column + 0.5) * cell), int((row + 0.5) * cell))
        cv2.circle(drawn, center, cell // 7, (17, 17, 17), -1 if dot[row, column] else max(1, cell // 30), cv2.LINE_AA)
    return drawn


def mean_pictures(study: Study, numbers: Array, labels: Array, num_classes: int) -> Array:
    """The mean picture of each class: uint8 [class, height, width, channel]."""
    channels, height, width = study.pictures.shape
    sums = np.zeros((num_classes, channels, height, width))
    for start in range(0, len(numbers), 1000):
        pictures = study.pictures.read(numbers[start : start + 1000].tolist()).numpy()
        np.add.at(sums, labels[start : start + 1000], pictures)
    counts = np.maximum(np.bincount(labels, minlength=num_classes), 1)
    return (sums / counts[:, None, None, None]).round().astype(np.uint8).transpose(0, 2, 3, 1)


def readout(survey: Survey) -> Literal["cls", "patches"]:
    return "cls" if survey.reads_class_token else "patches"


TEXT = """Mean maps over {n:,} test images, as shares of the attention on patches. A class's mean map follows its mean
picture, because heads that follow ink do; what classes differ in is shown twice. First as it is: places with a ring
differ beyond chance, for all layers and patches of a pair together ({permutations} permutations of the classes'
labels, the largest standardised difference, p < 0.05), and by at least {least:.0%} of the attention. Then without
ink: each place's attention is predicted from its own ink by a line, and what is left is tested alike (full dots). The
line is rough: attention may follow ink elsewhere in the picture, so a full dot is a difference that this place's ink
does not explain, not one that no ink explains."""
