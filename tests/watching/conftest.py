"""Shared by the tests of watching."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch.overrides import _get_current_function_mode_stack


@pytest.fixture(autouse=True)
def no_mode_is_left_behind() -> Iterator[None]:
    before = _get_current_function_mode_stack()
    yield
    assert _get_current_function_mode_stack() == before
