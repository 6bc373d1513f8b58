"""Roles through the whole chapter: planted heads get their names, random weights none."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_visualizer.analysis.roles import chapter
from attention_visualizer.analysis.roles.causal import check_roles, other_positions
from attention_visualizer.analysis.roles.figure import draw_redundancy, draw_roles
from attention_visualizer.analysis.roles.measure import (
    MeasuredHeads,
    Redundancy,
    Roles,
    find_roles,
    measure_redundancy,
    reached_by,
)
from attention_visualizer.analysis.study.budget import Budget
from attention_visualizer.analysis.study.controls import Sharpening
from attention_visualizer.analysis.study.heads import Heads
from attention_visualizer.analysis.study.output import Output
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.analysis.study.target import Target
from attention_visualizer.attention.capture import intervene
from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.data.datamodule import ImageDataModule
from attention_visualizer.data.image_sets import ImageFolder, ImageSet, InputFormat, LabelledImageSet
from attention_visualizer.data.images import DatasetDescription
from attention_visualizer.data.ink import in_patches, ink_amount, inked_patches
from attention_visualizer.measures.head_roles import (
    BEYOND_CONTROLS,
    MIN_CORRELATION,
    NO_ROLE,
    ink_correlation,
    role_bounds,
)
from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.report.chapter import Chapter

GRID, PATCHES = (4, 4), 16
GEOMETRY = Geometry(GRID, 1, (7, 7))
# No two numbers of layers, heads or widths are equal.
SIZES: dict[str, Any] = {
    "img_size": 28,
    "patch_size": 7,
    "embed_dim": 20,
    "num_heads": 4,
    "num_layers": 3,
    "mlp_dim": 29,
}


@cache
def digits() -> tuple[DatasetDescription, Tensor, Tensor]:
    data = ImageDataModule(name="digits", fallback=None)
    data.load()
    images, labels = data.splits["test"]
    return data.description, images, labels


def pictures(labelled: bool = True, count: int | None = None) -> LabelledImageSet:
    description, images, labels = digits()
    return LabelledImageSet(description, images[:count], labels[:count] if labelled else None)


def random_model(seed: int, **changes: Any) -> VisionTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VisionTransformer(**SIZES | changes).eval()


def study_of(
    model: nn.Module,
    folder: Path = Path("unused"),
    controls: int = 2,
    images: ImageSet | None = None,
    geometry: Geometry | None = None,
) -> Study:
    target = Target(model, pictures() if images is None else images, geometry)
    study = Study(target, Output(folder), "planted", Budget(50, controls))
    study.__dict__["has_learnt"] = True  # so that what is planted is looked at
    return study


def roles_of(study: Study, controls: tuple[Study, ...] = (), has_learnt: bool = True) -> Roles:
    """Without figures."""
    kinds = {"planted": [(each.survey, amount_in(each)) for each in controls]} if controls else {}
    return find_roles(study.survey, amount_in(study), inked_in(study), kinds, has_learnt)


def inked_in(study: Study) -> np.ndarray:
    """Of the images whose maps are kept: bool [kept, patch]."""
    survey = study.survey
    return in_patches(inked_patches, study.target.images, survey.kept, survey.grid)


def amount_in(study: Study) -> np.ndarray:
    """Of ink, of the images whose maps are kept: [kept, patch]."""
    survey = study.survey
    return in_patches(ink_amount, study.target.images, survey.kept, survey.grid)


def measured_heads(study: Study, roles: Roles) -> MeasuredHeads:
    redundancy = measure_redundancy(study.survey, ())
    return MeasuredHeads(Heads.of(study.survey), roles, redundancy, study.survey.maps.shape[-1], {}, True)


# --- planted attention ---


def uniform(amount: Tensor) -> Tensor:
    return torch.zeros(len(amount), PATCHES + 1, PATCHES + 1)


def towards(strength: float, amount: Tensor) -> Tensor:
    """Every token's scores rise with a patch's ink."""
    scores = uniform(amount)
    scores[:, :, 1:] = strength * amount[:, None]
    return scores


def any_ink(amount: Tensor) -> Tensor:
    """Patches that hold some ink draw attention, none more than another."""
    scores = uniform(amount)
    scores[:, :, 1:] = 6.0 * (amount[:, None] > 0.15)
    return scores


def brightest(amount: Tensor) -> Tensor:
    """All on the brightest patch."""
    scores = uniform(amount)
    scores[torch.arange(len(amount)), :, 1 + amount.argmax(dim=1)] = 40.0
    return scores


def one_patch(patch: int, amount: Tensor) -> Tensor:
    scores = uniform(amount)
    scores[:, :, 1 + patch] = 6.0
    return scores


def class_token(amount: Tensor) -> Tensor:
    scores = uniform(amount)
    scores[:, :, 0] = 6.0
    return scores


def near(amount: Tensor) -> Tensor:
    """Patches look at themselves and beside; the class token everywhere."""
    centers = GEOMETRY.patch_centers()
    scores = uniform(amount)
    scores[:, 1:, 1:] = -torch.cdist(centers, centers) / 3  # pixels
    scores[:, 1:, 0] = -20.0
    return scores


def anywhere(amount: Tensor) -> Tensor:
    """One patch of each picture, whatever is on it."""
    scores = uniform(amount)
    chosen = torch.randint(0, PATCHES, (len(amount),), generator=torch.Generator().manual_seed(len(amount)))
    scores[torch.arange(len(amount)), :, 1 + chosen] = 6.0
    return scores


class Planted(nn.Module):
    """Attention with known scores, from the ink of each picture: a function [image, patch] -> [image, query, key] for
    each head of each layer."""

    def __init__(self, *layers: list[Any], grid: tuple[int, int] = GRID) -> None:
        super().__init__()
        self.grid = grid
        self.layers = nn.ModuleList(PlantedAttention(heads) for heads in layers)
        self.head = nn.Linear(math.prod(grid) + 1, 10)

    def forward(self, images: Tensor) -> Tensor:
        description = digits()[0]
        pixels = ((images * description.std + description.mean) * 255).round().clamp(0, 255).to(torch.uint8)
        amount = ink_amount(pixels, self.grid)
        for layer in self.layers:
            seen = layer(amount)
        return self.head(seen[:, 0, 0])


class PlantedAttention(nn.Module):
    def __init__(self, heads: list[Any]) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, amount: Tensor) -> Tensor:
        keys = torch.stack([head(amount) for head in self.heads], dim=1).transpose(-1, -2)
        # Queries of the identity: the scores are the keys' entries, whatever they are.
        tokens = torch.eye(keys.shape[-1]).expand_as(keys)
        return F.scaled_dot_product_attention(tokens, keys, tokens, scale=1.0)


# Each head of two layers, in order, and the roles that it must get. The second layer has fewer heads, and only the
# class token leaves it: where its patches look says nothing.
HEADS: list[list[tuple[Any, list[str]]]] = [
    [
        (uniform, [NO_ROLE]),
        (partial(towards, 9.0), ["ink", "brightest patch"]),
        (partial(towards, -6.0), ["background"]),
        (partial(one_patch, 5), ["fixed position"]),
        (near, ["neighbours"]),
        (partial(towards, 0.5), [NO_ROLE]),
        (brightest, ["brightest patch"]),
        (any_ink, ["ink"]),
    ],
    [
        (class_token, [NO_ROLE]),  # whose patches all get the same: no place
        (anywhere, ["content-dependent"]),
        (near, [NO_ROLE]),
    ],
]
EXPECTED = [names for layer in HEADS for _, names in layer]


@cache
def planted() -> Study:
    model = Planted(*([head for head, _ in layer] for layer in HEADS))
    return study_of(model, controls=0, geometry=GEOMETRY)


@cache
def planted_roles() -> Roles:
    return roles_of(planted())


def test_planted_heads_get_their_names() -> None:
    assert planted_roles().names == EXPECTED


def test_what_is_measured_of_planted_heads_is_their_closed_form() -> None:
    found, study = planted_roles(), planted()
    inked, amount = inked_in(study), amount_in(study)
    assert found.uniform.value == pytest.approx(inked.mean()) and found.uniform.n == 300
    weights = np.exp(9 * amount)
    share = weights / weights.sum(axis=1, keepdims=True)  # of the patches alone
    assert found.on_ink.value[0, 1] == pytest.approx((share * inked).sum(axis=1).mean(), abs=1e-5)
    moving, ink = share - share.mean(axis=0), amount - amount.mean(axis=0)
    by_hand = np.corrcoef(moving.ravel(), ink.ravel())[0, 1]
    assert found.follows_ink.value[0, 1] == pytest.approx(by_hand, abs=1e-5)
    assert found.brightest.value[0, [1, 6]].tolist() == [1.0, 1.0]
    assert found.on_ink.value[0, 0] == pytest.approx(inked.mean(), abs=1e-6)
    assert found.class_token.value[1, 0] == pytest.approx(math.exp(6) / (math.exp(6) + PATCHES), abs=1e-5)
    np.testing.assert_allclose(found.selectivity.place.value[0, [0, 4]], 0, atol=1e-6)
    one = np.array([math.exp(6), *[1] * (PATCHES - 1)]) / (math.exp(6) + PATCHES - 1)
    assert found.selectivity.place.value[0, 3] == pytest.approx(math.log(16) + (one * np.log(one)).sum(), abs=1e-5)
    assert found.selectivity.place.value[1, 0] == pytest.approx(0, abs=1e-6)  # the class token is no place
    assert (
        found.entropy.value[0, 0] == pytest.approx(math.log(17)) and found.entropy.low[0, 1] < found.entropy.high[0, 1]
    )
    # The most that can vary: a patch of its own on every picture, but for what 300 draws leave uneven.
    assert 0.95 * found.selectivity.place.value[0, 3] < found.selectivity.content.value[1, 1]


def test_the_correlation_is_no_larger_for_a_sharper_head_and_its_interval_is_that_of_resampled_images() -> None:
    generator = np.random.default_rng(0)
    amount = generator.random((1100, 1)) * generator.random((1100, 7))
    flat = 1 / 7 + 0.001 * (amount - amount.mean(axis=1, keepdims=True)) + generator.normal(0, 3e-4, amount.shape)
    sharp = 1 / 7 + 100 * (flat - 1 / 7)
    value, moves = ink_correlation(np.stack([flat, sharp], axis=1), amount)
    assert value[0] == pytest.approx(value[1], abs=1e-6) and 0.3 < value[0] < 0.7
    draws = []
    for _ in range(300):
        rows = generator.integers(len(amount), size=len(amount))
        draws.append(ink_correlation(flat[rows][:, None], amount[rows])[0][0])
    assert moves[:, 0].std() * math.sqrt(len(amount)) == pytest.approx(np.std(draws), rel=0.15)
    assert moves.sum(axis=0) == pytest.approx([0, 0], abs=1e-9)


def test_a_head_that_hardly_selects_follows_ink_and_has_no_role() -> None:
    found = planted_roles()
    assert found.p_value[0, 5] < 0.01 and found.follows_ink.low[0, 5] > MIN_CORRELATION and found.names[5] == [NO_ROLE]


def test_heads_that_never_look_elsewhere_are_not_significant() -> None:
    """Uniform, one patch, the class token, neighbours: to the last bit the same on every picture."""
    found = planted_roles()
    assert found.p_value[[0, 0, 0, 1, 1], [0, 3, 4, 0, 2]].tolist() == [1.0] * 5
    assert found.follows_ink.value[[0, 0, 0, 1, 1], [0, 3, 4, 0, 2]].tolist() == [0.0] * 5


def test_heads_that_a_layer_does_not_have_are_in_no_family() -> None:
    found, study = planted_roles(), planted()
    absent = np.array([[False] * 8, [False] * 3 + [True] * 5])
    for values in (found.p_value, found.follows_ink.value, found.brightest.value, found.selectivity.place.value):
        assert (np.isnan(values) == absent).all()
    assert Heads.of(study.survey).labels == [*(f"1.{head}" for head in range(1, 9)), "2.1", "2.2", "2.3"]
    assert found.p_value[0, [1, 2, 5]].tolist() == [1 / 1000] * 3
    # As a control, such a model does not raise the bounds by what is not there.
    few = study_of(Planted([uniform, uniform], [uniform]), controls=0, geometry=GEOMETRY)
    assert max(reached_by([(few.survey, amount_in(few))]).values()) == pytest.approx(0, abs=1e-6)


def test_the_order_of_heads_does_not_matter() -> None:
    model = Planted(*([head for head, _ in layer[::-1]] for layer in HEADS))
    found = roles_of(study_of(model, controls=0, geometry=GEOMETRY))
    assert found.names == [*EXPECTED[:8][::-1], *EXPECTED[8:][::-1]]


@pytest.mark.parametrize(
    ("head", "lost"),
    [
        (partial(towards, 9.0), {"ink", "background", "brightest patch"}),
        (partial(towards, -6.0), {"ink", "background"}),
        (partial(one_patch, 7), {"fixed position"}),
        (near, {"neighbours"}),
        (anywhere, {"content-dependent"}),
    ],
)
def test_no_head_has_a_role_that_controls_reach_as_well(head: Any, lost: set[str]) -> None:
    control = study_of(Planted([head], [uniform]), controls=0, geometry=GEOMETRY)
    found = roles_of(planted(), (control,))
    expected = [[name for name in names if name not in lost] or [NO_ROLE] for names in EXPECTED]
    assert found.names == expected


def test_a_control_that_hardly_selects_takes_no_role_away() -> None:
    """Nearly uniform heads follow ink as closely as a sharp head does, and nobody would call it their role."""
    control = study_of(Planted([partial(towards, 0.5)], [uniform]), controls=0, geometry=GEOMETRY)
    assert roles_of(planted(), (control,)).names == EXPECTED


def test_a_model_that_has_learnt_nothing_has_no_roles() -> None:
    assert roles_of(planted(), has_learnt=False).names == [[NO_ROLE]] * len(EXPECTED)


def test_bounds_are_the_least_effects_or_half_of_the_way_from_controls_to_1() -> None:
    least = {
        "ink": 0.5,
        "brightest patch": 0.5,
        "fixed position": 0.8,
        "content-dependent": 0.8,
        "neighbours": 0.5,
    }
    assert role_bounds(dict.fromkeys(least, 0.0)) == least
    expected = {name: max(minimum, 0.7) for name, minimum in least.items()}
    assert BEYOND_CONTROLS == 0.5 and role_bounds(dict.fromkeys(least, 0.4)) == pytest.approx(expected)


def test_distances_are_relative_to_uniform_attention() -> None:
    found = planted().survey.relative_distances
    assert found.value[0, 0] == pytest.approx(1, abs=1e-5)  # of a uniform head
    centers = GEOMETRY.patch_centers()
    apart = torch.cdist(centers, centers)
    weights = (-apart / 3).softmax(dim=-1)
    assert found.value[0, 4] == pytest.approx(((weights * apart).sum(dim=-1).mean() / apart.mean()).item(), abs=1e-5)
    assert np.isnan(found.value[1]).all() and np.isnan(found.high[1]).all()
    assert (found.low <= found.value + 1e-9)[0].all() and (found.high >= found.value - 1e-9)[0].all()
    alone = study_of(Planted([near]), controls=0, geometry=GEOMETRY)
    assert roles_of(alone).names == [[NO_ROLE]]  # the only layer is also the last one


# --- random weights ---

SHAPES: dict[str, dict[str, Any]] = {
    "class token": {},
    "mean": {"pooling": "mean"},
    "fixed positions": {"positional_embedding": "sincos"},
    "one head": {"num_heads": 1, "num_layers": 1},
}


@cache
def untrained(shape: str, seed: int) -> Study:
    return study_of(random_model(seed, **SHAPES[shape]), controls=0, images=pictures(count=150))


@pytest.mark.parametrize("shape", SHAPES)
def test_random_weights_have_no_role(shape: str) -> None:
    # Of one head, three models say too little of what random weights reach.
    controls = tuple(untrained(shape, 1000 + number) for number in range(10 if shape == "one head" else 3))
    for seed in range(4):
        found = roles_of(untrained(shape, seed), controls)
        assert all(names == [NO_ROLE] for names in found.names)
        # Not for want of significance: such heads do follow ink, a little.
        assert shape == "one head" or np.nanmin(found.p_value) < 0.01


def test_sharpened_random_weights_have_roles_only_without_sharpened_controls() -> None:
    """Sharp heads have places that they prefer, without any learning."""
    like = planted().survey
    entropies = {f"blocks.{layer}.attn": torch.full((4,), 0.3) for layer in range(3)}

    def sharp(seed: int) -> Study:
        study = study_of(random_model(seed), controls=0, images=pictures(count=150))
        geometries = dict.fromkeys(entropies, like.geometries[0])
        with intervene(study.target.model, Sharpening(geometries, entropies)):
            study.__dict__["survey"] = study.target.survey()
        return study

    models = [sharp(seed) for seed in range(11)]
    assert models[0].survey.mean_of("entropy").value[:, :-1] == pytest.approx(np.full((3, 4), 0.3), abs=0.02)
    alone = {name for model in models[:5] for names in roles_of(model).names for name in names}
    assert alone > {NO_ROLE}  # so the test can fail
    beside = [names for model in models[:5] for names in roles_of(model, tuple(models[5:])).names]
    assert beside == [[NO_ROLE]] * 60


# --- the chapter ---


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Chapter, Path]:
    folder = tmp_path_factory.mktemp("roles")
    return chapter.CHAPTER(study_of(random_model(0), folder)), folder


def plain(numbers: dict[str, Any]) -> str:
    """Raises ValueError for NaN and infinities."""
    return json.dumps(numbers, allow_nan=False)


def test_the_chapter_says_what_there_is(written: tuple[Chapter, Path]) -> None:
    found, folder = written
    assert found.numbers["roles"] == [[NO_ROLE]] * 12
    assert found.finding is not None
    assert found.finding.text == "No head of 12 has a role beyond every head of 8 control models (n = 300)."
    controls_of_text = (
        "2 models with random weights, 4 models with sharpened random weights, 2 models with shuffled labels"
    )
    assert f"Controls: {controls_of_text}." in " ".join(found.text.split())
    assert "Heads without a distinct role: 12 of 12." in found.text
    assert "nan" not in found.text and "{" not in found.text
    assert all((folder / figure.name).is_file() for figure in found.figures) and len(found.figures) == 2
    assert found.finding.figure == found.figures[0].name
    followed, looked, controls = found.tables
    assert all(len(row) == len(table.columns) for table in found.tables for row in table.rows)
    for table in (followed, looked):
        assert len(table.rows) == 12 and "300 test images" in table.caption
    assert len(controls.rows) == 5 and len(controls.columns) == 5
    assert all("–" not in cell for row in followed.rows for cell in row)
    assert [row[-1] for row in looked.rows[8:]] == ["–"] * 4  # the last layer's distances
    # Every number has its interval, but for p and where there is none.
    told = [cell for row in looked.rows for cell in row[1:]]
    told += [row[column] for row in followed.rows for column in (1, 2, 4)]
    assert all(" to " in cell or cell == "–" for cell in told)


def test_the_numbers_are_plain_and_the_same_again(written: tuple[Chapter, Path], tmp_path: Path) -> None:
    again = chapter.CHAPTER(study_of(random_model(0), tmp_path))
    assert plain(again.numbers) == plain(written[0].numbers)
    assert (again.text, again.tables, again.finding) == (written[0].text, written[0].tables, written[0].finding)
    numbers = again.numbers
    assert len(numbers["heads"]) == len(numbers["place"]["value"]) == len(numbers["cluster"]) == 12
    assert numbers["correlation_with_ink"]["n"] == 300 and np.shape(numbers["divergence"]) == (12, 12)


def test_a_chapter_of_planted_heads(tmp_path: Path) -> None:
    """Layers of eight and three heads: every number is there, and the finding names what was planted."""
    study = planted()
    study = replace(study, output=Output(tmp_path))
    study.__dict__["has_learnt"] = True
    found = chapter.CHAPTER(study)
    assert found.numbers["roles"] == EXPECTED and "NaN" not in plain(found.numbers)
    assert [len(table.rows) for table in found.tables] == [11, 11, 5, 7]
    assert found.finding is not None
    assert found.finding.text.startswith(
        "7 of 11 heads have a role, without a control to exceed: 2 ink, 1 background, 2 brightest patch, 1 fixed "
        "position, 1 content-dependent, 1 neighbours; 1 of them has more than one (n = 300)"
    )
    # Uniform ones and those that only differ in where patches look are one cluster, and nobody is with the others.
    cluster = found.numbers["cluster"]
    assert cluster[0] == cluster[4] == cluster[5] == cluster[10]
    assert len({cluster[number] for number in (0, 1, 2, 3, 6, 7, 8, 9)}) == 8


def test_pairs_and_groups_are_counted_apart() -> None:
    """Three heads of which one is alike the others, that are not alike each other: two pairs, one group or none."""
    divergence = np.array([[0, 0.09, 0.12], [0.09, 0, 0.09], [0.12, 0.09, 0]])
    alike = Redundancy(divergence, np.full(7, 0.1), np.arange(3), np.array([1, 1, 1]), None)
    text = chapter.redundancy_text(alike)
    assert "0.100 (0.100 to 0.100) nats on average over 3 pairs and 7 images" in text
    assert "2 of the pairs diverge by less than 0.1 nats" in text and "1 group of 3 heads" in text
    text = chapter.redundancy_text(replace(alike, divergence=divergence + 0.2, cluster=np.array([1, 2, 3])))
    assert "0 of the pairs" in text and "form no group" in text
    assert chapter.redundancy_text(replace(alike, divergence=divergence[:1, :1], cluster=np.array([1]))) == ""


def test_roles_of_one_head_are_told() -> None:
    two = Heads((np.array([0, 0]), np.array([0, 1])))
    several = replace(planted_roles(), names=[["ink", "fixed position"], ["ink"]])
    text = chapter.finding_of(replace(measured_heads(planted(), several), heads=two), "figure").text
    assert "2 of 2 heads have a role" in text and "2 ink, 1 fixed position; 1 of them has more than one" in text


def test_the_figures_name_every_head_and_its_roles() -> None:
    measured = measured_heads(planted(), planted_roles())
    left, _, right = draw_roles(measured).axes
    assert [label.get_text() for label in left.get_yticklabels()] == measured.heads.labels
    assert [text.get_text() for text in right.texts] == ["role", *(", ".join(names) for names in EXPECTED)]
    matrix = draw_redundancy(measured).axes[0]
    assert sorted(label.get_text() for label in matrix.get_yticklabels()) == measured.heads.labels
    (box,) = matrix.lines  # around the uniform heads and those that only differ in where patches look
    assert np.ptp(box.get_xdata()) == np.ptp(box.get_ydata()) == 4


def test_the_figure_shows_what_controls_reach_not_the_bound() -> None:
    study, control = planted(), study_of(Planted([partial(towards, 6.0)], [uniform]), controls=0, geometry=GEOMETRY)
    found = roles_of(study, (control,))
    reached = found.reached["planted"]["ink"]
    assert found.bounds["ink"] == pytest.approx(reached + 0.5 * (1 - reached)) and reached > MIN_CORRELATION
    left = draw_roles(measured_heads(study, found)).axes[0]
    (band,) = [patch for patch in left.patches if patch.get_label() == "heads of controls"]
    assert band.get_extents().transformed(left.transData.inverted()).xmax == pytest.approx(reached)
    dashed = [line.get_xdata()[0] for line in left.lines if line.get_linestyle() == "--"]
    assert {-found.bounds["ink"], found.bounds["ink"]} <= set(dashed)


def test_one_head_alone_has_a_chapter(tmp_path: Path) -> None:
    found = chapter.CHAPTER(study_of(random_model(0, **SHAPES["one head"]), tmp_path))
    assert found.numbers["heads"] == ["1.1"] and "nan" not in found.text and plain(found.numbers)
    assert "Between two heads" not in found.text and [len(table.rows) for table in found.tables] == [1, 1, 5]


def test_labels_are_not_needed(tmp_path: Path) -> None:
    found = chapter.CHAPTER(study_of(random_model(0), tmp_path, images=pictures(labelled=False)))
    assert found.numbers["roles"] == [[NO_ROLE]] * 12


def test_pictures_without_ink_get_one_sentence(tmp_path: Path) -> None:
    photos = ImageFolder(tmp_path, InputFormat((28, 28), 1, (0.5,), (0.5,)), ())
    found = chapter.CHAPTER(study_of(random_model(0), tmp_path, images=photos))
    assert found.text == chapter.NO_INK and not (found.figures or found.tables or found.numbers)
    assert found.finding is None and list(tmp_path.iterdir()) == []


# --- whether predictions depend on roles ---


class ReadsBrightest(nn.Module):
    """Two heads on the brightest patch and one on a fixed one; the class is where the first says that the brightest is:
    the second and the third are not needed."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = PlantedAttention([brightest, brightest, partial(one_patch, 5)])
        self.after = PlantedAttention([uniform])  # so that the first layer is not the last
        self.bias = nn.Parameter(torch.zeros(PATCHES))

    def forward(self, images: Tensor) -> Tensor:
        description = digits()[0]
        pixels = ((images * description.std + description.mean) * 255).round().clamp(0, 255).to(torch.uint8)
        amount = ink_amount(pixels, GRID)
        seen = self.attention(amount)
        self.after(amount)
        return seen[:, 0, 0, 1:] * 10 + self.bias


def test_predictions_depend_on_the_role_of_the_head_that_is_read() -> None:
    description, images, _ = digits()
    labels = ink_amount(images, GRID).argmax(dim=1)
    names = tuple(str(patch) for patch in range(PATCHES))
    patches = LabelledImageSet(replace(description, class_names=names), images, labels)
    study = study_of(ReadsBrightest(), controls=0, images=patches, geometry=GEOMETRY)
    roles = roles_of(study).names
    assert roles[:3] == [["brightest patch"]] * 2 + [["fixed position"]]
    found = check_roles(study, roles)
    assert found is not None and found.labels == ["1.1", "1.2", "1.3"] and found.outcomes.errors_before == 0
    assert found.interventions == ["another image's attention"] * 2 + ["patches at other positions"]
    assert found.matters == ["1.1"] and found.outcomes.errors[0] > 20 and found.outcomes.errors[1:].tolist() == [0, 0]
    assert check_roles(study, [[NO_ROLE]] * 4) is None


def test_other_positions_move_every_patch_and_nothing_else() -> None:
    moved = other_positions(GEOMETRY)
    assert moved[0] == 0 and sorted(moved.tolist()) == list(range(17)) and (moved[1:] != torch.arange(1, 17)).all()
