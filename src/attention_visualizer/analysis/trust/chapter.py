"""Is the map an explanation? One table, one figure and one sentence for each method."""

from __future__ import annotations

from typing import Any

from attention_visualizer.analysis.needs import ChapterWriter, Need
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.analysis.trust.figure import draw
from attention_visualizer.analysis.trust.measure import PASSES, TrustResult, measure
from attention_visualizer.analysis.trust.verdict import (
    BEYOND_CONTROLS,
    DIRECTIONS,
    LEAST_GAIN,
    MOST_LIKENESS,
    OPERATOR_NAMES,
    Gain,
)
from attention_visualizer.measures.intervals import Interval
from attention_visualizer.measures.perturbation import OPERATORS
from attention_visualizer.report.chapter import Chapter, FigureFile, Finding, Table


def write(study: Study) -> Chapter:
    rows = study.affordable_rows(PASSES)
    if rows is None:
        return Chapter(
            CHAPTER.title, "Left out: it is long for a model of this size. `subset=50` does it for 50 images."
        )
    result = measure(study, rows)
    figure = study.output.save(draw(result), "attention_trust")
    return Chapter(
        CHAPTER.title,
        text_of(result),
        [
            FigureFile(
                figure,
                "Above: probability of the predicted class as patches are removed (deletion) or restored (insertion), "
                f"most relevant first, mean over {result.num_images:,} test images; grey: rankings that know nothing, "
                "or only the ink. Below: the area gained over those three (trust needs each point right of the dashed "
                f"line, and of the bar of its colour, {BEYOND_CONTROLS:g} times what the same method's map of random "
                "weights gains), and the likeness of each map to that of ever more random weights, over "
                f"{result.num_control_images} images.",
            )
        ],
        [value_table(result), gain_table(result), control_table(result)],
        numbers_of(result),
        finding=Finding(headline(result), figure),
        caution="Where a map was found not to be trusted, it still shows truly where the weights go; it is only no "
        "explanation of the answer."
        if not result.trusted
        else "Trust is for the ranking of patches over many images, not for a single picture's map.",
    )


def headline(result: TrustResult) -> str:
    best = max(result.methods, key=lambda each: float(each.worst.value.value) - each.worst.needed)
    who = "None of the maps is"
    if result.trusted:
        who = f"Of the maps, {', '.join(result.trusted)} {'is' if len(result.trusted) == 1 else 'are'}"
    return (
        f"{who} to be trusted as an explanation of this checkpoint's answers. What counts is the class's probability "
        f"gained over rankings that know nothing or only the ink; the best map, {best.name}, does worst in "
        f"{best.worst.text} (n = {result.num_images:,})."
    )


def text_of(result: TrustResult) -> str:
    return TEXT.format(
        n=result.num_images,
        least=LEAST_GAIN,
        likeness=MOST_LIKENESS,
        beyond=BEYOND_CONTROLS,
        controls=result.num_controls,
        randomised=result.num_control_images,
        reasons="\n".join(f"- {each.reason}" for each in result.methods),
    )


def value_table(result: TrustResult) -> Table:
    """Areas, pointing game, mass on ink; baselines below the methods."""
    columns = [
        "ranking by",
        *(f"{direction}, {OPERATOR_NAMES[operator]}" for operator in OPERATORS for direction in DIRECTIONS),
        "highest patch holds ink",
        "mass on inked patches",
        "likeness, all weights random (largest)",
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
        f"test images (likeness: {result.num_control_images}; {result.num_controls} models with "
        "random weights), with 95 % intervals. The last three rows are the baselines; the first of them has an even "
        "map.",
        columns,
        rows,
    )


def gain_table(result: TrustResult) -> Table:
    """Each comparison that trust needs."""
    rows = [
        [gain.comparison, gain.baseline, *(each.gains[index].value.text() for each in result.methods)]
        for index, gain in enumerate(result.methods[0].gains)
    ]
    rows.append(["verdict", "", *("trust" if each.is_trusted else "do not trust" for each in result.methods)])
    return Table(
        f"Probability gained over the rankings that know nothing or only the ink, paired over {result.num_images:,} "
        f"images; trust needs at least {LEAST_GAIN} and {BEYOND_CONTROLS:g} times the value in the next table in every "
        "row, with the interval above 0.",
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
        f"The same where the map is that of random weights, and the answers are the checkpoint's: the largest of "
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
        "least_gain": LEAST_GAIN,
        "beyond_controls": BEYOND_CONTROLS,
        "most_likeness": MOST_LIKENESS,
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


NO_INK = "Maps are put to the test against ink, on a test set of digits whose classes are known."
OTHER_MODEL = "Maps are put to the test for this project's Vision Transformer only."
CHAPTER = ChapterWriter(
    "Is the map an explanation?",
    write,
    ("attention_trust",),
    {Need.INK: NO_INK, Need.LABELS: NO_INK, Need.OWN_MODEL: OTHER_MODEL},
)

TEXT = """Patches are taken from {n:,} test images in the order of a map, and put back in it; a map that shows what the
answer rests on makes the probability of the predicted class fall early and rise early. On digits this mostly measures
ink: black patches are background, and removing them removes nothing. So every map has to beat three rankings that know
nothing or only the ink, all patches in random order, inked patches in random order and patches by the amount of ink, in
deletion and in insertion, with patches painted as background and with their tokens left out: by at least {least} in
mean probability each time, the interval above 0. It has to gain by what was learnt: the same method's maps of
{controls} models with random weights are put to the same test, on this model's answers to {randomised} of the images,
and it needs {beyond:g} times the most that any of them gains. And it has to depend on the weights: with all of them
random, its rank correlation with the trained map may be {likeness} at most, for each of the random weights. A map of
random weights may well find what moves a random answer, so nothing is trusted where the model answers no better than by
chance, or than random weights do.

{reasons}"""
