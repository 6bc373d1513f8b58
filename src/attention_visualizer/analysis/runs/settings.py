"""The chapter on runs that differ in their settings: what goes with a knob."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from attention_visualizer.analysis.runs.settings_measure import (
    MOST_NAMED,
    QUANTITIES,
    Difference,
    Quantity,
    Setting,
    compare_settings,
    differences,
)
from attention_visualizer.analysis.runs.survey import (
    SEED_CLAIMS,
    SurveyedRun,
    numbers_of_runs,
    random_weights_of,
    remarks_of,
    table_of_runs,
)
from attention_visualizer.analysis.study.compared_runs import short_name
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.figures import charts, run_charts
from attention_visualizer.files.atomic import json_ready
from attention_visualizer.report.chapter import Chapter, FigureFile, Finding, Table

MOST_SAID = 6  # differences that the text names


def write(study: Study, looked: list[SurveyedRun]) -> Chapter:
    """looked: at least two runs of different settings."""
    settings = compare_settings(looked, random_weights_of(study, looked))
    found = differences(settings)
    kind, n = f"{study.target.images.kind}s", looked[0].survey.num_images
    total = n if looked[0].right is None else len(looked[0].right)
    name = study.output.save(figure(study, settings, found, n, total), "attention_across_runs")
    knobs = [short_name(knob) for knob in looked[0].run.knobs]
    text = TEXT.format(
        runs=len(looked), knobs=and_list(knobs), n=n, total=total, kind=kind, first=settings[0].name,
        controls=study.budget.controls, size=len(found), seeds=how_many_seeds(settings, len(knobs)),
    )  # fmt: skip
    return Chapter(
        f"Comparing runs: {headline(settings)}",
        " ".join([text, said_of(found)]) + remarks_of(looked),
        [FigureFile(name, CAPTION.format(runs=len(looked), n=n, total=total, kind=kind, first=settings[0].name))],
        [table_of_runs(looked), table(settings, found)],
        json_ready(numbers(looked, settings, found)),
        finding=Finding(finding(settings, found, and_list(knobs), total), name),
        caution=CAUTION,
    )


def how_many_seeds(settings: Sequence[Setting], num_knobs: int) -> str:
    fewest = min(len(setting.runs) for setting in settings)
    if fewest == 1:
        told = "One run is one sample: a difference between single runs mixes the knob with the seed."
    else:
        told = f"Each setting is the mean of its runs, {fewest} or more, drawn as small dots."
    if fewest < SEED_CLAIMS:
        told += f" With fewer than {SEED_CLAIMS} seeds a setting, what is said about settings is descriptive."
    if num_knobs > 1:
        told += " The runs differ in several settings, so that a difference may belong to any of them."
    return told


def said_of(found: Sequence[Difference]) -> str:
    """What stands out, or that nothing does."""
    shown = [each for each in found if each.stands_out]
    untrained = "" if all(each.learnt for each in found) else " " + NOT_LEARNT
    if not shown:
        return f"No difference passes all of this.{untrained}"
    told = "; ".join(
        f"{each.setting.name}: {each.quantity.label.split(' (')[0]} {signed(each)}" for each in shown[:MOST_SAID]
    )
    more = f"; {len(shown) - MOST_SAID} more are in the table" if len(shown) > MOST_SAID else ""
    return f"{len(shown)} of {len(found)} differences pass all of this: {told}{more}.{untrained}"


def signed(difference: Difference) -> str:
    """ "+0.12 (0.10 to 0.14)", or points of accuracy."""
    percent = difference.quantity.name == "accuracy"
    text = difference.interval.text(2, percent)
    return text if text.startswith(("-", "–")) else f"+{text}"


def finding(settings: Sequence[Setting], found: Sequence[Difference], knobs: str, total: int) -> str:
    fewest = min(len(setting.runs) for setting in settings)
    sample = "one run each, so the seed is mixed in" if fewest == 1 else f"{fewest} or more runs each"
    accuracies = [each for each in found if each.quantity.name == "accuracy"]
    farthest = max(accuracies, key=lambda each: abs(float(each.interval.value)), default=None)
    largest = (
        ""
        if farthest is None
        else f" The largest difference in accuracy is {signed(farthest)}, {farthest.setting.name} against "
        f"{settings[0].name} (n = {total:,})."
    )
    count = sum(each.stands_out for each in found)
    return (
        f"Runs that differ in {knobs} ({sample}): {count} of {len(found)} differences from {settings[0].name} in "
        f"accuracy, entropy, distance and redundancy stand out.{largest}"
    )


def figure(study: Study, settings: Sequence[Setting], found: Sequence[Difference], n: int, total: int) -> Figure:
    """Above each setting, below its difference from the first; a column a quantity."""
    shown = [quantity for quantity in QUANTITIES if has_values(settings, quantity)]
    drawn = Figure(figsize=(4.2 * len(shown) + 0.4, 8.2), layout="constrained")
    axes = drawn.subplots(2, len(shown), squeeze=False)
    names, knobs = tick_labels(settings), settings[0].runs[0].knobs
    for column, quantity in enumerate(shown):
        is_accuracy = quantity.name == "accuracy"
        scale = 100.0 if is_accuracy else 1.0
        label = "accuracy (%)" if is_accuracy else quantity.label
        run_charts.by_setting(
            [setting.values[quantity.name].interval for setting in settings],
            names,
            label,
            axes[0, column],
            [setting.of_runs[quantity.name] for setting in settings],
            () if is_accuracy else [setting.controls[quantity.name] for setting in settings],
            scale=scale,
        )
        axes[0, column].set_title(f"n = {total if is_accuracy else n:,}", fontsize=11)
        own = [each for each in found if each.quantity is quantity]
        run_charts.by_setting(
            [each.interval for each in own],
            names[1:],
            "difference in points" if is_accuracy else "difference",
            axes[1, column],
            minimum=quantity.minimum,
            scale=scale,
        )
        axes[1, column].set_xlabel(headline(settings) if len(knobs) <= MOST_NAMED else "setting (see the table)")
        axes[1, column].set_title(f"difference from {settings[0].name}", fontsize=11)
    handles = [
        Line2D([], [], color=run_charts.TRAINED, marker="o", label="runs, with the 95 % interval over pictures"),
        Line2D([], [], color=run_charts.CONTROL, marker="x", linestyle="", label="random weights"),
        Patch(color=run_charts.TOO_SMALL, label="below the minimum effect"),
    ]
    drawn.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False, fontsize=10)
    count = sum(len(setting.runs) for setting in settings)
    return charts.with_headline(drawn, f"What goes with {headline(settings)}: {count} runs")


def has_values(settings: Sequence[Setting], quantity: Quantity) -> bool:
    return all(quantity.name in setting.values for setting in settings) and not all(
        np.isnan(setting.values[quantity.name].mean) for setting in settings
    )


def headline(settings: Sequence[Setting]) -> str:
    knobs = [short_name(knob) for knob in settings[0].runs[0].knobs]
    return and_list(knobs) if len(knobs) <= MOST_NAMED else f"{len(knobs)} settings"


def tick_labels(settings: Sequence[Setting]) -> list[str]:
    """The values alone where there is one knob; numbers of the table's rows where there are too many to print."""
    knobs = len(settings[0].runs[0].knobs)
    if knobs == 1:
        return [setting.label.partition("=")[2] for setting in settings]
    if knobs <= MOST_NAMED and len(settings) <= 6:
        return [setting.label.replace(", ", "\n") for setting in settings]
    return [str(number + 1) for number in range(len(settings))]


