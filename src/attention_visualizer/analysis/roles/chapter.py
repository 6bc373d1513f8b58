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
    BEYOND_CONTROLS,
    MAX_DIVERGENCE,
    MIN_CORRELATION,
    MIN_ON_BRIGHTEST,
    MIN_PART,
    MIN_SELECTIVITY,
    NO_ROLE,
    ROLES,
)
from attention_visualizer.report.chapter import Chapter, FigureFile, Finding, Table, p_text

TWO_DIGITS = ("position (nats)", "content (nats)")


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
                "Left: correlation of a head's attention with the amount of ink, within positions, with 95% intervals "
                f"over {measured.num_images:,} test images; grey: the range of all heads of the controls; dashed: the "
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
        [ink_table(roles, heads), place_table(roles, heads), control_table(measured), *causal_tables(measured)],
        numbers_of(measured),
        finding=finding_of(measured, roles_file),
        caution="A role describes where a head's weights go, not what the head is for.",
    )


def ink_table(roles: Roles, heads: Heads) -> Table:
    rows = [
        [
            label,
            roles.on_ink[place].text(),
            roles.follows_ink[place].text(2),
            f"{roles.p_value[place]:.3f}",
            roles.brightest[place].text(1, percent=True),
            ", ".join(names),
        ]
        for place, label, names in zip(heads, heads.labels, roles.names, strict=True)
    ]
    return Table(
        f"Attention on ink by head, over {roles.on_ink.n:,} test images, with 95% intervals. A uniform head gives "
        f"inked patches {roles.uniform.text()} of its attention on patches. p: of the correlation, for all heads "
        "together.",
        ["head", "on inked patches", "correlation with ink", "p", "most on the brightest patch", "role"],
        rows,
    )


def place_table(roles: Roles, heads: Heads) -> Table:
    place, content = roles.selectivity.place, roles.selectivity.content
    columns = {
        "entropy (nats)": roles.entropy,
        "position (nats)": place,
        "content (nats)": content,
        "class token": roles.class_token,
        "distance short of uniform": roles.closeness,
    }
    caption = (
        f"What each head attends to, with 95% intervals over {roles.entropy.n:,} test images (position and content: "
        f"of the attention on patches, {place.n:,} of the images)."
    )
    rows = [
        [label, *(interval[head].text(2 if name in TWO_DIGITS else 3) for name, interval in columns.items())]
        for head, label in zip(heads, heads.labels, strict=True)
    ]
    return Table(caption, ["head", *columns], rows)


def control_table(measured: MeasuredHeads) -> Table:
    """What a role needs beside what heads of each kind of control reach."""
    roles = measured.roles
    kinds = list(roles.reached)
    rows = [
        [quantity, *(f"{roles.reached[kind][name]:.2f}" for kind in kinds), f"{bound:.2f}"]
        for (name, bound), quantity in zip(roles.bounds.items(), QUANTITIES, strict=True)
    ]
    return Table(
        f"The largest value of any head of the controls, and what a role requires. The first four: of heads with a "
        f"selectivity of at least {MIN_SELECTIVITY} nats.",
        ["quantity", *(f"{kind} ({measured.controls[kind]})" for kind in kinds), "required"],
        rows,
    )


def causal_tables(measured: MeasuredHeads) -> list[Table]:
    """What it does to the predictions when heads lose their roles; none where that was not tried."""
    check = measured.causal
    if check is None:
        return []
    outcomes, before = check.outcomes, check.outcomes.errors_before
    roles = dict(zip(measured.heads.labels, measured.roles.names, strict=True))
    rows = [
        [
            label,
            roles[label][0],
            intervention,
            f"{before:,} to {outcomes.errors[index]:,}",
            f"{outcomes.lost[index]:,} lost, {outcomes.gained[index]:,} gained",
            p_text(float(outcomes.p_value[index])),
            "yes" if label in check.matters else "no",
        ]
        for index, (label, intervention) in enumerate(zip(check.labels, check.interventions, strict=True))
    ]
    caption = (
        f"Do predictions depend on the role? Errors when a head attends without it, over {check.num_images:,} images. "
        "p: McNemar's, Holm-adjusted over these heads."
    )
    return [Table(caption, ["head", "role", "instead", "errors", "images", "p", "predictions depend on it"], rows)]


def numbers_of(measured: MeasuredHeads) -> dict[str, Any]:
    roles, index = measured.roles, measured.heads.index
    return {
        "heads": measured.heads.labels,
        "roles": roles.names,
        "controls": measured.controls,
        "reached_by_controls": roles.reached,
        "bounds": roles.bounds,
        "entropy": roles.entropy[index].numbers(),
        "on_ink": roles.on_ink[index].numbers(),
        "on_ink_of_a_uniform_head": roles.uniform.numbers(),
        "correlation_with_ink": roles.follows_ink[index].numbers(),
        "p_value_adjusted": roles.p_value[index],
        "brightest_patch": roles.brightest[index].numbers(),
        "place": roles.selectivity.place[index].numbers(),
        "content": roles.selectivity.content[index].numbers(),
        "class_token": roles.class_token[index].numbers(),
        "closeness": roles.closeness[index].numbers(),
        "causal_check": None
        if measured.causal is None
        else {
            "heads": measured.causal.labels,
            "interventions": measured.causal.interventions,
            "images": measured.causal.num_images,
            **measured.causal.outcomes.numbers(),
        },
        "divergence": measured.redundancy.divergence,
        "cluster": measured.redundancy.cluster,
    }


