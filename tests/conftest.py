"""Shared by all tests: one thread each, because tests are small and machines are shared."""

from __future__ import annotations

import numpy  # noqa: F401  its BLAS must be loaded to be limited
import torch
from threadpoolctl import threadpool_limits

torch.set_num_threads(1)
threadpool_limits(1)  # sums in another order differ in their last bits from those of processes with one thread
