"""Figure of runs that differ in their settings: above each setting, below its difference from the first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from attention_visualizer.analysis.runs.settings.measure import (
    MAX_NAMED,
    QUANTITIES,
    Quantity,
    Setting,
    SettingComparison,
)
from attention_visualizer.figures import charts, run_charts

MAX_TICKS = 6  # settings whose values are printed at the axis where several vary


def draw(comparison: SettingComparison) -> Figure:
    """Draw a column a quantity."""
    quantities = [quantity for quantity in QUANTITIES if has_values(comparison.settings, quantity)]
    figure = Figure(figsize=(4.2 * len(quantities) + 0.4, 8.2), layout="constrained")
    axes = figure.subplots(2, len(quantities), squeeze=False)
    for column, quantity in enumerate(quantities):
        draw_quantity(comparison, quantity, axes[0, column], axes[1, column])
    handles = [
        Line2D([], [], color=run_charts.TRAINED, marker="o", label="runs, with the 95% interval over images"),
        Line2D([], [], color=run_charts.CONTROL, marker="x", linestyle="", label="random weights"),
        Patch(color=run_charts.TOO_SMALL, label="below the minimum effect"),
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False, fontsize=10)
    headline = f"Comparison by {name_varied(comparison.varied)}: {len(comparison.runs)} runs"
    return charts.with_headline(figure, headline)


def draw_quantity(comparison: SettingComparison, quantity: Quantity, above: Axes, below: Axes) -> None:
    settings, varied = comparison.settings, comparison.varied
    is_accuracy = quantity.name == "accuracy"
    scale = 100.0 if is_accuracy else 1.0
    names = tick_labels(settings, len(varied))
    run_charts.by_setting(
        [setting.values[quantity.name].interval for setting in settings],
        names,
        "accuracy (%)" if is_accuracy else quantity.label,
        above,
        [setting.values_by_run[quantity.name] for setting in settings],
        () if is_accuracy else [setting.controls[quantity.name] for setting in settings],
        scale=scale,
    )
    above.set_title(f"n = {comparison.num_classified if is_accuracy else comparison.num_images:,}", fontsize=11)
    run_charts.by_setting(
        [each.interval for each in comparison.differences if each.quantity is quantity],
        names[1:],
        "difference (percentage points)" if is_accuracy else "difference",
        below,
        minimum=quantity.minimum,
        scale=scale,
    )
    below.set_xlabel(name_varied(varied) if len(varied) <= MAX_NAMED else "setting (see the table)")
    below.set_title(f"difference from {settings[0].name}", fontsize=11)


def has_values(settings: Sequence[Setting], quantity: Quantity) -> bool:
    return all(quantity.name in setting.values for setting in settings) and not all(
        np.isnan(setting.values[quantity.name].mean) for setting in settings
    )


def name_varied(varied: Sequence[str]) -> str:
    """Name the settings that vary: "embed_dim and num_heads", or "3 settings"."""
    return join_names(varied) if len(varied) <= MAX_NAMED else f"{len(varied)} settings"


def join_names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def tick_labels(settings: Sequence[Setting], num_varied: int) -> list[str]:
    """Label with values alone where one setting varies; with rows of the table where there is too much to print."""
    if num_varied == 1:
        return [setting.label.partition("=")[2] for setting in settings]
    if num_varied <= MAX_NAMED and len(settings) <= MAX_TICKS:
        return [setting.label.replace(", ", "\n") for setting in settings]
    return [str(row + 1) for row in range(len(settings))]
