"""The attention of a model, layer by layer, while its own forward runs, with proof that it is the real one.

    with capture(model) as attention:
        logits = model(images)
    attention["blocks.3"].weights  # [batch, head, query, key]

Fused attention hides its weights and bypasses hooks. A `TorchFunctionMode` sees the call itself: it lets the model
have its own fused output, rebuilds the weights from the same arguments, and measures how far what they give is from
that output. Nothing in the model is touched, so nothing can be left behind.
"""

from __future__ import annotations

import inspect
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attention_visualizer.geometry import Geometry, find_geometry

# Largest accepted |weights @ values - fused output|, relative to the largest |value|, by dtype of the model's
# attention: some hundred times its rounding.
ERROR_BOUND = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class CaptureError(RuntimeError):
    """The attention could not be seen, or what was seen does not reproduce the model's own output."""


@dataclass(frozen=True)
class AttentionLayer:
    """One attention call: where it came from, its weights, and the measured error of the reconstruction.

    name: of the module that called, "#2" and so on where it is applied again in one pass; index: in the order of calls.
    weights: [batch, head, query, key], float32 (float64 for such a model), after softmax and before dropout.
    values: [batch, head, key, head_dim]; None where only the weights can be had. error: the largest difference
    between what the weights give and the model's own output.
    """

    name: str
    index: int
    weights: Tensor
    values: Tensor | None
    geometry: Geometry | None
    error: float


