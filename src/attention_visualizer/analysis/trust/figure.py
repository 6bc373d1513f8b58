"""The figure of the trust chapter: curves above; shares of what is possible and the likeness to maps of random weights
below."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from attention_visualizer.analysis.trust.measure import TrustResult
from attention_visualizer.analysis.trust.verdict import (
    AMOUNT,
    COMPARISONS,
    EDGES,
    INKED,
    LEAVE_ONE_OUT,
    MAX_LIKENESS,
    MIN_SHARE,
    OPERATOR_NAMES,
    RANDOM,
    SHAPLEY,
)
from attention_visualizer.figures import charts

COLORS = ("#b2182b", "#8c510a", "#1b7837", "#2166ac", "#e08214")  # of methods
BASELINE_COLOR, BASELINE_STYLES = "#777777", {RANDOM: ":", INKED: "--", AMOUNT: "-", EDGES: "-."}
REFERENCE_COLOR, REFERENCE_STYLES = "black", {SHAPLEY: "-", LEAVE_ONE_OUT: "--"}


def draw(result: TrustResult) -> Figure:
    figure = Figure(figsize=(14, 10), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    upper, lower = parts
    draw_curves(upper, result)
    left, right = lower.subplots(1, 2, width_ratios=(1.3, 1))
    draw_shares(left, result)
    draw_likeness(right, result)
    return charts.with_headline(figure, f"Is the map a faithful explanation? {result.num_images:,} test images")


def draw_curves(figure: SubFigure, result: TrustResult) -> None:
    """Mean deletion and insertion curves of baselines, methods and references, for each operator."""
    axes = figure.subplots(1, len(COMPARISONS), sharey=True)
    styles: list[tuple[str, dict[str, Any]]] = [
        (name, {"color": BASELINE_COLOR, "linestyle": style}) for name, style in BASELINE_STYLES.items()
    ]
    styles += [
        (each.name, {"color": color, "linewidth": 1.8}) for each, color in zip(result.methods, COLORS, strict=True)
    ]
    styles += [(name, {"color": REFERENCE_COLOR, "linestyle": each}) for name, each in REFERENCE_STYLES.items()]
    for axis, (operator, direction) in zip(axes, COMPARISONS, strict=True):
        for name, style in styles:
            curves = result.curves[name, operator]
            axis.plot(curves.shares, getattr(curves, direction).mean(axis=0), label=name, **style)
        axis.set_title(f"{direction}, {OPERATOR_NAMES[operator]}", fontsize=11)
        axis.set_xlabel(f"share of patches {'removed' if direction == 'deletion' else 'restored'}")
        charts.clean(axis)
    axes[0].set_ylabel("probability of the class")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=6, fontsize=9, frameon=False)


def draw_shares(axis: Axes, result: TrustResult) -> None:
    """A row for each ranking: its share of what Shapley values gain, and the same in each comparison."""
    colors = dict(zip((each.name for each in result.methods), COLORS, strict=True))
    shown = [each for each in result.rankings if each.name not in (SHAPLEY, INKED, RANDOM)]  # 1, 0 and far below
    heights = -np.arange(len(shown))
    for at, each in zip(heights, shown, strict=True):
        share = each.gains.share[SHAPLEY]
        color = colors.get(each.name, REFERENCE_COLOR if each.name == LEAVE_ONE_OUT else BASELINE_COLOR)
        charts.forest(np.asarray(at), share.value, share.low, share.high, axis, color)
        single = each.gains.shares[SHAPLEY].value.ravel()
        axis.plot(single, np.full(len(single), at - 0.25), "|", color=color, markersize=6, alpha=0.7)
    axis.axvline(MIN_SHARE, color=charts.REFERENCE, linestyle="--", linewidth=1)
    axis.axvline(1, color=charts.REFERENCE, linewidth=1)
    axis.set_yticks(heights, [each.name for each in shown], fontsize=9)
    axis.set_xlabel(
        f"share of what is possible (0: {INKED}; 1: {SHAPLEY})\nticks: deletion and insertion with each operator alone"
    )
    charts.clean(axis, "x")


def draw_likeness(axis: Axes, result: TrustResult) -> None:
    """How each method's map departs from the trained one as more weights become random."""
    for method, color in zip(result.methods, COLORS, strict=True):
        if method.likeness is not None:
            steps = np.arange(len(result.stages) + 1)
            values = np.append(1.0, method.likeness.value)
            axis.plot(steps, values, color=color, marker="o", markersize=4, label=method.name)
            axis.fill_between(
                steps[1:], method.likeness.low, method.likeness.high, color=color, alpha=0.15, linewidth=0
            )
    axis.axhline(MAX_LIKENESS, color=charts.REFERENCE, linestyle="--", linewidth=1)
    axis.axhline(0, color=charts.REFERENCE, linewidth=1)
    axis.set_xticks(range(len(result.stages) + 1), ["trained", *result.stages], rotation=45, ha="right", fontsize=9)
    axis.set_xlabel("weights randomised, from the output down to")
    axis.set_ylabel("rank correlation with the trained map")
    charts.clean(axis)
