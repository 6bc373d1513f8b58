"""Sanitise untrusted text for terminals, CSV and reports: names of files, classes and runs, messages of errors."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")  # how cells begin that a spreadsheet would work out


def printable(text: str | Path) -> str:
    """Replace what is not printable: names can hold line breaks, escape sequences and bytes that are no text."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in str(text))


def print_sanitised(line: str) -> None:
    """Print a line that names files or holds an error, as `printable` makes it."""
    print(printable(line), flush=True)


def csv_safe(value: object) -> object:
    """Make a value safe for CSV: text in one line, because some readers begin a row at any line break, and with an
    apostrophe before what spreadsheets would take for a formula."""
    if not isinstance(value, str):
        return value
    text = printable(" ".join(value.split()))
    return f"'{text}" if text.startswith(FORMULA) else text


def nearest(word: str, choices: Iterable[str], count: int = 1) -> list[str]:
    """Return the choices, at most `count`, that `word` was probably meant to be: those that contain it, the shortest
    first; where none does, those that are spelt alike."""
    choices = list(choices)
    inside = sorted((choice for choice in choices if len(word) > 2 and word in choice), key=len)
    return (inside or difflib.get_close_matches(word, choices, count))[:count]
