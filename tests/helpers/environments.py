"""Virtual environments that have some of the installed distributions and no others, without a network."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

from tests.helpers.runs import PROJECT


def build_wheel(folder: Path) -> Path:
    command = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(PROJECT)]
    subprocess.run([sys.executable, "-m", "pip", *command], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def environment(folder: Path, wheel: Path, extra: str, *others: str) -> Path:
    """Make an environment with the wheel and what its `extra` ("" for none) and `others` require, by links into the
    environment of the tests. Return the folder of its programs."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = ["install", "--no-deps", "--no-index", "--ignore-installed", str(wheel)]
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    subprocess.run([*pip, *install], check=True, capture_output=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (own,) = site.glob("attention_visualizer-*.dist-info")
    for required in required_by(Distribution.at(own), extra, [Requirement(other) for other in others]):
        for top in {Path(str(file)).parts[0] for file in required.files or () if not str(file).startswith("..")}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(required.locate_file(top))))
    return folder / "bin"


def required_by(own: Distribution, extra: str, others: list[Requirement]) -> list[Distribution]:
    """Return what a distribution with an extra requires, directly or not."""

    def needed(of: Distribution, extras: set[str]) -> list[Requirement]:
        def applies(requirement: Requirement) -> bool:
            marker = requirement.marker
            return marker is None or any(marker.evaluate({"extra": each}) for each in extras)

        return [each for each in map(Requirement, of.requires or ()) if applies(each)]

    found: dict[tuple[str, frozenset[str]], Distribution] = {}
    waiting = [*needed(own, {extra}), *others]
    while waiting:
        requirement = waiting.pop()
        key = requirement.name.lower().replace("_", "-"), frozenset(requirement.extras)
        if key in found:
            continue
        try:
            found[key] = distribution(requirement.name)
        except PackageNotFoundError:  # what only another system or an optional part has
            continue
        waiting += needed(found[key], requirement.extras | {""})
    return list({name: each for (name, _), each in found.items()}.values())
