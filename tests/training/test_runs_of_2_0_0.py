"""Runs that version 2.0.0 made, one completed and one that SIGTERM ended at step 35 of 90: today's code opens, resumes
and analyses them. They were the same command, so one shows how the other must end.

Their weights came from one processor's arithmetic; on another, what is trained since differs in its last digits.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from attention_visualizer.runs.checkpoint import load_checkpoint
from attention_visualizer.runs.checkpoint_choice import choose_checkpoint
from attention_visualizer.training.resuming import RENAMED_TARGETS, read_config, targets
from tests.helpers.runs import ENVIRONMENT, read_checkpoint, run_script, run_train

RUNS = Path(__file__).parents[1] / "runs_of_2_0_0"
STEPS = 90


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(RUNS, tmp_path / "runs")
    return tmp_path


def assert_ended_as_the_completed_run(run: Path) -> None:
    assert json.loads((run / "run.json").read_text())["status"] == "completed"
    ours = read_checkpoint(run / "checkpoints" / "last.ckpt")
    theirs = read_checkpoint(RUNS / "completed" / "checkpoints" / "last.ckpt")
    interrupted = read_checkpoint(RUNS / "interrupted" / "checkpoints" / "last.ckpt")
    assert (ours["global_step"], theirs["global_step"], interrupted["global_step"]) == (STEPS, STEPS, 35)
    for name, value in theirs["state_dict"].items():
        found = ours["state_dict"][name]
        if name.endswith("qkv.bias"):
            # Softmax does not change with the keys' bias. Its gradient is rounding, which Adam turns into steps.
            found, value = (bias.view(3, -1)[[0, 2]] for bias in (found, value))
        torch.testing.assert_close(found, value, rtol=0, atol=2e-6, msg=name)
    moved = [(theirs["state_dict"][name] - value).abs().max() for name, value in interrupted["state_dict"].items()]
    assert max(moved) > 0.02  # ten thousand times what is tolerated


def test_their_checkpoints_are_opened(folder: Path) -> None:
    assert choose_checkpoint(root=folder / "runs").path == folder / "runs" / "interrupted" / "checkpoints" / "best.ckpt"
    loaded = load_checkpoint(folder / "runs" / "completed" / "checkpoints" / "best.ckpt")
    logits = loaded.build_model()(torch.zeros(1, 1, 28, 28))
    assert logits.shape == (1, 10) and loaded.step == STEPS


def test_the_named_one_is_resumed(folder: Path) -> None:
    outcome = run_train("ckpt_path=runs/interrupted/checkpoints/last.ckpt", folder=folder)
    assert outcome.exit_code == 0, outcome.err
    assert_ended_as_the_completed_run(folder / "runs" / "interrupted")


def test_the_unfinished_one_is_found_by_its_settings(folder: Path) -> None:
    overrides = yaml.safe_load((RUNS / "interrupted" / ".hydra" / "overrides.yaml").read_text())
    outcome = run_train(*overrides, "resume=auto", folder=folder)
    assert outcome.exit_code == 0, outcome.err
    assert "Resuming runs/interrupted, step 35" in outcome.out
    assert {path.name for path in (folder / "runs").iterdir()} == {"completed", "interrupted"}
    assert_ended_as_the_completed_run(folder / "runs" / "interrupted")


@pytest.mark.parametrize("run", ["completed", "interrupted"])
def test_they_are_analysed(folder: Path, run: str) -> None:
    chapters = "chapters=[patterns,statistics,evolution]"
    outcome = run_script("analyze.py", f"run={run}", chapters, "num_samples=1", folder=folder, environment=ENVIRONMENT)
    assert outcome.exit_code == 0, outcome.err
    analysis = folder / "runs" / run / "attention_analysis"
    assert json.loads((analysis / "attention_statistics.json").read_text())["chapters"].keys() >= {"evolution"}
    assert (analysis / "attention_pattern_sample_0.png").is_file()


def test_their_classes_have_the_names_of_today() -> None:
    written = targets(yaml.safe_load((RUNS / "completed" / "config.yaml").read_text()))
    assert written - {"lightning.pytorch.loggers.CSVLogger"} == set(RENAMED_TARGETS) - {
        "lightning.pytorch.loggers.TensorBoardLogger"  # which others had
    }
    config = read_config(RUNS / "completed" / "config.yaml")
    assert targets(config) == {"lightning.pytorch.loggers.CSVLogger", "attention_visualizer.AttentionLogger"}
    assert "_target_" not in config.model
