"""Models as they are: those that stay where they are, with tensors of every kind, or with a forward that fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from attention_visualizer.analysis.preparation import moved
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.files.digests import model_digest
from attention_visualizer.support.errors import UserError
from attention_visualizer.visualizer import AttentionVisualizer


def vit(**parts: Any) -> nn.Module:
    torch.manual_seed(5)
    small = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 3, "num_classes": 3}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **small).eval()
    for name, part in parts.items():
        model.register_buffer(name, part) if type(part) is Tensor else setattr(model, name, part)
    return model


def refuse(*given: Any, **options: Any) -> Any:
    raise ValueError("this model stays on its device")


def study_of(model: nn.Module, folder: Path, **options: Any) -> Study:
    Image.new("RGB", (16, 16), "red").save(folder / "a.png")
    return AttentionVisualizer(model=model, images=folder, output_dir=folder / "out", device="cpu", **options).study


@pytest.mark.parametrize(
    "part",
    [
        nn.Parameter(torch.empty(3, device="meta")),
        torch.empty(3, device="meta"),
        torch.eye(4).to_sparse(),
        torch.eye(4).to_sparse_csr(),
        torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8),
        nn.LazyLinear(3),
        nn.LazyBatchNorm1d(),
        torch.ones(3, dtype=torch.complex64),
        torch.tensor([True, False]),
    ],
    ids=lambda part: f"{type(part).__name__} {getattr(part, 'layout', '')} {getattr(part, 'dtype', '')}",
)
def test_tensors_of_every_kind(tmp_path: Path, part: Any) -> None:
    model = vit(extra=part)
    found = study_of(model, tmp_path)
    assert found.first_observation.head_maps.shape == (1, 1, 3, 2, 2) and found.target.num_parameters > 0
    assert model_digest(model) == model_digest(vit(extra=part)) != model_digest(vit())


def test_digests_tell_contents_apart() -> None:
    def digest(part: Tensor) -> str:
        return model_digest(vit(extra=part))

    assert digest(torch.eye(3).to_sparse()) != digest((2 * torch.eye(3)).to_sparse())
    assert digest(torch.ones(2, dtype=torch.complex64)) != digest(torch.full((2,), 1 + 1j))


def test_a_model_that_is_where_it_should_be_is_not_moved(tmp_path: Path) -> None:
    assert study_of(vit(to=refuse), tmp_path).first_observation.layer_names
    with pytest.raises(UserError, match=r"VisionTransformer cannot be moved to meta \(this model stays .*: move it"):
        moved(vit(to=refuse), torch.device("meta"))


class Before(nn.Module):
    """Does something with the images first."""

    def __init__(self, do: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.vit = vit()
        self.do = do

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.vit(images)
        self.do(output)
        return output


def fail(error: Exception) -> Callable[[Tensor], Any]:
    def do(output: Tensor) -> None:
        raise error

    return do


@pytest.mark.parametrize(
    ("do", "words"),
    [
        (Tensor.retain_grad, "needs gradients, and an analysis runs it without .torch.no_grad"),
        (lambda output: output.register_hook(print), "needs gradients"),
        (lambda output: output.sum().backward(), "needs gradients"),
        (fail(KeyError("mask")), "KeyError: 'mask'$"),
        (fail(TypeError("forward() missing 1 required argument")), "TypeError: forward.. missing 1 required argument$"),
        (fail(RuntimeError("no kernel image is available")), "RuntimeError: no kernel image is available$"),
        (
            fail(AssertionError("Input height (16) doesn't match model (224)")),
            "match model .*image_size= or image_format=",
        ),
    ],
)
def test_a_forward_that_fails_is_blamed_for_what_it_says(
    tmp_path: Path, do: Callable[[Tensor], Any], words: str
) -> None:
    with pytest.raises(
        UserError, match=f"Before fails on an image of 16 x 16 pixels with 3 channels: .*{words}"
    ) as caught:
        study_of(Before(do), tmp_path, image_size=16)
    assert ("image_size" in str(caught.value)) is ("image_size" in words)
