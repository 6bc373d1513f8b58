"""How attention evolved while a model trained: numbers and probe maps, kept in one .npz beside the run."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attention_visualizer.files import atomic
from attention_visualizer.files.plain_files import read_bytes
from attention_visualizer.measures.quantised_rows import QuantisedRows
from attention_visualizer.support.errors import UserError, prevents_reading, reading

PARTS = ("probe", "frames", "validations", "rows")
MAX_ROWS = 48  # entries of rows: when there are more, every second is forgotten
MAX_ROW_BYTES = 2**18  # of an entry's codes, 4 times those of the default model: the file is written at each validation
# Numbers of axes that an array, or an entry's part of one, may have; measures, which are not listed, have two.
AXES = {
    **dict.fromkeys(("step", "epoch"), (0,)),
    **{"images": (0, 4), "labels": (1,), "class_names": (1,), "num_keys": (0, 1), "query": (0,)},
    **{"data": (0,), "run": (0,), "maps": (4,), "rollout": (3,), "predicted": (1,), "probability": (1,)},
    **{"frame": (0,), "codes": (5,), "row_maximum": (4,), "row_entropy": (4,)},
}
MAX_BYTES = 500_000_000  # bytes, unpacked; 1,000 frames of the default model have 10,000,000
MAX_ENTRIES = 100_000


@dataclass
class AttentionHistory:
    """A growing record. `probe` is written once; `frames`, `validations` and `rows` gain one entry a call.

    probe: images [probe, height, width, channel] uint8, labels [probe], class_names [class], num_keys [],
        query [], data [] (a line about them), run [] (of which training in its folder it is)
    frames, one for each observation of the probe images: step, epoch, maps [probe, layer, grid height, grid width] (the
        readout query's attention, mean over heads), rollout [probe, grid height, grid width], entropy and distance
        [layer, head], predicted and probability [probe]
    validations, one for each pass over the validation set: step, epoch, images, and each measure [layer, head]
    rows, whole attention matrices at some of the frames (`add_frame`): step, frame (its number), codes [probe, layer,
        head, query, key] uint8, row_maximum and row_entropy [probe, layer, head, query] float16, as in `QuantisedRows`
    """

    probe: dict[str, NDArray[Any]] = field(default_factory=dict)
    frames: list[dict[str, NDArray[Any]]] = field(default_factory=list)
    validations: list[dict[str, NDArray[Any]]] = field(default_factory=list)
    rows: list[dict[str, NDArray[Any]]] = field(default_factory=list)

    def add_frame(self, frame: dict[str, NDArray[Any]], rows: QuantisedRows | None = None) -> None:
        """Add a frame, and attention matrices [probe, layer, head, query, key] if there are any.

        Of n frames those keep theirs whose number is divisible by the power of two that leaves at most MAX_ROWS: a
        resumed run agrees upon it with one that was not interrupted.
        """
        self.frames.append(frame)
        if rows is None:
            return
        number, stride = len(self.frames) - 1, 1
        while number // stride >= MAX_ROWS:
            stride *= 2
        entry = {"step": frame["step"], "frame": np.array(number)}
        entry |= {"codes": rows.codes, "row_maximum": rows.maximum, "row_entropy": rows.entropy}
        self.rows = [each for each in [*self.rows, entry] if each["frame"] % stride == 0]

    @staticmethod
    def rows_of(entry: dict[str, NDArray[Any]]) -> QuantisedRows:
        """Return the matrices of an entry of `rows`."""
        return QuantisedRows(entry["codes"], entry["row_maximum"], entry["row_entropy"])

    def has_entries_after(self, step: int) -> bool:
        return any(entry["step"] > step for entry in (*self.frames, *self.validations))

    def discard_after(self, step: int) -> None:
        """Forget what a resumed run is about to repeat."""
        self.frames = [frame for frame in self.frames if frame["step"] <= step]
        self.validations = [entry for entry in self.validations if entry["step"] <= step]
        self.rows = [entry for entry in self.rows if entry["step"] <= step]

    def column(self, part: str, name: str) -> NDArray[Any]:
        """Return all entries of one name in "frames", "validations" or "rows", stacked: [time, ...]."""
        return np.stack([entry[name] for entry in getattr(self, part)])

    def save(self, path: Path) -> None:
        arrays = {f"probe/{name}": value for name, value in self.probe.items()}
        for part in PARTS[1:]:
            for name in getattr(self, part)[0] if getattr(self, part) else ():
                arrays[f"{part}/{name}"] = self.column(part, name)
        with atomic.atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path) -> AttentionHistory:
        """Read a history. Raise UserError where the file is not a whole one, UnreadableError where it cannot be read at
        the moment."""
        history = cls()
        with reading(Path(path)):
            try:
                content = io.BytesIO(read_bytes(Path(path), MAX_BYTES))
                with zipfile.ZipFile(content) as archive:  # before anything is unpacked
                    if sum(member.file_size for member in archive.infolist()) > MAX_BYTES:
                        raise ValueError(f"it unpacks to more than {MAX_BYTES:,} bytes")
                with np.load(content, allow_pickle=False) as arrays:
                    for key in arrays.files:
                        part, name = key.split("/")
                        check_array(part, name, arrays[key])
                        if part == "probe":
                            history.probe[name] = arrays[key]
                            continue
                        entries = getattr(history, part)
                        column = arrays[key]
                        if not entries:
                            entries.extend({} for _ in column)
                        for entry, value in zip(entries, column, strict=True):
                            entry[name] = value
            except Exception as error:  # numpy and zipfile raise many kinds for a broken file
                if prevents_reading(error):
                    raise
                reason = " ".join(str(error).replace(f"{path} ", "").split())
                raise UserError(f"{path} is not a readable attention history ({reason:.200})") from error
        return history


def check_array(part: str, name: str, array: NDArray[Any]) -> None:
    """Raise ValueError for an array that no history has."""
    if part not in PARTS:
        raise ValueError(f"{part!r:.60} is no part of it")
    if array.dtype.kind not in "biufU":
        raise ValueError(f"{name!r:.60} is of type {array.dtype}")
    if part == "probe":
        axes = AXES.get(name, (array.ndim,))
    else:
        axes = tuple(1 + number for number in AXES.get(name, (2,)))
        if array.ndim and not 0 < len(array) <= MAX_ENTRIES:
            raise ValueError(f"{name!r:.60} has {len(array):,} entries")
    if array.ndim not in axes or (array.size == 0 and name != "class_names"):
        raise ValueError(f"{name!r:.60} is of shape {list(array.shape)}")
