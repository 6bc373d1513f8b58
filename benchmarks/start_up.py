"""How long the programs take to start: beside the least that their libraries take.

    python benchmarks/start_up.py
    python benchmarks/start_up.py commands --repeats 7 --markdown
    python benchmarks/start_up.py --quick

commands: from the shell to the answer, for --help, for a wrong argument, for a script that captures a model's attention
and for the end of the first training step (real MNIST where MNIST_DIR or data/ has it, else scikit-learn's digits),
each beside the shortest program with the same libraries that does the like.
packages: how many packages each extra needs, itself and PyTorch's own included, and how large they are, as installed.
imports: whose modules the time of `train.py --help` and of `analyze.py` goes into, by `-X importtime`,
which itself makes imports slower.
Each start is a process of its own; repeats are interleaved, and a number is their median with the smallest and the
largest behind it. One turn before them warms the disk cache.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from parts import option_parser, parse
from tables import machine, spread, table, versions

PROJECT = Path(__file__).resolve().parent.parent
PARTS = ("commands", "packages", "imports")
MIN_SHARE = 0.03  # of the imports; what takes less is summed up

HYDRA = """
import hydra
@hydra.main(version_base="1.3", config_path=None)
def main(config):
    pass
main()
"""
CAPTURE = """
import torch, torchvision
from attention_visualizer import capture
model = torchvision.models.VisionTransformer(64, 16, 4, 4, 128, 256).eval()
with torch.no_grad(), capture(model):
    model(torch.rand(2, 3, 64, 64))
"""
FORWARD = CAPTURE.replace("from attention_visualizer import capture\n", "").replace(", capture(model)", "")
FIRST_STEP = """
import torch
from hydra import main
from lightning import LightningModule, Trainer
class Smallest(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)
    def training_step(self, batch, index):
        return self.layer(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())
data = torch.utils.data.DataLoader(torch.rand(8, 4))
Trainer(accelerator="cpu", logger=False, enable_checkpointing=False).fit(Smallest(), data)
"""
# Ends a program with the first training step, whatever it is that trains.
UNTIL_FIRST_STEP = """
import os, runpy, sys
from lightning import LightningModule
LightningModule.on_train_batch_end = lambda *_: os._exit(7)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True)
class Start:
    """A program and how it ends. `peer` is the text of the shortest one, in `peer_title`'s words."""

    title: str
    arguments: tuple[str, ...]  # the first is its file, or its text
    exit_code: int
    peer_title: str
    peer: str
    peer_arguments: tuple[str, ...] = ()
    first_step: bool = False


STARTS = (
    Start("analyze.py --help", ("analyze.py", "--help"), 0, "a Hydra program's --help", HYDRA, ("--help",)),
    Start("analyze.py num_samples=x", ("analyze.py", "num_samples=x"), 2, "an empty Hydra program", HYDRA),
    Start("analyze.py ckpt=nowhere.ckpt", ("analyze.py", "ckpt=nowhere.ckpt"), 2, "import torch", "import torch"),
    Start("a script with capture", (CAPTURE,), 0, "the same forward pass", FORWARD),
    Start("train.py --help", ("train.py", "--help"), 0, "import hydra, lightning", "import hydra, lightning"),
    Start("train.py model.embed_dim=x", ("train.py", "model.embed_dim=x"), 2, "the same", "import hydra, lightning"),
    Start("train.py, first step", ("train.py",), 7, "Lightning, linear layer", FIRST_STEP, first_step=True),
)


def mnist_folder() -> Path:
    return Path(os.environ.get("MNIST_DIR") or "data").absolute()


def seconds_of(start: Start, ours: bool) -> float:
    """In an empty folder, from the start of the process to its end."""
    with tempfile.TemporaryDirectory() as folder:
        if ours and start.arguments[0] == CAPTURE:
            program, arguments = str(Path(folder) / "script.py"), []
            Path(program).write_text(CAPTURE)
        elif ours:
            program, arguments = str(PROJECT / start.arguments[0]), list(start.arguments[1:])
            if start.first_step and not any(mnist_folder().rglob("train-images-idx3-ubyte*")):
                arguments.append("data=digits")
        else:
            program, arguments = str(Path(folder) / "peer.py"), list(start.peer_arguments)
            Path(program).write_text(start.peer)
        if start.first_step:
            arguments = [program, *arguments]
            program = str(Path(folder) / "until_first_step.py")
            Path(program).write_text(UNTIL_FIRST_STEP)
        environment = os.environ | {"MNIST_DIR": str(mnist_folder())}
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, program, *arguments], cwd=folder, env=environment, capture_output=True, text=True
        )
        seconds = time.perf_counter() - began
    expected = start.exit_code if ours or start.first_step else 0
    if done.returncode != expected:
        raise SystemExit(f"{start.title}: exit code {done.returncode} instead of {expected}\n{done.stderr}")
    return seconds


