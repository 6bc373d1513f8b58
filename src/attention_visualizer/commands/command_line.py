"""What the entry points share: a mistake ends in one line."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from attention_visualizer.support.errors import UserError
from attention_visualizer.support.text import printable

LONGEST_LINE = 800  # characters; a value given may have any number
begun: list[bool] = []  # whether the job of `run` is under way


def run(main: Callable[[], Any], on_mistake: Callable[[], None] | None = None) -> None:
    """Runs a Hydra entry point; a user's mistake ends as one line on stderr and exit code 2, after `on_mistake`.

    With HYDRA_FULL_ERROR=1 in the environment the traceback is shown instead.
    """
    if os.environ.get("HYDRA_FULL_ERROR"):
        main()
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra hand errors through instead of printing them
    begun.clear()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see train.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        # Before the job begins, there is nothing but overrides to be wrong; Hydra raises many kinds for them.
        if begun and not is_foreseen(error):
            raise
        if on_mistake is not None:
            on_mistake()
        fail(error if is_foreseen(error) else UserError(f"{' '.join(sys.argv[1:])}: cannot be understood: {error}"))


def is_foreseen(error: Exception) -> bool:
    """Whether it is a user's to mend, for whom one line is enough."""
    return isinstance(error, UserError | HydraException | OmegaConfBaseException | OSError)


def begin() -> None:
    """To be called first by the function that `run` is given: from here on, an unforeseen error is the program's."""
    begun.append(True)


def fail(error: Exception) -> NoReturn:
    """Ends the program with one line; inside the job, before Hydra adds a line of its own."""
    print(f"error: {harmless(one_line(error))}", file=sys.stderr)
    raise SystemExit(2) from None


def harmless(text: str) -> str:
    """`text` without what a terminal would obey, and no longer than can be read."""
    text = printable(text)
    return text if len(text) <= LONGEST_LINE else f"{text[: LONGEST_LINE - 160]} [...] {text[-150:]}"


def one_line(error: BaseException) -> str:
    """What went wrong in one line; Hydra's and OmegaConf's messages spread it over several."""
    if not isinstance(error, HydraException | OmegaConfBaseException):
        if isinstance(error, OSError):
            return f"cannot use {error.filename}: {error.strerror}" if error.filename else str(error)
        return " ".join(str(error).split()) or type(error).__name__
    lines: list[str] = []
    cause: BaseException | None = error
    while cause is not None:  # the inner message says what, the outer one where
        for line in str(cause).splitlines():
            line = line.strip()
            if line.startswith("Config search path"):
                break
            noise = re.match(r"(object_type|reference_type|full_key|set |To append to your config)", line)
            if line and not noise and line not in lines:
                lines.append(line)
        cause = cause.__cause__
    text = "; ".join(lines).replace("Builds_", "")
    return re.sub(r"[.:;]+;", ":", text) + " (see --help for the groups and fields)"
