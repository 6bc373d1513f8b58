"""Figure of runs that differ in the seed only: divergences of partners, layers by run, agreement of partners."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from attention_visualizer.analysis.runs.seeds.measure import QUANTITIES, Pair, SeedComparison
from attention_visualizer.figures import charts, run_charts


def draw(comparison: SeedComparison) -> Figure:
    figure = Figure(figsize=(15, 9), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    run_charts.partners_by_layer(
        divergences(comparison.pairs),
        np.stack([pair.matching.random_pairing for pair in comparison.pairs]),
        divergences(comparison.shifted) if comparison.shifted else None,
        divergences(comparison.random) if comparison.random else None,
        axes[0],
    )
    names = run_labels([each.run.seed for each in comparison.runs])
    for axis, (name, values) in zip(axes[1:], comparison.values.items(), strict=False):
        reference = None if name == "maximum" else 1.0
        run_charts.layers_by_run(values, names, comparison.controls[name], QUANTITIES[name].label, axis, reference)
    run_charts.legend_above(axes[1], columns=4)
    groups = {
        "matched heads": comparison.pairs,
        "next layer's heads": comparison.shifted,
        "random weights": comparison.random,
    }
    quantities = list(comparison.values)
    run_charts.agreement(
        {
            group: [[pair.agreement[name] for pair in pairs] for name in quantities]
            for group, pairs in groups.items()
            if pairs
        },
        quantities,
        "rank correlation of matched heads",
        axes[-1],
    )
    for axis in axes[len(quantities) + 1 : -1]:
        axis.set_visible(False)
    headline = f"{comparison.num_seeds} seeds of one model, n = {comparison.num_images:,} {comparison.image_kind}s"
    return charts.with_headline(figure, headline)


def divergences(pairs: Sequence[Pair]) -> NDArray[np.float64]:
    """Stack the divergences of matched heads: [pair, layer, head]."""
    return np.stack([pair.matching.matched for pair in pairs])


def run_labels(seeds: Sequence[int | None]) -> list[str]:
    """Name runs by their seeds where these are known and differ, else by their numbers."""
    if None not in seeds and len(set(seeds)) == len(seeds):
        return [f"seed {seed}" for seed in seeds]
    return [f"run {position + 1}" for position in range(len(seeds))]
