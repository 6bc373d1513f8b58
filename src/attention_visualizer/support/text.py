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


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice that `word` was probably meant to be; None where none is like it."""
    choices = list(choices)
    inside = [choice for choice in choices if len(word) > 2 and word in choice]
    alike = difflib.get_close_matches(word, choices, 1)
    return next(iter([*alike, *sorted(inside, key=len)]), None)
