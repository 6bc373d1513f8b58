"""A folder changes as a whole or not at all, whatever stops the process that changes it: here, real SIGKILLs."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from attention_visualizer.files import staging as module
from attention_visualizer.files.staging import move_in, staging
from attention_visualizer.support.errors import UserError

NAMES = ["a.png", "b.png", "report.md"]


def fill(folder: Path, names: list[str], text: str) -> None:
    for name in names:
        (folder / name).write_text(f"{text} {name}")


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def hidden(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".")]


def test_files_come_in_together_and_nothing_else_is_touched(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "output"
    with staging(output) as new:
        fill(new, NAMES, "new")
        assert not output.exists() and new.stat().st_dev == tmp_path.stat().st_dev
        move_in(new, output, NAMES)
    assert contents(output) == {name: f"new {name}" for name in NAMES}
    (output / "notes.txt").write_text("of the user's own")
    with staging(output) as new:
        fill(new, ["a.png", "report.md"], "newer")
        move_in(new, output, ["a.png", "report.md"], obsolete=["b.png"])
    expected = {"a.png": "newer a.png", "report.md": "newer report.md", "notes.txt": "of the user's own"}
    assert contents(output) == expected and hidden(output.parent) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_fails_before_the_move_leaves_no_trace(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), staging(tmp_path / "deep" / "output") as new:
        fill(new, NAMES, "new")
        raise error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("failing", range(len(NAMES)))
def test_a_move_that_fails_half_way_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """Disk full at any of the files: earlier ones are back, those without a forerunner are gone."""
    output = tmp_path / "output"
    output.mkdir()
    fill(output, ["a.png", "report.md", "old.png"], "earlier")
    before = contents(output)
    moves = []

    def move(path: Path, to: Path) -> None:
        if path.parent.name == module.NEW:
            moves.append(path)
            if len(moves) == failing + 1:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
        os.replace(path, to)

    monkeypatch.setattr(module, "move", move)
    with pytest.raises(UserError, match="No space left"), staging(output) as new:
        fill(new, NAMES, "new")
        move_in(new, output, NAMES, obsolete=["old.png"])
    assert contents(output) == before and hidden(tmp_path) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from attention_visualizer.files import staging as module
output, target, after = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
moves = []
def move(path, to):
    if len(moves) == after:
        os.kill(os.getpid(), signal.SIGKILL)
    moves.append(path)
    os.replace(path, to)
module.move = move
with module.staging(output) as new:
    for name in ("a.png", "b.png", "report.md"):
        (new / name).write_text(f"new {name}")
    if after >= 0:
        module.move_in(new, target, ["a.png", "b.png", "report.md"], ["old.png"])
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("target", "after"), [("output", -1), ("output", 0), ("output", 2), ("output_incomplete", 2)])
def test_a_killed_process_is_cleared_up_by_the_next(tmp_path: Path, target: str, after: int) -> None:
    """Also where it had begun to move: what it moved goes out again, from the folder where it had moved it to."""
    folders = [tmp_path / "output", tmp_path / "output_incomplete"]
    for folder in folders:
        folder.mkdir()
        fill(folder, ["a.png", "report.md", "old.png"], f"earlier {folder.name}")
    fill(folders[0], ["b.png"], "also earlier")
    before = [contents(folder) for folder in folders]
    command = [sys.executable, "-c", KILLED, str(folders[0]), str(tmp_path / target), str(after)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(hidden(tmp_path)) == 1
    # The report is moved last, so it is the earlier one even now.
    assert [contents(folder)["report.md"] for folder in folders] == [each["report.md"] for each in before]
    with staging(folders[0]) as new:
        assert [contents(folder) for folder in folders] == before
        assert hidden(tmp_path) == [new.parent.name]
    assert hidden(tmp_path) == []


def test_a_move_that_was_finished_is_not_undone(tmp_path: Path) -> None:
    output = tmp_path / "output"
    command = [sys.executable, "-c", KILLED, str(output), str(output), "3"]
    assert subprocess.run(command, timeout=60).returncode == -signal.SIGKILL
    with staging(output):
        assert contents(output) == {name: f"new {name}" for name in NAMES}
    assert hidden(tmp_path) == []


def test_a_process_at_work_is_left_alone(tmp_path: Path) -> None:
    output = tmp_path / "output"
    with staging(output) as first:
        fill(first, ["a.png"], "first")
        with staging(output) as second:
            assert contents(first) == {"a.png": "first a.png"} and second.parent != first.parent
        assert contents(first) == {"a.png": "first a.png"}
    assert hidden(tmp_path) == []


def test_folders_with_names_that_begin_alike_are_left_alone(tmp_path: Path) -> None:
    others = [tmp_path / ".output_2.partial-01", tmp_path / ".[o]utput.partial-01", tmp_path / "output.partial-01"]
    for other in others:
        other.mkdir()
    with staging(tmp_path / "output"):
        pass
    with staging(tmp_path / "[o]utput"):
        pass
    assert others[0].exists() and others[2].exists() and not others[1].exists()


@pytest.mark.parametrize(
    "plan",
    [
        {"folder": "../../victim", "names": ["a.png"]},
        {"folder": "../link", "names": ["a.png"]},
        {"folder": "../output", "names": ["../../victim/a.png"]},
        {"folder": "../output", "names": 3},
        {"folder": 3},
        [],
    ],
)
def test_a_stage_made_by_hand_moves_nothing_elsewhere(tmp_path: Path, plan: object) -> None:
    victim, given = tmp_path / "victim", tmp_path / "given"
    stage = given / ".output.partial-01234567"
    for folder in (victim, given / "output", stage / "earlier"):
        folder.mkdir(parents=True)
    (given / "link").symlink_to(victim)
    fill(victim, ["a.png"], "precious")
    fill(stage / "earlier", ["b.png"], "foreign")
    (stage / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(UserError, match="left by no process"), staging(given / "output"):
        pass
    assert contents(victim) == {"a.png": "precious a.png"} and contents(given / "output") == {}


def test_a_stage_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (victim := tmp_path / "victim" / "earlier").mkdir(parents=True)
    fill(victim, ["a.png"], "precious")
    (victim.parent / "plan.json").write_text(json.dumps({"folder": "../output", "names": []}))
    (tmp_path / "output").mkdir()
    (tmp_path / ".output.partial-01234567").symlink_to(victim.parent)
    with staging(tmp_path / "output"):
        pass
    assert contents(victim) == {"a.png": "precious a.png"} and not (victim.parent / "lock").exists()


def test_onto_another_file_system_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def refuse(path: Path, to: Path) -> None:
        if path.parent != to.parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(path))
        replace(path, to)

    monkeypatch.setattr(module.os, "replace", refuse)
    with staging(tmp_path / "output") as new:
        fill(new, NAMES, "new")
        move_in(new, tmp_path / "output", NAMES)
    assert contents(tmp_path / "output") == {name: f"new {name}" for name in NAMES}
