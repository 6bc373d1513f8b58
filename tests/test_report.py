"""The report says what it was given, in Markdown that a parser reads back the same, and names only what is there."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from attention_visualizer import report
from attention_visualizer.chapter import Chapter, FigureFile, Table
from attention_visualizer.errors import UserError
from attention_visualizer.report import Summary, escape_markdown

NASTY = "a|b *c* _d_ `e` <script>alert(1)</script> [f](g) ![h](i) \\ ~j~ $5 & # + é 数"


def chapters() -> dict[str, Chapter]:
    return {
        "patterns": Chapter(
            "Attention by layer",
            "Some *Markdown* prose.",
            [FigureFile("attention_pattern_sample_0.png", "test image 7: true 3.")],
        ),
        "statistics": Chapter(
            "Statistics",
            "Prose.",
            [FigureFile("attention_statistics.svg", f"caption {NASTY}")],
            [Table("Means.", ["layer", "entropy (nats)"], [["1", "2.8"], ["2", NASTY]])],
            {"accuracy": 0.5, "missing": float("nan")},
            [
                {"measure": "entropy", "layer": 1, "mean": 0.1 + 0.2},
                {"measure": 'a, "b"', "layer": 2, "mean": 1e-17},
            ],
        ),
    }


def summary(**changes: Any) -> Summary:
    fields: dict[str, Any] = {
        "title": "Attention analysis",
        "facts": {"weights": "best.ckpt of run_7", "data": NASTY},
        "warnings": ["random weights (untrained)"],
        "command": "python analyze.py 'ckpt=my run/best.ckpt'",
    }
    return Summary(**fields | changes)


def tokens(text: str) -> Iterator[Token]:
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        yield token
        yield from token.children or []


def images(text: str) -> list[tuple[str, str]]:
    """(file, what it shows) of every figure that is embedded."""
    return [
        (str(token.attrs["src"]), "".join(child.content for child in token.children or []))
        for token in tokens(text)
        if token.type == "image"
    ]


def cells(text: str) -> list[str]:
    """What stands in table cells, in order."""
    found, inside = [], False
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        inside = token.type in ("td_open", "th_open") or (inside and token.type == "inline")
        if token.type == "inline" and inside:
            found.append("".join(child.content for child in token.children or []))
    return found


def test_everything_is_in_the_report_in_its_order() -> None:
    text = report.markdown(summary(), chapters())
    headings = []
    parsed = MarkdownIt("commonmark").parse(text)
    for token, following in zip(parsed, parsed[1:], strict=False):
        if token.type == "heading_open":
            headings.append(following.content)
    assert headings == ["Attention analysis", "1. Attention by layer", "2. Statistics", "How to reproduce"]
    assert "Some *Markdown* prose." in text
    (quote,) = [token for token in parsed if token.type == "blockquote_open"]
    assert "random weights (untrained)" in parsed[parsed.index(quote) + 2].content
    (code,) = [token for token in parsed if token.type == "fence"]
    assert code.content == "python analyze.py 'ckpt=my run/best.ckpt'\n" and code.info == "bash"


def test_figures_are_embedded_with_what_they_show() -> None:
    embedded = images(report.markdown(summary(), chapters()))
    assert [file for file, _ in embedded] == ["attention_pattern_sample_0.png", "attention_statistics.svg"]
    assert embedded[0][1] == "test image 7: true 3."
    assert embedded[1][1] == f"caption {NASTY}"


def test_tables_hold_their_cells() -> None:
    found = cells(report.markdown(summary(), chapters()))
    assert found[:6] == ["what", "", "weights", "best.ckpt of run_7", "data", NASTY]
    assert found[6:] == ["layer", "entropy (nats)", "1", "2.8", "2", NASTY]


@pytest.mark.parametrize(
    "text", [NASTY, "run_7 of runs_8", "a\nb", "~~gone~~", "<b>", "&amp;", "**", "$x$", "[x]: y", "`", "a  b"]
)
def test_foreign_text_stays_itself(text: str) -> None:
    (paragraph,) = [token for token in MarkdownIt("commonmark").parse(f"x {escape_markdown(text)}") if token.children]
    assert "".join(child.content for child in paragraph.children or []) == "x " + " ".join(text.split())
    assert {child.type for child in paragraph.children or []} <= {"text", "text_special"}


def test_no_html_comes_from_outside() -> None:
    text = report.markdown(summary(warnings=[NASTY], title=NASTY), chapters())
    assert not [token for token in tokens(text) if token.type in ("html_block", "html_inline")]


def test_the_files_hold_the_numbers(tmp_path: Path) -> None:
    path = report.write(tmp_path, summary(), chapters())
    assert path == tmp_path / "attention_analysis_report.md"
    assert sorted(os.listdir(tmp_path)) == [
        "attention_analysis_report.md",
        "attention_statistics.csv",
        "attention_statistics.json",
    ]
    assert path.read_text(encoding="utf-8") == report.markdown(summary(), chapters())
    numbers = json.loads((tmp_path / "attention_statistics.json").read_text(encoding="utf-8"))
    assert numbers["chapters"] == {"statistics": {"accuracy": 0.5, "missing": None}}
    assert numbers["facts"]["data"] == NASTY and numbers["warnings"] == ["random weights (untrained)"]
    assert numbers["schema"] == report.SCHEMA
    rows = list(csv.DictReader((tmp_path / "attention_statistics.csv").open(newline="")))
    assert [float(row["mean"]) for row in rows] == [0.1 + 0.2, 1e-17]  # to the last digit
    assert rows[1]["measure"] == 'a, "b"'


def test_csv_rows_are_one_line_each() -> None:
    text = report.as_csv([{"a": 1, "b": "x"}, {"a": 2, "b": "y, z"}])
    assert text == 'a,b\n1,x\n2,"y, z"\n'
    assert list(csv.reader(io.StringIO(text)))[2] == ["2", "y, z"]


def test_the_report_names_no_file_that_was_not_written(tmp_path: Path) -> None:
    """Without statistics there are no records, and so no CSV."""
    text = report.write(tmp_path, summary(), {"patterns": chapters()["patterns"]}).read_text()
    assert not (tmp_path / "attention_statistics.csv").exists()
    assert "attention_statistics.csv" not in text


def test_the_report_comes_last(tmp_path: Path) -> None:
    """What cannot be written leaves no report that names it."""
    (tmp_path / "attention_statistics.csv").mkdir()
    with pytest.raises(UserError, match=r"attention_statistics\.csv"):
        report.write(tmp_path, summary(), chapters())
    assert not (tmp_path / "attention_analysis_report.md").exists()


def test_a_quiet_report_has_no_note() -> None:
    assert "Note" not in report.markdown(summary(warnings=[]), chapters())
