"""From values to colours: the scales of all maps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Rgb = NDArray[np.uint8]

DOUBLINGS = 3.0  # the attention scale runs from 1/8 to 8 times uniform


@dataclass(frozen=True, eq=False)
class ColorScale:
    """From values to colours."""

    title: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]  # (value, label)
    table: Rgb  # [256, 3]
    #: Where given, the base-2 logarithm of `factor` times the value is shown; low, high and ticks are such logarithms.
    factor: float | None = None

    def to_rgb(self, values: Array) -> Rgb:
        """Colour values [...] -> uint8 [..., 3]; clipped to the scale, NaN is grey."""
        if self.factor is not None:
            with np.errstate(divide="ignore", invalid="ignore"):
                values = np.log2(np.asarray(values, np.float64) * self.factor)
        share = (np.clip(values, self.low, self.high) - self.low) / (self.high - self.low)
        missing = np.isnan(share)
        index = np.where(missing, 0, share * 255).round().astype(np.intp)
        colors = self.table[index]
        colors[missing] = 128
        return colors


@cache
def color_table(name: str, low: float = 0.0, high: float = 1.0) -> Rgb:
    """The part from `low` to `high` of matplotlib's colour map: uint8 [256, 3], read-only because it is shared."""
    colors = matplotlib.colormaps[name](np.linspace(low, high, 256))[:, :3]
    table = (colors * 255).round().astype(np.uint8)
    table.flags.writeable = False
    return table


def attention_scale(num_keys: int) -> ColorScale:
    """Scale log2(N A), so that white is a query that prefers nothing and each step a doubling; red high, blue low.

    num_keys: N; 1 for attention that has been multiplied by it already, where panels differ in their number of keys.
    """
    labels = ("≤1/8", "1/4", "1/2", "1", "2", "4", "≥8")
    ticks = tuple((float(value), f"{label}×") for value, label in zip(range(-3, 4), labels, strict=True))
    # The ends of the map are nearly black, which is the colour of the ink.
    return ColorScale(
        "attention / uniform" + (f" (1/{num_keys})" if num_keys > 1 else ""),
        -DOUBLINGS,
        DOUBLINGS,
        ticks,
        color_table("RdBu_r", 0.08, 0.92),
        num_keys,
    )


def difference_scale(limit: float, title: str) -> ColorScale:
    """Scale a difference of base-2 logarithms, from -limit to limit doublings; orange is more, purple less."""
    values = np.linspace(-limit, limit, 7)
    ends = {-limit: "≤", limit: "≥"}
    ticks = tuple(
        (float(value), f"{ends.get(float(value), '')}{'1/' if value < 0 else ''}{2 ** abs(value):.3g}×")
        for value in values
    )
    return ColorScale(title, -limit, limit, ticks, color_table("PuOr_r", 0.08, 0.92))


def signed_scale(limit: float, title: str, colors: str) -> ColorScale:
    """Scale a difference, from -limit to limit, white at 0, in matplotlib's diverging colour map `colors`."""
    limit = max(limit, 1e-6)
    ticks = tuple((float(value), f"{value:+.2g}" if value else "0") for value in np.linspace(-limit, limit, 5))
    return ColorScale(title, -limit, limit, ticks, color_table(colors, 0.08, 0.92))


def sequential_scale(low: float, high: float, title: str) -> ColorScale:
    ticks = tuple((float(value), f"{value:.2f}") for value in np.linspace(low, high, 5))
    return ColorScale(title, low, high, ticks, color_table("viridis"))
