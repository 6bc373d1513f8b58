"""What is analysed: a model with its weights, the test images, the chosen samples, and where figures go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from attention_visualizer import storage
from attention_visualizer.attention_figures import Subject
from attention_visualizer.chapter import FigureFile
from attention_visualizer.errors import UserError
from attention_visualizer.geometry import Geometry, find_geometry
from attention_visualizer.history import AttentionHistory
from attention_visualizer.images import DatasetDescription, normalise
from attention_visualizer.measures import Query
from attention_visualizer.model import VisionTransformer
from attention_visualizer.observation import observe
from attention_visualizer.panels import Picture

FileFormat = Literal["png", "pdf", "svg"]
HeadLayers = Literal["all", "last"]
BATCH_SIZE = 500  # bounds memory; larger batches are no faster on a CPU


@dataclass(frozen=True)
class Sample:
    """One picture to look at: uint8 [channel, height, width], its class if known, and what to call it."""

    image: Tensor
    label: int | None
    source: str


@dataclass
class Study:
    """images: the test set, uint8 [image, channel, height, width]; labels: [image]. face_note stands on every figure.

    weights: what the weights are, in words; query: None for the one that the model reads out; history: of the
    training, where the checkpoint comes from a run.
    """

    model: VisionTransformer
    description: DatasetDescription
    images: Tensor
    labels: Tensor
    output: Path
    weights: str
    face_note: str = ""
    history: AttentionHistory | None = None
    samples: Sequence[Sample] = ()
    query: Query | None = None
    file_format: FileFormat = "png"
    head_layers: HeadLayers = "all"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    reconstruction_error: float = 0.0  # the largest that any capture of this study measured

    @cached_property
    def geometry(self) -> Geometry:
        geometry = find_geometry(self.model)
        assert geometry is not None
        return geometry

    def model_input(self, images: Tensor) -> Tensor:
        """uint8 or 0..1 float images [image, channel, height, width], as the model takes them."""
        return normalise(images.to(self.device), self.description)

    def batches(self, images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """All of them in order, in batches of bounded memory: model inputs and labels."""
        for start in range(0, len(labels), BATCH_SIZE):
            rows = slice(start, start + BATCH_SIZE)
            yield self.model_input(images[rows]), labels[rows].to(self.device)

    @cached_property
    def subjects(self) -> list[Subject]:
        """What the model attends to on each sample."""
        return self.look_at(self.samples)

    def look_at(self, samples: Sequence[Sample]) -> list[Subject]:
        for sample in samples:
            check_sample(sample, self.description)
        seen = observe(self.model, self.model_input(torch.stack([sample.image for sample in samples])), self.query)
        self.reconstruction_error = max(self.reconstruction_error, seen.reconstruction_error)
        names = self.description.class_names
        return [
            Subject.of(
                seen, number, picture_of(sample.image), None if sample.label is None else names[sample.label], names
            )
            for number, sample in enumerate(samples)
        ]

    def save_for_samples(self, draw: Callable[[Study, Subject, Sample], Picture], stem: str) -> list[FigureFile]:
        """Writes `<stem>_sample_<i>` for each sample."""
        return [
            FigureFile(
                self.save(draw(self, subject, sample), f"{stem}_sample_{number}"),
                f"{sample.source}: {subject.verdict}.",
            )
            for number, (sample, subject) in enumerate(zip(self.samples, self.subjects, strict=True))
        ]

    def save(self, figure: Picture | Figure, stem: str) -> str:
        """Writes a figure whole or not at all; returns its file name."""
        path = self.output / f"{stem}.{self.file_format}"
        # Text stays text in SVG files.
        with storage.atomic_path(path) as temporary, matplotlib.rc_context({"svg.fonttype": "none"}):
            if isinstance(figure, Figure):
                figure.savefig(temporary, dpi=150)
            elif self.file_format == "png":
                Image.fromarray(figure.to_rgb()).save(temporary)
            else:
                figure.to_figure().savefig(temporary)
        return path.name


def check_sample(sample: Sample, description: DatasetDescription) -> None:
    """Raises UserError for a picture or a label that the model cannot take."""
    wanted = (description.channels, description.image_size, description.image_size)
    if tuple(sample.image.shape) != wanted:
        raise UserError(f"{sample.source} has shape {list(sample.image.shape)}, but the model takes {list(wanted)}")
    if sample.label is not None and not 0 <= sample.label < description.num_classes:
        raise UserError(f"{sample.source} has label {sample.label}: give 0 to {description.num_classes - 1}, or None")


def picture_of(image: Tensor) -> np.ndarray:
    """uint8 [channel, height, width] to [height, width, channel]."""
    return image.permute(1, 2, 0).contiguous().numpy()
