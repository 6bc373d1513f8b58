"""Is the map an explanation? One table, one figure and one sentence for each method."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attention_visualizer.analysis.needs import ChapterWriter, Need
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.analysis.trust.measure import (
    AMOUNT,
    BASELINES,
    BEYOND_CONTROLS,
    DIRECTIONS,
    INKED,
    LEAST_GAIN,
    MOST_LIKENESS,
    OPERATOR_NAMES,
    PASSES,
    RANDOM,
    Gain,
    TrustResult,
    try_methods,
)
from attention_visualizer.figures import charts
from attention_visualizer.measures.intervals import Interval
from attention_visualizer.measures.perturbation import OPERATORS
from attention_visualizer.report.chapter import Chapter, FigureFile, Finding, Table


def write(study: Study) -> Chapter:
    numbers = study.affordable_rows(PASSES)
    if numbers is None:
        return Chapter(
            CHAPTER.title, "Left out: it is long for a model of this size. `subset=50` does it for 50 images."
        )
    trial = try_methods(study, numbers)
    figure = study.output.save(trust_figure(trial), "attention_trust")
    trusted = [each.name for each in trial.methods if each.trusted]
    return Chapter(
        CHAPTER.title,
        text_of(trial),
        [
            FigureFile(
                figure,
                "Above: probability of the predicted class as patches are removed (deletion) or restored (insertion), "
                f"most relevant first, mean over {trial.num_pictures:,} test images; grey: rankings that know nothing, "
                "or only the ink. Below: the area gained over those three (trust needs each point right of the dashed "
                f"line, and of the bar of its colour, {BEYOND_CONTROLS:g} times what the same method's map of random "
                "weights gains), and the likeness of each map to that of ever more random weights, over "
                f"{trial.num_randomised} images.",
            )
        ],
        [value_table(trial), gain_table(trial), control_table(trial)],
        numbers_of(trial),
        finding=Finding(headline(trial, trusted), figure),
        caution="Where a map was found not to be trusted, it still shows truly where the weights go; it is only no "
        "explanation of the answer."
        if not trusted
        else "Trust is for the ranking of patches over many images, not for a single picture's map.",
    )


def headline(trial: TrustResult, trusted: list[str]) -> str:
    best = max(trial.methods, key=lambda each: float(each.worst.value.value) - each.worst.needed)
    who = (
        "None of the maps is"
        if not trusted
        else f"Of the maps, {', '.join(trusted)} {'is' if len(trusted) == 1 else 'are'}"
    )
    return (
        f"{who} to be trusted as an explanation of this checkpoint's answers. What counts is the class's probability "
        f"gained over rankings that know nothing or only the ink; the best map, {best.name}, does worst in "
        f"{best.worst.text} (n = {trial.num_pictures:,})."
    )


def text_of(trial: TrustResult) -> str:
    return TEXT.format(
        n=trial.num_pictures,
        least=LEAST_GAIN,
        likeness=MOST_LIKENESS,
        beyond=BEYOND_CONTROLS,
        controls=trial.num_controls,
        randomised=trial.num_randomised,
        reasons="\n".join(f"- {each.reason}" for each in trial.methods),
    )


def value_table(trial: TrustResult) -> Table:
    """Areas, pointing game, mass on ink; baselines below the methods."""
    columns = [
        "ranking by",
        *(f"{direction}, {OPERATOR_NAMES[operator]}" for operator in OPERATORS for direction in DIRECTIONS),
        "highest patch holds ink",
        "mass on inked patches",
        "likeness, all weights random (largest)",
    ]
    rows = []
    for each in [*trial.methods, *trial.baselines.values()]:
        rows.append(
            [
                each.name,
                *(each.areas[operator, direction].text() for operator in OPERATORS for direction in DIRECTIONS),
                each.pointing.text(1, percent=True),
                each.mass.text(),
                "–" if each.alike is None else each.alike.text(2),
            ]
        )
    return Table(
        f"Area under deletion curves (low is good) and insertion curves (high is good), over {trial.num_pictures:,} "
        f"test images (likeness: {trial.num_randomised}; {trial.num_controls} models with "
        "random weights), with 95 % intervals. The last three rows are the baselines; the first of them has an even "
        "map.",
        columns,
        rows,
    )


def gain_table(trial: TrustResult) -> Table:
    """Each comparison that trust needs."""
    rows = [
        [*comparison_names(gain), *(each.gains[index].value.text() for each in trial.methods)]
        for index, gain in enumerate(trial.methods[0].gains)
    ]
    rows.append(["verdict", "", *("trust" if each.trusted else "do not trust" for each in trial.methods)])
    return Table(
        f"Probability gained over the rankings that know nothing or only the ink, paired over {trial.num_pictures:,} "
        f"images; trust needs at least {LEAST_GAIN} and {BEYOND_CONTROLS:g} times the value in the next table in every "
        "row, with the interval above 0.",
        ["gain", "against", *(each.name for each in trial.methods)],
        rows,
    )


def control_table(trial: TrustResult) -> Table:
    """What each comparison comes to without training."""
    rows = [
        [*comparison_names(gain), *(reached(each.gains[index]) for each in trial.methods)]
        for index, gain in enumerate(trial.methods[0].gains)
    ]
    return Table(
        f"The same where the map is that of random weights, and the answers are the checkpoint's: the largest of "
        f"{trial.num_controls} models, {trial.num_randomised} images.",
        ["gain", "against", *(each.name for each in trial.methods)],
        rows,
    )


def comparison_names(gain: Gain) -> tuple[str, str]:
    return f"{gain.direction}, {OPERATOR_NAMES[gain.operator]}", gain.baseline


def reached(gain: Gain) -> str:
    return "–" if gain.control is None else gain.control.text()


def numbers_of(trial: TrustResult) -> dict[str, Any]:
    return {
        "images": trial.num_pictures,
        "images_randomised": trial.num_randomised,
        "controls": trial.num_controls,
        "stages": trial.stages,
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
                "likeness_of_controls": numbers_or_null(each.unlearnt),
                "trusted": None if each.name in trial.baselines else each.trusted,
            }
            for each in [*trial.methods, *trial.baselines.values()]
        },
    }


def numbers_or_null(value: Interval | None) -> dict[str, Any] | None:
    return None if value is None else value.numbers()


COLORS = ("#b2182b", "#1b7837", "#2166ac", "#e08214")
GREYS = {RANDOM: ":", INKED: "--", AMOUNT: "-"}


def trust_figure(trial: TrustResult) -> Figure:
    """Curves above; gains and randomisation below."""
    drawn = Figure(figsize=(14, 11.5), layout="constrained")
    parts: Any = drawn.subfigures(2, 1, height_ratios=(1, 1.7))
    upper, lower = parts
    axes = upper.subplots(1, 4, sharey=True)
    for axis, (operator, direction) in zip(axes, [(o, d) for o in OPERATORS for d in DIRECTIONS], strict=True):
        for name, style in GREYS.items():
            curves = trial.curves[name, operator]
            axis.plot(
                curves.shares, getattr(curves, direction).mean(axis=0), color="#777777", linestyle=style, label=name
            )
        for each, color in zip(trial.methods, COLORS, strict=False):
            curves = trial.curves[each.name, operator]
            mean = getattr(curves, direction).mean(axis=0)
            axis.plot(curves.shares, mean, color=color, linewidth=1.8, label=each.name)
        axis.set_title(f"{direction}, {OPERATOR_NAMES[operator]}", fontsize=11)
        axis.set_xlabel(f"share of patches {'removed' if direction == 'deletion' else 'restored'}")
        charts.clean(axis)
    axes[0].set_ylabel("probability of the class")
    axes[0].legend(fontsize=9, frameon=False)
    left, right = lower.subplots(1, 2, width_ratios=(1.5, 1))
    draw_gains(left, trial)
    for each, color in zip(trial.methods, COLORS, strict=False):
        if each.likeness is not None:
            steps = np.arange(len(trial.stages) + 1)
            values = np.append(1.0, each.likeness.value)
            right.plot(steps, values, color=color, marker="o", markersize=4, label=each.name)
            right.fill_between(steps[1:], each.likeness.low, each.likeness.high, color=color, alpha=0.15, linewidth=0)
    right.axhline(MOST_LIKENESS, color=charts.REFERENCE, linestyle="--", linewidth=1)
    right.axhline(0, color=charts.REFERENCE, linewidth=1)
    right.set_xticks(range(len(trial.stages) + 1), ["trained", *trial.stages], rotation=45, ha="right", fontsize=9)
    right.set_xlabel("weights made random, from the output down to")
    right.set_ylabel("rank correlation with the trained map")
    charts.clean(right)
    return charts.with_headline(drawn, f"Is the map an explanation? {trial.num_pictures:,} test images")


def draw_gains(axis: Axes, trial: TrustResult) -> None:
    """A row for each comparison: each method's gain with its interval, and a bar where random weights make it need
    more than LEAST_GAIN."""
    gains = trial.methods[0].gains
    # Comparisons of one direction and operator stand together.
    at = -(np.arange(len(gains)) + np.arange(len(gains)) // len(BASELINES) * 0.9)
    for number, (each, color) in enumerate(zip(trial.methods, COLORS, strict=False)):
        heights = at + 0.18 * ((len(trial.methods) - 1) / 2 - number)
        intervals = [gain.value for gain in each.gains]
        values, low, high = (np.array([getattr(one, end) for one in intervals]) for end in ("value", "low", "high"))
        charts.forest(heights, values, low, high, axis, color)
        needed = np.array([gain.needed for gain in each.gains])
        more = needed > LEAST_GAIN
        axis.vlines(needed[more], heights[more] - 0.09, heights[more] + 0.09, color=color, linewidth=3)
    axis.axvline(LEAST_GAIN, color=charts.REFERENCE, linestyle="--", linewidth=1)
    axis.set_yticks(at, [f"against {gain.baseline}" for gain in gains])
    for first in range(0, len(gains), len(BASELINES)):
        name, _ = comparison_names(gains[first])
        axis.text(0, at[first] + 0.75, name, transform=axis.get_yaxis_transform(), fontsize=10, fontweight="bold")
    axis.set_ylim(at[-1] - 0.6, at[0] + 1.2)
    axis.tick_params(axis="y", labelsize=9)
    axis.set_xlabel("probability gained over that ranking (mean over shares); bars: what random weights ask for")
    charts.clean(axis, "x")


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
