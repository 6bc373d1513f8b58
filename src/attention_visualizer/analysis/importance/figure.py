"""The figure of what the prediction needs: changes by layer and head, and losses beside what could explain them."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from attention_visualizer.analysis.importance.measure import ABLATIONS, Correlation, Importance
from attention_visualizer.figures import charts

COLORS = {"zero": charts.MEDIAN, "mean": charts.PLACE}
MAX_LABELLED = 3  # heads of the largest losses


def draw(measured: Importance) -> Figure:
    """Above, changes by layer and head for each ablation; below, each head's loss beside its entropy and confidence."""
    num_layers, num_columns = measured.score_changes["zero"].value.shape
    heights = max(3.2, 0.42 * num_layers + 1.4), 4.2
    figure = Figure(figsize=(max(11.0, 1.4 * num_columns + 4), sum(heights)), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=heights)
    upper, lower = parts
    draw_changes(upper, measured)
    axes = lower.subplots(1, 2, sharey=True)
    for axis, (label, correlation) in zip(axes, measured.correlations.items(), strict=True):
        draw_losses(axis, measured, correlation)
        axis.set_xlabel(label)
    axes[0].set_ylabel("loss of the class's score (logits)")
    return charts.with_headline(figure, f"Head importance, {measured.images}")


def draw_changes(figure: SubFigure, measured: Importance) -> None:
    """A heat map for each ablation, in percent of the score."""
    percent = {
        ablation: 100 * change.value / abs(float(measured.score.value))
        for ablation, change in measured.score_changes.items()
    }
    reach = max(float(np.nanmax(np.abs(values))) for values in percent.values())
    num_heads = percent["zero"].shape[1] - 1
    columns = [*(str(head + 1) for head in range(num_heads)), "all"]
    axes = figure.subplots(1, len(percent))
    for axis, (ablation, values) in zip(axes, percent.items(), strict=True):
        charts.changes(values, "change of the class's score (%)", axis, reach, columns, axis is axes[-1])
        axis.set_title(f"{ABLATIONS[ablation].short_name}: {ABLATIONS[ablation].name}", fontsize=11)


def draw_losses(axis: Axes, measured: Importance, correlation: Correlation) -> None:
    """A point for each head and ablation, with its interval, beside the head's quantity."""
    for ablation, color in COLORS.items():
        loss = measured.loss(ablation)
        axis.vlines(correlation.quantity, loss.low, loss.high, color=color, linewidth=1)
        label = (
            f"{ABLATIONS[ablation].short_name}: rank correlation {correlation.value[ablation].text(2)}, "
            f"p = {correlation.p_value[ablation]:.3f}"
        )
        axis.scatter(correlation.quantity, loss.value, color=color, s=28, zorder=3, label=label)
        if ablation == "zero":
            label_largest(axis, measured, correlation)
    if measured.least_loss < axis.get_ylim()[1]:
        axis.axhline(measured.least_loss, color=charts.REFERENCE, linestyle="--", linewidth=1)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=9)
    charts.clean(axis)


def label_largest(axis: Axes, measured: Importance, correlation: Correlation) -> None:
    """Name the heads of the largest losses, towards the middle of the axis."""
    quantity, loss = correlation.quantity, measured.loss("zero").value
    middle = np.mean([quantity.min(), quantity.max()])
    for position in np.argsort(loss)[-MAX_LABELLED:]:
        inward = -1 if quantity[position] > middle else 1
        axis.annotate(
            measured.heads.labels[position],
            (quantity[position], loss[position]),
            (5 * inward, 3),
            textcoords="offset points",
            ha="left" if inward > 0 else "right",
            fontsize=9,
        )
