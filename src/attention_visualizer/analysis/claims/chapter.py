"""Common claims about a digit model's attention, put to the test: one verdict each."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from attention_visualizer.analysis.claims.declared import (
    LEAST_ATTENTION,
    LEAST_CLASSES,
    LEAST_DISTANCE,
    LEAST_SPREAD,
    MOST,
    WHOLE,
    declared_claims,
)
from attention_visualizer.analysis.claims.measure import Evidence, evidence_of
from attention_visualizer.analysis.claims.verdicts import CONTROL_MARGIN, Judgement, Result, judge
from attention_visualizer.analysis.needs import ChapterWriter, Need
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.analysis.study.survey import nan_mean
from attention_visualizer.data.strokes import TURN
from attention_visualizer.figures import charts
from attention_visualizer.measures.intervals import Interval, percentiles
from attention_visualizer.measures.matched_patches import num_levels
from attention_visualizer.report.chapter import Chapter, FigureFile, Finding, Table

Array = NDArray[Any]

TITLE = "Common claims, put to the test"
COLUMNS = ["claim", "quantity", "value (95 % interval)", "n", "random weights", "null", "effect"]
FEWEST = 100  # pictures from which like patches can be found


def write(study: Study) -> Chapter:
    if len(study.survey.kept) < FEWEST:
        return Chapter(TITLE, f"These claims need the maps of {FEWEST} pictures at least, to compare like patches.")
    subject = evidence_of(study.survey, study.target.images.read(study.survey.kept))
    controls = control_evidence(study)
    study.progress("verdicts")
    claims, missing = declared_claims(subject)
    judgements = judge(claims, subject, controls)
    name = study.output.save(figure(judgements, subject, len(controls), study), "attention_claims")
    facts = {
        "n": subject.n,
        "kind": f"{study.target.images.kind}s",
        "controls": len(controls),
        "levels": num_levels(subject.n),
        "missing": "".join(f" {sentence}" for sentence in missing),
    }
    return Chapter(
        TITLE,
        TEXT.format(**facts),
        [FigureFile(name, CAPTION.format(**facts))],
        [claim_table(judgements, subject.n), requirement_table(judgements, subject.n), layer_table(subject)],
        numbers(judgements, subject, len(controls), missing),
        finding=Finding(finding_text(judgements, subject.n, f"{study.target.images.kind}s", len(controls)), name),
        caution=CAUTION,
    )


def control_evidence(study: Study) -> list[Evidence]:
    """Of the models with random weights, each over the pictures of the control surveys."""
    subset = study.control_rows
    return [
        evidence_of(survey, study.target.images.read([int(number) for number in subset[survey.kept]]), resampled=False)
        for survey in study.control_surveys
    ]


def figure(judgements: list[Judgement], subject: Evidence, num_controls: int, study: Study) -> Figure:
    """Of each claim the requirement that is farthest from being met, in units of its minimum effect."""
    weakest = [judgement.results[0] for judgement in judgements]
    units = np.array([result.requirement.minimum for result in weakest])
    bands = [(min(result.controls), max(result.controls)) if result.controls else (np.nan,) * 2 for result in weakest]
    drawn = Figure(figsize=(13.5, 0.44 * len(judgements) + 2.3), layout="constrained")
    charts.verdict_forest(
        [judgement.claim.name for judgement in judgements],
        np.array([result.value for result in weakest]) / units,
        np.array([(result.low, result.high) for result in weakest]) / units[:, None],
        np.array(bands) / units[:, None],
        np.array([result.threshold for result in weakest]) / units,
        [judgement.verdict for judgement in judgements],
        drawn.add_subplot(),
    )
    handles = [
        Line2D([], [], color=charts.REFERENCE, marker="o", linewidth=1.8, label="weakest requirement, 95 % interval"),
        Line2D([], [], color="black", marker="|", linestyle="none", markersize=12, label="what it must reach"),
        Patch(color=charts.BAND, label=f"what {num_controls} models with random weights reach"),
    ]
    drawn.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    headline = f"{TITLE}: n = {subject.n:,} {study.target.images.kind}s"
    return charts.with_headline(drawn, headline)


def claim_table(judgements: list[Judgement], n: int) -> Table:
    rows = []
    for judgement in judgements:
        weakest = judgement.results[0]
        rows.append(
            [
                judgement.claim.name,
                *cells(weakest),
                decimals(judgement.adjusted),
                f"{judgement.verdict}: {judgement.reason}",
            ]
        )
    caption = (
        f"One row a claim, with the requirement that is farthest from being met, n = {n:,}. Effect: in units of the "
        f"minimum effect, and (d) in standard deviations over images. p: the largest of the claim's requirements, "
        f"adjusted over the {len(judgements)} claims."
    )
    return Table(caption, [*COLUMNS, "p adjusted", "verdict"], rows)


def requirement_table(judgements: list[Judgement], n: int) -> Table:
    """Of the claims that require more than one thing."""
    rows = [
        [judgement.claim.name, *cells(result), decimals(result.p_value), result.failure or "holds"]
        for judgement in judgements
        if len(judgement.results) > 1
        for result in judgement.results
    ]
    caption = f"All that claims of several requirements require, n = {n:,}. p: not adjusted."
    return Table(caption, [*COLUMNS, "p", "does it hold"], rows)


def by_layer(subject: Evidence) -> dict[str, Interval]:
    """Feature -> [layer], the excess attention on it, mean over heads, of an even share."""
    found = {}
    for name in subject.content.features:
        low, high = percentiles(nan_mean(subject.replicates[name]))
        found[name] = Interval(nan_mean(subject.values[name]), low, high, subject.n)
    return found


def layer_table(subject: Evidence) -> Table:
    columns = ["attention on", *(f"layer {layer + 1}" for layer in range(subject.num_layers))]
    rows = [
        [name, *(each[layer].text(2) for layer in range(subject.num_layers))]
        for name, each in by_layer(subject).items()
    ]
    caption = (
        f"Layer by layer: how much more attention than like patches without it, of an even share, mean over heads, "
        f"with 95 % intervals, n = {subject.n:,}. Below 0: less."
    )
    return Table(caption, columns, rows)


def cells(result: Result) -> list[str]:
    """Quantity, value, n, controls, null and effect."""
    requirement = result.requirement
    controls = f"{min(result.controls):.3f} to {max(result.controls):.3f}" if result.controls else "no comparison"
    value = "–" if np.isnan(result.value) else f"{result.value:.3f} ({result.low:.3f} to {result.high:.3f})"
    effect = (
        "–" if np.isnan(result.value) else f"{result.value / requirement.minimum:.2f} (d {result.standardised:.2f})"
    )
    return [f"{requirement.quantity}, {requirement.unit}", value, f"{result.n:,}", controls, requirement.null, effect]


def decimals(p_value: float) -> str:
    return f"{p_value:.3f}"


def finding_text(judgements: list[Judgement], n: int, kind: str, num_controls: int) -> str:
    counts = Counter(judgement.verdict for judgement in judgements)
    text = (
        f"Of {len(judgements)} common claims about attention, {counts['supported']} are supported, "
        f"{counts['not supported']} are not, and {counts['cannot be decided by attention alone']} cannot be decided by "
        f"attention alone (n = {n:,} {kind}, {num_controls} models with random weights)."
    )
    supported = [judgement for judgement in judgements if judgement.verdict == "supported"]
    chosen = max(supported or judgements, key=lambda judgement: judgement.results[0].margin)
    weakest = chosen.results[0]
    if np.isnan(weakest.value):
        return text
    return (
        f"{text} {'The clearest' if supported else 'The nearest to it'}: “{chosen.claim.name}”, with "
        f"{weakest.value:.2f} {weakest.requirement.unit} (95 % interval {weakest.low:.2f} to {weakest.high:.2f}) for "
        f"{weakest.requirement.quantity}."
    )


def numbers(judgements: list[Judgement], subject: Evidence, num_controls: int, missing: list[str]) -> dict[str, Any]:
    """For JSON."""
    return {
        "images": subject.n,
        "controls": num_controls,
        "left_out": missing,
        "excess_by_layer": {name: interval.numbers() for name, interval in by_layer(subject).items()},
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
                        "must_reach": number(result.threshold),
                        "value": number(result.value),
                        "low": number(result.low),
                        "high": number(result.high),
                        "standardised": number(result.standardised),
                        "controls": list(result.controls),
                        "p": result.p_value,
                        "n": result.n,
                        "holds": not result.failure,
                    }
                    for result in judgement.results
                ],
            }
            for judgement in judgements
        ],
    }


def number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


NO_INK = "These claims are about digits of ink on an empty background, which these pictures are not."
CHAPTER = ChapterWriter(TITLE, write, ("attention_claims",), {Need.INK: NO_INK})

TEXT = f"""Claims that are often made of a digit model's attention maps, each turned into quantities before any model
was looked at, and judged over {{n:,}} {{kind}}. The attention is the readout query's, renormalised over the patches;
"an even share" is what a patch gets when all get the same. Depth is told in thirds of the layers.

