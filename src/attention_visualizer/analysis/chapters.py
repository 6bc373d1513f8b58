"""The list of chapters, and how they are written. A new chapter is a folder with a `CHAPTER`, named here."""

from __future__ import annotations

import gc
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from attention_visualizer.analysis.atlas import chapter as atlas_chapter
from attention_visualizer.analysis.claims import chapter as claims_chapter
from attention_visualizer.analysis.evolution import chapter as evolution_chapter
from attention_visualizer.analysis.explorer import chapter as explorer_chapter
from attention_visualizer.analysis.heads import chapter as heads_chapter
from attention_visualizer.analysis.importance import chapter as importance_chapter
from attention_visualizer.analysis.layers import chapter as layers_chapter
from attention_visualizer.analysis.methods import chapter as methods_chapter
from attention_visualizer.analysis.needs import ChapterWriter
from attention_visualizer.analysis.patterns import chapter as patterns_chapter
from attention_visualizer.analysis.roles import chapter as roles_chapter
from attention_visualizer.analysis.runs import chapter as runs_chapter
from attention_visualizer.analysis.statistics import chapter as statistics_chapter
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.analysis.trust import chapter as trust_chapter
from attention_visualizer.data.image_sets import VanishedPicture
from attention_visualizer.explorer import page as explorer_page
from attention_visualizer.report import markdown as markdown_report
from attention_visualizer.report.chapter import Chapter
from attention_visualizer.support.errors import UserError, ran_out_of_memory

log = logging.getLogger(__name__)

MAX_REASON_LENGTH = 300  # characters

CHAPTERS: dict[str, ChapterWriter] = {
    "patterns": patterns_chapter.CHAPTER,
    "heads": heads_chapter.CHAPTER,
    "layers": layers_chapter.CHAPTER,
    "methods": methods_chapter.CHAPTER,
    "statistics": statistics_chapter.CHAPTER,
    "atlas": atlas_chapter.CHAPTER,
    "roles": roles_chapter.CHAPTER,
    "importance": importance_chapter.CHAPTER,
    "trust": trust_chapter.CHAPTER,
    "claims": claims_chapter.CHAPTER,
    "evolution": evolution_chapter.CHAPTER,
    "runs": runs_chapter.CHAPTER,
    "explorer": explorer_chapter.CHAPTER,
}

# File names that an analysis may create, and may therefore delete; the report's own names are apart.
FIGURE_STEMS = [stem.replace("#", r"\d+") for chapter in CHAPTERS.values() for stem in chapter.figures]
ANALYSIS_FILE_NAMES = re.compile(
    rf"({'|'.join(FIGURE_STEMS)})\.(png|pdf|svg|webp|mp4|gif)|{re.escape(explorer_page.FILE_NAME)}|{markdown_report.STATISTICS}\.(csv|json)"
)


def is_analysis_file(path: Path) -> bool:
    return ANALYSIS_FILE_NAMES.fullmatch(path.name) is not None


def check_chapters(names: Sequence[str]) -> None:
    """Raise UserError for a chapter that does not exist."""
    unknown = [str(name) for name in names if not isinstance(name, str) or name not in CHAPTERS]
    if unknown or not names:
        what = f"there is no chapter {', '.join(unknown)}; " if unknown else ""
        raise UserError(f"chapters=[{','.join(map(str, names))}]: {what}choose from {', '.join(CHAPTERS)}")


def write_chapters(study: Study, names: Sequence[str]) -> dict[str, Chapter]:
    """Write the figures of each chapter and return what the report says of them, with a progress bar.

    A chapter that fails is named on stderr and says in the report why it is missing; the others go on.
    """
    written: dict[str, Chapter] = {}
    try:
        with progress_bar() as progress:
            task = progress.add_task("analysing", total=len(names), doing="")
            with study.progress.shown_by(lambda doing: progress.update(task, doing=doing)):
                for number, name in enumerate(names, start=1):
                    progress.update(task, description=name, doing="")
                    if progress.disable:
                        print(f"chapter {number}/{len(names)}: {name}", flush=True)
                    written[name] = write_chapter(study, name, written)
                    progress.advance(task)
            progress.update(task, description="done", doing="")
    finally:
        # Not while the bar is drawn, which would take the line to standard output.
        for name, chapter in written.items():
            if chapter.missing:
                print(f"chapter {name} is missing: {chapter.missing}", file=sys.stderr)
    return written


def write_chapter(study: Study, name: str, written: Mapping[str, Chapter]) -> Chapter:
    """One chapter, or why it is missing, checked together with those `written` before.

    Where memory ends, it is tried with smaller batches, down to single images. Raise VanishedPicture.
    """
    while True:
        try:
            chapter = CHAPTERS[name](study)
            markdown_report.check(name, chapter, study.output.folder, written.values())
            return chapter
        except VanishedPicture:  # all chapters are of the same pictures
            raise
        except Exception as error:  # whatever goes wrong in one chapter is no reason to lose the others
            log.debug("chapter %s", name, exc_info=True)
            if not (ran_out_of_memory(error) and study.target.limit.halve()):
                return Chapter(name.capitalize(), "", missing=reason_of(error))
        gc.collect()  # what the error held
        study.progress(f"again, {study.target.limit.images} images at once")


def progress_bar() -> Progress:
    """The chapter, how many are done, and what is being done in this one; nothing where there is no terminal."""
    whole = Column(no_wrap=True)
    return Progress(
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, min_width=11)),
        BarColumn(20),
        MofNCompleteColumn(table_column=whole),
        TimeElapsedColumn(table_column=whole),
        TextColumn("{task.fields[doing]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
        disable=not sys.stdout.isatty(),  # a log file, or a notebook, in which it would ask for ipywidgets
    )


def reason_of(error: Exception) -> str:
    """Return why a chapter is missing, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:MAX_REASON_LENGTH]}" if text else type(error).__name__
