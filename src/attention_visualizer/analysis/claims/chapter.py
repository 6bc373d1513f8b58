"""Common claims about a digit model's attention, put to the test: one verdict each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from attention_visualizer.analysis.claims.declared import (
    CLASS_CLAIM,
    MIN_ATTENTION,
    MIN_CONTRAST,
    MIN_DISTANCE,
    MIN_VARIANCE,
    WHOLE,
)
from attention_visualizer.analysis.claims.figure import draw
from attention_visualizer.analysis.claims.measure import JudgedClaims, measure
from attention_visualizer.analysis.claims.verdicts import Result
from attention_visualizer.analysis.needs import ChapterWriter, Need
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.data.ink import border_patches
from attention_visualizer.data.strokes import BEND
from attention_visualizer.measures.class_variance import smallest
from attention_visualizer.measures.intervals import CHAPTER_LEVEL
from attention_visualizer.measures.matched_patches import num_levels
from attention_visualizer.report.chapter import Chapter, FigureFile, Finding, Table, p_text

TITLE = "Common claims, tested"
MIN_IMAGES = 100  # from which like patches can be found


def write(study: Study) -> Chapter:
    if len(study.survey.kept) < MIN_IMAGES:
        return Chapter(
            TITLE, f"Testing these claims on matched patches requires the maps of at least {MIN_IMAGES} images."
        )
    judged = measure(study)
    name = study.output.save(draw(judged, TITLE), "attention_claims")
    facts = {
        "n": judged.n,
        "kind": f"{judged.image_kind}s",
        "controls": judged.controls_text,
        "levels": num_levels(judged.n),
        "missing": "".join(f" {sentence}" for sentence in judged.missing),
        "grid": grid_text(judged.measured.content.grid),
        "power": class_power_text(judged),
    }
    return Chapter(
        TITLE,
        TEXT.format(**facts),
        [FigureFile(name, CAPTION.format(**facts))],
        [claim_table(judged), requirement_table(judged), layer_table(judged), *class_tables(judged)],
        numbers(judged),
        finding=Finding(finding_text(judged), name, rank=5),
        caution=CAUTION,
    )


def claim_table(judged: JudgedClaims) -> Table:
    rows = [
        [
            judgement.claim.name,
            judgement.verdict,
            *result_cells(judgement.results[0], judged.controls),
            p_text(judgement.adjusted),
            judgement.reason.removeprefix(f"{judgement.results[0].requirement.quantity}: "),
        ]
        for judgement in judged.judgements
    ]
    caption = (
        f"One row per claim (n = {judged.n:,}), with the requirement that decides: the weakest, or where one layer "
        f"suffices, the strongest, picked afterwards. Controls: lowest to highest value. p: of the claim, "
        f"Holm-adjusted over the {len(judged.judgements)} claims and the layers."
    )
    return Table(caption, ["claim", "verdict", *columns_of(judged.controls), "p adjusted", "reason"], rows)


def requirement_table(judged: JudgedClaims) -> Table:
    """Make a row for each requirement of the claims that have more than one."""
    rows = [
        [
            judgement.claim.name,
            "fails" if result.failure else "holds",
            *result_cells(result, judged.controls),
            p_text(result.p_value),
            result.failure or "–",
        ]
        for judgement in judged.judgements
        if len(judgement.results) > 1
        for result in judgement.results
    ]
    caption = f"All requirements of claims that have more than one, n = {judged.n:,}. p: not adjusted."
    columns = ["claim", "requirement", *columns_of(judged.controls), "p", "reason"]
    return Table(caption, columns, rows, is_detail=True)


def layer_table(judged: JudgedClaims) -> Table:
    layers = range(judged.measured.num_layers)
    columns = ["attention on", *(f"layer {layer + 1}" for layer in layers)]
    rows = [[name, *(value[layer].text(2) for layer in layers)] for name, value in judged.by_layer.items()]
    caption = (
        f"By layer, mean over heads, with 95% intervals (n = {judged.n:,}). Ink: the difference from empty patches, "
        "as a part of their sum. The others: what ink and class do not predict, as a part of what matched patches get."
    )
    return Table(caption, columns, rows)


def class_tables(judged: JudgedClaims) -> list[Table]:
    """The variance between classes after each regression; none without labels."""
    shares = judged.measured.classes
    if not shares:
        return []
    rows = [
        [
            each.taken_out,
            each.share.text(),
            f"{each.p_value:.3f}",
            f"{each.predicted:.2f}",
            "–" if np.isnan(each.kept) else f"{each.kept:.2f}",
        ]
        for each in shares
    ]
    caption = (
        f"How much of the maps' variance between images lies between classes (n = {judged.n:,}), without what each "
        "regression predicts out of fold; the verdict takes the smallest. Predicted: the part of all variance. Would "
        "be left: the same share for maps that only the class determines; a low value means that ink tells the class."
    )
    return [Table(caption, ["taken out", "share", "p", "predicted", "would be left"], rows)]


def columns_of(controls: Iterable[str]) -> list[str]:
    return ["quantity", "value (95% interval)", *controls]


def result_cells(result: Result, controls: Iterable[str]) -> list[str]:
    """Return quantity, value, and the range of each kind of control."""
    requirement = result.requirement
    ranges = [range_text(result.controls.get(kind, ())) for kind in controls]
    value = "–" if np.isnan(result.value) else result.interval.text()
    return [f"{requirement.quantity}, {requirement.unit}", value, *ranges]


def range_text(values: Sequence[float]) -> str:
    return f"{min(values):.3f} to {max(values):.3f}" if values else "no comparison"


def grid_text(grid: tuple[int, int]) -> str:
    """Say what a coarse grid cannot express; nothing for a fine one."""
    at_border = int(border_patches(grid).sum()) / (grid[0] * grid[1])
    return COARSE.format(rows=grid[0], columns=grid[1], border=at_border) if at_border > 0.5 else ""


def class_power_text(judged: JudgedClaims) -> str:
    """Say where even maps that only the class determines would not be called different between classes."""
    if not judged.measured.classes:
        return ""
    least = smallest(judged.measured.classes)
    (needed,) = (each.results[0].threshold for each in judged.judgements if each.claim.name == CLASS_CLAIM)
    return (
        "" if not least.kept < needed else POWERLESS.format(taken_out=least.taken_out, kept=least.kept, needed=needed)
    )


def finding_text(judged: JudgedClaims) -> str:
    judgements = judged.judgements
    counts = Counter(judgement.verdict for judgement in judgements)
    undecided = counts["cannot be decided by attention alone"]
    text = (
        f"{counts['supported']} of {len(judgements)} common claims about attention "
        f"{'is' if counts['supported'] == 1 else 'are'} supported"
        f"{f', {undecided} cannot be decided by attention alone' if undecided else ''} "
        f"(n = {judged.n:,} {judged.image_kind}s)."
    )
    supported = [judgement for judgement in judgements if judgement.verdict == "supported"]
    clearest = max(supported or judgements, key=lambda judgement: judgement.results[0].margin)
    weakest = clearest.results[0]
    if np.isnan(weakest.value):
        return text
    return (
        f"{text} {'The clearest' if supported else 'The closest'}, picked afterwards: “{clearest.claim.name}”, by "
        f"{weakest.interval.text()} {weakest.requirement.unit}."
    )


def numbers(judged: JudgedClaims) -> dict[str, Any]:
    return {
        "images": judged.n,
        "controls": judged.controls,
        "left_out": judged.missing,
        "between_classes": [
            {
                "taken_out": each.taken_out,
                "share": each.share.numbers(),
                "by_layer": each.by_layer.numbers(),
                "p": each.p_value,
                "predicted": each.predicted,
                "would_be_left": each.kept,
            }
            for each in judged.measured.classes
        ],
        "by_layer": {name: interval.numbers() for name, interval in judged.by_layer.items()},
        "claims": [
            {
                "claim": judgement.claim.name,
                "verdict": judgement.verdict,
                "reason": judgement.reason,
                "p": judgement.p_value,
                "p_adjusted": judgement.adjusted,
                "requirements": [
                    {
                        "quantity": result.requirement.quantity,
                        "unit": result.requirement.unit,
                        "null": result.requirement.null,
                        "minimum_effect": result.requirement.minimum,
                        "must_reach": result.threshold,
                        **result.interval.numbers(),
                        "standardised": result.standardised,
                        "controls": result.controls,
                        "p": result.p_value,
                        "holds": not result.failure,
                    }
                    for result in judgement.results
                ],
            }
            for judgement in judged.judgements
        ],
    }


NO_INK = "These claims are about digits of ink on an empty background, which these images are not."
CHAPTER = ChapterWriter(TITLE, write, ("attention_claims",), {Need.INK: NO_INK})

TEXT = f"""Each of these common claims about digit models is expressed as quantities, which were fixed before any model
was analysed, and tested over {{n:,}} {{kind}}. Attention is that of the readout query, mean over heads, as shares of
the attention on patches. Shallow, middle and deep layers are thirds of the depth.

