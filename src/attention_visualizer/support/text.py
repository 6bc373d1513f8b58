"""Text from elsewhere (names of files, classes and runs, error messages), made to be shown and to do nothing else."""

from __future__ import annotations

from pathlib import Path

FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")  # how cells begin that a spreadsheet would work out


def printable(text: str | Path) -> str:
    """For terminals, figures and reports: names can hold line breaks, escape sequences and bytes that are no text."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in str(text))


def print_sanitised(line: str) -> None:
    """Prints a line that names files or holds an error: see `printable`."""
    print(printable(line), flush=True)


def csv_safe(value: object) -> object:
    """For CSV. Text in one line, because some readers begin a row at any line break; what spreadsheets would take for
    a formula gets the apostrophe that makes them show it."""
    if not isinstance(value, str):
        return value
    text = printable(" ".join(value.split()))
    return f"'{text}" if text.startswith(FORMULA) else text
