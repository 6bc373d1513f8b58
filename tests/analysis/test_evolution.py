"""What the chapter on training says of a history: its largest change, and the frames that stand for all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from attention_visualizer.analysis.evolution.chapter import largest_change
from attention_visualizer.analysis.evolution.figure import chosen_frames, draw_strip
from attention_visualizer.runs.history import AttentionHistory

STEPS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 400, 500, 600)


def history(steps: tuple[int, ...] = STEPS) -> AttentionHistory:
    """Two layers, the second with one head less: the first stays, the second falls from 2 nats to 1 within 8 steps."""
    random = np.random.default_rng(0)
    frames: list[dict[str, Any]] = [
        {
            "step": np.array(step),
            "epoch": np.array(step / 300),
            "entropy": np.array([[2.5, 2.5, 2.5], [each := 2 - min(step, 8) / 8, each, np.nan]]),
            "maps": random.dirichlet(np.ones(4), (2, 2)).reshape(2, 2, 2, 2),
        }
        for step in steps
    ]
    probe = {
        "images": random.integers(0, 256, (2, 8, 8, 1), dtype=np.uint8),
        "labels": np.array([1, -1]),
        "class_names": np.array(["zero", "one"]),
        "num_keys": np.array(5),
        "query": np.array("cls"),
    }
    return AttentionHistory(probe, frames)


def test_the_largest_change_and_when_half_of_it_was_there() -> None:
    change = largest_change(history())
    assert (change.layer, change.half_step, change.last_step) == (2, 4, 600)
    assert (change.first, change.last) == pytest.approx((2.0, 1.0))


def test_a_history_in_which_nothing_changes() -> None:
    change = largest_change(history((300, 400)))
    assert change.first == change.last and change.half_step == 300


@pytest.mark.parametrize("count", [3, 6, 24])
def test_the_frames_that_are_shown_are_early_ones_and_both_ends(count: int) -> None:
    steps = [int(frame["step"]) for frame in chosen_frames(history(), count)]
    assert steps == sorted(set(steps)) and steps[0] == 0 and steps[-1] == 600
    assert len(steps) == min(count, len(STEPS))
    if count == 6:
        assert sum(step <= 64 for step in steps) >= 4


@pytest.mark.parametrize(("steps", "words"), [(STEPS, "From random weights"), (STEPS[3:], "From the first captured")])
def test_the_strip_says_where_it_begins(steps: tuple[int, ...], words: str) -> None:
    texts = [text.text for text in draw_strip(history(steps)).texts]
    assert any(text.startswith(words) for text in texts)
    assert {"input", f"step {steps[0]}", "step 600", "one", "image 2"} <= set(texts)
