"""Models in any number type are analysed, with as much memory as there is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from attention_visualizer import AttentionVisualizer
from attention_visualizer.analysis.chapters import write_chapters
from attention_visualizer.data.image_sets import InputFormat
from attention_visualizer.support.errors import UserError
from tests.helpers.models import random_vit

FORMAT = InputFormat((15, 15), 1, (0.5,), (0.5,))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (15, 15), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


class Wrapped(nn.Module):
    """Of no class that is known."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images)


def visualizer_of(model: nn.Module, pictures: Path, folder: Path) -> AttentionVisualizer:
    return AttentionVisualizer(
        model=Wrapped(model), images=pictures, image_format=FORMAT, output_dir=folder, device="cpu"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_any_floating_point_type_is_analysed(dtype: torch.dtype, pictures: Path, tmp_path: Path) -> None:
    study = visualizer_of(random_vit(num_layers=2).to(dtype), pictures, tmp_path).study
    study.output.folder.mkdir(exist_ok=True)
    exact = visualizer_of(random_vit(num_layers=2), pictures, tmp_path).study
    for name, chapter in write_chapters(study, ["methods", "statistics", "importance"]).items():
        assert not chapter.missing, name
    found, expected = (each.survey.summaries["entropy"].mean for each in (study, exact))
    np.testing.assert_allclose(found, expected, atol=0.1 if dtype is torch.bfloat16 else 0.02)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_quantised_model_is_analysed(pictures: Path, tmp_path: Path) -> None:
    quantised = torch.ao.quantization.quantize_dynamic(random_vit(num_layers=2), {nn.Linear}, dtype=torch.qint8)
    study = visualizer_of(quantised, pictures, tmp_path).study
    assert study.survey.reconstruction_error < 1e-4


def test_a_model_without_numbers_is_refused(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="meta device, without numbers: load its weights"):
        visualizer_of(random_vit().to("meta"), pictures, tmp_path)
