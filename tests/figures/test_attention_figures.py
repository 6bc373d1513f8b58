"""Each figure shows the arrays that it was given, each in its place, under titles that say what it is."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.figures import attention_figures as figures
from attention_visualizer.figures import color_scales, panels
from attention_visualizer.figures.attention_figures import ExplainedImage
from attention_visualizer.figures.color_scales import attention_scale
from attention_visualizer.figures.panels import PanelFigure, PlacedImage, overlay
from attention_visualizer.measures.observation import Observation
from tests.helpers.figures import assert_tidy

LAYERS, HEADS, GRID = 3, 5, (2, 7)
NUM_KEYS = 1 + GRID[0] * GRID[1]
HEADLINE, SUBTITLE, NOTE = "the headline", "true 3, predicted 8 (91.0%)", "random weights (untrained)"
LONG_NAMES = ["Schleiereule (Tyto alba), im Flug über dem Kornfeld", "ένα πολύ μακρύ όνομα κλάσης"]


def subject(layers: int = LAYERS, heads: int = HEADS, grid: tuple[int, int] = GRID, **changes: Any) -> ExplainedImage:
    random = np.random.default_rng(0)
    num_keys = 1 + grid[0] * grid[1]
    rows = random.dirichlet(np.full(num_keys, 0.7), (layers, heads)).astype(np.float32)
    rollouts = random.dirichlet(np.full(num_keys, 5.0), layers).astype(np.float32)
    fields: dict[str, Any] = {
        "image": random.integers(0, 256, (3 * grid[0], 5 * grid[1], 1), dtype=np.uint8),
        "head_maps": rows[..., 1:].reshape(layers, heads, *grid),
        "rollouts": rollouts[:, 1:].reshape(layers, *grid),
        "entropy": random.uniform(0, np.log(num_keys), (layers, heads)),
        "self_attention": rows[..., 0],
        "num_keys": (num_keys,) * layers,
        "query": "cls",
        "true_class": "3",
        "predicted_class": "8",
        "probability": 0.91,
    }
    return ExplainedImage(**fields | changes)


def tiles(picture: PanelFigure) -> list[PlacedImage]:
    """All images but the colour bars and their titles, in reading order."""
    bars = [image for image in picture.images if image.rgb.shape == (256, 1, 3)]
    below = [image for image in picture.images if image.rgb.shape == (1, 256, 3)]
    left_of_bars = min((bar.x - 19 for bar in bars), default=picture.width)
    found = [image for image in picture.images if image.x < left_of_bars and image not in below]
    assert len(found) == len(picture.images) - 2 * len(bars) - len(below)
    return sorted(found, key=lambda image: (image.y, image.x))


def texts(picture: PanelFigure) -> list[str]:
    return [text.text for text in picture.texts]


def assert_tile(tile: PlacedImage, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(tile.rgb, panels.as_rgb(expected))


def every_figure(of: ExplainedImage, note: str = NOTE) -> dict[str, PanelFigure]:
    every = {
        "layers in a card": figures.layer_card(of, HEADLINE, SUBTITLE),
        "pattern": figures.attention_pattern(of, HEADLINE, SUBTITLE),
        "heads": figures.head_grid(of, HEADLINE, SUBTITLE),
        "heads in a card": figures.head_card(of, HEADLINE, SUBTITLE),
        "last heads": figures.head_grid(of, HEADLINE, SUBTITLE, layers=[len(of.maps) - 1]),
        "comparison": figures.layer_comparison(of, HEADLINE, SUBTITLE),
        "entropy": figures.entropy_heat_map(of.entropy, np.log(max(of.num_keys)), HEADLINE),
    }
    return {name: picture.with_watermark(note) for name, picture in every.items()}


# --- what each shows ---


def test_the_pattern_has_the_maps_above_and_the_overlays_below() -> None:
    of = subject()
    picture = figures.attention_pattern(of, HEADLINE, SUBTITLE)
    first, *rest = tiles(picture)
    assert_tile(first, of.image)
    maps, overlays = rest[:LAYERS], rest[LAYERS:]
    assert len(overlays) == LAYERS
    for layer in range(LAYERS):
        mean = of.head_maps[layer].mean(axis=0)
        assert_tile(maps[layer], attention_scale(NUM_KEYS).to_rgb(mean))
        assert_tile(overlays[layer], overlay(of.image, mean, NUM_KEYS))
        assert maps[layer].x == overlays[layer].x and maps[layer].y < overlays[layer].y
    assert {"map", "overlay", "input", "layer 1", "layer 2", "layer 3"} <= set(texts(picture))


def test_heads_stand_in_the_order_of_their_index_and_layers_from_shallow_to_deep() -> None:
    of = subject()
    drawn = tiles(figures.head_grid(of, HEADLINE))
    assert len(drawn) == LAYERS * HEADS
    for number, tile in enumerate(drawn):
        layer, head = divmod(number, HEADS)
        assert_tile(tile, overlay(of.image, of.head_maps[layer, head], NUM_KEYS))


def test_some_layers_heads_alone() -> None:
    of = subject()
    picture = figures.head_grid(of, HEADLINE, layers=[LAYERS - 1])
    assert len(tiles(picture)) == HEADS
    assert_tile(tiles(picture)[1], overlay(of.image, of.head_maps[-1, 1], NUM_KEYS))
    assert "layer 3" in texts(picture) and "layer 1" not in texts(picture)


def test_the_comparison_shows_maps_rollouts_and_doublings() -> None:
    maps = np.full((2, 1, 1, 2), 0.25, np.float32)
    maps[1, 0, 0] = 0.5, 0.125  # twice as much, half as much
    of = subject(2, 1, (1, 2), head_maps=maps)
    picture = figures.layer_comparison(of, HEADLINE)
    drawn = tiles(picture)
    assert len(drawn) == 5  # two maps, two rollouts, one change
    for layer in range(2):
        assert_tile(drawn[layer], overlay(of.image, maps[layer, 0], 3))
        share = of.rollouts[layer] / of.rollouts[layer].sum()  # among patches, of which there are two
        assert_tile(drawn[2 + layer], overlay(of.image, share, 2))
    change = drawn[4]
    assert change.x == drawn[1].x  # under the layer that brought it
    scale = color_scales.difference_scale(3.0, "")
    np.testing.assert_array_equal(change.rgb[0], scale.to_rgb(np.array([1.0, -1.0])))
    assert {"attention", "rollout over patches", "change"} <= set(texts(picture))


def test_a_layer_that_changes_nothing_is_white_even_where_attention_is_zero() -> None:
    of = subject(2, 1, head_maps=np.zeros((2, 1, *GRID), np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        change = tiles(figures.layer_comparison(of, HEADLINE))[-1]
    assert change.rgb.min() > 240


def test_the_card_of_an_image_is_the_input_each_layer_and_the_rollout_of_all() -> None:
    of = subject()
    first, *layers, rollout = tiles(figures.layer_card(of, HEADLINE))
    assert_tile(first, of.image)
    assert len(layers) == LAYERS
    for layer, tile in enumerate(layers):
        assert_tile(tile, overlay(of.image, of.head_maps[layer].mean(axis=0), NUM_KEYS))
    share = of.rollouts[-1] / of.rollouts[-1].sum()
    assert_tile(rollout, overlay(of.image, share, NUM_KEYS - 1))


def test_a_uniform_rollout_is_white() -> None:
    """Rollout keeps much of its mass on the class token: it is the share among patches that is shown."""
    flat = np.full((LAYERS, *GRID), 0.01, np.float32)
    of = subject(rollouts=flat, image=np.zeros((6, 35, 1), np.uint8))
    assert tiles(figures.layer_card(of, HEADLINE))[-1].rgb.min() > 240


def test_the_entropy_map_runs_from_zero_to_the_highest() -> None:
    entropy = np.array([[0.0, 0.5, 1.0], [2.0, 1.5, 1.25]])
    picture = figures.entropy_heat_map(entropy, 2.0, HEADLINE)
    drawn = tiles(picture)
    scale = color_scales.sequential_scale(0.0, 2.0, "")
    for tile, value in zip(drawn, entropy.flat, strict=True):
        np.testing.assert_array_equal(tile.rgb[0], scale.to_rgb(np.array([value])))
    assert [text for text in texts(picture) if text in ("0.00", "0.50", "1.00", "2.00", "1.50", "1.25")][:6] == [
        f"{value:.2f}" for value in entropy.flat
    ]
    assert {"entropy (nats)", "0: one patch", "2.00: uniform"} <= set(texts(picture))


def probe(names: list[str], label: int = 1, layers: int = LAYERS) -> tuple[dict[str, Any], dict[str, Any]]:
    random = np.random.default_rng(3)
    num = 2
    fixed = {
        "images": random.integers(0, 256, (num, 6, 35, 1), dtype=np.uint8),
        "labels": np.array([0, label]),
        "class_names": np.array(names),
        "num_keys": np.array(NUM_KEYS),
        "query": np.array("patches"),
    }
    frame = {
        "maps": random.dirichlet(np.ones(NUM_KEYS - 1), (num, layers)).reshape(num, layers, *GRID),
        "rollout": random.dirichlet(np.ones(NUM_KEYS - 1), num).reshape(num, *GRID),
        "predicted": np.array([1, 0]),
        "probability": np.array([0.9, 0.8]),
    }
    return fixed, frame


def test_the_probe_card_has_a_row_for_each_probe_image() -> None:
    fixed, frame = probe(["zero", "one"])
    picture = figures.probe_card(fixed, frame, "epoch 0.5, step 7").with_watermark(NOTE)
    drawn = tiles(picture)
    assert len(drawn) == 2 * (1 + LAYERS + 1)
    for number in range(2):
        first, *layers, rollout = drawn[number * 5 : number * 5 + 5]
        assert_tile(first, fixed["images"][number])
        for layer, tile in enumerate(layers):
            assert_tile(tile, overlay(fixed["images"][number], frame["maps"][number, layer], NUM_KEYS))
        assert_tile(rollout, overlay(fixed["images"][number], frame["rollout"][number], NUM_KEYS - 1))
    assert {"zero", "→ one", "one", "→ zero", NOTE} <= set(texts(picture))
    assert any("epoch 0.5, step 7" in text for text in texts(picture))
    assert any("averaged over patch queries" in text for text in texts(picture))


def test_a_probe_image_of_unknown_class_says_so() -> None:
    fixed, frame = probe(["zero", "one"], label=-1)
    assert "image 2" in texts(figures.probe_card(fixed, frame, "step 0"))


def test_pictures_of_one_slider_have_one_size() -> None:
    """A prediction with a longer name does not move anything between frames."""
    fixed, first = probe(["1", "a much longer name"], layers=1)
    last = first | {"predicted": np.array([0, 0])}
    first = first | {"predicted": np.array([1, 1])}
    pictures = [figures.probe_card(fixed, frame, "epoch 1.000, step 12") for frame in (first, last)]
    assert len({(picture.width, picture.height, tiles(picture)[0].x) for picture in pictures}) == 1


def test_cards_of_a_shallow_model_have_one_size_over_time() -> None:
    fixed, frame = probe(["0", "1"], layers=1)
    moments = ("epoch  0.000, step      0", "epoch  9.111, step  1,111", "epoch 10.000, step  2,140")
    assert len({figures.probe_card(fixed, frame, moment).width for moment in moments}) == 1


# --- what each says ---


@pytest.mark.parametrize("name", list(every_figure(subject())))
def test_every_figure_has_its_headline_and_the_red_note_on_its_face(name: str) -> None:
    picture = every_figure(subject())[name]
    assert picture.texts[0].text == HEADLINE and picture.texts[0].bold
    (note,) = (text for text in picture.texts if text.text == NOTE)
    assert note.color == panels.RED
    plain = every_figure(subject(), note="")[name]
    assert all(text.color != panels.RED for text in plain.texts)


def test_captions_give_entropy_and_what_the_class_token_keeps() -> None:
    entropy = np.array([[0.5, 1.0], [2.0, 2.5], [0.25, 0.35]])
    own = np.array([[0.1, 0.2], [0.3, 0.5], [0.0, 1.0]])
    of = subject(heads=2, entropy=entropy, self_attention=own)
    heads = texts(figures.head_grid(of, HEADLINE))
    assert [text for text in heads if text.startswith("H ")] == [
        "H 0.50  self 0.10", "H 1.00  self 0.20", "H 2.00  self 0.30",
        "H 2.50  self 0.50", "H 0.25  self 0.00", "H 0.35  self 1.00",
    ]  # fmt: skip
    layers = [text for text in texts(figures.attention_pattern(of, HEADLINE)) if text.startswith("H ")]
    assert layers == ["H 0.75  self 0.15", "H 2.25  self 0.40", "H 0.30  self 0.50"]
    without = texts(figures.head_grid(subject(self_attention=None, entropy=entropy, heads=2), HEADLINE))
    assert "H 0.50" in without and not any("self" in text for text in without)


def test_the_verdict_names_true_and_predicted_class() -> None:
    assert subject().verdict == "true 3, predicted 8 (91.0%): wrong"
    assert subject(true_class="8").verdict == "true 8, predicted 8 (91.0%)"
    assert subject(true_class=None).verdict == "predicted 8 (91.0%)"


def test_queries_have_names() -> None:
    assert "CLS" in figures.query_name("cls")
    assert "averaged over patch queries" in figures.query_name("patches")
    assert "row 1, column 5" in figures.query_name((1, 5))


def test_a_subject_is_one_image_of_an_observation() -> None:
    random = np.random.default_rng(1)
    seen = Observation(
        "cls",
        (Geometry(GRID, 1, (3, 5)),) * LAYERS,
        ("blocks.0", "blocks.1", "blocks.2"),
        (),
        head_maps=random.random((2, LAYERS, HEADS, *GRID)),
        rollouts=random.random((2, LAYERS, *GRID)),
        entropy=random.random((2, LAYERS, HEADS)),
        self_attention=random.random((2, LAYERS, HEADS)),
        distance=random.random((2, LAYERS, HEADS)),
        predicted=np.array([1, 2]),
        probability=np.array([0.25, 0.75]),
        reconstruction_error=0.0,
    )
    image = np.zeros((6, 35, 1), np.uint8)
    of = ExplainedImage.of(seen, 1, image, "b", ["a", "b", "c"])
    assert (of.true_class, of.predicted_class, of.probability, of.num_keys) == ("b", "c", 0.75, (NUM_KEYS,) * LAYERS)
    np.testing.assert_array_equal(of.maps, seen.head_maps[1].mean(axis=1))
    np.testing.assert_array_equal(of.rollouts, seen.rollouts[1])
    assert seen.self_attention is not None and of.self_attention is not None
    np.testing.assert_array_equal(of.self_attention, seen.self_attention[1])


# --- any size ---


@pytest.mark.parametrize(
    "of",
    [
        subject(1, 1, (1, 1)),
        subject(12, 12, (3, 3)),
        subject(2, 3, (12, 12)),
        subject(2, 2, (7, 2)),
        subject(true_class=LONG_NAMES[0], predicted_class=LONG_NAMES[1]),
    ],
    ids=["1 x 1", "12 layers x 12 heads", "12 x 12 patches", "tall", "long names"],
)
def test_nothing_overlaps_or_leaves_a_figure(of: ExplainedImage) -> None:
    for picture in every_figure(of).values():
        assert_tidy(picture)
    assert_tidy(figures.layer_card(of, of.verdict, SUBTITLE).with_watermark(NOTE))
    assert figures.head_grid(of, of.verdict).to_rgb().ndim == 3


@pytest.mark.parametrize("names", [["0", "1"], LONG_NAMES], ids=["digits", "long"])
def test_nothing_overlaps_or_leaves_a_probe_card(names: list[str]) -> None:
    assert_tidy(figures.probe_card(*probe(names), "epoch 10.000, step  2,140").with_watermark(NOTE))


def test_cards_are_as_wide_as_tensorboards() -> None:
    """Which scales all others: text would be blurred, or too small to read."""
    of = subject(6, 4, (4, 4))
    fixed, frame = probe(["0", "1"], layers=6)
    entropy = figures.entropy_heat_map(of.entropy, 2.83, "Attention entropy of each head")
    cards = [figures.layer_card(of, of.verdict), figures.head_card(of, of.verdict), entropy]
    for card in (*cards, figures.probe_card(fixed, frame, "step 16 (0.037 of epoch 1)")):
        assert card.width == 343 and min(text.size for text in card.texts) >= 9


@pytest.mark.parametrize(
    ("epoch", "step", "text"),
    [
        (0.0, 0, "step 0: RANDOM WEIGHTS, before training"),
        (0.0373, 16, "step 16 (0.037 of epoch 1)"),
        (10.0, 4290, "step 4,290 (epoch 10)"),
        (2.5, 1072, "step 1,072 (0.5 of epoch 3)"),
    ],
)
def test_moments_of_training_in_words(epoch: float, step: int, text: str) -> None:
    assert figures.moment(epoch, step) == text
