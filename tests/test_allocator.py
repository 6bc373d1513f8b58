"""Freed memory stays in the process: the next step's tensors cause no page faults."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from attention_visualizer.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()

def step():
    kept = [torch.ones(2**19) for _ in range(40)]  # 2 MiB each

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(way: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, way], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the options")
def test_the_next_step_gets_the_same_memory_without_page_faults() -> None:
    assert page_faults("keep") < 100
    assert page_faults("leave") > 10_000  # else there is nothing to mend, and the module can go


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    from attention_visualizer import allocator

    class Library:
        def __init__(self, name: None) -> None:
            pass

    monkeypatch.setattr(allocator.ctypes, "CDLL", Library)
    allocator.keep_freed_memory()
