"""Charts of numbers by layer, head and time: arrays in, matplotlib Axes out. No files, no global style."""

from __future__ import annotations

from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from attention_visualizer.figures.fonts import drawable, families

Array = NDArray[Any]

BOX, MEDIAN, REFERENCE, NOTE = "#9ecae1", "#b2182b", "#555555", "#be141e"
BAND, PLACE, CONTENT = "#e3e3e3", "#9ecae1", "#e08214"
VERDICTS = {"supported": "#1b7837", "not supported": "#b2182b"}  # others in grey
MAX_ANNOTATED = 160  # cells of a heat map that still have room for their number


def new_axes() -> Axes:
    return Figure(figsize=(6, 4), layout="constrained").subplots()


def box_by_layer(
    quantiles: Array, label: str, ax: Axes | None = None, reference: float | None = None, reference_label: str = ""
) -> Axes:
    """Draw a box for each layer from quantiles [layer, 5] at 5, 25, 50, 75 and 95% (whiskers at 5 and 95)."""
    ax = ax or new_axes()
    boxes = [
        {"whislo": low, "q1": first, "med": middle, "q3": third, "whishi": high, "label": str(layer + 1)}
        for layer, (low, first, middle, third, high) in enumerate(quantiles)
    ]
    ax.bxp(
        boxes,
        showfliers=False,
        patch_artist=True,
        widths=0.6,
        boxprops={"facecolor": BOX, "edgecolor": REFERENCE},
        medianprops={"color": MEDIAN, "linewidth": 2},
        whiskerprops={"color": REFERENCE},
        capprops={"color": REFERENCE},
    )
    if reference is not None:
        ax.axhline(
            reference, color=REFERENCE, linestyle="--", linewidth=1, label=f"{reference_label} ({reference:.3g})"
        )
        ax.legend(fontsize=9, facecolor="white", edgecolor="none", framealpha=1)
    ax.set_xlabel("layer (box: middle 50%, whiskers: 5 to 95%)")
    ax.set_ylabel(label)
    return clean(ax)


