"""`python analyze.py`: from the command line to checked options. Needs no torch until then."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from attention_visualizer.commands import command_line
from attention_visualizer.commands.analyze_options import check_options
from attention_visualizer.commands.quick_imports import quick_imports
from attention_visualizer.support.errors import UserError
from attention_visualizer.support.extras import missing_package
from attention_visualizer.support.invocation import invocation
from attention_visualizer.training.stopping import StopRequest, signal_of

NO_SWEEPS = UserError("analyze takes one checkpoint at a time: compare several with runs=<glob>")


def main(conf: Path) -> None:
    """Run the command line. conf: the folder of config files."""
    if {"-m", "--multirun"} & set(sys.argv[1:]):
        command_line.fail(NO_SWEEPS)
    command_line.run(run_job, conf, "analyze")


def run_job(config: DictConfig) -> None:
    """Analyse what the composed config asks for; a mistake or an interruption ends the program."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        command_line.fail(NO_SWEEPS)
    options: Any = OmegaConf.to_container(config, resolve=True)
    try:
        check_options(options)
    except UserError as error:
        command_line.fail(error)
    try:
        with quick_imports():  # only now: --help and a misspelt field shall not wait for torch
            from attention_visualizer.attention.capture import CaptureError
            from attention_visualizer.commands.analyze_checkpoint import analyze
    except ModuleNotFoundError as error:
        command_line.fail(missing_package(" ".join(invocation("analyze")), error, "report"))
    with StopRequest():
        try:
            analyze(options)
        except Exception as error:
            if not (command_line.is_foreseen(error) or isinstance(error, CaptureError)):
                raise
            command_line.fail(error)
        except SystemExit as stop:
            if signal_of(stop.code):
                print("interrupted: nothing was written, an earlier analysis is unchanged", file=sys.stderr)
            raise