**More attention than other ink.** End points, junctions (three strokes or more) and bends ({BEND:.0f}° or more) come
from the skeleton of the ink. Patches with such a point cannot simply be compared with all others: shares compete, so a
patch gets more where the rest of the image holds less ink. Therefore:

1. A softmax regression predicts the attention from the ink of all patches and the class. It is fitted to the other half
   of the images (ink, its square, and whether there is any). It predicts attention on the brightest patch, at any
   sharpness, completely. Only what it does not predict is used.
2. That is compared between patches with such a point and *matched patches* without one: at the same position in other
   images, with about as much ink ({{levels}} levels per position). For edges, the comparison is between more and less
   edge than the median.

The result is a part of what matched patches get, so sharp and nearly uniform maps are comparable. Each layer is
tested, and the mean over layers; one of them suffices, with p adjusted for their number. Ink itself is compared with
empty patches at the same position.

**Classes.** Attention is computed from the pixels, so "beyond the ink" can only mean: not predicted by the regressions
named here. The more a regression can express, the less is left; the verdict takes the smallest. Part of what they
predict may be the class's own.{{power}}

**Space.** Attention distances are also compared with those of the same maps with patches at permuted positions.

**Controls.** {{controls}}. Sharpened weights are random ones with each head's logits scaled so that it is as sharp as
the trained head. Models with shuffled labels know permuted labels of other images by heart: they have learnt to see,
but nothing about the classes.

