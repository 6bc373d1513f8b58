"""The report says what it was given, in Markdown and HTML that parsers read back the same, names only what is there,
and foreign text stays text."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from PIL import Image

from attention_visualizer.report import markdown as markdown_report
from attention_visualizer.report.chapter import Chapter, FigureFile, Finding, Table
from attention_visualizer.report.markdown import ReportHeader, escape_markdown
from attention_visualizer.support.errors import UserError
from tests.helpers.documentation import documented

PROJECT = Path(__file__).resolve().parents[2]
NASTY = "a|b *c* _d_ `e` <script>alert(1)</script> [f](g) ![h](i) {figure:x} \"j' \\ ~k~ $5 & # + é 数"
INERT_ELEMENTS = set(
    "html head meta title style body header main nav section div p h1 h2 a b strong em code pre span ol ul li dl "
    "dt dd details summary figure figcaption img table thead tbody tr th td".split()
)  # they fetch nothing and run nothing
# What our own templates write into the Markdown.
OUR_HTML = re.compile(
    r'<a id="[a-z]+(-\d+)?">|</a>|<a href="#figure-\d+">|</?details>|<summary>[\w ()]+</summary>'
    r'|<img src="[\w.]+" width="\d+" alt="Figure \d+">'
)


def chapters() -> dict[str, Chapter]:
    return {
        "patterns": Chapter(
            "Attention by layer",
            "Some *Markdown* prose; see {figure:attention_pattern_sample_1}.",
            [FigureFile(f"attention_pattern_sample_{i}.png", f"test image {i}: true 3.") for i in range(3)],
        ),
        "statistics": Chapter(
            "Statistics",
            "Prose about {figure:attention_roles}, {table:1} and {table:2}.",
            [FigureFile("attention_statistics.svg", f"caption {NASTY}"), FigureFile("attention_roles.webp", "Roles.")],
            [
                Table("Means.", ["layer", "entropy (nats)"], [["1", "2.8"], ["2", NASTY]]),
                Table("More.", ["a"], [["b"]]),
            ],
            {"accuracy": 0.5, "missing": float("nan"), "array": np.array([1.5, np.inf])},
            [
                {"measure": "entropy", "layer": 1, "mean": 0.1 + 0.2},
                {"measure": 'a, "b"', "layer": 2, "mean": 1e-17},
            ],
            Finding(
                "Head 4.1 *follows* the ink: 0.19 (0.18 to 0.20), n = 7, {figure:attention_roles}.", "attention_roles"
            ),
            "Not a reason, see {table:2}.",
        ),
        "roles": Chapter("Roles", "", missing=f"ValueError: {NASTY}"),
    }


def summary(**changes: Any) -> ReportHeader:
    fields: dict[str, Any] = {
        "title": "Attention analysis",
        "facts": {"weights": "best.ckpt of run_7", "data": NASTY},
        "warnings": ["random weights (untrained)"],
        "command": "python analyze.py 'ckpt=my run/best.ckpt'",
        "headline": ("6 layers", NASTY, "accuracy 99.30%, n = 10,000"),
    }
    return ReportHeader(**fields | changes)


def draw(folder: Path, given: dict[str, Chapter]) -> None:
    """A small picture for each figure, no two alike."""
    figures = [figure for chapter in given.values() for figure in chapter.figures]
    for number, figure in enumerate(figures):
        path = folder / figure.name
        if path.suffix in (".png", ".webp"):
            Image.new("RGB", (700 + number, 300), (number, 90, 20)).save(path)
        else:
            path.write_text(f"figure {number}")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    draw(tmp_path, chapters())
    return tmp_path


class Page(HTMLParser):
    """What a browser would make of the page: elements with their attributes, and the text of each by its id."""

    EMPTY = ("meta", "img", "br", "hr")

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[list[tuple[str, dict[str, str]]], str]] = []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = tag, {name: value or "" for name, value in attrs}
        self.elements.append(element)
        if tag not in self.EMPTY:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop()[0] == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((list(self.open), data))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag: str, **attributes: str) -> str:
        """Of all such elements."""
        found = [
            data
            for inside, data in self.texts
            if any(name == tag and attributes.items() <= own.items() for name, own in inside)
        ]
        return " ".join(" ".join(found).split())

    @property
    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]


def page_of(folder: Path, told: ReportHeader | None = None, given: dict[str, Chapter] | None = None) -> Page:
    markdown_report.write(folder, told or summary(), given or chapters())
    return Page((folder / markdown_report.PAGE).read_text(encoding="utf-8"))


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


# --- Markdown ---


def test_everything_is_in_the_report_in_its_order() -> None:
    text = markdown_report.markdown(summary(), chapters())
    parsed = MarkdownIt("commonmark").parse(text)
    headings = [
        following.content for token, following in zip(parsed, parsed[1:], strict=False) if token.type == "heading_open"
    ]
    assert headings == [
        "Attention analysis",
        "Findings",
        "Caveats",
        "Contents",
        "What was analysed",
        "1. Attention by layer",
        "2. Statistics",
        "3. Roles",
        "Methods and limitations",
        "How to reproduce",
    ]
    assert "Some *Markdown* prose; see [Figure 2](#figure-2)." in text
    assert "Prose about [Figure 5](#figure-5), [Table 1](#table-1) and [Table 2](#table-2)." in text
    quotes = [parsed[parsed.index(token) + 2].content for token in parsed if token.type == "blockquote_open"]
    assert quotes[0] == "**Warning:** random weights (untrained)"
    assert [quote.split("ValueError")[0] for quote in quotes[1:]] == [
        '**Missing:** the chapter "Roles". ',
        "**Missing:** ",
    ]
    (code,) = [token for token in parsed if token.type == "fence"]
    assert code.content == "python analyze.py 'ckpt=my run/best.ckpt'\n" and code.info == "bash"


def test_figures_are_embedded_with_what_they_show() -> None:
    embedded = images(markdown_report.markdown(summary(), chapters()))
    names = [figure.name for chapter in chapters().values() for figure in chapter.figures]
    assert [file for file, _ in embedded] == names
    assert embedded[0][1] == "test image 0: true 3."
    assert embedded[3][1] == f"caption {NASTY}"


def test_figures_that_markdown_cannot_show_are_linked() -> None:
    text = markdown_report.markdown(
        summary(), {"roles": Chapter("Roles", "", [FigureFile("attention_roles.pdf", "Roles.")])}
    )
    assert images(text) == [] and "[attention\\_roles.pdf](attention_roles.pdf)" in text


def test_tables_hold_their_cells() -> None:
    found = cells(markdown_report.markdown(summary(), chapters()))
    assert found[:6] == ["what", "", "weights", "best.ckpt of run_7", "data", NASTY]
    assert found[6:] == ["layer", "entropy (nats)", "1", "2.8", "2", NASTY, "a", "b"]


def test_a_finding_has_its_figure_beside_it() -> None:
    text = markdown_report.markdown(summary(), chapters())
    first = text.split("## Caveats")[0]
    assert "1. Head 4.1 *follows* the ink: 0.19 (0.18 to 0.20), n = 7, [Figure 5](#figure-5). ([Figure 5]" in first
    assert '<a href="#figure-5"><img src="attention_roles.webp" width="240" alt="Figure 5"></a>' in first
    assert "- Not a reason, see [Table 2](#table-2)." in text


def test_links_within_the_markdown_lead_somewhere() -> None:
    text = markdown_report.markdown(summary(), chapters())
    targets = re.findall(r"(?:\]\(|href=\")#([\w-]+)", text)
    assert len(set(targets)) > 8 and set(targets) <= set(re.findall(r'<a id="([\w-]+)">', text))


@pytest.mark.parametrize(
    "text", [NASTY, "run_7 of runs_8", "a\nb", "~~gone~~", "<b>", "&amp;", "**", "$x$", "[x]: y", "`", "a  b"]
)
def test_foreign_text_stays_itself(text: str) -> None:
    (paragraph,) = [token for token in MarkdownIt("commonmark").parse(f"x {escape_markdown(text)}") if token.children]
    assert "".join(child.content for child in paragraph.children or []) == "x " + " ".join(text.split())
    assert {child.type for child in paragraph.children or []} <= {"text", "text_special"}


def hostile() -> tuple[ReportHeader, dict[str, Chapter]]:
    """Foreign text wherever it may come: what prose and findings hold went through `escape_markdown`."""
    escaped = escape_markdown(NASTY)
    made = {
        "roles": Chapter(
            NASTY,
            f"Prose {escaped}.\n\n- {escaped}",
            [FigureFile("attention_roles.png", NASTY)],
            [Table(NASTY, [NASTY], [[NASTY]])],
            {NASTY: NASTY},
            [{"name": NASTY}],
            Finding(escaped, "attention_roles.png"),
            escaped,
        ),
        "atlas": Chapter(NASTY, "", missing=NASTY),
    }
    told = summary(
        warnings=[NASTY], title=NASTY, facts={NASTY: NASTY}, headline=[NASTY], command=f"analyze {NASTY} ``` x"
    )
    return told, made


def test_no_html_comes_from_outside() -> None:
    text = markdown_report.markdown(*hostile())
    parts = [token.content for token in tokens(text) if token.type in ("html_block", "html_inline")]
    assert parts
    for part in parts:
        assert OUR_HTML.sub("", part).strip() == "", part
    links = [token for token in tokens(text) if token.type == "link_open"]
    assert all(re.match(r"#|attention_\w+\.", str(token.attrs["href"])) for token in links)
    assert [file for file, _ in images(text)] == ["attention_roles.png"]


# --- HTML ---


def test_the_page_needs_nothing_and_runs_nothing(output: Path) -> None:
    draw(output, hostile()[1])
    for told, given in ((summary(), chapters()), hostile()):
        page = page_of(output, told, given)
        assert {name for name, _ in page.elements} <= INERT_ELEMENTS
        for name, attributes in page.elements:
            assert not [each for each in attributes if each.startswith("on") or each in ("style", "srcset")], name
        assert all(picture["src"].startswith("data:image/") for picture in page.all("img"))
        policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
        assert policy.startswith("default-src 'none'") and "script" not in policy
        assert "url(" not in page.text("style") and "@import" not in page.text("style")


def test_every_link_leads_to_a_place_on_the_page_or_to_a_file_beside_it(output: Path) -> None:
    page = page_of(output)
    assert len(page.ids) == len(set(page.ids))
    for link in page.all("a"):
        address = link["href"]
        assert address[1:] in page.ids if address[0] == "#" else (output / address).is_file(), address


def pixels(picture: Path | io.BytesIO) -> bytes:
    with Image.open(picture) as opened:
        return opened.convert("RGB").tobytes()


def test_figures_are_inside_the_page_to_the_pixel_and_link_to_their_files(output: Path) -> None:
    page = page_of(output)
    shown = {}
    for (name, link), (_, picture) in zip(page.elements, page.elements[1:], strict=False):
        if name == "a" and "src" in picture and link["href"][0] != "#":
            kind, content = picture["src"].split(";base64,")
            shown[link["href"]] = pixels(io.BytesIO(base64.b64decode(content)))
            assert kind == "data:image/webp"
            assert picture["width"].startswith("70") and picture["height"] == "300"
    drawn = [path for path in output.iterdir() if path.suffix in (".png", ".webp")]
    assert shown == {path.name: pixels(path) for path in drawn} and len(drawn) == 4
    assert page.text("a", href="attention_statistics.svg") == "attention_statistics.svg"


def test_figures_and_tables_are_numbered_over_the_whole_report(output: Path) -> None:
    page = page_of(output)
    numbers = [number for number in page.ids if number.startswith(("figure-", "table-"))]
    assert sorted(numbers) == [*(f"figure-{number}" for number in range(1, 6)), "table-1", "table-2"]
    assert page.text("figure", id="figure-4") == f"attention_statistics.svg Figure 4. {'caption ' + NASTY}"
    assert page.text("p", id="table-2") == "Table 2. More."
    assert "Prose about Figure 5 , Table 1 and Table 2 ." in page.text("section", id="chapter-2")


def test_the_first_screen(output: Path) -> None:
    page = page_of(output)
    first = page.text("header")
    assert "n = 10,000 Warning. random weights (untrained) Missing: the chapter Roles ." in first
    assert page.text("h1") == "Attention analysis"
    assert page.text("p", **{"class": "headline"}) == f"6 layers {NASTY} accuracy 99.30%, n = 10,000"
    assert "Head 4.1 follows the ink: 0.19 (0.18 to 0.20), n = 7, Figure 5" in first
    assert "Not a reason, see Table 2 ." in first
    (thumbnail,) = [link for link in page.all("a") if link.get("class") == "thumbnail"]
    assert thumbnail["href"] == "#figure-5"
    small = next(each["src"] for each in page.all("img") if each["alt"] == "Figure 5")
    with Image.open(io.BytesIO(base64.b64decode(small.split(",")[1]))) as picture:
        assert picture.width == 480


def test_samples_are_folded_away_behind_the_first(output: Path) -> None:
    page = page_of(output)
    assert page.text("summary") == "The same for 2 more images (Figures 2 to 3)"
    assert page.text("details").count("test image") == 2 and "test image 0" not in page.text("details")
    text = markdown_report.markdown(summary(), chapters())
    before, folded = text.split("<details>")
    assert "test image 0" in before and folded.split("</details>")[0].count("![test image") == 2


def test_a_finding_leads_to_what_shows_it_in_the_explorer_where_there_is_one(tmp_path: Path) -> None:
    page_file = FigureFile("attention_explorer.html", "A page.")
    (tmp_path / page_file.name).write_text("<p>explorer</p>")
    given = {
        "roles": Chapter("Roles", "", finding=Finding("found", view="layer=3&head=1")),
        "explorer": Chapter("Explorer", "", [page_file]),
    }
    markdown_report.write(tmp_path, summary(), given)
    page = (tmp_path / markdown_report.PAGE).read_text("utf-8")
    assert 'href="attention_explorer.html#layer=3&amp;head=1">explore</a>' in page
    assert '<p class="explore"><a href="attention_explorer.html">' in page and "<p>explorer</p>" not in page
    text = (tmp_path / markdown_report.REPORT).read_text("utf-8")
    assert "[attention\\_explorer.html](attention_explorer.html)" in text and "![A page" not in text
    markdown_report.write(tmp_path, summary(), {"roles": given["roles"]})
    assert "explore" not in (tmp_path / markdown_report.PAGE).read_text("utf-8")


def test_at_most_six_findings_the_most_interesting_first(output: Path) -> None:
    given = {f"chapter{i}": Chapter("T", "", finding=Finding(f"found {i}")) for i in range(8)}
    assert page_of(output, given=given).text("ol") == " ".join(f"found {i}" for i in range(6))
    assert markdown_report.markdown(summary(), given).count("found ") == 6
    given["chapter5"] = Chapter("T", "", finding=Finding("found 5", rank=0))
    given["chapter7"] = Chapter("T", "", finding=Finding("found 7", rank=2))
    assert page_of(output, given=given).text("ol") == "found 5 found 7 found 0 found 1 found 2 found 3"
    assert list(markdown_report.finding_lines(given))[:2] == ["found 5", "found 7"]


def test_chapters_that_do_not_apply_are_lines_at_the_end(output: Path) -> None:
    given = {"a": Chapter("Alpha", "Needs *ink*.", applies=False), "b": Chapter("Beta", "Is there.")}
    page = page_of(output, given=given)
    assert "1. Beta Not in this report Methods" in page.text("h2") and "Alpha" not in page.text("h2")
    assert page.text("em") == "ink" and page.text("b") == "Warning. Alpha." and "Alpha" not in page.text("nav")
    text = markdown_report.markdown(summary(), given)
    assert "## 1. Beta" in text and "Alpha](" not in text and "- **Alpha.** Needs *ink*." in text
    numbers = json.loads((output / "attention_statistics.json").read_text())["chapters"]
    assert [numbers[name]["status"] for name in ("a", "b")] == ["not applicable", "complete"]
    assert numbers["a"]["reason"] == "Needs *ink*."


def test_the_page_begins_with_a_map_and_a_strip_of_training(output: Path) -> None:
    names = ("attention_pattern_sample_0.png", "attention_evolution_strip.png", "attention_roles.png")
    for name in names:
        Image.new("RGB", (30, 20), "red").save(output / name)
    given = {"a": Chapter("A", "", [FigureFile(name, "of " + name) for name in reversed(names)])}
    page = page_of(output, given=given)
    assert [image["alt"] for image in page.all("img")][:2] == ["of " + name for name in names[:2]]
    assert [link["href"] for link in page.all("a")][:2] == ["#figure-3", "#figure-2"]


def test_markup_of_prose_is_rendered_and_html_in_it_is_not(output: Path) -> None:
    prose = "A *word*, `code`.\n\n- one\n- two\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n<b>bold</b> <script>x</script>"
    page = page_of(output, given={"a": Chapter("A", prose)})
    assert page.text("em") == "word" and page.text("td") == "1 2" and not page.all("script")
    assert "<b>bold</b> <script>x</script>" in page.text("section", id="chapter-1")


# --- placeholders and what cannot be reported ---


@pytest.mark.parametrize(
    "text", ["{figure:none}", "{table:3}", "{table:0}", "{picture:1}", "{figure:}", "{n}", "{figure}"]
)
@pytest.mark.parametrize("field", ["text", "caution", "finding"])
def test_placeholders_that_stand_for_nothing_raise(output: Path, text: str, field: str) -> None:
    given = chapters()
    value: Any = Finding(f"x {text}") if field == "finding" else f"x {text}"
    given["statistics"] = replace(given["statistics"], **{field: value})
    with pytest.raises(ValueError, match="statistics"):
        markdown_report.check("statistics", given["statistics"], output)
    with pytest.raises(ValueError, match="statistics"):
        markdown_report.markdown(summary(), given)


@pytest.mark.parametrize(
    "change",
    [
        {"figures": [FigureFile("none.png", "")]},
        {"figures": [FigureFile("attention_pattern_sample_0.png", "again")]},
        {"tables": [Table("T", ["a", "b"], [["1"]])]},
        {"finding": Finding("x", "none.png")},
        {"numbers": {"a": object()}},
        {"records": [3]},
        {"text": None},
    ],
)
def test_a_chapter_that_cannot_be_reported_is_found_when_it_is_made(output: Path, change: dict[str, Any]) -> None:
    patterns, statistics, _ = chapters().values()
    markdown_report.check("statistics", statistics, output, [patterns])
    changed = replace(statistics, **{"text": "", "finding": None, "caution": ""} | change)
    with pytest.raises((ValueError, TypeError, AttributeError)):
        markdown_report.check("statistics", changed, output, [patterns])


# --- files ---


def test_the_files_hold_the_numbers(output: Path) -> None:
    figures = {path.name for path in output.iterdir()}
    path = markdown_report.write(output, summary(), chapters(), ["b.png", "a.png"])
    assert path == output / "attention_analysis_report.md"
    assert set(os.listdir(output)) - figures == {
        "attention_analysis_report.html",
        "attention_analysis_report.md",
        "attention_statistics.csv",
        "attention_statistics.json",
    }
    assert path.read_text(encoding="utf-8") == markdown_report.markdown(summary(), chapters())
    told = read_strictly(output / "attention_statistics.json")
    assert told["facts"]["data"] == NASTY and told["warnings"] == ["random weights (untrained)"]
    assert told["schema"] == 3 and told["earlier_figures"] == ["a.png", "b.png"]
    assert told["chapters"]["statistics"] == {
        "title": "Statistics",
        "status": "complete",
        "reason": None,
        "finding": {"text": "Head 4.1 *follows* the ink: 0.19 (0.18 to 0.20), n = 7, Figure 5.", "figure": 5},
        "caution": "Not a reason, see Table 2.",
        "numbers": {"accuracy": 0.5, "missing": None, "array": [1.5, None]},
        "figures": [
            {"number": 4, "name": "attention_statistics.svg", "caption": f"caption {NASTY}"},
            {"number": 5, "name": "attention_roles.webp", "caption": "Roles."},
        ],
        "tables": [{"number": 1, "caption": "Means."}, {"number": 2, "caption": "More."}],
    }
    roles = told["chapters"]["roles"]
    assert (roles["status"], roles["reason"], roles["finding"]) == ("missing", f"ValueError: {NASTY}", None)
    rows = list(csv.DictReader((output / "attention_statistics.csv").open(newline="")))
    assert [float(row["mean"]) for row in rows] == [0.1 + 0.2, 1e-17]  # to the last digit
    assert rows[1]["measure"] == 'a, "b"'


def read_strictly(path: Path) -> Any:
    """JSON's own grammar, which has no NaN."""

    def refuse(constant: str) -> Any:
        raise AssertionError(constant)

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def fields_of(value: Any, path: str = "") -> Iterator[str]:
    """Of JSON, as docs/report.md writes them; chapters and labels stand for themselves, numbers are left closed."""
    if isinstance(value, dict) and value and not path.endswith(".numbers"):
        for name, item in value.items():
            name = {"chapters": "<chapter>", "facts": "<label>"}.get(path, name)
            yield from fields_of(item, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and value:
        for item in value:
            yield from fields_of(item, f"{path}[]")
    if path and (not isinstance(value, dict | list) or path.endswith((".numbers", ".finding"))):
        yield path


def test_every_field_is_documented_and_no_other(output: Path) -> None:
    markdown_report.write(output, summary(), chapters(), ["a.png"])
    fields = documented("attention_statistics.json")
    assert len(fields) == len(set(fields))
    assert set(fields) == set(fields_of(read_strictly(output / "attention_statistics.json")))


def test_csv_rows_are_one_line_each() -> None:
    text = markdown_report.as_csv([{"a": 1, "b": "x"}, {"a": 2, "b": "y, z"}])
    assert text == 'a,b\n1,x\n2,"y, z"\n'
    assert list(csv.reader(io.StringIO(text)))[2] == ["2", "y, z"]


def test_rows_of_several_chapters_are_one_table() -> None:
    assert markdown_report.as_csv([{"a": 1, "b": 2}, {"b": 3, "c": "x"}]) == "a,b,c\n1,2,\n,3,x\n"


@pytest.mark.parametrize("first", ["=", "+", "-", "@", "\t=", "\r\n@", " +"])
def test_no_cell_is_a_formula(first: str) -> None:
    """Spreadsheets would run it; an apostrophe makes it text. Numbers stay numbers."""
    text = markdown_report.as_csv([{"name": f"{first}SUM(1)", f"{first}column": -1.5, "c": f"x\r{first}1\n{first}2"}])
    assert "\r" not in text
    header, row = csv.reader(io.StringIO(text))
    own = first.strip()
    assert row == [f"'{own}SUM(1)", "-1.5", f"x {own}1 {own}2"] and header == ["name", f"'{own}column", "c"]


def test_the_report_names_no_file_that_was_not_written(output: Path) -> None:
    """Without statistics there are no records, and so no CSV."""
    text = markdown_report.write(output, summary(), {"patterns": chapters()["patterns"]}).read_text()
    assert not (output / "attention_statistics.csv").exists()
    assert "attention_statistics.csv" not in text
    assert "attention_statistics.csv" not in (output / markdown_report.PAGE).read_text()


def test_the_report_comes_last(output: Path) -> None:
    """What cannot be written leaves no report that names it."""
    (output / "attention_statistics.csv").mkdir()
    with pytest.raises(UserError, match=r"attention_statistics\.csv"):
        markdown_report.write(output, summary(), chapters())
    assert not (output / "attention_analysis_report.md").exists()
    assert not (output / "attention_analysis_report.html").exists()


def test_a_quiet_report_has_no_note(output: Path) -> None:
    given = {"patterns": chapters()["patterns"]}
    assert "Warning" not in markdown_report.markdown(summary(warnings=[]), given)
    assert "Warning" not in page_of(output, summary(warnings=[]), given).text("body")
