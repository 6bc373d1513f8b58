"""The images that are observed again and again while a model trains: given, or the first of each class."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset

from attention_visualizer.attention.inputs import holds_pixels
from attention_visualizer.attention.kept_state import kept_state
from attention_visualizer.support.errors import UserError
from attention_visualizer.watching.lightning_internals import validation_loaders
from attention_visualizer.watching.lightning_package import CombinedLoader, LightningModule, RunningStage, Trainer

MAX_PROBES = 10
MAX_INDICES = 1_000_000  # of images to choose from: a sampler may have no end
NO_DATA = "AttentionLogger: there is no validation data to choose images from: pass probe_images="
IMAGES = ("pixel_values", "image", "images")  # in batches that are dictionaries
LABELS = ("labels", "label", "targets", "target")


def check_probes(images: Tensor, labels: Tensor | None) -> None:
    """Raise UserError unless images are [probe, channel, height, width] and labels [probe], or None."""
    if not isinstance(images, Tensor):
        raise UserError(f"probe_images is of type {type(images).__name__}, not torch.Tensor: {EXPECTED}")
    if images.ndim != 4 or not holds_pixels(images) or not images.numel():
        raise UserError(f"probe_images is {images.dtype} {list(images.shape)}: {EXPECTED}")
    if not bool(images.isfinite().all()):
        raise UserError("probe_images has NaN or infinite values")
    if labels is None:
        return
    if not isinstance(labels, Tensor) or labels.shape != images.shape[:1] or labels.is_floating_point():
        given = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise UserError(f"probe_labels is {given}: give a torch.Tensor of {len(images)} whole numbers, one an image")


EXPECTED = "give numbers [probe, channel, height, width], as the model expects them"


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
    if not isinstance(images, Tensor) or images.ndim != 4 or not holds_pixels(images):
        return None
    if not isinstance(labels, Tensor) or labels.shape != images.shape[:1] or labels.is_floating_point():
        return None
    return images, labels


def as_probes(batch: Any) -> tuple[Tensor, Tensor]:
    """Return the images and labels of a batch. Raise UserError where there is no image or no label to go by."""
    pair = images_and_labels(batch)
    if pair is None:
        raise UserError(
            "AttentionLogger: validation batches are not (images [n, channel, height, width], labels [n]) with a "
            "label for each image: pass probe_images="
        )
    return pair


def first_of_each_class(batches: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Return the first image of each class, by class, at most ten, and their labels.

    Raise UserError where there is no image or no label to go by.
    """
    by_class: dict[int, Tensor] = {}
    for batch in batches:
        images, labels = as_probes(batch)
        for image, label in zip(images, labels.tolist(), strict=True):
            if int(label) not in by_class and image.shape != next(iter(by_class.values()), image).shape:
                raise UserError("AttentionLogger: validation images are of different sizes: pass probe_images=")
            by_class.setdefault(int(label), image)
        if len(by_class) >= MAX_PROBES:
            break
    if not by_class:
        raise UserError(NO_DATA)
    chosen = sorted(by_class)[:MAX_PROBES]
    return torch.stack([by_class[label] for label in chosen]), torch.tensor(chosen)


def images_of_validation(trainer: Trainer, pl_module: LightningModule) -> tuple[Tensor, Tensor] | None:
    """Return the first validation image of each class and their labels, ten at most; where labels are known only with
    the images, ten images from the first to the last. No others are read, and no loader, data set or module notices.

    None where images can be had from the validation pass alone: of a stream, of a loader of another kind.
    Raise UserError where there is no validation data, or its batches are not images and labels.
    """
    with kept_state(pl_module, getattr(trainer, "datamodule", None)):
        try:
            loaders = flat_loaders(validation_loaders(trainer))
        except Exception:  # of a hook that is called before its time
            return None
        if not loaders:
            raise UserError(NO_DATA)
        loader = loaders[0]
        if not is_indexed(loader):
            return None
        with kept_state(loader):
            try:
                indices = validated_indices(loader, trainer.limit_val_batches)
                labels = known_labels(loader.dataset)
                chosen = spread(indices) if labels is None else first_of_each(indices, labels)
                batch = as_validated(read(loader, chosen), trainer)
            except Exception:  # of a data set that is read by worker processes alone
                return None
            if labels is not None:
                return first_of_each_class([batch])
            return as_probes(batch)


def flat_loaders(loaders: Any) -> list[Any]:
    """Return all loaders in lists, dictionaries and CombinedLoader, in Lightning's order."""
    if isinstance(loaders, CombinedLoader):
        return flat_loaders(loaders.iterables)
    if isinstance(loaders, list | tuple | dict):
        each = loaders.values() if isinstance(loaders, dict) else loaders
        return list(itertools.chain.from_iterable(map(flat_loaders, each)))
    return [] if loaders is None else [loaders]


def is_indexed(loader: Any) -> bool:
    """Whether images can be read by their numbers, beside the loader."""
    return (
        isinstance(loader, DataLoader)
        and type(loader).__iter__ is DataLoader.__iter__
        and not isinstance(loader.dataset, IterableDataset)
        and loader.batch_sampler is not None
    )


def validated_indices(loader: DataLoader[Any], limit: int | float | None) -> list[Any]:
    """Return the indices of the images that a validation reads, in its order; all of them if it reads none.

    limit: Lightning's `limit_val_batches`, a number or a share.
    """
    assert loader.batch_sampler is not None
    number: int | None = None
    if isinstance(limit, int):
        number = limit
    elif limit is not None and limit < 1.0:
        number = int(limit * len(loader))
    batches = itertools.islice(loader.batch_sampler, number or None)
    return list(itertools.islice(itertools.chain.from_iterable(batches), MAX_INDICES))


def known_labels(dataset: Any) -> Sequence[int] | None:
    """Return the label of each index of a data set, where it knows them without reading images."""
    if isinstance(dataset, Subset):
        inner = known_labels(dataset.dataset)
        return None if inner is None else [inner[index] for index in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [known_labels(part) for part in dataset.datasets]
        return None if None in parts else list(itertools.chain.from_iterable(parts))  # type: ignore[arg-type]
    tensors = dataset.tensors[1:2] if isinstance(dataset, TensorDataset) else ()
    for labels in (*tensors, *(getattr(dataset, "__dict__", {}).get(name) for name in LABELS)):
        whole = np.asarray(labels) if isinstance(labels, Tensor | np.ndarray | list | tuple) else np.empty(0)
        if whole.shape == (len(dataset),) and whole.dtype.kind in "iu":
            return whole.tolist()
    return None


def first_of_each(indices: Sequence[Any], labels: Sequence[int]) -> list[Any]:
    first: dict[int, Any] = {}
    for index in indices:
        first.setdefault(labels[index], index)
    return [first[label] for label in sorted(first)[:MAX_PROBES]]


def spread(indices: Sequence[Any]) -> list[Any]:
    number = min(MAX_PROBES, len(indices))
    return [indices[position * len(indices) // number] for position in range(number)]


def read(loader: DataLoader[Any], indices: list[Any]) -> Any:
    """Return a batch of these images, as the loader makes it."""
    dataset = loader.dataset
    if hasattr(dataset, "__getitems__"):
        return loader.collate_fn(dataset.__getitems__(indices))
    return loader.collate_fn([dataset[index] for index in indices])


def as_validated(batch: Any, trainer: Trainer) -> Any:
    """Return a batch as the validation step gets it: on its device, after its hooks."""
    stage = trainer.state.stage
    trainer.state.stage = RunningStage.VALIDATING  # hooks that augment ask for it
    try:
        return trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)
    finally:
        trainer.state.stage = stage


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
