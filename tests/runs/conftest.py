"""Fixtures of the tests of runs: a small model, and a checkpoint of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from attention_visualizer.models.vision_transformer import VisionTransformer
from tests.helpers.checkpoints import saved_in, small_model


@pytest.fixture(scope="session")
def model() -> VisionTransformer:
    return small_model()


@pytest.fixture
def saved(model: VisionTransformer, tmp_path: Path) -> Path:
    return saved_in(tmp_path, model)
