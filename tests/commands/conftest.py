"""Runs and analyses that several files of tests look at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pytest

from attention_visualizer.data.datamodule import ImageDataModule
from attention_visualizer.models.vision_transformer import VisionTransformer
from tests.helpers.analyses import Analysis, Workplace, random_model, succeed
from tests.helpers.runs import PROJECT, run_process


@pytest.fixture(scope="session")
def digits() -> ImageDataModule:
    data = ImageDataModule(name="digits")
    data.load()
    return data


@pytest.fixture(scope="session")
def model() -> VisionTransformer:
    return random_model()


@pytest.fixture
def work(tmp_path: Path, digits: ImageDataModule) -> Workplace:
    return Workplace(tmp_path, digits)


@pytest.fixture(scope="session")
def analysis(tmp_path_factory: pytest.TempPathFactory, digits: ImageDataModule, model: VisionTransformer) -> Analysis:
    """`python analyze.py ckpt=best` in a process of its own; no test changes it."""
    work = Workplace(tmp_path_factory.mktemp("analysis"), digits)
    run = work.add_run("2025-01-02_03-04-05-000006", model, with_history=True)
    run.config_path.unlink(missing_ok=True)  # the checkpoint alone suffices
    outcome = run_process("ckpt=best", folder=work.path, program=str(PROJECT / "analyze.py"))
    assert outcome.exit_code == 0, outcome.err
    return Analysis(run, run.path / "attention_analysis", outcome)


@pytest.fixture(scope="module")
def one_run(tmp_path_factory: pytest.TempPathFactory, digits: ImageDataModule, model: VisionTransformer) -> Workplace:
    """One run for questions that leave its checkpoint alone; each writes into an output folder of its own."""
    work = Workplace(tmp_path_factory.mktemp("one_run"), digits)
    work.add_run("2025-01-01_00-00-00-000000", model)
    return work


@pytest.fixture
def reported(work: Workplace, model: VisionTransformer) -> Path:
    """The output of an analysis of two chapters."""
    run = work.add_run("2025-01-01_00-00-00-000000", model)
    succeed("chapters=[patterns,layers]", "num_samples=2", folder=work.path)
    return run.path / "attention_analysis"


@pytest.fixture(autouse=True)
def pyplot_is_left_alone() -> Iterator[None]:
    """No analysis opens a figure that somebody must close, or changes how other figures look."""
    import matplotlib.pyplot as plt

    plt.get_backend()
    settings = matplotlib.rcParams.copy()
    yield
    assert not plt.get_fignums() and matplotlib.rcParams == settings
