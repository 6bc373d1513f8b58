"""The figure of the trust chapter: curves above; gains and the likeness to maps of random weights below."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from attention_visualizer.analysis.trust.measure import TrustResult
from attention_visualizer.analysis.trust.verdict import (
    AMOUNT,
    BASELINES,
    DIRECTIONS,
    INKED,
    MAX_LIKENESS,
    MIN_GAIN,
    OPERATOR_NAMES,
    RANDOM,
)
from attention_visualizer.figures import charts
from attention_visualizer.measures.perturbation import OPERATORS

COLORS = ("#b2182b", "#1b7837", "#2166ac", "#e08214")  # of methods
BASELINE_COLOR, BASELINE_STYLES = "#777777", {RANDOM: ":", INKED: "--", AMOUNT: "-"}


def draw(result: TrustResult) -> Figure:
    figure = Figure(figsize=(14, 11.5), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1, 1.7))
    upper, lower = parts
    draw_curves(upper, result)
    left, right = lower.subplots(1, 2, width_ratios=(1.5, 1))
    draw_gains(left, result)
    draw_likeness(right, result)
    return charts.with_headline(figure, f"Is the map a faithful explanation? {result.num_images:,} test images")


def draw_curves(figure: SubFigure, result: TrustResult) -> None:
    """Mean deletion and insertion curves of baselines and methods, for each operator."""
    axes = figure.subplots(1, len(OPERATORS) * len(DIRECTIONS), sharey=True)
    comparisons = [(operator, direction) for operator in OPERATORS for direction in DIRECTIONS]
    for axis, (operator, direction) in zip(axes, comparisons, strict=True):
        for name, style in BASELINE_STYLES.items():
            curves = result.curves[name, operator]
            mean = getattr(curves, direction).mean(axis=0)
            axis.plot(curves.shares, mean, color=BASELINE_COLOR, linestyle=style, label=name)
        for method, color in zip(result.methods, COLORS, strict=False):
            curves = result.curves[method.name, operator]
            mean = getattr(curves, direction).mean(axis=0)
            axis.plot(curves.shares, mean, color=color, linewidth=1.8, label=method.name)
        axis.set_title(f"{direction}, {OPERATOR_NAMES[operator]}", fontsize=11)
        axis.set_xlabel(f"share of patches {'removed' if direction == 'deletion' else 'restored'}")
        charts.clean(axis)
    axes[0].set_ylabel("probability of the class")
    axes[0].legend(fontsize=9, frameon=False)


def draw_gains(axis: Axes, result: TrustResult) -> None:
    """A row for each comparison: each method's gain with its interval, and a bar where random weights make it need
    more than MIN_GAIN."""
    gains = result.methods[0].gains
    # Comparisons of one direction and operator stand together.
    at = -(np.arange(len(gains)) + np.arange(len(gains)) // len(BASELINES) * 0.9)
    for number, (method, color) in enumerate(zip(result.methods, COLORS, strict=False)):
        heights = at + 0.18 * ((len(result.methods) - 1) / 2 - number)
        intervals = [gain.value for gain in method.gains]
        values, low, high = (np.array([getattr(one, end) for one in intervals]) for end in ("value", "low", "high"))
        charts.forest(heights, values, low, high, axis, color)
        needed = np.array([gain.needed for gain in method.gains])
        more = needed > MIN_GAIN
        axis.vlines(needed[more], heights[more] - 0.09, heights[more] + 0.09, color=color, linewidth=3)
    axis.axvline(MIN_GAIN, color=charts.REFERENCE, linestyle="--", linewidth=1)
    axis.set_yticks(at, [f"against {gain.baseline}" for gain in gains])
    for first in range(0, len(gains), len(BASELINES)):
        name, place = gains[first].comparison, axis.get_yaxis_transform()
        axis.text(0, at[first] + 0.75, name, transform=place, fontsize=10, fontweight="bold")
    axis.set_ylim(at[-1] - 0.6, at[0] + 1.2)
    axis.tick_params(axis="y", labelsize=9)
    axis.set_xlabel("probability gained over that ranking (mean over shares); bars: required by random weights")
    charts.clean(axis, "x")


def draw_likeness(axis: Axes, result: TrustResult) -> None:
    """How each method's map departs from the trained one as more weights become random."""
    for method, color in zip(result.methods, COLORS, strict=False):
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