def distribution_by_layer(
    counts: Array, edges: Array, label: str, ax: Axes | None = None, medians: Array | None = None
) -> Axes:
    """Draw a ridge for each layer, all on one scale, from histogram counts [layer, bin] over equal bins edges [bin +
    1].

    The height is the square root of the share in a bin, so that a peak leaves the rest visible. medians: [layer], where
    they are known better than to a bin.
    """
    ax = ax or new_axes()
    num_layers = len(counts)
    # Fine bins serve quantiles; for the eye some are summed, to about sixty over the range that holds something.
    # One value in a thousand at either end may lie outside, or a single image would stretch the axis.
    totals = np.maximum(counts.sum(axis=1, keepdims=True), 1)  # a layer without a count stays flat
    cumulative = np.cumsum(counts, axis=1) / totals
    first = int(np.argmax((cumulative > 0.001).any(axis=0)))
    last = max(first + 1, int(np.argmax((cumulative >= 0.999).all(axis=0))) + 1)
    group = -(-(last - first) // 60)
    num_bars = min(-(-(last - first) // group), counts.shape[1] // group)
    first = max(0, last - num_bars * group)  # whole groups, none beyond the measure's range
    shown = counts[:, first : first + num_bars * group]
    shares = shown.reshape(num_layers, num_bars, group).sum(axis=2) / totals
    bounds = edges[first] + np.arange(num_bars + 1) * group * (edges[1] - edges[0])
    heights = np.sqrt(shares) * 0.9 / max(float(np.sqrt(shares).max()), 1e-12)
    for layer, color in enumerate(layer_colors(num_layers)):
        base = num_layers - layer  # the first layer on top
        top = base + heights[layer]
        ax.stairs(top, bounds, baseline=base, fill=True, color=color, alpha=0.85, zorder=2)
        ax.stairs(top, bounds, baseline=base, color="white", linewidth=0.6, zorder=3)
        if counts[layer].any():
            middle = np.interp(0.5, np.append(0, cumulative[layer]), edges) if medians is None else medians[layer]
            ax.plot([middle, middle], [base, base + 0.45], color=MEDIAN, linewidth=2, zorder=4)
    ax.set_yticks(range(1, num_layers + 1), [str(layer) for layer in range(num_layers, 0, -1)])
    ax.set_ylim(0.9, num_layers + 1.05)
    ax.xaxis.set_major_locator(MaxNLocator(4))  # labels of small shares are long
    ax.set_ylabel("layer (height: √share; red: median)")
    ax.set_xlabel(label)
    return clean(ax)


def heat_map(
    values: Array, label: str, ax: Axes | None = None, low: float | None = None, high: float | None = None
) -> Axes:
    """Draw layers down, heads across, with numbers in the cells where there is room."""
    import seaborn  # it brings SciPy's statistics and pandas: a second that only heat maps wait for

    ax = ax or new_axes()
    seaborn.heatmap(
        values,
        ax=ax,
        vmin=low,
        vmax=high,
        cmap="viridis",
        annot=values.size <= MAX_ANNOTATED,
        fmt=".2f" if np.nanmax(np.abs(values), initial=0) >= 0.1 else ".2g",  # shares of one key in a thousand
        annot_kws={"fontsize": 9},
        linewidths=0.5,
        cbar_kws={"label": label},
        xticklabels=[str(head + 1) for head in range(values.shape[1])],
        yticklabels=[str(layer + 1) for layer in range(values.shape[0])],
    )
    ax.set_xlabel("head")
    ax.set_ylabel("layer")
    ax.tick_params(axis="y", rotation=0)
    return ax


def verdict_forest(
    names: list[str],
    values: Array,
    intervals: Array,
    controls: Array,
    thresholds: Array,
    verdicts: list[str],
    ax: Axes | None = None,
) -> Axes:
    """Draw a row for each claim: its effect in units of the minimum effect as a dot with its interval, what controls
    reach as a grey band, what it must reach as a tick, and the verdict in words at the right.

    values, thresholds: [claim], NaN for none; intervals, controls: [claim, 2], NaN for none. The axis is logarithmic
    beyond one minimum effect on either side.
    """
    ax = ax or new_axes()
    ax.set_xscale("symlog", linthresh=1, linscale=0.8)
    for row, (value, interval, band, threshold) in enumerate(zip(values, intervals, controls, thresholds, strict=True)):
        color = VERDICTS.get(verdicts[row], REFERENCE)
        if not np.isnan(band).any():
            ax.barh(row, max(band[1] - band[0], 0.03), 0.62, band[0], color=BAND, zorder=1)
        if np.isfinite(threshold):
            ax.plot([threshold, threshold], [row - 0.36, row + 0.36], color="black", linewidth=1.6, zorder=2)
        if np.isfinite(value):
            ax.plot(interval, [row, row], "-|", color=color, linewidth=1.8, markersize=10, zorder=3)
            ax.plot(value, row, "o", color=color, markersize=6, zorder=4)
    for row, verdict in enumerate(verdicts):
        ax.annotate(
            verdict,
            (1.02, row),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=10.5,
            color=VERDICTS.get(verdict, REFERENCE),
        )
    ax.axvline(0, color=REFERENCE, linewidth=1, zorder=0)
    ax.set_yticks(range(len(names)), names, fontsize=10.5)
    ax.set_ylim(len(names) - 0.4, -0.6)
    shown = np.concatenate([np.ravel(each) for each in (values, intervals, controls, thresholds)])
    farthest = 1.3 * max(np.abs(shown[np.isfinite(shown)]).max(initial=0), 2.5)
    ax.set_xlim(-farthest, farthest)
    powers = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if tick < farthest]
    ax.set_xticks([*(-tick for tick in reversed(powers)), 0, *powers])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda position, _: f"{position:g}".replace("-", "\N{MINUS SIGN}")))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("effect, in units of the minimum effect (logarithmic beyond 1)")
    clean(ax)
    ax.grid(axis="y", visible=False)
    ax.grid(axis="x", color="#e6e6e6", linewidth=0.7)
    return ax