def and_list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def table(settings: Sequence[Setting], found: Sequence[Difference]) -> Table:
    rows = []
    for setting in settings:
        row = [
            f"{setting.name}: {setting.label}" if setting.name != setting.label else setting.name,
            str(len(setting.runs)),
        ]
        for quantity in QUANTITIES:
            if quantity.name not in setting.values:
                row.append("–")
                continue
            percent = quantity.name == "accuracy"
            text = setting.values[quantity.name].interval.text(2, percent)
            own = [each for each in found if each.quantity is quantity and each.setting is setting]
            row.append(text + "".join(f"; {signed(each)}{'*' if each.stands_out else ''}" for each in own))
        rows.append(row)
    return Table(
        "Each setting with the 95 % interval over pictures; then the paired difference from the first, with a star "
        "where it stands out.",
        ["setting", "runs", *(quantity.label for quantity in QUANTITIES)],
        rows,
    )


def numbers(looked: list[SurveyedRun], settings: Sequence[Setting], found: Sequence[Difference]) -> dict[str, Any]:
    return {
        "comparison": "settings",
        "images": looked[0].survey.num_images,
        "runs": numbers_of_runs(looked),
        "settings": [
            {
                "setting": setting.label,
                "runs": [run.label for run in setting.runs],
                "values": {name: value.interval.numbers() for name, value in setting.values.items()},
                "by_run": setting.of_runs,
                "random_weights": setting.controls,
            }
            for setting in settings
        ],
        "differences": [
            {
                "quantity": each.quantity.name,
                "setting": each.setting.label,
                "difference": each.interval.numbers(),
                "adjusted_p": each.adjusted,
                "largest_of_random_weights": each.limit,
                "all_runs_on_one_side": each.apart,
                "stands_out": each.stands_out,
            }
            for each in found
        ],
    }


NOT_LEARNT = "Runs that classify no better than random weights are left out of this."
CAPTION = """{runs} runs: accuracy over {total:,} {kind}, all else over {n:,}, means over layers and heads. Below, the
paired differences from {first}. A low divergence between a layer's heads means that they are redundant."""

TEXT = """{runs} runs that differ in {knobs}, over the same {kind} ({total:,} for accuracy, {n:,} for attention).
Entropy and attention distance are relative to uniform attention, because models with other patches have another number
of keys; where a class token is read, the last layer has no distance. The divergence between a layer's heads
(Jensen-Shannon) is low where heads are redundant. {seeds} A difference from {first} stands out when its bootstrap
p-value over the pictures, adjusted over all {size} differences, is at most 0.05, when it exceeds the minimum effect
(0.2 points of accuracy, 0.05 of uniform attention, 0.035 nats) and, for attention, 1.5 times the largest difference
between {controls} models with random weights of each architecture; where settings have several runs, all of one must
lie on one side of all of the other."""

CAUTION = """Intervals in the comparison of runs speak of other pictures, not of other seeds: the same setting trained
again gives other numbers."""
