"""What a chapter of the analysis hands to the report: prose, figures and tables, and the numbers behind them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class FigureFile:
    """A figure that was written: its file name inside the output folder, and what it shows, as plain text."""

    name: str
    caption: str

    @property
    def stem(self) -> str:
        return Path(self.name).stem

    @property
    def of_sample(self) -> bool:
        """One of several alike, `<stem>_sample_<i>`, which a page may fold away."""
        return re.fullmatch(r".+_sample_\d+", self.stem) is not None


@dataclass(frozen=True)
class Table:
    """Rows of ready text under column names, all plain text."""

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
    believe, a sentence in Markdown for the same place. missing: why there is no such chapter after all, in one line.

    In text, finding and caution, {figure:attention_roles} becomes the number of the chapter's figure with that stem
    ("Figure 7"), {table:1} that of its first table. Foreign text in them goes through `escape_markdown`.
    """

    title: str
    text: str
    figures: list[FigureFile] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    finding: Finding | None = None
    caution: str = ""
    missing: str = ""


def escape_markdown(text: str) -> str:
    """Foreign text (names, paths) as itself: no markup, no HTML, no table cell or placeholder of its own."""
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_{}\[\]|~$])", r"\\\1", " ".join(text.split()))