**More attention than other ink.** End points, junctions (three strokes or more) and bends ({TURN:.0f}° or more) come
from the skeleton of the ink. A patch that holds one is compared with patches at the same place, in other images, that
hold about as much ink ({{levels}} levels at each place) but no such point; edges alike, with more edge than the median.
Ink itself is compared with empty patches at the same place. The test permutes the feature among like patches.

**Heads.** A head's value is the one that a majority of layers reach, and on average over layers it must stand out from
the mean of the layer's other heads; the test draws a head at random in each layer. Heads have no identity across seeds:
a verdict on "head 1" is one on this model's numbering, and another training run numbers its heads anew.

**Verdicts.** A claim is supported where everything that it requires holds: the 95 % interval excludes no effect, p is
below 0.05 after false discovery control over all claims, the effect reaches a minimum fixed beforehand
({LEAST_ATTENTION:g} of an even share, {LEAST_DISTANCE:g} of the distance of uniform attention, {LEAST_SPREAD:g} of the
patches beyond other heads, {LEAST_CLASSES:g} of the variance between classes; {WHOLE:g} of the inked patches for "the
whole digit", {MOST:g} of all patches for "everything"), and it is {CONTROL_MARGIN:g} times as large as in any of
{{controls}} models of the same architecture with random weights. Random weights follow ink significantly, so
significance alone never suffices. Intervals and p-values are over images of this one model.{{missing}}"""
CAPTION = """Claims down, n = {n:,} {kind}. Of each claim the requirement that is farthest from being met, in units of
its minimum effect. Grey: what random weights reach."""
CAUTION = """A supported claim says where this one model's attention goes, not that its answers rest on it, and "not
supported" is not a proof of the contrary; verdicts on numbered heads do not carry over to another training run."""
