"""The order of rooms, as pyproject.toml has it for import-linter."""

from __future__ import annotations

import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
CONTRACTS = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
ROOMS = [room for layer in CONTRACTS[0]["layers"] for room in layer.split(" | ")]
