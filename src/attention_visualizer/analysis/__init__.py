"""The offline analysis: chapters over one study. A new chapter is one new file with a `write(study)`, named here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from attention_visualizer.analysis import (
    atlas,
    claims,
    evolution,
    heads,
    importance,
    layers,
    methods,
    patterns,
    roles,
    runs,
    statistics,
    trust,
)
from attention_visualizer.analysis.study import Study
from attention_visualizer.chapter import Chapter
from attention_visualizer.errors import UserError

CHAPTERS: dict[str, Callable[[Study], Chapter]] = {
    "patterns": patterns.write,
    "heads": heads.write,
    "layers": layers.write,
    "methods": methods.write,
    "statistics": statistics.write,
    "atlas": atlas.write,
    "roles": roles.write,
    "importance": importance.write,
    "trust": trust.write,
    "claims": claims.write,
    "evolution": evolution.write,
    "runs": runs.write,
}


def check_chapters(names: Sequence[str]) -> None:
    """Raises UserError for a chapter that does not exist."""
    if not names or any(name not in CHAPTERS for name in names):
        raise UserError(f"chapters=[{','.join(map(str, names))}]: choose from {', '.join(CHAPTERS)}")


def write_chapters(study: Study, names: Sequence[str]) -> dict[str, Chapter]:
    """Writes the figures of each chapter and returns what the report says of them, with a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    written = {}
    with Progress(*columns) as progress:
        task = progress.add_task("analysing", total=len(names))
        for name in names:
            progress.update(task, description=f"{name:<10}")
            written[name] = CHAPTERS[name](study)
            progress.advance(task)
        progress.update(task, description="done      ")
    return written
