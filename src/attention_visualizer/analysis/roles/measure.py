"""What each head does, measured beside heads with random weights, and which heads are alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attention_visualizer.analysis.roles.causal import CausalCheck, check_roles
from attention_visualizer.analysis.study.heads import Heads
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.analysis.study.survey import Survey
from attention_visualizer.data import ink
from attention_visualizer.measures import intervals
from attention_visualizer.measures.head_roles import (
    MIN_SELECTIVITY,
    NO_ROLE,
    Selectivity,
    clustered,
    divergences,
    ink_correlation,
    name_roles,
    on_brightest,
    role_bounds,
)
from attention_visualizer.measures.intervals import Interval

Array = NDArray[Any]


@dataclass(frozen=True)
class MeasuredHeads:
    heads: Heads
    roles: Roles
    redundancy: Redundancy
    num_patches: int
    controls: dict[str, int]  # kind -> number of models
    has_learnt: bool  # whether the model's accuracy is above chance: else no head is said to have a role
    causal: CausalCheck | None = None  # of the heads with a role

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
    follows_ink: Interval  # correlation with the amount of ink within positions
    p_value: Array  # within-position permutation, for all heads together
    brightest: Interval  # share of images whose most attended patch is the brightest
    selectivity: Selectivity  # of the attention on patches
    class_token: Interval  # share of the row
    closeness: Interval  # short of uniform attention's distance, relative to it; NaN where patch queries do not count
    reached: dict[str, dict[str, float]]  # kind of control -> by any of its heads, see `reached_by`
    bounds: dict[str, float]  # what a role needs, see `role_bounds`
    names: list[list[str]]  # of each existing head: the roles that its measures carry, or NO_ROLE


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
    amount = ink.in_patches(ink.ink_amount, images, survey.kept, survey.grid)
    inked = ink.in_patches(ink.inked_patches, images, survey.kept, survey.grid)
    controls = {
        kind: [
            (control, ink.in_patches(ink.ink_amount, images, study.control_rows[control.kept], survey.grid))
            for control in surveys
        ]
        for kind, surveys in study.controls.items()
    }
    roles = find_roles(survey, amount, inked, controls, study.has_learnt)
    return MeasuredHeads(
        heads,
        roles,
        measure_redundancy(survey, study.control_surveys),
        survey.maps.shape[-1],
        {kind: len(surveys) for kind, surveys in controls.items()},
        study.has_learnt,
        check_roles(study, roles.names),
    )


def measure_redundancy(survey: Survey, controls: Sequence[Survey]) -> Redundancy:
    """Compare every two heads of all layers, over the survey's subsample; controls over all images they kept."""
    heads = Heads.of(survey)
    divergence, of_images = divergences(survey.readout_rows(survey.subsample)[:, *heads.index])
    order, cluster = clustered(divergence)
    of_controls = [divergences(control.readout_rows()[:, *heads.index])[1] for control in controls]
    control = intervals.bootstrap_mean(np.mean(of_controls, axis=0)) if of_controls else None
    return Redundancy(divergence, of_images, order, cluster, control)


def find_roles(
    survey: Survey,
    amount: Array,
    inked: Array,
    controls: Mapping[str, Sequence[tuple[Survey, Array]]],
    has_learnt: bool = True,
) -> Roles:
    """Measure each head and name its roles.

    amount, inked: of ink, [kept, patch], of the images whose maps the survey kept; controls: surveys by their kind,
    each with the amounts of its images; has_learnt: else no head has a role.
    """
    shares = survey.shares
    observed, null = intervals.permuted_products(shares.reshape(len(shares), -1, shares.shape[-1]), amount)
    p_value = intervals.largest_of_all_p_value(observed, null).reshape(shares.shape[1:3])
    follows, brightest = ink_intervals(survey, amount)
    split = survey.patch_selectivity
    distance = survey.relative_distances[:, :-1]
    closeness = Interval(1 - distance.value, 1 - distance.high, 1 - distance.low, distance.n)
    reached = {kind: reached_by(surveys) for kind, surveys in controls.items()}
    largest = {name: max((each[name] for each in reached.values()), default=0.0) for name in MEASURED}
    bounds = role_bounds(largest)
    names = [
        name_roles(
            follows[place],
            float(p_value[place]),
            brightest[place],
            split.place[place],
            split.content[place],
            closeness[place],
            bounds,
        )
        if has_learnt
        else [NO_ROLE]
        for place in Heads.of(survey)
    ]
    return Roles(
        entropy=survey.mean_of("entropy")[:, :-1],
        on_ink=intervals.bootstrap_mean((shares * inked[:, None, None]).sum(axis=-1)),
        uniform=intervals.bootstrap_mean(inked.mean(axis=1)),
        follows_ink=follows,
        p_value=p_value,
        brightest=brightest,
        selectivity=split,
        class_token=survey.mean_of("class_token")[:, :-1],
        closeness=closeness,
        reached=reached,
        bounds=bounds,
        names=names,
    )


MEASURED = ("ink", "brightest patch", "fixed position", "content-dependent", "neighbours")


def ink_intervals(survey: Survey, amount: Array) -> tuple[Interval, Interval]:
    """Return the correlation of each head with ink, and how often its most attended patch is the brightest: [layer,
    head] each."""
    shares = survey.shares
    flat = shares.reshape(len(shares), -1, shares.shape[-1])
    value, moves = ink_correlation(flat, amount)
    # Influences sum to the value's own deviation: the mean of n times them is 0.
    around = intervals.bootstrap_mean(moves * len(shares))
    hits = intervals.bootstrap_mean(on_brightest(flat, amount))

    def by_layer(value: Array, low: Array, high: Array) -> Interval:
        shape = shares.shape[1:3]
        return Interval(value.reshape(shape), low.reshape(shape), high.reshape(shape), len(shares))

    return by_layer(value, value + around.low, value + around.high), by_layer(hits.value, hits.low, hits.high)


def reached_by(controls: Sequence[tuple[Survey, Array]]) -> dict[str, float]:
    """Return the largest value of any head of these controls, each with the amounts of ink of its images; of what is
    asked of selective heads only, that of any selective one."""
    reached = dict.fromkeys(MEASURED, 0.0)
    for survey, amount in controls:
        shares = survey.shares.reshape(len(survey.shares), -1, survey.shares.shape[-1])
        split = survey.patch_selectivity
        place, content = split.place.value.ravel(), split.content.value.ravel()
        total = place + content
        selective = np.where(total >= MIN_SELECTIVITY, 1.0, np.nan)
        values = {
            "ink": selective * np.abs(ink_correlation(shares, amount)[0]),
            "brightest patch": selective * on_brightest(shares, amount).mean(axis=0),
            "fixed position": selective * place / total,
            "content-dependent": selective * content / total,
            "neighbours": 1 - survey.relative_distances.value[:, :-1],
        }
        for name, of_heads in values.items():
            # Without NaN, of which a layer with fewer heads has some.
            reached[name] = max(reached[name], float(np.fmax.reduce(of_heads, axis=None, initial=0.0)))
    return reached
