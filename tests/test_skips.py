"""SKIPPED.md lists the tests that may be skipped."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_the_list_of_skips_is_complete_and_true() -> None:
    listed = set(re.findall(r"`tests/([\w/]+\.py)`", (TESTS / "SKIPPED.md").read_text(encoding="utf-8")))
    skip = re.compile(r"pytest\.(skip|importorskip)\(|mark\.(skipif|skip|xfail)\b")
    files = [path for path in TESTS.rglob("*.py") if path != Path(__file__)]
    assert listed == {str(path.relative_to(TESTS)) for path in files if skip.search(path.read_text(encoding="utf-8"))}
