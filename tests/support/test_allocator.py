"""Freed memory stays in the process: the next training step causes no page faults."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from attention_visualizer.support.allocator import keep_freed_memory
from attention_visualizer.models.vision_transformer import VisionTransformer

if sys.argv[1] == "keep":
    keep_freed_memory()
torch.set_num_threads(1)
model, images = VisionTransformer(num_layers=4).train(), torch.zeros(128, 1, 28, 28)
for _ in range(4):
    model(images).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    model(images).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
"""


def page_faults(way: str) -> float:
    """Of a training step, at glibc's first thresholds; left alone it moves them, or not, as blocks happen to come."""
    thresholds = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", PROGRAM, way]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | thresholds)
    return float(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the options")
def test_the_next_step_gets_the_same_memory_without_page_faults() -> None:
    assert page_faults("keep") < 0.1 * page_faults("leave")


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    from attention_visualizer.support import allocator

    class Library:
        def __init__(self, name: None) -> None:
            pass

    monkeypatch.setattr(allocator.ctypes, "CDLL", Library)
    allocator.keep_freed_memory()
