"""Sweeps: the names of their jobs' folders, going on with one, the table at the end."""

from __future__ import annotations

import csv
import io
import re
import shlex
import shutil
from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attention_visualizer import storage
from attention_visualizer.errors import UserError
from attention_visualizer.inert import cell, printable
from attention_visualizer.overrides import override
from attention_visualizer.resuming import read_config


def job_folder(number: int, overrides: str) -> str:
    """Folder name of a sweep's job: its number and what was overridden, in characters that need no quoting."""
    name = re.sub(r"[^\w.\-]+", "-", f"{number}_{overrides}")
    return name.encode()[:240].decode(errors="ignore").rstrip("._-")  # file systems count bytes


RESUME = "resume=auto"
OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)


class SweepTable(Callback):
    """Ends a sweep with a table of its runs, printed and written as sweep.csv."""

    folder: ClassVar[Path | None] = None  # of the sweep that is under way

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """With resume=auto, the sweep's folder becomes that of the newest unfinished one of the same overrides."""
        if config.get("resume") == "auto" and (folder := unfinished_sweep(config)):
            config.hydra.sweep.dir = str(folder)
            # Each job's config is composed anew, from these.
            config.hydra.overrides.hydra.append(override("hydra.sweep.dir", folder))
            print(f"Going on with sweep {folder}")
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
        print(f"Table:    {folder / 'sweep.csv'}\nAnalyse:  python analyze.py {shlex.quote(override('run', folder))}")
        if any(row["status"] != "completed" for row in rows):
            raise SystemExit(1)


def unfinished_sweep(config: DictConfig) -> Path | None:
    """The newest sweep of the same overrides in runs_dir of which a job is not done."""
    for folder in sorted(Path(config.runs_dir).glob("*/"), reverse=True):
        try:
            asked = set(read_config(folder / "multirun.yaml", plain=False).hydra.overrides.task)
        except (UserError, OmegaConfBaseException, TypeError):
            continue  # no sweep
        rows = sweep_rows(folder)
        done = (folder / "sweep.csv").is_file() and all(row["status"] == "completed" for row in rows)
        if asked - {RESUME} == set(config.hydra.overrides.task) - {RESUME} and not done:
            return folder
    return None


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
