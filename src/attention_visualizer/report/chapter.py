"""What a chapter of the analysis hands to the report: prose, figures and tables, and the numbers behind them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class FigureFile:
    """A figure that was written."""

    name: str  # of its file inside the output folder
    caption: str  # what it shows, plain text

    @property
    def stem(self) -> str:
        return Path(self.name).stem

    @property
    def of_sample(self) -> bool:
        """Return whether it is one of several alike, `<stem>_sample_<i>`, which a page may fold away."""
        return re.fullmatch(r".+_sample_\d+", self.stem) is not None


@dataclass(frozen=True)
class Table:
    """Rows of ready text under column names, all plain text."""

    caption: str
    columns: list[str]
    rows: list[list[str]]
    is_detail: bool = False  # whether a page may fold it away


@dataclass(frozen=True)
class Finding:
    """A headline finding."""

    text: str  # one or two sentences in Markdown
    figure: str | None = None  # the name of the figure that shows it
    rank: int = 9  # the lower, the earlier it stands among those of all chapters
    view: str = ""  # what shows it in the explorer, as in its address: "layer=3&head=1"


@dataclass(frozen=True)
class Chapter:
    """A chapter of the report.

    In text, finding and caution, {figure:attention_roles} becomes the number of the chapter's figure with that stem
    ("Figure 7"), {table:1} that of its first table. Foreign text in them goes through `escape_markdown`.
    """

    title: str
    text: str  # Markdown
    figures: list[FigureFile] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)  # for attention_statistics.json
    records: list[dict[str, Any]] = field(default_factory=list)  # rows of a tidy table, for attention_statistics.csv
    finding: Finding | None = None  # for the report's first screen
    caution: str = ""  # what not to believe, a sentence in Markdown for the same place
    missing: str = ""  # why there is no such chapter after all, in one line
    applies: bool = True  # or its text only says why it was not asked


def escape_markdown(text: str) -> str:
    """Escape foreign text (names, paths): no markup, no HTML, no table cell or placeholder of its own."""
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_{}\[\]|~$])", r"\\\1", " ".join(text.split()))


def p_text(p_value: float) -> str:
    """Format a p-value for a table; "–" for NaN."""
    if math.isnan(p_value):
        return "–"
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"
