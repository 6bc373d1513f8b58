"""Trainings in one folder keep their histories apart."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset

from attention_visualizer.runs.history import AttentionHistory
from attention_visualizer.support.errors import UserError
from attention_visualizer.watching.attention_logger import AttentionLogger
from attention_visualizer.watching.history_file import HistoryFile, first_free
from tests.helpers.trainers import Steps, attention_warnings, kept_in, loader, new_trainer, vit

NAMES = [f"attention_history{number}.npz" for number in ("", "_2", "_3", "_4", "_5")]


def train(folder: Path, seed: int, epochs: int = 1, name: str = "last", **options: Any) -> AttentionHistory:
    torch.manual_seed(seed)
    module, watching = Steps(vit(num_layers=1)), AttentionLogger(early_frames=False, head_grids=0)
    saving = ModelCheckpoint(folder, save_last=True, enable_version_counter=False)
    saving.CHECKPOINT_NAME_LAST = name
    quick = {"enable_checkpointing": True, "max_epochs": epochs, "limit_train_batches": 2, "limit_val_batches": 1}
    new_trainer(folder, watching, saving, **quick).fit(module, loader(), loader(), **options)
    return watching.history


def first_maps(history: AttentionHistory) -> np.ndarray:
    return history.frames[0]["maps"]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.npz"))


def test_a_second_run_in_the_folder_takes_nothing_from_the_first(tmp_path: Path) -> None:
    first, second = train(tmp_path, 1, name="first"), train(tmp_path, 2, name="second")
    assert files(tmp_path) == NAMES[:2]
    for name, history in zip(NAMES, (first, second), strict=False):
        assert np.array_equal(first_maps(AttentionHistory.load(tmp_path / name)), first_maps(history))
    # Each resumed run goes on with its own.
    for name, history in (("first", first), ("second", second)):
        resumed = train(tmp_path, 3, epochs=2, name=name, ckpt_path=tmp_path / f"{name}.ckpt")
        assert resumed.column("frames", "step").tolist() == [0, 2, 4]
        assert np.array_equal(first_maps(resumed), first_maps(history))
    assert files(tmp_path) == NAMES[:2]


def test_two_runs_from_one_checkpoint(tmp_path: Path) -> None:
    train(tmp_path, 1)
    start = tmp_path / "last.ckpt"
    kept = start.read_bytes()
    histories = []
    for epochs in (2, 3):
        start.write_bytes(kept)
        histories.append(train(tmp_path, 1, epochs=epochs, ckpt_path=start).column("frames", "step").tolist())
    assert histories == [[0, 2, 4], [0, 2, 4, 6]] and files(tmp_path) == NAMES[:2]
    steps = [AttentionHistory.load(tmp_path / name).column("frames", "step").tolist() for name in NAMES[:2]]
    assert steps == histories


def test_folds_leave_a_history_each(tmp_path: Path) -> None:
    for fold in range(3):
        train(tmp_path, fold)
    assert files(tmp_path) == NAMES[:3]
    runs = {str(AttentionHistory.load(tmp_path / name).probe["run"]) for name in NAMES[:3]}
    assert len(runs) == 3


def test_a_checkpoint_whose_history_is_gone(tmp_path: Path) -> None:
    train(tmp_path, 1, name="first")
    train(tmp_path, 2, name="second")
    (tmp_path / NAMES[0]).unlink()
    resumed = train(tmp_path, 1, epochs=2, name="first", ckpt_path=tmp_path / "first.ckpt")
    assert resumed.column("frames", "step").tolist() == [4] and kept_in(tmp_path).frames[0]["step"] == 4


PROBE = {"images": np.zeros((1, 2, 2, 1), np.uint8), "labels": np.array([3])}


def history_of(run: str | None, steps: list[int], folder: Path, name: str = NAMES[0]) -> None:
    history = AttentionHistory(dict(PROBE) | ({} if run is None else {"run": np.array(run)}))
    history.frames = [{"step": np.array(step), "epoch": np.array(0.0)} for step in steps]
    history.save(folder / name)


@pytest.mark.parametrize(
    ("own", "checkpoint", "kept", "expected"),
    [
        (False, "a", "a", [1]),
        (False, "a", "b", []),
        (False, None, None, [1]),  # of an earlier version
        (False, None, "b", []),
        (False, "a", None, []),
        (True, None, None, [1]),
        (True, None, "b", [1]),
    ],
)
def test_whose_history_a_run_goes_on_with(
    tmp_path: Path, own: bool, checkpoint: str | None, kept: str | None, expected: list[int]
) -> None:
    history_of(kept, [1], tmp_path)
    before = (tmp_path / NAMES[0]).read_bytes()
    file = HistoryFile(tmp_path, own)
    file.resume(checkpoint, PROBE, step=1)
    assert [int(frame["step"]) for frame in file.history.frames] == expected
    file.history.probe |= PROBE
    file.history.frames.append({"step": np.array(2), "epoch": np.array(0.0)})
    file.save()
    assert ((tmp_path / NAMES[0]).read_bytes() == before) is (not expected)
    assert files(tmp_path) == (NAMES[:1] if expected else NAMES[:2])


def test_a_run_of_its_own_folder_replaces_what_it_finds(tmp_path: Path) -> None:
    history_of("b", [1], tmp_path)
    file = HistoryFile(tmp_path, is_own=True)
    file.history.frames.append({"step": np.array(7), "epoch": np.array(0.0)})
    file.save()
    assert files(tmp_path) == NAMES[:1] and AttentionHistory.load(tmp_path / NAMES[0]).frames[0]["step"] == 7


def test_a_new_run_whose_images_come_with_its_validation_goes_on_with_none(tmp_path: Path) -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            yield from loader()

    train(tmp_path, 1)
    history = AttentionHistory.load(tmp_path / NAMES[0])
    del history.probe["run"]  # of an earlier version
    history.save(tmp_path / NAMES[0])
    trainer = new_trainer(tmp_path, AttentionLogger(), limit_val_batches=1, max_epochs=1)
    trainer.fit(Steps(vit(num_layers=1)), loader(), DataLoader(Stream(), batch_size=None))
    assert AttentionHistory.load(tmp_path / NAMES[0]).column("frames", "step").tolist() == [0, 2]
    assert AttentionHistory.load(tmp_path / NAMES[1]).column("frames", "step").tolist() == [5]


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    (tmp_path / NAMES[0]).write_bytes(b"broken")
    (tmp_path / "attention_history_of_mine.npz").write_bytes(b"")
    file = HistoryFile(tmp_path)
    file.resume("a", PROBE, 1)
    assert file.history.frames == []
    with pytest.raises(UserError, match="is not a readable attention history .*; a new one is started"):
        HistoryFile(tmp_path, is_own=True).resume(None, PROBE, 1)
    with pytest.raises(UserError, match="cannot write"):
        first_free(tmp_path / NAMES[0] / "inside.npz")
    assert first_free(tmp_path / NAMES[0]).name == NAMES[1] and first_free(tmp_path / NAMES[0]).name == NAMES[2]


def test_a_history_that_cannot_be_read_at_the_moment_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history_of(None, [1], tmp_path)
    before = (tmp_path / NAMES[0]).read_bytes()

    def unreadable(*given: Any) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    file = HistoryFile(tmp_path, is_own=True)
    with monkeypatch.context() as changed:
        changed.setattr("attention_visualizer.runs.history.read_bytes", unreadable)
        with pytest.raises(UserError, match="cannot be read at the moment .*; a new one is started beside it"):
            file.resume(None, PROBE, 1)
    file.history.frames.append({"step": np.array(2), "epoch": np.array(0.0)})
    file.save()
    assert (tmp_path / NAMES[0]).read_bytes() == before and files(tmp_path) == NAMES[:2]


def test_no_word_where_all_is_well(tmp_path: Path) -> None:
    with attention_warnings() as lines:
        train(tmp_path, 1)
        train(tmp_path, 2)
    assert lines == []
