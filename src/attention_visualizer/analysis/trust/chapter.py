"""Is the map an explanation? One table, one figure and one sentence for each method."""

from __future__ import annotations

from typing import Any

from attention_visualizer.analysis.needs import ChapterWriter, Need
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.analysis.trust.figure import draw
from attention_visualizer.analysis.trust.measure import PASSES, TrustResult, measure
from attention_visualizer.analysis.trust.verdict import (
    CONTROL_FACTOR,
    DIRECTIONS,
    MAX_LIKENESS,
    MIN_GAIN,
    OPERATOR_NAMES,
    Gain,
)
from attention_visualizer.measures.intervals import Interval
from attention_visualizer.measures.perturbation import OPERATORS
from attention_visualizer.report.chapter import Chapter, FigureFile, Finding, Table


def write(study: Study) -> Chapter:
    rows = study.affordable_rows(PASSES)
    if rows is None:
        return Chapter(CHAPTER.title, "Omitted: it is slow for a model of this size. `subset=50` runs it on 50 images.")
    result = measure(study, rows)
    figure = study.output.save(draw(result), "attention_trust")
    return Chapter(
        CHAPTER.title,
        text_of(result),
        [
            FigureFile(
                figure,
                "Above: probability of the predicted class as patches are removed (deletion) or restored (insertion), "
                f"most relevant first, mean over {result.num_images:,} test images; grey: random and "
                "ink-only baseline rankings. Below: the area gained over these three (trust requires each point right "
                f"of the dashed line, and of the bar of its colour, {CONTROL_FACTOR:g} times the gain of the method's "
                "map with random weights), and the similarity of each map to its map as more and more layers are "
                f"randomised, over {result.num_control_images} images.",
            )
        ],
        [value_table(result), gain_table(result), control_table(result)],
        numbers_of(result),
        finding=Finding(headline(result), figure),
        caution="A map that is not trusted still shows correctly where the attention weights go; it just does not "
        "explain the prediction."
        if not result.trusted
        else "Trust applies to the ranking of patches over many images, not to the map of a single image.",
    )


def headline(result: TrustResult) -> str:
    best = max(result.methods, key=lambda each: float(each.worst.value.value) - each.worst.needed)
    who = "None of the maps is"
    if result.trusted:
        who = f"Of the maps, {', '.join(result.trusted)} {'is' if len(result.trusted) == 1 else 'are'}"
    return (
        f"{who} to be trusted as an explanation of this checkpoint's predictions. The criterion is the class "
        f"probability gained over random and ink-only rankings; the best map, {best.name}, is weakest in "
        f"{best.worst.text} (n = {result.num_images:,})."
    )


def text_of(result: TrustResult) -> str:
    return TEXT.format(
        n=result.num_images,
        least=MIN_GAIN,
        likeness=MAX_LIKENESS,
        beyond=CONTROL_FACTOR,
        controls=result.num_controls,
        randomised=result.num_control_images,
        reasons="\n".join(f"- {each.reason}" for each in result.methods),
    )


def value_table(result: TrustResult) -> Table:
    """Areas, pointing game, mass on ink; baselines below the methods."""
    columns = [
        "ranking by",
        *(f"{direction}, {OPERATOR_NAMES[operator]}" for operator in OPERATORS for direction in DIRECTIONS),
        "top-ranked patch is inked",
        "mass on inked patches",
        "similarity, all weights random (largest)",
    ]
    rows = [
        [
            each.name,
            *(each.areas[operator, direction].text() for operator in OPERATORS for direction in DIRECTIONS),
            each.pointing.text(1, percent=True),
            each.mass.text(),
            "–" if each.closest_control is None else each.closest_control.text(2),
        ]
        for each in result.rankings
    ]
    return Table(
        f"Area under deletion curves (low is good) and insertion curves (high is good), over {result.num_images:,} "
        f"test images (similarity: {result.num_control_images}; {result.num_controls} models with "
        "random weights), with 95 % intervals. The last three rows are the baselines; the first of them has a "
        "uniform map.",
        columns,
        rows,
    )


