"""What each head does, measured: what it follows on the image, what it always looks at, and which heads are alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from attention_visualizer import charts, inference, ink
from attention_visualizer.analysis.study import CONTROL_PICTURES, Study
from attention_visualizer.analysis.survey import Survey
from attention_visualizer.chapter import Chapter, FigureFile, Finding, Table
from attention_visualizer.head_roles import (
    ALIKE,
    BEYOND_CONTROLS,
    LEAST_INK,
    LEAST_ON_CLASS_TOKEN,
    LEAST_SELECTIVE,
    MOST_PICTURES,
    MOSTLY,
    NEAR,
    NO_ROLE,
    ROLES,
    Selectivity,
    clustered,
    divergences,
    entropy,
    ink_followed,
    name_roles,
)
from attention_visualizer.inference import Interval
from attention_visualizer.pictures import LabelledImages

Array = NDArray[Any]


@dataclass(frozen=True)
class Roles:
    """Of each head, arrays [layer, head].

    on_ink: share of the attention on patches that inked ones get; follows_ink: how much more than the same head's
    mean map would give them; effect: that as Cohen's d over pictures; p_value: within-position permutation, adjusted.
    reached: the most of any head with random weights; bounds: what a role needs; names: the roles that the numbers
    carry, or NO_ROLE.
    """

    on_ink: Interval
    uniform: float  # what a uniform head gives to inked patches
    follows_ink: Interval
    effect: Array
    p_value: Array
    selectivity: Selectivity
    class_token: Array
    distance: Array  # relative to uniform attention; NaN where patch queries cannot affect the answer
    reached: dict[str, float]
    bounds: dict[str, float]
    names: list[list[str]]


def find_roles(survey: Survey, inked: Array, controls: Sequence[tuple[Survey, Array]], seed: int = 0) -> Roles:
    """inked: bool [kept, patch] of the survey's pictures; controls: surveys of random weights with theirs."""
    shares = survey.shares
    num_layers, num_heads = shares.shape[1:3]
    followed = ink_followed(shares, inked)
    observed, null = inference.permuted_products(shares.reshape(len(shares), -1, shares.shape[-1]), inked, seed=seed)
    p_value = inference.false_discovery_control(inference.permutation_p_value(observed, null))
    selective = survey.selectivity
    class_token = survey.mean_of("class_token")[:, :-1]
    distance = relative_distance(survey)
    reached = reached_by(controls)
    bounds = role_bounds(reached)
    follows = inference.bootstrap_mean(followed, seed)
    p_values = p_value.reshape(num_layers, num_heads)
    names = [
        name_roles(
            follows[layer, head],
            float(p_values[layer, head]),
            selective.place[layer, head],
            selective.content[layer, head],
            class_token[layer, head],
            distance[layer, head],
            bounds,
        )
        for layer in range(num_layers)
        for head in range(num_heads)
        if not np.isnan(survey.maps[0, layer, head]).all()
    ]
    return Roles(
        inference.bootstrap_mean((shares * inked[:, None, None]).sum(axis=-1), seed),
        float(inked.mean()),
        follows,
        inference.standardised_mean(followed),
        p_values,
        selective,
        class_token.value,
        distance.value,
        reached,
        bounds,
        names,
    )


