"""Verdicts on claims: planted attention comes out as planted, random attention and random weights support nothing."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from attention_visualizer import VisionTransformer
from attention_visualizer.analysis.claims import chapter
from attention_visualizer.analysis.claims.chapter import class_power_text
from attention_visualizer.analysis.claims.content import Content
from attention_visualizer.analysis.claims.declared import CLASS_CLAIM, declared_claims, thirds, weights_of
from attention_visualizer.analysis.claims.evidence import (
    Distances,
    Evidence,
    coverage,
    evidence_of,
    gather,
    resample,
    resampled_distances,
)
from attention_visualizer.analysis.claims.measure import control_evidence
from attention_visualizer.analysis.claims.verdicts import NOT_LEARNT, Judgement, judge
from attention_visualizer.analysis.study.budget import Budget
from attention_visualizer.analysis.study.output import Output
from attention_visualizer.analysis.study.shuffled_labels import learn_shuffled_labels
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.analysis.study.target import Target
from attention_visualizer.data.datamodule import ImageDataModule
from attention_visualizer.data.image_sets import ImageFolder, InputFormat, LabelledImageSet
from attention_visualizer.data.images import DatasetDescription
from attention_visualizer.figures.charts import verdict_forest

GRID, LAYERS, HEADS = (4, 4), 5, 4
PATCHES = 16
SHAPE = (LAYERS, HEADS, PATCHES)


@cache
def digits() -> tuple[DatasetDescription, torch.Tensor, torch.Tensor]:
    data = ImageDataModule(name="digits", fallback=None)
    data.load()
    images, labels = zip(*data.splits.values(), strict=True)
    return data.description, torch.cat(images), torch.cat(labels)


@cache
def content() -> Content:
    return Content.of(digits()[1], GRID)


def labels() -> np.ndarray:
    return digits()[2].numpy()


def noise(seed: int = 0, strength: float = 20.0) -> np.ndarray:
    """Weights about 1, in each image others, and each place of each head with a preference: [image, layer, ...]."""
    generator = np.random.default_rng(seed)
    places = generator.gamma(strength, 1 / strength, SHAPE)
    images = generator.gamma(strength, 1 / strength, (len(labels()), *SHAPE))
    return (places * images).astype(np.float32)


def evidence(
    weights: np.ndarray, distances: Distances | None = None, resampled: bool = True, labelled: bool = False
) -> Evidence:
    shares = weights / weights.sum(axis=-1, keepdims=True)
    return gather(shares, content(), labels() if labelled else None, range(LAYERS), distances, resampled)


@cache
def controls(labelled: bool = False) -> dict[str, list[Evidence]]:
    return {
        "noise": [
            evidence(noise(100 + seed), distance(np.ones(LAYERS)), False, labelled)
            for seed in range(1 if labelled else 3)
        ]
    }


def distance(of_layers: np.ndarray) -> Distances:
    replicates = of_layers + np.random.default_rng(0).normal(scale=0.003, size=(1000, LAYERS))
    return Distances(of_layers, replicates, np.stack([of_layers, of_layers]), 9000)


def judged(weights: np.ndarray, of_layers: np.ndarray | None = None, labelled: bool = False) -> dict[str, Judgement]:
    subject = evidence(weights, distance(np.ones(LAYERS) if of_layers is None else of_layers), labelled=labelled)
    found, missing = declared_claims(subject)
    assert missing == ([] if labelled else ["Without labels, differences between classes are not tested."])
    return {each.claim.name: each for each in judge(found, subject, controls(labelled))}


def supported(weights: np.ndarray, of_layers: np.ndarray | None = None) -> set[str]:
    return {name for name, each in judged(weights, of_layers).items() if each.verdict == "supported"}


def feature(name: str) -> np.ndarray:
    """[image, 1, 1, patch]."""
    return content().features[name][:, None, None].astype(np.float32)


MORE = "{} get more attention than other ink"


# --- planted truths ----------------------------------------------------------------------------------------------


def test_attention_on_one_kind_of_point() -> None:
    found = judged(noise() * (1 + feature("junctions")))
    assert found[MORE.format("Junctions")].verdict == "supported"
    others = ("End points", "Bends")
    assert all(found[MORE.format(name)].verdict == "not supported" for name in others)
    result = found[MORE.format("Junctions")].results[0]
    assert result.interval.low < result.value < result.interval.high and result.value > 5 * result.largest_control[1]


def test_the_size_of_what_was_planted_does_not_depend_on_how_sharp_maps_are() -> None:
    """Twice the attention on a junction, whatever else attention follows: once as much more, less what the amounts of
    ink tell of where junctions are (on these small digits, half of it)."""
    values = []
    for sharpness in (1, 4):
        brightness = np.exp(sharpness * content().amount)[:, None, None].astype(np.float32)
        found = judged(np.ones((len(labels()), *SHAPE), np.float32) * brightness * (1 + feature("junctions")))
        values.append(found[MORE.format("Junctions")].results[0].value)
    assert all(0.4 < value < 1 for value in values) and values[1] == pytest.approx(values[0], rel=0.2)


def test_what_holds_in_one_half_of_the_images_only_is_no_claim() -> None:
    """Junctions get thrice the attention in the second half, and less than other ink in the first."""
    factor = np.ones(len(labels()), np.float32)
    factor[: len(factor) // 2], factor[len(factor) // 2 :] = -0.3, 2
    weights = noise() * (1 + factor[:, None, None, None] * feature("junctions"))
    found = judged(weights)[MORE.format("Junctions")]
    result = found.results[0]
    assert result.value > 0.2 and found.adjusted < 0.01 and result.value > result.threshold
    assert found.verdict == "not supported" and "its interval includes no effect" in found.reason
    # To first order, each end is what its half gives alone.
    name, halves = "junctions", [slice(len(factor) // 2), slice(len(factor) // 2, None)]
    subject = evidence(weights)
    shares = weights / weights.sum(axis=-1, keepdims=True)
    for half, rows in enumerate(halves):
        part = Content.of(digits()[1][rows], GRID)
        alone = gather(shares[rows], part, labels()[rows], range(LAYERS), resampled=False)
        np.testing.assert_allclose(subject.halves["coverage"][half], alone.values["coverage"], rtol=1e-4)
        assert np.sign(subject.halves[name][half].mean()) == np.sign(alone.values[name].mean()) == (-1, 1)[half]


def test_points_in_one_layer_are_found_there() -> None:
    weights = noise()
    weights[:, 3] *= 1 + feature("junctions")[:, 0]
    found = judged(weights)[MORE.format("Junctions")]
    assert found.verdict == "supported" and "layer 4" in found.reason
    assert found.p_value == pytest.approx((LAYERS + 1) * found.results[0].p_value)  # any of the layers, or their mean


def test_all_points_are_attended_to_yet_recognising_is_not_decided() -> None:
    weights = noise() * (1 + feature("key points"))
    found = judged(weights)
    name = "The model recognises key points by itself"
    assert found[name].verdict == "cannot be decided by attention alone" and "could show" in found[name].reason
    assert {MORE.format(each) for each in ("End points", "Junctions", "Bends")} <= {
        name for name, each in found.items() if each.verdict == "supported"
    }


def test_depth_as_the_claims_have_it() -> None:
    """Local first and edges first, then far, then all of the ink alike."""
    weights = noise(strength=60)
    weights[:, :2] *= 1 + feature("edges")
    weights[:, 3:] *= 1 + 3 * feature("ink")
    found = judged(weights, np.array([0.4, 0.5, 0.8, 0.95, 1.0]))
    for name in ("Shallow layers (1-2) attend locally", "Shallow layers (1-2) attend to edges"):
        assert found[name].verdict == "supported", found[name].reason
    assert found["Deep layers (4-5) attend to the whole digit"].verdict == "supported"
    assert found["Middle layers (3) integrate"].verdict == "cannot be decided by attention alone"


def test_depth_the_other_way_round() -> None:
    weights = noise(strength=60)
    weights[:, 3:] *= 1 + feature("edges")
    weights[:, :2] *= 1 + 3 * feature("ink")
    found = judged(weights, np.array([1.0, 0.95, 0.8, 0.5, 0.4]))
    assert all(each.verdict == "not supported" for name, each in found.items() if "layers" in name)
    assert "is the opposite" in found["Shallow layers (1-2) attend locally"].reason


def test_deep_attention_on_one_stroke_is_not_the_whole_digit() -> None:
    first = np.cumsum(content().inked, axis=1) == 1
    weights = noise(strength=60)
    weights[:, 3:] *= 1 + 50 * (first & content().inked)[:, None, None].astype(np.float32)
    weights[:, 3:] *= 1 + 3 * feature("ink")
    found = judged(weights)["Deep layers (4-5) attend to the whole digit"]
    assert found.verdict == "not supported" and "effective inked patches" in found.reason


def test_classes_beyond_what_their_ink_shows() -> None:
    name = "Attention differs between classes beyond their ink"
    by_class = np.random.default_rng(3).gamma(20, 1 / 20, (10, 1, 1, PATCHES)).astype(np.float32)
    quiet = noise(strength=400)
    # Three images in ten get another class: of a class that the ink tells for certain, nothing is beyond the ink.
    generator = np.random.default_rng(4)
    other = np.where(generator.random(len(labels())) < 0.3, generator.integers(10, size=len(labels())), labels())
    for weights, verdict in ((quiet * by_class[other], "supported"), (brightest(), "not supported")):
        shares = weights / weights.sum(axis=-1, keepdims=True)
        subject = gather(shares, content(), other, range(LAYERS))
        (claim,) = [each for each in declared_claims(subject)[0] if each.name == name]
        (found,) = judge([claim], subject, controls(labelled=True))
        assert found.verdict == verdict, found.reason
        assert [each.taken_out for each in subject.classes][0] == "nothing" and len(subject.classes) == 6


# --- nothing planted ---------------------------------------------------------------------------------------------


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True)).astype(np.float32)


def of_brightness(strengths: np.ndarray, places: np.ndarray | float = 0.0) -> np.ndarray:
    """Attention that brightness and place decide. strengths, places: broadcast to [layer, head, patch]."""
    return softmax(strengths * content().amount[:, None, None] + places) * np.ones(SHAPE, np.float32)


def brightest() -> np.ndarray:
    return of_brightness(np.array(1e4))


@pytest.mark.parametrize("strength", [2.0, 8.0, 14.0, 40.0, 1e4])
def test_brightness_is_not_taken_for_points(strength: float) -> None:
    """Patches with points stand in images whose other patches hold less ink: they win the competition of a softmax.
    Unless that is predicted, such attention has up to four times as much for junctions."""
    found = judged(of_brightness(np.array(strength)))
    assert not {name for name, each in found.items() if each.verdict != "not supported"}
    assert all(found[MORE.format(name)].results[0].value < 0.09 for name in ("End points", "Junctions", "Bends"))


@pytest.mark.parametrize("seed", range(3))
def test_mixed_brightness_and_places_are_not_taken_for_points(seed: int) -> None:
    generator = np.random.default_rng(seed)
    strengths, places = generator.normal(scale=12, size=(LAYERS, HEADS, 1)), generator.normal(size=SHAPE)
    assert not supported(of_brightness(strengths, places))


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_more_ink_is_not_taken_for_points(power: float) -> None:
    weights = noise() * (0.05 + content().amount[:, None, None].astype(np.float32)) ** power
    assert not supported(weights)


def test_position_is_not_taken_for_anything() -> None:
    """Heads that look at places where ink and points often are, whatever the image shows."""
    places = content().features["key points"].mean(axis=0) + content().inked.mean(axis=0)
    assert not supported(noise() * (0.1 + places[None, None, None]).astype(np.float32))


def test_random_maps_support_nothing() -> None:
    for seed in range(4):
        assert not supported(noise(seed)), seed


def test_the_null_of_each_excess_keeps_its_level() -> None:
    """Attention without any content, over real digits: p-values are uniform."""
    generator = np.random.default_rng(0)
    rows = generator.permutation(len(labels()))[:300]
    part = Content.of(digits()[1][rows], GRID)
    p_values = []
    for _ in range(40):
        weights = generator.gamma(5.0, size=(len(rows), 1, 1, PATCHES)).astype(np.float32)
        subject = gather(weights / weights.sum(axis=-1, keepdims=True), part, None, [0])
        p_values += [subject.permutation_p_value(name, np.ones(1)) for name in ("ink", "edges", "bends", "key points")]
    assert np.mean(np.array(p_values) <= 0.05) == pytest.approx(0.05, abs=0.045)
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.07)


def test_without_controls_nothing_is_supported() -> None:
    subject = evidence(noise() * (1 + feature("key points")))
    found, _ = declared_claims(subject)
    assert all(each.verdict == "not supported" for each in judge(found, subject, {}))


def test_a_model_that_has_learnt_nothing_supports_nothing() -> None:
    subject = evidence(noise() * (1 + feature("key points")))
    judgements = judge(declared_claims(subject)[0], subject, controls(), has_learnt=False)
    assert {each.verdict for each in judgements} == {"not supported"} and judgements[0].reason == NOT_LEARNT


def test_a_control_of_any_kind_that_reaches_as_much_speaks_against_a_claim() -> None:
    subject = evidence(noise() * (1 + feature("junctions")))
    claims = declared_claims(subject)[0]
    name = MORE.format("Junctions")
    alike = controls() | {"shuffled labels": [evidence(noise(7) * (1 + feature("junctions")), resampled=False)]}
    found = {each.claim.name: each for each in judge(claims, subject, alike)}
    assert found[name].verdict == "not supported" and "shuffled labels" in found[name].reason


def test_nearness_is_nothing_where_places_at_random_would_do_as_well() -> None:
    """Close for all that resampled images say, and for 1 in 20 ways to permute the places."""
    generator = np.random.default_rng(0)
    of_layers = np.array([0.7, 0.7, 0.9, 1.0, 1.0])
    for scale, verdict in ((0.02, "supported"), (0.2, "not supported")):
        permuted = np.concatenate([of_layers[None], generator.normal(1.0, scale, (4999, LAYERS))])
        replicates = of_layers + generator.normal(scale=0.003, size=(1000, LAYERS))
        subject = evidence(noise(), Distances(of_layers, replicates, np.stack([of_layers] * 2), 9000, permuted))
        found = {each.claim.name: each for each in judge(declared_claims(subject)[0], subject, controls())}
        assert found["Shallow layers (1-2) attend locally"].verdict == verdict


def study(model: torch.nn.Module, output: Path, images: int = 900) -> Study:
    description, pictures, classes = digits()
    target = Target(model, LabelledImageSet(description, pictures[:images], classes[:images]))
    return Study(target, Output(output, watermark=description.watermark), "random weights", Budget(100, 3))


def test_random_weights_support_nothing(tmp_path: Path) -> None:
    """Their heads follow ink significantly; yet no verdict is positive, of any of several, learnt or not."""
    significant = 0
    reference: dict[str, list[Evidence]] = {}
    for seed in range(3):
        torch.manual_seed(seed)
        subject = study(VisionTransformer(num_layers=3, embed_dim=32).eval(), tmp_path, 450)
        subject.__dict__["has_learnt"] = True
        reference = reference or control_evidence(subject)
        found = evidence_of(subject.survey, subject.target.images.read(subject.survey.kept))
        judgements = judge(declared_claims(found)[0], found, reference)
        assert {each.verdict for each in judgements} == {"not supported"}
        significant += sum(each.adjusted < 0.05 for each in judgements)
    assert set(reference) == {"random weights", "sharpened random weights", "shuffled labels"}
    assert significant > 2


@pytest.mark.parametrize(("kept", "told"), [(0.05, True), (0.3, False), (float("nan"), False)])
def test_a_class_claim_that_nothing_could_support_is_said_to_be_one(kept: float, told: bool) -> None:
    shares = [
        SimpleNamespace(taken_out=name, share=SimpleNamespace(value=share), kept=left)
        for name, share, left in (("nothing", 0.3, 1.0), ("all inks", 0.01, kept))
    ]
    judgement = SimpleNamespace(claim=SimpleNamespace(name=CLASS_CLAIM), results=[SimpleNamespace(threshold=0.09)])
    other = SimpleNamespace(claim=SimpleNamespace(name="another"), results=[])
    judged: Any = SimpleNamespace(measured=SimpleNamespace(classes=shares), judgements=[other, judgement])
    text = class_power_text(judged)
    assert bool(text) is told
    assert ("what all inks leaves would be 0.05 of" in " ".join(text.split())) is told


# --- the pieces --------------------------------------------------------------------------------------------------


def test_thirds_of_the_depth() -> None:
    told = {count: tuple(list(part) for part in thirds(count)) for count in (2, 3, 5, 6)}
    assert told[6] == ([0, 1], [2, 3], [4, 5]) and told[3] == ([0], [1], [2])
    assert told[5] == ([0, 1], [2], [3, 4]) and told[2] == ([0], [], [1])
    assert weights_of(range(1, 3), 4).tolist() == [0, 0.5, 0.5, 0]


def test_coverage_by_hand() -> None:
    shares = np.array([[[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]]], np.float32)
    inked = np.array([[True, False, True, False]])
    own = Content((2, 2), inked * 1.0, inked, {}, {})
    assert coverage(shares, own)[0] == pytest.approx([0.5, 1.0])


def test_resampling_moves_values_as_their_standard_error_says() -> None:
    sample = np.random.default_rng(0).normal(2.0, 3.0, (2300, 2))
    values = {"a": sample.mean(axis=0)}
    drawn = resample(values, {"a": (sample - values["a"]) / len(sample)})["a"]
    assert drawn.shape == (1000, 2)
    assert drawn.std(axis=0) == pytest.approx(sample.std(axis=0) / np.sqrt(2300), rel=0.1)
    assert drawn.mean(axis=0) == pytest.approx(values["a"], abs=0.01)


def test_the_last_layers_patch_queries_stay_out(tmp_path: Path) -> None:
    """With a class token, changing them changes nothing: here, their distance is the only thing of the last layer."""
    torch.manual_seed(0)
    read = study(VisionTransformer(num_layers=3).eval(), tmp_path, 120)
    found = evidence_of(read.survey, read.target.images.read(read.survey.kept))
    assert found.depth == (0, 1)
    names, missing = declared_claims(found)
    assert not any("locally" in each.name for each in names) and missing[0].startswith("Locality is not tested")
    pooled = study(VisionTransformer(num_layers=3, pooling="mean").eval(), tmp_path, 120)
    found = evidence_of(pooled.survey, pooled.target.images.read(pooled.survey.kept))
    assert found.depth == (0, 1, 2) and any("locally" in each.name for each in declared_claims(found)[0])
    distances = resampled_distances(pooled.survey)
    value, replicates = distances.value, distances.replicates
    assert distances.n == 120 and value.shape == (3,) and replicates.shape == (1000, 3)
    assert replicates.mean(axis=0) == pytest.approx(value, rel=0.01)


# --- the chapter -------------------------------------------------------------------------------------------------


def test_the_chapter(tmp_path: Path) -> None:
    """One row per claim; the figure is written; numbers are JSON; twice the same."""
    torch.manual_seed(0)
    model = VisionTransformer(num_layers=2, num_heads=2, embed_dim=32, patch_size=14).eval()
    written = [chapter.CHAPTER(study(model, tmp_path, 200)) for _ in range(2)]
    first = written[0]
    assert first.title == "Common claims, tested" and (tmp_path / first.figures[0].name).exists()
    names = [row[0] for row in first.tables[0].rows]
    assert len(names) == len(set(names)) == len(first.numbers["claims"])
    assert "numbers mean nothing" in first.text and "4 pixels" in first.text
    assert all(len(row) == len(table.columns) for table in first.tables for row in table.rows)
    assert json.dumps(first.numbers, allow_nan=False) == json.dumps(written[1].numbers, allow_nan=False)
    layers = first.numbers["by_layer"]["ink"]
    ends = zip(*(layers[name] for name in ("low", "value", "high")), strict=True)
    assert layers["n"] == 200 and len(layers["low"]) == 2 and all(list(each) == sorted(each) for each in ends)
    assert all(part["n"] == 200 for each in first.numbers["claims"] for part in each["requirements"])
    assert first.finding is not None and "n = 200" in first.finding.text and "because" not in first.text


def test_pictures_that_are_no_digits_are_told_in_a_sentence(tmp_path: Path) -> None:
    folder = ImageFolder(tmp_path, InputFormat((28, 28), 1, (0.0,), (1.0,)), ())
    found = chapter.CHAPTER(Study(Target(VisionTransformer(), folder), Output(tmp_path), "none"))
    assert not found.figures and "ink" in found.text


def test_strokes_without_junctions(tmp_path: Path) -> None:
    """What no picture holds cannot be measured, and is not supported; numbers stay JSON."""
    images = torch.zeros(150, 1, 28, 28, dtype=torch.uint8)
    for number in range(150):
        images[number, 0, number % 9 : 15 + number % 11, 4 + number % 17 : 7 + number % 17] = 255
    model = VisionTransformer(num_layers=1, embed_dim=32).eval()
    lines = LabelledImageSet(digits()[0], images, torch.arange(150) % 3)
    subject = Study(Target(model, lines), Output(tmp_path), "random weights", budget=Budget(100, 2))
    subject.__dict__["has_learnt"] = True
    found = chapter.CHAPTER(subject)
    (row,) = (row for row in found.tables[0].rows if row[0].startswith("Junctions"))
    assert row[3] == "–" and "could not be measured" in row[-1]
    json.dumps(found.numbers, allow_nan=False)


def test_few_pictures_are_told_in_a_sentence(tmp_path: Path) -> None:
    found = chapter.CHAPTER(study(VisionTransformer(num_layers=1).eval(), tmp_path, 40))
    assert not found.figures and "100 images" in found.text


def test_digits_without_labels(tmp_path: Path) -> None:
    """Only what is said of classes is left out."""
    description, images, _ = digits()
    model = VisionTransformer(num_layers=1, embed_dim=32).eval()
    unlabelled = LabelledImageSet(description, images[:200], None)
    found = chapter.CHAPTER(Study(Target(model, unlabelled), Output(tmp_path), "random weights", budget=Budget(100, 1)))
    assert not any("classes" in row[0] for row in found.tables[0].rows) and "Without labels" in found.text


def test_the_forest_plot_shows_what_it_is_given() -> None:
    nan = float("nan")
    axis = verdict_forest(
        ["a", "b", "c"],
        np.array([2.0, -30.0, nan]),
        np.array([[1.5, 2.5], [-31, -29], [nan, nan]]),
        np.array([[-0.2, 0.2], [nan, nan], [-1, 1]]),
        np.array([1.0, np.inf, 1.5]),
        ["supported", "not supported", "cannot be decided by attention alone"],
        Figure().subplots(),
    )
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b", "c"]
    assert [text.get_text() for text in axis.texts] == [
        "supported",
        "not supported",
        "cannot be decided by attention alone",
    ]
    assert len(axis.patches) == 2  # a band where there are controls
    low, high = axis.get_xlim()
    assert low < -31 and high > 31


def test_a_model_that_cuts_its_gradients_off_has_no_control_that_learns() -> None:
    class Cut(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = VisionTransformer(num_layers=1, embed_dim=32)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(images)
            return logits.detach()

    description, pictures, classes = digits()
    inputs = LabelledImageSet(description, pictures[:100], classes[:100]).model_input(pictures[:100])
    assert learn_shuffled_labels(Cut(), inputs, classes[:100], 0) is None
