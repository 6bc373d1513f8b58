"""The evidence of the model and of random weights, and the verdicts that it gives."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from attention_visualizer.analysis.claims.declared import declared_claims
from attention_visualizer.analysis.claims.evidence import Evidence, evidence_of
from attention_visualizer.analysis.claims.verdicts import Judgement, judge
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.measures.head_roles import nan_mean
from attention_visualizer.measures.intervals import Interval, percentiles


@dataclass(frozen=True)
class JudgedClaims:
    judgements: list[Judgement]
    missing: list[str]  # sentences on claims that cannot be tested on this model
    measured: Evidence
    num_controls: int
    image_kind: str  # such as "test image"

    @property
    def n(self) -> int:
        return self.measured.n

    @cached_property
    def excess_by_layer(self) -> dict[str, Interval]:
        """Return feature -> [layer], the excess attention on it, mean over heads, in units of a uniform share."""
        measured, intervals = self.measured, {}
        for name in measured.content.features:
            low, high = percentiles(nan_mean(measured.replicates[name]))
            intervals[name] = Interval(nan_mean(measured.values[name]), low, high, measured.n)
        return intervals


def measure(study: Study) -> JudgedClaims:
    images = study.target.images
    measured = evidence_of(study.survey, images.read(study.survey.kept))
    controls = control_evidence(study)
    study.progress("verdicts")
    claims, missing = declared_claims(measured)
    return JudgedClaims(judge(claims, measured, controls), missing, measured, len(controls), images.kind)


def control_evidence(study: Study) -> list[Evidence]:
    """Gather the evidence of each model with random weights, over the images of its survey."""
    return [
        evidence_of(survey, study.target.images.read(study.control_rows[survey.kept].tolist()), resampled=False)
        for survey in study.control_surveys
    ]
