"""The attention of a model, layer by layer, while its own forward runs, with proof that it is the real one.

    with capture(model) as attention:
        logits = model(images)
    attention["blocks.3"].weights  # [batch, head, query, key]

Fused attention hides its weights and bypasses hooks. A `TorchFunctionMode` sees the call itself: it lets the model
have its own output, takes or rebuilds the weights from the same arguments, and measures how far what they give is from
that output. Nothing in the model is touched, so nothing can be left behind.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, overload

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from attention_visualizer.attention.callers import (
    Stack,
    calling_stack,
    fast_path_output,
    leaves_fast_path,
    output_projection,
    stated_heads,
)
from attention_visualizer.attention.calls import (
    AttentionCall,
    DeclaredHeads,
    Source,
    fused_call,
    fused_dropout,
    largest,
    multi_head_body,
    random_state,
    tensors_of,
)
from attention_visualizer.attention.geometry import Geometry, GeometryFinder
from attention_visualizer.attention.hand_written import HandWrittenAttention

# Largest accepted |weights @ values - the model's output|, relative to the largest |value|, by dtype of the model's
# attention: some hundred times its rounding.
ERROR_BOUND = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

Edit = Callable[["AttentionLayer", Tensor], Tensor]


class CaptureError(RuntimeError):
    """The attention could not be seen, or what was seen does not reproduce the model's own output."""


@dataclass(frozen=True)
class AttentionLayer:
    """One attention call: where it came from, its weights, and the measured error of the reconstruction.

    name: of the module that called, "#2" and so on where it is applied again in one pass; index: in the order of calls.
    weights: [batch, head, query, key], float32 (float64 for such a model), after softmax and before dropout; windows
    count as batch. values: [batch, head, key, head_dim]. error: the largest difference between what weights and values
    give and the model's own output.
    geometry: where the keys lie on the image; None where that is not known.
    source: "multiplied", the very tensor that the model multiplies, or "rebuilt" from its queries and keys.
    same_output: watching left the model's output as it is, to the bit; False where it made the model leave a fast path
    (nn.TransformerEncoderLayer in eval mode, torch.compile), which moves its output by rounding.
    projection: weight of the module's output projection [embed, head * head_dim], None where it was not found.
    """

    name: str
    index: int
    weights: Tensor
    values: Tensor
    geometry: Geometry | None
    error: float
    source: Source = "rebuilt"
    same_output: bool = True
    projection: Tensor | None = None


