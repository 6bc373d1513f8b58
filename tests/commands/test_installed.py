"""The wheel does the main job in an empty environment and an empty folder, away from any clone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.helpers.runs import BRIEF, ENVIRONMENT, PROJECT

EXPERIMENT = """# @package _global_
model: {embed_dim: 20, num_heads: 2, num_layers: 1, mlp_dim: 9}
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs of a new environment, in which the wheel of this project was installed.

    What it depends on it borrows from the tests' own: an environment without a network has no other.
    """
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wheel = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(PROJECT)]
    subprocess.run([*pip, *wheel], check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")  # but for its editable installations
    (built,) = folder.glob("*.whl")
    python = str(folder / "env" / "bin" / "python")
    subprocess.run(
        [*pip, "--python", python, "install", "--no-deps", "--no-index", "--ignore-installed", str(built)],
        check=True,
        capture_output=True,
    )
    return folder / "env" / "bin"


def run(programs: Path, *words: str, folder: Path, code: int = 0) -> str:
    """What a command of the environment prints; its errors, where it is to end with `code`."""
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(programs / words[0]), *words[1:]],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code else done.stdout


@pytest.mark.long
def test_the_wheel_trains_and_analyses_away_from_the_clone(programs: Path, tmp_path: Path) -> None:
    trained = run(programs, "attention-visualizer", "train", *BRIEF, folder=tmp_path)
    (folder,) = (tmp_path / "runs").iterdir()
    assert f"Analyse:      attention-visualizer analyze run=runs/{folder.name} ckpt=best\n" in trained
    assert json.loads((folder / "run.json").read_text())["command"].startswith("attention-visualizer train data=digits")
    analysed = run(programs, "attnviz", "analyze", "ckpt=best", "chapters=[patterns]", folder=tmp_path)
    page = folder / "attention_analysis" / "attention_analysis_report.html"
    assert f"HTML:       {page.relative_to(tmp_path)}\n" in analysed
    assert "attention-visualizer analyze ckpt=runs/" in page.read_text()
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "small.yaml").write_text(EXPERIMENT)
    own = ("--config-dir", "mine", "experiment=small", "data=digits", "trainer.limit_train_batches=2")
    text = run(programs, "attention-visualizer", "train", *own, "trainer.max_epochs=1", "test=false", folder=tmp_path)
    assert "1 layers x 2 heads" in text


@pytest.mark.long
def test_the_installed_commands_help(programs: Path, tmp_path: Path) -> None:
    named = f"attention-visualizer {version('attention-visualizer')}\n"
    for words in (
        ["attention-visualizer"],
        ["attnviz"],
        ["python", "-m", "attention_visualizer"],
        ["attnviz", "train"],
    ):
        assert run(programs, *words, "--version", folder=tmp_path) == named
    assert run(programs, "attnviz", "--help", folder=tmp_path) == run(programs, "attnviz", folder=tmp_path)
    text = run(programs, "attnviz", "analyze", "--help", folder=tmp_path)
    assert "rollout_fusion" in text and "attention-visualizer analyze ckpt=best" in text and ".py" not in text
    wrong = run(programs, "attnviz", "analyse", folder=tmp_path, code=2)
    assert wrong == "error: analyse: there is no such command: did you mean `attention-visualizer analyze`?\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_what_the_shell_completes(programs: Path, tmp_path: Path) -> None:
    script = """
        eval "$(attention-visualizer --completion)"
        for COMP_LINE in "attnviz tr" "attnviz analyze ck" "attnviz analyze format=p" ; do
            COMPREPLY=(); _attention_visualizer attnviz; echo "${COMPREPLY[@]}"
        done"""
    path = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=ENVIRONMENT | path, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[:2] == ["train", "ckpt="], done.stderr


@pytest.mark.parametrize(
    ("blocked", "code", "said"),
    [
        ("jinja2", "from attention_visualizer import AttentionVisualizer", "[report]'"),
        ("lightning", "from attention_visualizer import AttentionLogger", "AttentionLogger needs lightning"),
        ("hydra", "import attention_visualizer.commands.main as m; m.run('train', None)", "train needs hydra"),
    ],
)
def test_a_missing_package_is_one_line_that_names_the_extra(tmp_path: Path, blocked: str, code: str, said: str) -> None:
    script = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name in ({blocked!r}, {"pytorch_lightning" if blocked == "lightning" else blocked!r}):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
{code}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode in (1, 2)
    last = done.stderr.splitlines()[-1]
    assert said in last and "python -m pip install 'attention-visualizer[" in last
