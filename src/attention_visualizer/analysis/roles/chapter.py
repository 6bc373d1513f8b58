"""What each head does, measured: what it follows on the image, what it always looks at, and which heads are alike."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from attention_visualizer.analysis.needs import ChapterWriter, Need
from attention_visualizer.analysis.roles.measure import Roles, find_roles, head_labels, ink_of
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.analysis.study.survey import Survey
from attention_visualizer.figures import charts
from attention_visualizer.measures import intervals
from attention_visualizer.measures.head_roles import (
    ALIKE,
    BEYOND_CONTROLS,
    LEAST_INK,
    LEAST_ON_BORDER,
    MOSTLY,
    NO_ROLE,
    OFTEN_EMPTY,
    ROLES,
    clustered,
    divergences,
)
from attention_visualizer.measures.intervals import Interval
from attention_visualizer.report.chapter import Chapter, FigureFile, Finding, Table

Array = NDArray[Any]


def write(study: Study) -> Chapter:
    survey = study.survey
    study.progress("roles of heads")
    inked = ink_of(study, survey.kept, survey)
    numbers = study.control_rows
    controls = [(each, ink_of(study, numbers[each.kept], survey)) for each in study.control_surveys]
    roles = find_roles(survey, inked, controls)
    labels = head_labels(survey)
    there = np.array([layer_head for layer_head, _ in labels])
    rows = survey.readout_rows(survey.subsample)
    divergence, apart = divergences(rows[:, there[:, 0], there[:, 1]])
    order, cluster = clustered(divergence)
    redundancy = text_of_redundancy(divergence, apart, cluster, controls_apart(survey, study.control_surveys))
    by_head = study.output.save(role_figure(roles, there, [label for _, label in labels], survey), "attention_roles")
    alike = study.output.save(
        redundancy_figure(divergence, order, cluster, [label for _, label in labels], len(rows)),
        "attention_redundancy",
    )
    named = {name: sum(name in each for each in roles.names) for name in (*ROLES, NO_ROLE)}
    return Chapter(
        CHAPTER.title,
        text_of(roles, named, survey, len(controls)) + redundancy,
        [
            FigureFile(
                by_head,
                "Left: how much more a head gives to inked patches than its mean map would, with 95 % intervals over "
                f"{len(survey.kept):,} test images; grey: what heads with random weights reach; dashed: the bound for "
                "a role. Middle: of the attention on patches, what it looks at on every picture (place), and what "
                f"changes with the picture (content), means over {roles.selectivity.place.n:,} images. Right: the "
                "roles that the numbers carry.",
            ),
            FigureFile(
                alike,
                f"Jensen-Shannon divergence between heads, mean over {len(rows):,} test images, ordered by likeness; "
                "boxes hold groups of heads that are alike.",
            ),
        ],
        [ink_table(roles, there), place_table(roles, there)],
        role_numbers(roles, there, divergence, cluster),
        finding=finding_of(roles, named, there, by_head, survey),
        caution="A role describes where a head's weights go on this test set. It does not say what the head is for, "
        "and head numbers mean nothing in another run.",
    )


def controls_apart(survey: Survey, controls: list[Survey]) -> Interval | None:
    """Divergence between two heads with random weights, mean over pairs and models; None without controls."""
    if not controls:
        return None
    there = ~np.isnan(survey.maps[0]).all(axis=-1)
    of_images = [divergences(each.readout_rows()[:, there])[1] for each in controls]
    return intervals.bootstrap_mean(np.mean(of_images, axis=0))


def role_figure(roles: Roles, there: Array, labels: list[str], survey: Survey) -> Figure:
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
    patches = survey.shares.shape[-1]
    middle.set_xlabel(f"selectivity (nats, at most ln {patches} = {np.log(patches):.2f})")
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
    return charts.with_headline(drawn, f"What each head does, {len(survey.kept):,} test images")


def redundancy_figure(divergence: Array, order: Array, cluster: Array, labels: list[str], n: int) -> Figure:
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
    return charts.with_headline(drawn, f"How alike heads are, {n:,} test images")


def ink_table(roles: Roles, there: Array) -> Table:
    rows = [
        [
            f"{layer + 1}.{head + 1}",
            roles.on_ink[layer, head].text(),
            roles.follows_ink[layer, head].text(),
            roles.effect[layer, head].text(2),
            f"{roles.p_value[layer, head]:.3f}",
            ", ".join(names),
        ]
        for (layer, head), names in zip(there.tolist(), roles.names, strict=True)
    ]
    return Table(
        f"What each head follows, over {roles.on_ink.n:,} test images, with 95 % intervals: shares of the attention on "
        f"patches. A uniform head gives inked patches {roles.uniform.text()}.",
        ["head", "on inked patches", "beyond place", "d", "p (adjusted)", "role"],
        rows,
    )


TWO_DIGITS = ("place (nats)", "content (nats)", "border - interior (even shares)")


def place_table(roles: Roles, there: Array) -> Table:
    place, content = roles.selectivity.place, roles.selectivity.content
    columns = {
        "entropy (nats)": roles.entropy,
        "place (nats)": place,
        "content (nats)": content,
        "class token": roles.class_token,
        "distance / uniform": roles.distance,
        "border - interior (even shares)": roles.border,
    }
    shown = {name: each for name, each in columns.items() if each is not roles.border or roles.compares_border}
    caption = (
        f"Where each head looks, with 95 % intervals over {roles.entropy.n:,} test images (place and content: of the "
        f"attention on patches, {place.n:,} of the images)."
    )
    if roles.compares_border:
        caption += (
            f" Border: empty patches there less empty ones inside, {roles.border.n:,} images that have both; heads "
            f"with random weights reach {roles.reached['border']:.2f}."
        )
    rows = [
        [
            f"{layer + 1}.{head + 1}",
            *(each[layer, head].text(2 if name in TWO_DIGITS else 3) for name, each in shown.items()),
        ]
        for layer, head in there.tolist()
    ]
    return Table(caption, ["head", *shown], rows)


def role_numbers(roles: Roles, there: Array, divergence: Array, cluster: Array) -> dict[str, Any]:
    picked = tuple(there.T)
    return {
        "heads": [f"{layer + 1}.{head + 1}" for layer, head in there.tolist()],
        "roles": roles.names,
        "bounds": roles.bounds,
        "entropy": roles.entropy[picked].numbers(),
        "on_ink": roles.on_ink[picked].numbers(),
        "on_ink_of_a_uniform_head": roles.uniform.numbers(),
        "follows_ink": roles.follows_ink[picked].numbers(),
        "effect": roles.effect[picked].numbers(),
        "p_value_adjusted": roles.p_value[picked].tolist(),
        "place": roles.selectivity.place[picked].numbers(),
        "content": roles.selectivity.content[picked].numbers(),
        "class_token": roles.class_token[picked].numbers(),
        "distance": roles.distance[picked].numbers(),
        "border": roles.border[picked].numbers() if roles.compares_border else None,
        "interior_emptiness": roles.emptiness.numbers(),
        "divergence": divergence.tolist(),
        "cluster": cluster.tolist(),
    }


def finding_of(roles: Roles, named: dict[str, int], there: Array, figure: str, survey: Survey) -> Finding:
    count = len(there)
    carrying = count - named[NO_ROLE]
    told = ", ".join(f"{number} {name}" for name, number in named.items() if number and name != NO_ROLE)
    several = sum(len(names) > 1 for names in roles.names)
    if several:
        told += f"; {several} of them {'has' if several == 1 else 'have'} more than one"
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


def text_of(roles: Roles, named: dict[str, int], survey: Survey, num_controls: int) -> str:
    parts = [
        TEXT.format(
            n=len(survey.kept),
            uniform=roles.uniform.text(),
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
        border_text(roles),
        f"Heads without a role that the numbers carry: {named[NO_ROLE]} of {len(roles.names)}.",
    ]
    return "\n\n".join(parts)


def border_text(roles: Roles) -> str:
    if np.isnan(roles.emptiness.value):
        return NO_INTERIOR
    told = roles.emptiness.text(1, percent=True)
    if not roles.compares_border:
        return SELDOM_EMPTY.format(empty=told, n=roles.emptiness.n, often=OFTEN_EMPTY)
    return BORDER.format(empty=told, n=roles.emptiness.n, bound=roles.bounds["border"], least=LEAST_ON_BORDER)


def text_of_redundancy(divergence: Array, apart: Array, cluster: Array, control: Interval | None) -> str:
    """apart: divergence of each image, mean over pairs."""
    if len(divergence) < 2:
        return ""
    pairs = divergence[np.triu_indices(len(divergence), 1)]
    sizes = sorted((int(size) for size in np.bincount(cluster) if size > 1), reverse=True)
    groups = "groups" if len(sizes) > 1 else "group"
    return "\n\n" + REDUNDANCY.format(
        n=len(apart),
        mean=intervals.bootstrap_mean(apart).text(),
        alike=ALIKE,
        count=int((pairs < ALIKE).sum()),
        verb="diverges" if (pairs < ALIKE).sum() == 1 else "diverge",
        pairs=len(pairs),
        groups=f"{len(sizes)} {groups} of {', '.join(map(str, sizes))} heads" if sizes else "no group of heads",
        control="" if control is None else CONTROL_DIVERGENCE.format(mean=control.text(), n=control.n),
    )


NO_INK = "Roles are measured against ink, so they need a test set of digits on an empty background."
CHAPTER = ChapterWriter("What each head does", write, ("attention_roles", "attention_redundancy"), {Need.INK: NO_INK})

TEXT = """Over {n:,} test images. A head that spread its attention evenly would give inked patches {uniform} of it.
Most of what heads give to ink beyond that is **place**: the middle of the picture is mostly inked. So each head is
compared with itself, with what its own mean map would give to the ink of each picture. The difference is 0 for a head
that always looks at the same places; its p-value comes from giving pictures each other's ink (999 permutations, false
discovery control over all heads). How far a head is from uniform on the patches is split in two: what its mean map
shows (place) and what changes from picture to picture (content). What a head gives to the class token counts apart.

