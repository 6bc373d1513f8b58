"""What capture hands out: the layers of a pass, and the errors that say why there are none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import overload

import torch
from torch import Tensor

from attention_visualizer.attention.calls import Source
from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.attention.projections import AppliedProjection


class CaptureError(RuntimeError):
    """The attention could not be captured, or what was captured does not reproduce the model's own output."""


class InternalCaptureError(CaptureError):
    """Capturing itself failed, for want of memory, say, or of a part of PyTorch: nothing that the model did."""


@dataclass(frozen=True)
class Part:
    """An attention call that is a part of a layer: some of its heads, or of its queries."""

    layer: str  # its name
    number: int  # among the parts
    num_parts: int
    of_queries: bool  # rather than of heads


@dataclass(frozen=True)
class AttentionLayer:
    """One attention call: where it came from, its weights, and the measured error of the reconstruction."""

    #: The name of the module that called; "#2" and so on follow where it is applied again in one pass.
    name: str
    #: The number of the call in its pass, from 0.
    index: int
    #: [batch, head, query, key], float32 (float64 in such a model), after softmax and before dropout; windows count as
    #: batch.
    weights: Tensor
    #: [batch, head, key, head_dim].
    values: Tensor
    #: Where the keys lie on the image; None where that is not known, for the reason in `unplaced`.
    geometry: Geometry | None
    #: The largest difference between what weights and values give and the model's own output.
    error: float
    #: "multiplied", the very tensor that the model multiplies, or "rebuilt" from its queries and keys.
    source: Source = "rebuilt"
    #: Whether capturing left the model's output as it is, to the bit; False where it made the model leave a fast path
    #: (nn.TransformerEncoderLayer in eval mode, torch.compile), which moves its output by rounding.
    same_output: bool = True
    #: What the model does to the heads' outputs; see `projection`.
    applied: AppliedProjection = field(default_factory=AppliedProjection)
    #: Why there is no geometry; None where there is one.
    unplaced: str | None = None
    #: Whether it depends on what the layer before gave; branches side by side do not.
    in_sequence: bool = True
    #: What part of a layer the call is, where heads or queries are computed one by one and calls are not joined: in
    #: captures with gradients and interventions.
    part: Part | None = None

    def __repr__(self) -> str:
        sizes = " x ".join(map(str, self.weights.shape))
        place = f"{self.geometry}" if self.geometry is not None else f"no place: {self.unplaced}"
        return f"AttentionLayer({self.name!r}, weights [{sizes}], {place}, error {self.error:.1e})"

    @property
    def projection(self) -> Tensor | None:
        """The weight of the linear map that was applied to the heads' outputs [embed, head * head_dim], as it was seen
        after the attention: None before, as in `consume`, and where it is not known to be one linear map."""
        return self.applied.weight

    def in_usual_order(self) -> AttentionLayer:
        """Return the layer with prefix tokens first and patches row by row, queries too where they are the same tokens.

        Measures and maps take this order for granted; `weights` have the model's own.
        """
        if self.geometry is None or self.geometry.order is None:
            return self
        is_self_attention = self.weights.shape[-2] == self.weights.shape[-1]
        return replace(
            self,
            weights=self.geometry.in_usual_order(self.weights, (-2, -1) if is_self_attention else (-1,)),
            values=self.geometry.in_usual_order(self.values, (-2,)),
            geometry=self.geometry.usual,
        )


def joined(parts: Sequence[AttentionLayer]) -> AttentionLayer:
    """Return the layer that attention calls, in the order of their parts, are together."""
    first, part = parts[0], parts[0].part
    assert part is not None
    of_queries = part.of_queries
    return replace(
        first,
        name=part.layer,
        weights=torch.cat([each.weights for each in parts], dim=2 if of_queries else 1),
        values=first.values if of_queries else torch.cat([each.values for each in parts], dim=1),
        error=max(each.error for each in parts),
        same_output=all(each.same_output for each in parts),
        applied=AppliedProjection(),
        part=None,
    )


Edit = Callable[[AttentionLayer, Tensor], Tensor]


class CapturedAttention:
    """The layers of the last forward pass, in the order in which they were computed, by number or by name."""

    def __init__(self) -> None:
        self.layers: list[AttentionLayer] = []
        self.reconstruction_error = 0.0  # the largest of all layers and passes
        #: Names of modules whose attention is not seen, because another kernel computes it.
        self.unseen: dict[str, None] = {}
        self.seconds = 0.0  # time that capturing took

    @overload
    def __getitem__(self, key: str | int) -> AttentionLayer: ...
    @overload
    def __getitem__(self, key: slice) -> list[AttentionLayer]: ...
    def __getitem__(self, key: str | int | slice) -> AttentionLayer | list[AttentionLayer]:
        if isinstance(key, int | slice):
            return self.layers[key]
        matches = [layer for layer in self.layers if is_named(layer.name, key)]
        if len(matches) != 1:
            names = ", ".join(layer.name for layer in self.layers)
            raise KeyError(f"{key!r} names {len(matches)} attention layers; there are: {names}")
        return matches[0]

    def __repr__(self) -> str:
        heads = sorted({layer.weights.shape[1] for layer in self.layers})
        shape = f"{len(self)} layers" + (f" x {heads[0]} heads" if len(heads) == 1 else "")
        return f"CapturedAttention({shape}, reconstruction error {self.reconstruction_error:.1e})"

    def __iter__(self) -> Iterator[AttentionLayer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def is_named(layer: str, name: str) -> bool:
    """Whether `name` is the layer's own or that of a module around it: "blocks.3" is blocks.3.attn."""
    return layer == name or layer.startswith(f"{name}.")
