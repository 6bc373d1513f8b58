"""The images that are observed again and again while a model trains: given, or the first of each class."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from lightning import Trainer
from lightning.pytorch.trainer.states import RunningStage
from numpy.typing import NDArray
from torch import Tensor

from attention_visualizer.support.errors import UserError

MAX_PROBES = 10
IMAGES = ("pixel_values", "image", "images")  # in batches that are dictionaries
LABELS = ("labels", "label", "targets", "target")


def check_probes(images: Tensor, labels: Tensor | None) -> None:
    """Raise UserError unless images are [probe, channel, height, width] and labels [probe], or None."""
    if not isinstance(images, Tensor):
        raise UserError(f"probe_images is of type {type(images).__name__}: {EXPECTED}")
    if images.ndim != 4 or not images.is_floating_point() or not images.numel():
        raise UserError(f"probe_images is {images.dtype} {list(images.shape)}: {EXPECTED}")
    if not bool(images.isfinite().all()):
        raise UserError("probe_images has NaN or infinite values")
    if labels is None:
        return
    if not isinstance(labels, Tensor) or labels.shape != images.shape[:1] or labels.is_floating_point():
        given = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise UserError(f"probe_labels is {given}: give whole numbers [{len(images)}], one for each probe image")


EXPECTED = "give floating-point numbers [probe, channel, height, width], as the model expects them"


def images_and_labels(batch: Any) -> tuple[Tensor, Tensor] | None:
    """Return images [n, channel, height, width] and labels [n] of a batch: (images, labels, ...) or a dictionary.

    None where it is not such a batch.
    """
    if isinstance(batch, Mapping):
        images = next((batch[name] for name in IMAGES if name in batch), None)
        labels = next((batch[name] for name in LABELS if name in batch), None)
    elif isinstance(batch, list | tuple) and len(batch) >= 2:
        images, labels = batch[0], batch[1]
    else:
        return None
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        return None
    if not isinstance(labels, Tensor) or labels.shape != images.shape[:1] or labels.is_floating_point():
        return None
    return images, labels


def first_of_each_class(batches: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Return the first image of each class in the validation set's own order, by class, at most ten, and their labels.

    Raise UserError where there is no image or no label to go by.
    """
    by_class: dict[int, Tensor] = {}
    for batch in batches:
        pair = images_and_labels(batch)
        if pair is None:
            raise UserError(
                "AttentionLogger: validation batches are not (images [n, channel, height, width], labels [n]) with a "
                "label for each image: pass probe_images="
            )
        for image, label in zip(pair[0], pair[1].tolist(), strict=True):
            if int(label) not in by_class and image.shape != next(iter(by_class.values()), image).shape:
                raise UserError("AttentionLogger: validation images are of different sizes: pass probe_images=")
            by_class.setdefault(int(label), image)
        if len(by_class) >= MAX_PROBES:
            break
    if not by_class:
        raise UserError("AttentionLogger: there is no validation data to choose images from: pass probe_images=")
    labels = sorted(by_class)[:MAX_PROBES]
    return torch.stack([by_class[label] for label in labels]), torch.tensor(labels)


def validation_batches(trainer: Trainer) -> Iterator[Any]:
    """Yield the first validation loader's batches as the validation step gets them: on its device, after its hooks."""
    loader: Any = trainer.val_dataloaders
    while isinstance(loader, list | tuple | dict):
        loader = next(iter(loader.values() if isinstance(loader, dict) else loader), None)
    if loader is None:
        return
    limit = next(iter(trainer.num_val_batches), math.inf)
    for batch in itertools.islice(loader, None if math.isinf(limit) else int(limit)):
        stage = trainer.state.stage
        trainer.state.stage = RunningStage.VALIDATING  # hooks that augment ask for it
        try:
            batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)
        finally:
            trainer.state.stage = stage
        yield batch


def displayable(images: Tensor) -> NDArray[np.uint8]:
    """Return model inputs as images [n, height, width, channel], each stretched from its darkest to its lightest value.

    Grey or red, green and blue; of other channels, such as those of a satellite, the mean is shown.
    """
    images = images.detach().float()
    if images.shape[1] not in (1, 3):
        images = images.mean(dim=1, keepdim=True)
    low = images.amin(dim=(1, 2, 3), keepdim=True)
    high = images.amax(dim=(1, 2, 3), keepdim=True)
    scaled = (images - low) / (high - low).clamp_min(1e-12)
    return (scaled * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