**Verdicts.** A claim is supported if the model's accuracy is above chance and each requirement

- reaches a minimum effect: {MIN_ATTENTION:g} of what matched patches get, a contrast of {MIN_CONTRAST:g} for ink,
  {MIN_DISTANCE:g} of the distance of uniform attention, {MIN_VARIANCE:g} of the variance between classes, {WHOLE:g} of
  the inked patches for "the whole digit";
- exceeds every control by that minimum;
- has a 95% interval without 0, and p < {CHAPTER_LEVEL:g} (Holm-adjusted over all claims; five chapters make
  statements, so at most 5% of reports contain a false one).

Intervals and p-values are over images of this one model.{{missing}}{{grid}}

**Numbered heads.** "Head 1 attends to the stroke, head 2 to junctions ..." is not tested. The heads of a layer are
interchangeable, so their numbers mean nothing from one training run to the next. The chapter on roles says what each
head does."""
COARSE = """ With {rows} x {columns} patches, {border:.0%} of which lie at the border, "edges", "local" and "details"
can hardly be told apart: `python train.py experiment=fine_patches` trains a model with patches of 4 pixels, whose
report can."""
POWERLESS = """ On this model the claim cannot hold: even of maps that only the class determines, what {taken_out}
leaves would be {kept:.2f} of the variance, and {needed:.2f} is needed."""
CAPTION = """One row per claim, n = {n:,} {kind}: the requirement that decides, in units of its minimum effect. Grey:
the range of all controls."""
CAUTION = """A claim that is "not supported" is not disproved."""
