"""A user's mistake is one line on stderr, before any work, with a code other than 0 and no folder left behind."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import ConfigKeyError

from attention_visualizer.commands import help_text
from attention_visualizer.commands.command_line import error_line
from attention_visualizer.data.mnist import FILES
from attention_visualizer.models.vit_config import ViTConfig
from attention_visualizer.support.errors import UserError
from attention_visualizer.training.overrides import override
from attention_visualizer.training.sweeps import job_folder, sweep_rows
from tests.helpers.runs import BARE, BRIEF, PROJECT, Outcome, run_folders, run_process, run_train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every mistake is made; whatever one leaves behind, the next one's test would find."""
    return tmp_path_factory.mktemp("mistakes")


def assert_refused(outcome: Outcome, folder: Path, *named: str) -> None:
    left = run_folders(folder)
    for path in left:  # so that only this mistake's test fails
        path.rename(folder / f"left_{path.name}")
    assert outcome.exit_code == 2, outcome.err[-1500:]
    lines = outcome.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), outcome.err
    for words in named:
        assert words in lines[0]
    assert left == []


# --- what is asked for -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "named"),
    [
        # unknown keys and choices
        ("foo=1", "foo"),
        ("+foo=1", "foo"),
        ("model.foo=1", "foo"),
        ("+model.foo=1", "model.foo"),
        ("+trainer.foo=1", "trainer.foo"),
        ("+logger.tensorboard.foo=1", "foo"),
        ("+callbacks.attention_logger.foo=1", "foo"),
        ("data=cifar", "cifar"),
        ("model=resnet", "resnet"),
        ("experiment=nope", "nope"),
        ("model.embed_dim", "embed_dim"),
        # wrong types
        ("model.embed_dim=abc", "model.embed_dim=abc"),
        ("model.embed_dim=1.5", "model.embed_dim=1.5"),
        ("model.dropout=abc", "model.dropout"),
        ("model.pooling=max", "model.pooling"),
        ("data.batch_size=abc", "data.batch_size"),
        ("data.augment=maybe", "data.augment"),
        ("data.name=cifar", "data.name"),
        ("optimizer.learning_rate=abc", "optimizer.learning_rate"),
        ("trainer.max_epochs=1.5", "trainer.max_epochs"),
        ("trainer.gradient_clip_val=abc", "trainer.gradient_clip_val"),
        ("trainer.precision=abc", "precision"),
        ("callbacks.attention_logger.head_grids=abc", "head_grids"),
        ("seed=abc", "seed"),
        ("test=abc", "test"),
        # sizes that do not fit together
        ("model.embed_dim=31", "model.embed_dim=31"),
        ("model.patch_size=5", "model.patch_size=5"),
        ("model.num_classes=7", "model.num_classes=7"),
        ("model.img_size=35", "model.img_size=35"),
        ("data.batch_size=1298", "data.batch_size=1298"),
        # zero, negative, NaN, infinite
        ("model.num_layers=0", "model.num_layers=0"),
        ("model.mlp_dim=-1", "model.mlp_dim=-1"),
        ("model.dropout=nan", "model.dropout=nan"),
        ("model.attention_dropout=1", "model.attention_dropout=1"),
        ("data.batch_size=0", "data.batch_size=0"),
        ("data.eval_batch_size=-3", "data.eval_batch_size=-3"),
        ("data.rotation=nan", "data.rotation=nan"),
        ("data.split_seed=-1", "data.split_seed=-1"),
        ("optimizer.learning_rate=0", "optimizer.learning_rate=0"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate=nan"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay=-1"),
        ("optimizer.beta1=inf", "optimizer.beta1=inf"),
        ("trainer.max_epochs=0", "trainer.max_epochs=0"),
        ("trainer.max_epochs=-1", "trainer.max_epochs=-1"),
        ("trainer.max_steps=0", "trainer.max_steps=0"),
        ("trainer.max_steps=-3", "max_steps"),
        ("trainer.gradient_clip_val=nan", "trainer.gradient_clip_val=nan"),
        ("trainer.gradient_clip_val=-1", "trainer.gradient_clip_val=-1"),
        ("trainer.limit_train_batches=0", "limit_train_batches"),
        ("trainer.limit_train_batches=-1", "limit_train_batches"),
        ("trainer.limit_train_batches=nan", "limit_train_batches"),
        ("trainer.limit_train_batches=0.001", "limit_train_batches"),
        ("trainer.limit_val_batches=0", "limit_val_batches"),
        ("trainer.limit_test_batches=0", "limit_test_batches"),
        ("trainer.check_val_every_n_epoch=0", "check_val_every_n_epoch"),
        ("trainer.check_val_every_n_epoch=2", "check_val_every_n_epoch"),  # of one epoch: never
        ("trainer.val_check_interval=100", "val_check_interval"),
        ("trainer.accumulate_grad_batches=0", "accumulate_grad_batches"),
        ("trainer.fast_dev_run=true", "fast_dev_run"),
        ("trainer.enable_checkpointing=false", "enable_checkpointing"),
        ("trainer.devices=0", "devices"),
        ("callbacks.attention_logger.every_n_epochs=0", "AttentionLogger: every_n_epochs=0: give at least 1"),
        ("callbacks.attention_logger.head_grids=-1", "AttentionLogger: head_grids=-1: give 0 or more"),
        ("seed=-1", "seed=-1"),
        ("seed=nan", "seed"),
        # checkpoints
        ("ckpt_path=nothing.ckpt", "nothing.ckpt"),
        ("ckpt_path=.", "folder"),
    ],
)
def test_mistakes_are_refused(folder: Path, override: str, named: str) -> None:
    assert_refused(run_train(*BRIEF, override, folder=folder), folder, named)


