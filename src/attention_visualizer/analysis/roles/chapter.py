"""What each head does, measured: what it follows on the image, what it always attends to, and which heads are alike."""

from __future__ import annotations

from typing import Any

import numpy as np

from attention_visualizer.analysis.needs import ChapterWriter, Need
from attention_visualizer.analysis.roles.figure import draw_redundancy, draw_roles
from attention_visualizer.analysis.roles.measure import MeasuredHeads, Redundancy, Roles, measure
from attention_visualizer.analysis.study.heads import Heads
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.measures import intervals
from attention_visualizer.measures.head_roles import (
    CONTROL_FACTOR,
    MAX_DIVERGENCE,
    MIN_INK,
    MIN_ON_BORDER,
    MOSTLY,
    NO_ROLE,
    OFTEN_EMPTY,
    ROLES,
)
from attention_visualizer.report.chapter import Chapter, FigureFile, Finding, Table

TWO_DIGITS = ("position (nats)", "content (nats)", "border - interior (uniform shares)")


def write(study: Study) -> Chapter:
    measured = measure(study)
    heads, roles = measured.heads, measured.roles
    roles_file = study.output.save(draw_roles(measured), "attention_roles")
    redundancy_file = study.output.save(draw_redundancy(measured), "attention_redundancy")
    return Chapter(
        CHAPTER.title,
        text_of(measured),
        [
            FigureFile(
                roles_file,
                "Left: how much more a head gives to inked patches than its mean map would, with 95 % intervals over "
                f"{measured.num_images:,} test images; grey: the range of heads with random weights; dashed: the "
                "threshold for a role. Middle: selectivity on patches, split into the part that is the same for every "
                f"image (position) and the part that changes with it (content), means over "
                f"{roles.selectivity.place.n:,} images. Right: the roles that the measurements support.",
            ),
            FigureFile(
                redundancy_file,
                f"Jensen-Shannon divergence between heads, mean over {len(measured.redundancy.of_images):,} test "
                "images, ordered by similarity; boxes mark clusters of similar heads.",
            ),
        ],
        [ink_table(roles, heads), place_table(roles, heads)],
        numbers_of(measured),
        finding=finding_of(measured, roles_file),
        caution="A role describes where a head's weights go on this test set. It does not say what the head is for, "
        "and head indices mean nothing in another run.",
    )


def ink_table(roles: Roles, heads: Heads) -> Table:
    rows = [
        [
            label,
            roles.on_ink[place].text(),
            roles.follows_ink[place].text(),
            roles.effect[place].text(2),
            f"{roles.p_value[place]:.3f}",
            ", ".join(names),
        ]
        for place, label, names in zip(heads, heads.labels, roles.names, strict=True)
    ]
    return Table(
        f"Attention on ink by head, over {roles.on_ink.n:,} test images, with 95 % intervals: shares of the attention "
        f"on patches. A uniform head gives inked patches {roles.uniform.text()}.",
        ["head", "on inked patches", "beyond position", "d", "p (adjusted)", "role"],
        rows,
    )


def place_table(roles: Roles, heads: Heads) -> Table:
    place, content = roles.selectivity.place, roles.selectivity.content
    columns = {
        "entropy (nats)": roles.entropy,
        "position (nats)": place,
        "content (nats)": content,
        "class token": roles.class_token,
        "distance / uniform": roles.distance,
    }
    caption = (
        f"What each head attends to, with 95 % intervals over {roles.entropy.n:,} test images (position and content: "
        f"of the attention on patches, {place.n:,} of the images)."
    )
    if roles.compares_border:
        columns["border - interior (uniform shares)"] = roles.border
        caption += (
            f" Border: empty patches there minus empty interior ones, {roles.border.n:,} images that have both; heads "
            f"with random weights reach {roles.reached['border']:.2f}."
        )
    rows = [
        [label, *(interval[head].text(2 if name in TWO_DIGITS else 3) for name, interval in columns.items())]
        for head, label in zip(heads, heads.labels, strict=True)
    ]
    return Table(caption, ["head", *columns], rows)


def numbers_of(measured: MeasuredHeads) -> dict[str, Any]:
    roles, index = measured.roles, measured.heads.index
    return {
        "heads": measured.heads.labels,
        "roles": roles.names,
        "bounds": roles.bounds,
        "entropy": roles.entropy[index].numbers(),
        "on_ink": roles.on_ink[index].numbers(),
        "on_ink_of_a_uniform_head": roles.uniform.numbers(),
        "follows_ink": roles.follows_ink[index].numbers(),
        "effect": roles.effect[index].numbers(),
        "p_value_adjusted": roles.p_value[index],
        "place": roles.selectivity.place[index].numbers(),
        "content": roles.selectivity.content[index].numbers(),
        "class_token": roles.class_token[index].numbers(),
        "distance": roles.distance[index].numbers(),
        "border": roles.border[index].numbers() if roles.compares_border else None,
        "interior_emptiness": roles.emptiness.numbers(),
        "divergence": measured.redundancy.divergence,
        "cluster": measured.redundancy.cluster,
    }


def role_counts(roles: Roles) -> dict[str, int]:
    """Return how many heads have each role, and none."""
    return {role: sum(role in names for names in roles.names) for role in (*ROLES, NO_ROLE)}


