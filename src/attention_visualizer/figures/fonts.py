"""The fonts of texts: DejaVu Sans, and for characters that it lacks, fonts of this machine, found by what they hold.

What no font here has is written as its code points, such as U+732B: an empty box would look like any other.
"""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

log = logging.getLogger(__name__)

USUAL = "DejaVu Sans"  # which comes with matplotlib
CJK = {"CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "IDEOGRAPHIC"}


@dataclass(frozen=True)
class Run:
    """Characters of a text that one font has."""

    text: str
    path: str  # of the font


@cache
def usual_font(bold: bool = False) -> str:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name)


@cache
def font(size: int, path: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


@lru_cache(maxsize=64)
def face(path: str) -> FT2Font:
    return FT2Font(path)


@cache
def fonts_of_machine() -> tuple[str, ...]:
    """Return the paths of this machine's fonts, upright ones of usual weight and without serifs first."""
    unusual = ("bold", "italic", "oblique", "light", "thin", "black", "mono", "serif", "condensed")
    paths = map(str, font_manager.findSystemFonts())
    return tuple(sorted(paths, key=lambda path: (sum(word in Path(path).name.lower() for word in unusual), path)))


@lru_cache(maxsize=4096)
def font_with(characters: str) -> str | None:
    """Return the first font of this machine that has all of the characters; None if none has."""
    for path in fonts_of_machine():
        try:
            found = face(path)
            if found.scalable and all(found.get_char_index(ord(each)) for each in characters):
                return path
        except (OSError, RuntimeError):  # not a font after all
            continue
    return None


@lru_cache(maxsize=1024)
def runs(text: str, bold: bool = False) -> tuple[Run, ...]:
    """Split a text by the fonts that have its characters, those that none has written as code points."""
    found: list[Run] = []
    for part, is_usual in parts(text, bold):
        if is_usual:
            found.append(Run(part, usual_font(bold)))
        elif (path := font_with(part)) is not None:
            found.append(Run(part, path))
        else:
            for each in part:
                path = font_with(each)
                found.append(Run(each, path) if path else Run(code_points(each, found), usual_font(bold)))
    joined: list[Run] = []
    for run in found:
        if joined and joined[-1].path == run.path:
            run = Run(joined.pop().text + run.text, run.path)
        joined.append(run)
    return tuple(joined)


def parts(text: str, bold: bool) -> Iterator[tuple[str, bool]]:
    """Yield the longest parts that the usual font has, and those that it lacks. Marks stay with what they stand on."""
    start, is_usual = 0, True
    for position, character in enumerate(text):
        is_mark = unicodedata.category(character)[0] == "M" or unicodedata.category(character) == "Cf"
        if is_mark and position > start and not is_usual:
            continue
        has_glyph = character.isspace() or face(usual_font(bold)).get_char_index(ord(character)) > 0
        if has_glyph != is_usual:
            if position > start:
                yield text[start:position], is_usual
            start, is_usual = position, has_glyph
    if start < len(text):
        yield text[start:], is_usual


def code_points(character: str, before: list[Run]) -> str:
    """Return what stands for a character that no font has, and say so once for each script."""
    is_letter = unicodedata.category(character)[0] in "LM"
    script = unicodedata.name(character, "UNNAMED").split()[0] if is_letter else "SYMBOLS"
    tell_of("CJK" if script in CJK else script)
    space = " " if before and before[-1].text.startswith((" U+", "U+")) else ""
    return f"{space}U+{ord(character):04X}"


@cache
def tell_of(script: str) -> None:
    """Say what is missing. script: the first word of its characters' names, or "SYMBOLS"."""
    what, package = f"{script.capitalize()} letters", f"Noto Sans {script.capitalize()} (Debian: fonts-noto-core)"
    if script == "CJK":
        what, package = "Chinese, Japanese or Korean letters", "Noto Sans CJK (Debian: fonts-noto-cjk)"
    elif script == "SYMBOLS":
        what, package = "some symbols", "Noto Sans Symbols and Noto Emoji (Debian: fonts-noto-core)"
    log.warning("no font of this machine has %s: figures show code points, such as U+732B; install %s", what, package)


def drawable(text: str) -> str:
    """Return a text with code points for what no font of this machine has."""
    return "".join(run.text for run in runs(text))


def families(text: str) -> list[str]:
    """Return the names of the fonts that a text is drawn with, for matplotlib, which then knows them."""
    names = [USUAL]
    for run in runs(text):
        if run.path != usual_font():
            font_manager.fontManager.addfont(run.path)
            names.append(face(run.path).family_name)
    return list(dict.fromkeys(names))


@lru_cache(maxsize=1024)  # most texts of a figure are those of the one before
def text_mask(text: str, size: int, bold: bool, anchor: str) -> tuple[int, int, Image.Image]:
    """Rasterise a text: its left and top from the anchor, and how much of each pixel it covers."""
    drawn = runs(text, bold)
    if len(drawn) == 1 and drawn[0].path == usual_font(bold):
        shift, y, starts = anchor, 0.0, [0.0]
    else:  # side by side on one line
        ascent, descent = font(size, usual_font(bold)).getmetrics()
        y = {"a": ascent, "m": (ascent - descent) / 2, "s": 0.0}[anchor[1]]
        widths = [font(size, run.path).getlength(run.text) for run in drawn]
        x = {"l": 0.0, "m": -sum(widths) / 2, "r": -sum(widths)}[anchor[0]]
        shift, starts = "ls", [x + sum(widths[:number]) for number in range(len(widths))]
    boxes = [font(size, run.path).getbbox(run.text, anchor=shift) for run in drawn]
    edges = [(box[0] + x, box[1] + y, box[2] + x, box[3] + y) for box, x in zip(boxes, starts, strict=True)]
    left, top = (round(min(edge[axis] for edge in edges)) for axis in (0, 1))
    right, bottom = (round(max(edge[axis] for edge in edges)) for axis in (2, 3))
    mask = Image.new("L", (max(right - left, 1), max(bottom - top, 1)))
    for run, x in zip(drawn, starts, strict=True):
        ImageDraw.Draw(mask).text((x - left, y - top), run.text, 255, font(size, run.path), anchor=shift)
    return left, top, mask


@lru_cache(maxsize=1024)
def text_width(text: str, size: int, bold: bool = False) -> int:
    return int(np.ceil(sum(font(size, run.path).getlength(run.text) for run in runs(text, bold))))
