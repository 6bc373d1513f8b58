"""Causal importance: a planted head is found, guessing models need none, and what is too much is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from matplotlib.text import Annotation
from torch import Tensor

from attention_visualizer.analysis.importance import chapter as importance_chapter
from attention_visualizer.analysis.importance.figure import draw
from attention_visualizer.analysis.importance.measure import ABLATIONS, correlate, measure, relative_score
from attention_visualizer.data.image_sets import LabelledImageSet
from attention_visualizer.data.images import DatasetDescription
from attention_visualizer.measures import intervals
from attention_visualizer.models.vision_transformer import VisionTransformer
from tests.helpers.studies import first_digits, study_of

HEADS, LAYERS, N = 3, 2, 90
SIZES: dict[str, Any] = {
    "img_size": 8, "patch_size": 4, "embed_dim": 12, "num_heads": HEADS, "num_layers": LAYERS, "mlp_dim": 5,
    "num_classes": 3,
}  # fmt: skip


class Planted(VisionTransformer):
    """The answer is what head 2 of the second layer brings to the class token, and nothing else."""

    def __init__(self) -> None:
        super().__init__(**SIZES)
        assert self.cls_token is not None and self.pos_embed is not None
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(0.01)
            self.blocks[1].norm1.weight.fill_(1.0)
            self.blocks[1].attn.qkv.weight[32:36] = 0.3 * torch.randn(4, 12)  # values of head 2
            projection = torch.zeros(12, 12)
            projection[:4, 8:12] = torch.eye(4)
            self.blocks[1].attn.proj.weight.copy_(projection)

    def classify(self, tokens: Tensor) -> Tensor:
        before = tokens
        for block in self.blocks[:-1]:
            before = block(before)
        added = self.blocks[-1].attn(self.blocks[-1].norm1(before))[:, 0]
        return 100 * added[:, :3]


@pytest.fixture(scope="module")
def planted() -> tuple[VisionTransformer, LabelledImageSet]:
    torch.manual_seed(0)
    model: VisionTransformer = Planted().eval()
    images = torch.randint(0, 256, (N, 1, 8, 8), dtype=torch.uint8)
    description = DatasetDescription("digits", 8, 1, ("a", "b", "c"), 0.5, 0.3, {"test": N})
    pictures = LabelledImageSet(description, images, torch.zeros(N, dtype=torch.long))
    with torch.no_grad():
        labels = model(pictures.model_input(images)).argmax(dim=1)
    return model, LabelledImageSet(description, images, labels)


def test_only_the_planted_head_matters(planted: tuple[VisionTransformer, LabelledImageSet], tmp_path: Path) -> None:
    study = study_of(*planted, tmp_path, 60, 1)
    measured = measure(study, study.stratified_rows(60))
    assert measured.is_learnt and float(measured.accuracy.value) == 1.0 and measured.class_source == "true"
    mattering = measured.matters("zero")
    assert mattering[1, 2] and mattering[1, HEADS]  # the head, and its layer
    mattering[1, [2, HEADS]] = False
    assert not mattering.any()
    assert float(measured.score_changes["zero"].value[1, 2]) == pytest.approx(-float(measured.score.value), rel=0.02)
    chapter = importance_chapter.CHAPTER(study)
    assert chapter.finding is not None and "1 of 6 heads is needed alone" in chapter.finding.text
    assert "head 2.3" in chapter.finding.text and (tmp_path / "attention_importance.png").is_file()
    assert json.dumps(chapter.numbers, allow_nan=False) == json.dumps(importance_chapter.CHAPTER(study).numbers)


def test_switching_off_is_a_projection_without_the_heads_columns(
    planted: tuple[VisionTransformer, LabelledImageSet], tmp_path: Path
) -> None:
    torch.manual_seed(4)
    model = VisionTransformer(**SIZES).eval()
    study = study_of(model, planted[1], tmp_path, 60, 1)
    rows = study.stratified_rows(40)
    measured = measure(study, rows)
    images = study.target.model_input(study.target.images.read(rows.tolist()))
    labels = planted[1].labels
    assert labels is not None
    with torch.no_grad():
        own = model(images)
        model.blocks[0].attn.proj.weight[:, 4:8] = 0  # head 1
        without = model(images)
    classes = labels[torch.from_numpy(rows)].numpy()
    change = relative_score(without.double().numpy(), classes) - relative_score(own.double().numpy(), classes)
    expected = change.mean()
    assert float(measured.score_changes["zero"].value[0, 1]) == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("seed", "labelled", "said"),
    [(1, True, "not above chance"), (2, True, "not above chance"), (1, False, "cannot be determined")],
)
def test_nothing_is_needed_for_a_guess(seed: int, labelled: bool, said: str, tmp_path: Path) -> None:
    """Also where classes are not known, and the model's agreement with itself would pass for an answer."""
    pictures = first_digits(80)
    if not labelled:
        pictures = LabelledImageSet(pictures.description, pictures.images, None)
    torch.manual_seed(seed)
    model = VisionTransformer(embed_dim=12, num_heads=2, num_layers=2, mlp_dim=9).eval()
    study = study_of(model, pictures, tmp_path, 60, 1)
    measured = measure(study, study.stratified_rows(60))
    assert not measured.is_learnt and not any(measured.matters(ablation).any() for ablation in ABLATIONS)
    chapter = importance_chapter.CHAPTER(study)
    assert chapter.finding is not None and said in chapter.finding.text
    if not labelled:  # some would matter, but for that
        assert (measured.score_changes["zero"].high < -0.05 * abs(float(measured.score.value))).any()


