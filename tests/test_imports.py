"""Imports point down only: applications > views > core. Read from the source, so that no import can hide."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import attention_visualizer

PACKAGE = "attention_visualizer"
SOURCE = Path(attention_visualizer.__file__).parent
REPOSITORY = Path(__file__).parents[1]

# Top down. A folder's modules belong where the folder is; __init__.py only passes names on.
LEVELS = {
    "applications": {
        "visualizer",
        "callbacks",
        "loggers",
        "event_checksums",
        "training",
        "saving",
        "analysis",
        "command_line",
        "configuration",
        "resuming",
        "overrides",
        "sweeps",
    },
    "views": {"panels", "charts", "run_charts", "attention_figures", "chapter", "report", "report_page"},
    "core": {
        "model",
        "data",
        "images",
        "augmentation",
        "mnist_files",
        "allocator",
        "classifier",
        "halves",
        "muon",
        "attention_calls",
        "hand_written_attention",
        "calling_modules",
        "capture",
        "interventions",
        "measures",
        "statistics",
        "inference",
        "head_roles",
        "perturbation",
        "parallel",
        "head_matching",
        "ink",
        "strokes",
        "matching",
        "controls",
        "observation",
        "explanations",
        "prediction",
        "model_search",
        "probes",
        "validation_watch",
        "pictures",
        "foreign_models",
        "history",
        "geometry",
        "progress",
        "stopping",
        "errors",
        "storage",
        "staging",
        "checkpoint",
        "tensor_files",
        "training_state",
        "plain_files",
        "inert",
        "export",
        "checkpoint_choice",
    },
}
RANK = {name: rank for rank, names in enumerate(reversed(LEVELS.values())) for name in names}
CONFIGURATION = {"hydra", "omegaconf", "hydra_zen"}
DRAWING = {"matplotlib", "seaborn"}
FRAMEWORK = {"lightning", "torchmetrics", "tensorboard"}


def modules() -> dict[str, Path]:
    """Every module's name inside the package, such as "analysis.study", but for the package's own __init__."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


MODULES = modules()


def imported(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Full names of all that `source` imports, wherever in it, relative imports resolved."""
    own = [PACKAGE, *module.split(".")] if module else [PACKAGE]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = node.level - (1 if is_package else 0)
            base = own[: len(own) - up] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def imports_of(module: str) -> set[str]:
    path = MODULES[module]
    return set(imported(path.read_text(encoding="utf-8"), module, path.name == "__init__.py"))


def inside(names: set[str]) -> set[str]:
    """The package's modules among full names: a name inside a module counts as that module."""
    found = set()
    for name in names:
        parts = name.split(".")
        if parts[0] != PACKAGE:
            continue
        candidates = [".".join(parts[1:end]) for end in range(len(parts), 1, -1)]
        found.add(next((candidate for candidate in candidates if candidate in MODULES), ""))
    return found


def outside(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names} - {PACKAGE}


def everything_below(module: str) -> set[str]:
    """Modules that importing `module` brings along, itself included."""
    found, waiting = set(), [module]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting += inside(imports_of(current))
    return found


def top(module: str) -> str:
    return module.split(".")[0]


def test_every_module_is_in_exactly_one_level() -> None:
    listed = [name for names in LEVELS.values() for name in names]
    assert len(listed) == len(set(listed))
    assert {top(module) for module in MODULES} == set(listed)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    upward = {name for name in inside(imports_of(module)) if name == "" or RANK[top(name)] > RANK[top(module)]}
    assert not upward, f"{module} imports {upward}"  # "" is the package's front door, above everything


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {module: inside(imports_of(module)) - {module} for module in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)  # CycleError names a circle


def test_only_the_command_line_knows_hydra() -> None:
    who = {module for module in MODULES if outside(imports_of(module)) & CONFIGURATION}
    assert who == {"command_line", "configuration", "overrides", "resuming", "sweeps"}
    for entry in ("train.py", "analyze.py"):
        names = set(imported((REPOSITORY / entry).read_text(encoding="utf-8"), ""))
        assert outside(names) & CONFIGURATION and "command_line" in inside(names)
    users = {module for module in MODULES if "command_line" in inside(imports_of(module))}
    assert users == set()


def test_the_callback_brings_no_data_and_no_classifier_along() -> None:
    """It works in anybody's Lightning project, whose data and loss are their own."""
    below = everything_below("callbacks")
    assert "capture" in below and "panels" in below
    assert not below & {"data", "mnist_files", "classifier", "model", "training", "checkpoint"}


def test_the_classifier_knows_nothing_of_attention() -> None:
    assert not everything_below("classifier") & {"capture", "measures", "statistics", "observation", "history"}


@pytest.mark.parametrize("module", sorted(LEVELS["core"]))
def test_the_core_draws_nothing(module: str) -> None:
    assert not outside(imports_of(module)) & DRAWING


@pytest.mark.parametrize("module", ["model", "capture", "measures", "statistics", "observation", "geometry", "history"])
def test_models_and_measures_need_torch_only(module: str) -> None:
    for below in everything_below(module):
        assert not outside(imports_of(below)) & FRAMEWORK, below


def test_the_front_door_only_passes_names_on() -> None:
    for name in attention_visualizer.__all__:
        assert getattr(attention_visualizer, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'AttentionPainter'"):
        attention_visualizer.AttentionPainter  # noqa: B018


def test_capturing_starts_neither_lightning_nor_matplotlib() -> None:
    """Seen from a fresh interpreter, where what torch itself imports counts too."""
    heavy = sorted(FRAMEWORK | DRAWING | CONFIGURATION)
    script = (
        "import sys; from attention_visualizer import CaptureError, Geometry, VisionTransformer, capture, intervene; "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("argument", ["--help", "num_samples=few", "no_such_field=1"])
def test_help_and_a_wrong_argument_need_no_torch(argument: str, tmp_path: Path) -> None:
    script = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(sorted({"torch", "lightning", "matplotlib"} & sys.modules.keys()))
"""
    command = [sys.executable, "-c", script, str(REPOSITORY / "analyze.py"), argument]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == (0 if argument == "--help" else 2), done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_capture_is_the_function_whatever_was_imported_before() -> None:
    script = """
import attention_visualizer.capture
from attention_visualizer import capture
import attention_visualizer.model_search
print(callable(capture), attention_visualizer.capture is capture)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["True", "True"]


def test_imports_are_read_wherever_they_stand() -> None:
    source = """
import numpy as np
from attention_visualizer import storage, panels
from .model import VisionTransformer
from . import charts
def later():
    import matplotlib.pyplot
    if True:
        from attention_visualizer.analysis.study import Study
"""
    names = set(imported(source, "capture"))
    assert inside(names) == {"storage", "panels", "model", "charts", "analysis.study"}
    assert outside(names) == {"numpy", "matplotlib"}
    assert inside(set(imported("from .. import charts\nfrom .study import Study", "analysis.heads"))) == {
        "charts",
        "analysis.study",
    }
    assert inside(set(imported("from . import study", "analysis", is_package=True))) == {"analysis.study"}
    assert inside(set(imported("from attention_visualizer import capture", "panels"))) == {"capture"}
    assert inside({"attention_visualizer.AttentionLogger"}) == {""}


def test_completion_knows_what_is_imported_when_first_used() -> None:
    command = "import attention_visualizer as av; print(set(av.__all__) <= set(dir(av)), 'AttentionLogger' in vars(av))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
