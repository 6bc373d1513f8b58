"""Is the map an explanation? A figure, tables, and for each method a verdict in degrees."""

from __future__ import annotations

from typing import Any

import numpy as np

from attention_visualizer.analysis.needs import ChapterWriter, Need
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.analysis.trust.figure import draw
from attention_visualizer.analysis.trust.measure import PASSES, TrustResult, measure
from attention_visualizer.analysis.trust.verdict import (
    AMOUNT,
    BASELINES,
    COMPARISONS,
    HALVES,
    INKED,
    LEAVE_ONE_OUT,
    MAX_LIKENESS,
    MIN_GAIN,
    MIN_SHARE,
    OPERATOR_NAMES,
    REFERENCES,
    SHAPLEY,
    MethodTrust,
    signed,
)
from attention_visualizer.measures.intervals import Interval
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
                f"most relevant first, mean over {result.num_images:,} test images; black: rankings that ask the model "
                "itself; grey: baselines. Below: how much of what Shapley values gain over inked patches in random "
                "order each ranking gains, with 95% intervals (trust requires more than the dashed line, and more "
                "besides), and the similarity of each map to its map as more and more layers are randomised, over "
                f"{result.num_control_images} images.",
            )
        ],
        [verdict_table(result), area_table(result), gain_table(result)],
        numbers_of(result),
        finding=Finding(headline(result), figure, rank=4),
        caution="A map that is not trusted shows where the attention goes, but does not explain the prediction."
        if not result.trusted
        else "Trust applies to the ranking of patches over many images, not to the map of a single image.",
    )


def headline(result: TrustResult) -> str:
    shares = [float(each.gains.share[SHAPLEY].value) for each in result.methods]
    trusted = f"Trusted: {', '.join(result.trusted)}" if result.trusted else "No map is trusted"
    if np.isnan(shares).all():
        return f"{trusted} as an explanation of this checkpoint's predictions (n = {result.num_images:,})."
    best = result.methods[int(np.nanargmax(shares))]
    return (
        f"{trusted} as an explanation of this checkpoint's predictions (n = {result.num_images:,}). The best of "
        f"{len(shares)}, {best.name} (picked afterwards), gains {best.degrees.partition(';')[0]}."
    )


def text_of(result: TrustResult) -> str:
    whole, half = (
        next(each for each in result.references if each.name == SHAPLEY).gains.mean_over[INKED],
        result.calibration.verdict.gains.mean_over[INKED],
    )
    failures = result.calibration.verdict.failures
    return TEXT.format(
        n=result.num_images,
        least=MIN_GAIN,
        share=100 * MIN_SHARE,
        likeness=MAX_LIKENESS,
        controls=result.num_controls,
        randomised=result.num_control_images,
        permutations=result.num_permutations,
        whole=signed(whole),
        half=signed(half),
        passing=f"do not pass: {failures[0]}" if failures else "pass",
        power=f"{100 * result.calibration.passes:.0f}%",
        verdicts="\n".join(f"- **{each.name}**: {each.degrees}. {each.reason}" for each in result.methods),
    )


def verdict_table(result: TrustResult) -> Table:
    """The verdict in degrees."""
    columns = [
        "ranking by",
        "verdict",
        "of what Shapley values gain",
        "of what leave-one-out gains",
        "gain over amount of ink",
        "least gain over random weights",
        "similarity to them (largest)",
    ]
    rows = []
    for each in result.rankings:
        is_method, controls = each in result.methods, each.gains.over_controls
        rows.append(
            [
                each.name,
                ("trusted" if each.is_trusted else "not trusted") if is_method else "–",
                *(each.gains.share[name].text(0, percent=True) for name in REFERENCES),
                "–" if each.name == AMOUNT else each.gains.mean_over[AMOUNT].text(),
                "–" if controls is None else controls[int(controls.value.argmin())].text(),
                "–" if each.closest_control is None else each.closest_control.text(2),
            ]
        )
    return Table(
        f"How much of what rankings by {' and by '.join(REFERENCES)} gain over inked patches in random order each "
        f"ranking gains, and its gain in probability over others; means over both directions and both ways of "
        f"removing, {result.num_images:,} test images. Random weights: the same method's maps of {result.num_controls} "
        f"models, {result.num_control_images} images. Rows without a verdict are references, which ask the model "
        "itself, and baselines.",
        columns,
        rows,
    )


def area_table(result: TrustResult) -> Table:
    columns = [f"{direction}, {OPERATOR_NAMES[operator]}" for operator, direction in COMPARISONS]
    rows = [
        [
            each.name,
            *texts(each.areas),
            "–" if each.pointing is None else each.pointing.text(1, percent=True),
            "–" if each.mass is None else each.mass.text(),
        ]
        for each in result.rankings
    ]
    return Table(
        f"Area under deletion curves (low is good) and insertion curves (high is good), over {result.num_images:,} "
        f"test images, with 95% intervals; then how often the first patch is inked, and the share of the map on inked "
        f"patches. References and baselines ({', '.join(BASELINES)}) stand below the methods.",
        ["ranking by", *columns, "first patch inked", "share on ink"],
        rows,
    )


