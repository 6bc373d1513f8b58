"""How benchmarks print: tables as text or Markdown, medians with their spread, and what they were measured with."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version


def table(header: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool) -> str:
    if markdown:
        first, *rest = (f"| {' | '.join(line)} |" for line in (header, *rows))
        return "\n".join([first, "|---" * len(header) + "|", *rest])
    lines = [header, *rows]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def spread(numbers: Sequence[float], form: str) -> str:
    """The median and, behind it, the smallest and the largest, each in the format `form`."""
    return f"{statistics.median(numbers):{form}} ({min(numbers):{form}} to {max(numbers):{form}})"


def versions(*packages: str) -> str:
    """ "torch 2.11.0, timm 1.0.20": those that are installed."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def machine(gpu: str = "no GPU used") -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.system()} {platform.machine()}, {cores} CPU cores, {gpu}"
