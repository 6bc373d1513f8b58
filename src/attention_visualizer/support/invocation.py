"""How this program is typed: as the scripts of a clone, or as the installed command."""

from __future__ import annotations

import sys
from pathlib import Path

INSTALLED = "attention-visualizer"


def invocation(command: str) -> list[str]:
    """Return the words that begin a command line of "train" or "analyze", in the way that this process was started."""
    script = Path(sys.argv[0])
    if script.name in ("train.py", "analyze.py"):
        return ["python", str(script.with_name(f"{command}.py"))]
    return [INSTALLED, command]
