"""Whatever is asked for: it works, or one clear error comes before any work, and nothing is left behind."""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from PIL import Image

from attention_visualizer.commands import analyze_checkpoint
from attention_visualizer.data import datasets, mnist
from attention_visualizer.training import run as training_run
from tests.helpers.overrides import analyze_fields, overrides, right_ones, train_fields
from tests.helpers.runs import BRIEF, ENVIRONMENT, Outcome, only_run, run_script, run_train

NUMBERS = itertools.count()


def always_the_same(examples: int) -> settings:
    """So many examples, in every run of the tests; the environment variable EXAMPLES asks for more."""
    return settings(
        max_examples=int(os.environ.get("EXAMPLES", examples)),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
    )


class Begun(SystemExit):
    """Stands for the work: all was found to be right."""


@pytest.fixture(scope="module", autouse=True)
def no_network_and_digits_read_once() -> Iterator[None]:
    def unavailable(*arguments: Any, **named: Any) -> None:
        raise mnist.MnistUnavailable("there is no network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mnist, "download", unavailable)
        patch.setattr(datasets, "load_digits", functools.cache(datasets.load_digits))
        yield


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(*arguments: Any, **named: Any) -> None:
        raise Begun(0)

    monkeypatch.setattr(training_run, "fit", begin)
    monkeypatch.setattr(analyze_checkpoint, "write_analysis", begin)


def assert_works_or_is_one_clear_error(outcome: Outcome, left: list[str]) -> None:
    said = outcome.out + outcome.err
    assert "Traceback" not in said, said[-2000:]
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    if outcome.exit_code == 0:
        assert errors == []
        return
    assert outcome.exit_code == 2, said
    assert len(errors) == 1 and outcome.err.splitlines()[-1] == errors[0], said
    assert 10 < len(errors[0]) < 1000 and errors[0].isprintable()
    assert left == []


def fresh(root: Path) -> Path:
    """Where a command line with ".." in it stays inside."""
    folder = root / str(next(NUMBERS)) / "a" / "b"
    folder.mkdir(parents=True)
    return folder


def content(folder: Path) -> list[str]:
    """Names, and when files were written."""
    paths = sorted(folder.rglob("*"))
    return [f"{path.relative_to(folder)} {path.stat().st_mtime_ns if path.is_file() else ''}" for path in paths]


# --- train.py --------------------------------------------------------------------------------------------------


def train_with(chosen: list[str], root: Path) -> Outcome:
    folder = fresh(root)
    outcome = run_train(*BRIEF, *chosen, folder=folder)
    assert_works_or_is_one_clear_error(outcome, [str(path) for path in folder.parents[1].rglob("*")][2:])
    shutil.rmtree(folder.parents[1])
    return outcome


def test_random_overrides_train_or_are_refused(tmp_path: Path, no_work: None) -> None:
    codes = []

    @always_the_same(60)
    @given(overrides(train_fields()))
    def check(chosen: list[str]) -> None:
        codes.append(train_with(chosen, tmp_path).exit_code)

    check()
    assert {0, 2} == set(codes)  # neither refuses all nor nothing


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model=0", "group override"),
        ("~optimizer=1.5", "deletion"),
        ("optimizer=[]", "optimizer=None"),
        ("~optimizer", "optimizer=None"),
        ("~compile", "compile is needed"),
        ("+callbacks=[6,2,1]", "+callbacks=[6,2,1]: cannot be understood"),
        ("callbacks.attention_logger=true", "callbacks.attention_logger=True"),
        ("callbacks.attention_logger._target_=35", "callbacks.attention_logger._target_=35"),
        ("callbacks.attention_logger.model=-1e30", "callbacks.attention_logger.model=-1e+30: give a text"),
        ("callbacks.attention_logger.model=nope", "has no such part"),
        ("callbacks.attention_logger.model=test_accuracy", "test_accuracy"),
        ("+callbacks.attention_logger.new=1", "callbacks.attention_logger.new: there is no such field"),
        ("+callbacks.ema._target_=nope.Nope", "callbacks.ema._target_=nope.Nope"),
        ("logger.tensorboard._target_=[1]", "logger.tensorboard"),
        ("logger.tensorboard.name=8", "logger.tensorboard.name=8: give a text or null"),
        ("+logger.csv.new=6", "logger.csv"),
        ("trainer.max_time=7", "trainer.max_time=7: give a text or a dictionary or null"),
        ("trainer.profiler=0.94", "trainer.profiler=0.94: give a text or null"),
        ("trainer.val_check_interval=[12,3]", "trainer.val_check_interval"),
        ("trainer.num_nodes=2", "one device"),
        ("trainer.gradient_clip_algorithm=0.0", "gradient_clip_algorithm"),
        ("trainer.barebones=true", "barebones"),
        ("trainer.overfit_batches=0.5", "trainer.overfit_batches=0.5 leaves no batch"),
        ("trainer.max_steps=1", "ends before the first validation, which is after 2 steps"),
        ("model.num_classes=1000000", "does not fit the data set digits"),
        ("model.embed_dim=999999", "GB of memory"),
        ("model.embed_dim=1000000000000000000000000000000", "model.embed_dim"),
        ("model.num_layers=1000000000", "give at most 1000"),
        ("seed='\x1b]0;title\x07'", "]0;title"),
        ("seed=" + "a" * 9000, "[...]"),
    ],
)
def test_what_random_overrides_found(override: str, named: str, tmp_path: Path, no_work: None) -> None:
    chosen = [override, "callbacks=ema"] if override.startswith("+callbacks.ema") else [override]
    outcome = train_with(chosen, tmp_path)
    assert outcome.exit_code == 2 and named in outcome.err


