"""Charts that compare training runs: arrays in, matplotlib Axes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from attention_visualizer.figures.charts import MEDIAN, REFERENCE, clean, new_axes
from attention_visualizer.measures.intervals import Interval

Array = NDArray[Any]
TRAINED, CONTROL, TOO_SMALL = "#2166ac", "#999999", "#ececec"


def run_colors(num_runs: int) -> list[Any]:
    """A colour for each run: distinct ones up to ten, then along one scale."""
    if num_runs <= 10:
        return [matplotlib.colormaps["tab10"](number) for number in range(num_runs)]
    return [matplotlib.colormaps["viridis"](share) for share in np.linspace(0.05, 0.95, num_runs)]


def legend_above(ax: Axes, columns: int = 2) -> None:
    """Add a legend where it covers no value."""
    ax.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=columns,
        fontsize=9,
        frameon=False,
        columnspacing=1.2,
        handlelength=1.6,
    )


def partners_by_layer(
    matched: Array, random_pairing: Array, shifted: Array | None, random: Array | None, ax: Axes | None = None
) -> Axes:
    """Draw how unlike matched heads are, in nats, [pair, layer, head] each: dots and a line for matched; lines for
    random_pairing, for heads matched with the next layer's (shifted) and for models with random weights (random)."""
    ax = ax or new_axes()
    layers = np.arange(1, matched.shape[1] + 1)
    spread = np.linspace(-0.22, 0.22, matched.shape[0] * matched.shape[2])
    for layer in layers:
        ax.scatter(layer + spread, matched[:, layer - 1].ravel(), s=12, color=TRAINED, alpha=0.5, zorder=3)
    for values, label, color, style in (
        (matched, "matched heads", TRAINED, "-"),
        (shifted, "next layer's heads", MEDIAN, ":"),
        (random_pairing, "random pairing", REFERENCE, "--"),
        (random, "random weights", CONTROL, "-."),
    ):
        if values is not None:
            ax.plot(layers, values.mean(axis=(0, 2)), color=color, linestyle=style, linewidth=2, label=label, zorder=2)
    ax.set_xticks(layers)
    ax.set_ylim(0, 0.72)
    ax.set_xlabel("layer (dots: heads of all pairs of runs)")
    ax.set_ylabel("divergence of matched heads (nats)")
    legend_above(ax)
    return clean(ax)


def layers_by_run(
    values: Array,
    names: Sequence[str],
    controls: Array,
    label: str,
    ax: Axes | None = None,
    reference: float | None = None,
) -> Axes:
    """Draw a line for each run through its layers' means and dots for heads, of values [run, layer, head]; a grey band
    for the means of random weights, controls [control, layer, head]."""
    ax = ax or new_axes()
    layers = np.arange(1, values.shape[1] + 1)
    untrained = controls.mean(axis=2)
    ax.fill_between(layers, untrained.min(axis=0), untrained.max(axis=0), color="#d9d9d9", zorder=1)
    ax.plot(
        layers, untrained.mean(axis=0), color=CONTROL, linewidth=1.5, linestyle="-.", zorder=1, label="random weights"
    )
    offsets = np.linspace(-0.15, 0.15, len(values)) if len(values) > 1 else np.zeros(1)
    for run, color in enumerate(run_colors(len(values))):
        for head in range(values.shape[2]):
            ax.scatter(layers + offsets[run], values[run, :, head], s=9, color=color, alpha=0.45, zorder=2)
        name = names[run] if len(values) <= 10 else None
        ax.plot(layers + offsets[run], values[run].mean(axis=1), color=color, linewidth=1.8, label=name, zorder=3)
    if reference is not None:
        ax.axhline(reference, color=REFERENCE, linestyle="--", linewidth=1)
    ax.set_xticks(layers)
    ax.set_xlabel("layer (lines: mean over heads)")
    ax.set_ylabel(label)
    return clean(ax)


def agreement(
    groups: dict[str, Sequence[Sequence[float]]], names: Sequence[str], label: str, ax: Axes | None = None
) -> Axes:
    """Draw dots for pairs and a bar for their mean. groups: what was paired -> for each of `names`, correlations."""
    ax = ax or new_axes()
    colors = (TRAINED, MEDIAN, CONTROL)
    width = 0.8 / len(groups)
    for number, ((group, each), color) in enumerate(zip(groups.items(), colors, strict=False)):
        for position, values in enumerate(each):
            x = position - 0.4 + width * (number + 0.5)
            known = [value for value in values if not np.isnan(value)]
            spread = np.linspace(-0.3, 0.3, len(known)) * width if len(known) > 1 else np.zeros(len(known))
            ax.scatter(x + spread, known, s=16, color=color, alpha=0.6, zorder=3)
            if known:
                ax.hlines(np.mean(known), x - 0.4 * width, x + 0.4 * width, color=color, linewidth=3, zorder=4)
        ax.scatter([], [], s=16, color=color, label=group)
    ax.axhline(0, color=REFERENCE, linewidth=1)
    ax.set_ylim(-1.05, 1.05)
    ax.set_xticks(range(len(names)), names)
    ax.set_ylabel(label)
    legend_above(ax)
    return clean(ax)


def by_setting(
    intervals: Sequence[Interval],
    names: Sequence[str],
    label: str,
    ax: Axes | None = None,
    runs: Sequence[Sequence[float]] = (),
    controls: Sequence[Array] = (),
    minimum: float | None = None,
    scale: float = 1.0,
) -> Axes:
    """Draw a dot with its interval for each setting, in order; small dots for its runs where it has several, grey
    crosses for random weights.

    minimum: of differences, the smallest that counts, a grey band around 0; scale: 100 for percent.
    """
    ax = ax or new_axes()
    places = np.arange(len(names))
    for place, each in zip(places, controls, strict=False):
        offsets = np.linspace(-0.1, 0.1, len(each)) if len(each) > 1 else np.zeros(len(each))
        ax.scatter(place + offsets, each * scale, s=18, color=CONTROL, marker="x", linewidths=1, zorder=2)
    for place, several in zip(places, runs, strict=False):
        if len(several) > 1:
            ax.scatter(np.full(len(several), place + 0.16), np.array(several) * scale, s=14, color=TRAINED, alpha=0.5)
    value, low, high = (np.array([float(getattr(each, end)) * scale for each in intervals])
                        for end in ("value", "low", "high"))  # fmt: skip
    ax.errorbar(
        places, value, np.stack([value - low, high - value]).clip(0), fmt="o", color=TRAINED, capsize=4, linewidth=1.6,
        markersize=6, zorder=4,
    )  # fmt: skip
    if minimum is not None:
        ax.axhspan(-minimum * scale, minimum * scale, color=TOO_SMALL, zorder=0)
        ax.axhline(0, color=REFERENCE, linewidth=1)
    ax.set_xticks(places, names)
    ax.set_xlim(-0.5, len(names) - 0.5)
    ax.set_ylabel(label)
    return clean(ax)
