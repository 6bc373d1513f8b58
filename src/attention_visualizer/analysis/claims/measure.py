"""The evidence of the model and of the controls, and the verdicts that it gives."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from attention_visualizer.analysis.claims.declared import declared_claims
from attention_visualizer.analysis.claims.evidence import Evidence, evidence_of
from attention_visualizer.analysis.claims.verdicts import Judgement, judge
from attention_visualizer.analysis.study.controls import SHUFFLED
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.analysis.study.survey import Survey
from attention_visualizer.measures.intervals import Interval, percentiles
from attention_visualizer.support.parallel import on_all_cores

NO_SHUFFLED = (
    "Models that know shuffled labels by heart are missing among the controls: there are too few images, training "
    "would take too long, or nothing was learnt that could be compared with them."
)


@dataclass(frozen=True)
class JudgedClaims:
    judgements: list[Judgement]
    missing: list[str]  # sentences on claims that cannot be tested on this model, and on missing controls
    measured: Evidence
    controls: dict[str, int]  # kind -> number of models
    image_kind: str  # such as "test image"

    @property
    def n(self) -> int:
        return self.measured.n

    @property
    def controls_text(self) -> str:
        """Name the controls: "3 models with random weights, 3 with shuffled labels"."""
        return ", ".join(f"{count} with {kind}" for kind, count in self.controls.items())

    @cached_property
    def by_layer(self) -> dict[str, Interval]:
        """Return feature -> [layer], in its unit."""
        measured, intervals = self.measured, {}
        for name in measured.content.features:
            of_images = Interval(measured.values[name], *percentiles(measured.replicates[name]), measured.n)
            intervals[name] = of_images.including(measured.halves[name])
        return intervals


def measure(study: Study) -> JudgedClaims:
    images = study.target.images
    study.progress("attention on edges and points")
    measured = evidence_of(study.survey, images.read(study.survey.kept))
    controls = control_evidence(study)
    study.progress("verdicts")
    claims, missing = declared_claims(measured)
    if SHUFFLED not in controls:
        missing.append(NO_SHUFFLED)
    return JudgedClaims(
        judge(claims, measured, controls, study.has_learnt),
        missing,
        measured,
        {kind: len(evidences) for kind, evidences in controls.items()},
        images.kind,
    )


def control_evidence(study: Study) -> dict[str, list[Evidence]]:
    """Gather the evidence of each control, by kind, over the images of its survey."""

    def evidence(survey: Survey) -> Evidence:
        images = study.target.images.read(study.control_rows[survey.kept].tolist())
        return evidence_of(survey, images, resampled=False)

    return {kind: on_all_cores(evidence, surveys, study.target.device) for kind, surveys in study.controls.items()}
