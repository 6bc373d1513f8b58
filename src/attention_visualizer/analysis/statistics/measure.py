"""Attention statistics of all images: by layer and head, with depth, by class, and by right or wrong answer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attention_visualizer.analysis.study.study import Study
from attention_visualizer.analysis.study.survey import MEASURE_NAMES, Survey
from attention_visualizer.measures.intervals import Interval

Array = NDArray[Any]

OUTCOME_MEASURES = ("entropy", "effective_tokens", "maximum", "distance")


@dataclass(frozen=True)
class Statistics:
    survey: Survey
    image_kind: str  # what one image is called, such as "test image"
    trends: dict[str, Interval]  # measure -> last third of the layers minus the first, see `depth_trends`
    groups: Groups | None  # None where it is not known which answers are right
    accuracy: Interval | None  # likewise

    @property
    def images(self) -> str:
        """The images that this is over, such as "10,000 test images"."""
        return f"{self.survey.num_images:,} {self.image_kind}s"


@dataclass(frozen=True)
class Groups:
    """The means over heads of images grouped by their true class, and by whether they are classified right."""

    class_names: list[str]
    class_sizes: tuple[int, int]  # images of the smallest class that has any, and of the largest
    entropy: list[Interval]  # of each class, [layer]
    wrong_minus_correct: dict[str, Interval]  # measure -> [layer]
    num_wrong: int
    num_correct: int


def measure(study: Study) -> Statistics:
    survey, images = study.survey, study.target.images
    groups = measure_groups(survey, list(images.class_names))
    return Statistics(survey, images.kind, depth_trends(survey), groups, study.accuracy)


def depth_trends(survey: Survey) -> dict[str, Interval]:
    """Return the mean of the last third of the layers minus that of the first third, mean over heads, by measure.

    Layers whose patch queries do not count are left out of the distance. Empty for models of fewer than three layers.
    """
    trends = {}
    for name in ("entropy", "distance"):
        layers = np.flatnonzero(survey.has_measure[MEASURE_NAMES.index(name)])
        if len(layers) >= 3:
            trends[name] = survey.means.of(partial(deep_minus_shallow, MEASURE_NAMES.index(name), layers))
    return trends


def deep_minus_shallow(measure_index: int, layers: Array, means: Array) -> Array:
    """means: [..., measure, layer, head + 1] -> [...]."""
    third, of_layers = len(layers) // 3, means[..., measure_index, layers, -1]
    return np.asarray(of_layers[..., -third:].mean(axis=-1) - of_layers[..., :third].mean(axis=-1))


def measure_groups(survey: Survey, class_names: list[str]) -> Groups | None:
    if survey.correct is None:
        return None
    sizes = np.bincount(survey.labels)
    between_outcomes = survey.means_by_outcome.difference(0, 1).where(survey.has_measure)
    num_correct = int(survey.correct.sum())
    return Groups(
        class_names,
        (int(sizes[sizes > 0].min()), int(sizes.max())),
        [
            survey.means_by_class.of_group(label)[MEASURE_NAMES.index("entropy")]
            for label in range(survey.means_by_class.groups)
        ],
        {name: between_outcomes[MEASURE_NAMES.index(name)] for name in OUTCOME_MEASURES},
        survey.num_images - num_correct,
        num_correct,
    )
