"""What each head does, measured beside heads with random weights, and which heads are alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attention_visualizer.analysis.study.heads import Heads
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.analysis.study.survey import Survey
from attention_visualizer.data import ink
from attention_visualizer.measures import intervals
from attention_visualizer.measures.head_roles import (
    CONTROL_FACTOR,
    MIN_INK,
    MIN_ON_BORDER,
    MIN_ON_CLASS_TOKEN,
    MIN_SELECTIVITY,
    NEAR,
    OFTEN_EMPTY,
    Selectivity,
    border_excess,
    clustered,
    divergences,
    entropy,
    ink_followed,
    name_roles,
)
from attention_visualizer.measures.intervals import Interval

Array = NDArray[Any]


@dataclass(frozen=True)
class MeasuredHeads:
    heads: Heads
    roles: Roles
    redundancy: Redundancy
    num_patches: int
    num_controls: int  # models with random weights

    @property
    def num_images(self) -> int:
        """Images whose maps the survey kept."""
        return self.roles.on_ink.n


@dataclass(frozen=True)
class Roles:
    """The measures of each head [layer, head], NaN for heads that a layer does not have, and the roles that follow."""

    entropy: Interval  # of the whole row, nats
    on_ink: Interval  # share of the attention on patches that inked ones get
    uniform: Interval  # the same of a uniform head: one value
    follows_ink: Interval  # how much more that is than the same head's mean map would give them
    effect: Interval  # that as Cohen's d over images
    p_value: Array  # within-position permutation, adjusted over all heads
    selectivity: Selectivity  # of the attention on patches
    class_token: Interval  # share of the row
    distance: Interval  # in multiples of uniform attention's; NaN where patch queries do not count
    border: Interval  # how much more empty patches get at the border than inside, in uniform shares
    emptiness: Interval  # share of the interior's patches without ink: one value
    reached: dict[str, float]  # by any head with random weights, see `reached_by`
    bounds: dict[str, float]  # what a role needs, see `role_bounds`
    names: list[list[str]]  # of each existing head: the roles that its measures carry, or NO_ROLE

    @property
    def compares_border(self) -> bool:
        """Return whether the interior is often empty; else the comparison would rest on a few patches of unusual
        images."""
        return self.border.n > 0


@dataclass(frozen=True)
class Redundancy:
    """The Jensen-Shannon divergence between existing heads, in nats."""

    divergence: Array  # mean over images: [head, head]
    of_images: Array  # mean over pairs of heads: [image], NaN for one head
    order: Array  # of heads, so that those that are alike stand together: [head]
    cluster: Array  # group of each head: [head]
    control: Interval | None  # between heads with random weights, mean over pairs and models; None without controls


def measure(study: Study) -> MeasuredHeads:
    survey, images, heads = study.survey, study.target.images, Heads.of(study.survey)
    study.progress("roles of heads")
    inked = ink.in_patches(ink.inked_patches, images, survey.kept, survey.grid)
    controls = [
        (control, ink.in_patches(ink.inked_patches, images, study.control_rows[control.kept], survey.grid))
        for control in study.control_surveys
    ]
    roles = find_roles(survey, inked, controls)
    redundancy = measure_redundancy(survey, study.control_surveys)
    return MeasuredHeads(heads, roles, redundancy, survey.maps.shape[-1], len(controls))


def measure_redundancy(survey: Survey, controls: Sequence[Survey]) -> Redundancy:
    """Compare every two heads of all layers, over the survey's subsample; controls over all images they kept."""
    heads = Heads.of(survey)
    divergence, of_images = divergences(survey.readout_rows(survey.subsample)[:, *heads.index])
    order, cluster = clustered(divergence)
    of_controls = [divergences(control.readout_rows()[:, *heads.index])[1] for control in controls]
    control = intervals.bootstrap_mean(np.mean(of_controls, axis=0)) if of_controls else None
    return Redundancy(divergence, of_images, order, cluster, control)


