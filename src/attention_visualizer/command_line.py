"""What the entry points share: one-line errors, a sweep's table. It, configuration.py and resuming.py know Hydra."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attention_visualizer import storage
from attention_visualizer.errors import UserError
from attention_visualizer.inert import cell, printable


def run(main: Callable[[], Any]) -> None:
    """Runs a Hydra entry point; a user's mistake ends as one line on stderr and exit code 2.

    With HYDRA_FULL_ERROR=1 in the environment the traceback is shown instead.
    """
    if os.environ.get("HYDRA_FULL_ERROR"):
        main()
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra hand errors through instead of printing them
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see train.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (UserError, HydraException, OmegaConfBaseException, OSError) as error:
        SweepTable.discard_unbegun()
        fail(error)


def fail(error: Exception) -> NoReturn:
    """Ends the program with one line; inside the job, before Hydra adds a line of its own."""
    print(f"error: {printable(one_line(error))}", file=sys.stderr)
    raise SystemExit(2) from None


def one_line(error: BaseException) -> str:
    """What went wrong in one line; Hydra's and OmegaConf's messages spread it over several."""
    if not isinstance(error, HydraException | OmegaConfBaseException):
        if isinstance(error, OSError):
            return f"cannot use {error.filename}: {error.strerror}" if error.filename else str(error)
        return " ".join(str(error).split())
    lines: list[str] = []
    cause: BaseException | None = error
    while cause is not None:  # the inner message says what, the outer one where
        for line in str(cause).splitlines():
            line = line.strip()
            if line.startswith("Config search path"):
                break
            noise = re.match(r"(object_type|reference_type|full_key|set |To append to your config)", line)
            if line and not noise and line not in lines:
                lines.append(line)
        cause = cause.__cause__
    text = "; ".join(lines).replace("Builds_", "")
    return re.sub(r"[.:;]+;", ":", text) + " (see --help for the groups and fields)"


def job_folder(number: int, overrides: str) -> str:
    """Folder name of a sweep's job: its number and what was overridden, in characters that need no quoting."""
    name = re.sub(r"[^\w.\-]+", "-", f"{number}_{overrides}")
    return name.encode()[:240].decode(errors="ignore").rstrip("._-")  # file systems count bytes


OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)


class SweepTable(Callback):
    """Ends a sweep with a table of its runs, printed and written as sweep.csv."""

    folder: ClassVar[Path | None] = None  # of the sweep that is under way

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        SweepTable.folder = Path(config.hydra.sweep.dir)

    @classmethod
    def discard_unbegun(cls) -> None:
        """Removes the folder of a sweep that could not be composed: Hydra makes it first."""
        if cls.folder is not None and cls.folder.is_dir():
            if {path.name for path in cls.folder.iterdir()} <= {"multirun.yaml"}:
                shutil.rmtree(cls.folder)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        rows = sweep_rows(folder)
        if not rows:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({name: cell(value) for name, value in row.items()} for row in rows)
        storage.write_text(folder / "sweep.csv", text.getvalue())
        table = Table(title=Text(f"Sweep {printable(folder)}"))
        columns = [column for column in rows[0] if column != "error"]
        for column in columns:
            justify: Any = "left" if column in ("run", "status") else "right"
            table.add_column(column.replace("_", " "), justify=justify, overflow="fold")
        for row in rows:
            table.add_row(*(Text("" if row[column] is None else printable(str(row[column]))) for column in columns))
        Console().print(table)
        for row in rows:
            if row["error"]:
                print(printable(f"{row['run']}: {row['error']}"))
        print(f"Table:    {folder / 'sweep.csv'}\nAnalyse:  python analyze.py run={folder}")
        if any(row["status"] != "completed" for row in rows):
            raise SystemExit(1)


def sweep_rows(folder: Path) -> list[dict[str, Any]]:
    """One row for each job of a sweep, in the order of their numbers."""
    rows = []
    jobs = [storage.RunFolder(path) for path in folder.iterdir() if path.is_dir()]
    for job in sorted(jobs, key=lambda job: (storage.job_number(job), job.name)):
        try:
            manifest = job.read_manifest()
        except UserError as error:
            manifest = {"status": "unreadable", "error": str(error)}
        metrics = manifest.get("metrics")
        metrics = metrics if isinstance(metrics, dict) else {}
        rows.append(
            {
                "run": job.name,
                "status": manifest.get("status", "not started"),
                "validation_accuracy": _rounded(metrics.get("validation_accuracy"), 4),
                "parameters": manifest.get("parameters"),
                "seconds": _rounded(metrics.get("seconds"), 1),
                "error": manifest.get("error"),
            }
        )
    return rows


def _rounded(value: Any, digits: int) -> float | None:
    return round(value, digits) if isinstance(value, int | float) else None
