"""The wheel does the main job in an empty environment and an empty folder, away from any clone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.environments import build_wheel, environment
from tests.helpers.runs import BRIEF, ENVIRONMENT

EXPERIMENT = """# @package _global_
model: {embed_dim: 20, num_heads: 2, num_layers: 1, mlp_dim: 9}
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of programs of new environments, by the extra of this project's wheel that was installed there."""
    folder = tmp_path_factory.mktemp("installed")
    wheel = build_wheel(folder)
    lightning = {"": ("pytorch-lightning", "tensorboard")}
    return {
        extra: environment(folder / (extra or "core"), wheel, extra, *lightning.get(extra, ()))
        for extra in ("", "train", "report")
    }


@pytest.fixture
def programs(places: dict[str, Path]) -> Path:
    return places["train"]


def run(programs: Path, *words: str, folder: Path, code: int = 0, with_errors: bool = False) -> str:
    """What a command of the environment prints; its errors, where it is to end with `code`, or both."""
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(programs / words[0]), *words[1:]],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr if with_errors else done.stderr if code else done.stdout


@pytest.mark.long
def test_the_wheel_trains_and_analyses_away_from_the_clone(places: dict[str, Path], tmp_path: Path) -> None:
    """Each command in an environment that has its extra alone."""
    programs = places["train"]
    trained = run(programs, "attention-visualizer", "train", *BRIEF, folder=tmp_path)
    (folder,) = (tmp_path / "runs").iterdir()
    assert f"Analyse:      attention-visualizer analyze run=runs/{folder.name} ckpt=best\n" in trained
    assert json.loads((folder / "run.json").read_text())["command"].startswith("attention-visualizer train data=digits")
    missing = run(programs, "attnviz", "analyze", "ckpt=best", folder=tmp_path, code=2)
    assert missing.endswith("python -m pip install 'attention-visualizer[report]'\n") and missing.count("\n") == 1
    analysed = run(places["report"], "attnviz", "analyze", "ckpt=best", "chapters=[patterns]", folder=tmp_path)
    page = folder / "attention_analysis" / "attention_analysis_report.html"
    assert f"HTML:       {page.relative_to(tmp_path)}\n" in analysed
    assert "attention-visualizer analyze ckpt=runs/" in page.read_text()
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "small.yaml").write_text(EXPERIMENT)
    own = ("--config-dir", "mine", "experiment=small", "data=digits", "trainer.limit_train_batches=2")
    text = run(programs, "attention-visualizer", "train", *own, "trainer.max_epochs=1", "test=false", folder=tmp_path)
    assert "1 layers x 2 heads" in text


# Of somebody who has Lightning by its other name, and TensorBoard.
PROJECT_OF_SOMEBODY = """
import importlib.util, pytorch_lightning, torch
from attention_visualizer import AttentionLogger, VisionTransformer, capture
assert importlib.util.find_spec("lightning") is None

model = VisionTransformer(embed_dim=8, num_heads=2, num_layers=2, mlp_dim=8)
with torch.no_grad(), capture(model.eval()) as attention:
    model(torch.rand(1, 1, 28, 28))
print(attention)

class Module(pytorch_lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.vit = model
    def training_step(self, batch, index):
        return torch.nn.functional.cross_entropy(self.vit(batch[0]), batch[1])
    validation_step = training_step
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

data = torch.utils.data.DataLoader([(torch.rand(1, 28, 28), i % 10) for i in range(20)], batch_size=10)
logger = pytorch_lightning.loggers.TensorBoardLogger(".", name="board", version="")
options = {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, "logger": logger}
pytorch_lightning.Trainer(callbacks=[AttentionLogger()], **options).fit(Module(), data, data)
"""


@pytest.mark.long
def test_a_project_needs_no_extra_and_either_package_of_lightning(places: dict[str, Path], tmp_path: Path) -> None:
    told = run(places[""], "python", "-c", PROJECT_OF_SOMEBODY, folder=tmp_path, with_errors=True)
    assert "CapturedAttention(2 layers x 2 heads" in told and "AttentionLogger: no " not in told
    found = "AttentionLogger: vit, 2 layers x 2 heads, 17 tokens"
    assert f"{found}; tensorboard --logdir ./board --samples_per_plugin images=200" in told
    tags = EventAccumulator(str(tmp_path / "board"), size_guidance={"images": 0}).Reload().Tags()
    assert "attention_1_maps/all_images" in tags["images"] and "vit_entropy/layer_2" in tags["scalars"]


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
