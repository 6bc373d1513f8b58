"""The mean map of each class by layer, and where the maps of easily confused classes differ, beside their ink."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from attention_visualizer.analysis.atlas.figure import draw_differences, draw_maps, draw_rollouts
from attention_visualizer.analysis.atlas.measure import MIN_SHARE, Atlas, measure
from attention_visualizer.analysis.needs import ChapterWriter, Need
from attention_visualizer.analysis.study.output import Output
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.measures import intervals
from attention_visualizer.measures.intervals import Interval
from attention_visualizer.report.chapter import Chapter, FigureFile, Finding, Table

Array = NDArray[Any]


def write(study: Study) -> Chapter:
    atlas = measure(study)
    files = save_figures(atlas, study.output)
    return Chapter(
        CHAPTER.title,
        TEXT.format(which=atlas.images, least=MIN_SHARE, flips=intervals.PERMUTATIONS, level=intervals.CHAPTER_LEVEL),
        files,
        [regression_table(atlas), difference_table(atlas)] if atlas.differences else [],
        numbers_of(atlas),
        finding=finding_of(atlas, files[-1].name) if atlas.differences else None,
        caution="Mean maps of two classes differ where their ink does. What no regression on the ink predicts may "
        "still be a function of the image that none of them describes.",
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
            "Differences between the mean maps of two classes, in shares of the attention on patches. Ring: "
            f"significant (p < {intervals.CHAPTER_LEVEL:g}, corrected over all places of all pairs) and at least "
            f"{MIN_SHARE:.0%}; full dot: so, too, beyond each regression on ink and pixels. Last: difference of "
            "the ink, ringed if significant.",
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
        "taken_out": [
            {"what": each.taken_out, "regressors": each.regressors, "predicted": each.predicted}
            for each in atlas.regressions
        ],
        "pairs": [
            {
                "classes": [atlas.names[each.first], atlas.names[each.second]],
                "confused": each.confused,
                "images": each.counts,
                "attention": rounded_interval(each.attention),
                "p_value": each.p_value,
                "ink": rounded_interval(each.ink),
                "ink_p_value": each.ink_p_value,
                "largest_on_half": each.largest,
                "largest_on_other_half": rounded_interval(each.largest_elsewhere),
            }
            for each in atlas.differences
        ],
    }


def rounded(values: Array) -> Array:
    return np.round(values.astype(np.float64), 6)


def rounded_interval(interval: Interval) -> dict[str, Any]:
    value, low, high = map(rounded, (interval.value, interval.low, interval.high))
    return Interval(value, low, high, interval.n).numbers()


def finding_of(atlas: Atlas, figure: str) -> Finding:
    places = atlas.differ[0, 0]
    return Finding(
        f"Easily confused classes get different attention at {places.sum()} of {places.size} positions (layer and "
        f"patch, {len(atlas.differences)} pairs of classes). Beyond every regression on ink and pixels they do at "
        f"{beyond_everything(atlas).sum()}.",
        figure,
        rank=6,
    )


def beyond_everything(atlas: Atlas) -> Array:
    """Return where the classes of a pair differ whatever was taken out: bool [pair, layer, patch]."""
    return np.asarray(atlas.differ.all(axis=(0, 1)))


def regression_table(atlas: Atlas) -> Table:
    beyond = beyond_everything(atlas)
    rows = [
        [
            regression.taken_out,
            str(regression.regressors),
            f"{regression.predicted:.0%}",
            *(str(there.sum()) for there in (of_all, of_pair, of_all & of_pair)),
        ]
        for regression, of_all, of_pair in zip(atlas.regressions, *atlas.differ, strict=True)
    ]
    return Table(
        f"Of {beyond.size} positions (layer and patch, {len(atlas.differences)} pairs of classes), how many get "
        "different attention when something is taken out of maps and classes by regression, out of fold. The last row "
        "counts those that differ in every other row.",
        [
            "taken out",
            "regressors",
            "of the maps' variance, predicted",
            "regression over all images",
            "over the pair's images",
            "both",
        ],
        [*rows, ["each of these", "–", "–", "–", "–", str(beyond.sum())]],
    )


def difference_table(atlas: Atlas) -> Table:
    first = atlas.differences[0]
    per_pair, num_patches = first.differs_in_all.size, first.ink_differs.size
    rows = []
    for each in atlas.differences:
        layer, patch = each.largest
        row, column = divmod(patch, atlas.grid[1])
        rows.append(
            [
                f"{atlas.names[each.first]} minus {atlas.names[each.second]}",
                "look alike" if each.confused is None else f"confused {each.confused} times (picked afterwards)",
                f"{each.counts[0]:,} and {each.counts[1]:,}",
                f"layer {layer + 1}, row {row + 1}, column {column + 1}",
                each.largest_elsewhere.text(),
                str(each.differs[0, 0].sum()),
                str(each.differs_in_all.sum()),
                str(each.ink_differs.sum()),
            ]
        )
    columns = [
        "classes",
        "why",
        "images",
        "largest on half of the images",
        "there, on the other half (share)",
        f"positions that differ (of {per_pair})",
        "beyond each regression",
        f"patches whose ink differs (of {num_patches})",
    ]
    return Table(
        "Pairs of classes: similar-looking digits, named beforehand, then those that this model confuses most on the "
        "same images. Where a difference is largest was chosen on half of the images of both classes; its value (95% "
        "interval over images) is of the other half.",
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

TEXT = """Does the model look at different places for classes that it could confuse? The maps are means over {which},
as shares of the attention on patches. Some heads follow ink, so a class's mean map resembles its mean image. Each
difference between two classes is therefore tested several times.

**Ring**: the mean attention of the two classes differs here by at least {least:.0%} of the attention, more than
chance allows. The test corrects for all layers and patches of all pairs together ({flips} random signs of the images'
residuals, the largest standardised difference, p < {level:g}).

**Full dot**: the difference stays significant and of that size after each of five regressions on the image
({{table:1}}): on the ink of the position; the inks of all patches; their squares and products; their softmax at four
strengths; all inks and the main components of the pixels. Each is fitted over all images, and over those of the two
classes alone. The class is regressed on the same, so p says whether it predicts attention beyond the regressors. The
size is what is left.

A full dot is a difference that none of these regressions describes: attention is still a function of the pixels. No
dot does not mean no difference: what predicts attention predicts the class, too."""
