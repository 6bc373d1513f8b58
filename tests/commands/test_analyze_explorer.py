"""The explorer's chapter: what its page is of, and what it says where it cannot be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attention_visualizer.analysis.explorer import chapter as explorer_chapter
from attention_visualizer.analysis.explorer.chapter import contents_of
from attention_visualizer.analysis.study.compared_runs import ComparedRun
from attention_visualizer.analysis.study.samples import SampleChoice, find_samples
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.attention.capture import capture
from attention_visualizer.explorer.contents import Contents, Group, png
from attention_visualizer.measures.explanations import GRADIENT, METHODS, RELEVANCE, VALUE_WEIGHTED, explain
from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.runs.checkpoint import load_checkpoint
from tests.helpers.analyses import FRAMES, Workplace, history_of, random_model, read_report, succeed
from tests.helpers.studies import first_digits, study_of


def explored(folder: Path, model: VisionTransformer | None = None, samples: int = 3, **changes: Any) -> Study:
    study = study_of(model or random_model(), first_digits(20), folder, 20, 1)
    return replace(study, samples=find_samples(study.target, SampleChoice(samples)), **changes)


def test_the_samples_rows_are_the_models(tmp_path: Path) -> None:
    study = explored(tmp_path)
    contents = contents_of(study)
    assert contents is not None and [group.title for group in contents.groups] == [explorer_chapter.SAMPLES]
    (moment,) = contents.groups[0].moments
    images = study.target.model_input(torch.stack([sample.image for sample in study.samples]))
    with torch.no_grad(), capture(study.target.model) as attention:
        logits = study.target.model(images)
    for number, layer in enumerate(attention):
        error = np.abs(moment.rows[number].weights()[:, : layer.weights.shape[1]] - layer.weights.numpy())
        assert (error <= layer.weights.amax(dim=-1, keepdim=True).numpy() / 255 + 1e-6).all()
    assert list(moment.predicted) == [str(label) for label in logits.argmax(dim=1).tolist()]
    assert [picture.label for picture in contents.groups[0].pictures] == [str(each.label) for each in study.samples]
    (layout,) = contents.header()["layouts"]
    assert layout["grid"] == list(study.target.model.grid_size)  # type: ignore[union-attr]
    assert [layer.name for layer in contents.layers] == [layer.name for layer in attention]


def test_other_methods_are_those_of_their_figure(tmp_path: Path) -> None:
    """Of the class token, in the last layer, on the patches: as the figure of methods shows them."""
    study = explored(tmp_path, samples=1)
    contents = contents_of(study)
    assert contents is not None and contents.groups[0].methods == METHODS
    images = study.target.model_input(study.samples[0].image[None])
    expected = explain(study.target.model, images, query="cls").maps
    heads = contents.layers[-1].num_heads
    rows = contents.groups[0].moments[0].rows[-1].weights()[0, heads:, 0, 1:]
    for method, row in zip(METHODS, rows, strict=True):
        share = expected[method].ravel() / expected[method].sum()
        np.testing.assert_allclose(row / row.sum(), share, atol=0.01, err_msg=method)
    assert (VALUE_WEIGHTED, GRADIENT, RELEVANCE) == METHODS


def test_training_comes_first_where_the_history_has_whole_rows(tmp_path: Path, work: Workplace) -> None:
    model = random_model()
    history = history_of(model, work.digits)
    contents = contents_of(explored(tmp_path, model, history=history))
    assert contents is not None
    training = contents.groups[0]
    assert (training.title, len(training.pictures), len(training.moments)) == (explorer_chapter.PROBES, 3, FRAMES)
    assert [moment.step for moment in training.moments] == [int(frame["step"]) for frame in history.frames]
    for number, rows in enumerate(training.moments[2].rows):
        assert np.array_equal(rows.codes, history.rows[2]["codes"][:, number])
    history.rows.clear()
    without = contents_of(explored(tmp_path, model, history=history))
    assert without is not None and len(without.groups) == 1 and not without.warnings


def test_a_history_of_another_model_is_left_out_and_named(tmp_path: Path, work: Workplace) -> None:
    other = random_model(num_layers=2)
    contents = contents_of(explored(tmp_path, history=history_of(other, work.digits)))
    assert contents is not None and len(contents.groups) == 1
    assert contents.warnings[-1] == "the history is of other layers, heads or tokens: it is not here"


def test_compared_runs_show_the_same_samples(tmp_path: Path, work: Workplace) -> None:
    runs = []
    for name, options in {"analysed": {}, "other": {"seed": 5}, "smaller": {"num_layers": 2}}.items():
        run = work.add_run(name, random_model(**options))
        runs.append(
            ComparedRun(name, load_checkpoint(run.checkpoints / "best.ckpt"), {}, is_analysed=name == "analysed")
        )
    contents = contents_of(explored(tmp_path, compared_runs=runs))
    assert contents is not None
    assert [group.title for group in contents.groups] == [explorer_chapter.SAMPLES, "Samples, by other"]
    first, second = contents.groups

    def names(group: Group) -> list[str]:
        return [picture.name for picture in group.pictures]

    assert names(first) == names(second)
    assert not np.array_equal(first.moments[0].rows[0].codes, second.moments[0].rows[0].codes)
    assert contents.warnings[-1] == "smaller has other layers, heads or tokens: it is not here"


def limited(study: Study, rows: int, num_pictures: int = 3) -> Study:
    """The study, whose page has room for so many bytes of rows."""
    picture = len(png(study.target.images.read([0])[0].permute(1, 2, 0).numpy()))
    sizes = -(-4 * rows // 3) + explorer_chapter.FRAME_BYTES + num_pictures * (picture + 100)
    return replace(study, explorer_bytes=sizes)


def of_image(contents: Contents) -> int:
    return sum(layer.layout.nbytes(layer.num_heads + len(METHODS)) for layer in contents.layers)


def test_fewer_samples_where_all_would_be_too_much(tmp_path: Path) -> None:
    study = explored(tmp_path)
    contents = contents_of(study)
    assert contents is not None
    room = 2 * of_image(contents)
    fewer = contents_of(limited(study, room + 1000))
    assert fewer is not None and len(fewer.groups[0].pictures) == 2
    assert fewer.warnings[-1] == f"2 of 3 samples are here: {explorer_chapter.TOO_LARGE}"
    assert explorer_chapter.write_page(study, fewer) <= limited(study, room + 1000).explorer_bytes


def test_cells_of_patches_where_not_even_two_samples_fit(tmp_path: Path) -> None:
    study = explored(tmp_path)
    contents = contents_of(study)
    assert contents is not None
    cells = contents_of(limited(study, of_image(contents)))
    assert cells is not None
    layout = cells.layers[0].layout
    assert layout.stride > 1 and len(cells.groups[0].pictures) >= 2 and not cells.are_in_sequence
    assert any(f"cells of {layout.stride} x {layout.stride}" in warning for warning in cells.warnings)
    chapter = explorer_chapter.CHAPTER(limited(study, 100, num_pictures=0))
    assert not chapter.applies and "explorer_mb=" in chapter.text
    assert not (tmp_path / "attention_explorer.html").exists()


def test_training_takes_half_of_the_room(tmp_path: Path, work: Workplace) -> None:
    model = random_model()
    history = history_of(model, work.digits)
    study = explored(tmp_path, model, history=history)
    of_moment = history.rows_of(history.rows[0]).nbytes
    contents = contents_of(limited(study, 2 * 2 * of_moment + 4000, num_pictures=6))
    assert contents is not None and contents.groups[0].key == "training"
    steps = [int(frame["step"]) for frame in history.frames]
    assert [moment.step for moment in contents.groups[0].moments] == [steps[0], steps[-1]]
    assert f"2 of {FRAMES} moments are here: {explorer_chapter.TOO_LARGE}" in contents.warnings


def test_the_report_leads_to_the_page(work: Workplace) -> None:
    work.add_run("one", random_model(), with_history=True)
    succeed("run=runs/one", "chapters=[evolution,explorer]", "output_dir=out", folder=work.path)
    page = (work.path / "out" / "attention_analysis_report.html").read_text("utf-8")
    assert '<p class="explore"><a href="attention_explorer.html">Open the explorer</a>' in page
    report = read_report(work.path / "out")
    assert "[attention\\_explorer.html](attention_explorer.html)" in report
    explorer = (work.path / "out" / "attention_explorer.html").read_text("utf-8")
    assert '"moments": [{"title": "step 0' in explorer and explorer.count('"png": ') == 3 + 8
