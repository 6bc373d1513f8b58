"""The offline analysis: chapters over one study. A new chapter is one new file with a `write(study)`, named here."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from attention_visualizer import report
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

log = logging.getLogger(__name__)

LONGEST_REASON = 300  # characters

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
    if not names or any(not isinstance(name, str) or name not in CHAPTERS for name in names):
        raise UserError(f"chapters=[{','.join(map(str, names))}]: choose from {', '.join(CHAPTERS)}")


def write_chapters(study: Study, names: Sequence[str]) -> dict[str, Chapter]:
    """Writes the figures of each chapter and returns what the report says of them, with a progress bar.

    A chapter that fails is named on stderr and says in the report why it is missing; the others go on.
    """
    written: dict[str, Chapter] = {}
    told = study.progress
    try:
        with progress_bar() as progress:
            task = progress.add_task("analysing", total=len(names), doing="")
            study.progress = lambda doing: progress.update(task, doing=doing)
            for name in names:
                progress.update(task, description=name, doing="")
                try:
                    chapter = CHAPTERS[name](study)
                    report.check(written | {name: chapter}, study.output)
                except Exception as error:  # whatever goes wrong in one chapter is no reason to lose the others
                    chapter = Chapter(name.capitalize(), "", missing=reason_of(error))
                    log.debug("chapter %s", name, exc_info=True)
                written[name] = chapter
                progress.advance(task)
            progress.update(task, description="done", doing="")
    finally:
        study.progress = told
        # Not while the bar is drawn, which would take the line to standard output.
        for name, chapter in written.items():
            if chapter.missing:
                print(f"chapter {name} is missing: {chapter.missing}", file=sys.stderr)
    return written


def progress_bar() -> Progress:
    """The chapter, how many are done, and what is being done in this one."""
    whole = Column(no_wrap=True)
    return Progress(
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, min_width=11)),
        BarColumn(20),
        MofNCompleteColumn(table_column=whole),
        TimeElapsedColumn(table_column=whole),
        TextColumn("{task.fields[doing]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
    )


def reason_of(error: Exception) -> str:
    """In one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:LONGEST_REASON]}" if text else type(error).__name__