class CapturedAttention:
    """The layers of the last forward pass, in the order they were computed. Indexed by number or by name.

    reconstruction_error: the largest over all layers and passes; seconds: time that watching took.
    """

    def __init__(self) -> None:
        self.layers: list[AttentionLayer] = []
        self.reconstruction_error = 0.0
        self.seconds = 0.0

    def __getitem__(self, key: str | int) -> AttentionLayer:
        if isinstance(key, int):
            return self.layers[key]
        found = [layer for layer in self.layers if layer.name == key or layer.name.startswith(f"{key}.")]
        if len(found) != 1:
            names = ", ".join(layer.name for layer in self.layers)
            raise KeyError(f"{key!r} names {len(found)} attention layers; there are: {names}")
        return found[0]

    def __iter__(self) -> Iterator[AttentionLayer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


@contextmanager
def capture(
    model: nn.Module, consume: Callable[[AttentionLayer], None] | None = None, geometry: Geometry | None = None
) -> Iterator[CapturedAttention]:
    """Records every attention call that `model` makes inside the block.

    With `consume`, each layer is handed over as it is computed and none is kept, so memory is one layer's.
    Raises CaptureError when weights do not reproduce the model's output, or when a block that ended normally
    saw no attention at all.
    """
    attention = CapturedAttention()
    mode = _ObserveAttention(model, attention, consume, geometry or find_geometry(model))
    with mode:
        yield attention
    mode.forget_frames()
    if mode.num_calls == 0:
        raise CaptureError(
            f"no attention of {type(model).__name__} was seen: the model was not run inside the block, or it calls "
            "neither scaled_dot_product_attention nor multi_head_attention_forward of torch.nn.functional"
        )


class _ObserveAttention(TorchFunctionMode):
    def __init__(
        self,
        model: nn.Module,
        attention: CapturedAttention,
        consume: Callable[[AttentionLayer], None] | None,
        geometry: Geometry | None,
    ) -> None:
        super().__init__()
        self.names = {id(module): name or type(model).__name__ for name, module in model.named_modules()}
        self.attention = attention
        self.consume = consume
        self.geometry = geometry
        self.num_calls = 0
        self.names_of_pass: list[str] = []
        self.frame_of_pass: FrameType | None = None

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        if function in REBUILD:
            name, outermost = self._calling_modules()
            if name is not None:  # else it is somebody else's attention
                self._record(name, outermost, REBUILD[function], output, args, kwargs)
        return output

    def _calling_modules(self) -> tuple[str | None, FrameType | None]:
        """From the call stack: the name of the model's innermost module, and the frame of its outermost one."""
        innermost, outermost = None, None
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            name = self.names.get(id(frame.f_locals.get("self")))
            if name is not None:
                innermost, outermost = innermost or name, frame
            frame = frame.f_back
        return innermost, outermost

    def forget_frames(self) -> None:
        """A frame keeps its arguments alive."""
        self.frame_of_pass = None

    @torch.no_grad()
    def _record(
        self,
        name: str,
        outermost: FrameType | None,
        rebuild: Callable[..., Rebuilt],
        output: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        began = time.perf_counter()
        if outermost is not self.frame_of_pass:  # another forward pass begins
            self.frame_of_pass = outermost
            self.names_of_pass.clear()
            self.attention.layers.clear()
        self.names_of_pass.append(name)
        repeats = self.names_of_pass.count(name)
        name = name if repeats == 1 else f"{name}#{repeats}"  # a module that is applied again
        with torch._C.DisableTorchFunction():  # these are no calls of the model: an enclosing capture must not see them
            rebuilt = rebuild(output, *args, **kwargs)
        error = largest(rebuilt.output - rebuilt.expected)
        bound = ERROR_BOUND[rebuilt.expected.dtype] * rebuilt.magnitude
        if math.isnan(error):
            raise CaptureError(
                f"the attention of {name} is not finite: its weights or its input are NaN or infinite; "
                "if the model was training, it has diverged: lower its learning_rate"
            )
        if not error <= bound:
            raise CaptureError(
                f"the weights rebuilt for {name} do not reproduce its output: they differ by {error:.2e}, "
                f"above the bound of {bound:.2e} for {rebuilt.expected.dtype}"
            )
        layer = AttentionLayer(name, len(self.names_of_pass) - 1, rebuilt.weights, rebuilt.values, self.geometry, error)
        self.num_calls += 1
        self.attention.reconstruction_error = max(self.attention.reconstruction_error, error)
        if self.consume is None:
            self.attention.layers.append(layer)
        else:
            self.consume(layer)
        self.attention.seconds += time.perf_counter() - began


class Rebuilt(NamedTuple):
    """weights and values as in AttentionLayer; `output` is what they give and `expected` what the model computed.

    magnitude: of the numbers that are summed, to judge the difference by.
    """

    weights: Tensor
    values: Tensor | None
    output: Tensor
    expected: Tensor
    magnitude: float


def rebuild_fused(output: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Rebuilt:
    """From the arguments of `scaled_dot_product_attention` and its output."""
    weights, values = attention_weights(query, key, value, *args, **kwargs)
    dropout = args[1] if len(args) > 1 else kwargs.get("dropout_p", 0.0)
    if dropout:  # the model's own output without its random part, to compare with
        args = (*args[:1], 0.0, *args[2:]) if len(args) > 1 else args
        kwargs = kwargs if len(args) > 1 else {**kwargs, "dropout_p": 0.0}
        output = F.scaled_dot_product_attention(query, key, value, *args, **kwargs)
    with torch.autocast(values.device.type, enabled=False):  # which would round the product
        product = weights @ values
    return Rebuilt(weights, values, product, output, largest(values))


def rebuild_multi_head(output: tuple[Tensor, Tensor | None], *args: Any, **kwargs: Any) -> Rebuilt:
    """From the arguments of `multi_head_attention_forward` and its output: asks it for the weights of each head.

    They are what that function multiplies; its output projection has been applied on both sides.
    """
    given = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
    given.apply_defaults()
    arguments = given.arguments
    dropout = arguments["training"] and arguments["dropout_p"] > 0
    arguments |= {"training": False}
    expected = output[0]
    if dropout:  # the model's own output without its random part
        expected = F.multi_head_attention_forward(**arguments | {"need_weights": False})[0]
    arguments |= {"need_weights": True, "average_attn_weights": False}
    again, weights = F.multi_head_attention_forward(**arguments)
    assert weights is not None
    weights = weights if weights.ndim == 4 else weights[None]  # a single image without its batch axis
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    return Rebuilt(weights, None, again, expected, largest(expected))


def largest(values: Tensor) -> float:
    """The largest magnitude; NaN if there is one, 0 of nothing."""
    if not values.numel():
        return 0.0
    low, high = torch.aminmax(values)  # one pass and no copy, unlike abs().max()
    return float(torch.maximum(-low, high))


REBUILD: dict[Callable[..., Any], Callable[..., Rebuilt]] = {
    F.scaled_dot_product_attention: rebuild_fused,
    F.multi_head_attention_forward: rebuild_multi_head,
}


def attention_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """What `scaled_dot_product_attention` multiplies, for its arguments: (weights before dropout, values).

    Both at least float32; with grouped queries, values are repeated for each query head.
    """
    with torch.autocast(query.device.type, enabled=False):
        dtype = torch.promote_types(query.dtype, torch.float32)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if enable_gqa:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
            value = value.repeat_interleave(query.shape[-3] // value.shape[-3], dim=-3)
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        # Contiguous heads multiply in less than half the time, copies included.
        scores = (query.contiguous() @ key.contiguous().transpose(-2, -1)).mul_(scale)
        if is_causal:
            causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~causal, -math.inf)
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                scores = scores.masked_fill(~attn_mask, -math.inf)
            else:
                scores = scores + attn_mask
        # A query that may look at no key attends to nothing, as in the fused attention.
        return scores.softmax(dim=-1).masked_fill((scores == -math.inf).all(dim=-1, keepdim=True), 0.0), value
