"""Shared by all tests: one thread each, because tests are small and machines are shared."""

from __future__ import annotations

import os

import numpy  # noqa: F401  its BLAS must be loaded to be limited
import pytest
import torch
from threadpoolctl import threadpool_limits

from attention_visualizer.analysis.study.budget import Budget

# Sums in another order differ in their last bits; and more threads than cores wait for each other.
torch.set_num_threads(1)
threadpool_limits(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for all processes that tests start


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests of a file in one process, so that what they share is made once; and those of the large analysis."""
    for item in items:
        shares_analysis = "analysis" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("analysis" if shares_analysis else str(item.path)))


@pytest.fixture
def small_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chapters that run the model many times do so on few images: for tests of which files there are."""
    monkeypatch.setattr("attention_visualizer.analysis.preparation.QUICK", Budget(40, 2))


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU, for PyTorch and Lightning, whatever this one has."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
