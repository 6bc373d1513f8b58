"""The benchmarks run: what they measure is in docs/models.md."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(FOLDER / script), *arguments], capture_output=True, text=True)


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("model_families")


@pytest.fixture
def cost(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("capture_cost")


@pytest.mark.parametrize("script", ["model_families.py", "capture_cost.py"])
def test_help_says_how_to_run_it_also_without_torch_and_timm(script: str) -> None:
    # -S: without site-packages, so that nothing but Python is there.
    result = subprocess.run([sys.executable, "-S", str(FOLDER / script), "--help"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"python benchmarks/{script}" in result.stdout


def test_one_model_as_markdown() -> None:
    result = run("model_families.py", "--only", "attention-visualizer", "--markdown")
    assert result.returncode == 0, result.stderr
    assert "| ViT | attention-visualizer `VisionTransformer` | 6 | rebuilt |" in result.stdout
    assert "| 4x4 + 1 |" in result.stdout


def test_a_name_that_no_model_has_is_an_error(families: Any) -> None:
    result = run("model_families.py", "--only", "no such model")
    assert (result.returncode, result.stdout) == (1, "")
    assert "no such model" in result.stderr


class OtherPath(nn.Module):
    """Attention whose explicit path is another one by `off`."""

    def __init__(self, explicit: bool, off: float) -> None:
        super().__init__()
        self.factor = 1.0 + off if explicit else 1.0

    def forward(self, images: Tensor) -> Tensor:
        tokens = images.flatten(2)
        return (tokens @ tokens.transpose(1, 2) * self.factor).softmax(dim=-1) @ tokens


@pytest.mark.parametrize(("off", "code"), [(0.0, 0), (0.1, 1)])
def test_weights_that_are_not_those_of_the_explicit_path_are_an_error(
    families: Any, off: float, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = families.Example("toy", "OtherPath", "", lambda explicit: OtherPath(explicit, off), "softmax", 3)
    silent = families.Example("toy", "Flatten", "", lambda explicit: nn.Flatten(), None, 3)
    monkeypatch.setattr(sys, "argv", ["model_families.py"])
    monkeypatch.setattr(families, "EXAMPLES", [example])
    assert families.main() == code
    assert ("differ from the explicit path's" in capsys.readouterr().err) == bool(code)
    monkeypatch.setattr(families, "EXAMPLES", [example, silent])
    assert families.main() == 1
    assert "no attention of Flatten was seen" in capsys.readouterr().err


def test_the_softmaxes_of_a_model_are_read_and_then_left_alone(families: Any) -> None:
    before = Tensor.softmax
    with families.softmax_results() as found:
        expected = nn.functional.softmax(torch.eye(3), dim=-1)
        nn.Softmax(dim=0)(torch.eye(2))
    assert [tuple(each.shape) for each in found] == [(3, 3), (2, 2)]
    assert torch.equal(found[0], expected)
    assert Tensor.softmax is before


def test_a_cost_is_measured_in_a_process_of_its_own(cost: Any) -> None:
    result = run("capture_cost.py", "--child", json.dumps(["streamed", asdict(cost.QUICK)]))
    assert result.returncode == 0, result.stderr
    seconds, peak_bytes, checksum = json.loads(result.stdout)
    assert seconds > 0.0 and peak_bytes > 2**20 and checksum > 0.0


def test_the_cost_on_paper_is_that_of_one_float_for_each_pair_of_tokens(cost: Any) -> None:
    stored, streamed = cost.on_paper(cost.VIT_LARGE)
    one_map, values = 16 * (37 * 37 + 1) ** 2 * 4, (37 * 37 + 1) * 1024 * 4
    assert stored == 24 * (one_map + values)
    assert streamed == 2 * one_map + values


def test_a_part_that_does_not_exist_is_an_error() -> None:
    result = run("capture_cost.py", "everything")
    assert result.returncode == 2
    assert "default, base, depth, paper" in result.stderr
