"""Figures of what each head does, and of how alike heads are."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attention_visualizer.analysis.roles.measure import MeasuredHeads, Roles
from attention_visualizer.analysis.study.heads import Heads
from attention_visualizer.figures import charts
from attention_visualizer.measures.head_roles import NO_ROLE


def draw_roles(measured: MeasuredHeads) -> Figure:
    """Draw a row for each head: what it follows, how selective it is, and the roles that this carries."""
    heads, roles = measured.heads, measured.roles
    count = len(heads)
    figure = Figure(figsize=(12.5, 0.27 * count + 1.9), layout="constrained")
    left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=(5, 3, 2))
    heights = np.arange(count)[::-1]
    draw_followed_ink(roles, heads, heights, left)
    left.set_yticks(heights, heads.labels)
    left.set_ylabel("layer.head")
    place, content = (each[heads.index].value for each in (roles.selectivity.place, roles.selectivity.content))
    middle.barh(heights, place, color=charts.PLACE, height=0.7, label="position")
    middle.barh(heights, content, left=place, color=charts.CONTENT, height=0.7, label="content")
    most = f"ln {measured.num_patches} = {np.log(measured.num_patches):.2f}"
    middle.set_xlabel(f"selectivity (nats, at most {most})")
    for axis in (left, middle):
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=9)
        charts.clean(axis, "x")
    write_names(roles, heights, right)
    for axis in (left, middle):
        axis.set_ylim(-0.7, count - 0.3)
        for row in np.flatnonzero(np.diff(heads.index[0])):  # between layers
            axis.axhline(heights[row] - 0.5, color="#cccccc", linewidth=0.7)
    return charts.with_headline(figure, f"Head roles, {measured.num_images:,} test images")


def draw_followed_ink(roles: Roles, heads: Heads, heights: np.ndarray, axis: Axes) -> None:
    """Draw the correlation of each head with ink, what controls reach, and the bound for a role."""
    reached, bound = max((each["ink"] for each in roles.reached.values()), default=0.0), roles.bounds["ink"]
    axis.axvspan(-reached, reached, color=charts.BAND, zorder=0, label="heads of controls")
    for position, label in ((-bound, ""), (bound, "threshold for a role")):
        axis.axvline(position, color=charts.REFERENCE, linestyle="--", linewidth=1, label=label)
    follows = roles.follows_ink[heads.index]
    charts.forest(heights, follows.value, follows.low, follows.high, axis)
    axis.set_xlabel("correlation of attention with ink, within positions")


def write_names(roles: Roles, heights: np.ndarray, axis: Axes) -> None:
    axis.set_axis_off()
    axis.set_xlim(0, 1)
    axis.text(0, len(heights) - 0.2, "role", fontsize=9, fontweight="bold", va="bottom")
    for height, names in zip(heights, roles.names, strict=True):
        color = "#999999" if names == [NO_ROLE] else "black"
        axis.text(0, height, ", ".join(names), va="center", fontsize=9, color=color)


def draw_redundancy(measured: MeasuredHeads) -> Figure:
    """Draw the divergence of heads in the order of their tree, with boxes around those that are alike."""
    labels, redundancy = measured.heads.labels, measured.redundancy
    order, cluster = redundancy.order, redundancy.cluster
    side = max(6.0, 0.3 * len(labels) + 2)
    figure = Figure(figsize=(side + 1.2, side), layout="constrained")
    axis = figure.subplots()
    charts.square_matrix(
        redundancy.divergence[np.ix_(order, order)],
        [labels[head] for head in order],
        "Jensen-Shannon divergence (nats)",
        axis,
        0.0,
        float(np.log(2)),
    )
    starts = np.flatnonzero(np.diff(cluster[order], prepend=-1)).tolist()
    for start, end in zip(starts, [*starts[1:], len(order)], strict=True):
        if end - start > 1:
            charts.box(axis, start, end)
    axis.set_xlabel("layer.head, ordered by similarity")
    return charts.with_headline(figure, f"Similarity of heads, {len(redundancy.of_images):,} test images")
