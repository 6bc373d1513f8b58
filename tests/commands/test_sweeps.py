"""Sweeps: their jobs, one that fails, the table at the end."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra.core.utils import JobReturn
from omegaconf import DictConfig

from attention_visualizer.training.sweeps import SweepTable
from tests.helpers.runs import (
    BARE,
    BRIEF,
    PROJECT,
    Outcome,
    TrainedRun,
    assert_same_training,
    last,
    only_run,
    run_train,
)


@dataclass(frozen=True)
class Sweep:
    path: Path
    outcome: Outcome
    returned: list[float]  # to Hydra's sweeper, for each job


SWEPT = ("data=digits", "data.batch_size=103", "model.num_layers=1", "model.mlp_dim=29", "trainer.max_epochs=1")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    folder = tmp_path_factory.mktemp("sweep")
    returned: list[float] = []

    def note(self: SweepTable, config: DictConfig, job_return: JobReturn) -> None:
        returned.append(job_return.return_value)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(SweepTable, "on_job_end", note)
        outcome = run_train("-m", "model.embed_dim=16,30,32", *SWEPT, *BARE, folder=folder)
    return Sweep(only_run(folder), outcome, returned)


def test_a_sweep_goes_on_past_a_job_that_fails_and_fails_in_the_end(sweep: Sweep) -> None:
    assert sweep.outcome.exit_code != 0
    rows = list(csv.DictReader((sweep.path / "sweep.csv").open()))
    assert [row["status"] for row in rows] == ["completed", "failed", "completed"]
    assert list(rows[0])[:3] == ["run", "status", "model.embed_dim"]
    assert [row["model.embed_dim"] for row in rows] == ["16", "30", "32"]
    assert [bool(row["validation_accuracy"]) for row in rows] == [True, False, True]
    assert [bool(row["seconds"]) for row in rows] == [True, False, True]
    sizes = [int(row["parameters"]) for row in rows if row["parameters"]]
    assert len(sizes) == 2 and sizes[0] < sizes[1]
    text = sweep.outcome.out + sweep.outcome.err
    assert "model.embed_dim=30 is not divisible by num_heads=4" in text and "Traceback" not in text
    failed = TrainedRun(sweep.path / rows[1]["run"], sweep.outcome).manifest
    assert failed["status"] == "failed" and "num_heads" in failed["error"]


def test_a_sweeper_that_searches_is_told_a_number_for_a_job_that_failed(sweep: Sweep) -> None:
    """Optuna ends a study at a NaN."""
    first, failed, third = sweep.returned
    assert first > 0 and third > 0 and failed == 0


def test_a_sweep_ends_with_a_table(sweep: Sweep) -> None:
    table = sweep.outcome.out[sweep.outcome.out.index("Sweep runs/") :]
    for word in ("embed_dim", "validation", "accuracy", "parameters", "seconds", "completed", "failed"):
        assert word in table
    assert f"python {PROJECT / 'analyze.py'} run=runs/{sweep.path.name}" in table
    shown = [float(share) for share in re.findall(r"(\d+\.\d\d)%", table)]
    assert len(shown) == 2 and shown == sorted(shown, reverse=True)
    assert re.findall(r"(\d+\.\d\d)% best", table) == [f"{shown[0]:.2f}"]


def test_a_sweeps_jobs_have_tidy_folders_of_their_own(sweep: Sweep) -> None:
    jobs = run_names(sweep.path)
    assert [name.split("_")[0] for name in jobs] == ["0", "1", "2"]
    for name, width in zip(jobs, (16, 30, 32), strict=True):
        assert re.fullmatch(r"[\w.\-]+", name) and f"embed_dim-{width}" in name
    for name in (jobs[0], jobs[2]):
        assert (sweep.path / name / "checkpoints" / "best.ckpt").is_file()
        assert (sweep.path / name / ".hydra" / "config.yaml").is_file()


def run_names(sweep_folder: Path) -> list[str]:
    return sorted(path.name for path in sweep_folder.iterdir() if path.is_dir())


def test_a_folders_name_tells_the_swept_value_after_many_overrides(tmp_path: Path) -> None:
    outcome = run_train("-m", "trainer.max_epochs=1,2", *BRIEF[:-2], *BRIEF[-1:], *BARE, folder=tmp_path)
    assert outcome.exit_code == 0, outcome.err
    first, second = run_names(only_run(tmp_path))
    assert "max_epochs-1" in first and "max_epochs-2" in second


def test_a_sweeps_jobs_leave_the_test_set_alone(sweep: Sweep, tmp_path: Path) -> None:
    for name in (run_names(sweep.path)[0], run_names(sweep.path)[2]):
        metrics = TrainedRun(sweep.path / name, sweep.outcome).manifest["metrics"]
        assert "validation_accuracy" in metrics and "test_accuracy" not in metrics
    outcome = run_train("-m", "seed=3", "test=true", *SWEPT, "model.embed_dim=8", *BARE, folder=tmp_path)
    assert outcome.exit_code == 0, outcome.err
    path = only_run(tmp_path)
    assert "test_accuracy" in TrainedRun(path / run_names(path)[0], outcome).manifest["metrics"]


def test_a_job_trains_as_a_run_of_its_own_does(sweep: Sweep, tmp_path: Path) -> None:
    outcome = run_train("model.embed_dim=32", *SWEPT, *BARE, "test=false", folder=tmp_path)
    assert outcome.exit_code == 0, outcome.err
    job = sweep.path / run_names(sweep.path)[2]
    assert_same_training(last(job), last(only_run(tmp_path)))
