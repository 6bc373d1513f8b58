"""The compared runs, each surveyed with the same images, and quantities that mean the same in models of any size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attention_visualizer.analysis.study.compared_runs import ComparedRun
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.analysis.study.survey import Survey
from attention_visualizer.data.image_sets import LabelledImageSet
from attention_visualizer.measures.intervals import CHAPTER_LEVEL, BootstrapMeans, Interval
from attention_visualizer.measures.map_measures import uniform_entropy

Array = NDArray[Any]
SURVEY_IMAGES = 1000  # that each run is surveyed on
IMAGES_AT_ONCE = 1000  # while resampling: bounds memory
CONTROL_FACTOR = 1.5  # how far beyond random weights an effect must go
# Three families of statements about seeds share the chapter's level: whether heads recur, layers, heads.
FAMILY_LEVEL = CHAPTER_LEVEL / 3
ENOUGH_SEEDS = 10  # from which on statements about seeds are more than descriptive: 2 / 2^10 < FAMILY_LEVEL
FEW_SEEDS = 3  # from which on they have intervals, which lead the report


@dataclass(frozen=True)
class SurveyedRun:
    """One run, or random weights in its architecture, surveyed."""

    run: ComparedRun
    survey: Survey
    #: Whether each image is classified correctly, bool [image]: for a run of all images of the study, for random
    #: weights of those of the survey. None where classes are not known.
    correct: Array | None

    @cached_property
    def accuracies(self) -> BootstrapMeans | None:
        if self.correct is None:
            return None
        means = BootstrapMeans(num_images=len(self.correct))
        for start in range(0, len(self.correct), IMAGES_AT_ONCE):
            means.update(self.correct[start : start + IMAGES_AT_ONCE].astype(np.float64))
        return means

    @cached_property
    def accuracy(self) -> Interval | None:
        return None if self.accuracies is None else self.accuracies.of_group()


def survey_runs(study: Study) -> list[SurveyedRun]:
    """Survey each of `study.compared_runs`, in their order."""
    surveyed = []
    rows = study.stratified_rows(SURVEY_IMAGES)
    for position, run in enumerate(study.compared_runs):
        study.progress(f"run {position + 1} of {len(study.compared_runs)}, {run.label}")
        model = run.loaded.build_model().to(study.target.device)
        target = replace(study.target, model=model, images=images_as_trained(run, study))
        survey = target.survey(rows)
        study.errors.append(survey.reconstruction_error)
        surveyed.append(SurveyedRun(run, survey, target.are_correct()))
    return surveyed


def images_as_trained(run: ComparedRun, study: Study) -> LabelledImageSet:
    """Return the study's images, normalised as the run was trained: another split has another mean."""
    images = study.target.images
    assert isinstance(images, LabelledImageSet)
    if run.loaded.data is None:
        return images
    return replace(images, description=run.loaded.data)


def uniform_values(survey: Survey, measure: str) -> Array:
    """Return what uniform attention has of a measure, by which each layer's values are divided: [layer]; 1 for measures
    that are not relative to it, NaN where a layer does not count."""
    if measure == "distance":
        return survey.uniform_distances
    if measure == "entropy":
        return np.array([uniform_entropy(geometry.num_tokens) for geometry in survey.geometries])
    return np.ones(len(survey.geometries))


@dataclass(frozen=True)
class Quantity:
    """What runs are compared by."""

    name: str  # of the measure, or "accuracy" or "ink"
    label: str
    minimum: float  # the smallest difference that matters
