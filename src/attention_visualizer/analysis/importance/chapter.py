"""What the prediction needs: each head and each layer ablated, and how the predictions then change."""

from __future__ import annotations

from typing import Any

import numpy as np

from attention_visualizer.analysis.importance.figure import draw
from attention_visualizer.analysis.importance.measure import ABLATIONS, MIN_PART, Importance, measure, num_passes
from attention_visualizer.analysis.needs import ChapterWriter, Need
from attention_visualizer.analysis.study.budget import MIN_IMAGES
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.report.chapter import Chapter, FigureFile, Finding, Table


def write(study: Study) -> Chapter:
    title = CHAPTER.title
    if len(study.target.images) < MIN_IMAGES:
        return Chapter(title, f"Omitted: head importance needs at least {MIN_IMAGES} images.")
    rows = study.affordable_rows(num_passes(study))
    if rows is None:
        return Chapter(title, TOO_MUCH.format(passes=num_passes(study)))
    measured = measure(study, rows)
    figure = study.output.save(draw(measured), "attention_importance")
    return Chapter(
        title,
        text_of(measured),
        [
            FigureFile(
                figure,
                f"Change of the {measured.class_source} class's score with each head ablated (last column: the "
                f"whole layer), in percent of the score, over {measured.images}. Below: the loss against the head's "
                "entropy and confidence, one point per head with its 95 % interval.",
            )
        ],
        [importance_table(measured)],
        numbers_of(measured),
        finding=Finding(headline(measured), figure),
        caution="A head whose loss is small may still have a function that others share (one head is ablated at a "
        "time, with all others intact).",
    )


def headline(measured: Importance) -> str:
    """The finding, in two sentences."""
    count, needed, n = len(measured.heads), measured.num_mattering("zero"), measured.score.n
    if not measured.is_learnt and measured.class_source == "predicted":
        return (
            "Without true classes, head importance cannot be determined; the figure shows how the model's predictions "
            f"change without each of {count} heads (n = {n:,})."
        )
    if not measured.is_learnt:
        return f"The model's accuracy is not above chance, so no head can matter (n = {n:,})."
    loss = measured.loss("zero")
    most_needed = int(loss.value.argmax())
    accuracy_loss = measured.accuracy_changes["zero"][measured.heads.index][most_needed].times(-100)
    accuracy = "accuracy" if measured.class_source == "true" else "agreement with its own predictions"
    return (
        f"{needed or 'None'} of {count} heads {'is' if needed < 2 else 'are'} needed alone: zero ablation costs more "
        f"than {MIN_PART:.0%} of the class's score. The most important, head "
        f"{measured.heads.labels[most_needed]}, costs {loss[most_needed].text(2)} of {measured.score.text(2)} logits "
        f"and {accuracy_loss.text(2)} percentage points of {accuracy} (n = {n:,})."
    )


def text_of(measured: Importance) -> str:
    constant = measured.constant_heads
    return TEXT.format(
        who=measured.images,
        classes=measured.class_source,
        score=measured.score.text(2),
        accuracy=measured.accuracy.text(2, percent=True),
        least=measured.least_loss,
        part=MIN_PART,
        zero=measured.num_mattering("zero"),
        mean=measured.num_mattering("mean"),
        count=len(measured.heads),
        correlations=correlations_text(measured),
        chance=chance_text(measured),
        fixed=FIXED.format(names=", ".join(constant), count=len(constant)) if constant else "",
    )


def correlations_text(measured: Importance) -> str:
    """Return all known correlations; empty where there are none."""
    correlations = [
        f"{label.split(' (')[0]} "
        + ", ".join(
            f"{value.text(2)} for {ABLATIONS[ablation].short_name} (p = {correlation.p_value[ablation]:.3f})"
            for ablation, value in correlation.value.items()
        )
        for label, correlation in measured.correlations.items()
        if not all(np.isnan(value.value) for value in correlation.value.values())
    ]
    return CORRELATIONS.format(count=len(measured.heads), pairs="; ".join(correlations)) if correlations else ""


