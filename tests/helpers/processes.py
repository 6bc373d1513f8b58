"""Programs as processes of their own, forked from one that has imported the libraries.

Signals, kills, limits and exit codes are real; the ten seconds that imports take are spent once.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([f"attention_visualizer.commands.{name}" for name in ("train", "analyze")] + [__name__])


class Program:
    """`python <program> <arguments>` in `folder`, with the interface of subprocess.Popen.

    program: the path of a script, or Python code. out, err: files for what it prints. largest: bytes of a file.
    obeying: whether root, too, reads and writes only what the modes of files allow.
    """

    def __init__(
        self,
        program: str,
        *arguments: str,
        folder: Path,
        out: Path,
        err: Path,
        environment: dict[str, str],
        largest: int | None = None,
        obeying: bool = False,
    ) -> None:
        self.process = FORKS.Process(
            target=run, args=(program, arguments, folder, out, err, environment, largest, obeying), daemon=True
        )
        self.process.start()

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, seconds: float) -> int:
        self.process.join(seconds)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self.process), seconds)
        return self.process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()


def run(
    program: str,
    arguments: tuple[str, ...],
    folder: Path,
    out: Path,
    err: Path,
    environment: dict[str, str],
    largest: int | None,
    obeying: bool,
) -> None:
    """Be that program, in a process that was forked."""
    for path, number in ((out, 1), (err, 2)):
        with path.open("a") as file:
            os.dup2(file.fileno(), number)
    # A job in the background ignores Ctrl-C, and so would its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores
    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    if obeying:
        obey_file_modes()
    torch.set_num_threads(1)
    threadpool_limits(1)  # the libraries are loaded: the environment comes too late for them
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    is_script = program.endswith(".py")
    sys.argv = [program if is_script else "-c", *arguments]
    if is_script:
        runpy.run_path(program, run_name="__main__")
    else:
        exec(compile(program, "-c", "exec"), {"__name__": "__main__"})


def obey_file_modes() -> None:
    """Give up root's capabilities to read and write whatever the modes of files say."""
    if os.geteuid():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, of this thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable ones, the first 32 and then the others
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    for kind in range(3):
        sets[kind] &= ~(1 << 1 | 1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")
