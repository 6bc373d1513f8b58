"""Verdicts on claims: planted attention comes out as planted, random attention and random weights support nothing."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from attention_visualizer import VisionTransformer
from attention_visualizer.analysis.claims import chapter
from attention_visualizer.analysis.claims.content import Content
from attention_visualizer.analysis.claims.declared import (
    beyond_others,
    declared_claims,
    head_number_p_value,
    most_layers,
    smallest_head_number_p,
    thirds,
    weights_of,
)
from attention_visualizer.analysis.claims.evidence import (
    Distances,
    Evidence,
    between_classes,
    coverage,
    evidence_of,
    gather,
    resample,
    resampled_distances,
    spread,
)
from attention_visualizer.analysis.claims.measure import control_evidence
from attention_visualizer.analysis.claims.verdicts import Judgement, judge
from attention_visualizer.analysis.study.budget import Budget
from attention_visualizer.analysis.study.output import Output
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.analysis.study.target import Target
from attention_visualizer.data.datamodule import ImageDataModule
from attention_visualizer.data.image_sets import ImageFolder, InputFormat, LabelledImageSet
from attention_visualizer.data.images import DatasetDescription
from attention_visualizer.data.ink import border_patches
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


def evidence(weights: np.ndarray, distances: Distances | None = None, resampled: bool = True) -> Evidence:
    shares = weights / weights.sum(axis=-1, keepdims=True)
    return gather(shares, content(), labels(), range(LAYERS), distances, resampled)


@cache
def controls() -> tuple[Evidence, ...]:
    return tuple(evidence(noise(100 + seed), distance(np.ones(LAYERS)), False) for seed in range(3))


def distance(of_layers: np.ndarray) -> Distances:
    return Distances(of_layers, of_layers + np.random.default_rng(0).normal(scale=0.003, size=(1000, LAYERS)), 9000)


def judged(weights: np.ndarray, of_layers: np.ndarray | None = None) -> dict[str, Judgement]:
    subject = evidence(weights, distance(np.ones(LAYERS) if of_layers is None else of_layers))
    found, missing = declared_claims(subject)
    assert len(missing) == 1 and missing[0].startswith("Head 3 is tested for the background only")
    return {each.claim.name: each for each in judge(found, subject, controls())}


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
    assert found["Head 2 attends to details and junctions"].verdict == "not supported"  # all heads do
    result = found[MORE.format("Junctions")].results[0]
    assert result.low < result.value < result.high and result.value > 5 * max(map(abs, result.controls))


def test_the_size_of_what_was_planted() -> None:
    """Twice the weight on a junction, of which an image has at most one: 2 / (1 + 1 / 16) - 16 / 17 of a uniform share,
    for uniform attention otherwise. Images with more junctions have a little less."""
    found = judged(np.ones((len(labels()), *SHAPE), np.float32) * (1 + feature("junctions")))
    result = found[MORE.format("Junctions")].results[0]
    assert 0.85 < result.value < 2 / (1 + 1 / 16) - 16 / 17 + 0.1


def test_all_points_are_attended_to_yet_recognising_is_not_decided() -> None:
    weights = noise() * (1 + feature("key points"))
    found = judged(weights)
    name = "The model recognises key points by itself"
    assert found[name].verdict == "cannot be decided by attention alone" and "could show" in found[name].reason
    assert {MORE.format(each) for each in ("End points", "Junctions", "Bends")} <= {
        name for name, each in found.items() if each.verdict == "supported"
    }


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_more_ink_is_not_taken_for_points(power: float) -> None:
    """Attention that follows the amount of ink alone: points have more ink than other patches, and no excess is left
    that would count."""
    weights = noise() * (0.05 + content().amount[:, None, None].astype(np.float32)) ** power
    found = judged(weights)
    for name in ("End points", "Junctions", "Bends"):
        assert found[MORE.format(name)].verdict == "not supported", found[MORE.format(name)].results[0]


def test_position_is_not_taken_for_anything() -> None:
    """Heads that look at places where ink and points often are, whatever the image shows."""
    places = content().features["key points"].mean(axis=0) + content().inked.mean(axis=0)
    assert not supported(noise() * (0.1 + places[None, None, None]).astype(np.float32))


def test_a_head_of_its_own() -> None:
    weights = noise()
    weights[:, :, 0] *= 1 + 3 * feature("ink")[:, 0]
    weights[:, :, 1] *= 1 + 3 * feature("junctions")[:, 0]
    weights[:, :, 2] *= 4 - 3 * feature("ink")[:, 0]
    found = judged(weights)
    for name in (
        "Head 1 attends to the stroke",
        "Head 2 attends to details and junctions",
        "Head 3 attends to background",
    ):
        assert found[name].verdict == "supported", found[name].reason
    assert found["Head 4 gathers everything for the prediction"].verdict != "supported"


def test_a_head_that_is_like_the_others_is_not_special() -> None:
    found = judged(noise() * (1 + 3 * feature("ink")))
    assert found["Head 1 attends to the stroke"].verdict == "not supported"
    assert "beyond the other heads" in found["Head 1 attends to the stroke"].reason


def test_a_head_in_two_of_five_layers_is_not_in_most() -> None:
    weights = noise()
    weights[:, :2, 0] *= 1 + 3 * feature("ink")[:, 0]
    assert not any(name.startswith("Head 1") for name in supported(weights))


def test_a_head_that_takes_from_everywhere_may_or_may_not_serve_the_answer() -> None:
    weights = noise()
    weights[:, :, :3] **= 6
    found = judged(weights)["Head 4 gathers everything for the prediction"]
    assert found.verdict == "cannot be decided by attention alone" and "ablating the head" in found.reason


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
    name = "Attention differs clearly between classes"
    by_class = np.random.default_rng(3).gamma(20, 1 / 20, (10, 1, 1, PATCHES)).astype(np.float32)
    quiet = noise(strength=400)
    assert judged(quiet * by_class[labels()])[name].verdict == "supported"
    follows_ink = 1 + 0.1 * content().amount[:, None, None].astype(np.float32)
    assert judged(quiet * follows_ink)[name].verdict == "not supported"


# --- nothing planted ---------------------------------------------------------------------------------------------


def test_random_maps_support_nothing() -> None:
    for seed in range(4):
        assert not supported(noise(seed)), seed


def test_the_null_of_each_excess_keeps_its_level() -> None:
    """Attention without any content, over real digits: p-values are uniform."""
    generator = np.random.default_rng(0)
    rows = generator.permutation(len(labels()))[:300]
    part = Content.of(digits()[1][rows], GRID)
    p_values = []
    for _ in range(60):
        weights = generator.gamma(5.0, size=(len(rows), 1, 1, PATCHES)).astype(np.float32)
        subject = gather(weights / weights.sum(axis=-1, keepdims=True), part, None, [0], resampled=False)
        p_values += [subject.permutation_p_value(name, np.ones(1)) for name in ("ink", "edges", "bends", "key points")]
    assert np.mean(np.array(p_values) <= 0.05) == pytest.approx(0.05, abs=0.045)
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.07)


def test_without_controls_nothing_is_supported() -> None:
    subject = evidence(noise() * (1 + feature("key points")))
    found, _ = declared_claims(subject)
    assert all(each.verdict == "not supported" for each in judge(found, subject, []))


def study(model: torch.nn.Module, output: Path, images: int = 900) -> Study:
    description, pictures, classes = digits()
    target = Target(model, LabelledImageSet(description, pictures[:images], classes[:images]))
    return Study(target, Output(output, watermark=description.watermark), "random weights", Budget(100, 3))


def test_random_weights_support_nothing(tmp_path: Path) -> None:
    """Their heads follow ink significantly; yet no verdict is positive, of any of several."""
    significant = 0
    reference: list[Evidence] = []
    for seed in range(5):
        torch.manual_seed(seed)
        subject = study(VisionTransformer().eval(), tmp_path, 450)
        reference = reference or control_evidence(subject)
        found = evidence_of(subject.survey, subject.target.images.read(subject.survey.kept))
        judgements = judge(declared_claims(found)[0], found, reference)
        assert {each.verdict for each in judgements} == {"not supported"}
        significant += sum(each.adjusted < 0.05 for each in judgements)
    assert significant > 5


# --- the pieces --------------------------------------------------------------------------------------------------


def test_what_most_layers_reach() -> None:
    assert most_layers(np.array([5.0, 1.0, 3.0])) == 3  # two of three
    assert most_layers(np.array([5.0, 1.0, 3.0, 4.0])) == 3  # three of four
    assert most_layers(np.array([[5.0, 1.0], [2.0, 2.0]])).tolist() == [1, 2]


def test_thirds_of_the_depth() -> None:
    told = {count: tuple(list(part) for part in thirds(count)) for count in (2, 3, 5, 6)}
    assert told[6] == ([0, 1], [2, 3], [4, 5]) and told[3] == ([0], [1], [2])
    assert told[5] == ([0, 1], [2], [3, 4]) and told[2] == ([0], [], [1])
    assert weights_of(range(1, 3), 4).tolist() == [0, 0.5, 0.5, 0]


def test_beyond_other_heads_by_hand() -> None:
    assert beyond_others(np.array([[1.0, 2.0, 6.0]])).tolist() == [[-3, -1.5, 4.5]]


def test_the_chance_of_a_head_number() -> None:
    """The best head of four in each of three layers: one draw of 64 does as well. A head like all others: every one."""
    beyond = beyond_others(np.tile([3.0, 1.0, 2.0, 0.0], (3, 1)))
    assert head_number_p_value(beyond, 0, 9999) == pytest.approx(1 / 64, abs=0.005)
    assert head_number_p_value(np.zeros((3, 4)), 2) == 1
    assert smallest_head_number_p(beyond, 0) == 1 / 64


def test_heads_that_a_layer_does_not_have_are_left_out() -> None:
    nan = float("nan")
    assert most_layers(np.array([5.0, nan, 1.0, 3.0])) == 3  # two of the three there
    assert np.isnan(most_layers(np.array([nan, nan])))
    assert beyond_others(np.array([[1.0, nan, 6.0]]))[0] == pytest.approx([-5, nan, 5], nan_ok=True)
    assert np.isnan(beyond_others(np.array([[1.0, nan]]))).all()  # alone in its layer
    beyond = beyond_others(np.array([[3.0, 1.0, 2.0, 0.0], [nan, 1.0, 0.0, nan], [4.0, 1.0, nan, nan]]))
    assert head_number_p_value(beyond, 0, 9999) == pytest.approx(1 / 8, abs=0.01)  # of four and of two
    assert smallest_head_number_p(beyond, 0) == 1 / 8
    assert np.isnan(head_number_p_value(np.full((2, 3), nan), 1))


def test_a_head_of_its_own_among_too_few_cannot_be_told_by_its_number() -> None:
    """Of four heads in two layers, chance draws the best one twice in 1 of 16."""
    weights = noise()[:, :2]
    weights[:, :, 0] *= 1 + 3 * feature("ink")[:, 0]
    shares = weights / weights.sum(axis=-1, keepdims=True)
    control = noise(100)[:, :2]
    read = [gather(each, content(), labels(), [0], resampled=True) for each in (shares, control / 16)]
    found = {each.claim.name: each for each in judge(declared_claims(read[0])[0], read[0], read[1:])}
    claim = found["Head 1 attends to the stroke"]
    assert claim.verdict == "cannot be decided by attention alone" and "so few layers and heads" in claim.reason
    assert found["Head 2 attends to details and junctions"].verdict == "not supported"


def test_border_against_interior_where_the_interior_is_often_empty() -> None:
    """On 14 x 14 patches: a head that prefers the border among empty patches, and one that prefers empty patches."""
    part = Content.of(digits()[1][:400], (14, 14))
    generator = np.random.default_rng(0)
    border = border_patches((14, 14))

    def read(weights: np.ndarray, resampled: bool = True) -> Evidence:
        return gather(weights / weights.sum(axis=-1, keepdims=True), part, None, range(LAYERS), resampled=resampled)

    def weights() -> np.ndarray:
        return generator.gamma(20, 1 / 20, (400, LAYERS, HEADS, 196)).astype(np.float32)

    reference = [read(weights(), False)]
    empty = 4 - 3 * part.inked[:, None].astype(np.float32)
    for planted, verdict in ((1 + 3 * border, "supported"), (1 + 0 * border, "not supported")):
        eval_mode = weights()
        eval_mode[:, :, 2] *= empty * planted
        subject = read(eval_mode)
        claims, missing = declared_claims(subject)
        assert subject.emptiness > 0.5 and 0 < subject.counts["border"] <= 400
        assert not any("background only" in each for each in missing)
        found = {each.claim.name: each for each in judge(claims, subject, reference)}
        assert found["Head 3 attends to background and border"].verdict == verdict


def test_spread_and_coverage_by_hand() -> None:
    shares = np.array([[[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]]], np.float32)
    assert spread(shares)[0] == pytest.approx([0.5, 1.0])
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


def test_share_between_classes() -> None:
    """Half of the variance is the classes' own; without them, chance is taken off. The interval holds the value."""
    generator = np.random.default_rng(0)
    members = generator.integers(7, size=1500)
    centers = generator.normal(size=(7, 3, 5))
    centers = (centers - centers.mean(axis=0)) / centers.std(axis=0)
    maps = centers[members] + generator.normal(size=(1500, 3, 5))
    share, replicates, p_value = between_classes(maps, generator.random((1500, 5)), members, True)
    low, high = np.quantile(replicates, (0.025, 0.975))
    assert share == pytest.approx(0.5, abs=0.03) and low < share < high and p_value == 1 / 1000