def gain_table(result: TrustResult) -> Table:
    """Each comparison that trust needs."""
    rows = [
        [gain.comparison, gain.baseline, *(each.gains[index].value.text() for each in result.methods)]
        for index, gain in enumerate(result.methods[0].gains)
    ]
    rows.append(["verdict", "", *("trusted" if each.is_trusted else "not trusted" for each in result.methods)])
    return Table(
        f"Probability gained over the random and ink-only rankings, paired over {result.num_images:,} "
        f"images; trust requires at least {MIN_GAIN} and {CONTROL_FACTOR:g} times the value in the next table in "
        "every row, with the interval above 0.",
        ["gain", "against", *(each.name for each in result.methods)],
        rows,
    )


def control_table(result: TrustResult) -> Table:
    """Each comparison without training."""
    rows = [
        [gain.comparison, gain.baseline, *(control_text(each.gains[index]) for each in result.methods)]
        for index, gain in enumerate(result.methods[0].gains)
    ]
    return Table(
        f"The same for maps with random weights, on the checkpoint's predictions: the largest of "
        f"{result.num_controls} models, {result.num_control_images} images.",
        ["gain", "against", *(each.name for each in result.methods)],
        rows,
    )


def control_text(gain: Gain) -> str:
    return "–" if gain.control is None else gain.control.text()


def numbers_of(result: TrustResult) -> dict[str, Any]:
    return {
        "images": result.num_images,
        "images_randomised": result.num_control_images,
        "controls": result.num_controls,
        "stages": result.stages,
        "least_gain": MIN_GAIN,
        "beyond_controls": CONTROL_FACTOR,
        "most_likeness": MAX_LIKENESS,
        "rankings": {
            each.name: {
                "areas": {
                    f"{direction}, {operator}": value.numbers() for (operator, direction), value in each.areas.items()
                },
                "gains": [
                    {
                        "direction": gain.direction,
                        "operator": gain.operator,
                        "against": gain.baseline,
                        **gain.value.numbers(),
                        "random_weights": numbers_or_null(gain.controls),
                        "needed": gain.needed,
                    }
                    for gain in each.gains
                ],
                "pointing_game": each.pointing.numbers(),
                "mass_on_ink": each.mass.numbers(),
                "likeness": numbers_or_null(each.likeness),
                "likeness_of_controls": numbers_or_null(each.control_likeness),
                "trusted": None if each.name in result.baselines else each.is_trusted,
            }
            for each in result.rankings
        },
    }


def numbers_or_null(value: Interval | None) -> dict[str, Any] | None:
    return None if value is None else value.numbers()


NO_INK = "Maps are tested against ink, on a test set of digits whose classes are known."
OTHER_MODEL = "Maps are tested for this project's Vision Transformer only."
CHAPTER = ChapterWriter(
    "Is the map a faithful explanation?",
    write,
    ("attention_trust",),
    {Need.INK: NO_INK, Need.LABELS: NO_INK, Need.OWN_MODEL: OTHER_MODEL},
)

TEXT = """Patches are removed from {n:,} test images, and restored, in the order of a map; a map that shows what the
prediction depends on makes the probability of the predicted class fall early and rise early. On digits this mostly
measures ink: black patches are background, and removing them changes nothing. So every map has to beat three baseline
rankings, all patches in random order, inked patches in random order and patches by the amount of ink, in deletion and
in insertion, with patches filled with background and with their tokens dropped: by at least {least} in mean probability
each time, the interval above 0. The gain must come from what was learnt: the method's maps of {controls} models with
random weights are tested on this model's predictions for {randomised} of the images, and the gain must be {beyond:g}
times the largest of theirs. And the map must depend on the weights: its rank correlation with the map of each model
with random weights may be at most {likeness}. A map of random weights may be faithful to random predictions, so nothing
is trusted unless the model's accuracy is above chance and above that of random weights.

{reasons}"""