def commands_table(starts: Sequence[Start], repeats: int, markdown: bool) -> str:
    found: dict[tuple[Start, bool], list[float]] = {(start, which): [] for start in starts for which in (False, True)}
    for turn in range(repeats + (repeats > 1)):
        print(f"turn {turn} ...", file=sys.stderr)
        for (start, is_ours), seconds in found.items():
            seconds.append(seconds_of(start, is_ours))
    rows = []
    for start in starts:
        peer, ours = found[start, False][-repeats:], found[start, True][-repeats:]
        ratio = statistics.median(ours) / statistics.median(peer)
        rows.append((start.title, spread(ours, ".2f"), start.peer_title, spread(peer, ".2f"), f"{ratio:.2f}"))
    return table(("command", "seconds", "peer", "seconds", "ratio"), rows, markdown)


def packages_table(markdown: bool) -> str:
    """Count what each extra needs, and its megabytes."""
    rows = []
    for extra in ("", "train", "report", "film", "all"):
        names = needed("attention-visualizer", frozenset([extra]))
        size = sum(megabytes(name) for name in names)
        rows.append((f"attention-visualizer{f'[{extra}]' if extra else ''}", str(len(names)), f"{size:,.0f}"))
    return table(("installed", "packages", "MB"), rows, markdown)


def needed(name: str, extras: frozenset[str]) -> set[str]:
    """Return the names of the installed packages that `name` with these extras needs, itself included."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: set[str] = set()
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting: list[tuple[str, frozenset[str]]] = [(canonicalize_name(name), extras)]
    while waiting:
        package, wanted = waiting.pop()
        if (package, wanted) in seen:
            continue
        seen.add((package, wanted))
        try:
            requirements = distribution(package).requires or []
        except PackageNotFoundError:
            continue
        found.add(package)
        for requirement in map(Requirement, requirements):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in wanted | {""}):
                waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return found


def megabytes(package: str) -> float:
    """Sum the files that a package installed, as its record lists them, in 10^6 bytes."""
    return sum(file.size or 0 for file in distribution(package).files or []) / 1e6


def imports_table(command: str, markdown: bool) -> str:
    """Seconds by package, each counting only its own modules' lines."""
    with tempfile.TemporaryDirectory() as folder:
        program, *arguments = command.split()
        done = subprocess.run(
            [sys.executable, "-X", "importtime", str(PROJECT / program), *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
        )
    times: Counter[str] = Counter()
    for own, module in re.findall(r"^import time: +(\d+) \| +\d+ \| +([\w.]+)$", done.stderr, re.MULTILINE):
        times[module.split(".")[0]] += int(own)
    total = times.total()
    rows = [(name, f"{own / 1e6:.2f}", f"{own / total:.0%}") for name, own in times.most_common()]
    shown = rows[: sum(own >= MIN_SHARE * total for own in times.values())]
    rest = total - sum(own for _, own in times.most_common(len(shown)))
    shown += [("all others", f"{rest / 1e6:.2f}", f"{rest / total:.0%}"), ("together", f"{total / 1e6:.2f}", "")]
    return table((f"imports of {command}", "seconds", "share"), shown, markdown)


def main() -> None:
    options = parse(option_parser(__doc__, PARTS, "two commands", repeats=5), PARTS)
    print(f"{versions('torch', 'lightning', 'torchmetrics', 'hydra-core')}; {machine()}\n", flush=True)
    if options.quick:
        print(commands_table(STARTS[:2], 1, options.markdown))
        return
    for part in options.parts:
        if part == "commands":
            print(commands_table(STARTS, options.repeats, options.markdown))
        elif part == "packages":
            print(packages_table(options.markdown))
        else:
            # The checkpoint is looked for after all that the analysis needs has been imported.
            for command in ("train.py --help", "analyze.py ckpt=nowhere.ckpt"):
                print(imports_table(command, options.markdown), end="\n\n")
        print(flush=True)


if __name__ == "__main__":
    main()
