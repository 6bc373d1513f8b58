"""Where a run starts: in a new folder, or in that of a run that goes on, with what was saved of it."""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
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
        return Start(folder, folder.lock(), named, is_resumed=True)
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
    groups = [] if job is not None else folders.find_runs(config.runs_dir)
    candidates = [group.runs[0] for group in groups if not group.is_sweep] if job is None else [job]
    start = next(filter(None, (unfinished_at(folder, config) for folder in candidates)), None)
    if start is not None:
        where = "from its start" if start.checkpoint is None else f"step {start.checkpoint.step}"
        print_sanitised(f"Resuming {start.folder.path}, {where}")
    return start


def unfinished_at(folder: RunFolder, config: DictConfig) -> Start | None:
    """Return the start of the run in `folder` if it is of these settings, not completed, and no process trains it."""
    if not folder.config_path.is_file() or not resuming.has_settings(folder, config):
        return None
    try:
        lock = folder.lock()
    except UserError:  # another process trains it, or nothing may be written there
        return None
    with suppress(UserError):
        if folder.read_manifest().get("status") == "completed":
            lock.release()
            return None
    return Start(folder, lock, newest_whole_checkpoint(folder), is_resumed=True)


def newest_whole_checkpoint(folder: RunFolder) -> LoadedCheckpoint | None:
    """Load last.ckpt, or best.ckpt where that one is damaged, which is printed; None where neither is whole."""
    for path in (folder.last, folder.best):
        if not path.exists():
            continue
        try:
            checkpoint = load_checkpoint(path, keep_content=True)
        except UserError as error:
            print_sanitised(f"Not used: {error}")
            continue
        if path != folder.last:  # or a run that has nothing left to train would leave the damaged one
            with atomic.atomic_path(folder.last) as temporary:
                shutil.copyfile(path, temporary)
        return checkpoint
    return None
