"""The compared runs as a table, as JSON, and what was left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attention_visualizer.analysis.runs.surveyed_runs import SurveyedRun
from attention_visualizer.report.chapter import Table


def run_table(surveyed: Sequence[SurveyedRun]) -> Table:
    rows = []
    for each in surveyed:
        run, accuracy = each.run, each.accuracy
        rows.append(
            [
                run.label + (" (this one)" if run.is_analysed else ""),
                "–" if run.seed is None else str(run.seed),
                ", ".join(run.setting) or "–",
                "–" if run.validation_accuracy is None else f"{run.validation_accuracy:.2%}",
                "–" if accuracy is None else accuracy.text(2, percent=True),
            ]
        )
    n = "" if surveyed[0].correct is None else f", over {len(surveyed[0].correct):,} images with its 95% interval"
    return Table(
        f"The runs: validation accuracy as the run recorded it, accuracy on these images{n}.",
        ["run", "seed", "settings that differ", "validation accuracy", "accuracy here"],
        rows,
    )


def run_numbers(surveyed: Sequence[SurveyedRun]) -> list[dict[str, Any]]:
    """Return the runs for a chapter's numbers."""
    return [
        {
            "run": each.run.label,
            "seed": each.run.seed,
            "settings": each.run.varied,
            "sha256": each.run.loaded.sha256,
            "validation_accuracy": each.run.validation_accuracy,
            "accuracy": None if each.accuracy is None else each.accuracy.numbers(),
        }
        for each in surveyed
    ]


def describe_remarks(surveyed: Sequence[SurveyedRun]) -> str:
    """Say what was left out, and why, as a paragraph of its own; nothing if nothing was."""
    remarks = [remark for each in surveyed for remark in each.run.remarks]
    return f"\n\nRemarks: {'; '.join(remarks)}." if remarks else ""
