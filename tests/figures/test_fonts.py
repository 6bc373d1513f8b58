"""Texts in any script are readable where a font has them, and never look like another text where none has."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager

from attention_visualizer.figures import charts, fonts
from attention_visualizer.figures.attention_figures import short_class_name
from attention_visualizer.figures.panels import PAGE, PanelFigure, PlacedText
from attention_visualizer.figures.tile_grid import upright
from tests.helpers.figures import assert_tidy

NAMES = {
    "Latin": ("e", "o"),
    "Cyrillic": ("ж", "ш"),
    "Arabic": ("ب", "ت"),
    "Chinese": ("猫", "狗"),
    "Japanese": ("ネコ", "イヌ"),
    "Korean": ("고양이", "강아지"),
    "Hindi": ("क", "ख"),
    "Thai": ("บ", "ข"),
    "Amharic": ("አ", "በ"),
    "mixed": ("cat 猫", "cat 狗"),
    "beyond the first plane": ("𠮷", "𡈽"),
    "emoji": ("🐈", "🐕"),
    "private": ("\ue000", "\ue001"),
}


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What was found with other fonts is not remembered."""
    cached = [each for each in vars(fonts).values() if hasattr(each, "cache_clear")]
    for each in (*cached, upright):
        each.cache_clear()
    yield
    for each in (*cached, upright):
        each.cache_clear()


@pytest.fixture
def no_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])


def font_of(folder: Path, name: str, characters: str) -> str:
    """Write a font in which each character is a bar of a height of its own."""
    builder = FontBuilder(1000, isTTF=True)
    glyphs = {".notdef": 0} | {f"u{ord(each):X}": 200 + 100 * number for number, each in enumerate(characters)}
    builder.setupGlyphOrder(list(glyphs))
    builder.setupCharacterMap({ord(each): f"u{ord(each):X}" for each in characters})
    outlines = {}
    for glyph, height in glyphs.items():
        pen = TTGlyphPen(None)
        pen.moveTo((100, 0))
        for point in ((100, height), (800, height), (800, 0)):
            pen.lineTo(point)
        pen.closePath()
        outlines[glyph] = pen.glyph()
    builder.setupGlyf(outlines)
    builder.setupHorizontalMetrics({glyph: (900, 100) for glyph in glyphs})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": name, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    path = folder / f"{name}.ttf"
    builder.save(path)
    return str(path)


@pytest.fixture
def two_fonts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = [font_of(tmp_path, "First", "猫ネ"), font_of(tmp_path, "Second", "猫狗")]
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(tmp_path / "broken.ttf"), *found])


def drawn(text: str, bold: bool = False, anchor: str = "la") -> np.ndarray[Any, Any]:
    figure = PanelFigure(600, 60, texts=[PlacedText(300, 30, text, 13, anchor, bold=bold)])
    assert_tidy(figure)
    return figure.to_rgb()


@pytest.mark.parametrize("bold", [False, True])
@pytest.mark.parametrize("script", NAMES)
def test_two_names_never_look_the_same(script: str, bold: bool) -> None:
    one, other = NAMES[script]
    assert not np.array_equal(drawn(one, bold), drawn(other, bold))
    assert not np.array_equal(upright(one, 13), upright(other, 13))
    assert fonts.drawable(one) != fonts.drawable(other)


@pytest.mark.usefixtures("no_fonts")
def test_what_no_font_has_is_written_as_code_points_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    assert fonts.drawable("cat 猫狗, é") == "cat U+732B U+72D7, é"
    assert fonts.drawable("two\nlines") == "two\nlines"
    with caplog.at_level(logging.WARNING):
        for text in ("犬", "บ", "ネコ", "ข", "🐈"):
            fonts.drawable(text)
    lines = [record.getMessage() for record in caplog.records]
    assert len([line for line in lines if "fonts-noto-cjk" in line]) == 1
    assert len([line for line in lines if "Noto Sans Thai" in line]) == 1 and len(lines) == 3


@pytest.mark.usefixtures("two_fonts")
def test_fonts_are_found_by_what_they_hold() -> None:
    assert [(run.text, Path(run.path).stem) for run in fonts.runs("a 猫狗 b")] == [
        ("a ", "DejaVuSans"),
        ("猫狗", "Second"),  # both in one font, although the other has the first
        (" b", "DejaVuSans"),
    ]
    assert [(run.text, Path(run.path).stem) for run in fonts.runs("狗ネ犬")] == [
        ("狗", "Second"),
        ("ネ", "First"),
        ("U+72AC", "DejaVuSans"),
    ]
    assert fonts.families("a 猫狗") == ["DejaVu Sans", "Second"]


@pytest.mark.usefixtures("two_fonts")
@pytest.mark.parametrize("anchor", ["la", "ma", "ra", "lm", "mm", "rm", "ls", "ms", "rs"])
def test_texts_of_several_fonts_stand_where_others_do(anchor: str) -> None:
    """On one line, the middle at the place: to a pixel, as a text of one font would."""
    dark = np.argwhere(drawn("猫" * 5 + "x" + "猫" * 5, anchor=anchor)[..., 0] < 128)
    left, right = dark[:, 1].min(), dark[:, 1].max()
    at = {"l": left, "m": (left + right) / 2, "r": right}[anchor[0]]
    assert abs(at - 300) <= 3
    bottom = dark[:, 0].max() + 1  # no character goes below the line
    line = np.argwhere(drawn("x", anchor=anchor)[..., 0] < 128)[:, 0].max() + 1
    assert abs(int(bottom) - int(line)) <= 1


@pytest.mark.usefixtures("two_fonts")
def test_charts_use_the_same_fonts() -> None:
    axes = charts.confusion_matrix(np.eye(3, dtype=int) * 4, ["猫", "犬", "x"])
    axes.set_title("狗")
    figure = charts.with_fonts(axes.figure)
    labels = axes.get_yticklabels()
    assert [label.get_text() for label in labels] == ["猫", "U+72AC", "x"]
    assert labels[0].get_fontfamily() == ["DejaVu Sans", "First"]
    assert axes.title.get_fontfamily() == ["DejaVu Sans", "Second"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of glyphs that are missing
        figure.savefig(io.BytesIO(), format="png")
    panel = PanelFigure(300, 60, texts=[PlacedText(30, 30, "狗 犬", 13)]).to_figure()
    assert panel.texts[0].get_text() == "狗 U+72AC" and panel.texts[0].get_fontfamily() == ["DejaVu Sans", "Second"]


def test_a_name_that_would_be_cut_is_a_number() -> None:
    names = ["cat", "American black bear", "American black widow"]
    assert [short_class_name(names, label, 56, PAGE) for label in range(4)] == [
        "→ cat",
        "→ class 1",
        "→ class 2",
        "→ 3",
    ]