def reached_by(controls: Sequence[tuple[Survey, Array]]) -> dict[str, float]:
    """The largest of any head with random weights; of "distance", how far below uniform attention's it lies."""
    reached = {"ink": 0.0, "place": 0.0, "content": 0.0, "class token": 0.0, "distance": 0.0}
    for survey, inked in controls:
        rows = survey.rows()
        of_mean = entropy(rows.mean(axis=0))
        values = {
            "ink": np.abs(ink_followed(survey.shares, inked).mean(axis=0)),
            "place": np.log(survey.num_keys)[:, None] - of_mean,
            "content": of_mean - entropy(rows).mean(axis=0),
            "class token": survey.mean_of("class_token").value[:, :-1],
            "distance": 1 - relative_distance(survey).value,
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


def evenly(n: int, most: int) -> Array:
    """Numbers of at most `most` of n, evenly spaced."""
    return np.arange(n) if n <= most else np.linspace(0, n - 1, most).astype(np.int64)


def write(study: Study) -> Chapter:
    if not isinstance(study.pictures, LabelledImages):
        return Chapter("What each head does", NO_INK)
    survey = study.survey
    study.progress("roles of heads")
    inked = ink_of(study, survey.kept, survey)
    numbers = study.subset(CONTROL_PICTURES)
    controls = [(each, ink_of(study, numbers[each.kept], survey)) for each in study.control_surveys]
    roles = find_roles(survey, inked, controls)
    labels = head_labels(survey)
    there = np.array([layer_head for layer_head, _ in labels])
    rows = survey.rows(evenly(len(survey.kept), MOST_PICTURES))
    divergence = divergences(rows[:, there[:, 0], there[:, 1]])
    order, cluster = clustered(divergence)
    control_divergence = float(np.mean([mean_divergence(each.rows()) for each, _ in controls])) if controls else None
    note = study.face_note
    by_head = study.save(role_figure(roles, there, [label for _, label in labels], survey, note), "attention_roles")
    alike = study.save(
        redundancy_figure(divergence, order, cluster, [label for _, label in labels], len(rows), note),
        "attention_redundancy",
    )
    named = {name: sum(name in each for each in roles.names) for name in (*ROLES, NO_ROLE)}
    return Chapter(
        "What each head does",
        text_of(roles, named, survey, cluster, divergence, control_divergence, len(controls)),
        [
            FigureFile(
                by_head,
                "Left: how much more a head gives to inked patches than its mean map would, with 95 % intervals over "
                f"{len(survey.kept):,} test images; grey: what heads with random weights reach; dashed: the bound for "
                "a role. Middle: what it looks at on every picture (place), and what changes with the picture "
                "(content). Right: the roles that the numbers carry.",
            ),
            FigureFile(
                alike,
                f"Jensen-Shannon divergence between heads, mean over {len(rows):,} test images, ordered by likeness; "
                "boxes hold heads that are alike.",
            ),
        ],
        [role_table(roles, there)],
        role_numbers(roles, there, divergence, cluster),
        finding=finding_of(roles, named, there, by_head, survey),
        caution="A role describes where a head's weights go on this test set. It does not say what the head is for, "
        "and head numbers mean nothing in another run.",
    )


def ink_of(study: Study, numbers: Array, survey: Survey) -> Array:
    """Which patches of pictures hold ink: bool [picture, patch]."""
    parts = [
        ink.inked_patches(study.pictures.read(numbers[start : start + 1000].tolist()), survey.grid)
        for start in range(0, len(numbers), 1000)
    ]
    return torch.cat(parts).numpy()


def head_labels(survey: Survey) -> list[tuple[tuple[int, int], str]]:
    """(layer, head) of each head that is there, from 0, and what it is called, from 1."""
    there = ~np.isnan(survey.maps[0]).all(axis=-1)
    return [((layer, head), f"{layer + 1}.{head + 1}") for layer, head in np.argwhere(there).tolist()]


def mean_divergence(rows: Array) -> float:
    """Between any two heads: [image, layer, head, key]."""
    found = divergences(rows.reshape(len(rows), -1, rows.shape[-1]))
    apart = found[~np.eye(len(found), dtype=bool)]
    return float(np.nanmean(apart)) if len(apart) else float("nan")


def role_figure(roles: Roles, there: Array, labels: list[str], survey: Survey, face_note: str) -> Figure:
    """A row a head: what it follows, how selective it is, and the roles that the numbers carry."""
    count = len(labels)
    drawn = Figure(figsize=(12.5, 0.27 * count + 1.9), layout="constrained")
    left, middle, right = drawn.subplots(1, 3, sharey=True, width_ratios=(5, 3, 2))
    at = np.arange(count)[::-1]
    picked = tuple(there.T)
    follows = roles.follows_ink[picked]
    reached = roles.reached["ink"]
    left.axvspan(-reached, reached, color=charts.BAND, zorder=0, label="heads with random weights")
    for bound in (-roles.bounds["ink"], roles.bounds["ink"]):
        left.axvline(bound, color=charts.REFERENCE, linestyle="--", linewidth=1, label="bound for a role" * (bound > 0))
    charts.forest(at, follows.value, follows.low, follows.high, left)
    left.set_xlabel("more attention on inked patches than by place alone (share)")
    left.set_yticks(at, labels)
    left.set_ylabel("layer.head")
    place, content = roles.selectivity.place[picked].value, roles.selectivity.content[picked].value
    middle.barh(at, place, color=charts.PLACE, height=0.7, label="place")
    middle.barh(at, content, left=place, color=charts.CONTENT, height=0.7, label="content")
    middle.set_xlabel(f"selectivity (nats, at most ln {survey.num_keys.max()} = {np.log(survey.num_keys.max()):.2f})")
    for axis in (left, middle):
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=9)
        charts.clean(axis, "x")
    right.set_axis_off()
    right.set_xlim(0, 1)
    right.text(0, count - 0.2, "role", fontsize=9, fontweight="bold", va="bottom")
    for position, names in zip(at, roles.names, strict=True):
        faint = names == [NO_ROLE]
        told = NO_ROLE if faint else ", ".join(names)
        right.text(0, position, told, va="center", fontsize=9, color="#999999" if faint else "black")
    layers = there[:, 0]
    for axis in (left, middle):
        axis.set_ylim(-0.7, count - 0.3)
        for row in np.flatnonzero(np.diff(layers)):
            axis.axhline(at[row] - 0.5, color="#cccccc", linewidth=0.7)
    return charts.finish(drawn, f"What each head does, {len(survey.kept):,} test images", face_note)