def gain_table(result: TrustResult) -> Table:
    """Each comparison, in probability and as a share of what Shapley values gain."""
    compared = result.methods
    kinds = [(name, [texts(each.gains.over[name]) for each in compared]) for name in BASELINES]
    shares = [texts(each.gains.shares[SHAPLEY], percent=True) for each in compared]
    kinds.append((f"{INKED}, of Shapley's gain", shares))
    rows = [
        [f"{direction}, {OPERATOR_NAMES[operator]}", against, *(each[number] for each in values)]
        for number, (operator, direction) in enumerate(COMPARISONS)
        for against, values in kinds
    ]
    return Table(
        f"Each method's gain in probability over each baseline, paired over {result.num_images:,} images, with 95% "
        "intervals, for each direction and way of removing.",
        ["removing", "against", *(each.name for each in compared)],
        rows,
        is_detail=True,
    )


def texts(values: Interval, percent: bool = False) -> list[str]:
    """Of [operator, direction], in the order of COMPARISONS."""
    return [values[place].text(0 if percent else 3, percent) for place in np.ndindex(values.value.shape)]


def numbers_of(result: TrustResult) -> dict[str, Any]:
    calibration = result.calibration
    return {
        "images": result.num_images,
        "images_randomised": result.num_control_images,
        "controls": result.num_controls,
        "permutations": result.num_permutations,
        "stages": result.stages,
        "least_gain": MIN_GAIN,
        "least_share": MIN_SHARE,
        "most_likeness": MAX_LIKENESS,
        "comparisons": [f"{direction}, {operator}" for operator, direction in COMPARISONS],
        "power": {
            "ranking": HALVES[0],
            "passes": not calibration.verdict.failures,
            "share_of_resamples": calibration.passes,
            **numbers_of_ranking(calibration.verdict),
        },
        "rankings": {
            each.name: {
                **numbers_of_ranking(each),
                "pointing_game": numbers_or_null(each.pointing),
                "mass_on_ink": numbers_or_null(each.mass),
                "likeness": numbers_or_null(each.likeness),
                "likeness_of_controls": numbers_or_null(each.control_likeness),
                "beats_amount_of_ink": each.gains.beats(AMOUNT),
                "trusted": each.is_trusted if each in result.methods else None,
                "failures": each.failures if each in result.methods else None,
            }
            for each in result.rankings
        },
    }


def numbers_of_ranking(ranking: MethodTrust) -> dict[str, Any]:
    gains = ranking.gains
    return {
        "areas": ranking.areas.numbers(),
        "gains": {name: each.numbers() for name, each in gains.over.items()},
        "mean_gains": {name: each.numbers() for name, each in gains.mean_over.items()},
        "share_of_shapley_values": gains.share[SHAPLEY].numbers(),
        "shares_of_shapley_values": gains.shares[SHAPLEY].numbers(),
        "share_of_leave_one_out": gains.share[LEAVE_ONE_OUT].numbers(),
        "gains_over_random_weights": numbers_or_null(gains.over_controls),
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

TEXT = """If patches are removed in the order of a map, does the prediction fail as early as it should? Patches are
removed from {n:,} test images, and restored. A map that shows what the prediction depends on makes the probability of
the predicted class fall early and rise early.

**Against simple orders.** On digits this mostly measures ink: black patches are background, and removing them changes
nothing. So maps are compared with four baselines: all patches in random order; inked patches first, in random order;
patches by their amount of ink; by their amount of stroke edge.

**Against what is possible.** Shapley values and leave-one-out ask the model itself what it needs, with hundreds of
passes an image: Shapley values of that probability come from {permutations} permutations for each way of removing
(patches filled with background, tokens dropped). They show what is possible, though not its limit. Over inked patches
in random order they gain {whole}, with half of the permutations {half}. Unlike the maps they have a sign, so what
speaks against the class comes last; part of their lead is due to that.

**The rule.** A map is trusted if, on average over deletion, insertion and both ways of removing, it

- surely gains more than {share:.0f}% of what Shapley values gain;
- beats every baseline by at least {least}, with the interval above 0, and is nowhere surely worse;
- gains as much over the same method's maps of each of {controls} models with random weights (on this model's
  predictions for {randomised} of the images), with a rank correlation of at most {likeness} with these.

Nothing is trusted unless the accuracy is above chance and above that of random weights. Can the truth pass? Shapley
values from half of the permutations, judged beside those from the other half, with the random-weight maps of all
methods as controls, {passing}; they would in {power} of resampled sets of images.

**The verdicts.**

{verdicts}"""
