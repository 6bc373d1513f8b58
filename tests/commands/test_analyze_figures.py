"""Formats of figures, what stands on the face of each, and the animation."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
from PIL import Image

from attention_visualizer.analysis.evolution.figure import draw_frames
from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.runs.history import AttentionHistory
from tests.helpers.analyses import (
    FINDINGS_FIGURES,
    FRAMES,
    NOT_MNIST,
    SAMPLE_FIGURES,
    STATISTICS_FIGURES,
    Analysis,
    Workplace,
    embedded_figures,
    num_frames,
    random_model,
    read_report,
    succeed,
    svg_text,
)


@pytest.mark.parametrize("file_format", ["pdf", "svg"])
def test_vector_formats(work: Workplace, model: VisionTransformer, file_format: str) -> None:
    """A figure of each kind in that format (all are drawn as SVG below), with the note that these are not MNIST's."""
    work.add_run("2025-01-01_00-00-00-000000", model, with_history=True)
    chapters = "chapters=[patterns,statistics,evolution]"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        succeed(f"format={file_format}", "num_samples=1", "output_dir=out", chapters, folder=work.path)
    figures = sorted((work.path / "out").glob(f"*.{file_format}"))
    names = {"attention_pattern_sample_0", *STATISTICS_FIGURES, "attention_evolution_strip", "attention_evolution"}
    assert {path.stem for path in figures} == names
    assert not list((work.path / "out").glob("*.png"))
    assert set(embedded_figures(read_report(work.path / "out"))) == {
        *(path.name for path in figures),
        "attention_evolution.webp",
    }
    for path in figures:
        if file_format == "pdf":
            content = path.read_bytes()
            assert content.startswith(b"%PDF-") and content.rstrip().endswith(b"%%EOF")
        else:
            assert NOT_MNIST in svg_text(path), path.name


def test_random_weights_stand_on_the_face_of_every_figure(
    work: Workplace, model: VisionTransformer, small_budget: None
) -> None:
    work.add_run("2025-01-01_00-00-00-000000", model, with_history=True)
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        succeed("ckpt=random", "format=svg", "num_samples=1", "output_dir=out", folder=work.path)
    figures = sorted((work.path / "out").glob("*.svg"))
    assert len(figures) == len(SAMPLE_FIGURES) + len(STATISTICS_FIGURES) + len(
        FINDINGS_FIGURES
    )  # a random model has no history
    for path in figures:
        text = svg_text(path)
        assert "random weights" in text and NOT_MNIST in text, path.name
    assert "random weights" in read_report(work.path / "out")


def test_each_frame_says_what_it_shows(analysis: Analysis) -> None:
    """That the data are not MNIST's, and of the model before training that its weights are random. The file is
    lossless, so what a frame says can be asked of the figure that it was made from."""
    sheets = [
        sheet.with_watermark(NOT_MNIST) for sheet in draw_frames(AttentionHistory.load(analysis.run.history_path))
    ]
    assert len(sheets) == FRAMES
    texts = [" ".join(text.text for text in sheet.texts) for sheet in sheets]
    assert all(NOT_MNIST in text for text in texts)
    assert ["RANDOM WEIGHTS" in text for text in texts] == [True] + [False] * (FRAMES - 1)
    with Image.open(analysis.output / "attention_evolution.webp") as animation:
        for number, sheet in enumerate(sheets):
            animation.seek(number)
            np.testing.assert_array_equal(np.asarray(animation.convert("RGB")), sheet.to_rgb())


def test_an_animation_of_a_shallow_model(work: Workplace) -> None:
    """Narrow pictures: a longer line of text must not give a frame another size."""
    work.add_run("2025-01-01_00-00-00-000000", random_model(num_layers=1, pooling="mean"), with_history=True)
    succeed("chapters=[evolution]", "output_dir=out", folder=work.path)
    with Image.open(work.path / "out/attention_evolution.webp") as animation:
        assert num_frames(animation) == FRAMES
