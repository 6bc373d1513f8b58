"""The report of an analysis, from chapters to Markdown, CSV and JSON. It computes nothing."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from attention_visualizer import storage
from attention_visualizer.chapter import Chapter

REPORT = "attention_analysis_report.md"
STATISTICS = "attention_statistics"
SCHEMA = 1


@dataclass(frozen=True)
class Summary:
    """The head of the report: what was analysed. facts: label -> text; command: what makes it again, in `language`."""

    title: str
    facts: dict[str, str]
    warnings: list[str]
    command: str
    language: str = "bash"


def write(output: Path, summary: Summary, chapters: dict[str, Chapter]) -> Path:
    """Writes the report and the numbers behind it; the report comes last, so that it never names what is not there."""
    numbers = {name: chapter.numbers for name, chapter in chapters.items() if chapter.numbers}
    facts: dict[str, Any] = {"schema": SCHEMA, "facts": summary.facts, "warnings": summary.warnings}
    storage.write_json(output / f"{STATISTICS}.json", facts | {"chapters": numbers})
    records = [record for chapter in chapters.values() for record in chapter.records]
    if records:
        storage.write_text(output / f"{STATISTICS}.csv", as_csv(records))
    storage.write_text(output / REPORT, markdown(summary, chapters))
    return output / REPORT


def as_csv(records: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def markdown(summary: Summary, chapters: dict[str, Chapter]) -> str:
    environment = Environment(
        loader=PackageLoader("attention_visualizer"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML; `escape` makes foreign text inert
    )
    environment.filters["escape_markdown"] = escape_markdown
    return environment.get_template("report.md").render(
        summary=summary, chapters=chapters, has_records=any(chapter.records for chapter in chapters.values())
    )


def escape_markdown(text: str) -> str:
    """Foreign text (names, paths) as itself: no markup, no HTML, no table cell of its own."""
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", " ".join(text.split()))
