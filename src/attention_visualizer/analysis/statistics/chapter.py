"""Entropy, maximum and mean attention by layer and head over the whole test set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from attention_visualizer.analysis.needs import ChapterWriter
from attention_visualizer.analysis.statistics.figure import LABELS, QUANTILES, draw_groups, draw_heads, draw_layers
from attention_visualizer.analysis.statistics.measure import OUTCOME_MEASURES, Groups, Statistics, measure
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.analysis.study.survey import MEASURE_NAMES, Survey
from attention_visualizer.measures.streaming import REPORTED_MEASURES, MeasureSummary
from attention_visualizer.report.chapter import Chapter, FigureFile, Finding, Table, escape_markdown

UNITS = {each.name: each.unit for each in REPORTED_MEASURES}
# The columns of the tables: nine in one would be wider than a page.
OF_MAPS = ("entropy", "effective_tokens", "maximum", "mean", "class_token")
OF_HEADS = ("distance", "confidence", "sink", "divergence", "content")


def write(study: Study) -> Chapter:
    measured = measure(study)
    survey, images, groups = measured.survey, measured.images, measured.groups
    files = [
        FigureFile(
            study.output.save(draw_layers(survey, images), "attention_statistics"),
            f"Maximum attention, mean attention and entropy by layer, n = {images} x heads.",
        ),
        FigureFile(study.output.save(draw_heads(measured), "attention_statistics_by_head"), caption_of_heads(measured)),
    ]
    tables = [mean_table(survey, images, names) for names in (OF_MAPS, OF_HEADS)]
    if groups is not None:
        file_name = study.output.save(draw_groups(groups, images), "attention_statistics_by_class")
        files.append(FigureFile(file_name, caption_of_groups(groups)))
        tables.append(outcome_table(groups))
    return Chapter(
        f"Statistics over the {measured.image_kind}s",
        text_of(measured),
        files,
        tables,
        numbers_of(measured),
        records(survey),
        finding=finding_of(survey, files[0].name),
    )


def caption_of_heads(measured: Statistics) -> str:
    unread = (
        " (no distance, sink strength and confidence for the last layer, whose patch queries cannot affect the logits)"
    )
    return (
        "Entropy, mean attention distance, sink strength, divergence from the layer's other heads, head confidence "
        f"and content dependence by layer and head, means over {measured.images}"
        f"{unread if measured.survey.reads_class_token else ''}."
    )


def caption_of_groups(groups: Groups) -> str:
    smallest, largest = groups.class_sizes
    return (
        f"Entropy by class ({smallest:,} to {largest:,} images) and layer, mean over heads; and its difference "
        f"between {groups.num_wrong:,} misclassified and {groups.num_correct:,} correctly classified images, with 95% "
        "intervals."
    )


def numbers_of(measured: Statistics) -> dict[str, Any]:
    survey, groups = measured.survey, measured.groups
    return {
        "images": survey.num_images,
        "accuracy": survey.accuracy,
        "query": "cls" if survey.reads_class_token else "patches",
        "layer_names": survey.layer_names,
        "layers": layer_numbers(survey.summaries),
        "means": {name: survey.mean_of(name).numbers() for name in MEASURE_NAMES},
        "content_dependence": survey.selectivity.content.numbers(),
        "content_dependence_of_layers": survey.selectivity.content_of_layers.numbers(),
        "trends_with_depth": {name: trend.numbers() for name, trend in measured.trends.items()},
        "entropy_by_class": None if groups is None else [interval.numbers() for interval in groups.entropy],
        "wrong_minus_right": None
        if groups is None
        else {name: difference.numbers() for name, difference in groups.wrong_minus_correct.items()},
    }


def text_of(measured: Statistics) -> str:
    survey, groups = measured.survey, measured.groups
    uniform, keys = survey.uniform_entropy, survey.geometries[0].num_tokens
    text = TEXT.format(
        n=survey.num_images,
        kind=f"{measured.image_kind}s",
        who="the CLS token" if survey.reads_class_token else "the patch queries (mean over them)",
        accuracy="" if measured.accuracy is None else f" (accuracy {measured.accuracy.text(2, percent=True)})",
        highest="" if uniform is None else f", which is {uniform:.3f} nats when it is uniform over {keys} tokens",
    )
    if measured.trends:
        trends = "; ".join(
            f"{LABELS[name].split(' (')[0]} {trend.text(3)} {UNITS[name]}" for name, trend in measured.trends.items()
        )
        unread = " (distance without the last layer)" if survey.reads_class_token else ""
        text += "\n\n" + TRENDS.format(trends=trends, unread=unread)
    if groups is not None:
        text += "\n\n" + OUTCOMES.format(wrong=groups.num_wrong, right=groups.num_correct)
    if survey.left_out:
        names = ", ".join(map(escape_markdown, survey.left_out))
        text += "\n\n" + LEFT_OUT.format(count=len(survey.left_out), names=names)
    return text


def finding_of(survey: Survey, figure: str) -> Finding:
    entropies = survey.mean_of("entropy")[:, -1]
    tokens = survey.mean_of("effective_tokens")[:, -1]
    sharpest, broadest = int(np.argmin(entropies.value)), int(np.argmax(entropies.value))
    keys = survey.geometries[-1].num_tokens
    most, least = tokens[broadest], tokens[sharpest]
    if least.high >= most.low or least.text(2) == most.text(2):
        text = (
            f"The readout query's attention is about as broad in each layer: up to {most.text(2)} effective tokens of "
            f"{keys}, mean over heads (n = {survey.num_images:,})."
        )
        return Finding(text, figure, rank=7)
    text = (
        f"The readout query's attention is broadest in layer {broadest + 1}: {most.text(2)} effective tokens of "
        f"{keys}, mean over heads. It is sharpest in layer {sharpest + 1}: {least.text(2)} "
        f"(layers picked afterwards, n = {survey.num_images:,})."
    )
    return Finding(text, figure, rank=7)


def head_counts(survey: Survey) -> str:
    """Return how many heads layers have: "4", or "3 to 12"."""
    counts = (~np.isnan(survey.summaries["entropy"].mean)).sum(axis=1)
    return str(counts[0]) if np.ptp(counts) == 0 else f"{counts.min()} to {counts.max()}"


def layer_numbers(summaries: dict[str, MeasureSummary]) -> list[dict[str, Any]]:
    return [
        {
            name: {
                "unit": UNITS[name],
                "mean_by_head": summaries[name].mean[layer],
                "deviation_by_head": summaries[name].deviation[layer],
                "quantiles": dict(zip(QUANTILES, summaries[name].quantiles(QUANTILES)[layer], strict=True)),
            }
            for name in MEASURE_NAMES
        }
        for layer in range(len(summaries["entropy"].mean))
    ]


def mean_table(survey: Survey, images: str, names: Sequence[str]) -> Table:
    """Return means over images and heads with their intervals, of some measures."""
    content = survey.selectivity.content_of_layers
    means = [content if name == "content" else survey.mean_of(name)[:, -1] for name in names]
    rows = [
        [str(layer + 1), *(interval[layer].text() for interval in means)] for layer in range(len(survey.layer_names))
    ]
    some = f" (content dependence: {content.n:,} of the images)" if "content" in names else ""
    return Table(
        f"Means over {images} and the layer's heads ({head_counts(survey)}), with 95% bootstrap intervals over "
        f"images{some}. By head and with the spread: attention_statistics.json.",
        ["layer", *(LABELS[name] for name in names)],
        rows,
    )


def outcome_table(groups: Groups) -> Table:
    differences = groups.wrong_minus_correct.values()
    rows = [
        [str(layer + 1), *(difference[layer].text() for difference in differences)]
        for layer in range(len(groups.wrong_minus_correct["entropy"].value))
    ]
    return Table(
        f"Misclassified (n = {groups.num_wrong:,}) minus correctly classified images (n = {groups.num_correct:,}), "
        "mean over heads, with 95% intervals over images.",
        ["layer", *(LABELS[name] for name in OUTCOME_MEASURES)],
        rows,
    )


def records(survey: Survey) -> list[dict[str, Any]]:
    """Return one row for each measure, layer and head."""
    rows = []
    for name, unit in UNITS.items():
        summary, interval = survey.summaries[name], survey.mean_of(name)
        rows += [
            {
                "measure": name,
                "unit": unit,
                "layer": layer + 1,
                "head": head + 1,
                "mean": float(mean),
                "low": float(interval.low[layer, head]),
                "high": float(interval.high[layer, head]),
                "standard_deviation": float(summary.deviation[layer, head]),
                "images": summary.n,
            }
            for (layer, head), mean in np.ndenumerate(summary.mean)
            if not np.isnan(mean)
        ]
    return rows


CHAPTER = ChapterWriter(
    "Statistics", write, ("attention_statistics", "attention_statistics_by_head", "attention_statistics_by_class")
)

TEXT = """How focused is attention, and where does it go? Over {n:,} {kind}{accuracy}, for {who}:

- **maximum** and **mean**: the largest and the mean weight on a patch. The mean is the share that prefix tokens leave
  to the image, divided by the number of patches.
- **entropy**: of the whole row of weights{highest}.
- **distance**: how far patch queries look, in pixels, on average.
- **confidence**: the largest weight of each query, mean over all queries.
- **sink strength**: the share of all queries' attention that the most attended key receives.
- **divergence**: a head's mean Jensen-Shannon divergence from the layer's other heads, 0 for a copy and 0.693 for
  heads that have no key in common.

Where a class token is read out, the last layer's patch queries cannot affect the logits. So it has no distance,
confidence and sink strength."""

TRENDS = """From shallow to deep (the last third of the layers minus the first, mean over heads{unread}): {trends}."""

OUTCOMES = """{wrong:,} images are misclassified and {right:,} correctly classified. The misclassified ones are
different, harder images, so the differences do not show that attention caused the errors."""

LEFT_OUT = """Omitted, because their keys have no known position on the image, or hidden by their kernel: {count} layers
({names})."""