def test_a_gpu_that_is_not_there(folder: Path, no_gpu: None) -> None:
    assert_refused(run_train(*BRIEF, "trainer=gpu", folder=folder), folder, "GPU", "trainer=cpu")


# --- what is given ---------------------------------------------------------------------------------------------


def test_damaged_mnist_files_are_refused(folder: Path, tmp_path: Path) -> None:
    for name in FILES:
        (tmp_path / name).write_bytes(b"\0\0\x08\x01\0\0\0\x05abc")
    outcome = run_train(f"data.data_dir={tmp_path}", "model.embed_dim=8", *BARE, folder=folder)
    assert_refused(outcome, folder, str(tmp_path / "train-images-idx3-ubyte"))
    by_environment = run_train("model.embed_dim=8", *BARE, folder=folder, MNIST_DIR=str(tmp_path))
    assert_refused(by_environment, folder, str(tmp_path / "train-images-idx3-ubyte"))


def test_a_runs_folder_that_cannot_be_made(folder: Path) -> None:
    (folder / "in_the_way").write_text("a file")
    for runs_dir in ("in_the_way", "in_the_way/deeper"):
        assert_refused(run_train(*BRIEF, f"runs_dir={runs_dir}", folder=folder), folder, runs_dir)


def test_a_sweep_folder_that_cannot_be_made(folder: Path) -> None:
    (folder / "in_its_way").write_text("a file")
    outcome = run_train("-m", *BRIEF, *BARE, "seed=1,2", "runs_dir=in_its_way", folder=folder)
    assert_refused(outcome, folder, "in_its_way")


@pytest.mark.parametrize("override", ["model.embed_dim=24,abc", "model.foo=1,2", "data=digits,cifar"])
def test_a_sweep_over_what_does_not_exist_begins_with_no_job(folder: Path, override: str) -> None:
    assert_refused(run_train("-m", *BRIEF, *BARE, override, folder=folder), folder)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("-m", "seed=range(0)"), "no job"),
        (("-m", "seed=1,2", "runs_dir="), "runs_dir= is empty"),
        (("-m", "seed=1,2", "hydra.sweep.subdir=../../x"), "no job"),
        (("trainer.val_check_interval=3.0",), "an epoch has 2 batches"),
        (("trainer.val_check_interval=1.5",), "trainer.val_check_interval=1.5"),
        (("trainer.strategy=ddp_spawn",), "trainer.strategy=ddp_spawn"),
        (("ckpt_path=https://a/b",), "is an address"),
    ],
)
def test_what_came_too_late_is_refused_before_any_work(folder: Path, arguments: tuple[str, ...], named: str) -> None:
    assert_refused(run_train(*arguments, *BRIEF, *BARE, folder=folder), folder, named)


