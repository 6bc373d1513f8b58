"""A mistake is one line and leaves nothing behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from attention_visualizer.analysis.study.samples import choose_samples
from attention_visualizer.data.datamodule import ImageDataModule
from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.runs.checkpoint import CHECKPOINT_KEY
from attention_visualizer.support.errors import UserError
from tests.helpers.analyses import Workplace, analyze, assert_refused, content_of, random_model, succeed, without_mnist

PROJECT = Path(__file__).resolve().parents[2]


def test_help_names_every_field(tmp_path: Path) -> None:
    outcome = succeed("--help", folder=tmp_path)
    for field in (
        "ckpt",
        "run",
        "num_samples",
        "samples",
        "class",
        "wrong",
        "image",
        "query",
        "head_layers",
        "chapters",
    ):
        assert re.search(rf"\b{field}[:=]", outcome.out), field
    assert not os.listdir(tmp_path)


# --- mistakes ---


def test_into_the_folder_one_is_in(one_run: Workplace, tmp_path: Path) -> None:
    run = next((one_run.path / "runs").iterdir())
    outcome = analyze(f"run={run}", "chapters=[patterns]", "num_samples=1", "output_dir=.", folder=tmp_path)
    assert outcome.exit_code == 0 and (tmp_path / "attention_analysis_report.md").is_file(), outcome.err
    assert_refused(one_run.path, "output_dir=/", said="name a folder inside it")
    assert_refused(one_run.path, "chapters=[[patterns]]", said="choose from")


@pytest.mark.parametrize("arguments", [["ckpt=best"], ["ckpt=last"], [], ["run=all"]])
def test_without_any_checkpoint_it_says_how_to_train(tmp_path: Path, arguments: list[str]) -> None:
    assert_refused(tmp_path, *arguments, said="/train.py`")


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("nope=1", "nope"),
        ("num_samples=abc", "num_samples=abc"),
        ("num_samples=0", "num_samples=0"),
        ("num_samples=-3", "num_samples=-3"),
        ("num_samples=1.5", "num_samples=1.5"),
        ("num_samples=true", "num_samples=True"),
        ("num_samples=null", "num_samples"),
        ("wrong=perhaps", "wrong=perhaps"),
        ("class=abc", "class=abc"),
        ("class=10", "from 0 to 9"),
        ("class=-1", "from 0 to 9"),
        ("samples=12", "samples=12"),
        ("samples=[]", "samples=[]"),
        ("samples=[1,a]", "samples"),
        ("samples=[7,300]", "from 0 to 299"),
        ("samples=[-1]", "from 0 to 299"),
        ("chapters=[nope]", "choose from patterns, heads, layers, methods, statistics, atlas, roles"),
        ("chapters=[]", "patterns, heads"),
        ("chapters=patterns", "chapters=patterns"),
        ("chapters=[1]", "chapters="),
        ("format=gif", "png, pdf, svg"),
        ("format_film=avi", "format_film=avi: choose one of webp, mp4, gif"),
        ("format_film=[gif,mp4]", "choose one of webp, mp4, gif"),
        ("head_layers=first", "all, last"),
        ("query=nope", "query=nope"),
        ("query=[4,0]", "outside the 4 x 4 patch grid"),
        ("query=[0,-1]", "outside the 4 x 4 patch grid"),
        ("query=[1,2,3]", "query="),
        ("query=[a,b]", "query="),
        ("query=5", "query=5"),
        ("query=1.5", "query=1.5"),
        ("query=true", "query=True"),
        ("device=gpu", "device=gpu"),
        ("device=mps", "device=mps"),
        ("device=cuda:99", "device=cuda:99"),
        ("ckpt=nowhere.ckpt", "nowhere.ckpt does not exist"),
        ("ckpt=null", "ckpt="),
        ("run=nowhere", "run=nowhere"),
        ("chapters=[pattern,heads]", "there is no chapter pattern; choose from"),
        ("chapters=pattern,heads", "a list is written as 'chapters=[pattern,heads]'"),
        ("query", "query: give field=value, without spaces around the equals sign"),
        ("image=nowhere.png", "nowhere.png"),
        ("image=runs", "runs"),
        ("output_dir=''", "output_dir"),
        (f"output_dir={'long' * 100}", "output_dir="),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(one_run: Workplace, no_gpu: None, argument: str, said: str) -> None:
    assert_refused(one_run.path, argument, said=said)


def test_runs_without_their_chapter_are_refused(one_run: Workplace) -> None:
    assert_refused(
        one_run.path, "runs=runs/*", "chapters=[patterns]", said="runs= is for the chapters runs and explorer"
    )


def test_a_gpu_that_is_not_there(one_run: Workplace, no_gpu: None) -> None:
    assert_refused(one_run.path, "device=cuda", said="device=cuda: no such GPU is available; use device=cpu")


def test_a_mistake_in_a_process_of_its_own(tmp_path: Path) -> None:
    """As above, with all that Hydra and the interpreter add."""
    command = [sys.executable, str(PROJECT / "analyze.py"), "ckpt=best"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and done.stdout == "" and not os.listdir(tmp_path)
    assert done.stderr == f"error: no checkpoint yet in runs/: train one first with `python {PROJECT / 'train.py'}`\n"


def test_a_file_that_is_no_picture(one_run: Workplace) -> None:
    (one_run.path / "text.png").write_text("no picture")
    assert_refused(one_run.path, "image=text.png", said="text.png: not a readable image")


def test_a_file_in_the_way_of_the_output(one_run: Workplace) -> None:
    (one_run.path / "taken").write_text("a file")
    assert_refused(one_run.path, "output_dir=taken", said="taken is a file, not a folder")
    assert_refused(one_run.path, "output_dir=taken/deeper", said="taken is a file, not a folder")
    assert (one_run.path / "taken").read_text() == "a file"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that not even root can write")
def test_a_folder_that_cannot_be_written(one_run: Workplace) -> None:
    assert_refused(one_run.path, "output_dir=/proc/analysis", said="output_dir=/proc/analysis")


def other_architecture(content: dict[str, Any]) -> None:
    content["state_dict"] = {"model.conv1.weight": torch.zeros(3, 5)}


def more_heads_in_the_configuration(content: dict[str, Any]) -> None:
    content[CHECKPOINT_KEY]["model"]["num_layers"] = 5


@pytest.mark.parametrize("change", [other_architecture, more_heads_in_the_configuration])
def test_a_checkpoint_of_another_architecture(
    work: Workplace, model: VisionTransformer, change: Callable[[dict[str, Any]], None]
) -> None:
    run = work.add_run("2025-01-01_00-00-00-000000", model)
    content = content_of(model, work.digits)
    change(content)
    torch.save(content, run.best)
    assert_refused(work.path, said="best.ckpt")


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 no checkpoint either"])
def test_a_file_that_is_no_checkpoint(work: Workplace, content: bytes) -> None:
    (work.path / "model.ckpt").write_bytes(content)
    assert_refused(work.path, "ckpt=model.ckpt", said="model.ckpt")


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_a_truncated_checkpoint(work: Workplace, model: VisionTransformer, share: float) -> None:
    run = work.add_run("2025-01-01_00-00-00-000000", model)
    whole = run.best.read_bytes()
    run.best.write_bytes(whole[: int(len(whole) * share)])
    assert_refused(work.path, said="best.ckpt is truncated or corrupt")
    run.last.write_bytes(whole)
    assert_refused(work.path, said="last.ckpt (step 17) is whole")


def test_a_broken_history_is_found_before_any_work(work: Workplace, model: VisionTransformer) -> None:
    run = work.add_run("2025-01-01_00-00-00-000000", model, with_history=True)
    whole = run.history_path.read_bytes()
    run.history_path.write_bytes(whole[: len(whole) // 2])
    assert_refused(work.path, "num_samples=1", said="attention_history.npz")


def test_a_model_without_a_class_token_has_no_such_query(work: Workplace) -> None:
    work.add_run("2025-01-01_00-00-00-000000", random_model(pooling="mean"))
    assert_refused(work.path, "query=cls", said="query=cls: this model")


def test_a_model_that_makes_no_mistakes_has_no_wrong_samples(digits: ImageDataModule) -> None:
    labels = digits.splits["test"][1]
    nothing = torch.zeros(len(labels), dtype=torch.bool)
    with pytest.raises(UserError, match="no test image fits"):
        choose_samples(labels, 8, None, None, nothing)


def test_mnist_that_is_gone_is_named_by_the_field_of_this_command(
    work: Workplace, model: VisionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's own data set or none: digits would give other findings. `data.fallback` is no field here."""
    without_mnist(monkeypatch)
    run = work.add_run("2025-01-01_00-00-00-000000", model)
    content = content_of(model, work.digits)
    content[CHECKPOINT_KEY]["data"]["name"] = "mnist"
    torch.save(content, run.best)
    run.update_manifest(data=content[CHECKPOINT_KEY]["data"])
    assert_refused(work.path, "data_dir=elsewhere", said="error: data_dir=elsewhere")
    assert "data.fallback" not in analyze("data_dir=elsewhere", folder=work.path).err
