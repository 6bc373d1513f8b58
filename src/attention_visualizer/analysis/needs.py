"""What a chapter needs of a study, so that it can be left out with one line where that is missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from attention_visualizer.analysis.study.study import Study
from attention_visualizer.files.atomic import json_ready
from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.report.chapter import Chapter


class Need(Enum):
    INK = "images of ink on an empty background"
    LABELS = "images whose classes are known"
    CLASSIFIER = "a model that gives class scores"
    OWN_MODEL = "this project's Vision Transformer"
    HISTORY = "the history of a training run"
    SEVERAL_RUNS = "other runs to compare"

    def is_met(self, study: Study) -> bool:
        images = study.target.images
        match self:
            case Need.INK:
                return images.has_ink
            case Need.LABELS:
                return images.labels is not None
            case Need.CLASSIFIER:
                return bool((study.survey.predicted >= 0).all())
            case Need.OWN_MODEL:
                return isinstance(study.target.model, VisionTransformer)
            case Need.HISTORY:
                return study.history is not None and bool(study.history.frames)
            case Need.SEVERAL_RUNS:
                return bool(study.compared_runs)


@dataclass(frozen=True)
class ChapterWriter:
    """A chapter of the analysis: how it is written, what it needs and which figures it may write."""

    title: str  # of the chapter that says what is missing
    write: Callable[[Study], Chapter]
    figures: tuple[str, ...]  # stems of file names; "..._sample_#" for one figure a sample
    needs: Mapping[Need, str] = field(default_factory=dict)  # what the chapter says where a need is not met, in order

    def __call__(self, study: Study) -> Chapter:
        """Write the chapter, or one with the sentence of the first need that is not met; its numbers are JSON's own
        types, null for NaN."""
        for need, sentence in self.needs.items():
            if not need.is_met(study):
                return Chapter(self.title, sentence, applies=False)
        chapter = self.write(study)
        return replace(chapter, numbers=json_ready(chapter.numbers))
