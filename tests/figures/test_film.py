"""Frames of films: nothing moves that does not change, and the mark is where the numbers are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from attention_visualizer.analysis.evolution import film as film_of_training
from attention_visualizer.analysis.layers import film as film_of_depth
from attention_visualizer.figures import film
from attention_visualizer.figures.charts import layer_colors
from attention_visualizer.figures.panels import RED, PanelFigure, overlay
from attention_visualizer.runs.history import AttentionHistory
from tests.figures.test_attention_figures import LONG_NAMES, subject
from tests.helpers.figures import assert_tidy

NOTE = "data: scikit-learn digits (not MNIST)"
STEPS = (0, 1, 4, 16, 40)
DIGITS = [str(digit) for digit in range(10)]


def history(
    layers: int = 3,
    heads: int = 2,
    grid: tuple[int, int] = (2, 7),
    names: Sequence[str] = DIGITS,
    images: int = 7,
    steps: Sequence[int] = STEPS,
) -> AttentionHistory:
    random = np.random.default_rng(0)
    frames: list[dict[str, Any]] = [
        {
            "step": np.array(step),
            "epoch": np.array(step / 20),
            "entropy": random.uniform(0.5, 2, (layers, heads)),
            "maps": random.dirichlet(np.ones(grid[0] * grid[1]), (images, layers)).reshape(images, layers, *grid),
            "rollout": random.dirichlet(np.ones(grid[0] * grid[1]), images).reshape(images, *grid),
            "predicted": random.integers(0, len(names), images),
        }
        for step in steps
    ]
    probe: dict[str, Any] = {
        "images": random.integers(0, 256, (images, 3 * grid[0], 5 * grid[1], 1), dtype=np.uint8),
        "labels": np.arange(images) % len(names),
        "class_names": np.array(names),
        "num_keys": np.array(grid[0] * grid[1] + 1),
        "query": np.array("cls"),
    }
    return AttentionHistory(probe, frames)


def texts(frame: PanelFigure) -> list[str]:
    return [text.text for text in frame.texts]


def places(frame: PanelFigure) -> list[tuple[int, int, int, int]]:
    return [(image.x, image.y, image.width, image.height) for image in frame.images]


EVERY = {
    "training": film_of_training.draw_frames(history(), NOTE),
    "1 layer": film_of_training.draw_frames(history(1, 1, images=1)),
    "24 layers": film_of_training.draw_frames(history(24, 12, (3, 3))),
    "long names": film_of_training.draw_frames(history(names=LONG_NAMES), NOTE),
    "depth": film_of_depth.draw_frames(subject(), "test image 0: true 3, predicted 8 (91.0%): wrong", NOTE),
    "12 layers x 16 heads": film_of_depth.draw_frames(subject(12, 16, (3, 3)), "photos/one.jpg", NOTE),
    "tall, one head": film_of_depth.draw_frames(subject(3, 1, (7, 2)), " ".join(LONG_NAMES * 3), 3 * NOTE),
    "a patch as the query": film_of_depth.draw_frames(subject(query=(1, 5)), "test image 0"),
}


@pytest.mark.parametrize("name", EVERY)
def test_frames_have_one_layout_that_a_slide_can_show(name: str) -> None:
    frames = EVERY[name]
    for frame in frames:
        assert_tidy(frame)
        assert frame.to_rgb().shape == (720, 1280, 3)
        assert min(text.size for text in frame.texts) >= film.LEAST_TEXT
        assert frame.texts[0].bold and frame.texts[0].size >= 28
    assert len({tuple(places(frame)) for frame in frames}) == 1
    assert len({tuple((text.x, text.y) for text in frame.texts) for frame in frames}) == 1
    first, last = frames[0].to_rgb(), frames[-1].to_rgb()
    assert not np.array_equal(first, last)
    title = film.FILM.margin + film.FILM.headline
    assert (first[:title] != 255).any() and (last[-40:] != 255).any()


def test_a_frame_of_training_shows_its_step() -> None:
    kept = history()
    frames = EVERY["training"]
    assert len(frames) == len(STEPS)
    for frame, of in zip(frames, kept.frames, strict=True):
        assert f"step {of['step']}" in " ".join(texts(frame)) and NOTE in texts(frame)
        maps = overlay(kept.probe["images"][1], of["maps"][1, 2], 15)
        assert any(np.array_equal(image.rgb, maps) for image in frame.images)
    assert ["RANDOM WEIGHTS" in " ".join(texts(frame)) for frame in frames] == [True] + [False] * 4
    assert {"input", "layer 1", "layer 3", "rollout", "true 0", "During training: CLS attention"} <= set(
        texts(frames[0])
    )


def test_a_wrong_answer_is_red() -> None:
    kept = history(images=2, steps=(0, 5))
    kept.frames[1]["predicted"] = np.array([0, 7])
    answers = {text.text: text.color for text in film_of_training.draw_frames(kept)[1].texts if "→" in text.text}
    assert answers["→ 7"] == RED and answers["→ 0"] != RED


def test_a_column_has_the_colour_of_its_line() -> None:
    swatches = [image.rgb for image in EVERY["training"][0].images if image.height == film.SWATCH]
    assert [tuple(each[0, 0]) for each in swatches] == [film.rgb_of(color) for color in layer_colors(3)]


def test_many_layers_are_some_of_them() -> None:
    columns = [text for text in texts(EVERY["24 layers"][0]) if text.startswith("L")]
    assert len(columns) == film_of_training.MAX_LAYERS and columns[0] == "L1" and columns[-1] == "L24"


def test_long_trainings_are_at_most_so_many_frames() -> None:
    frames = film_of_training.draw_frames(history(1, 1, steps=range(60)))
    assert 10 < len(frames) <= film_of_training.MAX_FRAMES
    assert "step 59" in " ".join(texts(frames[-1]))


def test_a_frame_of_depth_shows_its_layer_and_every_head() -> None:
    image, frames = subject(), EVERY["depth"]
    assert len(frames) == 3
    for layer, frame in enumerate(frames):
        assert f"Layer {layer + 1} of 3: CLS attention" in texts(frame)
        for head in range(5):
            assert f"head {head + 1}" in texts(frame)
            expected = image.heads_over(layer)[head]
            assert expected is not None and any(np.array_equal(each.rgb, expected) for each in frame.images)
        assert any(np.array_equal(each.rgb, image.layers_over()[layer]) for each in frame.images)


def test_a_layer_with_fewer_heads() -> None:
    maps = subject().head_maps.copy()
    entropy = subject().entropy.copy()
    maps[1, 3:], entropy[1, 3:] = np.nan, np.nan
    frames = film_of_depth.draw_frames(subject(head_maps=maps, entropy=entropy), "test image 0")
    assert "head 4" in texts(frames[0]) and "head 3" in texts(frames[1]) and "head 4" not in texts(frames[1])
    frames[1].to_rgb()


def test_the_mark_stands_at_the_value_of_its_moment() -> None:
    """Checked against the axis: twice the value is twice as far from zero."""
    steps = np.array([0.0, 1.0, 3.0])
    entropy = np.array([[0.0, 2.0], [1.0, 1.0], [2.0, 0.5]])
    chart = film.entropy_over_training(steps, entropy, [0, 2], "title", None, 256)
    left, top, right, bottom = chart.area
    assert chart.rgb.shape == (256, 1280, 3) and 0 < left < right <= 1280 and 0 < top < bottom < 256
    zero, two = chart.points[0, 0, 1], chart.points[0, 1, 1]
    assert chart.points[1, 0, 1] == pytest.approx(two) and chart.points[1, 1, 1] == pytest.approx(
        zero - (zero - two) / 4
    )
    for moment in (0, 1):
        picture = chart.at(moment)
        for line, (x, y) in enumerate(chart.points[moment]):
            assert tuple(picture[round(y), round(x)]) == film.rgb_of(layer_colors(2)[line])
        changed = (picture != chart.rgb).any(axis=2)
        edge = round(chart.points[moment, 0, 0]) - 12
        assert changed.any() and not changed[:, :edge].any()  # what was is as it is in the whole chart
        assert not changed[bottom + 10 :].any()  # nor is the axis touched


def test_small_changes_look_small() -> None:
    chart = film.entropy_over_depth(np.array([[5.281], [5.275], [5.278]]), "title", 5.283, 256)
    assert np.ptp(chart.points[:, 0, 1]) < 1  # pixel


def test_uniform_attention_is_in_the_chart() -> None:
    entropy = np.full((4, 2), 0.5)
    with_line = film.entropy_over_depth(entropy, "title", np.log(17), 256)
    without = film.entropy_over_depth(entropy, "title", None, 256)
    assert with_line.points[0, 0, 1] > without.points[0, 0, 1]  # there is room for it above
