"""The explorer's page: one HTML file, whose policy lets nothing be fetched and no script run but its own."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from attention_visualizer.explorer.contents import Contents, deflated

FILE_NAME = "attention_explorer.html"
ROOM, SCRIPTS = (
    "attention_visualizer.explorer",
    ("attention.js", "words.js", "address.js", "drawing.js", "saved.js", "explorer.js", "start.js"),
)


def render(contents: Contents) -> str:
    """Return the page. Names of others are text in it, and never markup."""
    room = resources.files(ROOM)
    script = "".join(room.joinpath(name).read_text("utf-8") for name in SCRIPTS)
    style = room.joinpath("explorer.css").read_text("utf-8")
    environment = Environment(loader=PackageLoader(ROOM, "."), undefined=StrictUndefined, autoescape=True)
    return environment.get_template("explorer.html").render(
        title=contents.title,
        policy=f"default-src 'none'; img-src data: blob:; script-src '{digest(script)}'; style-src '{digest(style)}'",
        script=Markup(script),
        style=Markup(style),
        header=Markup(json_for_html(contents.header())),
        rows=deflated(contents.rows()),
    )


def digest(text: str) -> str:
    """Return what a content security policy calls a script or a style of this text."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def json_for_html(value: object) -> str:
    """Return JSON that no HTML parser takes for the end of its element."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
