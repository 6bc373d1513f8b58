"""Shared by all tests: one thread each, because tests are small and machines are shared."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