def redundancy_figure(
    divergence: Array, order: Array, cluster: Array, labels: list[str], n: int, face_note: str
) -> Figure:
    """Heads in the order of their tree; boxes around those that are alike."""
    side = max(6.0, 0.3 * len(labels) + 2)
    drawn = Figure(figsize=(side + 1.2, side), layout="constrained")
    axis = drawn.subplots()
    charts.square_matrix(
        divergence[np.ix_(order, order)],
        [labels[head] for head in order],
        "Jensen-Shannon divergence (nats)",
        axis,
        0.0,
        float(np.log(2)),
    )
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and cluster[order[end]] == cluster[order[start]]:
            end += 1
        if end - start > 1:
            charts.box(axis, start, end)
        start = end
    axis.set_xlabel("layer.head, ordered by likeness")
    return charts.finish(drawn, f"How alike heads are, {n:,} test images", face_note)


def role_table(roles: Roles, there: Array) -> Table:
    columns = [
        "head",
        "on inked patches",
        "beyond place (95 %)",
        "d",
        "p (adjusted)",
        "place (nats)",
        "content (nats)",
        "class token",
        "distance / uniform",
        "role",
    ]
    rows = []
    for (layer, head), names in zip(there.tolist(), roles.names, strict=True):
        distance = roles.distance[layer, head]
        own = roles.class_token[layer, head]
        rows.append(
            [
                f"{layer + 1}.{head + 1}",
                f"{roles.on_ink.value[layer, head]:.3f}",
                roles.follows_ink[layer, head].text(),
                f"{roles.effect[layer, head]:.2f}",
                f"{roles.p_value[layer, head]:.3f}",
                roles.selectivity.place[layer, head].text(2),
                roles.selectivity.content[layer, head].text(2),
                "–" if np.isnan(own) else f"{own:.3f}",
                "–" if np.isnan(distance) else f"{distance:.2f}",
                ", ".join(names),
            ]
        )
    return Table(
        f"Each head over {roles.on_ink.n:,} test images (place and content: {roles.selectivity.place.n:,}); a uniform "
        f"head gives inked patches {roles.uniform:.3f}.",
        columns,
        rows,
    )


