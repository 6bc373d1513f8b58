"""The commit of a checkout."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from attention_visualizer.support import machine


def test_commit_of_a_checkout_and_of_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert machine.git_commit(tmp_path) is None
    assert machine.git_commit(tmp_path / "nowhere") is None
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "code.py").write_text("1")
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    head = subprocess.run(["git", "-C", str(tmp_path), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert machine.git_commit(tmp_path) == head.stdout.strip()
    (tmp_path / "code.py").write_text("2")
    assert machine.git_commit(tmp_path) == head.stdout.strip() + "-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    assert machine.git_commit(tmp_path) is None