def test_a_training_that_diverges_says_so(folder: Path) -> None:
    huge = ("optimizer.learning_rate=1e30", "trainer.max_epochs=2", "trainer.gradient_clip_val=null")
    outcome = run_train(*BRIEF, *huge, "logger=none", folder=folder)
    assert outcome.exit_code != 0
    (left,) = run_folders(folder)
    left.rename(folder / f"left_{left.name}")
    assert "Traceback" not in outcome.err and outcome.err.splitlines()[-1].startswith("error: "), outcome.err[-300:]
    assert "learning_rate" in outcome.err


# --- the program itself ----------------------------------------------------------------------------------------


def test_a_real_process_prints_the_same_line(folder: Path) -> None:
    outcome = run_process(*BRIEF, "model.embed_dim=31", folder=folder)
    assert_refused(outcome, folder, "model.embed_dim=31 is not divisible by num_heads=3")
    assert outcome.out == ""


def test_the_traceback_can_be_asked_for(folder: Path) -> None:
    outcome = run_train(*BRIEF, "model.embed_dim=abc", folder=folder, HYDRA_FULL_ERROR="1")
    assert outcome.exit_code != 0 and "Traceback" in outcome.err and run_folders(folder) == []


def test_help_explains_groups_and_fields_with_their_values(folder: Path) -> None:
    outcome = run_train("--help", "model.embed_dim=64", "optimizer=muon", folder=folder, COLUMNS="80")
    assert outcome.exit_code == 0
    for words in (
        f"python {PROJECT / 'train.py'}",
        "model.embed_dim=64 ",
        "optimizer.muon=true",
        "10 for mnist",
        "logger: csv, none,",
    ):
        assert words in outcome.out
    fields = outcome.out[outcome.out.index("Groups") :]
    assert max(map(len, fields.splitlines())) <= 80
    for private in ("_target_", "image_data_module", "vision_transformer", "run_folder", "classifier"):
        assert private not in fields
    assert run_folders(folder) == []
    wrong = run_train("--help", "model.embed=64", folder=folder)
    assert wrong.exit_code == 2 and "did you mean model.embed_dim=" in wrong.err


@pytest.mark.parametrize("name", ["train", "analyze"])
def test_every_field_of_ours_is_explained_and_no_other(name: str) -> None:
    fields, _ = help_text.fields_of(PROJECT / "conf", name)
    explained = help_text.explanations_of(PROJECT / "conf", name)
    if name == "train":
        assert set(explained) <= set(fields)
        ours = {field for field in fields if not field.startswith(("trainer.", *help_text.HIDDEN))}
        assert ours - set(explained) == set()
        for field, hint in get_type_hints(ViTConfig).items():
            assert all(choice in explained[f"model.{field}"] for choice in get_args(hint))
    else:
        assert set(fields) == set(explained)


@pytest.mark.parametrize(
    ("name", "word", "meant"),
    [
        ("train", "epochs=3", "trainer.max_epochs="),
        ("train", "batch_size=3", "data.batch_size="),
        ("train", "model.embed=64", "model.embed_dim="),
        ("train", "model.learning_rate=1", "optimizer.learning_rate=?"),
        ("train", "seeed=1", "seed="),
        ("train", "trainer.max_epoch=3", "trainer.max_epochs="),
        ("train", "lr=0.1", "optimizer.learning_rate="),
        ("train", "learning_rate=0.1", "optimizer.learning_rate="),
        ("train", "--epochs", "trainer.max_epochs="),
        ("train", "seed=1", ""),
        ("train", "logger.csv=null", ""),
        ("analyze", "sample=3", "samples= or num_samples="),
        ("analyze", "chapter=[heads]", "chapters="),
    ],
)
def test_a_misspelt_field_is_asked_back(name: str, word: str, meant: str) -> None:
    line = help_text.did_you_mean(PROJECT / "conf", name, [word])
    assert (f"did you mean {meant}" in line) if meant else (line == ""), line


def test_help_knows_the_users_own_config_files(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "wide.yaml").write_text("# @package _global_\nmodel: {embed_dim: 260}\n")
    for flag in (["--config-dir", str(tmp_path / "mine")], [f"--config-dir={tmp_path / 'mine'}"]):
        outcome = run_train("--help", *flag, "experiment=wide", folder=folder)
        assert outcome.exit_code == 0 and "model.embed_dim=260 " in outcome.out, outcome.err
        outcome = run_train(*flag, "experiment=wide", "epochs=3", folder=folder)
        assert outcome.exit_code == 2 and "did you mean trainer.max_epochs=" in outcome.err
        assert str(tmp_path) not in outcome.err


