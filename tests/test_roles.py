"""Roles through the whole chapter: planted heads get their names, random weights none."""

from __future__ import annotations

import math
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_visualizer.analysis import roles as chapter
from attention_visualizer.analysis.roles import Roles, find_roles, ink_of, reached_by
from attention_visualizer.analysis.study import Effort, Study
from attention_visualizer.data import ImageDataModule
from attention_visualizer.geometry import Geometry
from attention_visualizer.head_roles import LEAST_INK, NO_ROLE
from attention_visualizer.images import DatasetDescription
from attention_visualizer.ink import inked_patches
from attention_visualizer.model import VisionTransformer
from attention_visualizer.pictures import LabelledImages

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


def pictures(labelled: bool = True) -> LabelledImages:
    description, images, labels = digits()
    return LabelledImages(description, images, labels if labelled else None)


def random_model(seed: int, **changes: Any) -> VisionTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VisionTransformer(**SIZES | changes).eval()


def study_of(model: nn.Module, folder: Path = Path("unused"), controls: int = 2, **options: Any) -> Study:
    options = {"pictures": pictures(), "effort": Effort(50, controls)} | options
    return Study(model, output=folder, weights="planted", **options)


def roles_of(study: Study, controls: tuple[Study, ...] = ()) -> Roles:
    """Without figures."""
    others = [(each.survey, ink_of(each, each.survey.kept, each.survey)) for each in controls]
    return find_roles(study.survey, ink_of(study, study.survey.kept, study.survey), others)


# --- planted attention ---


def uniform(inked: Tensor) -> Tensor:
    return torch.zeros(len(inked), PATCHES + 1, PATCHES + 1)


def towards(strength: float, inked: Tensor) -> Tensor:
    """Every token's scores rise where a patch holds ink."""
    scores = uniform(inked)
    scores[:, :, 1:] = strength * inked[:, None].float()
    return scores


def one_patch(patch: int, inked: Tensor) -> Tensor:
    scores = uniform(inked)
    scores[:, :, 1 + patch] = 6.0
    return scores


def class_token(inked: Tensor) -> Tensor:
    scores = uniform(inked)
    scores[:, :, 0] = 6.0
    return scores


def near(inked: Tensor) -> Tensor:
    """Patches look at themselves and beside; the class token everywhere."""
    centers = GEOMETRY.patch_centers()
    scores = uniform(inked)
    scores[:, 1:, 1:] = -torch.cdist(centers, centers) / 3  # pixels
    scores[:, 1:, 0] = -20.0
    return scores


def anywhere(inked: Tensor) -> Tensor:
    """One patch of each picture, whatever is on it."""
    scores = uniform(inked)
    chosen = torch.randint(0, PATCHES, (len(inked),), generator=torch.Generator().manual_seed(len(inked)))
    scores[torch.arange(len(inked)), :, 1 + chosen] = 6.0
    return scores


class Planted(nn.Module):
    """Attention with known scores, from the ink of each picture: a function [image, patch] -> [image, query, key] for
    each head of each layer."""

    def __init__(self, *layers: list[Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PlantedAttention(heads) for heads in layers)
        self.head = nn.Linear(PATCHES + 1, 10)

    def forward(self, images: Tensor) -> Tensor:
        description = digits()[0]
        pixels = ((images * description.std + description.mean) * 255).round().clamp(0, 255).to(torch.uint8)
        inked = inked_patches(pixels, GRID)
        for layer in self.layers:
            seen = layer(inked)
        return self.head(seen[:, 0, 0])


class PlantedAttention(nn.Module):
    def __init__(self, heads: list[Any]) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, inked: Tensor) -> Tensor:
        keys = torch.stack([head(inked) for head in self.heads], dim=1).transpose(-1, -2)
        # Queries of the identity: the scores are the keys' entries, whatever they are.
        tokens = torch.eye(PATCHES + 1).expand_as(keys)
        return F.scaled_dot_product_attention(tokens, keys, tokens, scale=1.0)


# Each head of two layers, in order, and the roles that it must get. The second layer has fewer heads, and only the
# class token leaves it: where its patches look says nothing.
HEADS: list[list[tuple[Any, list[str]]]] = [
    [
        (uniform, [NO_ROLE]),
        (partial(towards, 4.0), ["ink"]),
        (partial(towards, -4.0), ["background"]),
        (partial(one_patch, 5), ["fixed place"]),
        (near, ["neighbours"]),
        (partial(towards, 0.12), [NO_ROLE]),
    ],
    [
        (class_token, ["fixed place", "class token"]),
        (anywhere, ["varies with the picture"]),
        (near, [NO_ROLE]),
    ],
]
EXPECTED = [names for layer in HEADS for _, names in layer]


@cache
def planted() -> Study:
    model = Planted(*([head for head, _ in layer] for layer in HEADS))
    return study_of(model, controls=0, given_geometry=GEOMETRY)


