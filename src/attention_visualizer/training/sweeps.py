"""Sweeps: the names of their jobs' folders, going on with one, the table at the end."""

from __future__ import annotations

import csv
import io
import math
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

from attention_visualizer.files import atomic, plain_files
from attention_visualizer.runs import folders
from attention_visualizer.runs.config_fields import field_named
from attention_visualizer.runs.folders import RunFolder
from attention_visualizer.support.errors import UserError
from attention_visualizer.support.invocation import invocation
from attention_visualizer.support.text import csv_safe, print_sanitised, printable
from attention_visualizer.training import slurm
from attention_visualizer.training.overrides import override
from attention_visualizer.watching.tags import tensorboard_command


def job_folder(number: int, overrides: str) -> str:
    """Name the folder of a sweep's job: its number and what was overridden, in characters that need no quoting."""
    name = re.sub(r"[^\w.\-]+", "-", f"{number}_{overrides}")
    return name.encode()[:240].decode(errors="ignore").rstrip("._-")  # file systems count bytes


ACCURACY = "validation_accuracy"
COLUMNS = ("run", "status", ACCURACY, "parameters", "seconds", "error")  # beside the swept fields
RESUME = "resume=auto"
RECORD = "sweep.json"  # what was swept over: Hydra's own multirun.yaml is not written whole or not at all
OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)


class SweepTable(Callback):
    """Hydra's callback that begins a sweep, or goes on with one, and ends it with a table: printed, and sweep.csv."""

    folder: ClassVar[Path | None] = None  # of the sweep that is under way
    made: ClassVar[list[Path]] = []  # the folders that were not there before it
    lock: ClassVar[filelock.BaseFileLock | None] = None  # on it
    job_failed: ClassVar[bool] = False

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """With resume=auto, the sweep's folder becomes that of the newest unfinished one of the same overrides."""
        SweepTable.job_failed, SweepTable.made = False, []
        if not config.runs_dir:
            refuse("runs_dir= is empty: name a folder")
        if (config.get("resume") == "auto" or slurm.is_requeued()) and (unfinished := unfinished_sweep(config)):
            SweepTable.folder, SweepTable.lock = unfinished
            config.hydra.sweep.dir = str(SweepTable.folder)
            # Each job's config is composed anew, from these.
            config.hydra.overrides.hydra.append(override("hydra.sweep.dir", SweepTable.folder))
            print_sanitised(f"Resuming sweep {SweepTable.folder}")
            return
        SweepTable.folder = Path(config.hydra.sweep.dir)
        SweepTable.made = atomic.missing_folders(SweepTable.folder)
        with suppress(OSError, UserError):  # Hydra makes the folder, too, and says what is wrong
            SweepTable.folder.mkdir(parents=True, exist_ok=True)
            SweepTable.lock = folders.lock_folder(SweepTable.folder)
            atomic.write_json(SweepTable.folder / RECORD, {"overrides": own_overrides(config)})

    @classmethod
    def discard_unbegun(cls) -> None:
        """Remove the folder of a sweep that could not be composed, if it was made for it."""
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
        if any(folder.rglob("events.out.tfevents.*")):
            print_sanitised(f"Charts:   {tensorboard_command(str(folder))}")
        print_sanitised(f"Analyse:  {shlex.join([*invocation('analyze'), override('run', folder)])}")
        if SweepTable.job_failed or any(row["status"] != "completed" for row in rows):
            raise SystemExit(1)


def refuse(why: str) -> NoReturn:
    """Exit with an error line. (Of exceptions in callbacks, Hydra makes warnings, but not of SystemExit.)"""
    print(f"error: {why}", file=sys.stderr)
    raise SystemExit(2)


