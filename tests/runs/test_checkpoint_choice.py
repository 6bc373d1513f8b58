"""`best`, `last`, a run, a sweep or all of them mean one checkpoint, whose file is read once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.runs import checkpoint_choice
from attention_visualizer.runs.checkpoint_choice import choose_checkpoint
from attention_visualizer.runs.folders import RunFolder
from attention_visualizer.support.errors import UserError
from tests.helpers.checkpoints import content_of


@pytest.fixture(scope="module")
def template(model: VisionTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "best.ckpt"
    torch.save(content_of(model, accuracy=0.5), path)
    return path


@pytest.fixture
def make_run(template: Path, tmp_path: Path) -> Callable[..., RunFolder]:
    """Makes a run below tmp_path/runs; accuracy None leaves the manifest without metrics, as in a running run."""

    def make(
        name: str, accuracy: float | None = None, files: tuple[str, ...] = ("best", "last"), data: str = "mnist"
    ) -> RunFolder:
        run = RunFolder(tmp_path / "runs" / name)
        run.checkpoints.mkdir(parents=True)
        for file in files:
            shutil.copy(template, run.checkpoints / f"{file}.ckpt")
        metrics = {} if accuracy is None else {"metrics": {"validation_accuracy": accuracy}}
        run.update_manifest(status="completed", data={"name": data}, **metrics)
        return run

    return make


def test_nothing_to_choose_from(tmp_path: Path, make_run: Callable[..., RunFolder]) -> None:
    for options in ({}, {"run": "all"}, {"ckpt": "last"}):
        with pytest.raises(UserError, match=r"no checkpoint yet in .*/runs/: .* `attention-visualizer train`"):
            choose_checkpoint(root=tmp_path / "runs", **options)
    make_run("2025-01-01_00-00-00-000000", files=("last",))
    for options in ({}, {"run": "all"}):
        with pytest.raises(UserError, match=r"no best\.ckpt yet in .*/runs/"):
            choose_checkpoint(root=tmp_path / "runs", **options)
    with pytest.raises(UserError, match="run=nowhere is no run or sweep folder"):
        choose_checkpoint(run="nowhere", root=tmp_path / "runs")


def test_best_is_the_newest_run_s(tmp_path: Path, make_run: Callable[..., RunFolder]) -> None:
    make_run("2025-01-01_00-00-00-000000", 0.99)
    newest = make_run("2025-01-02_00-00-00-000000", 0.9321)
    choice = choose_checkpoint(root=tmp_path / "runs")
    assert choice.path == newest.best and choice.run == newest
    assert choice.reason == "best.ckpt of the newest run 2025-01-02_00-00-00-000000 (validation accuracy 93.21%)"
    last = choose_checkpoint("last", root=tmp_path / "runs")
    assert (last.path, last.reason) == (newest.last, "last.ckpt of the newest run 2025-01-02_00-00-00-000000")


def test_a_run_that_was_not_completed_is_said_to_be_so(tmp_path: Path, make_run: Callable[..., RunFolder]) -> None:
    run = make_run("2025-01-02_00-00-00-000000", 0.9321)
    run.manifest_path.write_text(run.manifest_path.read_text().replace("completed", "interrupted"))
    reason = choose_checkpoint(root=tmp_path / "runs").reason
    assert reason.endswith("(validation accuracy 93.21%, of a run that was not completed)")


def test_a_running_run_counts_and_newer_ones_without_are_mentioned(
    tmp_path: Path, make_run: Callable[..., RunFolder]
) -> None:
    running = make_run("2025-01-02_00-00-00-000000")
    make_run("2025-01-03_00-00-00-000000", files=())
    make_run("2025-01-04_00-00-00-000000", files=("last",))
    choice = choose_checkpoint(root=str(tmp_path / "runs"))
    assert choice.path == running.best
    assert "(validation accuracy 50.00%)" in choice.reason  # from the checkpoint itself
    assert choice.reason.endswith("newer ones have none: 2025-01-04_00-00-00-000000, 2025-01-03_00-00-00-000000")
    assert choose_checkpoint("last", root=tmp_path / "runs").path.parts[-3] == "2025-01-04_00-00-00-000000"


def test_a_sweep_stands_for_its_best_job(tmp_path: Path, make_run: Callable[..., RunFolder]) -> None:
    sweep = "2025-02-01_00-00-00-000000_sweep"
    make_run("2025-01-01_00-00-00-000000", 0.99)
    make_run(f"{sweep}/0_model.embed_dim-8", 0.7)
    best = make_run(f"{sweep}/1_model.embed_dim-16", 0.9)
    make_run(f"{sweep}/2_model.embed_dim-32")  # 0.5 in its checkpoint
    make_run(f"{sweep}/3_model.embed_dim-64", 0.95, files=())
    (tmp_path / "runs" / sweep / "multirun.yaml").touch()
    expected = f"best.ckpt of {best.name}, the best job of the newest sweep {sweep} (validation accuracy 90.00%)"
    choice = choose_checkpoint(root=tmp_path / "runs")
    assert (choice.path, choice.reason) == (best.best, expected)
    for by_name in (sweep, str(tmp_path / "runs" / sweep)):
        assert choose_checkpoint(run=by_name, root=tmp_path / "runs").path == best.best
    assert choose_checkpoint(str(tmp_path / "runs" / sweep)).path == best.best
    job = choose_checkpoint(run=f"{sweep}/0_model.embed_dim-8", root=tmp_path / "runs")
    assert job.reason == "best.ckpt of run 0_model.embed_dim-8 (validation accuracy 70.00%)"


def test_run_all_compares_only_runs_of_the_newest_data_set(tmp_path: Path, make_run: Callable[..., RunFolder]) -> None:
    make_run("2025-01-01_00-00-00-000000", 0.999, data="digits")
    best = make_run("2025-01-02_00-00-00-000000", 0.98)
    make_run("2025-01-03_00-00-00-000000", 0.97)
    choice = choose_checkpoint(run="all", root=tmp_path / "runs")
    assert choice.path == best.best
    assert "the best of 2 (validation accuracy 98.00%); 1 on other data than the newest (mnist)" in choice.reason


def test_a_broken_manifest_does_not_stop_the_choice(tmp_path: Path, make_run: Callable[..., RunFolder]) -> None:
    run = make_run("2025-01-02_00-00-00-000000", 0.9)
    for text in ("{", '{"metrics": null}', '{"metrics": {"validation_accuracy": "high"}, "data": "mnist"}'):
        run.manifest_path.write_text(text)
        assert choose_checkpoint(root=tmp_path / "runs").path == run.best


def test_ckpt_as_a_path(tmp_path: Path, saved: Path, make_run: Callable[..., RunFolder]) -> None:
    run = make_run("2025-01-02_00-00-00-000000", 0.9)
    assert choose_checkpoint(str(saved)).path == saved and choose_checkpoint(str(saved)).run is None
    assert choose_checkpoint(str(run.last)).run == run
    assert choose_checkpoint(str(run.path)).path == run.best
    with pytest.raises(UserError, match=r"ckpt=.*nowhere\.ckpt does not exist"):
        choose_checkpoint(str(tmp_path / "nowhere.ckpt"))
    with pytest.raises(UserError, match="is a folder"):
        choose_checkpoint(str(tmp_path))
    with pytest.raises(UserError, match="leave out run="):
        choose_checkpoint(str(saved), run="all")


@pytest.fixture
def read_paths(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read, in order."""
    paths: list[Path] = []
    load = checkpoint_choice.load_checkpoint

    def read(path: Path, **options: Any) -> Any:
        paths.append(path)
        return load(path, **options)

    monkeypatch.setattr(checkpoint_choice, "load_checkpoint", read)
    return paths


@pytest.mark.parametrize("accuracy", [0.9, None])
@pytest.mark.parametrize("run", [None, "all"])
def test_a_checkpoint_is_read_once(
    tmp_path: Path, make_run: Callable[..., RunFolder], read_paths: list[Path], run: str | None, accuracy: float | None
) -> None:
    """Also where the choice needs its accuracy (None: only the checkpoint has it)."""
    best = make_run("2025-01-02_00-00-00-000000", accuracy).best
    choice = choose_checkpoint("best", run, tmp_path / "runs")
    assert read_paths == ([] if accuracy else [best])
    assert choice.loaded is choice.loaded and choice.loaded.step == 17 and choice.manifest["status"] == "completed"
    assert read_paths == [best]


def test_a_damaged_choice_names_the_run_s_whole_checkpoint(tmp_path: Path, make_run: Callable[..., RunFolder]) -> None:
    run = make_run("2025-01-02_00-00-00-000000", 0.9)
    run.best.write_bytes(run.best.read_bytes()[:-101])
    with pytest.raises(UserError, match=r"best\.ckpt is truncated .*; .*last\.ckpt \(step 17\) is whole"):
        _ = choose_checkpoint(root=tmp_path / "runs").loaded
