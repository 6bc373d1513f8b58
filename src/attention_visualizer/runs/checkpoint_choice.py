"""Which checkpoint is meant: best or last, of the newest run, of a named one, or of all."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from attention_visualizer.files.tensor_files import existing_file
from attention_visualizer.runs.checkpoint import LoadedCheckpoint, load_checkpoint
from attention_visualizer.runs.folders import RunFolder, RunGroup, find_runs, group_at
from attention_visualizer.support.errors import UserError


@dataclass(frozen=True)
class Choice:
    """The checkpoint to use, why it (a sentence for the user), and the run that it belongs to, if any."""

    path: Path
    reason: str
    run: RunFolder | None


def choose_checkpoint(ckpt: str = "best", run: str | None = None, root: str | Path = "runs") -> Choice:
    """The checkpoint that the command line asks for. Raises UserError if there is none.

    ckpt: "best" or "last" of a run, or the path of a checkpoint, of a run folder or of a sweep folder (its best).
    run: None for the newest that has one; "all" for the best of all that share the newest one's data set; else the
    folder, or its name under `root`, of a run or a sweep. A sweep stands for its best job. "Best" is by validation
    accuracy; interrupted and still running runs count.
    """
    if ckpt not in ("best", "last"):
        if run is not None:
            raise UserError(f"ckpt={ckpt} names a checkpoint by itself: leave out run={run}, or use ckpt=best or last")
        return choice_at(Path(ckpt))
    file_name = f"{ckpt}.ckpt"
    if run not in (None, "all"):
        group = group_at(Path(run)) or group_at(Path(root) / run)
        if group is None:
            raise UserError(f"run={run} is no run or sweep folder, nor is {Path(root) / run}: see what {root}/ holds")
        return choice_in(group, file_name) or refuse_without(file_name, f"run={run}")
    groups = find_runs(root)
    if not groups:
        raise UserError(f"no checkpoint yet in {root}/: train one first with `python train.py`")
    if run == "all":
        return best_of_all(groups, file_name) or refuse_without(file_name, f"{root}/")
    for position, group in enumerate(groups):
        if choice := choice_in(group, file_name, "the newest "):
            if not position:
                return choice
            newer = ", ".join(group.path.name for group in groups[:position])
            return Choice(choice.path, f"{choice.reason}, as newer ones have none: {newer}", choice.run)
    return refuse_without(file_name, f"{root}/")


def refuse_without(file_name: str, place: str) -> NoReturn:
    raise UserError(f"no {file_name} yet in {place}: train to the first validation with `python train.py`")


def choice_at(path: Path) -> Choice:
    """The checkpoint at `path`, or the best of the run or sweep whose folder it is."""
    if group := group_at(path):
        return choice_in(group, "best.ckpt") or refuse_without("best.ckpt", f"{path}/")
    try:
        existing_file(path)
    except UserError as error:
        raise UserError(f"ckpt={error}; or best, last, random, or a run folder") from error
    run = RunFolder(path.parent.parent)
    return Choice(path, f"{path}, as asked for", run if path.parent.name == "checkpoints" and run.exists else None)


def load_chosen(path: Path, keep_content: bool = False) -> LoadedCheckpoint:
    """Load the checkpoint at `path`. Where it is damaged, the UserError names the run's other one, if that is whole."""
    try:
        return load_checkpoint(path, keep_content)
    except UserError as error:
        if path.is_file() and (whole := whole_beside(path)):
            raise UserError(f"{error}; {whole.path} (step {whole.step}) is whole") from error
        raise


def whole_beside(path: Path) -> LoadedCheckpoint | None:
    """The other checkpoint of the run that `path` lies in."""
    run = RunFolder(path.parent.parent)
    for other in (run.last, run.best):
        if other.is_file() and not other.samefile(path):
            with suppress(UserError):
                return load_checkpoint(other)
    return None


@dataclass(frozen=True)
class Candidate:
    """One run's checkpoint with what the choice depends on."""

    run: RunFolder
    path: Path
    accuracy: float | None
    data_name: str | None

    @property
    def rank(self) -> float:
        return -math.inf if self.accuracy is None else self.accuracy

    @property
    def remark(self) -> str:
        if self.accuracy is None or self.path.name != "best.ckpt":  # the run's accuracy is that of its best
            return ""
        return f" (validation accuracy {self.accuracy:.4f})"


def candidates_in(runs: Iterable[RunFolder], file_name: str) -> list[Candidate]:
    """A candidate for each run that has the file; facts come from its manifest, else from the checkpoint itself."""
    candidates = []
    for run in runs:
        path = run.checkpoints / file_name
        if not path.is_file():
            continue
        accuracy = data_name = None
        with suppress(UserError, AttributeError, TypeError, ValueError):  # a broken manifest is not this file's fault
            manifest = run.read_manifest()
            accuracy = manifest.get("metrics", {}).get("validation_accuracy")
            data_name = manifest.get("data", {}).get("name")
        if accuracy is None or data_name is None:
            with suppress(UserError):  # said in full when this checkpoint is chosen and loaded
                loaded = load_checkpoint(path)
                accuracy = loaded.validation_accuracy if accuracy is None else accuracy
                data_name = (loaded.data or {}).get("name") if data_name is None else data_name
        known = isinstance(accuracy, int | float) and 0 <= accuracy <= 1
        candidates.append(Candidate(run, path, accuracy if known else None, data_name))
    return candidates


def choice_in(group: RunGroup, file_name: str, which: str = "") -> Choice | None:
    """The run's checkpoint, or that of the sweep's best job; None if there is none. which: such as "the newest "."""
    candidates = candidates_in(group.runs, file_name)
    if not candidates:
        return None
    best = max(candidates, key=lambda candidate: candidate.rank)
    place = f"{which}run {group.path.name}"
    if group.is_sweep:
        place = f"{best.run.name}, the best job of {which}sweep {group.path.name}"
    return Choice(best.path, f"{file_name} of {place}{best.remark}", best.run)


def best_of_all(groups: list[RunGroup], file_name: str) -> Choice | None:
    """The best of all runs, sweeps' jobs among them, that were trained on the newest one's data set."""
    candidates = candidates_in((run for group in groups for run in group.runs), file_name)
    if not candidates:
        return None
    data_name = candidates[0].data_name
    comparable = [candidate for candidate in candidates if candidate.data_name == data_name]
    best = max(comparable, key=lambda candidate: candidate.rank)
    reason = f"{file_name} of run {best.run.name}, the best of {len(comparable)}{best.remark}"
    if left_out := len(candidates) - len(comparable):
        reason += f"; {left_out} on other data than the newest ({data_name}) cannot be compared and were left out"
    return Choice(best.path, reason, best.run)
