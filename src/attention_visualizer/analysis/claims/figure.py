"""Figure of the claims: the requirement that decides each, against what it must reach and what controls reach."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from attention_visualizer.analysis.claims.measure import JudgedClaims
from attention_visualizer.figures import charts


def draw(judged: JudgedClaims, title: str) -> Figure:
    """Draw, of each claim, the requirement that decides, in units of its minimum effect."""
    deciding = [judgement.results[0] for judgement in judged.judgements]
    units = np.array([result.requirement.minimum for result in deciding])
    reached = [[each for values in result.controls.values() for each in values] for result in deciding]
    bands = [(min(values), max(values)) if values else (np.nan,) * 2 for values in reached]
    figure = Figure(figsize=(13.5, 0.44 * len(deciding) + 2.3), layout="constrained")
    charts.verdict_forest(
        [judgement.claim.name for judgement in judged.judgements],
        np.array([result.value for result in deciding]) / units,
        np.array([(result.interval.low, result.interval.high) for result in deciding]) / units[:, None],
        np.array(bands) / units[:, None],
        np.array([result.threshold for result in deciding]) / units,
        [judgement.verdict for judgement in judged.judgements],
        figure.add_subplot(),
    )
    handles = [
        Line2D([], [], color=charts.REFERENCE, marker="o", linewidth=1.8, label="deciding requirement, 95% interval"),
        Line2D([], [], color="black", marker="|", linestyle="none", markersize=12, label="required value"),
        Patch(color=charts.BAND, label=f"range of {sum(judged.controls.values())} control models"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    return charts.with_headline(figure, f"{title}: n = {judged.n:,} {judged.image_kind}s")
