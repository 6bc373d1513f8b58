"""What is analysed: a model with its weights, the test images, the chosen samples, and where figures go."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import cv2
import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from attention_visualizer.analysis.study.compared_runs import ComparedRun
from attention_visualizer.analysis.study.survey import Survey, take_survey
from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.attention.outputs import has_head, predict
from attention_visualizer.data.image_sets import ImageSet
from attention_visualizer.figures import charts
from attention_visualizer.figures.attention_figures import ExplainedImage, class_name
from attention_visualizer.figures.panels import PanelFigure, encode_png
from attention_visualizer.files import atomic
from attention_visualizer.measures.intervals import Interval, share_interval, stratified
from attention_visualizer.measures.map_measures import Query
from attention_visualizer.measures.observation import Observation, RolloutOptions, observe
from attention_visualizer.models.untrained import random_weights
from attention_visualizer.report.chapter import FigureFile
from attention_visualizer.runs.history import AttentionHistory
from attention_visualizer.support.errors import UserError
from attention_visualizer.support.parallel import on_all_cores

FileFormat = Literal["png", "pdf", "svg"]
HeadLayers = Literal["all", "last"]
# What an analysis writes.
ANALYSIS_FILE_NAMES = re.compile(
    r"(attention_(pattern|heads|methods)|layer_comparison)_sample_\d+\.(png|pdf|svg)"
    r"|attention_(statistics(_by_(head|class))?|atlas(_(differences|rollout))?|roles|redundancy|importance|trust|claims|evolution"
    r"|across_(seeds|runs))"
    r"\.(png|pdf|svg|webp|csv|json)"
)
LARGEST_DRAWN = 224  # pixels a side, twice those of a tile


@dataclass(frozen=True)
class Sample:
    """One picture to look at: uint8 [channel, height, width], its class if known, and what to call it."""

    image: Tensor
    label: int | None
    source: str


@dataclass(frozen=True)
class Budget:
    """How much is spent where a chapter runs the model many times.

    pictures: of a stratified subset, None for all; controls: models with random weights; max_cost: the most that such a
    chapter may cost in passes x pictures x parameters x tokens, None for no bound.
    """

    pictures: int | None
    controls: int
    max_cost: float | None = None


# The default model costs 1.4e7 a picture and pass; two cores do about 5e10 of them in a second.
QUICK, FULL = Budget(500, 3, 1e12), Budget(2000, 10, 1e13)
LEAST_PICTURES = 30  # with fewer, intervals say nothing
CONTROL_PICTURES = 1000  # that each control model looks at
FIRST_CONTROL = 1000  # the seed of the first control: no run is likely to have it


@dataclass
class Study:
    """pictures: the test set, or what else the model is looked at with. watermark stands on every figure.

    weights: what the weights are, in words; query: None for the one that the model reads out; history: of the
    training, where the checkpoint comes from a run; given_geometry: for models that do not state theirs; others: the
    runs to compare, this one among them, empty where none were asked for.
    """

    model: nn.Module
    pictures: ImageSet
    output: Path
    weights: str
    watermark: str = ""
    history: AttentionHistory | None = None
    samples: Sequence[Sample] = ()
    query: Query | None = None
    given_geometry: Geometry | None = None
    rollout: RolloutOptions = field(default_factory=RolloutOptions)
    file_format: FileFormat = "png"
    head_layers: HeadLayers = "all"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    budget: Budget = QUICK
    others: Sequence[ComparedRun] = ()
    progress: Callable[[str], None] = lambda doing: None  # told what is being done within a chapter
    reconstruction_error: float = 0.0  # the largest that any capture of this study measured

    @cached_property
    def first_look(self) -> Observation:
        """At one picture: which layers there are and how their tokens lie."""
        return self.observe(self.pictures.read([0]))

    @cached_property
    def survey(self) -> Survey:
        """Of all pictures."""
        self.progress(f"attention of {len(self.pictures):,} {self.pictures.kind}s")
        return self.survey_of(self.batches(), self.pictures.labels, len(self.pictures))

    def survey_of(
        self, batches: Iterable[tuple[Tensor, Tensor | None]], labels: Tensor | None, num_pictures: int
    ) -> Survey:
        """Of other images: see `take_survey`."""
        found = take_survey(self.model, batches, labels, num_pictures, self.given_geometry, self.rollout)
        self.reconstruction_error = max(self.reconstruction_error, found.reconstruction_error)
        return found

    @cached_property
    def control_models(self) -> list[nn.Module]:
        """The same architecture with random weights, so many as `effort` says."""
        return [random_weights(self.model, FIRST_CONTROL + number) for number in range(self.budget.controls)]

    @cached_property
    def control_surveys(self) -> list[Survey]:
        """Of the control models, over a stratified subset of the pictures: `Survey.kept` are rows of that subset."""
        numbers = self.subset(CONTROL_PICTURES)
        labels = None if self.pictures.labels is None else self.pictures.labels[torch.from_numpy(numbers)]

        def survey_one(model: nn.Module) -> Survey:
            return take_survey(model, self.batches_of(numbers), labels, len(numbers), self.given_geometry, self.rollout)

        self.progress(f"{len(self.control_models)} models with random weights")
        return on_all_cores(survey_one, self.control_models, self.device)

    def subset_for(self, passes: int) -> NDArray[np.int64] | None:
        """Numbers of the pictures for a chapter that runs the model over each `passes` times; None where it would cost
        more than `effort` allows."""
        count, max_cost = self.budget.pictures, self.budget.max_cost
        if max_cost is not None:
            count = min(len(self.pictures) if count is None else count, int(max_cost / self.cost_of(passes)))
            if count < LEAST_PICTURES:
                return None
        return self.subset(count)

    @cached_property
    def accuracy(self) -> Interval | None:
        """The share of all pictures that are classified right; None where that is not known, or would cost more than
        `effort` allows."""
        labels = self.pictures.labels
        if labels is None or not has_head(self.model):
            return None
        if "survey" in self.__dict__:
            right = self.survey.right
        elif self.cost_of(1) * len(self.pictures) <= (self.budget.max_cost or np.inf):
            with torch.no_grad():
                answers = [predict(self.model(batch), len(batch))[0] for batch, _ in self.batches()]
            predicted = np.concatenate(answers)
            right = None if (predicted < 0).any() else predicted == labels.cpu().numpy()
        else:
            right = None
        return None if right is None else share_interval(int(right.sum()), len(right))

    def cost_of(self, passes: int) -> float:
        """What so many passes over one picture cost: see `Budget`."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return passes * parameters * max(geometry.num_tokens for geometry in self.first_look.geometries)

    def subset(self, count: int | None) -> NDArray[np.int64]:
        """Numbers of so many pictures (None: all), each class in its share, always the same ones."""
        labels = self.pictures.labels
        known = np.zeros(len(self.pictures), np.int64) if labels is None else labels.cpu().numpy()
        return stratified(known, len(self.pictures) if count is None else count)

    def observe(self, pictures: Tensor) -> Observation:
        """pictures: uint8 [image, channel, height, width]."""
        seen = observe(self.model, self.model_input(pictures), self.query, self.given_geometry, self.rollout)
        self.reconstruction_error = max(self.reconstruction_error, seen.reconstruction_error)
        return seen

    def model_input(self, pictures: Tensor) -> Tensor:
        """uint8 or 0..1 float pictures [image, channel, height, width], as the model takes them."""
        return self.pictures.model_input(pictures.to(self.device))

    def batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """All pictures in order, in batches of bounded memory: model inputs, and labels where they are known."""
        return self.batches_of(range(len(self.pictures)))

    def batches_of(self, numbers: Sequence[int] | NDArray[np.int64]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The same of pictures by their numbers."""
        labels, size = self.pictures.labels, batch_size(self.pictures.shape)
        for start in range(0, len(numbers), size):
            rows = [int(number) for number in numbers[start : start + size]]
            yield (
                self.model_input(self.pictures.read(rows)),
                None if labels is None else labels[rows].to(self.device),
            )

    @cached_property
    def subjects(self) -> list[ExplainedImage]:
        """What the model attends to on each sample."""
        return self.look_at(self.samples)

    def look_at(self, samples: Sequence[Sample]) -> list[ExplainedImage]:
        for sample in samples:
            check_sample(sample, self.pictures)
        seen = self.observe(torch.stack([sample.image for sample in samples]))
        names = self.pictures.class_names
        return [
            ExplainedImage.of(
                seen,
                number,
                picture_of(sample.image),
                None if sample.label is None else class_name(names, sample.label),
                names,
            )
            for number, sample in enumerate(samples)
        ]

    def save_for_samples(
        self, draw: Callable[[Study, ExplainedImage, Sample], PanelFigure], stem: str
    ) -> list[FigureFile]:
        """Writes `<stem>_sample_<i>` for each sample."""
        return [
            FigureFile(
                self.save(draw(self, subject, sample), f"{stem}_sample_{number}"),
                f"{sample.source}: {subject.verdict}.",
            )
            for number, (sample, subject) in enumerate(zip(self.samples, self.subjects, strict=True))
        ]

    @contextmanager
    def saving_to(self, folder: Path) -> Iterator[None]:
        """What is saved meanwhile goes into another folder."""
        output, self.output = self.output, folder
        try:
            yield
        finally:
            self.output = output

    def save(self, figure: PanelFigure | Figure, stem: str) -> str:
        """Writes a figure whole or not at all; returns its file name."""
        path = self.output / f"{stem}.{self.file_format}"
        with atomic.atomic_path(path) as temporary:
            if isinstance(figure, PanelFigure) and self.file_format == "png":
                temporary.write_bytes(encode_png(figure.to_rgb()))
            else:
                # Text stays text in SVG files.
                with matplotlib.rc_context({"svg.fonttype": "none"}):
                    drawn = figure if isinstance(figure, Figure) else figure.to_figure()
                    charts.without_math(drawn)
                    drawn.savefig(temporary, dpi=150 if drawn is figure else "figure")
        return path.name


def batch_size(shape: tuple[int, int, int]) -> int:
    """Pictures at once, by their size: bounds memory; larger batches are no faster on a CPU."""
    return max(8, min(500, 500 * 28 * 28 // (shape[1] * shape[2])))


def check_sample(sample: Sample, pictures: ImageSet) -> None:
    """Raises UserError for a picture or a label that the model cannot take."""
    wanted, classes = pictures.shape, pictures.num_classes
    if tuple(sample.image.shape) != wanted:
        raise UserError(f"{sample.source} has shape {list(sample.image.shape)}, but the model takes {list(wanted)}")
    if sample.label is not None and (sample.label < 0 or (classes is not None and sample.label >= classes)):
        known = "0 or more" if classes is None else f"0 to {classes - 1}"
        raise UserError(f"{sample.source} has label {sample.label}: give {known}, or None")


def picture_of(image: Tensor) -> np.ndarray:
    """uint8 [channel, height, width] to [height, width, channel], no larger than it is drawn."""
    picture = image.permute(1, 2, 0).contiguous().numpy()
    share = LARGEST_DRAWN / max(picture.shape[:2])
    if share >= 1:
        return picture
    size = max(1, round(picture.shape[1] * share)), max(1, round(picture.shape[0] * share))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA).reshape(size[1], size[0], -1)