def role_counts(roles: Roles) -> dict[str, int]:
    """Return how many heads have each role, and none."""
    return {role: sum(role in names for names in roles.names) for role in (*ROLES, NO_ROLE)}


def finding_of(measured: MeasuredHeads, figure: str) -> Finding:
    heads, roles, n = measured.heads, measured.roles, measured.num_images
    if not measured.has_learnt:
        return Finding(f"The model's accuracy is not above chance, so no head has a role (n = {n:,}).", figure, rank=3)
    counts = role_counts(roles)
    with_role = len(heads) - counts[NO_ROLE]
    count = sum(measured.controls.values())
    beyond = f" beyond every head of {count} control models" if count else ", without a control to exceed"
    if not with_role:
        return Finding(f"No head of {len(heads)} has a role{beyond} (n = {n:,}).", figure, rank=3)
    listed = ", ".join(f"{count} {role}" for role, count in counts.items() if count and role != NO_ROLE)
    several = sum(len(names) > 1 for names in roles.names)
    if several:
        listed += f"; {several} of them {'has' if several == 1 else 'have'} more than one"
    check = measured.causal
    depends = "" if check is None else f" Predictions depend on {len(check.matters) or 'none'} of these roles."
    text = f"{with_role} of {len(heads)} heads have a role{beyond}: {listed} (n = {n:,}).{depends}"
    first = next(position for position, names in enumerate(roles.names) if names[0] != NO_ROLE)
    return Finding(text, figure, rank=3, view=heads.view(first))


def controls_text(measured: MeasuredHeads) -> str:
    return ", ".join(f"{count} models with {kind}" for kind, count in measured.controls.items()) or "no control"


def text_of(measured: MeasuredHeads) -> str:
    roles = measured.roles
    parts = [
        TEXT.format(
            n=measured.num_images,
            uniform=roles.uniform.text(),
            controls=controls_text(measured),
            beyond=BEYOND_CONTROLS,
            correlation=MIN_CORRELATION,
            brightest=MIN_ON_BRIGHTEST,
            part=MIN_PART,
            selective=MIN_SELECTIVITY,
        ),
        f"Heads without a distinct role: {role_counts(roles)[NO_ROLE]} of {len(roles.names)}.",
        redundancy_text(measured.redundancy),
    ]
    return "\n\n".join(part for part in parts if part)


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

QUANTITIES = (
    "correlation with ink, either sign",
    "share of images with most on the brightest patch",
    "position's part of the selectivity",
    "content's part of the selectivity",
    "distance short of uniform",
)

TEXT = """What does each head respond to, more than the heads of models that have not learnt the task? Over {n:,} test
images.

**Ink.** The middle of the image is mostly inked, so a head that always looks there gives ink much attention. (A
uniform head would give inked patches {uniform} of it.) A head's attention is therefore correlated with the amount of
ink *within* positions: 0 for a head that always attends to the same positions. Sharper heads do not get a larger
value. p comes from permuting the amounts of ink among images (999 permutations, the largest of all heads).

**Position and content.** How far a head is from uniform on the patches is its selectivity. It is split in two: what
its mean map shows (position), and what changes from image to image (content).

**A role** has to pass two bounds, in a model that has learnt something. The first was declared in advance: a
correlation of {correlation} with the amount of ink or the lack of it; the most attended patch being the brightest in
{brightest:.0%} of images; {part:.0%} of the selectivity in position, or in content; half of uniform attention's
distance. The second comes from the controls: {beyond:.0%} of the way from the largest value of any of their heads to
1. All roles but the last need a selectivity of at least {selective} nats. Controls: {controls}. Sharpened weights are
random ones with each head's logits scaled so that it is as sharp as the trained head: sharp heads prefer places and
images without learning, too.

**Does the answer depend on it?** Each role is taken away: a head with a role about positions gives to other patches
what it gave to each, one with a role about the image attends as on another image."""

REDUNDANCY = """Between two heads the divergence is {mean} nats on average over {pairs} pairs and {n:,} images (0: the
same map on every image, 0.69: no patch in common). {count} of the pairs {verb} by less than {alike} nats; clustered by
similarity, heads form {groups} (boxes in the figure).{control}"""

CONTROL_DIVERGENCE = """ Between heads with random weights, all of them close to uniform, it is {mean} over {n:,} of
the images."""
