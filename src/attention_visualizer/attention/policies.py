"""What becomes of a recorded layer: it is handed out, handed out with gradients, or edited."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attention_visualizer.attention.calls import AttentionCall
from attention_visualizer.attention.edits import named_layers
from attention_visualizer.attention.layers import AttentionLayer, CaptureError, Edit, is_named
from attention_visualizer.attention.proof import largest
from attention_visualizer.attention.torch_internals import DisableTorchFunction, TensorDictionary, version_of

# The layer of an intervention by the output that it passed on to the model, for captures inside its block.
edited_layers: Any = TensorDictionary()  # Tensor -> AttentionLayer


class Capture:
    """Hand each layer to a consumer, cut off from the model's computation."""

    recomputes = False  # whether the output passed on to the model is recomputed from weights of ours
    joins = True  # whether the parts of a layer, heads that are computed one by one, are handed out together

    def __init__(self, consume: Callable[[AttentionLayer], None]) -> None:
        self.consume = consume

    def check(self) -> None:
        """Raise CaptureError where the state of PyTorch does not allow this policy."""

    def concerns(self, name: str) -> bool:
        """Whether the layer of this name is to be recorded at all."""
        return True

    def prepare(self, weights: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights and values to hand out, for those of an attention call."""
        return weights.detach(), values.detach()

    def receive(self, layer: AttentionLayer) -> Tensor | None:
        """Hand the layer to the user's code; return the weights to use in place of the model's own, None to keep those.

        Whatever that code raises is the user's.
        """
        self.consume(layer)
        return None

    def replay(self, layer: AttentionLayer, weights: Tensor, call: AttentionCall, output: Tensor) -> Tensor:
        """Return the output passed on to the model, given `weights` and the output that it had computed itself."""
        return output

    def finish(self, names: Sequence[str]) -> None:
        """Raise CaptureError if the layers of the last pass, by their names, are not what was asked for."""


class CaptureWithGradients(Capture):
    """Hand out weights that are part of the model's computation: its output depends on them."""

    recomputes, joins = True, False

    def check(self) -> None:
        if not torch.is_grad_enabled():
            raise CaptureError("capture(gradients=True) needs gradients: leave out torch.no_grad()")

    def prepare(self, weights: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if not weights.requires_grad:
            weights = weights if weights.is_leaf else weights.detach()
            weights.requires_grad_()
        return weights, values

    def receive(self, layer: AttentionLayer) -> Tensor:
        self.consume(layer)
        return layer.weights

    def replay(self, layer: AttentionLayer, weights: Tensor, call: AttentionCall, output: Tensor) -> Tensor:
        through = call.replay(weights)
        if not largest(through - output) <= 2 * call.proof.bound:
            raise CaptureError(
                f"the dropout of {layer.name} cannot be repeated, so its weights have no gradients: "
                "put the model in eval mode"
            )
        return output.detach() + (through - through.detach())  # the value is the model's, to the bit


class Intervention(Capture):
    """Replace the model's weights by what an edit makes of them."""

    recomputes, joins = True, False

    def __init__(self, edit: Edit) -> None:
        self.edit = edit
        #: The layers that a ready-made edit names; None for one that may be of any layer.
        self.layers: tuple[str, ...] | None = named_layers(edit)
        self.met: set[str] = set()  # of these

    def concerns(self, name: str) -> bool:
        if self.layers is None:
            return True
        named = [each for each in self.layers if is_named(name, each)]
        self.met.update(named)
        return bool(named)

    def prepare(self, weights: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return weights.clone(), values.detach()  # to be edited in place, perhaps

    def receive(self, layer: AttentionLayer) -> Tensor | None:
        given, version = layer.weights, version_of(layer.weights)
        with DisableTorchFunction():
            weights = self.edit(layer, given)
        if weights is given and version_of(given) == version:
            return None
        if not isinstance(weights, Tensor) or weights.shape != given.shape:
            returned = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise CaptureError(
                f"the edit of {layer.name} returned {returned}: return weights of shape {list(given.shape)}"
            )
        return weights

    def replay(self, layer: AttentionLayer, weights: Tensor, call: AttentionCall, output: Tensor) -> Tensor:
        weights = weights.to(layer.weights)
        edited = call.replay(weights)
        edited_layers[edited] = replace(layer, weights=weights)
        return edited

    def finish(self, names: Sequence[str]) -> None:
        for layer in self.layers or ():
            if layer not in self.met:
                raise CaptureError(f"there was no layer {layer!r} to edit, only {', '.join(names)}")


class PassIsOver(BaseException):
    """Ends a pass of which the rest is not needed; no model's `except Exception` keeps it."""


class SwitchedOff(Capture):
    """Switch attention off and note each call's values: what tokens are without having looked at each other."""

    recomputes, joins = True, False
    needs_weights = False  # or only that heads are scaled

    def __init__(self, stop: int | None = None) -> None:
        self.stop = stop  # number of the call after which the pass may end
        self.values: dict[str, Tensor] = {}
        self.num_queries: dict[str, int] = {}

    def receive(self, layer: AttentionLayer) -> Tensor:
        self.values[layer.name] = layer.values
        self.num_queries[layer.name] = layer.weights.shape[-2]
        if layer.index == self.stop:
            raise PassIsOver
        return self.edited(layer)

    def edited(self, layer: AttentionLayer) -> Tensor:
        """Return what the weights are times, [batch, head, 1, 1], or the weights themselves if it `needs_weights`."""
        return layer.weights.new_zeros(*layer.weights.shape[:2], 1, 1)

    def replay(self, layer: AttentionLayer, weights: Tensor, call: AttentionCall, output: Tensor) -> Tensor:
        if self.needs_weights:
            return call.replay(weights)
        if call.scale is not None:
            return call.scale(weights)
        return call.replay(layer.weights.masked_fill(weights == 0, 0.0))


class OnlyItself(SwitchedOff):
    """Let each query attend to its own key alone: the one of its number where there are as many queries as keys, that
    of `own_keys` [query] where it is known, and to none elsewhere."""

    needs_weights = True

    def __init__(self, own_keys: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.own_keys = own_keys or {}  # by the name of the call
        self.weights: Tensor | None = None  # the model's own, of the call after which the pass ends

    def receive(self, layer: AttentionLayer) -> Tensor:
        if layer.index == self.stop:
            self.weights = layer.weights
        return super().receive(layer)

    def edited(self, layer: AttentionLayer) -> Tensor:
        weights = torch.zeros_like(layer.weights)
        own = self.own_keys.get(layer.name)
        if own is not None:
            weights.scatter_(-1, own.to(weights.device)[:, None].expand(*weights.shape[:-1], 1), 1.0)
        elif weights.shape[-2] == weights.shape[-1]:
            weights.diagonal(dim1=-2, dim2=-1).fill_(1.0)
        return weights


class OneCallOff(SwitchedOff):
    """Switch each of `number` calls off for one picture of the batch, beginning with call `first` for picture 1; none
    for picture 0 and the last one."""

    def __init__(self, first: int, number: int) -> None:
        super().__init__()
        self.first, self.number = first, number

    def edited(self, layer: AttentionLayer) -> Tensor:
        num_pictures, picture = self.number + 2, layer.index - self.first + 1
        factors = layer.weights.new_ones(*layer.weights.shape[:2], 1, 1)
        if 0 < picture <= self.number and len(factors) % num_pictures == 0:
            factors.unflatten(0, (num_pictures, -1))[picture].zero_()
        return factors