def finding_of(measured: MeasuredHeads, figure: str) -> Finding:
    heads, roles, n = measured.heads, measured.roles, measured.num_images
    counts = role_counts(roles)
    with_role = len(heads) - counts[NO_ROLE]
    if not with_role:
        return Finding(f"No head of {len(heads)} has a role that the measurements support (n = {n:,}).", figure)
    listed = ", ".join(f"{count} {role}" for role, count in counts.items() if count and role != NO_ROLE)
    several = sum(len(names) > 1 for names in roles.names)
    if several:
        listed += f"; {several} of them {'has' if several == 1 else 'have'} more than one"
    follows = roles.follows_ink[heads.index]
    strongest = int(np.argmax(np.abs(follows.value)))
    return Finding(
        f"{with_role} of {len(heads)} heads have a measured role ({listed}). Head {heads.labels[strongest]} "
        f"responds most strongly to ink: {follows[strongest].text()} of its attention beyond its usual positions "
        f"(n = {n:,}).",
        figure,
    )


def text_of(measured: MeasuredHeads) -> str:
    roles = measured.roles
    parts = [
        TEXT.format(
            n=measured.num_images,
            uniform=roles.uniform.text(),
            controls=measured.num_controls,
            ink=roles.bounds["ink"],
            least=MIN_INK,
            place=roles.bounds["place"],
            content=roles.bounds["content"],
            beyond=CONTROL_FACTOR,
            mostly=MOSTLY,
            near=roles.bounds["distance"],
            token=roles.bounds["class token"],
        ),
        border_text(roles),
        f"Heads without a distinct role: {role_counts(roles)[NO_ROLE]} of {len(roles.names)}.",
        redundancy_text(measured.redundancy),
    ]
    return "\n\n".join(part for part in parts if part)


def border_text(roles: Roles) -> str:
    if np.isnan(roles.emptiness.value):
        return NO_INTERIOR
    emptiness = roles.emptiness.text(1, percent=True)
    if not roles.compares_border:
        return SELDOM_EMPTY.format(empty=emptiness, n=roles.emptiness.n, often=OFTEN_EMPTY)
    return BORDER.format(empty=emptiness, n=roles.emptiness.n, bound=roles.bounds["border"], least=MIN_ON_BORDER)


def redundancy_text(redundancy: Redundancy) -> str:
    """Return the paragraph on pairs and groups of heads that are alike; nothing for a single head."""
    if len(redundancy.divergence) < 2:
        return ""
    pairs = redundancy.divergence[np.triu_indices(len(redundancy.divergence), 1)]
    num_alike = int((pairs < MAX_DIVERGENCE).sum())
    sizes = sorted((int(size) for size in np.bincount(redundancy.cluster) if size > 1), reverse=True)
    groups = "groups" if len(sizes) > 1 else "group"
    control = redundancy.control
    return REDUNDANCY.format(
        n=len(redundancy.of_images),
        mean=intervals.bootstrap_mean(redundancy.of_images).text(),
        alike=MAX_DIVERGENCE,
        count=num_alike,
        verb="diverges" if num_alike == 1 else "diverge",
        pairs=len(pairs),
        groups=f"{len(sizes)} {groups} of {', '.join(map(str, sizes))} heads" if sizes else "no group of heads",
        control="" if control is None else CONTROL_DIVERGENCE.format(mean=control.text(), n=control.n),
    )


NO_INK = "Roles are measured against ink, so they need a test set of digits on an empty background."
CHAPTER = ChapterWriter("Head roles", write, ("attention_roles", "attention_redundancy"), {Need.INK: NO_INK})

TEXT = """Over {n:,} test images. A head with uniform attention would give inked patches {uniform} of it. Most of what
heads give to ink beyond that is due to **position**: the middle of the image is mostly inked. So each head is compared
with what its own mean map would give to the ink of each image. The difference is 0 for a head that always attends to
the same positions; its p-value comes from permuting the ink maps among images (999 permutations, FDR-adjusted over all
heads). How far a head is from uniform on the patches is split in two: what its mean map shows (position) and what
changes from image to image (content). Attention to the class token is counted separately.

A role requires a value beyond the minimum effect declared in advance *and* beyond {beyond} times the largest value of
any head of {controls} models with random weights. Ink or background: {ink:.3f} of the attention on patches (minimum
effect {least}). Fixed position: {place:.2f} nats, content-dependent: {content:.2f} nats, each with {mostly:.0%} of the
head's selectivity. Class token: {token:.2f} of the row. Neighbours: a mean distance below {near:.2f} of uniform
attention's, without a last layer of which only the class token is read."""

BORDER = """Empty patches at the border are compared with empty interior ones; {empty} of the interior patches hold no
ink (mean over {n:,} images). Border: {bound:.2f} of a uniform share more there (minimum effect {least})."""

SELDOM_EMPTY = """The border is not compared with the interior here: only {empty} of the interior patches hold no ink
(mean over {n:,} images). With less than {often:.0%}, the comparison would rest on a few patches of unusual digits."""

NO_INTERIOR = """The border is not compared with the interior: all patches lie at the border."""

REDUNDANCY = """Between two heads the divergence is {mean} nats on average over {pairs} pairs and {n:,} images (0: the
same map on every image, 0.69: no patch in common). {count} of the pairs {verb} by less than {alike} nats; clustered by
similarity, heads form {groups} (boxes in the figure).{control}"""

CONTROL_DIVERGENCE = """ Between heads with random weights, all of them close to uniform, it is {mean} over {n:,} of
the images."""
