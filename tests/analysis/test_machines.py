"""Models in any number type are analysed, with as much memory as there is."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from attention_visualizer import AttentionVisualizer
from attention_visualizer.analysis.chapters import write_chapter, write_chapters
from attention_visualizer.analysis.preparation import find_history
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.analysis.study.target import COPIES, affordable_images
from attention_visualizer.analysis.writing import write_analysis
from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.data.image_sets import InputFormat
from attention_visualizer.runs.folders import RunFolder
from attention_visualizer.support.errors import UnreadableError, UserError
from attention_visualizer.support.machine import available_memory, peak_memory
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


# --- memory ------------------------------------------------------------------------------------------------------


def study_of(pictures: Path, folder: Path) -> Study:
    folder.mkdir(exist_ok=True)
    return visualizer_of(random_vit(num_layers=2), pictures, folder).study


class Short(nn.Module):
    """A model on a machine whose memory ends with more than so many images at once."""

    def __init__(self, model: nn.Module, most: int) -> None:
        super().__init__()
        self.model, self.most = model, most
        self.sizes: list[int] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.model(images)


def test_a_chapter_that_does_not_fit_is_tried_with_smaller_batches(pictures: Path, tmp_path: Path) -> None:
    study = study_of(pictures, tmp_path)
    whole = study.survey
    short = Short(study.target.model, 3)
    again = replace(study, target=study.target.with_model(short))
    assert not write_chapter(again, "statistics", {}).missing
    assert max(short.sizes) > 3 and again.target.limit.images == 2  # half of the five images
    for name, summary in again.survey.summaries.items():
        np.testing.assert_allclose(summary.mean, whole.summaries[name].mean, rtol=1e-5)


def test_a_chapter_for_which_one_image_is_too_many_is_missing(pictures: Path, tmp_path: Path) -> None:
    study = study_of(pictures, tmp_path)
    nothing_fits = replace(study, target=study.target.with_model(Short(study.target.model, 0)))
    assert "out of memory" in write_chapter(nothing_fits, "statistics", {}).missing
    assert nothing_fits.target.limit.images == 1


def test_batches_follow_one_layers_weights_and_the_memory_that_is_free(pictures: Path, tmp_path: Path) -> None:
    observation = study_of(pictures, tmp_path).target.first_observation
    layer = 4 * 3 * 26**2  # bytes: 3 heads, 25 patches and the class token
    assert affordable_images(observation, None) == 500
    assert affordable_images(observation, 7 * COPIES * layer) == 7
    assert affordable_images(observation, 0) == 1
    large = replace(observation, geometries=(Geometry((37, 37), 1, (14, 14)), *observation.geometries[1:]))
    assert affordable_images(large, 10**12) == 2**28 // (4 * 3 * 1370**2)


def test_the_memory_that_is_free_is_known() -> None:
    free = available_memory(torch.device("cpu"))
    assert free is None or 10**7 < free < 10**14
    assert "GB at the most" in peak_memory(torch.device("cpu"))


def test_a_history_for_which_there_is_no_memory_is_not_called_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    run = RunFolder(tmp_path)
    run.history_path.write_bytes(b"")
    monkeypatch.setattr("attention_visualizer.runs.history.read_bytes", fail)
    with pytest.raises(UnreadableError, match="not enough memory") as raised:
        find_history(run)
    assert "delete" not in str(raised.value)


# --- pictures that vanish ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deleted", "emptied", "a folder", "several"])
def test_pictures_that_vanish_are_left_out_of_all_chapters(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pictures: Path
) -> None:
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    study = visualizer_of(random_vit(num_layers=2), folder, tmp_path / "out").study
    for name in ("1.png", "3.png")[: 2 if how == "several" else 1]:
        (folder / name).write_bytes(b"") if how == "emptied" else (folder / name).unlink()
    if how == "a folder":
        (folder / "1.png").mkdir()
    left = 3 if how == "several" else 4
    written = write_analysis(study, "command", ["patterns", "statistics"])
    assert not written.missing
    report = written.report.read_text()
    assert f"{left} images" in report and "1.png could not be read and is left out" in report
    assert "5 images" not in report


def test_a_folder_that_vanishes_is_one_line(tmp_path: Path, pictures: Path) -> None:
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    study = visualizer_of(random_vit(num_layers=2), folder, tmp_path / "out").study
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="its images are not there any more"):
        write_analysis(study, "command", ["statistics"])
    assert not (tmp_path / "out" / "attention_analysis_report.md").exists()
