"""Trust: planted good and bad maps come out right, random weights never do, and the chapter repeats itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from attention_visualizer.analysis.study.study import FIRST_CONTROL
from attention_visualizer.analysis.trust import chapter as trust_chapter
from attention_visualizer.analysis.trust import measure as trust_measure
from attention_visualizer.analysis.trust.measure import (
    cascade,
    choose_control_rows,
    has_learnt,
    measure,
    method_maps,
    randomisation,
    rank_correlations,
)
from attention_visualizer.analysis.trust.verdict import (
    AMOUNT,
    BASELINES,
    DIRECTIONS,
    INKED,
    MIN_GAIN,
    RANDOM,
    ControlMap,
    MethodTrust,
    judge,
)
from attention_visualizer.data.image_sets import LabelledImageSet
from attention_visualizer.data.images import DatasetDescription
from attention_visualizer.measures import intervals
from attention_visualizer.measures.perturbation import OPERATORS, Curves, Operator, ranking_of
from attention_visualizer.models.untrained import random_weights
from attention_visualizer.models.vision_transformer import VisionTransformer
from tests.helpers.studies import first_digits, study_of

WITHOUT_QUANTUS = "python -m pip install --no-deps quantus==0.6.0"  # see .ci/run
SMALL = {"embed_dim": 22, "num_heads": 2, "num_layers": 2, "mlp_dim": 29}
SHARES = np.linspace(0, 1, 5)
METHODS = ["CLS attention", "rollout", "relevance", "gradient x attention"]


@pytest.fixture(scope="module")
def digits() -> LabelledImageSet:
    return first_digits(120)


def random_model(seed: int) -> VisionTransformer:
    torch.manual_seed(seed)
    return VisionTransformer(**SMALL).eval()  # type: ignore[arg-type]


def curves_of(deletion_area: float, insertion_area: float, n: int = 60, seed: int = 0) -> Curves:
    """Of a given mean area, with pictures that differ."""
    noise = 0.01 * np.random.default_rng(seed).standard_normal((n, 1))
    return Curves(SHARES, deletion_area + noise + 0 * SHARES, insertion_area + noise + 0 * SHARES)


def planted(
    areas: tuple[float, float],
    likeness: float | None = 0.1,
    is_learnt: bool = True,
    control: tuple[float, float] = (0.4, 0.6),
    chance: tuple[float, float] = (0.4, 0.6),
) -> MethodTrust:
    """A map with these areas (deletion, insertion), beside ink rankings of 0.4 and 0.6 and a ranking by chance; maps of
    random weights on every other image. likeness: None without any of those."""
    baselines = {(name, each): curves_of(0.4, 0.6, seed=1) for name in (INKED, AMOUNT) for each in OPERATORS}
    baselines |= {(RANDOM, each): curves_of(*chance, seed=1) for each in OPERATORS}
    control_rows = np.arange(0, 60, 2)
    reached = [(0.45, 0.55), control]
    controls = [
        ControlMap({each: curves_of(*found, n=30, seed=3) for each in OPERATORS}, np.full(30, likeness))
        for found in reached
    ]
    own: dict[Operator, Curves] = {each: curves_of(*areas, seed=2) for each in OPERATORS}
    maps, inked = np.ones((60, 4)), np.tile([True, False, True, False], (60, 1))
    order = np.tile(np.arange(4), (60, 1))
    shown = [] if likeness is None else controls
    return judge(
        "map",
        own,
        baselines,
        maps,
        order,
        inked,
        likeness=None,
        controls=shown,
        control_rows=control_rows,
        is_learnt=is_learnt,
    )


def test_a_map_that_beats_the_ink_and_needs_the_weights_is_trusted() -> None:
    found = planted((0.3, 0.7))
    assert found.is_trusted and found.reason.startswith("Trust map here")
    assert [(gain.operator, gain.direction, gain.baseline) for gain in found.gains] == [
        (operator, direction, baseline)
        for operator in ("fill", "drop")
        for direction in ("deletion", "insertion")
        for baseline in ("random", "random among inked", "amount of ink")
    ]
    assert all(float(gain.value.value) == pytest.approx(0.1, abs=0.01) for gain in found.gains)


@pytest.mark.parametrize(
    ("areas", "options", "said"),
    [
        ((0.3, 0.55), {}, "6 of 12 comparisons"),  # finds what is needed, not what suffices
        ((0.5, 0.7), {}, "6 of 12 comparisons"),
        ((0.39, 0.61), {}, "12 of 12 comparisons"),  # significant, but too little
        ((0.3, 0.7), {"chance": (0.29, 0.6)}, "2 of 12 comparisons"),  # ink is worse than chance, and so is the map
        ((0.3, 0.7), {"control": (0.33, 0.6)}, "6 of 12 comparisons"),  # 0.10 of a needed 1.5 x 0.07
        ((0.3, 0.7), {"likeness": 0.8}, "random weights is 0.80"),  # the map is the same without training
        ((0.3, 0.7), {"likeness": None}, "there is no model with random weights to compare with"),
        ((0.3, 0.7), {"is_learnt": False}, "not above chance"),
    ],
)
def test_a_map_that_fails_in_one_respect_is_not(areas: tuple[float, float], options: dict[str, Any], said: str) -> None:
    found = planted(areas, **options)
    assert not found.is_trusted and found.reason.startswith("Do not trust map here") and said in found.reason


def test_the_control_that_comes_furthest_counts() -> None:
    found = planted((0.3, 0.7), control=(0.35, 0.6))
    deletion, insertion = (next(gain for gain in found.gains if gain.direction == way) for way in DIRECTIONS)
    assert deletion.needed == pytest.approx(1.5 * 0.05, abs=0.01) and deletion.control is not None
    assert deletion.control.n == 30 and insertion.needed == pytest.approx(MIN_GAIN, abs=0.005)
    assert found.is_trusted


def test_significance_alone_never_suffices() -> None:
    found = planted((0.39, 0.61))
    assert all(gain.value.low > 0 and gain.value.value < MIN_GAIN for gain in found.gains)


def test_controls_cost_no_more_than_the_rest() -> None:
    assert (
        choose_control_rows(121, 3).tolist() == (np.arange(60) * 121 // 60).tolist()
        and len(choose_control_rows(1190, 10)) == 60
    )
    assert (
        len(choose_control_rows(100, 10)) == 25
        and len(choose_control_rows(30, 10)) == 10
        and choose_control_rows(4, 0).tolist() == [0, 1, 2, 3]
    )


def test_pointing_and_mass_are_quantus() -> None:
    quantus = pytest.importorskip("quantus", reason=WITHOUT_QUANTUS)

    generator = np.random.default_rng(4)
    maps, inked = generator.random((40, 20)), generator.random((40, 20)) < 0.4
    options: dict[str, Any] = {"abs": False, "normalise": False, "disable_warnings": True}
    images = {"x_batch": np.zeros((40, 1, 4, 5)), "y_batch": np.zeros(40, int)}
    told = {"a_batch": maps.reshape(40, 1, 4, 5), "s_batch": inked.reshape(40, 1, 4, 5)}
    points = quantus.PointingGame(**options)(model=None, **images, **told)
    mass = quantus.RelevanceMassAccuracy(**options)(model=None, **images, **told)
    curves: dict[Operator, Curves] = {each: curves_of(0.4, 0.6, n=40) for each in OPERATORS}
    baselines = {(name, each): curves[each] for name in BASELINES for each in OPERATORS}
    options = {"likeness": None, "controls": [], "control_rows": np.arange(40), "is_learnt": True}
    found = judge("map", curves, baselines, maps, ranking_of(maps), inked, **options)
    assert 0.2 < np.mean(points) < 0.6 and float(found.pointing.value) == pytest.approx(np.mean(points))
    assert float(found.mass.value) == pytest.approx(np.mean(mass))
    everywhere = judge("map", curves, baselines, maps, ranking_of(maps), inked | True, **options)
    assert everywhere.pointing.value == 1 and everywhere.pointing.low == pytest.approx(0.9124, abs=1e-4)  # Wilson


def test_rank_correlations_are_spearmans() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 5, (20, 9)).astype(float), generator.random((20, 9))
    expected = [scipy.stats.spearmanr(a, b).statistic for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(rank_correlations(first, second), expected)
    assert rank_correlations(np.ones((2, 5)), generator.random((2, 5))).tolist() == [0.0, 0.0]


def test_gradient_x_attention_is_captums() -> None:
    """Input x gradient, where the input is the last layer's weights and the rest of the model is worked out here."""
    from captum.attr import InputXGradient

    model, images = random_model(2), torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([0, 4, 9])
    block = model.blocks[-1]
    with torch.no_grad():
        tokens = model.blocks[:-1](model.embed(images))
        query, key, value = block.attn.split_heads(block.attn.qkv(block.norm1(tokens)), 3)
        weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1)

    def logits(weights: torch.Tensor) -> torch.Tensor:
        mixed = tokens + block.attn.proj((weights @ value).transpose(1, 2).flatten(2))
        return model.head(model.norm(mixed + block.mlp(block.norm2(mixed)))[:, 0])

    expected = InputXGradient(logits).attribute(weights.requires_grad_(), target=classes)
    expected = expected.clamp_min(0).mean(dim=1)[:, 0, 1:].detach().numpy()
    found = method_maps(model, images, classes)["gradient x attention"]
    assert expected.max() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


