"""Images of whole numbers and models of reduced precision, in anybody's training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from attention_visualizer.attention.inputs import input_type
from attention_visualizer.support.errors import UserError
from attention_visualizer.watching.attention_logger import AttentionLogger
from tests.helpers.trainers import SIZE, Steps, attention_warnings, new_trainer, vit


class FromNumbers(nn.Module):
    """A model that makes floating-point numbers of its images."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.vit = vit()

    def forward(self, images: Tensor) -> Tensor:
        return self.vit(images.float() / self.most - 0.5)


class ConvertingSteps(Steps):
    def loss(self, batch: Any) -> Tensor:
        return super().loss((batch[0].float() / 255, batch[1]))


def whole_numbers(dtype: torch.dtype, most: int) -> Tensor:
    numbers = torch.randint(0, most + 1, (6, 1, SIZE, SIZE), generator=torch.Generator().manual_seed(2))
    return numbers.to(dtype)


def watch(folder: Path, module: Steps, images: Tensor, precision: Any = "32-true", **options: Any) -> AttentionLogger:
    callback = AttentionLogger(early_frames=False, **options)
    data = DataLoader(TensorDataset(images, torch.arange(6) % 3), batch_size=3)
    with attention_warnings() as lines:
        new_trainer(folder, callback, max_epochs=1, precision=precision).fit(module, data, data)
    assert lines == []
    return callback


@pytest.mark.parametrize(("dtype", "most"), [(torch.uint8, 255), (torch.int16, 4095), (torch.int64, 255)])
@pytest.mark.parametrize("given", [False, True], ids=["chosen", "given"])
def test_images_of_whole_numbers_are_watched(tmp_path: Path, dtype: torch.dtype, most: int, given: bool) -> None:
    images = whole_numbers(dtype, most)
    options = {"probe_images": images[:2]} if given else {}
    kept = watch(tmp_path, Steps(FromNumbers(most)), images, **options).history
    (validation,) = kept.validations
    assert validation["images"] == 6 and len(kept.frames) == 2
    shown = kept.probe["images"]
    assert shown.dtype == np.uint8 and shown.min() == 0 and shown.max() == 255


def test_a_step_that_converts_is_told_of(tmp_path: Path) -> None:
    images = whole_numbers(torch.uint8, 255)
    with pytest.raises(UserError, match="of uint8 .if the step makes .* of them, pass probe_images"):
        watch(tmp_path, ConvertingSteps(vit()), images)
    kept = watch(tmp_path, ConvertingSteps(vit()), images, probe_images=images[:2] / 255).history
    assert kept.validations[0]["images"] == 6


def test_a_module_of_reduced_precision_gets_images_of_its_type(tmp_path: Path) -> None:
    images = torch.randn(6, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    kept = watch(tmp_path, Steps(vit()), images, "bf16-true", probe_images=images[:2]).history
    assert kept.validations[0]["images"] == 6 and len(kept.frames) == 2


def kept_whole(model: nn.Module) -> nn.Module:
    """Norms in float32, as mixed precision has them, and a number before everything else."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    return nn.Sequential(nn.LayerNorm(3), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_type_is_that_of_the_weights_that_images_meet(dtype: torch.dtype) -> None:
    assert input_type(vit().to(dtype)) is dtype
    assert input_type(kept_whole(vit().to(dtype))) is dtype


def test_the_type_where_no_weight_has_one() -> None:
    assert input_type(nn.Identity()) is torch.float32
    eight_bits = nn.Linear(3, 3)
    eight_bits.weight = nn.Parameter(eight_bits.weight.detach().to(torch.float8_e4m3fn))
    eight_bits.bias = nn.Parameter(eight_bits.weight.detach()[0].to(torch.bfloat16))
    assert input_type(eight_bits) is torch.bfloat16
