"""The chapter on runs that differ in their settings: what goes with a setting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attention_visualizer.analysis.runs.run_table import describe_remarks, run_numbers, run_table
from attention_visualizer.analysis.runs.settings.figure import draw, join_names, name_varied
from attention_visualizer.analysis.runs.settings.measure import (
    QUANTITIES,
    Setting,
    SettingComparison,
    SettingDifference,
    measure,
)
from attention_visualizer.analysis.runs.surveyed_runs import ENOUGH_SEEDS, FEW_SEEDS, SurveyedRun
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.measures.intervals import CHAPTER_LEVEL
from attention_visualizer.report.chapter import Chapter, FigureFile, Finding, Table

MAX_NAMED_DIFFERENCES = 6  # in the text


def write(study: Study, surveyed: list[SurveyedRun]) -> Chapter:
    """surveyed: at least two runs of different settings."""
    comparison = measure(study, surveyed)
    name = study.output.save(draw(comparison), "attention_across_runs")
    facts = {
        "runs": len(surveyed),
        "varied": join_names(comparison.varied),
        "n": comparison.num_images,
        "total": comparison.num_classified,
        "kind": f"{comparison.image_kind}s",
        "first": comparison.settings[0].name,
        "controls": study.budget.controls,
        "size": len(comparison.differences),
        "seeds": describe_samples(comparison),
        "level": CHAPTER_LEVEL,
    }
    return Chapter(
        f"Comparing runs: {name_varied(comparison.varied)}",
        f"{TEXT.format(**facts)}\n{describe_differences(comparison.differences)}{describe_remarks(surveyed)}",
        [FigureFile(name, CAPTION.format(**facts))],
        [run_table(surveyed), setting_table(comparison)],
        numbers(comparison),
        finding=Finding(finding_text(comparison), name, rank=0),
        caution=CAUTION,
    )


def fewest_runs(settings: Sequence[Setting]) -> int:
    return min(len(setting.runs) for setting in settings)


def describe_samples(comparison: SettingComparison) -> str:
    """Say how many runs a setting has, and what that leaves open."""
    fewest = fewest_runs(comparison.settings)
    if fewest == 1:
        text = "One run is one sample: in a difference between single runs, hyperparameter and seed are confounded."
    else:
        text = f"Each setting is the mean of its runs, {fewest} or more, drawn as small dots."
    if fewest < ENOUGH_SEEDS:
        text += f" With fewer than {ENOUGH_SEEDS} seeds per setting, statements about settings are descriptive."
    if len(comparison.varied) > 1:
        text += " The runs differ in several settings, so a difference may be due to any of them."
    return text


def describe_differences(differences: Sequence[SettingDifference]) -> str:
    """Say what stands out, or that nothing does."""
    outstanding = [each for each in differences if each.stands_out]
    untrained = "" if all(each.learnt for each in differences) else f" {NOT_LEARNT}"
    if not outstanding:
        return f"No difference meets all criteria.{untrained}"
    named = "; ".join(
        f"{each.setting.name}: {each.quantity.label.split(' (')[0]} {signed(each)}"
        for each in outstanding[:MAX_NAMED_DIFFERENCES]
    )
    unnamed = len(outstanding) - MAX_NAMED_DIFFERENCES
    more = f"; {unnamed} more are in the table" if unnamed > 0 else ""
    return f"{len(outstanding)} of {len(differences)} differences meet all criteria: {named}{more}.{untrained}"


def signed(difference: SettingDifference) -> str:
    """Format a difference as "+0.12 (0.10 to 0.14)", of accuracy in percentage points."""
    text = difference.interval.text(2, percent=difference.quantity.name == "accuracy")
    return text if text.startswith(("-", "–")) else f"+{text}"


def finding_text(comparison: SettingComparison) -> str:
    differences, first = comparison.differences, comparison.settings[0].name
    fewest = fewest_runs(comparison.settings)
    sample = "one run each, so setting and seed are confounded" if fewest == 1 else f"{fewest} or more runs each"
    of_accuracy = [each for each in differences if each.quantity.name == "accuracy"]
    count = sum(each.stands_out for each in differences)
    text = (
        f"Runs that differ in {join_names(comparison.varied)} ({sample}): {count} of {len(differences)} differences "
        f"from {first} in accuracy, entropy, distance and redundancy stand out."
    )
    if not of_accuracy:
        return text
    largest = max(of_accuracy, key=lambda each: abs(float(each.interval.value)))
    return (
        f"{text} The largest difference in accuracy, picked afterwards, is {signed(largest)}, {largest.setting.name} "
        f"against {first} (n = {comparison.num_classified:,})."
    )


def setting_table(comparison: SettingComparison) -> Table:
    rows = []
    for setting in comparison.settings:
        label = setting.name if setting.name == setting.label else f"{setting.name}: {setting.label}"
        differences = {each.quantity: each for each in comparison.differences if each.setting is setting}
        cells = []
        for quantity in QUANTITIES:
            if quantity.name not in setting.values:
                cells.append("–")
                continue
            cell = setting.interval(quantity.name).text(2, percent=quantity.name == "accuracy")
            if quantity in differences:
                difference = differences[quantity]
                cell += f"; {signed(difference)}{'*' if difference.stands_out else ''}"
            cells.append(cell)
        rows.append([label, str(len(setting.runs)), *cells])
    return Table(
        f"Each setting with the 95% interval over images, or over its runs where it has {FEW_SEEDS} or more; then the "
        "paired difference from the first (interval over images), with a star where it stands out.",
        ["setting", "runs", *(quantity.label for quantity in QUANTITIES)],
        rows,
    )


def numbers(comparison: SettingComparison) -> dict[str, Any]:
    return {
        "comparison": "settings",
        "images": comparison.num_images,
        "runs": run_numbers(comparison.runs),
        "settings": [
            {
                "setting": setting.label,
                "runs": [run.label for run in setting.runs],
                "values": {name: value.interval.numbers() for name, value in setting.values.items()},
                "by_run": setting.values_by_run,
                "random_weights": setting.controls,
            }
            for setting in comparison.settings
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
            for each in comparison.differences
        ],
    }


NOT_LEARNT = "Runs that classify no better than random weights are excluded."
CAPTION = """{runs} runs: accuracy over {total:,} {kind}, all else over {n:,}, means over layers and heads. Below:
paired differences from {first}. A low divergence between a layer's heads means that they are redundant."""

TEXT = """{runs} runs that differ in {varied}, over the same {kind} ({total:,} for accuracy, {n:,} for attention).
Entropy and attention distance are relative to uniform attention, because the number of keys depends on the patch size.
Where a class token is read, the last layer has no distance. A low Jensen-Shannon divergence between a layer's heads
means that they are redundant. {seeds}

A difference from {first} *stands out* if

- p < {level:g} (bootstrap over images, Holm-adjusted over all {size} differences);
- it reaches a minimum effect: 0.2 percentage points of accuracy, 0.05 of uniform attention, 0.035 nats;
- for attention, it is 1.5 times the largest difference between {controls} models with random weights of each
  architecture;
- where settings have several runs, all runs of one lie on one side of all runs of the other.
"""

CAUTION = """Intervals of differences between settings are over images, not over seeds. Training the same setting again
gives other values."""