@pytest.mark.long
def test_random_combinations_of_right_values_train(tmp_path: Path) -> None:
    @always_the_same(8)
    @given(right_ones())
    def check(chosen: list[str]) -> None:
        folder = fresh(tmp_path)
        outcome = run_train("data=digits", *chosen, folder=folder)
        assert outcome.exit_code == 0, outcome.err[-2000:]
        run = only_run(folder)
        assert json.loads((run / "run.json").read_text())["status"] == "completed"
        assert (run / "checkpoints" / "best.ckpt").is_file() and (run / "checkpoints" / "last.ckpt").is_file()
        shutil.rmtree(folder)

    check()


@pytest.mark.long
def test_random_overrides_train_to_the_end_or_are_refused(tmp_path: Path) -> None:
    """As the quick test, with real training; what diverges says so and keeps its run folder."""
    brief = ("trainer.limit_val_batches=1", "trainer.limit_test_batches=1")

    @always_the_same(25)
    @given(overrides(train_fields(), most=1))
    def check(chosen: list[str]) -> None:
        folder = fresh(tmp_path)
        outcome = run_train(*BRIEF, *brief, *chosen, folder=folder)
        left = [str(path) for path in folder.parents[1].rglob("*")][2:]
        assert_works_or_is_one_clear_error(outcome, [] if "training diverged" in outcome.err else left)
        shutil.rmtree(folder.parents[1])

    check()


# --- analyze.py ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run and some pictures in it."""
    folder = fresh(tmp_path_factory.mktemp("trained"))
    outcome = run_train(*BRIEF, "logger=none", "test=false", folder=folder)
    assert outcome.exit_code == 0, outcome.err
    (folder / "photos").mkdir()
    Image.new("L", (31, 29), 97).save(folder / "photos" / "grey.png")
    return folder


def test_random_overrides_are_analysed_or_refused(trained: Path, no_work: None) -> None:
    before, codes = content(trained), []

    @always_the_same(80)
    @given(overrides(analyze_fields(), most=1))
    @example(["num_samples=3"])  # few of so many random ones are right
    def check(chosen: list[str]) -> None:
        outcome = run_script("analyze.py", *chosen, folder=trained, environment=ENVIRONMENT)
        left = sorted(set(content(trained)) ^ set(before))
        assert_works_or_is_one_clear_error(outcome, left)
        assert left == []
        codes.append(outcome.exit_code)

    check()
    assert {0, 2} == set(codes)


@pytest.mark.parametrize(
    ("override", "named"),
    [("~ckpt", "ckpt is needed"), ("~chapters=quick", "chapters is needed"), ("class=1e3", "class")],
)
def test_what_random_overrides_of_the_analysis_found(override: str, named: str, trained: Path, no_work: None) -> None:
    outcome = run_script("analyze.py", override, folder=trained, environment=ENVIRONMENT)
    assert outcome.exit_code == 2 and outcome.err.startswith("error: ") and named in outcome.err
