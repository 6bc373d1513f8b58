"""Colours mean what their scale says."""

from __future__ import annotations

import warnings
from itertools import pairwise

import numpy as np
import pytest

from attention_visualizer.figures.color_scales import (
    ColorScale,
    attention_scale,
    color_table,
    difference_scale,
    sequential_scale,
)

NUM_KEYS = 17
UNIFORM = 1 / NUM_KEYS


def attention_colour(times_uniform: float) -> tuple[int, int, int]:
    red, green, blue = attention_scale(NUM_KEYS).to_rgb(np.array([times_uniform * UNIFORM]))[0]
    return int(red), int(green), int(blue)


def test_uniform_attention_is_white() -> None:
    assert min(attention_colour(1.0)) > 240


def test_red_is_high_and_blue_is_low() -> None:
    for doublings in (1, 2, 3):
        red, _, blue = attention_colour(2.0**doublings)
        assert red > blue + 15 * doublings
        red, _, blue = attention_colour(2.0**-doublings)
        assert blue > red + 15 * doublings


def test_more_attention_is_redder_at_every_step() -> None:
    warmth = [red - blue for red, _, blue in map(attention_colour, 2.0 ** np.linspace(-2.2, 2.2, 23))]
    assert all(later > earlier for earlier, later in pairwise(warmth))


def test_beyond_three_doublings_the_colour_is_clipped() -> None:
    assert attention_colour(8.0) == attention_colour(NUM_KEYS)
    assert attention_colour(1 / 8) == attention_colour(1e-9) == attention_colour(0.0)
    assert attention_colour(4.0) != attention_colour(8.0)


def test_nothing_is_said_of_missing_values() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        colors = attention_scale(NUM_KEYS).to_rgb(np.array([[np.nan, UNIFORM, 0.0]], np.float32))
    assert colors.shape == (1, 3, 3) and colors.dtype == np.uint8
    assert colors[0, 0].tolist() == [128, 128, 128]
    assert colors[0, 1].min() > 240


def test_the_same_share_is_paler_among_fewer_keys() -> None:
    """What is white is relative to the number of keys."""
    share = np.array([1 / 5])
    assert attention_scale(5).to_rgb(share).min() > 240
    assert attention_scale(40).to_rgb(share).min() < 60


@pytest.mark.parametrize(
    ("scale", "labels"),
    [
        (attention_scale(NUM_KEYS), ["≤1/8×", "1/4×", "1/2×", "1×", "2×", "4×", "≥8×"]),
        (difference_scale(3.0, "change"), ["≤1/8×", "1/4×", "1/2×", "1×", "2×", "4×", "≥8×"]),
        (difference_scale(1.5, "change"), ["≤1/2.83×", "1/2×", "1/1.41×", "1×", "1.41×", "2×", "≥2.83×"]),
        (sequential_scale(0.0, 2.0, "entropy"), ["0.00", "0.50", "1.00", "1.50", "2.00"]),
    ],
    ids=["attention", "difference", "odd difference", "sequential"],
)
def test_ticks_say_their_value(scale: ColorScale, labels: list[str]) -> None:
    assert [label for _, label in scale.ticks] == labels
    for value, label in scale.ticks:
        assert scale.low <= value <= scale.high
        if label.endswith("×"):
            top, _, bottom = label.strip("≤≥×").partition("/")
            assert float(top) / float(bottom or 1) == pytest.approx(2**value, rel=0.01)
        else:
            assert float(label) == pytest.approx(value)


def test_no_change_is_white_and_sequences_brighten() -> None:
    assert difference_scale(3.0, "change").to_rgb(np.zeros(1)).min() > 240
    brightness = sequential_scale(1.0, 5.0, "entropy").to_rgb(np.linspace(1, 5, 11)).sum(axis=-1, dtype=int)
    assert (np.diff(brightness) > 0).all()


def test_color_tables_are_shared_and_so_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        color_table("viridis")[0] = 0
