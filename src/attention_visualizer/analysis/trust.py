"""Is the map an explanation? One table, one figure and one sentence for each method."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from attention_visualizer import charts
from attention_visualizer.analysis.study import FIRST_CONTROL, Study
from attention_visualizer.analysis.trials import (
    AMOUNT,
    DIRECTIONS,
    INKED,
    LEAST_GAIN,
    METHODS,
    MOST_LIKENESS,
    OPERATOR_NAMES,
    PASSES,
    RANDOM,
    Trial,
    try_methods,
)
from attention_visualizer.chapter import Chapter, FigureFile, Finding, Table
from attention_visualizer.controls import random_weights
from attention_visualizer.model import VisionTransformer
from attention_visualizer.perturbation import OPERATORS
from attention_visualizer.pictures import LabelledImages

CONTROL_PICTURES = 60


def write(study: Study) -> Chapter:
    title = "Is the map an explanation?"
    model = study.model
    if not isinstance(study.pictures, LabelledImages) or study.pictures.labels is None:
        return Chapter(title, "Maps are put to the test against ink, on a test set of digits whose classes are known.")
    if not isinstance(model, VisionTransformer):
        return Chapter(title, "Maps are put to the test for this project's Vision Transformer only.")
    numbers = study.subset_for(PASSES)
    if numbers is None:
        return Chapter(title, "Left out: it is long for a model of this size. `subset=50` does it for 50 images.")
    trial = try_methods(study, model, numbers, randomise=True)
    control = try_methods(study, random_control(study), numbers[:: max(1, len(numbers) // CONTROL_PICTURES)], False)
    figure = study.save(trust_figure(trial, study.face_note), "attention_trust")
    trusted = [each.name for each in trial.methods if each.trusted]
    return Chapter(
        title,
        text_of(trial, control),
        [
            FigureFile(
                figure,
                "Above: probability of the predicted class as patches are removed (deletion) or restored (insertion), "
                f"most relevant first, mean over {trial.num_pictures:,} test images; grey: rankings that know nothing, "
                "or only the ink. Below: the area gained over the two ink rankings (right of the dashed line is what "
                "trust needs), and the likeness of each map to that of ever more random weights, over "
                f"{trial.num_randomised} images.",
            )
        ],
        [value_table(trial), gain_table(trial, control)],
        numbers_of(trial),
        finding=Finding(headline(trial, trusted), figure),
        caution="Where a map was found not to be trusted, it still shows truly where the weights go; it is only no "
        "explanation of the answer."
        if not trusted
        else "Trust is for the ranking of patches over many images, not for a single picture's map.",
    )


def random_control(study: Study) -> VisionTransformer:
    control = random_weights(study.model, FIRST_CONTROL)
    assert isinstance(control, VisionTransformer)
    return control


def headline(trial: Trial, trusted: list[str]) -> str:
    best = max(trial.methods, key=lambda each: float(each.worst.value.value))
    worst = best.worst
    gain = f"{float(worst.value.value):+.3f} ({float(worst.value.low):+.3f} to {float(worst.value.high):+.3f})"
    who = (
        "None of the maps is"
        if not trusted
        else f"Of the maps, {', '.join(trusted)} {'is' if len(trusted) == 1 else 'are'}"
    )
    return (
        f"{who} to be trusted as an explanation of this checkpoint's answers. Against rankings that know only the ink, "
        f"the best, {best.name}, gains {gain} of the class's probability where it does worst ({worst.direction}, "
        f"{OPERATOR_NAMES[worst.operator]}, against {worst.baseline}; n = {trial.num_pictures:,})."
    )


def text_of(trial: Trial, control: Trial) -> str:
    reasons = "\n".join(f"- {each.reason}" for each in trial.methods)
    beating = sum(each.faithful for each in control.methods)
    return TEXT.format(
        n=trial.num_pictures,
        least=LEAST_GAIN,
        likeness=MOST_LIKENESS,
        reasons=reasons,
        control=CONTROL.format(n=control.num_pictures, beating=beating, count=len(control.methods)),
    )


def value_table(trial: Trial) -> Table:
    """Areas, pointing game, mass on ink; baselines below the methods."""
    columns = [
        "ranking by",
        *(f"{direction}, {OPERATOR_NAMES[operator]}" for operator in OPERATORS for direction in DIRECTIONS),
        "highest patch holds ink",
        "mass on inked patches",
        "likeness, all weights random",
    ]
    rows = []
    for each in [*trial.methods, *trial.baselines.values()]:
        rows.append(
            [
                each.name,
                *(each.areas[operator, direction].text() for operator in OPERATORS for direction in DIRECTIONS),
                each.pointing.text(1, percent=True),
                each.mass.text(),
                "–" if each.likeness is None else each.likeness[-1].text(2),
            ]
        )
    return Table(
        f"Area under deletion curves (low is good) and insertion curves (high is good), over {trial.num_pictures:,} "
        f"test images (likeness: {trial.num_randomised}), with 95 % intervals. The last three rows are the baselines; "
        "the first of them has an even map.",
        columns,
        rows,
    )


def gain_table(trial: Trial, control: Trial) -> Table:
    """Each comparison that trust needs."""
    columns = ["gain", "against", *(each.name for each in trial.methods), "random weights, best method"]
    rows = []
    for index, gain in enumerate(trial.methods[0].gains):
        other = max((each.gains[index].value for each in control.methods), key=lambda value: float(value.value))
        rows.append(
            [
                f"{gain.direction}, {OPERATOR_NAMES[gain.operator]}",
                gain.baseline,
                *(each.gains[index].value.text() for each in trial.methods),
                other.text(),
            ]
        )
    verdicts = ["trust" if each.trusted else "do not trust" for each in trial.methods]
    rows.append(["verdict", "", *verdicts, "nothing learnt"])
    return Table(
        f"Probability gained over the two rankings by ink alone, paired over images; trust needs at least {LEAST_GAIN} "
        f"in every row, with the interval above 0. Random weights: {control.num_pictures} images.",
        columns,
        rows,
    )


def numbers_of(trial: Trial) -> dict[str, Any]:
    return {
        "images": trial.num_pictures,
        "images_randomised": trial.num_randomised,
        "stages": trial.stages,
        "least_gain": LEAST_GAIN,
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
                    }
                    for gain in each.gains
                ],
                "pointing_game": each.pointing.numbers(),
                "mass_on_ink": each.mass.numbers(),
                "likeness": None if each.likeness is None else each.likeness.numbers(),
                "trusted": each.trusted if each.name in METHODS else None,
            }
            for each in [*trial.methods, *trial.baselines.values()]
        },
    }


COLORS = ("#b2182b", "#1b7837", "#2166ac", "#e08214")
GREYS = {RANDOM: ":", INKED: "--", AMOUNT: "-"}


def trust_figure(trial: Trial, face_note: str) -> Figure:
    """Curves above; gains and randomisation below."""
    drawn = Figure(figsize=(14, 9), layout="constrained")
    parts: Any = drawn.subfigures(2, 1, height_ratios=(1, 1))
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
    gains = trial.methods[0].gains
    at = np.arange(len(gains))[::-1].astype(float)
    for number, (each, color) in enumerate(zip(trial.methods, COLORS, strict=False)):
        intervals = [gain.value for gain in each.gains]
        offset = 0.15 * ((len(trial.methods) - 1) / 2 - number)
        values, low, high = (np.array([getattr(one, end) for one in intervals]) for end in ("value", "low", "high"))
        charts.forest(at + offset, values, low, high, left, color)
    left.axvline(LEAST_GAIN, color=charts.REFERENCE, linestyle="--", linewidth=1)
    left.set_yticks(
        at, [f"{each.direction}, {OPERATOR_NAMES[each.operator]}\nagainst {each.baseline}" for each in gains]
    )
    left.tick_params(axis="y", labelsize=9)
    left.set_xlabel("probability gained over a ranking by ink alone (mean over shares)")
    charts.clean(left, "x")
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
    return charts.finish(drawn, f"Is the map an explanation? {trial.num_pictures:,} test images", face_note)


TEXT = """Patches are taken from {n:,} test images in the order of a map, and put back in it; a map that shows what the
answer rests on makes the probability of the predicted class fall early and rise early. On digits this mostly measures
ink: black patches are background, and removing them removes nothing. So every map has to beat two rankings that know
only the ink, inked patches in random order and patches by the amount of ink, in deletion and in insertion, with patches
painted as background and with their tokens left out: by at least {least} in mean probability each time, the interval
above 0. And it has to depend on the weights: with all of them random, its rank correlation with the trained map may be
{likeness} at most (weights are made random from the output down, stage by stage).

{reasons}

{control}"""

CONTROL = """A map of *random weights* can find what moves a random answer ({beating} of {count} methods do, over {n}
images), so a method is only said to be trusted where the model answers better than by chance."""
