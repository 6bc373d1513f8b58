"""The tables of what predictions need of attention: one row for each intervention."""

from __future__ import annotations

from attention_visualizer.analysis.importance.measure import Importance, JointAblation
from attention_visualizer.analysis.importance.outcomes import Outcomes
from attention_visualizer.report.chapter import Table, p_text

NO_INTERVENTION = "the model as it is"


def tables_of(measured: Importance) -> list[Table]:
    tables = [
        whole_model_table(measured),
        ablation_table(measured, measured.zero, "Zero ablation of each head and each layer"),
    ]
    if measured.mean is not None:
        words = "Mean ablation of each layer: its attention replaced by its average map"
        tables.append(ablation_table(measured, measured.mean, words))
    if measured.joint is not None:
        tables.append(joint_table(measured, measured.joint))
    return tables


def whole_model_table(measured: Importance) -> Table:
    outcomes = measured.whole_model
    before = f"{outcomes.errors_before:,}", "–", "–", measured.accuracy.times(100).text(2), "–"
    rows = [
        [
            name,
            *counts(outcomes, row),
            outcomes.accuracy[row].times(100).text(2),
            outcomes.accuracy_change[row].times(100).text(2),
        ]
        for row, name in enumerate(outcomes.names)
    ]
    return Table(
        f"Attention replaced in all layers at once, with 95% intervals over {measured.accuracy.n:,} images.",
        ["attention", *count_columns(measured), f"{quantity(measured)} (%)", "change (points)"],
        [[NO_INTERVENTION, *before], *rows],
    )


def ablation_table(measured: Importance, outcomes: Outcomes, words: str) -> Table:
    needed = measured.needed(outcomes)
    return Table(
        f"{words}, with 95% intervals over {measured.accuracy.n:,} images. {count_columns(measured)[0].capitalize()} "
        f"with all: {outcomes.errors_before:,}. p: exact McNemar test, Holm-adjusted over these {len(needed)}; points: "
        "percentage points (interval: Newcombe, 1998).",
        ["without", *count_columns(measured), f"{quantity(measured)} (points)", "p", "score (logits)", "verdict"],
        [
            [
                name,
                *counts(outcomes, row),
                outcomes.accuracy_change[row].times(100).text(2),
                p_text(float(outcomes.p_value[row])),
                outcomes.score_change[row].text(2),
                "needed" if needed[row] else "–",
            ]
            for row, name in enumerate(outcomes.names)
        ],
    )


def joint_table(measured: Importance, joint: JointAblation) -> Table:
    """The most needed heads above, the least needed below."""
    rows = [
        [f"the {count} {which} needed", *counts(outcomes, row), outcomes.accuracy[row].times(100).text(2)]
        for which, outcomes in (("most", joint.most), ("least", joint.least))
        for row, count in enumerate(joint.counts)
    ]
    before = joint.most
    return Table(
        "Heads ablated together (zero ablation), ranked by what each costs alone on one half of the images and judged "
        f"on the other {before.accuracy.n:,}, with 95% intervals. {count_columns(measured)[0].capitalize()} with all "
        f"heads: {before.errors_before:,}.",
        ["without", *count_columns(measured), f"{quantity(measured)} (%)"],
        rows,
    )


def counts(outcomes: Outcomes, row: int) -> list[str]:
    return [f"{each[row]:,}" for each in (outcomes.errors, outcomes.lost, outcomes.gained)]


def count_columns(measured: Importance) -> list[str]:
    if measured.class_source == "true":
        return ["errors", "right to wrong", "wrong to right"]
    return ["other predictions", "same to other", "other to same"]


def quantity(measured: Importance) -> str:
    return "accuracy" if measured.class_source == "true" else "same prediction"
