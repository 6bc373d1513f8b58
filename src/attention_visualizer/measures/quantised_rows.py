"""Attention weights in 8 bits, for files and pages that hold many of them: each row on a scale of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attention_visualizer.measures.map_measures import attention_entropy

Array = NDArray[Any]
STEPS = 255  # of a row's maximum


@dataclass(frozen=True)
class QuantisedRows:
    """Rows of attention weights: each weight in 255ths of its row's maximum, so within 1/255 of that of the original,
    and what 8 bits would not tell well enough."""

    codes: Array  # uint8 [..., query, key]
    maximum: Array  # float16 [..., query]
    entropy: Array  # float16 [..., query], nats, of the weights themselves

    @classmethod
    def of(cls, weights: Tensor, entropy: Tensor | None = None) -> QuantisedRows:
        """weights: [..., query, key], each row a distribution over the keys; entropy: where that is of more keys than
        these."""
        weights = weights.detach().float().cpu()
        maximum = weights.amax(dim=-1).half()
        scale = maximum.float().clamp_min(torch.finfo(torch.float16).smallest_normal)
        codes = (weights / scale[..., None] * STEPS).round().clamp_max(STEPS).to(torch.uint8)
        entropy = attention_entropy(weights) if entropy is None else entropy.detach().cpu()
        return cls(codes.numpy(), maximum.numpy(), entropy.half().numpy())

    def weights(self) -> Array:
        """Return the weights as they can be told from the codes: float32 [..., query, key]."""
        return self.codes.astype(np.float32) / STEPS * self.maximum.astype(np.float32)[..., None]

    def at(self, number: int) -> QuantisedRows:
        """Return the rows of one entry of the second axis."""
        return QuantisedRows(*(getattr(self, name)[:, number] for name in FIELDS))

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.maximum.nbytes + self.entropy.nbytes


def stacked(rows: list[QuantisedRows], axis: int) -> QuantisedRows:
    """Stack rows of equal shapes along a new axis."""
    return QuantisedRows(*(np.stack([getattr(each, name) for each in rows], axis) for name in FIELDS))


def concatenated(rows: list[QuantisedRows], axis: int = 0) -> QuantisedRows:
    """Concatenate rows along an axis."""
    return QuantisedRows(*(np.concatenate([getattr(each, name) for each in rows], axis) for name in FIELDS))


FIELDS = ("codes", "maximum", "entropy")
