"""How benchmarks run: the parts that a command line chooses, and measurements in processes of their own."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Collection
from typing import Any


def option_parser(description: str | None, parts: Collection[str], quick: str, repeats: int) -> argparse.ArgumentParser:
    """quick: what `--quick` does; repeats: how many there are by default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)} (default: all)")
    parser.add_argument("--quick", action="store_true", help=f"{quick}, once: shows that it runs")
    parser.add_argument("--repeats", type=int, default=repeats, help=f"of each measurement (default: {repeats})")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    return parser


def parse(parser: argparse.ArgumentParser, parts: Collection[str]) -> argparse.Namespace:
    """The options, their `parts` all there and known; ends the program with a line that says what is wrong."""
    options = parser.parse_args()
    unknown = set(options.parts) - set(parts)
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}: choose from {', '.join(parts)}")
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: give at least 1")
    options.parts = options.parts or list(parts)
    if options.quick:
        options.repeats = 1
    return options


def in_child(script: str, *arguments: Any, title: str = "", environment: dict[str, str] | None = None) -> Any:
    """What `script --child [arguments]` prints last, as JSON. This process stays small meanwhile, since the peak memory
    of a child starts at what its parent holds."""
    print(f"{title or ' '.join(map(str, arguments))} ...", file=sys.stderr, flush=True)
    command = [sys.executable, os.path.abspath(script), "--child", json.dumps(arguments)]
    answer = subprocess.run(command, capture_output=True, text=True, env=os.environ | (environment or {}))
    if answer.returncode:
        raise SystemExit(f"the measurement failed:\n{answer.stderr[-2000:]}")
    return json.loads(answer.stdout.splitlines()[-1])