@cache
def planted_roles() -> Roles:
    return roles_of(planted())


def test_planted_heads_get_their_names() -> None:
    assert planted_roles().names == EXPECTED


def test_what_is_measured_of_planted_heads_is_their_closed_form() -> None:
    found, study = planted_roles(), planted()
    inked = ink_of(study, study.survey.kept, study.survey)
    assert found.uniform == pytest.approx(inked.mean())
    count = inked.sum(axis=1, keepdims=True)
    share = np.where(inked, math.exp(4), 1) / (math.exp(4) * count + PATCHES - count)  # of the patches alone
    assert found.on_ink.value[0, 1] == pytest.approx((share * inked).sum(axis=1).mean(), abs=1e-5)
    by_place = (share.mean(axis=0) * inked.mean(axis=0)).sum()
    assert found.follows_ink.value[0, 1] == pytest.approx((share * inked).sum(axis=1).mean() - by_place, abs=1e-5)
    assert found.on_ink.value[0, 0] == pytest.approx(inked.mean(), abs=1e-6)
    assert found.class_token[1, 0] == pytest.approx(math.exp(6) / (math.exp(6) + PATCHES), abs=1e-5)
    np.testing.assert_allclose(found.selectivity.place.value[0, [0, 4]], 0, atol=1e-6)
    one = np.array([math.exp(6), *[1] * PATCHES]) / (math.exp(6) + PATCHES)
    assert found.selectivity.place.value[0, 3] == pytest.approx(math.log(17) + (one * np.log(one)).sum(), abs=1e-5)
    # The most that can vary: a patch of its own on every picture, but for what 300 draws leave uneven.
    assert 0.95 * found.selectivity.place.value[0, 3] < found.selectivity.content.value[1, 1]


def test_a_weak_follower_is_significant_and_has_no_role() -> None:
    found = planted_roles()
    weak = found.follows_ink[0, 5]
    assert found.p_value[0, 5] < 0.01 and 0 < weak.low and weak.high < LEAST_INK and found.names[5] == [NO_ROLE]


def test_heads_that_never_look_elsewhere_are_not_significant() -> None:
    """Uniform, one patch, the class token, neighbours: to the last bit the same on every picture."""
    found = planted_roles()
    assert found.p_value[[0, 0, 0, 1, 1], [0, 3, 4, 0, 2]].tolist() == [1.0] * 5


def test_heads_that_a_layer_does_not_have_are_in_no_family() -> None:
    found, study = planted_roles(), planted()
    absent = np.array([[False] * 6, [False] * 3 + [True] * 3])
    for values in (found.p_value, found.follows_ink.value, found.effect, found.selectivity.place.value):
        assert (np.isnan(values) == absent).all()
    assert [label for _, label in chapter.head_labels(study.survey)] == [*(f"1.{head}" for head in range(1, 7)),
                                                                        "2.1", "2.2", "2.3"]  # fmt: skip
    # Three heads of nine at the smallest p of 999 permutations: adjusted by 9 / 3.
    assert found.p_value[0, [1, 2, 5]] == pytest.approx(3 / 1000)
    # As a control, such a model does not raise the bounds by what is not there.
    few = study_of(Planted([uniform, uniform], [uniform]), controls=0, given_geometry=GEOMETRY)
    assert max(reached_by([(few.survey, ink_of(few, few.survey.kept, few.survey))]).values()) == pytest.approx(
        1 / 17, abs=1e-6
    )  # what a uniform row gives the class token


def test_the_order_of_heads_does_not_matter() -> None:
    model = Planted(*([head for head, _ in layer[::-1]] for layer in HEADS))
    found = roles_of(study_of(model, controls=0, given_geometry=GEOMETRY))
    assert found.names == [*EXPECTED[:6][::-1], *EXPECTED[6:][::-1]]


@pytest.mark.parametrize(
    ("head", "lost"),
    [
        (partial(towards, 4.0), {"ink", "varies with the picture"}),
        (partial(towards, -4.0), {"ink", "background"}),
        (class_token, {"class token", "fixed place"}),
        (near, {"neighbours"}),
        (anywhere, {"varies with the picture"}),
        (uniform, set()),
    ],
)
def test_controls_take_the_roles_that_they_reach(head: Any, lost: set[str]) -> None:
    """A role that random weights come near to is none: bounds are 1.5 times theirs."""
    control = study_of(Planted([head], [uniform]), controls=0, given_geometry=GEOMETRY)
    found = roles_of(planted(), (control,))
    for names, before in zip(found.names, EXPECTED, strict=True):
        gone = set(before) - set(names) - {NO_ROLE}
        assert gone <= lost and set(names) - {NO_ROLE} <= set(before)
    everything = {name for names in found.names for name in names}
    assert lost & {name for names in EXPECTED for name in names} - {"varies with the picture"} - everything or not lost
