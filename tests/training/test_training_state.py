"""Checkpoints whose weights are right and whose training state was changed: refused before training, in one line."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer

from attention_visualizer.files.tensor_files import CHECKPOINT_KEY
from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.support.errors import UserError
from attention_visualizer.training.checkpoint_io import AtomicCheckpointIO
from attention_visualizer.training.classifier import Classifier
from attention_visualizer.training.training_state import check_training_state
from tests.helpers.runs import TINY, only_run, read_checkpoint, run_train

OWN = ("loops", "optimizer_states", "lr_schedulers", "current_model_state", "averaging_state")  # checked to the leaves
WRONG = ("x", -1j, [], float("nan"), torch.zeros(3), {"a": 1}, torch.tensor(torch.nan))  # in the place of anything


@dataclass(frozen=True)
class Saved:
    run: Path
    content: dict[str, Any]
    classifier: Classifier
    trainer: Trainer

    def check(self, content: dict[str, Any]) -> None:
        check_training_state(content, self.classifier, self.classifier.build_optimizer(), self.trainer)

    def changed(self, path: tuple[Any, ...], value: Any) -> dict[str, Any]:
        """The content with another value at `path`, or without one where the value is `...`."""
        content = copy.copy(self.content)
        place: Any = content
        for key in path[:-1]:  # copies of what holds it alone: the rest is large, and stays as it is
            place[key] = copy.copy(place[key])
            place = place[key]
        if value is ...:
            del place[path[-1]]
        else:
            place[path[-1]] = value
        return content


@pytest.fixture(scope="module", params=["adamw", "muon"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A run of averaged weights, saved within its first epoch."""
    folder = tmp_path_factory.mktemp("saved")
    steps = ("trainer.max_steps=3", "trainer.val_check_interval=3", "test=false", "logger=none", "callbacks=ema")
    outcome = run_train(*TINY, f"optimizer={request.param}", *steps, folder=folder)
    assert outcome.exit_code == 0, outcome.err
    run = only_run(folder)
    content = read_checkpoint(run / "checkpoints" / "last.ckpt")
    classifier = Classifier(VisionTransformer(**content[CHECKPOINT_KEY]["model"]), 10, muon=request.param == "muon")
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False)
    return Saved(run, content, classifier, trainer)


