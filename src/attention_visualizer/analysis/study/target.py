"""The model under analysis, the images that it is given, and how its attention is read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from attention_visualizer.analysis.study.survey import Survey, survey_model
from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.attention.inputs import input_type
from attention_visualizer.attention.outputs import class_scores, predict
from attention_visualizer.data.image_sets import ImageSet
from attention_visualizer.measures.map_measures import Query
from attention_visualizer.measures.observation import Observation, RolloutOptions, RowOptions, observe

MAX_IMAGES = 500  # at once
MAX_LAYER_BYTES = 2**28  # of the attention weights of one layer, of all images at once
COPIES = 8  # of them that capture and measures hold at the same time: 4.2 were measured
Rows = Sequence[int] | NDArray[np.int64]


@dataclass
class BatchLimit:
    """The largest number of images that go through a model together, which may turn out to be too large."""

    images: int

    def halve(self) -> bool:
        """Return False where it is one image already."""
        self.images = max(1, (before := self.images) // 2)
        return self.images < before


@dataclass(frozen=True)
class Target:
    model: nn.Module
    images: ImageSet
    geometry: Geometry | None = None  # for models that do not declare theirs
    query: Query | None = None  # None: the query that the model reads out
    rollout: RolloutOptions = RolloutOptions()
    device: torch.device = torch.device("cpu")
    limit: BatchLimit = field(default_factory=lambda: BatchLimit(MAX_IMAGES))

    @property
    def num_parameters(self) -> int:
        return sum(each.numel() for each in self.model.parameters() if not is_lazy(each))

    def with_model(self, model: nn.Module) -> Target:
        return replace(self, model=model)

    def with_images(self, images: ImageSet) -> Target:
        """The same with pictures that are described otherwise; what was observed on them is kept."""
        described = replace(self, images=images)
        if "first_observation" in self.__dict__:
            described.__dict__["first_observation"] = self.first_observation
        return described

    def model_input(self, images: Tensor) -> Tensor:
        """Normalise uint8 or 0..1 float images [image, channel, height, width] as the model expects them, in the type
        of its weights."""
        return self.images.model_input(images.to(self.device)).to(input_type(self.model))

    def batches(self, rows: Rows | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield model inputs with labels (None where they are not known), in batches of bounded memory.

        rows: indices into the image set; None for all of it in order.
        """
        rows = range(len(self.images)) if rows is None else rows
        labels, size = self.images.labels, min(self.limit.images, batch_size(self.images.shape))
        for start in range(0, len(rows), size):
            batch = [int(row) for row in rows[start : start + size]]
            yield (
                self.model_input(self.images.read(batch)),
                None if labels is None else labels[batch].to(self.device),
            )

    def observe(self, images: Tensor, rows: RowOptions | None = None) -> Observation:
        """Capture the attention on uint8 images [image, channel, height, width]."""
        images = self.model_input(images)
        return observe(self.model, images, self.query, self.geometry, self.rollout, rows=rows)

    @cached_property
    def first_observation(self) -> Observation:
        """One image's: which layers there are and how their tokens lie."""
        return self.observe(self.images.read([0]))

    def are_correct(self, rows: Rows | None = None) -> NDArray[np.bool_] | None:
        """Return which of the images of these rows (None for all) are classified correctly; None where that is not
        known."""
        answers = []
        with torch.no_grad():
            for batch, labels in self.batches(rows):
                predicted, _ = predict(class_scores(self.model, batch, self.model(batch)), len(batch))
                if labels is None or (predicted < 0).any():
                    return None
                answers.append(predicted == labels.cpu().numpy())
        return np.concatenate(answers)

    def survey(self, rows: Rows | None = None) -> Survey:
        """Survey the images of these rows, None for all; `Survey.kept` are positions in `rows`."""
        labels, count = self.images.labels, len(self.images)
        if rows is not None:
            labels, count = None if labels is None else labels[torch.as_tensor(rows)], len(rows)
        return survey_model(self.model, self.batches(rows), labels, count, self.geometry, self.rollout)


def batch_size(shape: tuple[int, int, int]) -> int:
    """Return the number of images [channel, height, width] at once: bounds memory; larger batches are no faster on a
    CPU."""
    return max(8, min(MAX_IMAGES, MAX_IMAGES * 28 * 28 // (shape[1] * shape[2])))


def affordable_images(observation: Observation, available: int | None) -> int:
    """Return how many images at once leave the weights of one layer, and what is computed from them, small enough for
    so many available bytes of memory."""
    heads = (~np.isnan(observation.entropy[0])).sum(axis=1)
    weights = max(
        int(number) * math.prod(each.windows) * each.num_tokens**2
        for number, each in zip(heads, observation.geometries, strict=True)
    )
    bound = MAX_LAYER_BYTES if available is None else min(MAX_LAYER_BYTES, available // COPIES)
    return max(1, min(MAX_IMAGES, bound // (4 * weights)))
