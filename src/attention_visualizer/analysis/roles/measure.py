"""The numbers behind the roles of heads: each with its interval, beside what heads with random weights reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attention_visualizer.analysis.study.study import Study
from attention_visualizer.analysis.study.survey import Survey
from attention_visualizer.data import ink
from attention_visualizer.measures import intervals
from attention_visualizer.measures.head_roles import (
    BEYOND_CONTROLS,
    LEAST_INK,
    LEAST_ON_BORDER,
    LEAST_ON_CLASS_TOKEN,
    LEAST_SELECTIVE,
    NEAR,
    OFTEN_EMPTY,
    Selectivity,
    border_excess,
    entropy,
    ink_followed,
    name_roles,
)
from attention_visualizer.measures.intervals import Interval

Array = NDArray[Any]


@dataclass(frozen=True)
class Roles:
    """Of each head, arrays [layer, head].

    entropy: of the whole row, nats; on_ink: share of the attention on patches that inked ones get; follows_ink: how
    much more than the same head's mean map would give them; effect: that as Cohen's d over pictures; p_value:
    within-position permutation, adjusted; selectivity: of the attention on patches; border: how much more empty
    patches get at the border than inside, in even shares, NaN where the interior is seldom empty. emptiness: how
    often it is. reached: the most of any head with random weights; bounds: what a role needs; names: the roles that
    the numbers carry, or NO_ROLE.
    """

    entropy: Interval
    on_ink: Interval
    uniform: Interval  # what a uniform head gives to inked patches, one value
    follows_ink: Interval
    effect: Interval
    p_value: Array
    selectivity: Selectivity
    class_token: Interval
    distance: Interval  # relative to uniform attention; NaN where patch queries cannot affect the answer
    border: Interval
    emptiness: Interval
    reached: dict[str, float]
    bounds: dict[str, float]
    names: list[list[str]]

    @property
    def compares_border(self) -> bool:
        """Whether the interior is often empty; else the comparison would rest on a few patches of unusual pictures."""
        return self.border.n > 0


def find_roles(survey: Survey, inked: Array, controls: Sequence[tuple[Survey, Array]], seed: int = 0) -> Roles:
    """inked: bool [kept, patch] of the survey's pictures; controls: surveys of random weights with theirs."""
    shares = survey.shares
    num_layers, num_heads = shares.shape[1:3]
    followed = ink_followed(shares, inked)
    observed, null = intervals.permuted_products(shares.reshape(len(shares), -1, shares.shape[-1]), inked, seed=seed)
    p_value = intervals.false_discovery_control(intervals.permutation_p_value(observed, null))
    selective = survey.patch_selectivity
    class_token = survey.mean_of("class_token")[:, :-1]
    distance = relative_distance(survey)
    reached = reached_by(controls)
    bounds = role_bounds(reached)
    follows = intervals.bootstrap_mean(followed, seed)
    border, emptiness = border_interval(survey, inked, seed)
    p_values = p_value.reshape(num_layers, num_heads)
    names = [
        name_roles(
            follows[layer, head],
            float(p_values[layer, head]),
            selective.place[layer, head],
            selective.content[layer, head],
            class_token[layer, head],
            distance[layer, head],
            border[layer, head],
            bounds,
        )
        for layer in range(num_layers)
        for head in range(num_heads)
        if not np.isnan(survey.maps[0, layer, head]).all()
    ]
    return Roles(
        survey.mean_of("entropy")[:, :-1],
        intervals.bootstrap_mean((shares * inked[:, None, None]).sum(axis=-1), seed),
        intervals.bootstrap_mean(inked.mean(axis=1), seed),
        follows,
        intervals.standardised_mean_interval(followed, seed),
        p_values,
        selective,
        class_token,
        distance,
        border,
        emptiness,
        reached,
        bounds,
        names,
    )


def border_interval(survey: Survey, inked: Array, seed: int = 0) -> tuple[Interval, Interval]:
    """`border_excess` over the pictures that have empty patches at both, [layer, head], NaN where the interior is
    seldom empty; and how often it is."""
    emptiness = intervals.bootstrap_mean(ink.interior_emptiness(inked, survey.grid), seed)
    excess = border_excess(survey.shares, inked, ink.border_patches(survey.grid))
    there = ~np.isnan(excess).reshape(len(excess), -1).all(axis=1)
    if emptiness.value >= OFTEN_EMPTY and there.any():
        return intervals.bootstrap_mean(excess[there], seed), emptiness
    nothing = np.full(excess.shape[1:], np.nan)
    return Interval(nothing, nothing, nothing, 0), emptiness


def reached_by(controls: Sequence[tuple[Survey, Array]]) -> dict[str, float]:
    """The largest of any head with random weights; of "distance", how far below uniform attention's it lies."""
    reached = {"ink": 0.0, "place": 0.0, "content": 0.0, "class token": 0.0, "distance": 0.0, "border": 0.0}
    for survey, inked in controls:
        of_mean = entropy(survey.shares.mean(axis=0))
        values = {
            "ink": np.abs(ink_followed(survey.shares, inked).mean(axis=0)),
            "place": np.log(survey.shares.shape[-1]) - of_mean,
            "content": of_mean - entropy(survey.shares).mean(axis=0),
            "class token": survey.mean_of("class_token").value[:, :-1],
            "distance": 1 - relative_distance(survey).value,
            "border": border_interval(survey, inked)[0].value,
        }
        for name, each in values.items():
            # Without NaN, of which a layer with fewer heads has some.
            reached[name] = max(reached[name], float(np.fmax.reduce(each, axis=None, initial=0.0)))
    return reached


def role_bounds(reached: dict[str, float]) -> dict[str, float]:
    """What a value must reach: the least effect, or BEYOND_CONTROLS times what random weights do. "distance" must lie
    below its bound."""
    least = {
        "ink": LEAST_INK,
        "place": LEAST_SELECTIVE,
        "content": LEAST_SELECTIVE,
        "class token": LEAST_ON_CLASS_TOKEN,
        "distance": 1 - NEAR,
        "border": LEAST_ON_BORDER,
    }
    bounds = {name: max(least[name], BEYOND_CONTROLS * reached[name]) for name in least}
    return bounds | {"distance": 1 - bounds["distance"]}


def relative_distance(survey: Survey) -> Interval:
    """Mean attention distance over that of uniform attention, [layer, head]; NaN for a last layer that only the class
    token leaves."""
    centers = [geometry.patch_centers() for geometry in survey.geometries]
    uniform = np.array([max(float(torch.cdist(each, each).mean()), 1e-9) for each in centers])[:, None]
    if survey.reads_class_token:
        uniform[-1] = np.nan
    measured = survey.mean_of("distance")[:, :-1]
    return Interval(measured.value / uniform, measured.low / uniform, measured.high / uniform, measured.n)


def ink_of(study: Study, numbers: Array, survey: Survey) -> Array:
    """Which patches of pictures hold ink: bool [picture, patch]."""
    parts = [
        ink.inked_patches(study.target.images.read(numbers[start : start + 1000].tolist()), survey.grid)
        for start in range(0, len(numbers), 1000)
    ]
    return torch.cat(parts).numpy()


def head_labels(survey: Survey) -> list[tuple[tuple[int, int], str]]:
    """(layer, head) of each head that is there, from 0, and what it is called, from 1."""
    there = ~np.isnan(survey.maps[0]).all(axis=-1)
    return [((layer, head), f"{layer + 1}.{head + 1}") for layer, head in np.argwhere(there).tolist()]
