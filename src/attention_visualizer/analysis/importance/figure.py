"""The figures of what predictions need of attention: errors by intervention; by head, heads together and entropy."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from numpy.typing import NDArray

from attention_visualizer.analysis.importance.measure import Importance, JointAblation
from attention_visualizer.analysis.importance.outcomes import Outcomes
from attention_visualizer.analysis.importance.tables import NO_INTERVENTION
from attention_visualizer.figures import charts
from attention_visualizer.measures.intervals import Interval

Array = NDArray[Any]

MAX_LABELLED = 3  # heads of the largest rises


def draw_whole_model(measured: Importance) -> Figure:
    """Errors with each intervention in all layers, a row each."""
    outcomes = measured.whole_model
    names = [NO_INTERVENTION, *outcomes.names]
    accuracies = [measured.accuracy, *(outcomes.accuracy[row] for row in range(len(outcomes.names)))]
    counts = [outcomes.errors_before, *outcomes.errors]
    figure = Figure(figsize=(11, 1.7 + 0.5 * len(names)), layout="constrained")
    axis = figure.subplots()
    errors = [error_percentage(each) for each in accuracies]
    for row, (error, accuracy, count) in enumerate(zip(errors, accuracies, counts, strict=True)):
        color = charts.REFERENCE if row == 0 else charts.MEDIAN
        axis.plot([error.low, error.high], [row, row], "-|", color=color, linewidth=1.8, markersize=10)
        axis.plot(error.value, row, "o", color=color, markersize=6)
        text = f"{accuracy.text(2, percent=True)}; {errors_name(measured)}: {count:,}"
        axis.annotate(text, (1.02, row), xycoords=("axes fraction", "data"), va="center", fontsize=10.5)
    axis.axvline(float(errors[0].value), color=charts.REFERENCE, linestyle="--", linewidth=1)
    axis.set_yticks(range(len(names)), names, fontsize=10.5)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xscale("log")
    axis.set_xlim(0.8 * min(float(each.low) for each in errors), 100)
    axis.xaxis.set_major_locator(FixedLocator([0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda position, _: f"{position:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel(f"{errors_name(measured)} (% of the images, logarithmic); at the right: {accuracy_name(measured)}")
    charts.clean(axis, "x")
    return charts.with_headline(figure, f"Attention replaced in all layers, {measured.images}")


def error_percentage(accuracy: Interval) -> Interval:
    """Return what is missing to an accuracy in percent, at least half an image, to be drawn on a logarithmic axis."""
    least = 50 / accuracy.n
    value, low, high = (np.maximum(100 * (1 - each), least) for each in (accuracy.value, accuracy.high, accuracy.low))
    return Interval(value, low, high, accuracy.n)


def draw_heads(measured: Importance) -> Figure:
    """Above, the rise in errors by layer and head; below, heads ablated together and each head's entropy."""
    num_layers, num_columns = rises_by_layer(measured).shape
    heights = max(3.0, 0.42 * num_layers + 1.4), 4.2
    figure = Figure(figsize=(max(11.0, 0.7 * num_columns + 4), sum(heights)), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=heights)
    upper, lower = parts
    draw_rises(upper.subplots(), measured)
    axes = lower.subplots(1, 2 if measured.joint is not None else 1, squeeze=False)[0]
    draw_entropy(axes[-1], measured)
    if measured.joint is not None:
        draw_joint(axes[0], measured, measured.joint)
    return charts.with_headline(figure, f"Head importance, {measured.images}")


def rises_by_layer(measured: Importance) -> Array:
    """Return the rise in errors [layer, head + 1], the last column without the whole layer; NaN for no head."""
    layers, heads = measured.heads.index
    num_layers = len(measured.zero.names) - len(measured.heads)
    rises = np.full((num_layers, heads.max() + 2), np.nan)
    rises[layers, heads] = measured.rise_of_heads
    rises[:, -1] = measured.zero.rise[len(measured.heads) :]
    return rises


def draw_rises(axis: Axes, measured: Importance) -> None:
    """A heat map of layers and heads; the scale is that of single heads."""
    rises = rises_by_layer(measured)
    columns = [*(str(head + 1) for head in range(rises.shape[1] - 1)), "all"]
    reach = max(float(np.nanmax(np.abs(rises[:, :-1]))), 1.0)
    charts.changes(rises, f"more {errors_name(measured)}", axis, reach, columns)
    axis.set_title(
        f"{errors_name(measured)} without a head or a layer (zero ablation), beyond the "
        f"{measured.zero.errors_before:,} with all; bold: needed",
        fontsize=11,
    )
    needed = measured.needed(measured.zero)
    layers, heads = measured.heads.index
    places = [*zip(layers, heads, strict=True), *((layer, rises.shape[1] - 1) for layer in range(len(rises)))]
    bold = {place for place, is_needed in zip(places, needed, strict=True) if is_needed}
    for text in axis.texts:
        column, row = (int(position) for position in text.get_position())
        if (row, column) in bold:
            text.set_fontweight("bold")


def draw_joint(axis: Axes, measured: Importance, joint: JointAblation) -> None:
    """The accuracy without more and more heads, a line for each order."""
    lines: dict[str, tuple[Outcomes, str]] = {
        "the least needed first": (joint.least, charts.REFERENCE),
        "the most needed first": (joint.most, charts.MEDIAN),
    }
    for label, (outcomes, color) in lines.items():
        accuracy = outcomes.accuracy.times(100)
        axis.fill_between(joint.counts, accuracy.low, accuracy.high, color=color, alpha=0.2, linewidth=0)
        axis.plot(joint.counts, accuracy.value, "o-", color=color, label=label)
    before = 100 * (1 - joint.most.errors_before / joint.most.accuracy.n)
    axis.axhline(before, color=charts.REFERENCE, linestyle="--", linewidth=1, label="all heads")
    axis.set_xscale("log", base=2)
    axis.set_xticks(joint.counts, [str(count) for count in joint.counts])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("heads ablated together (logarithmic)")
    axis.set_ylabel(f"{accuracy_name(measured)} (%)")
    axis.set_title("heads ranked on one half of the images, judged on the other", fontsize=11)
    axis.legend(frameon=False, fontsize=9)
    charts.clean(axis)


def draw_entropy(axis: Axes, measured: Importance) -> None:
    """The rise in errors without each head against its entropy."""
    entropy, rise = measured.entropy, measured.rise_of_heads
    axis.axhline(0, color=charts.REFERENCE, linewidth=1)
    axis.scatter(entropy, rise, color=charts.MEDIAN, s=28, zorder=3)
    middle = np.mean([entropy.min(), entropy.max()])
    for position in np.argsort(rise, kind="stable")[-MAX_LABELLED:]:
        if rise[position] <= 0:
            continue
        inward = -1 if entropy[position] > middle else 1
        axis.annotate(
            measured.heads.labels[position],
            (entropy[position], rise[position]),
            (5 * inward, 3),
            textcoords="offset points",
            ha="left" if inward > 0 else "right",
            fontsize=9,
        )
    axis.set_xlabel("attention entropy of the readout row (nats)")
    axis.set_ylabel(f"more {errors_name(measured)} without the head")
    correlation = measured.entropy_correlation.text(2)
    axis.set_title(f"rank correlation {correlation}, p = {measured.entropy_p_value:.3f}", fontsize=11)
    charts.clean(axis)


def errors_name(measured: Importance) -> str:
    return "errors" if measured.class_source == "true" else "other predictions"


def accuracy_name(measured: Importance) -> str:
    return "accuracy" if measured.class_source == "true" else "agreement with its own predictions"
