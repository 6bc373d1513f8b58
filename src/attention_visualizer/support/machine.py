"""What this machine has: memory, versions of packages, the commit of a checkout."""

from __future__ import annotations

import os
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from attention_visualizer.support.errors import UserError


def check_memory(num_parameters: int) -> None:
    """Raise UserError where a model of so many parameters cannot be trained in this machine's memory."""
    # Weights, gradients and Adam's two moments in float32.
    needed, available = 4 * 4 * num_parameters, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        raise UserError(
            f"a model of {num_parameters:,} parameters needs {needed / 1e9:,.0f} GB of memory to train, and this "
            f"machine has {available / 1e9:,.0f}: lower model.embed_dim, model.mlp_dim or model.num_layers"
        )


def installed_version(package: str) -> str | None:
    """Return the version of an installed package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:  # used from a folder on the path, not installed
        return None


def git_commit(folder: Path) -> str | None:
    """Return the commit of the checkout that `folder` lies in, with "-dirty" after it if files differ; else None."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
