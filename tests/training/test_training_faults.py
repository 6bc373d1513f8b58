"""What goes wrong while a model trains, and what is left of it."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from attention_visualizer.runs import folders
from attention_visualizer.runs.checkpoint import load_checkpoint
from attention_visualizer.support.errors import UserError
from attention_visualizer.support.training_progress import batches_done
from attention_visualizer.training import sweeps
from attention_visualizer.training.classifier import Classifier
from attention_visualizer.training.saving import LastCheckpoint
from tests.helpers.runs import (
    BARE,
    BATCHES,
    EPOCHS,
    TINY,
    Training,
    assert_same_training,
    only_run,
    run_folders,
    run_process,
    run_train,
)

QUICK = (*TINY, f"trainer.max_epochs={EPOCHS}", "test=false")
ALL_ON = (*QUICK, "model.dropout=0.1", "callbacks=ema", "logger=none")


# --- diverging ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["the loss", "a gradient"])
def test_a_diverging_batch_is_named_and_does_not_reach_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """In the second epoch, of which neither last.ckpt nor best.ckpt then holds anything."""
    plain = Classifier.training_loss

    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, loss: torch.Tensor) -> torch.Tensor:
            return loss.clone()

        @staticmethod
        def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * torch.inf

    def spoilt(self: Classifier, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = plain(self, logits, labels)
        if batches_done(self.trainer) < BATCHES + 4:
            return loss
        return loss * torch.nan if what == "the loss" else Spoilt.apply(loss)

    monkeypatch.setattr(Classifier, "training_loss", spoilt)
    outcome = run_train(*QUICK, *BARE, folder=tmp_path)
    assert outcome.exit_code == 2 and "Traceback" not in outcome.err
    assert f"{what} is NaN or infinite at step {BATCHES + 5}, which is batch 5 of epoch 2" in outcome.err
    run = only_run(tmp_path)
    for name in ("last.ckpt", "best.ckpt"):
        kept = load_checkpoint(run / "checkpoints" / name)  # which refuses weights that are not finite
        assert kept.step == BATCHES
    assert json.loads((run / "run.json").read_text())["status"] == "failed"


def test_a_divergence_with_the_last_step_is_no_result(tmp_path: Path) -> None:
    """All weights are finite, and what is made of them is not."""
    once = ("trainer.max_epochs=1", "trainer.limit_train_batches=1", "optimizer.learning_rate=1e20")
    outcome = run_train(*TINY, *BARE, *once, folder=tmp_path)
    assert outcome.exit_code == 2 and "training diverged: the validation loss" in outcome.err
    assert not (only_run(tmp_path) / "checkpoints" / "best.ckpt").exists()


def test_real_divergence_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    """A learning rate that no weight survives, in a run that was good until then."""
    first = run_train(*QUICK, *BARE, "trainer.max_epochs=1", folder=tmp_path)
    assert first.exit_code == 0, first.err
    last = only_run(tmp_path) / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    worse = ("trainer.max_epochs=9", "optimizer.learning_rate=1e30", "trainer.gradient_clip_val=null")
    outcome = run_train(f"ckpt_path={last}", *worse, folder=tmp_path)
    assert outcome.exit_code == 2 and "training diverged" in outcome.err and "epoch 2" in outcome.err
    assert last.read_bytes() == before


# --- logs that cannot be written ---------------------------------------------------------------------------------


def test_a_full_disk_for_the_charts_is_a_warning_once_and_changes_no_weight(tmp_path: Path) -> None:
    """No file may be larger than 300 kB: enough for checkpoints, not for the charts."""
    (tmp_path / "small").mkdir()
    limit = 300_000
    outcome = run_process(*TINY, "trainer.max_epochs=4", folder=tmp_path / "small", largest=limit)
    assert outcome.exit_code == 0, outcome.err
    assert outcome.err.count("UserWarning") == 1 and "Traceback" not in outcome.err
    assert "TensorBoardLogger writes no more, training continues: [Errno 27] File too large" in outcome.err
    run = only_run(tmp_path / "small")
    assert max(path.stat().st_size for path in run.glob("events.*")) <= limit
    outcome = run_train(*TINY, "trainer.max_epochs=4", *BARE, folder=tmp_path)
    assert outcome.exit_code == 0, outcome.err
    assert_same_training(only_run(tmp_path) / "checkpoints" / "last.ckpt", run / "checkpoints" / "last.ckpt")


# --- any step ----------------------------------------------------------------------------------------------------


def test_every_steps_checkpoint_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch of one epoch and each boundary, with augmentation, dropout and averaged weights."""
    whole = tmp_path / "whole"
    whole.mkdir()
    kept: dict[int, Path] = {}
    save = LastCheckpoint._save_checkpoint

    def and_keep(self: ModelCheckpoint, trainer: Any, path: str) -> None:
        save(self, trainer, path)  # type: ignore[arg-type]
        kept[trainer.global_step] = tmp_path / f"step_{trainer.global_step}.ckpt"
        shutil.copy(path, kept[trainer.global_step])

    with monkeypatch.context() as patched:
        patched.setattr(LastCheckpoint, "_save_checkpoint", and_keep)
        patched.setattr("attention_visualizer.training.saving.SAVE_SECONDS", 0.0)
        patched.setattr(LastCheckpoint.__init__, "__defaults__", (0.0,))
        outcome = run_train(*ALL_ON, folder=whole)
    assert outcome.exit_code == 0, outcome.err
    run = only_run(whole)
    assert len(kept) >= EPOCHS * BATCHES - EPOCHS  # not between an epoch's end and its first batch
    chosen = [step for step in kept if BATCHES <= step <= 2 * BATCHES]
    for step in chosen[:: max(1, len(chosen) // 6)]:
        again = tmp_path / f"again_{step}"
        shutil.copytree(run, again / "runs" / run.name)
        last = again / "runs" / run.name / "checkpoints" / "last.ckpt"
        shutil.copy(kept[step], last)
        outcome = run_train(f"ckpt_path={last}", folder=again)
        assert outcome.exit_code == 0, outcome.err
        assert_same_training(last, run / "checkpoints" / "last.ckpt")


# --- resume=auto -------------------------------------------------------------------------------------------------


def test_auto_takes_the_newest_unfinished_run_of_the_same_settings_that_nobody_trains(tmp_path: Path) -> None:
    def started(*arguments: str) -> Path:
        before = set(run_folders(tmp_path))
        outcome = run_train(*QUICK, *BARE, *arguments, folder=tmp_path)
        assert outcome.exit_code == 0, outcome.err
        new = set(run_folders(tmp_path)) - before
        return new.pop() if new else Path(outcome.out.split("Run folder: ")[1].split("\n")[0])

    first = started()
    assert started("resume=auto") != first  # it was completed
    other = started("seed=1")
    for run in run_folders(tmp_path):
        manifest = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps(manifest | {"status": "running"}))  # as a killed one leaves it
    second = [run for run in run_folders(tmp_path) if run not in (first, other)][0]
    assert tmp_path / started("resume=auto") == second  # the newest of these settings
    assert tmp_path / started("resume=auto", "seed=1") == other
    assert tmp_path / started("resume=auto") == first
    count = len(run_folders(tmp_path))
    started("resume=auto", "trainer.max_epochs=4")
    assert len(run_folders(tmp_path)) == count + 1  # none of these


def test_two_that_go_on_at_once_do_not_share_a_run(tmp_path: Path) -> None:
    outcome = run_train(*QUICK, *BARE, folder=tmp_path)
    run = only_run(tmp_path)
    (run / "run.json").write_text(json.dumps(json.loads((run / "run.json").read_text()) | {"status": "running"}))
    both = [Training(*QUICK, *BARE, "resume=auto", folder=tmp_path) for _ in range(2)]
    assert [each.end() for each in both] == [0, 0]
    assert outcome.exit_code == 0 and len(run_folders(tmp_path)) == 2
    assert sum("Resuming" in each.output() for each in both) == 1


def test_a_run_that_a_live_process_trains_is_not_resumed_by_hand(tmp_path: Path) -> None:
    training = Training(*QUICK, *BARE, "trainer.max_epochs=500", folder=tmp_path)
    last = training.wait_for_checkpoint()
    outcome = run_train(f"ckpt_path={last}", folder=tmp_path)
    training.process.kill()
    assert outcome.exit_code == 2 and "another process is training" in outcome.err


@pytest.mark.parametrize("damaged", [["last.ckpt"], ["last.ckpt", "best.ckpt"]])
def test_auto_goes_on_from_the_previous_good_checkpoint(tmp_path: Path, damaged: list[str]) -> None:
    outcome = run_train(*QUICK, *BARE, folder=tmp_path)
    run = only_run(tmp_path)
    whole = tmp_path / "whole.ckpt"
    shutil.copy(run / "checkpoints" / "last.ckpt", whole)
    (run / "run.json").write_text(json.dumps(json.loads((run / "run.json").read_text()) | {"status": "running"}))
    for name in damaged:
        content = bytearray((run / "checkpoints" / name).read_bytes())
        content[len(content) // 2] ^= 4
        (run / "checkpoints" / name).write_bytes(content)
    by_hand = run_train(f"ckpt_path={run}/checkpoints/last.ckpt", folder=tmp_path)
    assert by_hand.exit_code == 2 and "is corrupt" in by_hand.err
    assert (f"{run}/checkpoints/best.ckpt (step " in by_hand.err) == (len(damaged) == 1)
    outcome = run_train(*QUICK, *BARE, "resume=auto", folder=tmp_path)
    assert outcome.exit_code == 0, outcome.err
    assert "Not used: " in outcome.out and "is corrupt" in outcome.out
    assert ("from its start" in outcome.out) == (len(damaged) == 2)
    assert only_run(tmp_path) == run
    assert_same_training(run / "checkpoints" / "last.ckpt", whole)


# --- sweeps ------------------------------------------------------------------------------------------------------

OTHERS = [argument for argument in TINY if not argument.startswith("model.mlp_dim")]
SWEEP = ("-m", "model.mlp_dim=29,31,37", *OTHERS, *BARE, "trainer.max_epochs=4")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path, number: signal.Signals) -> None:
    training = Training(*SWEEP, folder=tmp_path)

    def second_job_trains() -> bool:
        return any(tmp_path.glob("runs/*_sweep/1_*/checkpoints/last.ckpt"))

    training.wait_until(second_job_trains)
    training.process.send_signal(number)
    if number == signal.SIGTERM:
        assert training.end() == 143 and "the same command and resume=auto" in training.output()
    training.end()
    (folder,) = run_folders(tmp_path)
    done = next(folder.glob("0_*")) / "checkpoints" / "last.ckpt"
    written = done.stat().st_mtime_ns
    outcome = run_train(*SWEEP, "resume=auto", folder=tmp_path)
    assert outcome.exit_code == 0, outcome.err
    assert run_folders(tmp_path) == [folder] and done.stat().st_mtime_ns == written
    assert "Done already" in outcome.out and outcome.out.count("Resuming") == 2  # the sweep, its second job
    rows = list(csv.DictReader((folder / "sweep.csv").open()))
    assert [row["status"] for row in rows] == ["completed"] * 3
    assert len([path for path in folder.iterdir() if path.is_dir()]) == 3
    if number == signal.SIGKILL:  # all is done: the same command begins a new one
        outcome = run_train(*SWEEP, "resume=auto", "trainer.limit_train_batches=2", folder=tmp_path)
        assert outcome.exit_code == 0 and len(run_folders(tmp_path)) == 2


SHORT_SWEEP = (
    "-m",
    "seed=0,1",
    *OTHERS,
    "model.mlp_dim=29",
    *BARE,
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """One that is not done: its table was never written."""
    outcome = run_train(*SHORT_SWEEP, "test=false", folder=tmp_path)
    assert outcome.exit_code == 0, outcome.err
    (folder,) = run_folders(tmp_path)
    (folder / "sweep.csv").unlink()
    return folder


def test_a_job_of_other_settings_is_not_written_over(sweep: Path, tmp_path: Path) -> None:
    """As when the data set cannot be had any more, and another takes its place."""
    job = next(sweep.glob("0_*"))
    config = yaml.safe_load((job / "config.yaml").read_text())
    config["data"]["batch_size"] = 13
    (job / "config.yaml").write_text(yaml.safe_dump(config))
    before = {path: path.read_bytes() for path in job.rglob("*") if path.is_file()}
    outcome = run_train(*SHORT_SWEEP, "test=false", "resume=auto", folder=tmp_path)
    assert outcome.exit_code == 1 and "holds a run already" in outcome.err + outcome.out
    assert outcome.out.count("Done already") == 1
    assert {path: path.read_bytes() for path in before} == before


def test_a_sweep_that_a_process_works_on_is_left_to_it(sweep: Path, tmp_path: Path) -> None:
    lock = folders.lock_folder(sweep)
    outcome = run_train(*SHORT_SWEEP, "test=false", "resume=auto", folder=tmp_path)
    lock.release()
    assert outcome.exit_code == 0 and len(run_folders(tmp_path)) == 2


def test_the_order_of_what_is_swept_over_counts(sweep: Path, tmp_path: Path) -> None:
    """The jobs' numbers depend on it."""
    outcome = run_train("-m", "test=false", *SHORT_SWEEP[1:], "resume=auto", folder=tmp_path)
    assert outcome.exit_code == 0 and "Resuming" not in outcome.out and len(run_folders(tmp_path)) == 2


def test_hydra_s_own_record_of_a_sweep_may_be_lost(sweep: Path, tmp_path: Path) -> None:
    (sweep / "multirun.yaml").write_text("hydra: [")
    outcome = run_train(*SHORT_SWEEP, "test=false", "resume=auto", folder=tmp_path)
    assert outcome.exit_code == 0 and outcome.out.count("Done already") == 2 and run_folders(tmp_path) == [sweep]


@pytest.mark.parametrize("name", ["attention_analysis", "figures for a talk", "2024"])
def test_other_folders_in_a_sweeps_are_no_jobs(sweep: Path, tmp_path: Path, name: str) -> None:
    (sweep / name).mkdir()
    (sweep / name / "attention_report.md").write_text("")
    outcome = run_train(*SHORT_SWEEP, "test=false", "resume=auto", folder=tmp_path)
    assert outcome.exit_code == 0 and outcome.out.count("Done already") == 2, outcome.out
    assert len(list(csv.DictReader((sweep / "sweep.csv").open()))) == 2


def test_a_job_whose_process_ended_without_a_word_is_not_said_to_run(sweep: Path) -> None:
    job = folders.RunFolder(next(sweep.glob("1_*")))
    job.update_manifest(status="running")
    assert [row["status"] for row in sweeps.sweep_rows(sweep)] == ["completed", "killed"]
    lock = job.lock()
    assert [row["status"] for row in sweeps.sweep_rows(sweep)] == ["completed", "running"]
    lock.release()


def test_a_table_that_cannot_be_written_is_printed_all_the_same(sweep: Path, tmp_path: Path) -> None:
    (sweep / "sweep.csv").mkdir()
    outcome = run_train(*SHORT_SWEEP, "test=false", "resume=auto", folder=tmp_path)
    assert "No table: cannot write" in outcome.out and outcome.out.count("completed") == 2


def test_a_group_is_not_chosen_anew_for_a_run_that_goes_on(tmp_path: Path) -> None:
    assert run_train(*QUICK, *BARE, "trainer.max_epochs=1", folder=tmp_path).exit_code == 0
    last = only_run(tmp_path) / "checkpoints" / "last.ckpt"
    outcome = run_train(f"ckpt_path={last}", "trainer=cpu", folder=tmp_path)
    assert outcome.exit_code == 2 and "trainer= cannot be changed when a run is resumed" in outcome.err


# --- what a run's own config may say -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"logger": {"csv": {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "/elsewhere"}}},
            "writes to",
        ),
        *[
            ({"logger": {"csv": {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": place}}}, "writes to")
            for place in ("~/elsewhere", "$HOME/elsewhere", "elsewhere", "file:///tmp/elsewhere")
        ],
        ({"seed": 10**30}, "that no field takes"),
        ({"seed": "${oc.env:HOME}"}, "no plain value"),
        ({"model": {"_args_": [1]}}, "no plain value"),
    ],
)
def test_a_config_that_was_changed_by_hand_is_refused(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    outcome = run_train(*QUICK, "callbacks=none", "trainer.max_epochs=1", "logger=csv", folder=tmp_path)
    run = only_run(tmp_path)
    config = yaml.safe_load((run / "config.yaml").read_text())
    for name, value in change.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    outcome = run_train(f"ckpt_path={run}/checkpoints/last.ckpt", folder=tmp_path)
    assert outcome.exit_code == 2 and reason in outcome.err, outcome.err


def test_a_config_of_references_to_itself_is_refused(tmp_path: Path) -> None:
    from attention_visualizer.training.resuming import read_config

    path = tmp_path / "config.yaml"
    path.write_text("a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: [*b, *b, *b]\n")
    with pytest.raises(UserError, match="refers to parts of itself"):
        read_config(path)
    path.write_text("a: !!python/object/apply:os.system [true]\n")
    with pytest.raises(UserError, match="cannot be read"):
        read_config(path)
