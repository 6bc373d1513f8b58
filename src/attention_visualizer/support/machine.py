"""What this machine has: memory, versions of packages, the commit of a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from attention_visualizer.support.errors import UserError

if TYPE_CHECKING:
    import torch


def check_memory(num_parameters: int) -> None:
    """Raise UserError where a model of so many parameters cannot be trained in this machine's memory."""
    # Weights, gradients and Adam's two moments in float32.
    needed, available = 4 * 4 * num_parameters, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        raise UserError(
            f"a model of {num_parameters:,} parameters needs {needed / 1e9:,.0f} GB of memory to train, and this "
            f"machine has {available / 1e9:,.0f}: lower model.embed_dim, model.mlp_dim or model.num_layers"
        )


def available_memory(device: torch.device) -> int | None:
    """Return how many bytes of memory are free for tensors on `device`; None where that is not known."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    free = []
    with suppress(OSError, ValueError, LookupError):
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        free.append(1024 * next(int(line[1]) for line in lines if line[0] == "MemAvailable:"))
    with suppress(OSError, ValueError):  # of a container
        group = Path("/sys/fs/cgroup")
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(free, default=None)


def peak_memory(device: torch.device) -> str:
    """Return how much memory this process has needed at the most, in words."""
    try:
        import resource
    except ImportError:  # Windows
        return "not known on this system"
    unit = 1 if sys.platform == "darwin" else 1024
    text = f"{unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9:.1f} GB at the most"
    if device.type == "cuda":
        import torch

        text += f", and {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB of the GPU's"
    return text


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
