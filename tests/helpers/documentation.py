"""What the documentation says, for tests that hold it against the program."""

from __future__ import annotations

import re
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]


def documented(heading: str) -> list[str]:
    """First cells of the table under a heading of docs/report.md."""
    text = (PROJECT / "docs" / "report.md").read_text(encoding="utf-8")
    section = re.split(r"\n#+ ", text.split(f"# {heading}\n")[1])[0]
    return re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