def role_numbers(roles: Roles, there: Array, divergence: Array, cluster: Array) -> dict[str, Any]:
    picked = tuple(there.T)
    return {
        "heads": [f"{layer + 1}.{head + 1}" for layer, head in there.tolist()],
        "roles": roles.names,
        "bounds": roles.bounds,
        "on_ink": roles.on_ink[picked].numbers(),
        "on_ink_of_a_uniform_head": roles.uniform,
        "follows_ink": roles.follows_ink[picked].numbers(),
        "effect": roles.effect[picked].tolist(),
        "p_value_adjusted": roles.p_value[picked].tolist(),
        "place": roles.selectivity.place[picked].numbers(),
        "content": roles.selectivity.content[picked].numbers(),
        "divergence": divergence.tolist(),
        "cluster": cluster.tolist(),
    }


def finding_of(roles: Roles, named: dict[str, int], there: Array, figure: str, survey: Survey) -> Finding:
    count = len(there)
    carrying = count - named[NO_ROLE]
    told = ", ".join(f"{number} {name}" for name, number in named.items() if number and name != NO_ROLE)
    if not carrying:
        return Finding(f"No head of {count} has a role that the numbers carry (n = {len(survey.kept):,}).", figure)
    strongest = int(np.argmax(np.abs(roles.follows_ink.value[tuple(there.T)])))
    layer, head = there[strongest]
    return Finding(
        f"{carrying} of {count} heads have a measured role ({told}). Head {layer + 1}.{head + 1} moves most with the "
        f"ink: {roles.follows_ink[layer, head].text()} of its attention beyond what its usual places explain "
        f"(n = {len(survey.kept):,}).",
        figure,
    )


def text_of(
    roles: Roles,
    named: dict[str, int],
    survey: Survey,
    cluster: Array,
    divergence: Array,
    control_divergence: float | None,
    num_controls: int,
) -> str:
    apart = divergence[~np.eye(len(divergence), dtype=bool)]
    groups = [int((cluster == each).sum()) for each in np.unique(cluster)]
    shared = sum(size for size in groups if size > 1)
    parts = [
        TEXT.format(
            n=len(survey.kept),
            uniform=roles.uniform,
            controls=num_controls,
            ink=roles.bounds["ink"],
            least=LEAST_INK,
            place=roles.bounds["place"],
            content=roles.bounds["content"],
            beyond=BEYOND_CONTROLS,
            mostly=MOSTLY,
            near=roles.bounds["distance"],
            token=roles.bounds["class token"],
        ),
        f"Heads without a role that the numbers carry: {named[NO_ROLE]} of {len(cluster)}.",
    ]
    if len(apart):
        parts.append(
            REDUNDANCY.format(
                mean=apart.mean(),
                alike=ALIKE,
                shared="no two heads are alike" if not shared else f"{shared} heads have at least one that is alike",
                control="" if control_divergence is None else CONTROL_DIVERGENCE.format(mean=control_divergence),
            )
        )
    return "\n\n".join(parts)


NO_INK = "Roles are measured against ink, so they need a test set of digits on an empty background."

TEXT = """Over {n:,} test images. A head that spread its attention evenly would give inked patches {uniform:.3f} of it.
Most of what heads give to ink beyond that is **place**: the middle of the picture is mostly inked. So each head is
compared with itself, with what its own mean map would give to the ink of each picture. The difference is 0 for a head
that always looks at the same places; its p-value comes from giving pictures each other's ink (999 permutations, false
discovery control over all heads). How far a head is from uniform is split in two: what its mean map shows (place) and
what changes from picture to picture (content).

A role is named only where the value is beyond the least effect that was stated beforehand *and* beyond {beyond} times
what any head of {controls} models with random weights reaches. Following ink or background: {ink:.3f} of the attention
on patches (least effect {least}). Fixed place: {place:.2f} nats, varies with the picture: {content:.2f} nats, each with
{mostly:.0%} of the head's selectivity. Class token: {token:.2f} of the row. Neighbours: a mean distance below
{near:.2f} of uniform attention's; that of a last layer that only the class token leaves is not counted."""

REDUNDANCY = """Between two heads the divergence is {mean:.2f} nats on average (0: the same map on every picture, 0.69:
no patch in common); {shared} (below {alike} nats).{control}"""

CONTROL_DIVERGENCE = """ Heads with random weights, all of them close to uniform: {mean:.3f}."""
