"""Entropy, maximum and mean attention by layer and head over the whole test set."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from attention_visualizer.analysis.needs import ChapterWriter
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.analysis.study.survey import MEASURE_NAMES, Survey
from attention_visualizer.figures import charts
from attention_visualizer.measures.intervals import Interval, share_interval
from attention_visualizer.measures.streaming import ALL_MEASURES, MeasureSummary
from attention_visualizer.report.chapter import Chapter, FigureFile, Finding, Table, escape_markdown

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SHOWN = ("maximum", "mean", "entropy")
BY_HEAD = ("entropy", "distance", "sink", "divergence", "confidence", "content")
OUTCOME_MEASURES = ("entropy", "effective_tokens", "maximum", "distance")
LABELS = {measure.name: f"{measure.label} ({measure.unit})" for measure in ALL_MEASURES}
LABELS["content"] = "content dependence (nats)"
UNITS = {measure.name: measure.unit for measure in ALL_MEASURES}
ENTROPY = MEASURE_NAMES.index("entropy")


def write(study: Study) -> Chapter:
    survey = study.survey
    n, kind = survey.num_images, f"{study.target.images.kind}s"
    who = f"{n:,} {kind}"
    name = study.output.save(figure(survey, who), "attention_statistics")
    by_head = study.output.save(head_figure(survey, who), "attention_statistics_by_head")
    cls = survey.reads_class_token
    unread = " (no distance for the last layer, whose patch queries cannot affect the logits)" if cls else ""
    figures = [
        FigureFile(name, f"Maximum attention, mean attention and entropy by layer, n = {n:,} {kind} x heads."),
        FigureFile(
            by_head,
            "Entropy, mean attention distance, sink strength, divergence from the layer's other heads, head confidence "
            f"and content dependence by layer and head, means over {n:,} {kind}{unread}.",
        ),
    ]
    tables = [layer_table(survey, who), mean_table(survey, who)]
    groups = survey.right is not None
    if groups:
        assert study.target.images.labels is not None
        names = list(study.target.images.class_names)
        by_class = study.output.save(group_figure(survey, names, who), "attention_statistics_by_class")
        wrong = int((~survey.right).sum()) if survey.right is not None else 0
        sizes = np.bincount(survey.labels)
        smallest, largest = sizes[sizes > 0].min(), sizes.max()
        figures.append(
            FigureFile(
                by_class,
                f"Entropy by class ({smallest:,} to {largest:,} images) and layer, mean over heads; and how much it "
                f"differs between the {wrong:,} wrong and the {n - wrong:,} right answers, with 95 % intervals.",
            )
        )
        tables.append(outcome_table(survey))
    return Chapter(
        f"Statistics over the {kind}",
        text_of(survey, kind),
        figures,
        tables,
        {
            "images": n,
            "accuracy": survey.accuracy,
            "query": "cls" if cls else "patches",
            "layer_names": survey.layer_names,
            "layers": layer_numbers(survey.summaries),
            "means": {measure.name: survey.mean_of(measure.name).numbers() for measure in ALL_MEASURES},
            "content_dependence": survey.selectivity.content.numbers(),
            "content_dependence_of_layers": survey.selectivity.content_of_layers.numbers(),
            "trends_with_depth": {name: each.numbers() for name, each in depth_trends(survey).items()},
            "entropy_by_class": [
                survey.means_by_class.of_group(number)[ENTROPY].numbers()
                for number in range(survey.means_by_class.groups)
            ]
            if groups
            else None,
            "wrong_minus_right": {name: outcome_difference(survey, name).numbers() for name in OUTCOME_MEASURES}
            if groups
            else None,
        },
        records(survey),
        finding=finding_of(survey, figures[-1].name if groups else name),
    )


def text_of(survey: Survey, kind: str) -> str:
    uniform, right = survey.uniform_entropy, survey.right
    text = TEXT.format(
        n=survey.num_images,
        kind=kind,
        who="the CLS token" if survey.reads_class_token else "the patch queries (mean over them)",
        accuracy=""
        if right is None
        else f" (accuracy {share_interval(int(right.sum()), len(right)).text(2, percent=True)})",
        highest="" if uniform is None else f", which is {uniform:.3f} nats when it is uniform",
    )
    trends = depth_trends(survey)
    if trends:
        told = "; ".join(f"{LABELS[name].split(' (')[0]} {each.text(3)} {UNITS[name]}" for name, each in trends.items())
        text += "\n\n" + TRENDS.format(
            told=told, unread=" (the last layer left out of the distance)" if survey.reads_class_token else ""
        )
    if survey.right is not None:
        text += "\n\n" + OUTCOMES.format(wrong=int((~survey.right).sum()), right=int(survey.right.sum()))
    if survey.left_out:
        names = ", ".join(map(escape_markdown, survey.left_out))
        text += "\n\n" + LEFT_OUT.format(count=len(survey.left_out), names=names)
    return text


def depth_trends(survey: Survey) -> dict[str, Interval]:
    """Mean of the last third of the layers minus that of the first third; of distance without a last layer that only
    the class token leaves. Empty for models of fewer than three layers."""
    num_layers = len(survey.layer_names)
    found = {}
    for name in ("entropy", "distance"):
        layers = np.arange(num_layers - (name == "distance" and survey.reads_class_token))
        third = len(layers) // 3
        if third:
            index = MEASURE_NAMES.index(name)
            found[name] = survey.means.of(
                lambda means, index=index, layers=layers, third=third: (  # type: ignore[misc]
                    means[..., index, layers[-third:], -1].mean(axis=-1)
                    - means[..., index, layers[:third], -1].mean(axis=-1)
                )
            )
    return found


def outcome_difference(survey: Survey, name: str) -> Interval:
    """Mean over wrong answers minus that over right ones, [layer]."""
    return survey.means_by_outcome.difference(0, 1)[MEASURE_NAMES.index(name)]


def finding_of(survey: Survey, figure: str) -> Finding:
    entropies = survey.mean_of("entropy")[:, -1]
    tokens = survey.mean_of("effective_tokens")[:, -1]
    sharpest, broadest = int(np.argmin(entropies.value)), int(np.argmax(entropies.value))
    keys = survey.geometries[-1].num_tokens
    told = [
        f"{tokens.value[each]:.2f} ({tokens.low[each]:.2f} to {tokens.high[each]:.2f})" for each in (broadest, sharpest)
    ]
    text = (
        f"The readout's attention is broadest in layer {broadest + 1}, {told[0]} effective tokens of {keys}, and "
        f"sharpest in layer {sharpest + 1}, {told[1]}: means over heads and {survey.num_images:,} images."
    )
    return Finding(text, figure)


def figure(measured: Survey, images: str) -> Figure:
    """Box plots above, distributions below, for each measure."""
    drawn = Figure(figsize=(14, 8.5), layout="constrained")
    axes = drawn.subplots(2, len(SHOWN))
    uniform: dict[str, float | None] = dict.fromkeys(SHOWN)
    if measured.uniform_entropy is not None:
        share = 1 / measured.geometries[0].num_tokens
        uniform = {"maximum": share, "mean": share, "entropy": measured.uniform_entropy}
    for column, name in enumerate(SHOWN):
        summary = measured.summaries[name]
        charts.box_by_layer(
            summary.quantiles(QUANTILES), LABELS[name], axes[0, column], uniform[name], "uniform attention"
        )
        medians = summary.quantiles((0.5,))[:, 0]
        charts.distribution_by_layer(summary.counts.sum(axis=1), summary.edges, LABELS[name], axes[1, column], medians)
    charts.with_headline(drawn, f"Attention over {images}, all heads")
    return drawn


def head_figure(measured: Survey, images: str) -> Figure:
    """Layers down, heads across; no distance where patch queries cannot affect the logits."""
    means = {name: summary.mean.copy() for name, summary in measured.summaries.items()}
    num_layers, num_heads = means["entropy"].shape
    if measured.reads_class_token and num_layers > 1:
        means["distance"][-1] = np.nan
    means["content"] = measured.selectivity.content.value
    shown = [name for name in BY_HEAD if not np.isnan(means[name]).all()]
    columns = 2
    rows = -(-len(shown) // columns)
    cell = 0.62 if num_layers * num_heads <= charts.MOST_ANNOTATED else 0.3
    size = max(11.0, columns * (cell * num_heads + 1.8)), rows * max(2.8, 0.36 * num_layers + 1.2) + 0.4
    drawn = Figure(figsize=size, layout="constrained")
    axes = drawn.subplots(rows, columns, squeeze=False).flatten()
    for axis, name in zip(axes, shown, strict=False):
        charts.heat_map(means[name], LABELS[name], axis)
        if name == "distance" and measured.reads_class_token and num_layers > 1:
            axis.text(num_heads / 2, num_layers - 0.5, "cannot affect the answer", ha="center", va="center", fontsize=9)
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    charts.with_headline(drawn, f"By layer and head, means over {images}")
    return drawn


def layer_table(survey: Survey, images: str) -> Table:
    """Mean over images and heads, and between which values the middle 90 % of them lie."""
    summaries = survey.summaries
    columns = ["layer", *(f"{measure.label} ({measure.unit})" for measure in ALL_MEASURES)]
    rows = []
    for layer in range(len(summaries["entropy"].mean)):
        row = [str(layer + 1)]
        for measure in ALL_MEASURES:
            summary = summaries[measure.name]
            low, _, _, _, high = summary.quantiles(QUANTILES)[layer]
            defined = not np.isnan(summary.mean[layer]).all()
            row.append(f"{np.nanmean(summary.mean[layer]):.3f} ({low:.3f} to {high:.3f})" if defined else "–")
        rows.append(row)
    heads = heads_of(survey)
    return Table(
        f"Mean over {images} and the layer's heads ({heads}), with the range of the middle 90 % of images x heads; how "
        "sure the means are is in the next table.",
        columns,
        rows,
    )


def heads_of(survey: Survey) -> str:
    """How many heads layers have: "4", or "3 to 12"."""
    counts = (~np.isnan(survey.summaries["entropy"].mean)).sum(axis=1)
    return str(counts[0]) if np.ptp(counts) == 0 else f"{counts.min()} to {counts.max()}"


def layer_numbers(summaries: dict[str, MeasureSummary]) -> list[dict[str, Any]]:
    return [
        {
            measure.name: {
                "unit": measure.unit,
                "mean_by_head": numbers(summaries[measure.name].mean[layer]),
                "deviation_by_head": numbers(summaries[measure.name].deviation[layer]),
                "quantiles": dict(
                    zip(map(str, QUANTILES), numbers(summaries[measure.name].quantiles(QUANTILES)[layer]), strict=True)
                ),
            }
            for measure in ALL_MEASURES
        }
        for layer in range(len(summaries["entropy"].mean))
    ]


def numbers(values: NDArray[np.float64]) -> list[float | None]:
    """For JSON, which knows no NaN."""
    return [None if np.isnan(value) else float(value) for value in values]


def mean_table(survey: Survey, images: str) -> Table:
    """Means over images and heads with their intervals."""
    columns = ["layer", *(f"{measure.label} ({measure.unit})" for measure in ALL_MEASURES), "content dependence (nats)"]
    content = survey.selectivity.content_of_layers
    means = [survey.mean_of(measure.name)[:, -1] for measure in ALL_MEASURES]
    rows = [
        [
            str(layer + 1),
            *(each[layer].text() for each in means),
            content[layer].text(),
        ]
        for layer in range(len(survey.layer_names))
    ]
    return Table(
        f"Means over {images} and the layer's heads ({heads_of(survey)}), with 95 % bootstrap intervals over images "
        f"(content dependence: {content.n:,} of the images; intervals by head in attention_statistics.json).",
        columns,
        rows,
    )


def outcome_table(survey: Survey) -> Table:
    differences = {name: outcome_difference(survey, name) for name in OUTCOME_MEASURES}
    rows = [
        [str(layer + 1), *(each[layer].text() for each in differences.values())]
        for layer in range(len(survey.layer_names))
    ]
    assert survey.right is not None
    wrong, right = int((~survey.right).sum()), int(survey.right.sum())
    return Table(
        f"Wrong answers (n = {wrong:,}) minus right ones (n = {right:,}), mean over heads, with 95 % intervals over "
        "images.",
        ["layer", *(LABELS[name] for name in OUTCOME_MEASURES)],
        rows,
    )


def group_figure(survey: Survey, class_names: list[str], images: str) -> Figure:
    """Entropy by class and layer, and wrong against right answers."""
    num_layers = len(survey.layer_names)
    drawn = Figure(
        figsize=(max(11.0, 0.62 * num_layers + 8), max(4.2, 0.36 * len(class_names) + 1.6)), layout="constrained"
    )
    left, right = drawn.subplots(1, 2, width_ratios=(1.25, 1))
    by_class = np.stack([survey.means_by_class.of_group(number)[ENTROPY].value for number in range(len(class_names))])
    charts.heat_map(by_class, LABELS["entropy"], left)
    left.set_xlabel("layer")
    left.set_yticklabels(class_names, rotation=0)
    left.set_ylabel("true class")
    difference = outcome_difference(survey, "entropy")
    at = np.arange(num_layers)[::-1]
    charts.forest(at, difference.value, difference.low, difference.high, right)
    right.set_yticks(at, [str(layer + 1) for layer in range(num_layers)])
    right.set_ylim(-0.7, num_layers - 0.3)
    right.set_ylabel("layer")
    assert survey.right is not None
    wrong = int((~survey.right).sum())
    counts = f"(n = {wrong:,} and {len(survey.right) - wrong:,})"
    right.set_xlabel(f"entropy when wrong minus when right (nats)\n{counts}")
    charts.clean(right, "x")
    return charts.with_headline(drawn, f"By class and by outcome, {images}")


def records(survey: Survey) -> list[dict[str, Any]]:
    """One row for each measure, layer and head."""
    found = []
    for measure in ALL_MEASURES:
        summary, interval = survey.summaries[measure.name], survey.mean_of(measure.name)
        found += [
            {
                "measure": measure.name,
                "unit": measure.unit,
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
    return found


CHAPTER = ChapterWriter(
    "Statistics", write, ("attention_statistics", "attention_statistics_by_head", "attention_statistics_by_class")
)

TEXT = """Over {n:,} {kind}{accuracy}, for {who}: the largest and the mean weight on a patch, and the entropy of the
whole row of weights{highest}. The mean weight is what prefix tokens leave to the image, divided by the number of
patches. The mean attention distance is that of the patch queries; where a class token is read out, the last layer's
patch queries cannot affect the logits, so their distance says nothing about the prediction. Sink strength is the share
of all queries' attention that the most attended key draws; the divergence of a head is its mean Jensen-Shannon
divergence from the layer's other heads, 0 for a copy and 0.693 for heads that have no key in common."""

TRENDS = """With depth, the last third of the layers minus the first third, mean over heads{unread}: {told}."""

OUTCOMES = """{wrong:,} answers are wrong and {right:,} right. They are answers to other images, and harder ones, so the
differences between them do not say that attention made an answer wrong."""

LEFT_OUT = """Left out, because their keys cannot be placed on the image: {count} layers ({names})."""
