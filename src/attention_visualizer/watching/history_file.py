"""The file of one training's history, which no other training in the same folder writes or goes on with."""

from __future__ import annotations

import itertools
import secrets
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attention_visualizer.measures.observation import Observation
from attention_visualizer.runs.folders import HISTORY
from attention_visualizer.runs.history import AttentionHistory
from attention_visualizer.support.errors import UnreadableError, UserError


class HistoryFile:
    """attention_history.npz in `folder`; where that is another training's, attention_history_2.npz, and so on.

    `is_own`: the folder belongs to this training alone, and what is in it may be replaced.
    """

    def __init__(self, folder: Path, is_own: bool = False) -> None:
        self.folder = folder
        self.is_own = is_own
        self.history = AttentionHistory()
        self.run = secrets.token_hex(8)  # tells trainings apart: it is in the history and in the run's checkpoints
        self.path: Path | None = folder / HISTORY if is_own else None  # None: found when it is first saved
        self._saved = (0, 0)  # numbers of frames and validations in the file

    def resume(self, run: str | None, probe: dict[str, Any], step: int) -> None:
        """Go on with the history of `run`, None for checkpoints that do not name it, up to `step`.

        What was recorded after `step` is left in its file, and this history goes on in another. Raise UserError, and
        begin anew, for a history that cannot be read or is of other probe images.
        """
        try:
            path, history = self._find(run)
        except UnreadableError as error:
            self.path = None
            raise UserError(f"{error}; a new one is started beside it") from error
        if path is None or history is None:
            return
        if not all(np.array_equal(history.probe.get(name, ()), probe[name]) for name in ("images", "labels")):
            raise UserError(f"{path} is of other probe images, a new one is started")
        if self.is_own or not history.has_entries_after(step):
            self.path, self.run = path, str(history.probe.get("run", self.run))
        history.discard_after(step)
        self.history = history

    def _find(self, run: str | None) -> tuple[Path | None, AttentionHistory | None]:
        path = self.folder / HISTORY
        if self.is_own or run is None:
            history = self._load(path) if path.exists() else None
            is_another = not self.is_own and history is not None and "run" in history.probe
            return (None, None) if is_another else (path, history)
        for path in sorted(self.folder.glob(f"{Path(HISTORY).stem}*{Path(HISTORY).suffix}")):
            try:
                history = self._load(path)
            except (UserError, UnreadableError):
                continue  # of another training, perhaps
            if str(history.probe.get("run", "")) == run:
                return path, history
        return None, None

    def _load(self, path: Path) -> AttentionHistory:
        try:
            return AttentionHistory.load(path)
        except UserError as error:
            raise UserError(f"{error}; a new one is started") from error

    def save(self) -> None:
        """Write what is new. Raise UserError where nothing can be written."""
        entries = len(self.history.frames), len(self.history.validations)
        if entries == self._saved:
            return
        self.path = self.path or first_free(self.folder / HISTORY)
        if not self.is_own:
            self.history.probe["run"] = np.array(self.run)
        self.history.save(self.path)
        self._saved = entries


def first_free(path: Path) -> Path:
    """Make an empty file at `path`, or with the first number that makes its name a new one, and return where.

    Raise UserError where it cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(2):
            try:
                path.open("xb").close()
                return path
            except FileExistsError:
                path = path.with_name(f"{Path(HISTORY).stem}_{number}{path.suffix}")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    raise AssertionError  # itertools.count has no end


def frame_of(observation: Observation, step: int, epoch: float) -> dict[str, NDArray[Any]]:
    """Return what a history keeps of an observation of the probe images."""
    return {
        "step": np.array(step),
        "epoch": np.array(epoch),
        "maps": np.nanmean(observation.head_maps, axis=2),
        **({} if observation.rollouts is None else {"rollout": observation.rollouts[:, -1]}),
        "entropy": observation.entropy.mean(axis=0),
        "distance": observation.distance.mean(axis=0),
        "predicted": observation.predicted,
        "probability": observation.probability,
    }
