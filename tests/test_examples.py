"""The notebooks of examples/ run as they are, and are kept without outputs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("anywidget")
pytest.importorskip("timm")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_they_are_kept_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type != "code" or (not cell.outputs and cell.execution_count is None)


def outputs_of(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """Run a notebook in a folder, offline; return the outputs of each cell of code."""
    from nbclient import NotebookClient

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(os.sys.executable).parent), os.environ["PATH"]]))  # type: ignore[attr-defined]
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()
    return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]


def kinds(outputs: list[Any]) -> list[str]:
    """Return what is displayed, the richest kind of each."""
    order = ("application/vnd.jupyter.widget-view+json", "text/html", "image/png", "text/plain")
    shown = [output.data for output in outputs if output.output_type in ("display_data", "execute_result")]
    return [next(kind for kind in order if kind in data) for data in shown]


@pytest.mark.long
def test_a_run_on_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = outputs_of(EXAMPLES[1], tmp_path, monkeypatch)
    assert EXAMPLES[1].stem == "mnist_run"
    widget = "application/vnd.jupyter.widget-view+json"
    assert [kinds(each) for each in cells] == [
        [],
        ["text/plain"],
        ["image/png"],
        ["text/html"],
        [widget],
        ["text/html"],
    ]
    assert "<iframe" in cells[3][-1].data["text/html"] and "best.ckpt" in cells[1][0].data["text/plain"]


@pytest.mark.long
def test_any_timm_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = outputs_of(EXAMPLES[0], tmp_path, monkeypatch)
    assert EXAMPLES[0].stem == "any_timm_model"
    widget = "application/vnd.jupyter.widget-view+json"
    assert [kinds(each) for each in cells] == [[], ["text/plain"], ["text/plain"], ["text/html"], [widget]]
    assert "14 x 14 patches of 16 x 16 pixels, and the class token" in cells[1][0].data["text/plain"]
    assert float(cells[2][0].data["text/plain"]) > 0
