"""The analysis context that all chapters share: target, output, budget, samples, and surveys made when first needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attention_visualizer.analysis.study.budget import MIN_IMAGES, QUICK, Budget
from attention_visualizer.analysis.study.compared_runs import ComparedRun
from attention_visualizer.analysis.study.controls import (
    MAX_SHUFFLED,
    RANDOM,
    SHARPENED,
    SHARPENED_FOR_EACH,
    SHUFFLED,
    random_surveys,
    sharpened_surveys,
    shuffled_surveys,
)
from attention_visualizer.analysis.study.output import Output
from attention_visualizer.analysis.study.samples import Sample, check_sample
from attention_visualizer.analysis.study.survey import Survey
from attention_visualizer.analysis.study.target import Target
from attention_visualizer.figures.attention_figures import ExplainedImage, class_name
from attention_visualizer.figures.panels import PanelFigure
from attention_visualizer.measures.intervals import Interval, half_means, learnt_threshold, share_interval, stratified
from attention_visualizer.measures.observation import Observation
from attention_visualizer.models.untrained import random_weights
from attention_visualizer.report.chapter import FigureFile
from attention_visualizer.runs.history import AttentionHistory

HeadLayers = Literal["all", "last"]
MAX_THUMBNAIL_SIDE = 448  # pixels a side, somewhat more than those of the largest tile
CONTROL_IMAGES = 1000  # that each control model is surveyed on
LUCK_IMAGES = 200  # that it classifies, to see how many it gets right by luck
FIRST_CONTROL = 1000  # the seed of the first control: no run is likely to have it


def left_out_note(observation: Observation) -> str:
    """Return what figures say of layers that they do not show; "" where they show all."""
    if not observation.left_out:
        return ""
    shown, number = len(observation.layer_names), len(observation.layer_names) + len(observation.left_out)
    return f"only the {shown} of {number} layers whose keys have a known position on the image"


class ProgressMessages:
    """What a chapter is doing at the moment, for whoever shows it."""

    def __init__(self) -> None:
        self._show: Callable[[str], None] | None = None

    def __call__(self, message: str) -> None:
        if self._show is not None:
            self._show(message)

    @contextmanager
    def shown_by(self, show: Callable[[str], None]) -> Iterator[None]:
        self._show, before = show, self._show
        try:
            yield
        finally:
            self._show = before


@dataclass(frozen=True)
class Study:
    target: Target
    output: Output
    weights: str  # what the weights are, in words
    budget: Budget = QUICK
    samples: Sequence[Sample] = ()
    history: AttentionHistory | None = None  # of the training, where the checkpoint comes from a run
    compared_runs: Sequence[ComparedRun] = ()  # this one among them; empty where none were asked for
    head_layers: HeadLayers = "all"
    progress: ProgressMessages = field(default_factory=ProgressMessages)
    weights_digest: str | None = None  # the first 16 hex digits of the weights' SHA-256, where it is known
    explorer_bytes: int = 25_000_000  # of the explorer's page, at most
    controls_folder: Path | None = None  # where control models that were trained are kept for the next analysis
    errors: list[float] = field(default_factory=list)  # reconstruction errors that the captures of this study measured

    @property
    def reconstruction_error(self) -> float:
        """The largest that any capture of this study measured."""
        return max(self.errors, default=0.0)

    def observe(self, images: Tensor) -> Observation:
        """Capture the attention on uint8 images [image, channel, height, width]."""
        observation = self.target.observe(images)
        self.errors.append(observation.reconstruction_error)
        return observation

    @cached_property
    def first_observation(self) -> Observation:
        """The target's, its error counted among this study's."""
        self.errors.append(self.target.first_observation.reconstruction_error)
        return self.target.first_observation

    @cached_property
    def explained_images(self) -> list[ExplainedImage]:
        """Return what the model attends to on each sample."""
        return self.explain_images(self.samples)

    def explain_images(self, samples: Sequence[Sample]) -> list[ExplainedImage]:
        for sample in samples:
            check_sample(sample, self.target.images)
        observation = self.observe(torch.stack([sample.image for sample in samples]))
        names = self.target.images.class_names
        return [
            ExplainedImage.of(
                observation,
                index,
                thumbnail(sample.image),
                None if sample.label is None else class_name(names, sample.label),
                names,
            )
            for index, sample in enumerate(samples)
        ]

    @cached_property
    def survey(self) -> Survey:
        """Of all images."""
        images = self.target.images
        self.progress(f"attention of {len(images):,} {images.kind}s")
        survey = self.target.survey()
        self.errors.append(survey.reconstruction_error)
        return survey

    @cached_property
    def control_models(self) -> list[nn.Module]:
        """The same architecture with random weights, as many as the budget says."""
        return [random_weights(self.target.model, FIRST_CONTROL + index) for index in range(self.budget.controls)]

    @cached_property
    def control_rows(self) -> NDArray[np.int64]:
        """Return the rows of the images that control models are surveyed on."""
        return self.stratified_rows(CONTROL_IMAGES)

    @cached_property
    def control_surveys(self) -> list[Survey]:
        """Of the control models; `Survey.kept` are positions in `control_rows`."""
        self.progress(f"{len(self.control_models)} models with random weights")
        return random_surveys(self.target, self.control_models, self.control_rows)

    @cached_property
    def controls(self) -> dict[str, list[Survey]]:
        """Return the surveys of each kind of control, which claims and roles must exceed; `Survey.kept` are positions
        in `control_rows`. Random weights alone where nothing will be said, as the model has learnt nothing or classes
        are not known; no shuffled labels where training would take too long."""
        target, rows = self.target, self.control_rows
        surveys = {RANDOM: self.control_surveys}
        if not self.has_learnt:
            return surveys
        num_sharpened = SHARPENED_FOR_EACH * self.budget.controls
        num_shuffled = min(MAX_SHUFFLED, self.budget.controls)
        self.progress(f"{num_sharpened} models with {SHARPENED}")
        models = [random_weights(target.model, FIRST_CONTROL + index) for index in range(num_sharpened)]
        surveys[SHARPENED] = sharpened_surveys(target, models, rows, self.survey)
        surveys[SHUFFLED] = shuffled_surveys(target, num_shuffled, rows, self.controls_folder, self.progress)
        return {kind: each for kind, each in surveys.items() if each}

    @cached_property
    def has_learnt(self) -> bool:
        """Return whether the accuracy, with its whole interval, is well above that of guessing, and above those of
        random weights, which tell two classes apart by luck more often than one would think; False where it is not
        known. Of a model that has learnt nothing, no statement is made."""
        classes, accuracy = self.target.images.num_classes, self.accuracy
        if accuracy is None or not classes or accuracy.low <= learnt_threshold(1 / classes):
            return False
        rows = self.stratified_rows(LUCK_IMAGES)
        by_luck = (self.target.with_model(model).are_correct(rows) for model in self.control_models)
        return all(correct is not None and accuracy.low > correct.mean() for correct in by_luck)

    @cached_property
    def accuracy(self) -> Interval | None:
        """Return the share of all images that are classified correctly; None where that is not known, or would cost
        more than the budget allows."""
        if self.target.images.labels is None or not self.first_observation.num_classes:
            return None
        if "survey" in self.__dict__:
            correct = self.survey.correct
        elif self.cost_of_image(passes=1) * len(self.target.images) <= (self.budget.max_cost or np.inf):
            correct = self.target.are_correct()
        else:
            correct = None
        if correct is None:
            return None
        return share_interval(int(correct.sum()), len(correct)).including(half_means(correct))

    def cost_of_image(self, passes: int) -> float:
        """Return what so many passes over one image cost: see `Budget`."""
        num_tokens = max(geometry.num_tokens for geometry in self.first_observation.geometries)
        return passes * self.target.num_parameters * num_tokens

    def affordable_rows(self, passes: int, of_all: bool = False) -> NDArray[np.int64] | None:
        """Return the rows of the images for a chapter that runs the model over each `passes` times; None where it would
        cost more than the budget allows; few of a model that has learnt nothing. of_all: see
        `Budget.affordable_images`."""
        count = self.budget.affordable_images(self.cost_of_image(passes), len(self.target.images), of_all)
        if count is not None and self.budget.max_cost is not None and self.accuracy is not None and not self.has_learnt:
            count = min(count, MIN_IMAGES)
        return None if count is None else self.stratified_rows(count)

    def stratified_rows(self, count: int) -> NDArray[np.int64]:
        """Return the rows of so many images, each class in its share, always the same ones."""
        images = self.target.images
        known = np.zeros(len(images), np.int64) if images.labels is None else images.labels.cpu().numpy()
        return stratified(known, count)


def save_for_samples(
    study: Study, draw: Callable[[Study, ExplainedImage, Sample], PanelFigure], stem: str
) -> list[FigureFile]:
    """Write `<stem>_sample_<i>` for each sample."""
    return [
        FigureFile(
            study.output.save(draw(study, image, sample), f"{stem}_sample_{index}"),
            f"{sample.described(image.verdict)}.",
        )
        for index, (sample, image) in enumerate(zip(study.samples, study.explained_images, strict=True))
    ]


def thumbnail(image: Tensor) -> np.ndarray:
    """uint8 [channel, height, width] to [height, width, channel], no larger than it is drawn."""
    picture = image.permute(1, 2, 0).contiguous().numpy()
    share = MAX_THUMBNAIL_SIDE / max(picture.shape[:2])
    if share >= 1:
        return picture
    size = max(1, round(picture.shape[1] * share)), max(1, round(picture.shape[0] * share))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA).reshape(size[1], size[0], -1)
