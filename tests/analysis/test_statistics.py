"""The statistics chapter: trends and groups are those of the survey's images, figures show them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from attention_visualizer import capture
from attention_visualizer.analysis.statistics import chapter as statistics_chapter
from attention_visualizer.analysis.statistics.figure import LABELS, draw_groups, draw_heads, draw_layers
from attention_visualizer.analysis.statistics.measure import Statistics, measure
from attention_visualizer.analysis.study.output import Output
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.analysis.study.survey import MEASURE_NAMES
from attention_visualizer.analysis.study.target import Target
from attention_visualizer.data.image_sets import LabelledImageSet
from attention_visualizer.data.images import DatasetDescription
from attention_visualizer.measures.map_measures import mean_attention_distance, readout_entropy
from attention_visualizer.models.vision_transformer import VisionTransformer

N, LAYERS, HEADS, CLASSES = 23, 4, 2, ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "img_size": 12,
        "patch_size": 4,
        "embed_dim": 10,
        "num_heads": HEADS,
        "num_layers": LAYERS,
        "mlp_dim": 14,
    }
    model = VisionTransformer(**sizes, num_classes=3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    images = torch.randint(0, 256, (N, 1, 12, 12), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    image_set = LabelledImageSet(
        DatasetDescription("digits", 12, 1, CLASSES, 0.5, 0.3, {}), images, torch.arange(N) % 3
    )
    return Study(Target(model, image_set), Output(tmp_path_factory.mktemp("statistics")), "weights")


@pytest.fixture(scope="module")
def measured(study: Study) -> Statistics:
    return measure(study)


def test_trends_leave_out_a_last_layer_that_only_the_class_token_leaves(study: Study, measured: Statistics) -> None:
    with torch.no_grad(), capture(study.target.model) as attention:
        study.target.model(study.target.model_input(study.target.images.read(range(N))))
    entropy, distance = (
        [float(of(layer.weights, layer.geometry).mean()) for layer in attention if layer.geometry is not None]
        for of in (readout_entropy, mean_attention_distance)
    )
    assert float(measured.trends["entropy"].value) == pytest.approx(entropy[3] - entropy[0], abs=1e-5)
    assert float(measured.trends["distance"].value) == pytest.approx(distance[2] - distance[0], abs=1e-4)
    assert all(trend.low <= trend.value <= trend.high for trend in measured.trends.values())


def test_groups_are_by_true_class_and_by_outcome(measured: Statistics) -> None:
    survey, groups = measured.survey, measured.groups
    assert groups is not None and survey.correct is not None and groups.class_sizes == (7, 8)
    assert (groups.num_correct, groups.num_wrong) == (survey.correct.sum(), (~survey.correct).sum())
    sizes = np.array([8, 8, 7])
    means = np.stack([interval.value for interval in groups.entropy])
    np.testing.assert_allclose((sizes[:, None] * means).sum(axis=0) / N, survey.mean_of("entropy").value[:, -1])
    assert set(groups.wrong_minus_correct) == {"entropy", "effective_tokens", "maximum", "distance"}


def test_figures_show_what_was_measured(measured: Statistics) -> None:
    layers = draw_layers(measured.survey, measured.images)
    assert layers.get_suptitle() == "Attention over 23 test images, all heads" and len(layers.axes) == 6
    maps: list[Any] = draw_heads(measured).axes[:6]
    heads = {axis.collections[0].colorbar.ax.get_ylabel(): axis for axis in maps}
    distances = heads[LABELS["distance"]]
    assert distances.collections[0].get_array()[-1].mask.all()  # the last layer's patch queries do not count
    assert "cannot affect the logits" in [text.get_text() for text in distances.texts]
    for name in ("sink", "confidence"):  # over all queries, too
        assert list(heads[LABELS[name]].collections[0].get_array().mask.any(axis=1)) == [False] * 3 + [True]
    assert not heads[LABELS["entropy"]].collections[0].get_array().mask.any()
    assert measured.groups is not None
    by_class, by_outcome = draw_groups(measured.groups, measured.images).axes[:2]
    assert [label.get_text() for label in by_class.get_yticklabels()] == list(CLASSES)
    points = np.asarray(by_outcome.lines[-1].get_xdata())
    np.testing.assert_allclose(points, measured.groups.wrong_minus_correct["entropy"].value)


def test_the_chapter_with_and_without_known_classes(study: Study) -> None:
    chapter = statistics_chapter.CHAPTER(study)
    assert [len(table.rows) for table in chapter.tables] == [LAYERS] * 3 and len(chapter.figures) == 3
    of_maps, of_heads = chapter.tables[:2]
    assert {*of_maps.columns[1:], *of_heads.columns[1:]} == {LABELS[name] for name in (*MEASURE_NAMES, "content")}
    assert max(len(of_maps.columns), len(of_heads.columns)) <= 6  # which a page holds
    unread = {name for name, cell in zip(of_heads.columns, of_heads.rows[-1], strict=True) if cell == "–"}
    assert unread == {LABELS[name] for name in ("distance", "confidence", "sink")}
    assert all("–" not in row for row in (*of_maps.rows, of_heads.rows[-2]))
    assert len(chapter.numbers["entropy_by_class"]) == 3 and chapter.finding is not None
    assert chapter.finding.figure == chapter.figures[0].name and "images are misclassified" in chapter.text
    images = study.target.images
    assert isinstance(images, LabelledImageSet)
    unlabelled = replace(study, target=replace(study.target, images=replace(images, labels=None)))
    chapter = statistics_chapter.CHAPTER(unlabelled)
    assert len(chapter.tables) == len(chapter.figures) == 2 and chapter.numbers["wrong_minus_right"] is None
    assert chapter.finding is not None and chapter.finding.figure == chapter.figures[0].name
    assert measure(unlabelled).groups is None and "accuracy" not in chapter.text


def test_layers_that_are_equally_broad_are_not_ranked(study: Study) -> None:
    model = copy.deepcopy(study.target.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e-3)  # uniform attention
    finding = statistics_chapter.CHAPTER(replace(study, target=replace(study.target, model=model))).finding
    assert finding is not None
    assert "about as broad in each layer: up to 10.00 (10.00 to 10.00) effective tokens of 10," in finding.text
