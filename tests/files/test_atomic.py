"""Files are written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from attention_visualizer.files.atomic import atomic_path, write_json, write_text
from attention_visualizer.support.errors import UserError


def test_atomic_path_shows_nothing_before_the_end(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "picture.png"
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"half")
        assert temporary.parent == target.parent and temporary.suffix == ".png" and temporary.name.startswith(".")
        assert not target.exists()
    assert target.read_bytes() == b"half"
    assert os.listdir(target.parent) == ["picture.png"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_an_exception_leaves_the_old_file_and_no_litter(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "notes.txt"
    write_text(target, "old")
    with pytest.raises(error):
        with atomic_path(target) as temporary:
            temporary.write_text("new")
            raise error
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_a_kill_in_mid_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "weights.ckpt"
    write_text(target, "old")
    script = (
        "import sys, time; from attention_visualizer.files.atomic import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('new'); print('written', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(target)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
    assert target.read_text() == "old"


def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    target = tmp_path / "big.txt"
    write_text(target, "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1009, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*big\.txt: File too large") as caught:
            write_text(target, "x" * 4001)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(caught.value.__cause__, OSError)
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["big.txt"]


def test_a_target_that_cannot_be_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for target in (tmp_path / "file" / "below.txt", tmp_path / "folder"):
        with pytest.raises(UserError, match=f"cannot write {target}: "):
            write_text(target, "text")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_new_file_is_as_readable_as_any(tmp_path: Path) -> None:
    write_text(tmp_path / "atomic.txt", "Ziffer 注意力")
    (tmp_path / "plain.txt").write_text("")
    assert (tmp_path / "atomic.txt").stat().st_mode == (tmp_path / "plain.txt").stat().st_mode
    assert (tmp_path / "atomic.txt").read_text(encoding="utf-8") == "Ziffer 注意力"


def test_json_has_no_nan_and_keeps_its_order(tmp_path: Path) -> None:
    write_json(
        tmp_path / "data.json",
        {
            "z": math.nan,
            "a": [1.5, -math.inf, np.float32(0.25), np.float64("nan")],
            7: torch.tensor([[2.0, math.inf]]),
            "path": tmp_path,
            "tuple": (np.int64(3), None, True),
        },
    )
    text = (tmp_path / "data.json").read_text()
    assert list(json.loads(text).items()) == [
        ("z", None),
        ("a", [1.5, None, 0.25, None]),
        ("7", [[2.0, None]]),
        ("path", str(tmp_path)),
        ("tuple", [3, None, True]),
    ]
    assert "NaN" not in text and text.startswith('{\n  "z"')


def test_json_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "data.json", {"model": object()})
    assert os.listdir(tmp_path) == []
