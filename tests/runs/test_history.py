"""The history of a run survives the disk, a resume, and a broken file."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attention_visualizer.measures.quantised_rows import QuantisedRows
from attention_visualizer.runs.history import MAX_ROWS, AttentionHistory
from attention_visualizer.support.errors import UserError

PROBES, LAYERS, HEADS, GRID, CLASSES = 2, 7, 3, (5, 11), 13


def frame(step: int, random: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        "step": np.array(step),
        "epoch": np.array(step / 17),
        "maps": random.random((PROBES, LAYERS, *GRID), dtype=np.float32),
        "rollout": random.random((PROBES, *GRID), dtype=np.float32),
        "entropy": random.random((LAYERS, HEADS)),
        "predicted": random.integers(0, CLASSES, PROBES),
        "probability": random.random(PROBES, dtype=np.float32),
    }


def filled(steps: tuple[int, ...] = (0, 1, 2, 4, 17), validation_steps: tuple[int, ...] = (17, 34)) -> AttentionHistory:
    random = np.random.default_rng(0)
    return AttentionHistory(
        probe={
            "images": random.integers(0, 256, (PROBES, 15, 33, 1), dtype=np.uint8),
            "labels": np.array([3, 11]),
            "class_names": np.array([f"class {number} é数" for number in range(CLASSES)]),
            "grid": np.array(GRID),
            "num_keys": np.array(56),
            "query": np.array("cls"),
        },
        frames=[frame(step, random) for step in steps],
        validations=[
            {"step": np.array(step), "images": np.array(5000), "distance": random.random((LAYERS, HEADS))}
            for step in validation_steps
        ],
    )


def assert_equal(first: AttentionHistory, second: AttentionHistory) -> None:
    assert (len(first.frames), len(first.validations)) == (len(second.frames), len(second.validations))
    parts = [first.probe, *first.frames, *first.validations], [second.probe, *second.frames, *second.validations]
    for one, other in zip(*parts, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            np.testing.assert_array_equal(value, other[name], err_msg=name)
            assert np.asarray(value).dtype == np.asarray(other[name]).dtype, name


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "new" / "attention_history.npz"
    history = filled()
    history.save(path)
    assert os.listdir(path.parent) == ["attention_history.npz"]
    loaded = AttentionHistory.load(path)
    assert len(loaded.frames) == 5 and len(loaded.validations) == 2
    assert_equal(loaded, history)


@pytest.mark.parametrize(
    "history",
    [AttentionHistory(), filled((), ()), filled((0,), ()), filled((), (17,))],
    ids=["empty", "probe only", "one frame", "one validation"],
)
def test_a_young_history_is_saved_too(tmp_path: Path, history: AttentionHistory) -> None:
    history.save(tmp_path / "history.npz")
    assert_equal(AttentionHistory.load(tmp_path / "history.npz"), history)


def test_a_loaded_history_grows_on(tmp_path: Path) -> None:
    """As in a resumed run: load, forget what will be repeated, add, save."""
    path, whole = tmp_path / "history.npz", filled()
    filled().save(path)
    resumed = AttentionHistory.load(path)
    resumed.discard_after(2)
    assert [int(entry["step"]) for entry in resumed.frames] == [0, 1, 2]
    resumed.frames += whole.frames[3:]
    resumed.validations += whole.validations
    resumed.save(path)
    assert_equal(AttentionHistory.load(path), whole)


@pytest.mark.parametrize(
    ("step", "frames", "validations"),
    [(-1, [], []), (0, [0], []), (3, [0, 1, 2], []), (17, [0, 1, 2, 4, 17], [17]), (99, [0, 1, 2, 4, 17], [17, 34])],
)
def test_discard_after_keeps_the_step_itself(step: int, frames: list[int], validations: list[int]) -> None:
    history = filled()
    history.discard_after(step)
    assert [int(entry["step"]) for entry in history.frames] == frames
    assert [int(entry["step"]) for entry in history.validations] == validations
    assert history.probe.keys() == filled().probe.keys()


def rows_of(number: int) -> QuantisedRows:
    weights = torch.rand(PROBES, LAYERS, HEADS, 6, 6, generator=torch.Generator().manual_seed(number))
    return QuantisedRows.of(weights / weights.sum(dim=-1, keepdim=True))


def grown(history: AttentionHistory, until: int) -> AttentionHistory:
    random = np.random.default_rng(0)
    for number in range(len(history.frames), until):
        history.add_frame(frame(10 * number, random), rows_of(number))
    return history


def test_whole_rows_are_kept_of_at_most_so_many_frames_and_saved(tmp_path: Path) -> None:
    for number, expected in ((1, 1), (MAX_ROWS, 1), (MAX_ROWS + 1, 2), (4 * MAX_ROWS + 7, 8)):
        history = grown(AttentionHistory(probe=filled().probe), number)
        assert [int(entry["frame"]) for entry in history.rows] == list(range(0, number, expected))
        assert len(history.rows) <= MAX_ROWS and len(history.frames) == number
    history.save(tmp_path / "history.npz")
    loaded = AttentionHistory.load(tmp_path / "history.npz")
    assert loaded.rows[3]["step"] == 240
    np.testing.assert_array_equal(loaded.rows_of(loaded.rows[3]).weights(), rows_of(24).weights())


@pytest.mark.parametrize("killed", [3, MAX_ROWS, 2 * MAX_ROWS + 1])
def test_a_resumed_history_ends_with_the_rows_of_one_that_was_not_interrupted(killed: int) -> None:
    whole, resumed = grown(AttentionHistory(), 2 * MAX_ROWS + 2), grown(AttentionHistory(), killed)
    resumed.discard_after(10 * (killed - 3))
    grown(resumed, 2 * MAX_ROWS + 2)
    assert [int(entry["frame"]) for entry in resumed.rows] == [int(entry["frame"]) for entry in whole.rows]


def test_frames_without_rows_are_none_of_them() -> None:
    history = AttentionHistory()
    history.add_frame(frame(0, np.random.default_rng(0)))
    assert len(history.frames) == 1 and not history.rows


def test_a_column_is_stacked_over_time() -> None:
    history = filled()
    assert history.column("frames", "step").tolist() == [0, 1, 2, 4, 17]
    maps = history.column("frames", "maps")
    assert maps.shape == (5, PROBES, LAYERS, *GRID)
    np.testing.assert_array_equal(maps[3], history.frames[3]["maps"])
    assert history.column("validations", "distance").shape == (2, LAYERS, HEADS)
    with pytest.raises(KeyError):
        history.column("frames", "distance")


def test_two_histories_share_nothing() -> None:
    first = AttentionHistory()
    first.frames.append({"step": np.array(1)})
    first.probe["grid"] = np.array(GRID)
    assert AttentionHistory().frames == [] and AttentionHistory().probe == {}


# --- broken files ---


def assert_refused(path: Path) -> None:
    with pytest.raises(UserError) as caught:
        AttentionHistory.load(path)
    message = str(caught.value)
    assert str(path) in message and "attention history" in message and "\n" not in message


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "history.npz"
    filled().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert_refused(path)


@pytest.mark.parametrize("content", [b"no archive", pickle.dumps([1, 2])], ids=["text", "pickle"])
def test_another_kind_of_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "history.npz"
    path.write_bytes(content)
    assert_refused(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / "nowhere.npz")
    assert_refused(tmp_path)


@pytest.mark.parametrize(
    "arrays",
    [
        {"maps": np.zeros(3)},
        {"epochs/step": np.zeros(3)},
        {"frames/maps/layer": np.zeros(3)},
        {"frames/step": np.zeros(3), "frames/maps": np.zeros((2, 5))},
        {"frames/step": np.array(7)},
    ],
    ids=["no part", "unknown part", "too deep", "lengths differ", "no time axis"],
)
def test_an_archive_of_something_else_is_refused(tmp_path: Path, arrays: dict[str, Any]) -> None:
    path = tmp_path / "history.npz"
    np.savez(path, **arrays)
    assert_refused(path)


def test_a_flipped_byte_is_never_read_as_data(tmp_path: Path) -> None:
    path, history = tmp_path / "history.npz", filled()
    history.save(path)
    whole = path.read_bytes()
    refused = 0
    for position in np.linspace(0, len(whole) - 1, 101).astype(int):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        try:
            assert_equal(AttentionHistory.load(path), history)  # a byte that carries no data, such as a date
        except UserError:
            refused += 1
    assert refused > 80


# --- never a pickle ---


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("exploded",)


def test_a_pickle_inside_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "history.npz"
    labels: dict[str, Any] = {"probe/labels": np.array([Bomb()], dtype=object)}
    np.savez(path, **labels)
    assert_refused(path)
    assert not Path("exploded").exists()
    np.load(path, allow_pickle=True)["probe/labels"]
    assert Path("exploded").exists()  # the test would have noticed


def test_an_object_is_not_saved_and_the_old_file_stays(tmp_path: Path) -> None:
    path, history = tmp_path / "history.npz", filled()
    history.save(path)
    broken = filled()
    broken.probe["class_names"] = np.array([{"a": 1}], dtype=object)
    with pytest.raises(ValueError, match="allow_pickle"):
        broken.save(path)
    assert os.listdir(tmp_path) == ["history.npz"]
    assert_equal(AttentionHistory.load(path), history)
