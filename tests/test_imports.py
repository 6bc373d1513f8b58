"""The walls between rooms, and what importing costs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from importlinter.cli import lint_imports

import attention_visualizer
from tests.helpers.rooms import ROOMS

SOURCE = Path(attention_visualizer.__file__).parent
REPOSITORY = Path(__file__).parents[1]


def test_imports_keep_to_the_contracts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The contracts in pyproject.toml: rooms import only rooms below them, and no module imports itself."""
    monkeypatch.chdir(REPOSITORY)
    assert lint_imports(cache_dir=None) == 0, capsys.readouterr().out


def test_an_import_from_above_breaks_a_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above might look at nothing: a small house with one import that points up."""
    package = tmp_path / "small_house"
    for room, text in {"": "", "roof": "", "ground": "from small_house import roof"}.items():
        (package / room).mkdir()
        (package / room / "__init__.py").write_text(text)
    contract = '{name = "rooms", type = "layers", containers = ["small_house"], layers = ["roof", "ground"]}'
    config = tmp_path / "pyproject.toml"
    config.write_text(f'[tool.importlinter]\nroot_package = "small_house"\ncontracts = [{contract}]\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert lint_imports(str(config), cache_dir=None) == 1


def test_every_folder_is_a_room_and_tells_what_it_holds() -> None:
    found = {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    modules = {path.stem for path in SOURCE.glob("*.py")} - {"__init__"}
    assert found | modules == set(ROOMS) and modules == {"__main__", "interventions", "visualizer"}
    for folder in [path.parent for path in SOURCE.rglob("__init__.py") if path.parent != SOURCE]:
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
        listed = {line.split()[0] for line in text.splitlines() if line.startswith("    ")}
        kinds = (".py", ".js", ".css", ".html")
        there = {path.name for path in folder.iterdir() if path.suffix in kinds} - {"__init__.py"}
        there |= {f"{path.name}/" for path in folder.iterdir() if (path / "__init__.py").is_file()}
        assert listed == there, f"{folder}/__init__.py does not list {there ^ listed}"


def test_tests_stand_in_folders_of_the_same_names() -> None:
    folders = {path.name for path in (REPOSITORY / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders - {"helpers", "runs_of_2_0_0"} <= set(ROOMS)


def in_a_fresh_interpreter(script: str, *arguments: str, folder: Path = REPOSITORY) -> tuple[int, Any]:
    """Exit code and the last line of the output, read as JSON."""
    command = [sys.executable, "-c", f"import json, sys\n{script}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def test_the_front_door_imports_what_is_used() -> None:
    """Capturing starts neither Lightning nor matplotlib nor Hydra; in a fresh interpreter, where what torch itself
    imports counts too. Completion knows all names, and the rooms can be imported by their paths beside them."""
    script = """
import attention_visualizer as av
complete = set(av.__all__) <= set(dir(av)) and "AttentionLogger" not in vars(av)
from attention_visualizer import CaptureError, Geometry, VisionTransformer, capture, intervene
heavy = [name for name in ("lightning", "torchmetrics", "tensorboard", "matplotlib", "seaborn", "hydra", "omegaconf")
         if name in sys.modules]
import attention_visualizer.attention.geometry as geometry
import attention_visualizer.attention.capture
print(json.dumps([complete, heavy, geometry.Geometry is Geometry, callable(capture), callable(av.capture)]))
"""
    assert in_a_fresh_interpreter(script) == (0, [True, [], True, True, True])


def test_analysing_imports_neither_lightning_nor_the_compiler() -> None:
    """They take longer to import than all else that analysing needs."""
    script = """
import attention_visualizer.commands.analyze_checkpoint
from attention_visualizer import AttentionVisualizer
heavy = ("lightning", "torchmetrics", "tensorboard", "torchvision", "torch._dynamo", "seaborn")
print(json.dumps([name for name in heavy if name in sys.modules]))
"""
    assert in_a_fresh_interpreter(script) == (0, [])


def test_the_front_door_only_passes_names_on() -> None:
    for name in attention_visualizer.__all__:
        assert getattr(attention_visualizer, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'AttentionPainter'"):
        attention_visualizer.AttentionPainter  # noqa: B018


@pytest.mark.parametrize("argument", ["--help", "num_samples=few", "no_such_field=1"])
def test_help_and_a_wrong_argument_need_no_torch(argument: str, tmp_path: Path) -> None:
    script = """
import runpy
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(json.dumps(sorted({"torch", "lightning", "matplotlib"} & sys.modules.keys())))
"""
    code, heavy = in_a_fresh_interpreter(script, str(REPOSITORY / "analyze.py"), argument, folder=tmp_path)
    assert (code, heavy) == (0 if argument == "--help" else 2, [])