def chance_text(measured: Importance) -> str:
    """Return why no head can be said to matter, where that is so."""
    if measured.is_learnt:
        return ""
    return UNKNOWN if measured.class_source == "predicted" else CHANCE


def numbers_of(measured: Importance) -> dict[str, Any]:
    index = measured.heads.index
    return {
        "images": measured.score.n,
        "classes": measured.class_source,
        "score": measured.score.numbers(),
        "accuracy": measured.accuracy.numbers(),
        "least_change": measured.least_loss,
        "heads": measured.heads.labels,
        **{
            f"{ablation}_ablation": {
                "score": measured.score_changes[ablation][index].numbers(),
                "accuracy": measured.accuracy_changes[ablation][index].numbers(),
                "score_of_layers": measured.score_changes[ablation][:, -1].numbers(),
                "accuracy_of_layers": measured.accuracy_changes[ablation][:, -1].numbers(),
                "matters": measured.matters(ablation)[index].tolist(),
            }
            for ablation in ABLATIONS
        },
        "rank_correlation": {
            label: {
                ablation: {**value.numbers(), "p_value_adjusted": correlation.p_value[ablation]}
                for ablation, value in correlation.value.items()
            }
            for label, correlation in measured.correlations.items()
        },
    }


def importance_table(measured: Importance) -> Table:
    quantity = "accuracy" if measured.class_source == "true" else "same prediction"
    columns = [
        "without",
        "score, zero ablation (logits)",
        "score, mean ablation (logits)",
        f"{quantity}, zero ablation (points)",
        f"{quantity}, mean ablation (points)",
        "matters",
    ]
    num_layers = len(measured.score_changes["zero"].value)
    places = [
        *zip(measured.heads, measured.heads.labels, strict=True),
        *(((layer, -1), f"layer {layer + 1}") for layer in range(num_layers)),
    ]
    rows = [
        [
            name,
            *(measured.score_changes[ablation][place].text(2) for ablation in ABLATIONS),
            *(measured.accuracy_changes[ablation][place].times(100).text(1) for ablation in ABLATIONS),
            " and ".join(ablation for ablation in ABLATIONS if measured.matters(ablation)[place]) or "–",
        ]
        for place, name in places
    ]
    return Table(
        f"Change without a head or a layer, with 95 % intervals over {measured.score.n:,} images; points: "
        "percentage points (interval: Newcombe, 1998).",
        columns,
        rows,
    )


NO_SCORES = "The model gives no class scores, so the effect of a head on them cannot be measured."
CHAPTER = ChapterWriter("Head importance", write, ("attention_importance",), {Need.CLASSIFIER: NO_SCORES})

TEXT = """Over {who}, each head is ablated in two ways, all others intact: **zero ablation** (its weights are set to 0)
and **mean ablation** (its weights are replaced by their mean over images, so that only its dependence on the image is
lost). Measured are the score of the {classes} class (its logit relative to the mean logit), {score} with all heads, and
the fraction of predictions that are the {classes} class, {accuracy}. A head matters if the whole interval of its loss
lies beyond {part:.0%} of the score, {least:.2f}: {zero} of {count} heads in zero ablation, {mean} in mean
ablation.{chance}{fixed}{correlations}"""

TOO_MUCH = """Omitted: it takes {passes:,} passes over each image, which is slow for a model of this size. `subset=50`
runs it on 50 images."""

CHANCE = """ The accuracy is not above chance, so no head can matter."""

UNKNOWN = (
    """ The true classes are not known, and a model always agrees with itself, so no head is reported to matter."""
)

FIXED = """ For {count} heads mean ablation removes at least nine tenths of the loss: their contribution is nearly the
same for every image ({names})."""

CORRELATIONS = """

Rank correlations of the loss over the {count} heads, with 95 % intervals over heads and p by permutation
(FDR-adjusted over all of them): {pairs}."""