A role is named only where the value is beyond the least effect that was stated beforehand *and* beyond {beyond} times
what any head of {controls} models with random weights reaches. Following ink or background: {ink:.3f} of the attention
on patches (least effect {least}). Fixed place: {place:.2f} nats, varies with the picture: {content:.2f} nats, each with
{mostly:.0%} of the head's selectivity. Class token: {token:.2f} of the row. Neighbours: a mean distance below
{near:.2f} of uniform attention's; that of a last layer that only the class token leaves is not counted."""

BORDER = """Empty patches at the border are compared with empty ones of the interior, of whose patches {empty} hold no
ink (mean over {n:,} images). Border: {bound:.2f} of an even share more there (least effect {least})."""

SELDOM_EMPTY = """The border is not compared with the interior here: only {empty} of the interior's patches hold no ink
(mean over {n:,} images). With less than {often:.0%}, the comparison would rest on a few patches of unusual digits."""

NO_INTERIOR = """The border is not compared with the interior: all patches lie at the border."""

REDUNDANCY = """Between two heads the divergence is {mean} nats on average over {pairs} pairs and {n:,} images (0: the
same map on every picture, 0.69: no patch in common). {count} of the pairs {verb} by less than {alike} nats; joined by
likeness, heads form {groups} (boxes in the figure).{control}"""

CONTROL_DIVERGENCE = """ Between heads with random weights, all of them close to uniform, it is {mean} over {n:,} of
the images."""
