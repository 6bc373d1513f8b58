"""Which checkpoint is meant: best or last, of the newest run, of a named one, or of all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from attention_visualizer.files.tensor_files import existing_file
from attention_visualizer.runs.checkpoint import LoadedCheckpoint, load_checkpoint
from attention_visualizer.runs.folders import BEST, RunFolder, RunGroup, find_runs, group_at
from attention_visualizer.support.errors import UserError
from attention_visualizer.support.invocation import invocation


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that may be chosen, with the facts that the choice depends on; its file is read at most once."""

    path: Path
    num_heads: int | None = None  # of the model, for a file that does not say it

    @property
    def run(self) -> RunFolder:
        return RunFolder.of_checkpoint(self.path)

    @cached_property
    def loaded(self) -> LoadedCheckpoint:
        """The checkpoint. Raise UserError for a broken one."""
        return load_checkpoint(self.path, num_heads=self.num_heads)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What the run's run.json records; empty where there is none, or none that can be read."""
        return self.run.manifest_or_empty()

    @cached_property
    def accuracy(self) -> float | None:
        """The validation accuracy, from 0 to 1, by the manifest, else by the checkpoint itself."""
        accuracy = self.recorded("metrics", "validation_accuracy")
        if accuracy is None:
            with suppress(UserError):  # the whole message comes when this checkpoint is chosen
                accuracy = self.loaded.validation_accuracy
        return accuracy if isinstance(accuracy, int | float) and 0 <= accuracy <= 1 else None

    @cached_property
    def data_name(self) -> str | None:
        """The name of the data set, by the manifest, else by the checkpoint itself."""
        name = self.recorded("data", "name")
        if name is None:
            with suppress(UserError):
                name = self.loaded.data.name if self.loaded.data is not None else None
        return name

    def recorded(self, part: str, name: str) -> Any:
        """Return a field of the manifest; None where it is missing."""
        fields = self.manifest.get(part)
        return fields.get(name) if isinstance(fields, dict) else None

    @property
    def rank(self) -> float:
        return -math.inf if self.accuracy is None else self.accuracy

    @property
    def remark(self) -> str:
        known = []
        if self.accuracy is not None and self.path.name == BEST:  # the run's accuracy is that of its best
            known.append(f"validation accuracy {self.accuracy:.2%}")
        if self.manifest.get("status") not in (None, "completed"):
            known.append("of a run that was not completed")
        return f" ({', '.join(known)})" if known else ""


@dataclass(frozen=True)
class Choice:
    """The checkpoint to use and why."""

    candidate: Candidate
    reason: str  # a sentence for the user

    @property
    def path(self) -> Path:
        return self.candidate.path

    @property
    def run(self) -> RunFolder | None:
        """The run that the checkpoint belongs to, if any."""
        run = self.candidate.run
        return run if self.path.parent == run.checkpoints else None

    @property
    def manifest(self) -> dict[str, Any]:
        """What the run's run.json records; empty where there is no run, or no manifest that can be read."""
        return {} if self.run is None else self.candidate.manifest

    @property
    def loaded(self) -> LoadedCheckpoint:
        """The checkpoint. Where it is damaged, the UserError names the run's other one, if that is whole."""
        with suggesting_other_checkpoint(self.path):
            return self.candidate.loaded


def choose_checkpoint(
    ckpt: str = "best", run: str | None = None, root: str | Path = "runs", num_heads: int | None = None
) -> Choice:
    """Choose the checkpoint that the command line asks for. Raise UserError if there is none.

    ckpt: "best" or "last" of a run, or the path of a checkpoint, of a run folder or of a sweep folder (its best).
    run: None for the newest that has one; "all" for the best of all that share the newest one's data set; else the
    folder, or its name under `root`, of a run or a sweep. A sweep stands for its best job. "Best" is by validation
    accuracy; interrupted and still running runs count. num_heads: the model's, for a file that does not say it.
    """
    if ckpt not in ("best", "last"):
        if run is not None:
            raise UserError(f"ckpt={ckpt} names a checkpoint by itself: leave out run={run}, or use ckpt=best or last")
        return choice_at(Path(ckpt), num_heads)
    file_name = f"{ckpt}.ckpt"
    if run not in (None, "all"):
        group = group_at(Path(run)) or group_at(Path(root) / run)
        if group is None:
            raise UserError(f"run={run} is no run or sweep folder, nor is {Path(root) / run}: see what {root}/ holds")
        return choice_in(group, file_name) or refuse_without(file_name, f"run={run}")
    groups = find_runs(root)
    if not groups:
        raise UserError(f"no checkpoint yet in {root}/: train one first with `{' '.join(invocation('train'))}`")
    if run == "all":
        return best_of_all(groups, file_name) or refuse_without(file_name, f"{root}/")
    for position, group in enumerate(groups):
        if choice := choice_in(group, file_name, "the newest "):
            if not position:
                return choice
            newer = ", ".join(group.path.name for group in groups[:position])
            return Choice(choice.candidate, f"{choice.reason}, as newer ones have none: {newer}")
    return refuse_without(file_name, f"{root}/")


