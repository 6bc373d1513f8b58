"""Formats of figures, what stands on the face of each, and the animation."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
from PIL import Image

from attention_visualizer.analysis.evolution.film import draw_frames
from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.runs.history import AttentionHistory
from tests.helpers.analyses import (
    FINDINGS_FIGURES,
    FRAMES,
    LAYERS,
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
    sheets = draw_frames(AttentionHistory.load(analysis.run.history_path), NOT_MNIST)
    assert len(sheets) == FRAMES
    texts = [" ".join(text.text for text in sheet.texts) for sheet in sheets]
    assert all(NOT_MNIST in text for text in texts)
    assert ["RANDOM WEIGHTS" in text for text in texts] == [True] + [False] * (FRAMES - 1)
    with Image.open(analysis.output / "attention_evolution.webp") as animation:
        for number, sheet in enumerate(sheets):
            animation.seek(number)
            np.testing.assert_array_equal(np.asarray(animation.convert("RGB")), sheet.to_rgb())


@pytest.mark.parametrize("film_format", ["gif", "mp4"])
def test_films_of_other_formats(work: Workplace, model: VisionTransformer, film_format: str) -> None:
    """Training has a frame for each look, depth one for each layer; both rest on their ends. The page shows a GIF, and
    links an MP4."""
    av = pytest.importorskip("av") if film_format == "mp4" else None
    work.add_run("2025-01-01_00-00-00-000000", model, with_history=True)
    options = ("chapters=[layers,evolution]", "num_samples=1", f"format_film={film_format}", "output_dir=out")
    succeed(*options, folder=work.path)
    names = {f"attention_evolution.{film_format}", f"attention_depth.{film_format}"}
    assert {path.name for path in (work.path / "out").iterdir() if "png" not in path.name} >= names
    assert not list((work.path / "out").glob("*.webp"))
    assert names <= set(embedded_figures(read_report(work.path / "out")))
    page = (work.path / "out" / "attention_analysis_report.html").read_text(encoding="utf-8")
    shown = page.count('src="data:image/gif;base64,')
    linked = [name for name in names if f'<a class="file" href="{name}">' in page]
    assert (shown, len(linked)) == ((2, 0) if film_format == "gif" else (0, 2))
    for stem, count, each in (("attention_evolution", FRAMES, 0.6), ("attention_depth", LAYERS, 1.0)):
        seconds = [3 * each, *[each] * (count - 2), 5 * each]
        path = work.path / "out" / f"{stem}.{film_format}"
        if film_format == "gif":
            with Image.open(path) as animation:
                assert animation.size == (1280, 720) and num_frames(animation) == count
                held = []
                for number in range(count):
                    animation.seek(number)
                    held.append(animation.info["duration"] / 1000)
                assert held == pytest.approx(seconds)
        else:
            with av.open(str(path)) as film:
                frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in film.decode(video=0)]
            assert frames[0].shape == (720, 1280, 3) and len(frames) == round(10 * sum(seconds))
            changes = [np.abs(one - other).max() > 60 for one, other in zip(frames, frames[1:], strict=False)]
            ends = np.cumsum(seconds)[:-1] * 10
            assert np.flatnonzero(changes).tolist() == [round(end) - 1 for end in ends]


def test_an_animation_of_a_shallow_model(work: Workplace) -> None:
    """Narrow pictures: a longer line of text must not give a frame another size. Of depth there is no film."""
    work.add_run("2025-01-01_00-00-00-000000", random_model(num_layers=1, pooling="mean"), with_history=True)
    succeed("chapters=[layers,evolution]", "output_dir=out", folder=work.path)
    with Image.open(work.path / "out/attention_evolution.webp") as animation:
        assert num_frames(animation) == FRAMES and animation.size == (1280, 720)
    assert not list((work.path / "out").glob("attention_depth*"))
    assert "There is no film through the layers" in read_report(work.path / "out")