def find_roles(survey: Survey, inked: Array, controls: Sequence[tuple[Survey, Array]]) -> Roles:
    """Measure each head and name its roles.

    inked: bool [kept, patch] of the images whose maps the survey kept; controls: surveys of models with random weights,
    each with the same of its images.
    """
    shares = survey.shares
    followed = ink_followed(shares, inked)
    observed, null = intervals.permuted_products(shares.reshape(len(shares), -1, shares.shape[-1]), inked)
    p_value = intervals.false_discovery_control(intervals.permutation_p_value(observed, null))
    p_value = p_value.reshape(shares.shape[1:3])
    selective = survey.patch_selectivity
    class_token, distance = survey.mean_of("class_token")[:, :-1], survey.relative_distances[:, :-1]
    reached = reached_by(controls)
    bounds = role_bounds(reached)
    follows = intervals.bootstrap_mean(followed)
    border, emptiness = border_interval(survey, inked)
    names = [
        name_roles(
            follows[place],
            float(p_value[place]),
            selective.place[place],
            selective.content[place],
            class_token[place],
            distance[place],
            border[place],
            bounds,
        )
        for place in Heads.of(survey)
    ]
    return Roles(
        entropy=survey.mean_of("entropy")[:, :-1],
        on_ink=intervals.bootstrap_mean((shares * inked[:, None, None]).sum(axis=-1)),
        uniform=intervals.bootstrap_mean(inked.mean(axis=1)),
        follows_ink=follows,
        effect=intervals.standardised_mean_interval(followed),
        p_value=p_value,
        selectivity=selective,
        class_token=class_token,
        distance=distance,
        border=border,
        emptiness=emptiness,
        reached=reached,
        bounds=bounds,
        names=names,
    )


def border_interval(survey: Survey, inked: Array) -> tuple[Interval, Interval]:
    """Return `border_excess` over the images that have empty patches at the border and inside, [layer, head], NaN where
    the interior is seldom empty; and how often it is empty."""
    emptiness = intervals.bootstrap_mean(ink.interior_emptiness(inked, survey.grid))
    excess = border_excess(survey.shares, inked, ink.border_patches(survey.grid))
    has_both = ~np.isnan(excess).reshape(len(excess), -1).all(axis=1)
    if emptiness.value >= OFTEN_EMPTY and has_both.any():
        return intervals.bootstrap_mean(excess[has_both]), emptiness
    undefined = np.full(excess.shape[1:], np.nan)
    return Interval(undefined, undefined, undefined, 0), emptiness


def reached_by(controls: Sequence[tuple[Survey, Array]]) -> dict[str, float]:
    """Return the largest value of any head with random weights; for "distance", how far below uniform attention's."""
    reached = {"ink": 0.0, "place": 0.0, "content": 0.0, "class token": 0.0, "distance": 0.0, "border": 0.0}
    for survey, inked in controls:
        of_mean = entropy(survey.shares.mean(axis=0))
        values = {
            "ink": np.abs(ink_followed(survey.shares, inked).mean(axis=0)),
            "place": np.log(survey.shares.shape[-1]) - of_mean,
            "content": of_mean - entropy(survey.shares).mean(axis=0),
            "class token": survey.mean_of("class_token").value[:, :-1],
            "distance": 1 - survey.relative_distances.value[:, :-1],
            "border": border_interval(survey, inked)[0].value,
        }
        for name, of_heads in values.items():
            # Without NaN, of which a layer with fewer heads has some.
            reached[name] = max(reached[name], float(np.fmax.reduce(of_heads, axis=None, initial=0.0)))
    return reached


def role_bounds(reached: dict[str, float]) -> dict[str, float]:
    """Return what each value must reach: the least effect, or CONTROL_FACTOR times what random weights reach;
    "distance" must lie below its bound."""
    least = {
        "ink": MIN_INK,
        "place": MIN_SELECTIVITY,
        "content": MIN_SELECTIVITY,
        "class token": MIN_ON_CLASS_TOKEN,
        "distance": 1 - NEAR,
        "border": MIN_ON_BORDER,
    }
    bounds = {name: max(least[name], CONTROL_FACTOR * reached[name]) for name in least}
    return bounds | {"distance": 1 - bounds["distance"]}
