"""Runs train.py for tests: within the test's own process, which is quick, or once for all tests in one of its own."""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import json
import logging
import os
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from attention_visualizer.commands import train
from tests.helpers.processes import Program

PROJECT = Path(__file__).resolve().parents[2]
# Small enough to train in two seconds; no two sizes are equal. 12 batches of 103 of the 1,297 training images.
EPOCHS, BATCHES, LAYERS, HEADS = 3, 12, 2, 3
MODEL = ("model.embed_dim=24", f"model.num_heads={HEADS}", f"model.num_layers={LAYERS}", "model.mlp_dim=29")
TINY = ("data=digits", "data.batch_size=103", *MODEL, "model.attention_dropout=0.1")
BRIEF = (*TINY, "trainer.max_epochs=1", "trainer.limit_train_batches=2")  # for what needs no training
BARE = ("callbacks=none", "logger=none")
LOGGED = ("logger=[tensorboard,csv]", "callbacks.attention_logger.per_head_scalars=true")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("HYDRA_FULL_ERROR", "MNIST_DIR")}


@dataclass(frozen=True)
class Outcome:
    """What the shell sees of a program: its exit code and what it wrote."""

    exit_code: int
    out: str
    err: str


@dataclass(frozen=True)
class TrainedRun:
    """A completed run and what it printed."""

    path: Path
    outcome: Outcome

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.path / "run.json").read_text())


def run_train(*arguments: str, folder: Path, **environment: str) -> Outcome:
    """`python train.py ...` in `folder`, within this process."""
    return run_script("train.py", *arguments, folder=folder, environment=ENVIRONMENT | environment)


def run_script(name: str, *arguments: str, folder: Path, environment: dict[str, str]) -> Outcome:
    """`python <name> ...` in `folder`, without the seconds that a new process takes to import everything."""
    out, err = io.StringIO(), io.StringIO()
    handlers, level = logging.root.handlers[:], logging.root.level
    argv, before = sys.argv, dict(os.environ)
    interrupt = signal.getsignal(signal.SIGINT)
    sys.argv = [str(PROJECT / name), *arguments]
    os.environ.clear()
    os.environ.update(environment)
    exit_code = 0
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
            except SystemExit as error:
                exit_code = error.code if isinstance(error.code, int) else int(error.code is not None)
            except BaseException:
                exit_code = 1
                traceback.print_exc()
    finally:
        sys.argv = argv
        os.environ.clear()
        os.environ.update(before)
        logging.root.handlers[:], logging.root.level = handlers, level
        signal.signal(signal.SIGINT, interrupt)  # Lightning leaves Ctrl-C switched off after a Ctrl-C
    return Outcome(exit_code, out.getvalue(), err.getvalue())


def run_process(
    *arguments: str,
    folder: Path,
    program: str = str(PROJECT / "train.py"),
    largest: int | None = None,
    obeying: bool = False,
) -> Outcome:
    """`python train.py ...` in `folder`, or another program: see `Program`."""
    with tempfile.TemporaryDirectory() as beside:
        out, err = Path(beside, "out"), Path(beside, "err")
        process = Program(
            program,
            *arguments,
            folder=folder,
            out=out,
            err=err,
            environment=ENVIRONMENT,
            largest=largest,
            obeying=obeying,
        )
        return Outcome(process.wait(400), out.read_text(), err.read_text())


class Training:
    """`python train.py ...` as a process of its own that can be watched and killed."""

    def __init__(self, *arguments: str, folder: Path, program: str | None = None) -> None:
        self.folder = folder
        self.before = set(run_folders(folder))
        self.log = folder / f"log_{time.monotonic_ns()}.txt"
        self.log.touch()
        self.process = Program(
            program or str(PROJECT / "train.py"),
            *arguments,
            folder=folder,
            out=self.log,
            err=self.log,
            environment=ENVIRONMENT,
        )

    def wait_until(self, what: Callable[[], Any], seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while not what():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < end, self.output()
            time.sleep(0.02)

    def wait_for_checkpoint(self, newer_than: int = 0) -> Path:
        def found() -> list[Path]:
            paths = self.folder.glob("runs/*/checkpoints/last.ckpt")
            return [path for path in paths if path.stat().st_mtime_ns > newer_than]

        self.wait_until(found)
        return found()[0]

    def end(self, seconds: float = 300) -> int:
        return self.process.wait(seconds)

    def output(self) -> str:
        return self.log.read_text()


def run_folders(folder: Path) -> list[Path]:
    """Every folder that training has made in `folder`, oldest first."""
    return sorted(path for path in (folder / "runs").glob("*") if path.is_dir())


def only_run(folder: Path) -> Path:
    (path,) = run_folders(folder)
    return path


def last(run_folder: Path) -> Path:
    """The checkpoint that a run goes on from."""
    return run_folder / "checkpoints" / "last.ckpt"


@functools.cache
def trained_once() -> tuple[Path, Outcome]:
    folder = Path(tempfile.mkdtemp(prefix="trained_run_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder, run_process(*TINY, f"trainer.max_epochs={EPOCHS}", *LOGGED, folder=folder)


def trained_run() -> TrainedRun:
    """The run that many tests look at and none may change: real process, both loggers, attention logged."""
    folder, outcome = trained_once()
    assert outcome.exit_code == 0, outcome.err
    return TrainedRun(only_run(folder), outcome)


def compose_train(*overrides: str) -> DictConfig:
    """The config that train.train gets for these overrides."""
    with initialize_config_dir(version_base="1.3", config_dir=str(PROJECT / "conf"), job_name="train"):
        config = compose("train", list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config.hydra
    return config


def train_function(config: DictConfig) -> float:
    return train.train(config)


def read_checkpoint(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def assert_same_training(first: Path, second: Path) -> None:
    """Two checkpoints agree to the bit in weights and in the optimiser's and the schedule's state."""
    ours, theirs = read_checkpoint(first), read_checkpoint(second)
    assert ours["global_step"] == theirs["global_step"] and ours["epoch"] == theirs["epoch"]
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        flat, other = dict(leaves(ours[part])), dict(leaves(theirs[part]))
        assert flat.keys() == other.keys()
        for name, value in flat.items():
            equal = torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
            assert equal, f"{part}: {name} differs"


def leaves(value: Any, name: str = "") -> Any:
    """(name, leaf) of nested dictionaries and lists."""
    if isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, f"{name}/{key}")
    else:
        yield name, value
