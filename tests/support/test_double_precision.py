"""On a device without float64, statistics and places are those of the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np


def test_a_device_without_float64() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.helpers.device_without_float64"]
    ran = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    measured = json.loads(ran.stdout.splitlines()[-1])
    cpu, foreign = measured["cpu"], measured["foreign"]
    assert cpu["has float64"] and not foreign["has float64"] and foreign["kept in float64"] == "cpu"
    assert foreign["grids"] == cpu["grids"] == [[5, 5]] * 2
    np.testing.assert_allclose(foreign["means"], cpu["means"], rtol=1e-5)
    for name, values in cpu["statistics"].items():
        np.testing.assert_allclose(foreign["statistics"][name], values, rtol=1e-4)
