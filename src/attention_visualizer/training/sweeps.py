"""Sweeps: the names of their jobs' folders, going on with one, the table at the end."""

from __future__ import annotations

import csv
import io
import re
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import filelock
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attention_visualizer.files import atomic
from attention_visualizer.runs import folders
from attention_visualizer.support.errors import UserError
from attention_visualizer.support.text import csv_safe, print_sanitised, printable
from attention_visualizer.training.overrides import override


def job_folder(number: int, overrides: str) -> str:
    """Folder name of a sweep's job: its number and what was overridden, in characters that need no quoting."""
    name = re.sub(r"[^\w.\-]+", "-", f"{number}_{overrides}")
    return name.encode()[:240].decode(errors="ignore").rstrip("._-")  # file systems count bytes


RESUME = "resume=auto"
RECORD = "sweep.json"  # what was swept over: Hydra's own multirun.yaml is not written whole or not at all
OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)


class SweepTable(Callback):
    """Begins a sweep, or goes on with one, and ends it with a table of its runs, printed and written as sweep.csv."""

    folder: ClassVar[Path | None] = None  # of the sweep that is under way
    made: ClassVar[list[Path]] = []  # the folders that were not there before it
    lock: ClassVar[filelock.BaseFileLock | None] = None  # on it
    job_failed: ClassVar[bool] = False

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """With resume=auto, the sweep's folder becomes that of the newest unfinished one of the same overrides."""
        SweepTable.job_failed, SweepTable.made = False, []
        if not config.runs_dir:
            refuse("runs_dir= is empty: name a folder")
        if config.get("resume") == "auto" and (unfinished := unfinished_sweep(config)):
            SweepTable.folder, SweepTable.lock = unfinished
            config.hydra.sweep.dir = str(SweepTable.folder)
            # Each job's config is composed anew, from these.
            config.hydra.overrides.hydra.append(override("hydra.sweep.dir", SweepTable.folder))
            print_sanitised(f"Going on with sweep {SweepTable.folder}")
            return
        SweepTable.folder = Path(config.hydra.sweep.dir)
        SweepTable.made = atomic.missing_folders(SweepTable.folder)
        with suppress(OSError, UserError):  # Hydra makes the folder, too, and says what is wrong
            SweepTable.folder.mkdir(parents=True, exist_ok=True)
            SweepTable.lock = folders.lock_folder(SweepTable.folder)
            atomic.write_json(SweepTable.folder / RECORD, {"overrides": own_overrides(config)})

    @classmethod
    def discard_unbegun(cls) -> None:
        """Removes the folder of a sweep that could not be composed, if it was made for it."""
        if cls.folder in cls.made and cls.folder.is_dir():
            for name in ("multirun.yaml", ".lock", RECORD):
                (cls.folder / name).unlink(missing_ok=True)
            atomic.remove_empty(cls.made)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        rows = sweep_rows(folder)
        if SweepTable.lock is not None:
            SweepTable.lock.release()
        if not rows:
            self.discard_unbegun()
            refuse("the sweep has no job: a range or a choice is empty, or hydra.sweep.subdir leads out of its folder")
        print_table(folder, rows)
        try:
            atomic.write_text(folder / "sweep.csv", as_csv(rows))
            print_sanitised(f"Table:    {folder / 'sweep.csv'}")
        except UserError as error:  # Hydra would make a warning of it
            print_sanitised(f"No table: {error}")
        print_sanitised(f"Analyse:  python analyze.py {shlex.quote(override('run', folder))}")
        if SweepTable.job_failed or any(row["status"] != "completed" for row in rows):
            raise SystemExit(1)


def refuse(why: str) -> NoReturn:
    """What a callback raises, Hydra makes a warning of, but for this."""
    print(f"error: {why}", file=sys.stderr)
    raise SystemExit(2)


def print_table(folder: Path, rows: list[dict[str, Any]]) -> None:
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
            print_sanitised(f"{row['run']}: {row['error']}")


def as_csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows({name: csv_safe(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def own_overrides(config: DictConfig) -> list[str]:
    """In their order, by which the jobs have their numbers."""
    return [each for each in config.hydra.overrides.task if each != RESUME]


def unfinished_sweep(config: DictConfig) -> tuple[Path, filelock.BaseFileLock] | None:
    """The newest sweep of the same overrides in runs_dir of which a job is not done and that no process is at work on,
    claimed for this one."""
    for folder in sorted(Path(config.runs_dir).glob("*/"), reverse=True):
        try:
            if atomic.read_json(folder / RECORD) != {"overrides": own_overrides(config)}:
                continue
            lock = folders.lock_folder(folder)
        except UserError:  # no sweep, or another process's
            continue
        if not (folder / "sweep.csv").is_file() or any(row["status"] != "completed" for row in sweep_rows(folder)):
            return folder, lock
        lock.release()
    return None


def sweep_rows(folder: Path) -> list[dict[str, Any]]:
    """One row for each job of a sweep, in the order of their numbers."""
    rows = []
    jobs = [folders.RunFolder(path) for path in folder.iterdir() if path.is_dir()]
    for job in sorted(jobs, key=lambda job: (folders.job_number(job), job.name)):
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
