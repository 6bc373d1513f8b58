"""Common claims about a digit model's attention, put to the test: one verdict each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from attention_visualizer.analysis.claims.declared import (
    MIN_ATTENTION,
    MIN_DISTANCE,
    MIN_SPREAD,
    MIN_VARIANCE,
    MOST,
    WHOLE,
)
from attention_visualizer.analysis.claims.figure import draw
from attention_visualizer.analysis.claims.measure import JudgedClaims, measure
from attention_visualizer.analysis.claims.verdicts import CONTROL_FACTOR, Judgement, Result
from attention_visualizer.analysis.needs import ChapterWriter, Need
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.data.strokes import BEND
from attention_visualizer.measures.matched_patches import num_levels
from attention_visualizer.report.chapter import Chapter, FigureFile, Finding, Table

TITLE = "Common claims, tested"
COLUMNS = ["claim", "quantity", "value (95 % interval)", "n", "random weights", "null", "effect"]
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
        "controls": judged.num_controls,
        "levels": num_levels(judged.n),
        "missing": "".join(f" {sentence}" for sentence in judged.missing),
    }
    return Chapter(
        TITLE,
        TEXT.format(**facts),
        [FigureFile(name, CAPTION.format(**facts))],
        [claim_table(judged.judgements, judged.n), requirement_table(judged.judgements, judged.n), layer_table(judged)],
        numbers(judged),
        finding=Finding(finding_text(judged), name),
        caution=CAUTION,
    )


def claim_table(judgements: Sequence[Judgement], n: int) -> Table:
    rows = [
        [
            judgement.claim.name,
            *result_cells(judgement.results[0]),
            f"{judgement.adjusted:.3f}",
            f"{judgement.verdict}: {judgement.reason}",
        ]
        for judgement in judgements
    ]
    caption = (
        f"One row per claim, with the requirement that is farthest from being met, n = {n:,}. Effect: in units of the "
        f"minimum effect, and (d) in standard deviations over images. p: the largest of the claim's requirements, "
        f"adjusted over the {len(judgements)} claims."
    )
    return Table(caption, [*COLUMNS, "p adjusted", "verdict"], rows)


def requirement_table(judgements: Sequence[Judgement], n: int) -> Table:
    """Make a row for each requirement of the claims that have more than one."""
    rows = [
        [judgement.claim.name, *result_cells(result), f"{result.p_value:.3f}", result.failure or "holds"]
        for judgement in judgements
        if len(judgement.results) > 1
        for result in judgement.results
    ]
    caption = f"All requirements of claims that have more than one, n = {n:,}. p: not adjusted."
    return Table(caption, [*COLUMNS, "p", "holds"], rows)


def layer_table(judged: JudgedClaims) -> Table:
    layers = range(judged.measured.num_layers)
    columns = ["attention on", *(f"layer {layer + 1}" for layer in layers)]
    rows = [[name, *(excess[layer].text(2) for layer in layers)] for name, excess in judged.excess_by_layer.items()]
    caption = (
        f"By layer: attention on the feature minus that on matched patches without it, in uniform shares, mean over "
        f"heads, with 95 % intervals, n = {judged.n:,}."
    )
    return Table(caption, columns, rows)


def result_cells(result: Result) -> list[str]:
    """Return quantity, value, n, controls, null and effect."""
    requirement = result.requirement
    controls = f"{min(result.controls):.3f} to {max(result.controls):.3f}" if result.controls else "no comparison"
    value = effect = "–"
    if not np.isnan(result.value):
        value = f"{result.value:.3f} ({result.low:.3f} to {result.high:.3f})"
        effect = f"{result.value / requirement.minimum:.2f} (d {result.standardised:.2f})"
    return [f"{requirement.quantity}, {requirement.unit}", value, f"{result.n:,}", controls, requirement.null, effect]


def finding_text(judged: JudgedClaims) -> str:
    judgements = judged.judgements
    counts = Counter(judgement.verdict for judgement in judgements)
    text = (
        f"Of {len(judgements)} common claims about attention, {counts['supported']} are supported, "
        f"{counts['not supported']} are not, and {counts['cannot be decided by attention alone']} cannot be decided by "
        f"attention alone (n = {judged.n:,} {judged.image_kind}s, {judged.num_controls} models with random weights)."
    )
    supported = [judgement for judgement in judgements if judgement.verdict == "supported"]
    clearest = max(supported or judgements, key=lambda judgement: judgement.results[0].margin)
    weakest = clearest.results[0]
    if np.isnan(weakest.value):
        return text
    return (
        f"{text} {'The clearest' if supported else 'The closest'}: “{clearest.claim.name}”, with "
        f"{weakest.value:.2f} {weakest.requirement.unit} (95 % interval {weakest.low:.2f} to {weakest.high:.2f}) for "
        f"{weakest.requirement.quantity}."
    )


def numbers(judged: JudgedClaims) -> dict[str, Any]:
    return {
        "images": judged.n,
        "controls": judged.num_controls,
        "left_out": judged.missing,
        "excess_by_layer": {name: interval.numbers() for name, interval in judged.excess_by_layer.items()},
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
                        "value": result.value,
                        "low": result.low,
                        "high": result.high,
                        "standardised": result.standardised,
                        "controls": result.controls,
                        "p": result.p_value,
                        "n": result.n,
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

TEXT = f"""Common claims about the attention maps of digit models, each expressed as quantities declared before any
model was analysed, and tested over {{n:,}} {{kind}}. Attention is that of the readout query, renormalised over the N
patches; a uniform share is 1/N. Shallow, middle and deep layers are thirds of the depth.

**More attention than other ink.** End points, junctions (three strokes or more) and bends ({BEND:.0f}° or more) come
from the skeleton of the ink. A patch with one is compared with matched patches: at the same position in other images,
with about as much ink ({{levels}} levels per position) but no such point; likewise for edges, with more edge than the
median. Ink itself is compared with empty patches at the same position. The test permutes the feature among matched
patches.

**Heads.** A head's value is the one that a majority of layers reach, and on average over layers it must exceed the mean
of the layer's other heads; the test draws a head at random in each layer. Heads have no identity across seeds: a
verdict on "head 1" is about this model's numbering, which does not carry over to another training run.

**Verdicts.** A claim is supported if all its requirements hold: the 95 % interval excludes no effect, p is below 0.05
after false discovery rate (FDR) control over all claims, the effect reaches a minimum declared in advance
({MIN_ATTENTION:g} of a uniform share, {MIN_DISTANCE:g} of the distance of uniform attention, {MIN_SPREAD:g} of
the patches beyond other heads, {MIN_VARIANCE:g} of the variance between classes; {WHOLE:g} of the inked patches for
"the whole digit", {MOST:g} of all patches for "everything"), and it is {CONTROL_FACTOR:g} times as large as in any of
{{controls}} models of the same architecture with random weights. Random weights follow ink significantly, so
significance alone never suffices. Intervals and p-values are over images of this one model.{{missing}}"""
CAPTION = """One row per claim, n = {n:,} {kind}: the requirement that is farthest from being met, in units of its
minimum effect. Grey: the range of random weights."""
CAUTION = """A supported claim says where this one model's attention goes, not that its predictions depend on it, and
"not supported" does not prove the contrary; verdicts on numbered heads do not carry over to another training run."""
