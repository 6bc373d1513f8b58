"""The private parts of PyTorch that capturing needs are there; where one is not, one clear error says which."""

from __future__ import annotations

import runpy
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.utils._python_dispatch
import torch.utils.checkpoint
import torch.utils.weak
from torch import nn

from attention_visualizer.attention import torch_internals
from attention_visualizer.attention.capture import CaptureError, capture, intervene
from attention_visualizer.attention.model_search import find_model
from tests.helpers.models import HandWritten

NAMES = {
    "torch._C._current_graph_task_id",
    "torch._C._functorch.is_batchedtensor",
    "torch._C.DisableTorchFunction",
    "torch.utils.weak.WeakIdKeyDictionary",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.Tensor._version",
    "torch.nn.Module._call_impl",
    "torch.nn.MultiheadAttention.forward",
    "torch.utils.checkpoint.checkpoint",
    "torch.nn.functional.multi_head_attention_forward",
    "torch.nn.Module._compiled_call_impl",
    "torch._dynamo.OptimizedModule._orig_mod",
}


def test_every_private_part_of_pytorch_is_present() -> None:
    assert {internal.path for internal in torch_internals.INTERNALS} == NAMES
    missing = torch_internals.missing_internals()
    assert not missing, f"PyTorch {torch.__version__} lacks what capturing needs: {'; '.join(missing)}"


def without_code(*_: Any, **__: Any) -> None:
    """Stands for a function whose body is another: no name and no local variable of it is the expected one."""


REMOVED: dict[str, tuple[Any, str, Any]] = {  # what is left of each part where it is removed; None: nothing
    "torch._C._current_graph_task_id": (torch._C, "_current_graph_task_id", None),
    "torch._C._functorch.is_batchedtensor": (torch._C._functorch, "is_batchedtensor", None),
    "torch._C.DisableTorchFunction": (torch._C, "DisableTorchFunction", None),
    "torch.utils.weak.WeakIdKeyDictionary": (torch.utils.weak, "WeakIdKeyDictionary", None),
    "torch.utils._python_dispatch.TorchDispatchMode": (torch.utils._python_dispatch, "TorchDispatchMode", None),
    "torch.nn.Module._call_impl": (nn.Module, "_call_impl", without_code),
    "torch.nn.MultiheadAttention.forward": (nn.MultiheadAttention, "forward", without_code),
    "torch.utils.checkpoint.checkpoint": (torch.utils.checkpoint, "checkpoint", without_code),
    "torch.nn.functional.multi_head_attention_forward": (
        nn.functional,
        "multi_head_attention_forward",
        without_code,
    ),
    "torch.nn.Module._compiled_call_impl": (nn.Module, "_compiled_call_impl", None),
    "torch._dynamo.OptimizedModule._orig_mod": (torch._dynamo, "OptimizedModule", None),
}


@pytest.mark.parametrize("name", REMOVED)
def test_a_missing_part_is_named_by_the_capture_and_fails_no_import(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    owner, attribute, rest = REMOVED[name]
    model = HandWritten()
    with monkeypatch.context() as changed:
        if rest is None:
            changed.delattr(owner, attribute)
        else:
            changed.setattr(owner, attribute, rest)
        for block in (capture(model), intervene(model, lambda layer, weights: weights)):
            with pytest.raises(CaptureError, match=rf"PyTorch {torch.__version__.split('+')[0]}.*lacks {name}"), block:
                pass
        with pytest.raises(CaptureError, match=rf"^the search .* failed: .* lacks {name}"):
            find_model(model, torch.zeros(2, 1, 15, 15))
        imported_again = runpy.run_path(torch_internals.__file__, run_name="internals_of_another_version")
        assert [part.partition(",")[0] for part in imported_again["missing_internals"]()] == [name]
    assert not torch_internals.missing_internals()
