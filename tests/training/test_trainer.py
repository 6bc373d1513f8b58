"""Loggers and callbacks of a config."""

from __future__ import annotations

from omegaconf import OmegaConf

from attention_visualizer.training.trainer import given


def test_what_is_set_to_null_is_left_out() -> None:
    parts = OmegaConf.create({"attention_logger": None, "ema": {"decay": 0.9}})
    assert given(parts) == [{"decay": 0.9}]
    assert given(None) == []
