"""Which single images the figures show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from attention_visualizer.analysis.study.target import Target
from attention_visualizer.attention.outputs import class_scores, predict
from attention_visualizer.data.image_sets import ImageFolder, ImageSet, LabelledImageSet, read_formatted
from attention_visualizer.data.images import read_image
from attention_visualizer.measures.intervals import learnt_threshold
from attention_visualizer.support.errors import UserError
from attention_visualizer.support.text import printable

ERROR_SHARE = 4  # one in so many samples is an error, unless other samples are asked for


@dataclass(frozen=True)
class Sample:
    image: Tensor  # uint8 [channel, height, width]
    label: int | None  # its class, if known
    source: str  # what to call it

    def described(self, verdict: str) -> str:
        """Return what to call it, with what the model says of it where that is known."""
        return f"{self.source}: {verdict}" if verdict else self.source


@dataclass(frozen=True)
class SampleChoice:
    num_samples: int = 8
    samples: Sequence[int] | None = None  # rows of the image set
    class_: int | None = None
    wrong: bool = False  # only images that the model gets wrong
    image: str | None = None  # a picture file instead


def find_samples(target: Target, choice: SampleChoice) -> list[Sample]:
    """Return the samples of a choice. Raise UserError for a choice that contradicts itself or fits no image."""
    named = [name for name in ("image", "samples") if getattr(choice, name) is not None]
    rules = [name for name, on in (("class", choice.class_ is not None), ("wrong", choice.wrong)) if on]
    if len(named) + bool(rules) > 1:
        raise UserError(f"{named[0]}= selects the images: leave out {', '.join([*named[1:], *rules])}=")
    images = target.images
    if choice.image is not None:
        return [Sample(read_sample(choice.image, images), None, printable(Path(choice.image).name))]
    if choice.num_samples < 1:
        raise UserError(f"num_samples={choice.num_samples}: give a whole number of at least 1")
    labels = images.labels
    if labels is None and rules:
        raise UserError(f"{rules[0]}= needs images whose classes are known, such as a test set: leave it out")
    classes = images.num_classes
    if choice.class_ is not None and classes is not None and not 0 <= choice.class_ < classes:
        raise UserError(f"class={choice.class_}: give a class from 0 to {classes - 1}")
    wrong = torch.cat(list(wrong_answers(target))) if choice.wrong else None
    one_class = torch.zeros(len(images), dtype=torch.long) if labels is None else labels
    rows = choose_samples(one_class, choice.num_samples, choice.samples, choice.class_, wrong)
    if labels is not None and choice.samples is None and not rules:
        errors = first_errors(target, labels, rows)
        rows = [row for row in rows if row not in errors][: len(rows) - len(errors)] + errors
    return [
        Sample(image, None if labels is None else int(labels[row]), images.name(row))
        for row, image in zip(rows, images.read(rows), strict=True)
    ]


def read_sample(path: str, images: ImageSet) -> Tensor:
    """A picture file in the form of the image set: uint8 [channel, height, width]."""
    if isinstance(images, LabelledImageSet):
        return read_image(path, images.description)
    assert isinstance(images, ImageFolder)
    return read_formatted(path, images.format)


def choose_samples(
    labels: Tensor, num_samples: int, chosen: Sequence[int] | None, class_: int | None, wrong: Tensor | None
) -> list[int]:
    """Return rows of the test set, by a fixed rule.

    `chosen` are taken as they are. Otherwise, among the images of class `class_` and of the mask `wrong` where those
    are given: in test-set order, the first image of each class, then the second of each, and so on.
    Raise UserError for rows outside the test set, and when nothing is left to choose from.
    """
    if chosen is not None:
        outside = [row for row in chosen if not 0 <= row < len(labels)]
        if outside or not chosen:
            raise UserError(f"samples={list(chosen)}: give indices from 0 to {len(labels) - 1} of the test set")
        return list(chosen)
    allowed = torch.ones(len(labels), dtype=torch.bool) if wrong is None else wrong.cpu().clone()
    if class_ is not None:
        allowed &= labels == class_
    candidates = allowed.nonzero()[:, 0]
    if not len(candidates):
        raise UserError("no test image fits: the model makes no such mistake (leave out wrong= or class=)")
    rounds = torch.zeros(len(candidates), dtype=torch.long)
    for label in labels[candidates].unique():
        of_class = labels[candidates] == label
        rounds[of_class] = torch.arange(int(of_class.sum()))
    order = np.lexsort((candidates.numpy(), rounds.numpy()))  # by round, then as in the test set
    return candidates[order[:num_samples]].tolist()


def first_errors(target: Target, labels: Tensor, rows: Sequence[int]) -> list[int]:
    """Return rows that are to stand for the last one in ERROR_SHARE of these: in test-set order, the first images of
    different classes that the model gets wrong. None of a model that has learnt nothing, or makes no other mistake.

    No more of the test set is looked at than is needed.
    """
    count, num_classes = len(rows) // ERROR_SHARE, target.first_observation.num_classes
    if not count or not num_classes:
        return []
    wrong, seen, num_wrong = torch.zeros(len(labels), dtype=torch.bool), 0, 0
    for mask in wrong_answers(target):
        wrong[seen : seen + len(mask)] = mask
        seen, num_wrong = seen + len(mask), num_wrong + int(mask.sum())
        wrong[list(rows[:-count])] = False
        if len(labels[wrong].unique()) >= count:
            break
    learnt = 1 - num_wrong / seen > learnt_threshold(1 / num_classes)
    return choose_samples(labels, count, None, None, wrong) if learnt and wrong.any() else []


def wrong_answers(target: Target) -> Iterator[Tensor]:
    """Yield whether the model gets each image wrong, batch by batch: bool [image]."""
    for images, labels in target.batches():
        assert labels is not None
        with torch.no_grad():
            predicted, _ = predict(class_scores(target.model, images, target.model(images)), len(images))
        yield torch.from_numpy(predicted) != labels.cpu()


def check_sample(sample: Sample, images: ImageSet) -> None:
    """Raise UserError for an image or a label that the model cannot take."""
    shape, classes = images.shape, images.num_classes
    if tuple(sample.image.shape) != shape:
        raise UserError(f"{sample.source} has shape {list(sample.image.shape)}, but the model takes {list(shape)}")
    if sample.label is not None and (sample.label < 0 or (classes is not None and sample.label >= classes)):
        known = "0 or more" if classes is None else f"0 to {classes - 1}"
        raise UserError(f"{sample.source} has label {sample.label}: give {known}, or None")
