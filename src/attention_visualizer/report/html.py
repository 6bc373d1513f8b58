"""The report as one HTML file: figures inside it, no script, nothing fetched from anywhere."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup
from PIL import Image

from attention_visualizer.report.chapter import Table

KINDS = {".png": "image/png", ".webp": "image/webp", ".gif": "image/gif"}  # others are linked
THUMBNAIL = (480, 300)  # pixels, twice those on the page
NUMBER = re.compile(r"[-+−<>~]?\s?\d[\d,.]*(\s?%)?(\s\(.*\))?|–|")


def render(contents: dict[str, Any], folder: Path) -> Iterator[str]:
    """Render the page piece by piece, so that one figure at a time is in memory. contents: of `markdown.contents`;
    folder: where the figures are."""
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    environment = Environment(
        loader=PackageLoader("attention_visualizer.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
    )
    environment.filters |= {
        # Our own prose, in which foreign text is escaped; HTML in it would be shown, not obeyed.
        "prose": lambda text: Markup(markdown.render(text)),
        "sentence": lambda text: Markup(markdown.renderInline(text)),
        "file_address": quote,
    }
    methods = environment.get_template("methods.md").render()
    return environment.get_template("report.html").generate(
        contents,
        methods=methods,
        embedded=lambda name: embedded(folder / name),
        size=lambda name: pixels(folder / name),
        thumbnail=lambda name: thumbnail(folder / name),
        numeric=numeric_columns,
    )


def embedded(path: Path) -> str | None:
    """Encode a figure as an address that holds it, without loss; None for kinds that are linked."""
    if path.suffix == ".png":
        with Image.open(path) as picture:
            buffer = io.BytesIO()
            picture.convert("RGB").save(buffer, "WEBP", lossless=True, quality=30, method=1)  # 40% of the PNG's size
        return data_address("image/webp", buffer.getvalue())
    kind = KINDS.get(path.suffix)
    return None if kind is None else data_address(kind, path.read_bytes())


def thumbnail(path: Path) -> str | None:
    """Encode a small copy as an address that holds it; None for kinds that are linked."""
    if path.suffix not in KINDS:
        return None
    with Image.open(path) as picture:
        small = picture.convert("RGB")
    small.thumbnail(THUMBNAIL, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=85)
    return data_address("image/webp", buffer.getvalue())


def data_address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def pixels(path: Path) -> tuple[int, int] | None:
    """Read width and height, with which a browser keeps the place free; None for kinds that are linked."""
    if path.suffix not in KINDS:
        return None
    with Image.open(path) as picture:
        return picture.size


def numeric_columns(table: Table) -> list[bool]:
    """Return whether each column holds nothing but numbers: those stand flush right."""
    return [
        bool(table.rows) and all(NUMBER.fullmatch(row[column]) is not None for row in table.rows)
        for column in range(len(table.columns))
    ]
