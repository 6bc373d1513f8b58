"""Write the report of an analysis, from chapters to Markdown, HTML, CSV and JSON; compute nothing."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from attention_visualizer.files import atomic
from attention_visualizer.report import html as html_report
from attention_visualizer.report.chapter import Chapter, FigureFile, Table, escape_markdown
from attention_visualizer.support.text import csv_safe

REPORT = "attention_analysis_report.md"
PAGE = "attention_analysis_report.html"
STATISTICS = "attention_statistics"
SCHEMA = 3  # of attention_statistics.json: docs/report.md
MAX_FINDINGS = 6
# The pictures that a page begins with.
OPENING_FIGURES = ("attention_last_layer_sample_0", "attention_pattern_sample_0", "attention_evolution_strip")
PLACEHOLDER = re.compile(r"(?<!\\)\{(\w+)(?::([^{}]*))?\}")
SHOWN = (".png", ".webp", ".gif")  # kinds of figures that stand in the page; others are linked
THUMBNAIL_WIDTH = 240  # pixels, in Markdown


@dataclass(frozen=True)
class ReportHeader:
    """The head of the report: what was analysed."""

    title: str
    facts: dict[str, str]  # label -> text
    warnings: list[str]
    command: str  # that makes the report again
    language: str = "bash"  # of the command
    headline: Sequence[str] = ()  # model, data and accuracy, for one line


@dataclass(frozen=True)
class Part:
    """A chapter in its place."""

    number: int
    name: str
    chapter: Chapter
    figures: list[tuple[int, FigureFile]]  # with their numbers, which count over the whole report
    tables: list[tuple[int, Table]]  # likewise

    def figure(self, name: str) -> tuple[int, FigureFile]:
        """Return the figure of a file name or stem. Raise ValueError where the chapter has no such figure."""
        for number, figure in self.figures:
            if name in (figure.name, figure.stem):
                return number, figure
        raise ValueError(f"chapter {self.name} has no figure {name}")

    def resolve(self, text: str, linked: bool = False) -> str:
        """Put numbers in the place of placeholders, as links inside a page if `linked`. Raise ValueError for
        placeholders that stand for nothing."""

        def reference(match: re.Match[str]) -> str:
            kind, name = match.groups()
            if kind == "figure":
                number = self.figure(name)[0]
            elif kind == "table" and name.isdecimal() and 1 <= int(name) <= len(self.tables):
                number = self.tables[int(name) - 1][0]
            else:
                raise ValueError(f"chapter {self.name}: nothing is called {match.group()}")
            words = f"{kind.title()} {number}"
            return f"[{words}](#{kind}-{number})" if linked else words

        return PLACEHOLDER.sub(reference, text)


def numbered(chapters: dict[str, Chapter]) -> list[Part]:
    """Number chapters, figures and tables. Raise ValueError for two figures of one name."""
    parts: list[Part] = []
    figures, tables = 0, 0
    names: set[str] = set()
    in_order = sorted(chapters.items(), key=lambda item: not item[1].applies)  # stable: the others come last
    for name, chapter in in_order:
        numbered_figures = list(enumerate(chapter.figures, start=figures + 1))
        numbered_tables = list(enumerate(chapter.tables, start=tables + 1))
        figures, tables = figures + len(numbered_figures), tables + len(numbered_tables)
        for figure in chapter.figures:
            if figure.name in names:
                raise ValueError(f"chapter {name}: there are two figures {figure.name}")
            names.add(figure.name)
        parts.append(Part(len(parts) + 1, name, chapter, numbered_figures, numbered_tables))
    return parts


def check(name: str, chapter: Chapter, folder: Path, earlier: Iterable[Chapter] = ()) -> None:
    """Raise an exception if a chapter could not be reported after `earlier` ones, such as for figures that are not in
    `folder`."""
    parts = numbered({name: chapter})
    taken = {figure.name for each in earlier for figure in each.figures}
    for figure in chapter.figures:
        if figure.name in taken:
            raise ValueError(f"chapter {name}: there are two figures {figure.name}")
        if not (folder / figure.name).is_file():
            raise ValueError(f"chapter {name}: there is no file {figure.name}")
    for table in chapter.tables:
        if any(len(row) != len(table.columns) for row in table.rows):
            raise ValueError(f"chapter {name}: not all rows of a table have {len(table.columns)} cells")
    empty = ReportHeader("", {}, [], "")
    json.dumps(atomic.json_ready(statistics(empty, parts)), allow_nan=False)
    as_csv(chapter.records)
    markdown(empty, {name: chapter})


def write(
    output: Path, summary: ReportHeader, chapters: dict[str, Chapter], earlier_figures: Iterable[str] = ()
) -> Path:
    """Write the report and the numbers behind it into the folder of the figures; the reports come last, so that they
    never name what is not there. earlier_figures: of an earlier analysis of the same weights, which stay."""
    parts = numbered(chapters)
    atomic.write_json(output / f"{STATISTICS}.json", statistics(summary, parts, earlier_figures))
    records = [record for chapter in chapters.values() for record in chapter.records]
    if records:
        atomic.write_text(output / f"{STATISTICS}.csv", as_csv(records))
    with atomic.atomic_path(output / PAGE) as temporary:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(html_report.render(contents(summary, parts), output))
    atomic.write_text(output / REPORT, markdown(summary, chapters))
    return output / REPORT


def statistics(summary: ReportHeader, parts: list[Part], earlier_figures: Iterable[str] = ()) -> dict[str, Any]:
    """Build the content of attention_statistics.json, as docs/report.md describes it."""
    return {
        "schema": SCHEMA,
        "facts": summary.facts,
        "warnings": summary.warnings,
        "earlier_figures": sorted(earlier_figures),
        "chapters": {
            part.name: {
                "title": part.chapter.title,
                "status": status_of(part.chapter),
                "reason": part.chapter.missing or (None if part.chapter.applies else one_line(part.chapter.text)),
                "finding": finding_of(part),
                "caution": one_line(part.resolve(part.chapter.caution)) or None,
                "numbers": part.chapter.numbers,
                "figures": [
                    {"number": number, "name": figure.name, "caption": figure.caption}
                    for number, figure in part.figures
                ],
                "tables": [{"number": number, "caption": table.caption} for number, table in part.tables],
            }
            for part in parts
        },
    }


def status_of(chapter: Chapter) -> str:
    if chapter.missing:
        return "missing"
    return "complete" if chapter.applies else "not applicable"


def finding_of(part: Part) -> dict[str, Any] | None:
    finding = part.chapter.finding
    if finding is None:
        return None
    number = None if finding.figure is None else part.figure(finding.figure)[0]
    return {"text": one_line(part.resolve(finding.text)), "figure": number}


def one_line(text: str) -> str:
    return " ".join(text.split())


def as_csv(records: list[dict[str, Any]]) -> str:
    """Format all records as one table; a cell stays empty where a record has no such field."""
    names = dict.fromkeys(name for record in records for name in record)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([csv_safe(name) for name in names])
    writer.writerows([csv_safe(record.get(name, "")) for name in names] for record in records)
    return text.getvalue()


def contents(summary: ReportHeader, parts: list[Part]) -> dict[str, Any]:
    """Build what both templates are filled with."""
    return {
        "summary": summary,
        "parts": [part for part in parts if part.chapter.applies],
        "left_out": [part for part in parts if not part.chapter.applies],
        "opening": opening_figures(parts),
        "page": next(
            (figure.name for part in parts for _, figure in part.figures if figure.name.endswith(".html")), None
        ),
        "findings": findings_of(parts),
        "cautions": [part for part in parts if part.chapter.caution],
        "missing": [part for part in parts if part.chapter.missing],
        "shown": lambda figure: figure.name.endswith(SHOWN),
        "folded": folded,
        "more": more,
        "has_records": any(part.chapter.records for part in parts),
        "statistics": STATISTICS,
    }


def findings_of(parts: list[Part]) -> list[Part]:
    """Return the chapters whose findings stand on the first screen, in the order of their ranks."""
    found = [(part.chapter.finding.rank, part) for part in parts if part.chapter.finding is not None]
    return [part for _, part in sorted(found, key=lambda each: each[0])][:MAX_FINDINGS]


def finding_lines(chapters: dict[str, Chapter]) -> Iterator[str]:
    """Yield the findings of the first screen as plain lines, for a terminal."""
    for part in findings_of(numbered(chapters)):
        assert part.chapter.finding is not None
        yield re.sub(r"\\(.)", r"\1", one_line(part.resolve(part.chapter.finding.text)))


def opening_figures(parts: list[Part]) -> list[tuple[int, FigureFile]]:
    """Return the figures that the page begins with, as far as they were drawn as pictures, with their numbers."""
    every = {figure.stem: (number, figure) for part in parts for number, figure in part.figures}
    return [every[stem] for stem in OPENING_FIGURES if stem in every and every[stem][1].name.endswith(SHOWN)]


def folded(part: Part) -> list[tuple[tuple[int, FigureFile], list[tuple[int, FigureFile]]]]:
    """Group a chapter's figures, in order: each with those folded away behind it, the same of other samples."""
    groups: list[tuple[tuple[int, FigureFile], list[tuple[int, FigureFile]]]] = []
    series = None
    for number, figure in part.figures:
        stem = figure.stem.rpartition("_")[0] if figure.of_sample else None
        if stem is not None and stem == series:
            groups[-1][1].append((number, figure))
        else:
            groups.append(((number, figure), []))
        series = stem
    return groups


def more(others: list[tuple[int, FigureFile]]) -> str:
    """The label of a fold: "The same for 7 more images (Figures 2 to 8)"."""
    first, last = others[0][0], others[-1][0]
    if len(others) == 1:
        return f"The same for 1 more image (Figure {first})"
    return f"The same for {len(others)} more images (Figures {first} to {last})"


def markdown(summary: ReportHeader, chapters: dict[str, Chapter]) -> str:
    """Render the report as Markdown."""
    environment = Environment(
        loader=PackageLoader("attention_visualizer.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML; `escape_markdown` makes foreign text inert
    )
    environment.filters |= {
        "escape_markdown": escape_markdown,
        "file_address": quote,
        "fence": fence,
        "one_line": one_line,
    }
    return environment.get_template("report.md").render(
        contents(summary, numbered(chapters)), thumbnail_width=THUMBNAIL_WIDTH
    )


def fence(text: str) -> str:
    """Return as many back quotes as `text` cannot end."""
    return "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