def test_no_share_between_classes() -> None:
    """Of noise: chance is taken off, 5 % of 50 data sets are significant at most, and intervals hold 0."""
    shares, covered, p_values = [], [], []
    for seed in range(50):
        generator = np.random.default_rng(seed)
        maps, members = generator.normal(size=(311, 2, 5)), generator.integers(7, size=311)
        share, replicates, p_value = between_classes(maps, generator.random((311, 5)), members, True)
        low, high = np.quantile(replicates, (0.025, 0.975))
        shares.append(share)
        covered.append(low < 0 < high)
        p_values.append(p_value)
    assert abs(np.mean(shares)) < 3 * np.std(shares) / np.sqrt(50)
    assert np.mean(covered) >= 0.9 and np.mean(np.array(p_values) <= 0.05) <= 0.14


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
    assert not any(name.startswith(("Head 3", "Head 4")) for name in names) and "2 heads" in first.text
    assert all(len(row) == len(table.columns) for table in first.tables for row in table.rows)
    assert json.dumps(first.numbers, allow_nan=False) == json.dumps(written[1].numbers, allow_nan=False)
    layers = first.numbers["excess_by_layer"]["ink"]
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
    found = chapter.CHAPTER(Study(Target(model, lines), Output(tmp_path), "random weights", budget=Budget(100, 2)))
    (row,) = (row for row in found.tables[0].rows if row[0].startswith("Junctions"))
    assert row[2] == "–" and "could not be measured" in row[-1]
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