def print_table(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Print a line for each job, the best first, with as much of its folder's name as there is room for."""
    rows = sorted(rows, key=lambda row: -math.inf if row[ACCURACY] is None else row[ACCURACY], reverse=True)
    console, table = Console(), Table(title=Text(f"Sweep {printable(folder)}"))
    table.add_column("run", no_wrap=True)
    columns = [column for column in rows[0] if column not in ("run", "error")]
    cells = {column: [printable(cell_text(column, row[column])) for row in rows] for column in columns}
    if rows[0][ACCURACY] is not None:
        cells[ACCURACY][0] += " best"
    for column in columns:
        heading = column.replace("_", " ") if column in COLUMNS else printable(column).replace(".", ".\n")
        width = min(20, max(map(len, [*heading.split(), *cells[column]])))
        justify: Any = "left" if column == "status" else "right"
        table.add_column(Text(heading), justify=justify, overflow="fold", width=width)
    lines = 3 * (len(columns) + 1) + 1
    table.columns[0].max_width = max(4, console.width - lines - sum(column.width or 0 for column in table.columns))
    for row, *values in zip(rows, *cells.values(), strict=True):
        table.add_row(*(Text(value) for value in (printable(row["run"]), *values)))
    console.print(table)
    for row in rows:
        if row["error"]:
            print_sanitised(f"{row['run']}: {row['error']}")


def cell_text(column: str, value: Any) -> str:
    """Write a value as the other lines of a run do."""
    if value is None:
        return ""
    if column == ACCURACY:
        return f"{value:.2%}"
    return f"{value:,}" if column == "parameters" and isinstance(value, int) else str(value)


def as_csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writerow({name: csv_safe(name) for name in rows[0]})
    writer.writerows({name: csv_safe(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def own_overrides(config: DictConfig) -> list[str]:
    """Return what was swept over, in its order, by which the jobs have their numbers."""
    return [each for each in config.hydra.overrides.task if each != RESUME]


def unfinished_sweep(config: DictConfig) -> tuple[Path, filelock.BaseFileLock] | None:
    """Find and lock the newest sweep of the same overrides in runs_dir of which a job is not done and that no process
    is at work on."""
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
    """Return one row for each job of a sweep, in the order of their numbers, with a column for each swept field."""
    jobs = [RunFolder(path) for path in folder.iterdir() if is_job(path)]
    jobs.sort(key=lambda job: (folders.job_number(job), job.name))
    manifests = [manifest_of(job) for job in jobs]
    settings = [job_settings(job, manifest) for job, manifest in zip(jobs, manifests, strict=True)]
    known = [each for each in settings if each]  # not of jobs that did not start
    names = dict.fromkeys(name for each in known for name in each)
    swept = [name for name in names if len({each.get(name) for each in known}) > 1]
    rows = []
    for job, manifest, values in zip(jobs, manifests, settings, strict=True):
        metrics = manifest.get("metrics")
        metrics = metrics if isinstance(metrics, dict) else {}
        rows.append(
            {
                "run": job.name,
                "status": manifest.get("status", "not started"),
                **{name: values.get(name) for name in swept},
                ACCURACY: _rounded(metrics.get(ACCURACY), 4),
                "parameters": manifest.get("parameters"),
                "seconds": _rounded(metrics.get("seconds"), 1),
                "error": manifest.get("error"),
            }
        )
    return rows


def is_job(path: Path) -> bool:
    """Whether what stands in a sweep's folder is a job's, which may not have begun; the sweep's report is none."""
    return path.is_dir() and (RunFolder(path).exists or re.match(r"\d+_", path.name) is not None)


def manifest_of(job: RunFolder) -> dict[str, Any]:
    """Return what the job's run.json holds, and what became of it where its process ended without a word."""
    try:
        manifest = job.read_manifest()
    except (OSError, UserError) as error:
        return {"status": "unreadable", "error": str(error)}
    if manifest.get("status") == "running" and not job.is_locked:
        manifest["status"] = "killed"
    return manifest


def job_settings(job: RunFolder, manifest: dict[str, Any]) -> dict[str, str | float]:
    """Return what the job's overrides say of its training, by the names of the fields; empty where it left none."""
    overrides: Any = manifest.get("overrides")  # of a job that failed before it trained
    with suppress(OSError, UserError):
        overrides = plain_files.read_yaml(job.path / ".hydra" / "overrides.yaml")
    settings: dict[str, str | float] = {}
    for text in overrides if isinstance(overrides, list) else []:
        name, _, value = str(text).lstrip("+").partition("=")
        if field_named(name).identifies_run:
            settings[name] = value
            with suppress(ValueError):  # a number, which spreadsheets can sort by
                settings[name] = float(value) if re.search("[.eE]", value) else int(value)
    return settings


def _rounded(value: Any, digits: int) -> float | None:
    return round(value, digits) if isinstance(value, int | float) else None
