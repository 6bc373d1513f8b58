"""Figures of attention statistics: by layer, by layer and head, by class and by outcome."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from attention_visualizer.analysis.statistics.measure import Groups, Statistics
from attention_visualizer.analysis.study.survey import MEASURE_NAMES, Survey
from attention_visualizer.figures import charts
from attention_visualizer.figures.fonts import drawable
from attention_visualizer.figures.notebook_figure import NotebookFigure
from attention_visualizer.measures.streaming import REPORTED_MEASURES

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BY_LAYER = ("maximum", "mean", "entropy")
BY_HEAD = ("entropy", "distance", "sink", "divergence", "confidence", "content")
LABELS = {measure.name: f"{measure.label} ({measure.unit})" for measure in REPORTED_MEASURES}
LABELS["content"] = "content dependence (nats)"
HEADS_IN_ROW = 2  # heat maps side by side


def draw_layers(survey: Survey, images: str) -> Figure:
    """Draw box plots above and distributions below, for each measure. images: what the survey is over, in words."""
    figure = NotebookFigure(figsize=(14, 8.5), layout="constrained")
    axes = figure.subplots(2, len(BY_LAYER))
    uniform: dict[str, float | None] = dict.fromkeys(BY_LAYER)
    if survey.uniform_entropy is not None:
        share = 1 / survey.geometries[0].num_tokens
        uniform = {"maximum": share, "mean": share, "entropy": survey.uniform_entropy}
    for column, name in enumerate(BY_LAYER):
        summary = survey.summaries[name]
        charts.box_by_layer(
            summary.quantiles(QUANTILES), LABELS[name], axes[0, column], uniform[name], "uniform attention"
        )
        medians = summary.quantiles((0.5,))[:, 0]
        charts.distribution_by_layer(summary.counts.sum(axis=1), summary.edges, LABELS[name], axes[1, column], medians)
    charts.with_headline(figure, f"Attention over {images}, all heads")
    return figure


def draw_heads(measured: Statistics) -> Figure:
    """Draw heat maps, layers down, heads across; measures of all queries not where these cannot affect the logits."""
    survey = measured.survey
    means = {name: summary.mean for name, summary in survey.summaries.items()}
    num_layers, num_heads = means["entropy"].shape
    means["content"] = survey.selectivity.content.value
    names = [name for name in BY_HEAD if not np.isnan(means[name]).all()]
    rows = -(-len(names) // HEADS_IN_ROW)
    cell = 0.62 if num_layers * num_heads <= charts.MAX_ANNOTATED else 0.3
    width = max(11.0, HEADS_IN_ROW * (cell * num_heads + 1.8))
    figure = Figure(figsize=(width, rows * max(2.8, 0.36 * num_layers + 1.2) + 0.4), layout="constrained")
    axes = figure.subplots(rows, HEADS_IN_ROW, squeeze=False).flatten()
    for axis, name in zip(axes, names, strict=False):
        charts.heat_map(means[name], LABELS[name], axis)
        if name in MEASURE_NAMES and not survey.has_measure[MEASURE_NAMES.index(name), -1]:
            axis.text(num_heads / 2, num_layers - 0.5, "cannot affect the logits", ha="center", va="center", fontsize=9)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    charts.with_headline(figure, f"By layer and head, means over {measured.images}")
    return figure


def draw_groups(groups: Groups, images: str) -> Figure:
    """Draw entropy by class and layer, and wrong against right answers."""
    difference = groups.wrong_minus_correct["entropy"]
    num_layers = len(difference.value)
    size = max(11.0, 0.62 * num_layers + 8), max(4.2, 0.36 * len(groups.class_names) + 1.6)
    figure = Figure(figsize=size, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    charts.heat_map(np.stack([interval.value for interval in groups.entropy]), LABELS["entropy"], left)
    left.set_xlabel("layer")
    left.set_yticklabels(list(map(drawable, groups.class_names)), rotation=0)
    left.set_ylabel("true class")
    heights = np.arange(num_layers)[::-1]
    charts.forest(heights, difference.value, difference.low, difference.high, right)
    right.set_yticks(heights, [str(layer + 1) for layer in range(num_layers)])
    right.set_ylim(-0.7, num_layers - 0.3)
    right.set_ylabel("layer")
    counts = f"(n = {groups.num_wrong:,} and {groups.num_correct:,})"
    right.set_xlabel(f"entropy, misclassified minus correct (nats)\n{counts}")
    charts.clean(right, "x")
    return charts.with_headline(figure, f"By class and by outcome, {images}")