def paths(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """To everything inside; of many parameters, to the first two."""
    yield path
    if isinstance(value, dict):
        inside = list(value.items())
    else:
        inside = list(enumerate(value)) if isinstance(value, list) else []
    for key, item in inside[:2] if path[-1] in ("state", "params", "current_model_state") else inside:
        yield from paths(item, (*path, key))


def test_what_was_saved_is_what_is_expected(saved: Saved) -> None:
    saved.check(saved.content)


def test_whatever_is_changed_is_refused(saved: Saved) -> None:
    for name in OWN:
        for path in paths(saved.content[name], (name,)):
            for value in WRONG:
                if path[-1] == "state_dict" and value == {} or (path[-1] == "lr_lambdas" and value == []):
                    continue
                with pytest.raises(UserError, match="training cannot resume"):
                    saved.check(saved.changed(path, value))
                    pytest.fail(f"{path} = {value!r}")


def test_counts_begin_at_nought(saved: Saved) -> None:
    for path in paths(saved.content["loops"], ("loops",)):
        if path[-1] in ("ready", "started", "processed", "completed"):
            with pytest.raises(UserError, match="expected a count"):
                saved.check(saved.changed(path, -1))


def test_whatever_is_missing_is_refused(saved: Saved) -> None:
    for path in [path for name in OWN[:3] for path in paths(saved.content[name], (name,))]:
        value: Any = saved.content
        for key in path:
            value = value[key]
        flag = isinstance(value, bool | None) and path[0] != "loops"  # which other versions of PyTorch may not have
        if flag or path[-2:-1] == ("state",) or path[-1] == "combined_loader":  # of a parameter without a gradient yet
            continue
        with pytest.raises(UserError, match="training cannot resume"):
            saved.check(saved.changed(path, ...))
            pytest.fail(f"without {path}")


def test_flags_of_newer_versions_may_be_missing(saved: Saved) -> None:
    content = copy.deepcopy(saved.content)
    states = content["optimizer_states"][0]
    for group in states["parts"][1]["param_groups"] if "parts" in states else states["param_groups"]:
        del group["decoupled_weight_decay"]
    del content["lr_schedulers"][0]["_is_initial"]
    saved.check(content)


def moment(saved: Saved) -> tuple[Any, ...]:
    """The way to a parameter's moment: what a fused optimiser reads and writes without looking at its size."""
    state = ("optimizer_states", 0)
    if "parts" in saved.content["optimizer_states"][0]:
        return (*state, "parts", 1, "state", 0, "exp_avg_sq")
    return (*state, "state", 0, "exp_avg_sq")


def test_a_moment_must_fill_its_memory(saved: Saved) -> None:
    """A view whose last element is the storage's last: read in order, it would go on behind the storage."""
    place: Any = saved.content
    for key in moment(saved):
        place = place[key]
    behind = torch.ones(place.numel())[-1:].expand(place.numel()).view(1, -1).expand(1, -1)
    behind = torch.as_strided(behind, place.shape, [0] * place.ndim)
    assert behind.shape == place.shape
    with pytest.raises(UserError, match="training cannot resume"):
        saved.check(saved.changed(moment(saved), behind))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (None, torch.zeros(3), "exp_avg_sq"),
        (("loops", "fit_loop", "epoch_progress", "current", "completed"), "x", "epoch_progress"),
        (("lr_schedulers",), "x", "lr_schedulers"),
        (("ImageDataModule",), [], "data"),
        (("ImageDataModule", "seed"), torch.zeros(3), "data.seed"),
        (("pytorch-lightning_version",), "x", "pytorch-lightning_version"),
        (("callbacks",), {"EMAWeightAveraging": {"latest_update_step": "x"}}, "latest_update_step"),
        ((CHECKPOINT_KEY, "train_right"), -1, "train_right"),
    ],
)
def test_training_does_not_begin(saved: Saved, tmp_path: Path, path: Any, value: Any, said: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(saved.run, run)
    AtomicCheckpointIO().save_checkpoint(saved.changed(path or moment(saved), value), run / "checkpoints/last.ckpt")
    outcome = run_train(f"ckpt_path={run}/checkpoints/last.ckpt", "trainer.max_steps=9", folder=tmp_path)
    assert outcome.exit_code == 2 and "Traceback" not in outcome.err, outcome
    assert said in outcome.err.splitlines()[-1] and "epoch " not in outcome.out


def test_a_best_score_that_is_none_is_refused(saved: Saved, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(saved.run, run)
    content = copy.deepcopy(saved.content)
    (best,) = (state for name, state in content["callbacks"].items() if name.startswith("RunCheckpoint"))
    best["best_model_score"] = "x"
    AtomicCheckpointIO().save_checkpoint(content, run / "checkpoints/last.ckpt")
    outcome = run_train(f"ckpt_path={run}/checkpoints/last.ckpt", "trainer.max_steps=9", folder=tmp_path)
    assert outcome.exit_code == 2 and "best_model_score" in outcome.err.splitlines()[-1]


def test_a_mistake_beside_the_checkpoint_costs_no_logs(tmp_path: Path) -> None:
    """Going on from the best of several epochs drops the later rows; not before all is known to be right."""
    steps = ("trainer.max_epochs=2", "trainer.limit_train_batches=2", "test=false", "logger=csv", "callbacks=none")
    assert run_train(*TINY, *steps, folder=tmp_path).exit_code == 0
    run = only_run(tmp_path)
    table = next(run.rglob("metrics.csv"))
    before = table.read_bytes()
    outcome = run_train(f"ckpt_path={run}/checkpoints/best.ckpt", "trainer.precision=3", folder=tmp_path)
    assert outcome.exit_code == 2 and "precision" in outcome.err
    assert table.read_bytes() == before
