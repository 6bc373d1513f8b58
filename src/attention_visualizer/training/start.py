"""Where a run starts: in a new folder, or in that of a run that goes on, with what was saved of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
from lightning import Trainer
from omegaconf import DictConfig

from attention_visualizer.files import atomic
from attention_visualizer.models.vit_config import ViTConfig
from attention_visualizer.runs import folders
from attention_visualizer.runs.checkpoint import LoadedCheckpoint, load_checkpoint, refuse_other_settings
from attention_visualizer.runs.folders import RunFolder
from attention_visualizer.support.errors import UserError
from attention_visualizer.support.text import print_sanitised
from attention_visualizer.training import resuming
from attention_visualizer.training.components import Components
from attention_visualizer.training.configuration import with_values


@dataclass(frozen=True)
class Start(AbstractContextManager["Start"]):
    """The start of one run. Its folder is this process's own until the context ends."""

    folder: RunFolder
    lock: filelock.BaseFileLock
    #: What training goes on from; None for a new run, and where nothing whole was saved of the one that goes on.
    checkpoint: LoadedCheckpoint | None = None
    #: Whether the folder held this run before.
    is_resumed: bool = False
    #: The folders that were made for a new run, the innermost first; none in a sweep, which names its failed jobs.
    made: list[Path] = field(default_factory=list)

    def __exit__(self, *error: object) -> None:
        self.lock.release()

    @property
    def step(self) -> int | None:
        """The optimiser's step that a resumed run goes on from, -1 where it begins again; None for a new run."""
        if not self.is_resumed:
            return None
        return -1 if self.checkpoint is None else self.checkpoint.step

    def config(self, config: DictConfig) -> DictConfig:
        """Return the settings of the run as it starts here, for loggers, callbacks and config.yaml."""
        values: dict[str, Any] = {"run_folder": str(self.folder.path)}
        if self.checkpoint is not None:
            values["ckpt_path"] = str(self.checkpoint.path)
        if self.step is not None and "tensorboard" in (config.logger or {}):
            # Events after the checkpoint, which this run writes again, disappear from the charts.
            values["logger.tensorboard.purge_step"] = self.step + 1
        return with_values(config, values)

    def discard(self) -> None:
        """Remove what was made for a run that could not begin: folders that hold nothing but empty logs."""
        if self.made:
            shutil.rmtree(self.folder.path)
            atomic.remove_empty(self.made)


def find_start(components: Components, named: LoadedCheckpoint | None = None, job: RunFolder | None = None) -> Start:
    """Find the run that goes on, or make the folder of a new one.

    named: the checkpoint that ckpt_path= names. job: the folder that Hydra gives to a sweep's job. Raise UserError
    where the checkpoint is of another model or data set, where a run would not fit on the disk, and where the folder
    is another process's.
    """
    config = components.config
    if config.resume == "auto":
        refuse_stand_in(components, job)
    unfinished = find_unfinished(config, job) if config.resume == "auto" else None
    checkpoint = named if unfinished is None else unfinished.checkpoint
    if checkpoint is not None:
        refuse_other_settings(checkpoint, ViTConfig(**components.model.config), components.data.description)
    place = Path(config.run_folder or config.runs_dir) if unfinished is None else unfinished.folder.path
    folders.check_space(place, components.num_parameters)
    if unfinished is not None:
        return unfinished
    if named is not None:
        folder = RunFolder(Path(config.run_folder))
        start = Start(folder, folder.lock(), named, is_resumed=True)
        print_sanitised(f"Resuming {atomic.short_path(folder.path)}, step {named.step}")
        return start
    if job is not None:
        if job.exists:
            raise folders.RunExistsError(
                f"{job.path} holds a run already, of other settings or data: choose a new hydra.sweep.dir"
            )
        return Start(job, job.lock())
    missing = atomic.missing_folders(Path(config.runs_dir))
    folder = RunFolder.create(Path(config.runs_dir))
    return Start(folder, folder.lock(), made=[folder.path, *missing])


def find_unfinished(config: DictConfig, job: RunFolder | None) -> Start | None:
    """Find what resume=auto goes on with: a sweep's job in its own folder alone, else the newest single run of these
    settings in config.runs_dir that was not completed and that no process trains."""
    start = next(filter(None, (unfinished_at(folder, config) for folder in candidates(config, job))), None)
    if start is not None:
        where = "from its start" if start.checkpoint is None else f"step {start.checkpoint.step}"
        print_sanitised(f"Resuming {start.folder.path}, {where}")
    return start


@contextmanager
def restoring_config(start: Start, trainer: Trainer) -> Iterator[None]:
    """Bring config.yaml back where a resumed run fails before it trains: a mistake must not stay in it."""
    path = start.folder.config_path
    before = path.read_text(encoding="utf-8") if start.is_resumed and path.is_file() else None
    try:
        yield
    except Exception:
        if before is not None and trainer.global_step <= max(0, start.step or 0):
            atomic.write_text(path, before)
        raise


def refuse_stand_in(components: Components, job: RunFolder | None) -> None:
    """Raise UserError where an unfinished run of these settings was trained on the data set that is asked for, and
    another one has taken its place today, because it cannot be had."""
    config, asked, loaded = components.config, components.data.name, components.data.description.name
    if asked == loaded:
        return
    for folder in candidates(config, job):
        recorded = folder.manifest_or_empty()
        name = (recorded.get("data") or {}).get("name")
        if (
            name == asked
            and recorded.get("status") != "completed"
            and resuming.has_settings(folder, config, but_for=resuming.FILLED_IN)
        ):
            raise UserError(
                f"{folder.path} was trained on {asked}, which cannot be had now, and not completed: resume it when it "
                f"can, or leave out resume=auto to begin a run on {loaded}"
            )


def candidates(config: DictConfig, job: RunFolder | None) -> list[RunFolder]:
    """Return the folders in which resume=auto looks: a sweep's job's own alone, else all single runs, newest first."""
    if job is not None:
        return [job]
    return [group.runs[0] for group in folders.find_runs(config.runs_dir) if not group.is_sweep]


def unfinished_at(folder: RunFolder, config: DictConfig) -> Start | None:
    """Return the start of the run in `folder` if it is of these settings, not completed, and no process trains it.

    Raise UnreadableError where that cannot be told, or its checkpoint not be read, at the moment.
    """
    # Another user's runs may be neither written nor read.
    if not os.access(folder.path, os.W_OK) or not folder.config_path.is_file():
        return None
    if not resuming.has_settings(folder, config):
        return None
    try:
        lock = folder.lock()
    except UserError as error:  # another process trains it, for instance
        print_sanitised(f"Not resumed: {error}")
        return None
    try:
        if folder.manifest_or_empty().get("status") != "completed":
            return Start(folder, lock, newest_whole_checkpoint(folder), is_resumed=True)
    except BaseException:
        lock.release()
        raise
    lock.release()
    return None


def newest_whole_checkpoint(folder: RunFolder) -> LoadedCheckpoint | None:
    """Load last.ckpt, or best.ckpt where that one is damaged, which is printed; None where neither is whole.

    Raise UnreadableError where one cannot be read at the moment: training anew would replace it.
    """
    for path in (folder.last, folder.best):
        if not path.exists():
            continue
        try:
            checkpoint = load_checkpoint(path, keep_content=True)
        except UserError as error:
            print_sanitised(f"Not used: {error}")
            continue
        if path != folder.last:  # or a run that has nothing left to train would leave the damaged one
            atomic.copy(path, folder.last)
        return checkpoint
    return None
