"""What a chapter of the analysis hands to the report: prose, figures and tables, and the numbers behind them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class FigureFile:
    """A figure that was written: its file name inside the output folder, and what it shows."""

    name: str
    caption: str


@dataclass(frozen=True)
class Table:
    """Rows of ready text under column names."""

    caption: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Finding:
    """What a busy reader should take along: one or two sentences in Markdown, and the figure that shows it, by name."""

    text: str
    figure: str | None = None


@dataclass(frozen=True)
class Chapter:
    """`text` is Markdown; `numbers` goes into attention_statistics.json under the chapter's name, `records` (rows
    of one tidy table) into attention_statistics.csv. finding: for the report's first screen; caution: what not to
    believe, a sentence in Markdown for the same place."""

    title: str
    text: str
    figures: list[FigureFile] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    finding: Finding | None = None
    caution: str = ""
