"""The function mode that sees a model's attention calls, proves what it found and records it."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attention_visualizer.attention.callers import (
    MethodCall,
    Stack,
    calling_stack,
    declared_heads,
    fast_path_output,
    innermost_name,
    leaves_fast_path,
    method_call,
)
from attention_visualizer.attention.calls import (
    AttentionCall,
    DeclaredHeads,
    fused_call,
    fused_dropout,
    random_state,
    unweighted_call,
)
from attention_visualizer.attention.function_call import FunctionCall
from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.attention.hand_written import HandWrittenAttention, HandWrittenProduct
from attention_visualizer.attention.kernels import is_kernel, kernels_of
from attention_visualizer.attention.layer_geometry import GeometryFinder, LayerShape
from attention_visualizer.attention.layers import (
    AttentionLayer,
    CapturedAttention,
    CaptureError,
    InternalCaptureError,
    joined,
)
from attention_visualizer.attention.placement import Unplaced
from attention_visualizer.attention.places import is_measuring
from attention_visualizer.attention.policies import Capture, PassIsOver, SwitchedOff, edited_layers
from attention_visualizer.attention.projections import ProjectionWatch
from attention_visualizer.attention.proof import Proof, largest
from attention_visualizer.attention.torch_internals import (
    DisableTorchFunction,
    current_graph_task_id,
    missing_internals,
    multi_head_body,
    multi_head_frame,
    unreadable,
    without_wrappers,
)
from attention_visualizer.support.errors import UserError, summary

ATTENTION = {F.scaled_dot_product_attention, F.multi_head_attention_forward}
#: What a model may begin with, when it cuts images into patches.
TAKES_IMAGES = {F.conv2d, F.unfold, Tensor.unfold, Tensor.reshape, Tensor.view, Tensor.unflatten, Tensor.permute}


class InternalErrors:
    """Context manager that turns any error inside into an InternalCaptureError that names the layer.

    A CaptureError or UserError passes unchanged.
    """

    def __init__(self, model: nn.Module, names: Mapping[int, str]) -> None:
        self.model_name = type(model).__name__
        self.names = names

    def failure(self, error: Exception) -> InternalCaptureError:
        name = innermost_name(self.names, sys._getframe(1)) or self.model_name
        text = f"the attention of {name} could not be captured: {type(error).__name__}: {summary(error)}"
        return InternalCaptureError(text)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, CaptureError | UserError):
            raise self.failure(error) from error


class Recorder(TorchFunctionMode):
    """Record the attention calls of `model` while it is active; `policy` says what becomes of them."""

    def __init__(
        self, model: nn.Module, attention: CapturedAttention, policy: Capture, geometry: Geometry | None = None
    ) -> None:
        super().__init__()
        missing = missing_internals()
        if missing:
            raise InternalCaptureError(
                f"attention cannot be captured with PyTorch {torch.__version__}, which lacks {'; '.join(missing)}"
            )
        if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
            raise CaptureError(
                f"{type(model).__name__} is or contains a TorchScript module, whose calls cannot be captured: "
                "capture the module that it was made from"
            )
        self.model = model
        self.attention = attention
        self.policy = policy
        self.names = {
            id(module): without_wrappers(name) or type(model).__name__ for name, module in model.named_modules()
        }
        self.internal_errors = InternalErrors(model, self.names)
        convolution = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
        self.image_channels = {1, 3} if convolution is None else {1, 3, convolution.in_channels}
        with self.internal_errors:
            self.geometries = (
                None if isinstance(policy, SwitchedOff) else GeometryFinder(model, geometry, self.values_of)
            )
            self.by_hand = HandWrittenAttention()
        self.projections = ProjectionWatch()
        self.num_calls = 0
        self.kernels: dict[str, None] = {}  # operators that compute attention unseen
        self.names_of_pass: list[str] = []
        self.frame_of_pass: FrameType | None = None
        self.parts: list[AttentionLayer] = []  # of the layer that is being computed
        self.method: MethodCall | None = None  # the last that was called with images

    def _may_begin(self, tensor: Any) -> bool:
        """Whether a method with these images may have begun: of so few channels, or features are taken for images."""
        return isinstance(tensor, Tensor) and tensor.ndim == 4 and tensor.shape[1] in self.image_channels

    def values_of(self, call: FunctionCall, policy: SwitchedOff) -> dict[str, Tensor]:
        """Run a call of the model under `policy` and return the values of each attention call that it met."""
        with contextlib.suppress(PassIsOver), Recorder(self.model, CapturedAttention(), policy):
            call()
        return policy.values

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = self._call(function, args, kwargs)
        if self.projections.heads:
            self.projections.see(function, args, kwargs, result)
        return result

    def _call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function for the model, and record it if it is of attention."""
        if is_measuring() and self.geometries is not None:
            return function(*args, **kwargs)
        if function in TAKES_IMAGES and args and self._may_begin(args[0]):
            self.method = method_call(self.names, sys._getframe(2), args[0], self.method) or self.method
        if is_kernel(function) and (owner := innermost_name(self.names, sys._getframe(2))) is not None:
            self.attention.unseen[owner] = None
            self.kernels[str(function)] = None
        # The first: a forward that is repeated for the backward pass (checkpointing).
        if current_graph_task_id() != -1 or not (function in ATTENTION or self.by_hand.concerns(function)):
            return function(*args, **kwargs)
        call = FunctionCall(function, args, kwargs)
        if function is F.scaled_dot_product_attention:
            with self.internal_errors:
                repeats = self.policy.recomputes and fused_dropout(call) > 0
                before = random_state(next(call.tensors()).device) if repeats else None
            output = call()
            if isinstance(self.policy, SwitchedOff) and not self.policy.needs_weights and not fused_dropout(call):
                return self._record(output, lambda heads: unweighted_call(heads, output, call), sys._getframe(2))
            return self._record(output, lambda heads: fused_call(heads, output, call, before), sys._getframe(2))
        if function is F.multi_head_attention_forward:
            return self._multi_head(call, sys._getframe(2))
        try:  # which costs nothing, unlike a context, at each call of a model
            known = self.by_hand.before(call)
        except Exception as error:
            raise self.internal_errors.failure(error) from error
        output = call()
        if isinstance(known, HandWrittenProduct):
            product = known
            return self._record(output, lambda heads: product.describe(heads, output), sys._getframe(2))
        try:
            self.by_hand.after(call, known, output)
        except Exception as error:
            raise self.internal_errors.failure(error) from error
        return output

    def _multi_head(self, call: FunctionCall, frame: FrameType) -> Any:
        """Run multi_head_attention_forward and return what the model gets when nothing is captured.

        The attention inside it is captured like any other.
        """
        with self:
            output = multi_head_body(*call.args, **call.kwargs)
        if self.policy.recomputes:
            return output
        with self.internal_errors:
            fast = fast_path_output(multi_head_frame(frame), self.names)
            if fast is None:
                return output
            self._check("nn.MultiheadAttention", Proof.of(output[0], fast[0], largest(fast[0])))
        return fast

    def _record(self, output: Tensor, describe: Callable[[DeclaredHeads], AttentionCall], frame: FrameType) -> Tensor:
        """Record the attention call that returned `output`, and return the output passed on to the model."""
        began = time.perf_counter()
        with self.internal_errors:
            recorded = self._layer(output, describe, frame)
        if recorded is None:
            return output
        layer, call, modules = recorded
        whole = self._joined(layer) if self.policy.joins and layer.part is not None else layer
        if whole is None:
            return output
        weights = self.policy.receive(whole)
        if weights is not None:
            with self.internal_errors, DisableTorchFunction():
                output = self.policy.replay(layer, weights, call, output)
        if layer.part is None and self.geometries is not None:
            with self.internal_errors, DisableTorchFunction():
                self.projections.begin(layer.applied, output, layer.weights, layer.values, modules)
        self.attention.seconds += time.perf_counter() - began
        return output

    def _layer(
        self, output: Tensor, describe: Callable[[DeclaredHeads], AttentionCall], frame: FrameType
    ) -> tuple[AttentionLayer, AttentionCall, list[nn.Module]] | None:
        """Return an attention call as a layer, proved, and the modules that are running; None for the attention of
        another model."""
        stack = calling_stack(self.names, frame, self.method)
        if not stack.modules:
            return None
        self.policy.check()
        name = self.names[id(stack.modules[0])]
        if (reason := unreadable(output)) is not None:
            raise CaptureError(f"{name} computes its attention {reason}")
        if stack.is_checkpointed and self.policy.recomputes and self.geometries is not None:
            raise CaptureError(
                f"{name} runs under torch.utils.checkpoint, which repeats it in the backward pass, uncaptured: "
                "disable checkpointing for gradients and interventions"
            )
        name, index = self._next_name(name, stack)
        if index == 0 and self.geometries is not None:
            self.parts.clear()
            self.geometries.begin_pass(stack)
            self.attention.unseen.update(dict.fromkeys(self.geometries.measured.streams.unseen))
        self.num_calls += 1
        self.projections.end()
        if not self.policy.concerns(name):
            return None
        keeps_graph = torch.is_grad_enabled() and self.policy.recomputes
        # No calls of the model: an enclosing capture skips them.
        with DisableTorchFunction(), torch.set_grad_enabled(keeps_graph):
            call = describe(declared_heads(stack))
            edited = edited_layers.get(output)
            proof = call.proof if edited is None else replace(call.proof, error=edited.error)
            self._check(name, proof)
            weights, values = self.policy.prepare(call.weights if edited is None else edited.weights, call.values)
            place = self._place(LayerShape(name, weights.shape, stack.images, stack.is_text))
            layer = AttentionLayer(
                name=name,
                index=index,
                weights=weights,
                values=values,
                geometry=None if isinstance(place, Unplaced) else place,
                error=proof.error,
                source=call.source,
                same_output=not stack.is_compiled and not any(map(leaves_fast_path, stack.modules)),
                unplaced=place.reason if isinstance(place, Unplaced) else None,
                in_sequence=self.geometries is None or self.geometries.is_in_sequence(name),
                part=None if self.geometries is None else self.geometries.part(name),
            )
        return layer, call, stack.modules

    def _joined(self, part: AttentionLayer) -> AttentionLayer | None:
        """Return the layer of which this is the last part; None before."""
        self.parts.append(part)
        assert part.part is not None
        if len(self.parts) < part.part.num_parts:
            return None
        parts, self.parts = self.parts, []
        return joined(parts)

    def _place(self, layer: LayerShape) -> Geometry | Unplaced:
        return Unplaced("it is being measured") if self.geometries is None else self.geometries.of_layer(layer)

    def _next_name(self, name: str, stack: Stack) -> tuple[str, int]:
        """Return the name of the next call of module `name` and its number in the pass."""
        if stack.outermost is not self.frame_of_pass:
            self.frame_of_pass = stack.outermost
            if name in self.names_of_pass:  # another forward pass begins; else another part of the model is called
                self.names_of_pass.clear()
                self.attention.layers.clear()
        self.names_of_pass.append(name)
        repeats = self.names_of_pass.count(name)
        return name if repeats == 1 else f"{name}#{repeats}", len(self.names_of_pass) - 1  # a module applied again

    def _check(self, name: str, proof: Proof) -> None:
        """Raise CaptureError unless what was found reproduces the model's output."""
        error = proof.error
        if math.isnan(error):
            raise CaptureError(
                f"the attention of {name} is not finite: its weights or its input are NaN or infinite; "
                "if the model was training, it has diverged: lower its learning_rate"
            )
        if not error <= proof.bound:
            raise CaptureError(
                f"the weights found for {name} do not reproduce its output: they differ by {error:.2e}, "
                f"above the bound of {proof.bound:.2e} for {proof.dtype}"
                + (", products of reduced precision allowed for" if proof.is_reduced else "")
            )
        self.attention.reconstruction_error = max(self.attention.reconstruction_error, error)

    def finish(self) -> None:
        """Raise CaptureError if nothing was recorded or not what was asked for."""
        self.frame_of_pass = self.method = None  # a frame keeps its arguments alive
        self.projections.end()
        if self.num_calls == 0:
            if kernels := [*kernels_of(self.model), *self.kernels]:
                raise CaptureError(
                    f"the attention of {type(self.model).__name__} cannot be seen, because its kernel hides it "
                    f"({', '.join(kernels)}): let the model use PyTorch's scaled_dot_product_attention"
                )
            raise CaptureError(
                f"no attention of {type(self.model).__name__} was captured: the model was not run inside the block, or "
                "its attention is none of scaled_dot_product_attention, multi_head_attention_forward (torch.nn."
                "functional), and softmax(query @ key) @ value with matmul, bmm or einsum; or it ran in another thread"
            )
        self.policy.finish(self.names_of_pass)
        if self.geometries is not None:
            self.geometries.finish()
