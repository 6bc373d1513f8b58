"""`attention-visualizer`, or `attnviz`: the commands by name, wherever the package is installed."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from attention_visualizer.commands.completion import SCRIPT
from attention_visualizer.commands.quick_imports import quick_imports, silent_interrupt
from attention_visualizer.support.extras import missing_package
from attention_visualizer.support.invocation import INSTALLED, invocation
from attention_visualizer.support.text import nearest, printable

HELP = f"""See what a Vision Transformer attends to, while it trains and afterwards.

  {INSTALLED} train [group=choice] [group.field=value] ...    train on MNIST or scikit-learn's digits
  {INSTALLED} analyze [field=value] ...                       figures, statistics and a report of a checkpoint
  {INSTALLED} --version
  eval "$({INSTALLED} --completion)"                          completion in bash; in zsh after `bashcompinit`

`{INSTALLED} train --help` and `{INSTALLED} analyze --help` list all fields. `attnviz` is the same command.
"""
COMMANDS = ("train", "analyze")


def main() -> None:
    """Run the command that is named first on the command line."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        print(HELP, end="")
    elif name in ("--version", "-V"):
        print(f"{INSTALLED} {version(INSTALLED)}")
    elif name == "--completion":
        print(SCRIPT, end="")
    elif name in COMMANDS:
        sys.argv = [f"{INSTALLED} {name}", *arguments]
        run(name, config_folder())
    else:
        meant = nearest(name.lstrip("-"), COMMANDS)
        advice = f"did you mean `{INSTALLED} {meant[0]}`?" if meant else f"give one of {', '.join(COMMANDS)}"
        fail(f"{printable(name)}: there is no such command: {advice}")


def run(name: str, conf: Path) -> None:
    """Run "train" or "analyze" on `sys.argv`. conf: the folder of config files."""
    try:
        with silent_interrupt():
            if name == "train":
                with quick_imports():
                    from attention_visualizer.commands.train import main as command
            else:
                from attention_visualizer.commands.analyze import main as command
    except ModuleNotFoundError as error:
        fail(str(missing_package(" ".join(invocation(name)), error, "train" if name == "train" else "report")))
    command(conf)


def config_folder() -> Path:
    """Return the folder of config files: within the installed package, or in the clone that it is imported from."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parents[1] / "conf"


def fail(line: str) -> NoReturn:
    print(f"error: {line}", file=sys.stderr)
    raise SystemExit(2)
