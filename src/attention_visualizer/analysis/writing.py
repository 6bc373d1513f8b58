"""The whole analysis of one study: chapters, then the report that holds them together."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from attention_visualizer.analysis.chapters import CHAPTERS, is_analysis_file, write_chapters
from attention_visualizer.analysis.header import report_header
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.data.image_sets import ImageFolder, VanishedPicture
from attention_visualizer.files import atomic
from attention_visualizer.files.staging import move_in, staging
from attention_visualizer.report import markdown as markdown_report
from attention_visualizer.support.errors import UserError
from attention_visualizer.support.text import print_sanitised

NUMBERS = (".csv", ".json")


@dataclass(frozen=True)
class Written:
    """Where a report lies, and the chapters that are missing from it, with their reasons."""

    report: Path
    missing: dict[str, str]
    findings: tuple[str, ...] = ()  # as the report begins with, a line each

    @property
    def page(self) -> Path:
        return self.report.with_name(markdown_report.PAGE)


def write_analysis(
    study: Study, command: str, chapters: Sequence[str] = tuple(CHAPTERS), language: str = "bash"
) -> Written:
    """Write figures, numbers and the report into the study's output folder, all of them at the end or none.

    If a chapter fails, an earlier report of the same weights stays as it is, and what there is goes into
    <output>_incomplete.
    """
    with staging(study.output.folder) as new:
        staged = replace(study, output=replace(study.output, folder=new))
        while True:
            try:
                written = write_chapters(staged, chapters)
                header = report_header(staged, command, language)
                break
            except VanishedPicture as gone:  # since the folder was listed: all chapters anew, of the same pictures
                staged = without(staged, gone)
        missing = {name: chapter.missing for name, chapter in written.items() if chapter.missing}
        target = study.output.folder
        earlier = EarlierAnalysis.of(target)
        if missing and earlier is not None and earlier.reported and earlier.identity == identity(study):
            target = target.with_name(f"{target.name}_incomplete")
            earlier = EarlierAnalysis.of(target)
        same = earlier is not None and earlier.identity == identity(study)
        figures = sorted(figure.name for chapter in written.values() for figure in chapter.figures)
        old = analysis_files(target, earlier)
        # Figures of an earlier analysis of the same weights stay; of others, they would mislead.
        kept = sorted(name for name in old - set(figures) if Path(name).suffix not in NUMBERS) if same else []
        markdown_report.write(new, header, written, kept)
        numbers = [name for suffix in NUMBERS if (new / (name := f"{markdown_report.STATISTICS}{suffix}")).exists()]
        files = [*figures, *numbers, markdown_report.PAGE, markdown_report.REPORT]
        move_in(new, target, files, [] if same else sorted(old - set(files)))
        if not missing:
            discard(target.with_name(f"{target.name}_incomplete"))
    return Written(target / markdown_report.REPORT, missing, tuple(markdown_report.finding_lines(written)))


def print_findings(written: Written) -> None:
    """Print what the report begins with, no wider than the terminal."""
    width = min(110, shutil.get_terminal_size().columns)
    for number, finding in enumerate(written.findings, start=1):
        for line in textwrap.wrap(f"{number}. {finding}", width, subsequent_indent="   "):
            print_sanitised(line)


def without(study: Study, gone: VanishedPicture) -> Study:
    """Return the study of the pictures that can still be read. Raise UserError where there is none."""
    images = study.target.images
    assert isinstance(images, ImageFolder)
    return replace(study, target=replace(study.target, images=images.without(gone)))


@dataclass(frozen=True)
class EarlierAnalysis:
    """The analysis that an output folder holds."""

    identity: str  # of its weights
    reported: bool  # whether a report is there
    figures: frozenset[str]  # file names that its JSON lists

    @classmethod
    def of(cls, folder: Path) -> EarlierAnalysis | None:
        """Return the analysis in `folder`; None where there is none, or one that cannot be read."""
        try:
            content = atomic.read_json(folder / f"{markdown_report.STATISTICS}.json")
            named = set(content.get("earlier_figures", []))
            if content["schema"] > 1:
                named |= {figure["name"] for each in content["chapters"].values() for figure in each["figures"]}
            reported = (folder / markdown_report.REPORT).is_file()
            return cls(reported_identity(content["facts"]["weights"]), reported, frozenset(named))
        except (UserError, LookupError, TypeError, AttributeError):
            return None


def analysis_files(folder: Path, earlier: EarlierAnalysis | None) -> set[str]:
    """Return the names of files that an analysis left in `folder`, but for reports: those that its JSON lists, and
    those with a name that an analysis may create."""
    if not folder.is_dir():
        return set()
    listed = earlier.figures if earlier is not None else frozenset()
    files = [path for path in folder.iterdir() if path.is_file()]
    return {path.name for path in files if path.name in listed or is_analysis_file(path)}


def discard(folder: Path) -> None:
    """Remove the report in `folder` and what belongs to it, and the folder if nothing else is in it."""
    if (folder / markdown_report.REPORT).is_file():
        numbers = {f"{markdown_report.STATISTICS}{suffix}" for suffix in NUMBERS}
        for name in (
            analysis_files(folder, EarlierAnalysis.of(folder))
            | numbers
            | {markdown_report.PAGE, markdown_report.REPORT}
        ):
            (folder / name).unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()


def identity(study: Study) -> str:
    """Return what tells the study's weights from others, however they were asked for."""
    return f"sha256 {study.weights_digest}" if study.weights_digest else study.weights


def reported_identity(weights: str) -> str:
    """Return the `identity` in a report's description of its weights."""
    digests = re.findall(r"sha256 \w+", weights)
    return str(digests[-1]) if digests else weights
