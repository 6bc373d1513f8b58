"""Errors in one line, whatever libraries put into their messages."""

from __future__ import annotations

import pytest

from attention_visualizer.support.errors import one_line, summary


@pytest.mark.parametrize(
    ("message", "first", "whole"),
    [
        ("out of memory\n  tried 3 MiB\n", "out of memory", "out of memory tried 3 MiB"),
        ("\n \nlate", "late", "late"),
        ("", "OSError", "OSError"),
        (" \n", "OSError", "OSError"),
    ],
)
def test_an_error_in_one_line(message: str, first: str, whole: str) -> None:
    assert summary(OSError(message)) == first
    assert one_line(OSError(message)) == whole