def test_too_much_work_and_too_few_images_are_left_out(
    planted: tuple[VisionTransformer, LabelledImageSet], tmp_path: Path
) -> None:
    model, pictures = planted
    much = importance_chapter.CHAPTER(study_of(model, pictures, tmp_path, 60, 1, max_cost=1e5))
    assert "Omitted" in much.text and "subset=50" in much.text and not much.figures
    few = LabelledImageSet(pictures.description, pictures.images[:20], pictures.labels[:20])  # type: ignore[index]
    assert "at least 30 images" in importance_chapter.CHAPTER(study_of(model, few, tmp_path, 60, 1)).text


def test_correlations_are_adjusted_together() -> None:
    """Of two quantities and two ways, one pair is planted: its p is that of the smallest of four."""
    generator = np.random.default_rng(0)
    quantities = {"one": generator.standard_normal(30), "two": generator.standard_normal(30)}
    losses = {"zero": -quantities["one"], "mean": generator.standard_normal(30)}
    found = correlate(quantities, losses)
    assert found["one"].value["zero"].value == pytest.approx(-1)
    alone = {
        (label, way): intervals.rank_correlation(values, losses[way])[1]
        for label, values in quantities.items()
        for way in losses
    }
    expected = scipy.stats.false_discovery_control(list(alone.values()))
    assert [found[label].p_value[way] for label, way in alone] == pytest.approx(expected.tolist())
    assert found["one"].p_value["zero"] == pytest.approx(4 * alone["one", "zero"])


def test_all_correlations_are_told(planted: tuple[VisionTransformer, LabelledImageSet], tmp_path: Path) -> None:
    chapter = importance_chapter.CHAPTER(study_of(*planted, tmp_path, 60, 1))
    told = chapter.text.split("Rank correlations")[1]
    assert told.count("for zero ablation (p = ") == told.count("for mean ablation (p = ") == 2 and "6 heads" in told


def test_labels_of_points_stay_inside_their_axes(
    planted: tuple[VisionTransformer, LabelledImageSet], tmp_path: Path
) -> None:
    study = study_of(*planted, tmp_path, 60, 1)
    figure = draw(measure(study, study.stratified_rows(60)))
    figure.draw_without_rendering()
    annotated = [(axes, text) for axes in figure.axes for text in axes.texts if isinstance(text, Annotation)]
    assert len(annotated) == 6  # three in each of two panels
    for axes, text in annotated:
        box, room = text.get_window_extent(), axes.get_window_extent()
        assert room.x0 <= box.x0 and box.x1 <= room.x1, text.get_text()


def test_an_accuracy_that_nothing_changes_still_has_an_interval(
    planted: tuple[VisionTransformer, LabelledImageSet], tmp_path: Path
) -> None:
    study = study_of(*planted, tmp_path, 60, 1)
    measured = measure(study, study.stratified_rows(60))
    unchanged = measured.accuracy_changes["mean"][0, 0]
    assert unchanged.value == 0 and unchanged.low < 0 < unchanged.high and unchanged.n == 60
    assert measured.accuracy.value == 1 and 0.9 < measured.accuracy.low < measured.accuracy.high == pytest.approx(1)
    (table,) = importance_chapter.CHAPTER(study).tables
    assert all("%" not in cell for row in table.rows for cell in row) and "(points)" in table.columns[3]
