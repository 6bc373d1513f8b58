"""Which heads a model has: layers may have different numbers of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attention_visualizer.analysis.study.survey import Survey

Array = NDArray[Any]


@dataclass(frozen=True)
class Heads:
    """Return all existing heads, by layer, then by head."""

    #: Zero-based layer of each and zero-based head within it: `values[heads.index]` is [existing head, ...] of
    #: values [layer, head, ...].
    index: tuple[Array, Array]

    @classmethod
    def of(cls, survey: Survey) -> Heads:
        layers, heads = np.nonzero(~np.isnan(survey.maps[0]).all(axis=-1))
        return cls((layers, heads))

    @property
    def labels(self) -> list[str]:
        """The one-based "layer.head" of each."""
        return [f"{layer + 1}.{head + 1}" for layer, head in self]

    def view(self, position: int) -> str:
        """Return what shows one of them in the explorer."""
        layer, head = list(self)[position]
        return f"layer={layer + 1}&head={head + 1}"

    def __len__(self) -> int:
        return len(self.index[0])

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Return the zero-based (layer, head) of each."""
        yield from zip(self.index[0].tolist(), self.index[1].tolist(), strict=True)
