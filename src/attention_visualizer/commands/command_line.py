"""How both commands run: a mistake of the user ends in one line."""

from __future__ import annotations

import argparse
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from attention_visualizer.commands.help_text import did_you_mean, help_text
from attention_visualizer.support.errors import UserError, one_line
from attention_visualizer.support.invocation import INSTALLED
from attention_visualizer.support.text import printable

MAX_LINE_LENGTH = 800  # characters; a value given may have any number
FLAGS = (  # Hydra's
    *("--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run", "--multirun"),
    *("--shell-completion", "--config-path", "--config-name", "--config-dir", "--experimental-rerun", "--info"),
)

CONFIG_DIR = ("--config-dir", "-cd")
WITH_VALUE = (
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--shell-completion", "-sc"),
    "--experimental-rerun",
)


def run(job: Callable[[DictConfig], Any], conf: Path, name: str, on_mistake: Callable[[], None] | None = None) -> None:
    """Run `job` on the config that Hydra composes from `name`.yaml in the folder `conf` and the command line.

    A user's mistake ends as one line on stderr and exit code 2, after `on_mistake`. With HYDRA_FULL_ERROR=1 in the
    environment the traceback is shown instead.
    """
    if {"--version", "-V"} & set(sys.argv[1:]):
        print(f"{INSTALLED} {version(INSTALLED)}")
        return
    words, config_dir = given_overrides(sys.argv[1:])
    check_flags(conf, name)
    if {"--help", "-h"} & set(sys.argv[1:]):
        own = [] if config_dir is None else [f"hydra.searchpath=['file://{Path(config_dir).absolute()}']"]
        try:
            print(help_text(conf, name, [*own, *words]), end="")
        except HydraException as error:
            fail(UserError(error_line(error) + did_you_mean(conf, name, words)))
        return
    job_started = False

    @functools.wraps(job)  # Hydra goes by the name of its module
    def started_job(config: DictConfig) -> Any:
        nonlocal job_started
        job_started = True
        if HydraConfig.get().job.chdir:
            fail(UserError("hydra.job.chdir=true: the places of files are relative to this folder; leave it false"))
        return job(config)

    main = helps_as_text()(hydra.main(version_base="1.3", config_path=str(conf), config_name=name)(started_job))
    if os.environ.get("HYDRA_FULL_ERROR"):
        main()
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra hand errors through instead of printing them
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        # Before the job starts, there is nothing but overrides to be wrong; Hydra raises many kinds for them.
        if job_started and not is_foreseen(error):
            raise
        if on_mistake is not None:
            on_mistake()
        if not is_foreseen(error):
            fail(UserError(f"{' '.join(sys.argv[1:])}: cannot be understood: {error}"))
        meant = "" if job_started else did_you_mean(conf, name, words)
        fail(UserError(error_line(error) + meant) if meant else error)


def given_overrides(arguments: list[str]) -> tuple[list[str], str | None]:
    """Return the overrides of a command line, without flags and what belongs to them, and the user's folder of config
    files."""
    words, config_dir, flag = [], None, ""
    for word in arguments:
        if word.startswith("-"):
            flag, _, value = word.partition("=")
            if flag in CONFIG_DIR and value:
                config_dir = value
            flag = "" if value or flag not in (*CONFIG_DIR, *WITH_VALUE) else flag
        elif flag:
            config_dir = word if flag in CONFIG_DIR else config_dir
            flag = ""
        else:
            words.append(word)
    return words, config_dir


def check_flags(conf: Path, name: str) -> None:
    """End with one line for a flag that Hydra does not know: it would print its usage, and no field is a flag."""
    for word in sys.argv[1:]:
        if word.startswith("--") and word.partition("=")[0] not in FLAGS:
            meant = did_you_mean(conf, name, [word]) or "; see --help"
            fail(UserError(f"{word}: there is no such flag; fields are given as field=value, without dashes{meant}"))


@contextmanager
def helps_as_text() -> Iterator[None]:
    """Let argparse have each option's help as text, inside the block: Hydra 1.3 gives an object that is none, at which
    Python 3.14 ends."""

    def add_argument(parser: argparse.ArgumentParser, *names: Any, **options: Any) -> argparse.Action:
        if options.get("help") is not None:
            options["help"] = str(options["help"])
        return super(argparse.ArgumentParser, parser).add_argument(*names, **options)

    argparse.ArgumentParser.add_argument = add_argument  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        del argparse.ArgumentParser.add_argument  # what it inherits comes to light again


def is_foreseen(error: Exception) -> bool:
    """Whether it is the user's to correct, for whom one line is enough."""
    return isinstance(error, UserError | HydraException | OmegaConfBaseException | OSError)


def fail(error: Exception) -> NoReturn:
    """End the program with one line; inside the job, before Hydra adds a line of its own."""
    print(f"error: {harmless(error_line(error))}", file=sys.stderr)
    raise SystemExit(2) from None


def harmless(text: str) -> str:
    """Return `text` without what a terminal would obey, and no longer than can be read."""
    text = printable(text)
    return text if len(text) <= MAX_LINE_LENGTH else f"{text[: MAX_LINE_LENGTH - 160]} [...] {text[-150:]}"


def error_line(error: Exception) -> str:
    """Say in one line what went wrong; Hydra's and OmegaConf's messages spread it over several."""
    if not isinstance(error, HydraException | OmegaConfBaseException):
        if isinstance(error, OSError):
            return f"cannot use {error.filename}: {error.strerror}" if error.filename else str(error)
        return one_line(error)
    if mistyped := re.search(r"Error parsing override '(.*?)'\s+missing EQUAL", str(error)):
        return f"{mistyped[1]}: give field=value, without spaces around the equals sign"
    if listed := re.search(r"Ambiguous value for argument '(.+?)=(.*?)'", str(error)):
        field, values = listed.groups()
        return f"{field}={values}: a list is written as '{field}=[{values}]'; train.py tries each value with -m"
    lines: list[str] = []
    cause: BaseException | None = error
    while cause is not None:  # the inner message says what, the outer one where
        for line in str(cause).splitlines():
            line = line.strip()
            if line.startswith("Config search path"):
                break
            noise = re.match(r"(object_type|reference_type|full_key|set |To append to your config|_\w+$)", line)
            if line and not noise and line not in lines:
                lines.append(line)
        cause = cause.__cause__
    text = re.sub(r"Key '(\w+)' not in '\w+'", r"there is no field \1", "; ".join(lines))
    return re.sub(r"[.:;]+;", ":", text) + " (see --help for the groups and fields)"
