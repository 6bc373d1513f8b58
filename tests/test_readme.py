"""What the README shows works as it is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hydra.errors import HydraException

from attention_visualizer import VisionTransformer
from tests.helpers.rooms import ROOMS
from tests.helpers.runs import compose_train

PROJECT = Path(__file__).resolve().parents[1]
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_budget: None) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MNIST_DIR", str(tmp_path / "none"))
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", [])  # the embedded digits will do
    model = VisionTransformer(embed_dim=24, num_heads=2, num_layers=2, mlp_dim=48)
    (tmp_path / "runs" / "one" / "checkpoints").mkdir(parents=True)
    torch.save({"model_state_dict": model.state_dict(), "config": model.config}, "runs/one/checkpoints/best.ckpt")
    namespace: dict[str, object] = {}
    for block in blocks("python"):
        exec(block, namespace)  # noqa: S102
    assert (tmp_path / "attention_analysis" / "attention_analysis_report.md").is_file()
    assert (tmp_path / "attention_analysis" / "attention_pattern_sample_4.png").is_file()


def test_the_training_commands_compose() -> None:
    commands = [
        line.split("#")[0].split() for block in blocks("bash") for line in block.splitlines() if "train.py" in line
    ]
    composed = 0
    for words in commands:
        if "&&" in words:
            continue
        overrides = [word.strip("'") for word in words[2:] if word != "-m" and "ckpt_path" not in word]
        compose_train(
            *(override.split(",")[0] if "," in override and "[" not in override else override for override in overrides)
        )
        composed += 1
    assert composed >= 3
    with pytest.raises(HydraException):
        compose_train("model.no_such_field=1")


def test_the_first_hour_fits_150_lines() -> None:
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere_and_nothing_is_left_to_fill_in(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            path = page.parent / target
            assert path.exists(), target
            limit = {".png": 300_000, ".webp": 1_500_000}.get(path.suffix)  # of a picture, and of a film
            assert limit is None or path.stat().st_size < limit, target
    assert not re.search(r"\b(TODO|PROOF|DIGITS|RESULTS|XXX)\b", text)


def test_the_map_has_a_line_for_each_room_from_the_roof_to_the_ground() -> None:
    text = (PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = re.findall(r"^      (\w+)(?:/|\.py) ", text[text.index("## Map") :], re.MULTILINE)
    assert shown == ["__init__", *[room for room in ROOMS if room != "__main__"]]


def test_the_tests_that_prove_what_faults_do_are_there() -> None:
    """`file.py::test_name...` in the table: the file, and a test in it whose name begins so."""
    table = (PROJECT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = 0
    for row in table.splitlines():
        file = None
        for path, test in re.findall(r"`(\w+/test_\w+\.py|test_\w+\.py)?(?:::(test_\w+))?[.]*`", row):
            file = path or file
            if file:
                text = (PROJECT / "tests" / file).read_text(encoding="utf-8")
                assert f"def {test}" in text, row
                named += bool(test)
    assert named > 15
