"""Shared by all tests: one thread each, because tests are small and machines are shared."""

from __future__ import annotations

import os
from typing import Any

import numpy  # noqa: F401  its BLAS must be loaded to be limited
import pytest
import torch
from threadpoolctl import threadpool_limits
from xdist.scheduler import LoadFileScheduling

from attention_visualizer.analysis.study.budget import Budget

# Sums in another order differ in their last bits; and more threads than cores wait for each other.
torch.set_num_threads(1)
threadpool_limits(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for all processes that tests start


class ByFile(LoadFileScheduling):
    """The tests of a file run in one process, so that what they share is made once; so do those of the large analysis.

    The marker `xdist_group` would say the same, but pytest-xdist 3.8 passes it over under pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "analysis" if file.endswith(("/test_analyze.py", "/test_analyze_figures.py")) else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)


@pytest.fixture
def small_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chapters that run the model many times do so on few images: for tests of which files there are."""
    monkeypatch.setattr("attention_visualizer.analysis.preparation.QUICK", Budget(30, 1))


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU, for PyTorch and Lightning, whatever this one has."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