def lines_over_training(
    steps: Array,
    values: Array,
    label: str,
    ax: Axes | None = None,
    reference: float | None = None,
    early_steps: Array | None = None,
    early_values: Array | None = None,
) -> Axes:
    """Draw a thick line for each layer (mean over heads) and thin ones for its heads, from values [time, layer, head]
    at `steps`.

    early_values [time, layer, head] at `early_steps` come from fewer images: dotted, layers only. The axis of steps is
    logarithmic, as the observed steps are; 0 stands at its left end. reference: the value of uniform attention.
    """
    ax = ax or new_axes()
    colors = layer_colors(values.shape[1])
    for layer, color in enumerate(colors):
        for head in range(values.shape[2]):
            ax.plot(steps + 1, values[:, layer, head], color=color, linewidth=0.7, alpha=0.45)
        ax.plot(steps + 1, values[:, layer].mean(axis=1), color=color, linewidth=2.4, marker="o", markersize=4)
        if early_steps is not None and early_values is not None:
            early = early_values[:, layer].mean(axis=1)
            ax.plot(early_steps + 1, early, color=color, linewidth=1.2, linestyle=":", marker=".", markersize=4)
    handles = [
        Line2D([], [], color=color, linewidth=2.4, label=f"layer {layer + 1}")
        for layer, color in enumerate(colors)
        if not np.isnan(values[:, layer]).all()
    ]
    handles.append(Line2D([], [], color=REFERENCE, linewidth=0.7, label="single heads"))
    if early_steps is not None:
        handles.append(Line2D([], [], color=REFERENCE, linestyle=":", marker=".", label="probe images only"))
    if reference is not None:
        ax.axhline(reference, color=REFERENCE, linestyle="--", linewidth=1)
        handles.append(Line2D([], [], color=REFERENCE, linestyle="--", linewidth=1, label=f"uniform ({reference:.2f})"))
    step_axis(ax, int(max(steps[-1], early_steps[-1] if early_steps is not None else 0)))
    ax.set_xlabel("training step (logarithmic)")
    ax.set_ylabel(label)
    ax.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    return clean(ax)


def step_axis(ax: Axes, last: int) -> None:
    """Give training steps a logarithmic axis, on which step s stands at s + 1, up to the last one."""
    ax.set_xscale("log", base=2)
    ax.xaxis.set_minor_locator(NullLocator())
    powers = (2**power for power in range(0, 30, 1 if last < 64 else 2))
    ticks = sorted({0, *(power for power in powers if power < 0.7 * last), last})
    ax.set_xticks([tick + 1 for tick in ticks])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda position, _: f"{round(position) - 1:,}"))


def confusion_matrix(counts: Array, class_names: list[str], ax: Axes | None = None) -> Axes:
    """Draw counts of images by true (down) and predicted class, coloured by their share of the true class; the diagonal
    has no colour, so that errors of tenths of a percent are still visible."""
    import seaborn

    ax = ax or new_axes()
    errors = counts.astype(float) / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    np.fill_diagonal(errors, np.nan)
    labels = np.where(counts > 0, counts.astype(str), "")
    with matplotlib.rc_context({"font.family": families(" ".join(class_names))}):
        seaborn.heatmap(
            errors * 100,
            ax=ax,
            annot=labels,
            fmt="",
            annot_kws={"fontsize": 9},
            cmap="Reds",
            vmin=0,
            vmax=max(np.nanmax(errors * 100, initial=0), 0.1),  # without an error the scale still starts at 0
            linewidths=0.5,
            cbar_kws={"label": "errors (% of the true class)"},
            xticklabels=list(map(drawable, class_names)),
            yticklabels=list(map(drawable, class_names)),
            square=True,
        )
    for index, count in enumerate(np.diag(counts)):  # seaborn leaves masked cells without a number
        ax.text(index + 0.5, index + 0.5, str(count), ha="center", va="center", fontsize=9, color="#888888")
    ax.set_xlabel("predicted class")
    ax.set_ylabel("true class")
    ax.tick_params(axis="y", rotation=0)
    ax.set_title(f"accuracy {np.trace(counts) / counts.sum():.2%}, n = {counts.sum():,}")
    return ax