class CapturedAttention:
    """The layers of the last forward pass, in the order they were computed. Indexed by number or by name.

    reconstruction_error: the largest over all layers and passes; seconds: time that watching took.
    """

    def __init__(self) -> None:
        self.layers: list[AttentionLayer] = []
        self.reconstruction_error = 0.0
        self.seconds = 0.0

    @overload
    def __getitem__(self, key: str | int) -> AttentionLayer: ...
    @overload
    def __getitem__(self, key: slice) -> list[AttentionLayer]: ...
    def __getitem__(self, key: str | int | slice) -> AttentionLayer | list[AttentionLayer]:
        if isinstance(key, int | slice):
            return self.layers[key]
        found = [layer for layer in self.layers if is_named(layer, key)]
        if len(found) != 1:
            names = ", ".join(layer.name for layer in self.layers)
            raise KeyError(f"{key!r} names {len(found)} attention layers; there are: {names}")
        return found[0]

    def __iter__(self) -> Iterator[AttentionLayer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def is_named(layer: AttentionLayer, name: str) -> bool:
    """`name` is the layer's own or that of a module around it: "blocks.3" is blocks.3.attn."""
    return layer.name == name or layer.name.startswith(f"{name}.")


@contextmanager
def capture(
    model: nn.Module,
    consume: Callable[[AttentionLayer], None] | None = None,
    geometry: Geometry | None = None,
    gradients: bool = False,
) -> Iterator[CapturedAttention]:
    """Records every attention call that `model` makes inside the block.

    With `consume`, each layer is handed over as it is computed and none is kept, so memory is one layer's.
    `geometry` says where tokens lie, for models that do not state it themselves.
    With `gradients`, the weights are part of the computation: `torch.autograd.grad(score, layer.weights)` works on
    them, also in a model whose parameters are frozen. The model's output is the same to the bit all the same.

    Raises CaptureError when weights do not reproduce the model's output, when `geometry` fits no layer, or when a
    block that ended normally saw no attention at all.
    """
    attention = CapturedAttention()
    with _watching(_Watch(model, attention, consume, geometry, gradients)):
        yield attention


@contextmanager
def intervene(model: nn.Module, edit: Edit) -> Iterator[CapturedAttention]:
    """Inside the block, `model` goes on with the weights that `edit(layer, weights)` returns: what it then computes is
    what it would have computed with them.

    weights and what is returned: [batch, head, query, key], before dropout; returning `weights` as they came changes
    nothing. Ready-made edits are in `attention_visualizer.attention.edits`. A capture or another intervention
    inside the block gets the edited weights; a capture around it gets those that the model had computed.
    Raises CaptureError as `capture` does.
    """
    attention = CapturedAttention()
    with _watching(_Watch(model, attention, lambda layer: None, None, False, edit)):
        yield attention


@contextmanager
def _watching(watch: _Watch) -> Iterator[None]:
    with _eager(), watch:
        yield
    watch.finish()


class _Eager:
    """Compiled modules run their original code inside: what torch.compile has fused cannot be seen.

    The setting belongs to the whole process, so the first of several blocks makes it, and the last one ends it.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.blocks = 0
        self.setting = ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if "torch._dynamo" not in sys.modules:  # nothing can have been compiled
            yield
            return
        with self.lock:
            if self.blocks == 0:
                self.setting.enter_context(torch.compiler.set_stance("force_eager"))
            self.blocks += 1
        try:
            yield
        finally:
            with self.lock:
                self.blocks -= 1
                if self.blocks == 0:
                    self.setting.close()


_eager = _Eager()


# What an intervention made of an attention call, by the output that the model goes on with; for blocks inside it.
_edits_by_output: Any = WeakIdKeyDictionary()  # Tensor -> AttentionLayer


class _Watch(TorchFunctionMode):
    def __init__(
        self,
        model: nn.Module,
        attention: CapturedAttention,
        consume: Callable[[AttentionLayer], None] | None,
        geometry: Geometry | None,
        gradients: bool,
        edit: Edit | None = None,
    ) -> None:
        super().__init__()
        if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
            raise CaptureError(
                f"{type(model).__name__} is or contains a TorchScript module, whose calls cannot be seen: "
                "capture the module that it was made from"
            )
        self.model = model
        self.names = {
            id(module): name.replace("_orig_mod.", "").removesuffix("_orig_mod") or type(model).__name__
            for name, module in model.named_modules()
        }
        convolutions = (module for module in model.modules() if isinstance(module, nn.Conv2d))
        self.channels = {1, 3, 4, *(first.in_channels for first in (next(convolutions, None),) if first is not None)}
        self.attention = attention
        self.consume = consume
        self.edit = edit
        self.gradients = gradients
        self.geometries = GeometryFinder(model, geometry)
        self.by_hand = HandWrittenAttention()
        self.num_calls = 0
        self.names_of_pass: list[str] = []
        self.edit_met = False  # the layer that a ready-made edit names
        self.frame_of_pass: FrameType | None = None

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch._C._current_graph_task_id() != -1:  # a forward repeated for the backward pass (checkpointing)
            return function(*args, **kwargs)
        if function is F.scaled_dot_product_attention:
            repeats = (self.gradients or self.edit is not None) and fused_dropout(args, kwargs) > 0
            before = random_state(next(tensors_of((*args, *kwargs.values()))).device) if repeats else None
            output = function(*args, **kwargs)
            return self._seen(output, lambda heads: fused_call(heads, output, args, kwargs, before))
        if function is F.multi_head_attention_forward:
            return self._multi_head(args, kwargs)
        product = self.by_hand.product(function, args, kwargs)
        if product is not None:
            output = function(*args, **kwargs)
            return self._seen(output, lambda heads: product.call(heads, function, output, args, kwargs))
        return self.by_hand.run(function, args, kwargs)

    def _multi_head(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The attention inside is seen like any other; what comes back is what the model gets when not watched."""
        frame = sys._getframe(2)
        while frame.f_back is not None and frame.f_code is not nn.MultiheadAttention.forward.__code__:
            frame = frame.f_back
        watched_only = not self.gradients and self.edit is None
        own = fast_path_output(frame, self.names) if watched_only else None
        with self:
            output = multi_head_body(*args, **kwargs)
        if own is None:
            return output
        difference = largest(output[0] - own[0])
        self._check("nn.MultiheadAttention", difference, largest(own[0]), own[0].dtype)
        return own

    def _seen(self, output: Tensor, describe: Callable[[DeclaredHeads], AttentionCall]) -> Tensor:
        """Records the call and returns what the model goes on with."""
        began = time.perf_counter()
        stack = calling_stack(self.names, self.channels, sys._getframe(2))
        if not stack.modules:
            return output  # somebody else's attention
        if self.gradients and not torch.is_grad_enabled():
            raise CaptureError("capture(gradients=True) needs gradients: leave out torch.no_grad()")
        name = self.names[id(stack.modules[0])]
        if torch._C._functorch.is_batchedtensor(output):
            raise CaptureError(f"{name} computes its attention inside torch.vmap, where it cannot be seen")
        if stack.checkpointed and (self.gradients or self.edit is not None):
            raise CaptureError(
                f"{name} runs under torch.utils.checkpoint, which repeats it in the backward pass, unwatched: "
                "switch checkpointing off for gradients and interventions"
            )
        name, index = self._next_name(name, stack)
        keeps_graph = torch.is_grad_enabled() and (self.gradients or self.edit is not None)
        with (
            torch._C.DisableTorchFunction(),
            torch.set_grad_enabled(keeps_graph),
        ):  # no calls of the model: an enclosing capture skips them
            call = describe(stated_heads(stack))
            edited = _edits_by_output.get(output)
            # In place: the product is there for this alone.
            error = largest(call.product.detach().sub_(call.expected.detach())) if edited is None else edited.error
            self._check(name, error, call.magnitude, call.expected.dtype)
            weights = call.weights if edited is None else edited.weights
            if self.edit is not None:
                weights = weights.clone()  # to be edited in place, perhaps
            elif not self.gradients:
                weights = weights.detach()
            if self.gradients and not weights.requires_grad:
                weights = weights.requires_grad_() if weights.is_leaf else weights.detach().requires_grad_()
            layer = AttentionLayer(
                name,
                index,
                weights,
                call.values if self.gradients else call.values.detach(),
                None
                if stack.of_text
                else self.geometries.of_layer(index, weights.shape, call.values.shape[-1], stack.modules, stack.images),
                error,
                call.source,
                not stack.compiled and not any(leaves_fast_path(module) for module in stack.modules),
                output_projection(stack.modules, call.values),
            )
        self.num_calls += 1
        if self.consume is None:
            self.attention.layers.append(layer)
        else:
            self.consume(layer)
        if self.edit is not None:
            output = self._edited(layer, call, output)
        elif self.gradients:
            with torch._C.DisableTorchFunction():
                through = call.replay(weights)
                if not largest(through - output) <= 2 * ERROR_BOUND[output.dtype] * call.magnitude:
                    raise CaptureError(
                        f"the dropout of {name} cannot be repeated, so its weights have no gradients: "
                        "put the model in eval mode"
                    )
                output = output.detach() + (through - through.detach())  # the value is the model's, to the bit
        self.attention.seconds += time.perf_counter() - began
        return output

    def _next_name(self, name: str, stack: Stack) -> tuple[str, int]:
        """Of the next call, with its number in the pass."""
        if stack.outermost is not self.frame_of_pass:
            self.frame_of_pass = stack.outermost
            if name in self.names_of_pass:  # another forward pass begins; else another part of the model is called
                self.names_of_pass.clear()
                self.attention.layers.clear()
        self.names_of_pass.append(name)
        repeats = self.names_of_pass.count(name)
        return name if repeats == 1 else f"{name}#{repeats}", len(self.names_of_pass) - 1  # a module applied again

    def _edited(self, layer: AttentionLayer, call: AttentionCall, output: Tensor) -> Tensor:
        assert self.edit is not None
        self.edit_met = self.edit_met or is_named(layer, getattr(self.edit, "layer", layer.name))
        with torch._C.DisableTorchFunction():
            given, version = layer.weights, layer.weights._version
            weights = self.edit(layer, given)
            if weights is given and given._version == version:
                return output
            if not isinstance(weights, Tensor) or weights.shape != given.shape:
                found = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
                raise CaptureError(
                    f"the edit of {layer.name} returned {found}: return weights of shape {list(given.shape)}"
                )
            weights = weights.to(given)
            output = call.replay(weights)
        _edits_by_output[output] = replace(layer, weights=weights)
        return output

    def _check(self, name: str, error: float, magnitude: float, dtype: torch.dtype) -> None:
        bound = ERROR_BOUND[dtype] * magnitude
        if math.isnan(error):
            raise CaptureError(
                f"the attention of {name} is not finite: its weights or its input are NaN or infinite; "
                "if the model was training, it has diverged: lower its learning_rate"
            )
        if not error <= bound:
            raise CaptureError(
                f"the weights found for {name} do not reproduce its output: they differ by {error:.2e}, "
                f"above the bound of {bound:.2e} for {dtype}"
            )
        self.attention.reconstruction_error = max(self.attention.reconstruction_error, error)

    def finish(self) -> None:
        self.frame_of_pass = None  # a frame keeps its arguments alive
        if self.num_calls == 0:
            raise CaptureError(
                f"no attention of {type(self.model).__name__} was seen: the model was not run inside the block, or "
                "its attention is none of scaled_dot_product_attention, multi_head_attention_forward (torch.nn."
                "functional), and softmax(query @ key) @ value with matmul, bmm or einsum; or it ran in another thread"
            )
        if self.edit is not None and not self.edit_met:
            raise CaptureError(
                f"there was no layer {self.edit.layer!r} to edit, only {', '.join(self.names_of_pass)}"  # type: ignore[attr-defined]
            )
        self.geometries.finish()