def test_a_flag_that_is_a_field_is_one_line(folder: Path) -> None:
    outcome = run_train("--epochs", "3", folder=folder)
    assert outcome.exit_code == 2 and outcome.err.count("\n") == 1 and "trainer.max_epochs=" in outcome.err


def test_options_whose_help_python_3_14_checks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Since 3.14 argparse expands each help when its option is added, and Hydra's for --shell-completion is no text."""
    add = argparse._ActionsContainer.add_argument

    def add_and_check(container: Any, *names: str, **options: Any) -> argparse.Action:
        if "%" in (options.get("help") or ""):  # the first thing that it asks of a help
            options["help"] % {"prog": "", "default": None}
        return add(container, *names, **options)

    monkeypatch.setattr(argparse._ActionsContainer, "add_argument", add_and_check)
    own = vars(argparse.ArgumentParser).copy()
    outcome = run_train("--hydra-help", folder=folder)
    assert outcome.exit_code == 0, outcome.err
    assert "Install or Uninstall shell completion" in outcome.out
    assert vars(argparse.ArgumentParser) == own


# --- the parts -------------------------------------------------------------------------------------------------


def test_one_line_joins_what_and_where() -> None:
    assert error_line(UserError("data.batch_size=0:\n  give more")) == "data.batch_size=0: give more"
    inner = ConfigKeyError("Key 'foo' not in 'Model'\n    full_key: model.foo\n    object_type=Model")
    outer = HydraException("Could not override 'model.foo'.\nTo append to your config use +model.foo=1")
    outer.__cause__ = inner
    line = error_line(outer)
    assert "\n" not in line and "Could not override 'model.foo'" in line and "there is no field foo" in line
    assert "full_key" not in line and "object_type" not in line and "append" not in line


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ("model.embed_dim-32", "7_model.embed_dim-32"),
        ("data.data_dir-/some where/é_x", "7_data.data_dir--some-where-é_x"),
        ("", "7"),
        ("x" * 300, "7_" + "x" * 238),
    ],
)
def test_job_folders_need_no_quoting(overrides: str, name: str) -> None:
    assert job_folder(7, overrides) == name


def test_sweep_rows_are_in_the_order_of_the_jobs_and_name_what_differs(tmp_path: Path) -> None:
    for number in (0, 2, 10):
        path = tmp_path / f"{number}_seed-{number}"
        (path / ".hydra").mkdir(parents=True)
        overrides = ["data=digits", f"seed={number}", "+callbacks.ema.decay=1e-1", *["resume=auto"] * (number == 2)]
        overrides += ["optimizer=muon"] * (number == 10)
        (path / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
        metrics = {"validation_accuracy": 0.123456, "seconds": 7.89}
        (path / "run.json").write_text(json.dumps({"status": "completed", "metrics": metrics, "parameters": 13}))
    (tmp_path / "11_failed").mkdir()
    failed = {"status": "failed", "error": "wrong", "overrides": ["data=digits", "seed=-1", "callbacks.ema.decay=0.1"]}
    (tmp_path / "11_failed" / "run.json").write_text(json.dumps(failed))
    (tmp_path / "12_empty").mkdir()
    (tmp_path / "multirun.yaml").write_text("")
    rows = sweep_rows(tmp_path)
    assert [row["run"] for row in rows] == ["0_seed-0", "2_seed-2", "10_seed-10", "11_failed", "12_empty"]
    assert rows[0] == {
        "run": "0_seed-0",
        "status": "completed",
        "seed": 0,
        "optimizer": None,
        "validation_accuracy": 0.1235,
        "parameters": 13,
        "seconds": 7.9,
        "error": None,
    }
    assert [row["seed"] for row in rows] == [0, 2, 10, -1, None]
    assert [row["optimizer"] for row in rows] == [None, None, "muon", None, None]
    assert rows[4]["status"] == "not started" and rows[4]["validation_accuracy"] is None


@pytest.mark.parametrize(
    "text", ["runs/a", "/a b", "/a=b", "/a,b", "/a(b)[c]{d}", "/é", "a\\", "it's", "a\\'b", "a#b", "123", "null"]
)
def test_hydra_takes_what_is_printed_for_the_same_text(text: str) -> None:
    parsed = OverridesParser.create().parse_override(override("run", text)).value()
    assert getattr(parsed, "text", parsed) == text
    assert ("'" in override("run", text)) == (text not in ("runs/a", "/a b", "a\\"))