def forest(at: Array, values: Array, low: Array, high: Array, ax: Axes | None = None, color: str = MEDIAN) -> Axes:
    """Draw a point with its interval at each height of `at`, and a line at 0."""
    ax = ax or new_axes()
    ax.axvline(0, color=REFERENCE, linewidth=1, zorder=1)
    ax.hlines(at, low, high, color=color, linewidth=1.6, zorder=3)
    ax.plot(values, at, "o", color=color, markersize=4.5, zorder=4)
    return ax


def square_matrix(
    values: Array,
    labels: list[str],
    label: str,
    ax: Axes | None = None,
    low: float | None = None,
    high: float | None = None,
) -> Axes:
    """Draw a matrix with the same labels down and across, without numbers in the cells."""
    import seaborn

    ax = ax or new_axes()
    seaborn.heatmap(
        values,
        ax=ax,
        vmin=low,
        vmax=high,
        cmap="viridis_r",
        square=True,
        xticklabels=labels,
        yticklabels=labels,
        cbar_kws={"label": label, "shrink": 0.8},
    )
    ax.tick_params(axis="y", rotation=0, labelsize=9)
    ax.tick_params(axis="x", rotation=90, labelsize=9)
    return ax


def changes(
    values: Array,
    label: str,
    ax: Axes | None = None,
    reach: float = 1.0,
    columns: list[str] | None = None,
) -> Axes:
    """Draw whole numbers, layers down, heads across, on a scale from -reach (blue) over 0 (white) to reach (red)."""
    import seaborn

    ax = ax or new_axes()
    seaborn.heatmap(
        values,
        ax=ax,
        vmin=-reach,
        vmax=reach,
        cmap="RdBu_r",
        annot=values.size <= MAX_ANNOTATED,
        fmt="+,.0f",
        annot_kws={"fontsize": 9},
        linewidths=0.5,
        cbar_kws={"label": label, "ticks": MaxNLocator(integer=True)},
        xticklabels=columns or [str(head + 1) for head in range(values.shape[1])],
        yticklabels=[str(layer + 1) for layer in range(values.shape[0])],
    )
    ax.set_xlabel("head")
    ax.set_ylabel("layer")
    ax.tick_params(axis="y", rotation=0)
    return ax


def box(ax: Axes, start: float, end: float, color: str = MEDIAN) -> None:
    """Draw a box around rows and columns `start` to `end` of a square matrix."""
    ax.plot([start, end, end, start, start], [start, start, end, end, start], color=color, linewidth=2, clip_on=False)


def with_headline(figure: Figure, headline: str) -> Figure:
    figure.suptitle(headline, fontsize=14, fontweight="bold", x=0.01, ha="left")
    return figure


def with_watermark(figure: Figure, watermark: str) -> Figure:
    """Add in red what the reader must know of the data or the weights; nothing where `watermark` is empty."""
    if watermark:
        figure.text(0.99, 0.985, watermark, color=NOTE, fontweight="bold", fontsize=11, ha="right", va="top")
    return figure


def with_fonts(figure: Figure) -> Figure:
    """Let texts be drawn in fonts that have their characters. Labels of ticks are made `drawable` when they are set."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_ticklabels()  # which there are not before
    for text in figure.findobj(Text):
        if not (content := text.get_text()).isascii():
            text.set_text(drawable(content))
            text.set_fontfamily(families(content))
    return figure


def without_math(figure: Figure) -> None:
    """Turn formulas off, so that dollars in names are dollars; only the powers on logarithmic axes stay formulas."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() != "linear":
                for label in axis.get_ticklabels(which="both"):
                    label.set_parse_math(True)


def layer_colors(num_layers: int) -> list[Any]:
    """A colour for each layer, from light (shallow) to dark (deep)."""
    return [matplotlib.colormaps["viridis_r"](share) for share in np.linspace(0.08, 0.95, num_layers)]


def clean(ax: Axes, axis: Literal["x", "y", "both"] = "y") -> Axes:
    """Remove the frame's upper and right sides, and draw faint lines across `axis`."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis=axis, color="#e6e6e6", linewidth=0.7)
    ax.set_axisbelow(True)
    return ax