def refuse_without(file_name: str, place: str) -> NoReturn:
    raise UserError(
        f"no {file_name} yet in {place}: train to the first validation with `{' '.join(invocation('train'))}`"
    )


def choice_at(path: Path, num_heads: int | None = None) -> Choice:
    """Choose the checkpoint at `path`, or the best of the run or sweep whose folder it is."""
    if group := group_at(path):
        return choice_in(group, BEST) or refuse_without(BEST, f"{path}/")
    try:
        existing_file(path)
    except UserError as error:
        raise UserError(f"ckpt={error}; or best, last, random, or a run folder") from error
    return Choice(Candidate(path, num_heads), f"{path}, as asked for")


def load_chosen(path: Path, keep_content: bool = False) -> LoadedCheckpoint:
    """Load the checkpoint at `path`. Where it is damaged, the UserError names the run's other one, if that is whole."""
    with suggesting_other_checkpoint(path):
        return load_checkpoint(path, keep_content)


@contextmanager
def suggesting_other_checkpoint(path: Path) -> Iterator[None]:
    """Add to a UserError about the checkpoint at `path` which other one of its run is whole."""
    try:
        yield
    except UserError as error:
        if path.is_file() and (whole := whole_beside(path)):
            raise UserError(f"{error}; {whole.path} (step {whole.step}) is whole") from error
        raise


def whole_beside(path: Path) -> LoadedCheckpoint | None:
    """Return the other checkpoint of the run that `path` lies in, if it is whole."""
    run = RunFolder.of_checkpoint(path)
    for other in (run.last, run.best):
        if other.is_file() and not other.samefile(path):
            with suppress(UserError):
                return load_checkpoint(other)
    return None


def candidates_in(runs: Iterable[RunFolder], file_name: str) -> Iterator[Candidate]:
    """Yield a candidate for each run that has the file, one at a time: each may hold its weights."""
    return (Candidate(path) for run in runs if (path := run.checkpoints / file_name).is_file())


def choice_in(group: RunGroup, file_name: str, which: str = "") -> Choice | None:
    """Return the run's checkpoint, or that of the sweep's best job; None if there is none.

    which: such as "the newest ".
    """
    best = max(candidates_in(group.runs, file_name), key=lambda candidate: candidate.rank, default=None)
    if best is None:
        return None
    place = f"{which}run {group.path.name}"
    if group.is_sweep:
        place = f"{best.run.name}, the best job of {which}sweep {group.path.name}"
    return Choice(best, f"{file_name} of {place}{best.remark}")


def best_of_all(groups: list[RunGroup], file_name: str) -> Choice | None:
    """Return the best of all runs, sweeps' jobs among them, that were trained on the newest one's data set."""
    candidates = candidates_in((run for group in groups for run in group.runs), file_name)
    best = next(candidates, None)
    if best is None:
        return None
    data_name, comparable, left_out = best.data_name, 1, 0  # of the newest
    for candidate in candidates:
        if candidate.data_name != data_name:
            left_out += 1
            continue
        comparable += 1
        best = max(best, candidate, key=lambda candidate: candidate.rank)
    reason = f"{file_name} of run {best.run.name}, the best of {comparable}{best.remark}"
    if left_out:
        reason += f"; {left_out} on other data than the newest ({data_name}) cannot be compared and were left out"
    return Choice(best, reason)