def test_randomisation_is_quantus(digits: LabelledImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parameter randomisation test, given the same random weights, stage by stage."""
    quantus = pytest.importorskip("quantus", reason=WITHOUT_QUANTUS)
    from quantus.helpers.model.pytorch_model import PyTorchModel

    study, numbers = study_of(random_model(3), digits, tmp_path, 40, 2), np.arange(7)
    model = study.target.model
    assert isinstance(model, VisionTransformer)
    inputs = study.target.model_input(digits.read(numbers.tolist()))
    classes = model(inputs).argmax(dim=1).numpy()
    monkeypatch.setattr(PyTorchModel, "get_random_layer_generator", lambda *_, **__: cascade(model, FIRST_CONTROL))
    monkeypatch.setattr(PyTorchModel, "random_layer_generator_length", 4)

    def explained(model: VisionTransformer, inputs: Any, targets: Any, **_: Any) -> Any:
        maps = method_maps(model, torch.as_tensor(inputs), torch.as_tensor(targets))["rollout"]
        return maps.reshape(-1, 1, 4, 4).repeat(7, axis=2).repeat(7, axis=3)  # as many values as pixels

    randomised = quantus.MPRT(
        similarity_func=quantus.similarity_func.correlation_spearman, abs=False, normalise=False, disable_warnings=True
    )
    scores = randomised(model, inputs.numpy(), classes, explain_func=explained, device="cpu")
    likeness, stages = randomisation(study, numbers, classes, method_maps(model, inputs, torch.from_numpy(classes)))
    expected = [np.mean(scores[name]) for name in stages]
    assert min(expected) < 0.9
    np.testing.assert_allclose(likeness["rollout"].value, expected, atol=1e-6)


def test_weights_become_random_from_the_output_down() -> None:
    model = random_model(1)
    original = {name: value.clone() for name, value in model.state_dict().items()}
    changed: set[str] = set()
    seen = []
    for stage, now in cascade(model, 7):
        differing = {name for name, value in now.state_dict().items() if not torch.equal(value, original[name])}
        assert changed <= differing
        seen.append(
            (stage, {name.split(".")[0] if not name.startswith("blocks") else name[:8] for name in differing - changed})
        )
        changed = differing
    assert [stage for stage, _ in seen] == ["head", "block 2", "block 1", "embedding"]
    assert seen[0][1] == {"head"} and seen[1][1] == {"blocks.1"} and seen[2][1] == {"blocks.0"}
    assert seen[3][1] == {"patch_embed", "cls_token", "pos_embed"}
    for name, value in model.state_dict().items():
        assert torch.equal(value, original[name])


@pytest.mark.parametrize("seed", [11, 12, 13, 14])
def test_random_weights_are_never_trusted(seed: int, digits: LabelledImageSet, tmp_path: Path) -> None:
    study = study_of(random_model(seed), digits, tmp_path, 40, 2)
    model = study.target.model
    assert isinstance(model, VisionTransformer)
    found = measure(study, study.stratified_rows(40))
    assert [each.name for each in found.methods] == METHODS and not any(each.is_trusted for each in found.methods)
    # The last stage of the cascade is the first control.
    for each in found.methods:
        assert each.likeness is not None and each.control_likeness is not None
        assert float(each.likeness.value[-1]) == float(each.control_likeness.value[0])


def test_blocks_of_pictures_change_nothing(
    digits: LabelledImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(random_model(5), digits, tmp_path, 40, 2)
    whole = measure(study, study.stratified_rows(20))
    monkeypatch.setattr(trust_measure, "MAX_TOKENS", 7 * 16)
    sizes: list[int] = []
    handle = study.target.model.patch_embed.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))  # type: ignore[union-attr, operator]
    curves_of_blocks = measure(study, study.stratified_rows(20)).curves
    handle.remove()
    assert sizes.count(7) >= 10 and sizes.count(6) >= 5
    for task, curves in curves_of_blocks.items():
        np.testing.assert_allclose(curves.deletion, whole.curves[task].deletion, atol=1e-6)
        np.testing.assert_allclose(curves.insertion, whole.curves[task].insertion, atol=1e-6)


def test_what_random_weights_answer_as_well_is_not_learnt(digits: LabelledImageSet, tmp_path: Path) -> None:
    """Labels that the first control happens to know: a model that knows them too has learnt nothing by that."""
    model = random_model(5)
    lucky = random_weights(model, FIRST_CONTROL)
    with torch.no_grad():
        labels = lucky(digits.model_input(digits.images)).argmax(dim=1)
    pictures, all_of_them = LabelledImageSet(digits.description, digits.images, labels), np.arange(120)
    answers = []
    for controls in (0, 1):
        study = study_of(lucky, pictures, tmp_path, 120, controls)
        answers.append(has_learnt(study, all_of_them, labels.numpy(), all_of_them[::2]))
    assert answers == [True, False]


def test_without_a_class_token_the_map_is_not_called_its_attention() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(**SMALL, pooling="mean").eval()  # type: ignore[arg-type]
    names = list(method_maps(model, torch.rand(2, 1, 28, 28), torch.tensor([1, 2])))
    assert names == ["attention averaged over patch queries", *METHODS[1:]]


# --- a model whose answer rests on a patch that its attention leaves out ---

MARKS = ([0, 2, 6, 8], [1, 3, 5, 7])  # of the 9 pixels of a patch: the two classes, as dim as their patch is alone


def marked_pictures(count: int) -> LabelledImageSet:
    """Six of 16 patches evenly bright, and one with a mark, which is darker: uint8 [image, 1, 12, 12]."""
    generator = np.random.default_rng(0)
    patches = np.zeros((count, 16, 9), np.uint8)
    labels = np.arange(count) % 2
    for patch, label in zip(patches, labels, strict=True):
        places = generator.permutation(16)[:7]
        patch[places[1:]] = generator.integers(180, 256, (6, 1))
        patch[places[0], MARKS[label]] = 140
    images = patches.reshape(count, 4, 4, 3, 3).transpose(0, 1, 3, 2, 4).reshape(count, 1, 12, 12)
    sizes = {"train": 1, "validation": 1, "test": count}
    description = DatasetDescription("marks", 12, 1, ("corners", "sides"), 0.0, 1.0, sizes)
    return LabelledImageSet(description, torch.from_numpy(images.copy()), torch.from_numpy(labels))


def marked_model() -> VisionTransformer:
    """Attends to bright patches, and answers by the mark alone. Features, each with its negative, so that the layer
    norms only scale: the mark (corners minus sides), brightness, and 1."""
    model = VisionTransformer(
        img_size=12, patch_size=3, num_classes=2, embed_dim=6, num_heads=1, num_layers=1, mlp_dim=5
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        embedding = next(each for each in model.patch_embed.modules() if isinstance(each, torch.nn.Conv2d))
        for feature, sign in ((0, 1.0), (1, -1.0)):
            for pixels, side in zip(MARKS, (10.0, -10.0), strict=True):
                embedding.weight[feature].view(-1)[pixels] = sign * side
        embedding.weight[2], embedding.weight[3] = 1.0, -1.0
        assert embedding.bias is not None and model.cls_token is not None
        embedding.bias[4:] = model.cls_token[0, 0, 4:] = torch.tensor([1.0, -1.0])
        attention = model.blocks[0].attn
        attention.qkv.weight[0, 4] = 1.0  # the query's
        attention.qkv.weight[6, 2] = 2.5  # the key's: brightness
        attention.qkv.weight[12, 0] = 1.0  # the value's: the mark
        attention.proj.weight[0, 0], attention.proj.weight[1, 0] = 1.0, -1.0
        model.head.weight[0, 0], model.head.weight[1, 0] = 500.0, -500.0
    return model


def test_known_good_maps_are_trusted_and_known_bad_ones_are_not(tmp_path: Path) -> None:
    """The mark is the least inked of inked patches, and hardly attended to."""
    pictures = marked_pictures(60)
    study = study_of(marked_model(), pictures, tmp_path, 60, 3)
    found = measure(study, study.stratified_rows(60))
    verdicts = {each.name: each.is_trusted for each in found.methods}
    assert verdicts == {"CLS attention": False, "rollout": False, "relevance": True, "gradient x attention": True}, [
        each.reason for each in found.methods
    ]
    good = found.curves["relevance", "fill"]
    assert (good.deletion[:, 0] > 0.99).all() and np.allclose(good.deletion[:, 1:], 0.5, atol=1e-3)
    assert found.methods[0].worst.baseline == AMOUNT or found.methods[0].worst.value.value < 0
    alone = study_of(marked_model(), pictures, tmp_path, 60, 0)
    assert not any(each.is_trusted for each in measure(alone, alone.stratified_rows(60)).methods)
    unlearnt = study_of(random_weights(marked_model(), 5), pictures, tmp_path, 60, 3)
    assert not any(each.is_trusted for each in measure(unlearnt, unlearnt.stratified_rows(60)).methods)


def test_the_chapter_says_the_same_twice_and_all_of_it(digits: LabelledImageSet, tmp_path: Path) -> None:
    chapters = [trust_chapter.CHAPTER(study_of(random_model(5), digits, tmp_path, 30, 2)) for _ in range(2)]
    first = json.dumps(chapters[0].numbers, allow_nan=False)
    assert first == json.dumps(chapters[1].numbers, allow_nan=False) and chapters[0].text == chapters[1].text
    numbers = json.loads(first)
    assert numbers["images"] == 30 and numbers["stages"] == ["head", "block 2", "block 1", "embedding"]
    assert set(numbers["rankings"]) == {*METHODS, RANDOM, INKED, AMOUNT}
    assert chapters[0].text.count("\n- Do not trust") == 4 and (tmp_path / "attention_trust.png").is_file()
    assert chapters[0].finding is not None and "None of the maps" in chapters[0].finding.text


def test_without_known_classes_the_chapter_is_one_sentence(digits: LabelledImageSet, tmp_path: Path) -> None:
    nameless = LabelledImageSet(digits.description, digits.images, None)
    chapter = trust_chapter.CHAPTER(study_of(random_model(5), nameless, tmp_path, 40, 2))
    assert "classes are known" in chapter.text and not chapter.figures


def test_an_empty_null_is_at_its_level() -> None:
    """Maps no better than the ink: an interval lies above 0 no more often than it may (one side, 2.5 %)."""
    generator = np.random.default_rng(0)
    above = [float(intervals.bootstrap_mean(generator.standard_normal(50), seed=seed).low) > 0 for seed in range(400)]
    assert 0.005 <= np.mean(above) <= 0.055
