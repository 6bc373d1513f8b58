"""The data sets that train.py knows, in memory: MNIST or the embedded digits, split.

Which images there are and how they are split depends on the data set and on `split_seed` alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from rich.console import Console
from rich.panel import Panel
from torch import Tensor

from attention_visualizer.data.images import DatasetDescription
from attention_visualizer.data.mnist import MnistUnavailable, load_mnist
from attention_visualizer.support.errors import UserError

RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # of this process, in the environment

Splits = dict[str, tuple[Tensor, Tensor]]  # images uint8 [image, channel, height, width], labels int64 [image]


class DatasetDefaults(NamedTuple):
    batch_size: int
    epochs: int


DEFAULTS = {"mnist": DatasetDefaults(batch_size=128, epochs=10), "digits": DatasetDefaults(batch_size=32, epochs=60)}


@dataclass(frozen=True, eq=False)
class Dataset:
    splits: Splits  # "train", "validation" and "test"
    description: DatasetDescription


def load_dataset(
    name: str, data_dir: str | Path | None = None, split_seed: int = 0, fallback: str | None = "digits"
) -> Dataset:
    """Load "mnist" or "digits"; with a warning, `fallback` in the place of an MNIST that cannot be had.

    data_dir: as `mnist_folder` takes it. Raise UserError, from MnistUnavailable where MNIST cannot be had.
    """
    folder = mnist_folder(data_dir)
    try:
        splits = load_splits(name, folder, split_seed)
    except MnistUnavailable as reason:
        if fallback is None:
            raise UserError(
                f"data.data_dir={folder}: MNIST is not there, and {reason}: name a folder that holds its "
                "four files, or allow data.fallback=digits"
            ) from reason
        name = fallback
        splits = load_splits(name, folder, split_seed)
        warn_of_fallback(folder, str(reason))
    return Dataset(splits, describe(name, splits))


def mnist_folder(data_dir: str | Path | None) -> Path:
    """Return where MNIST is or shall be downloaded to; None is the environment variable MNIST_DIR, or else "data"."""
    return Path(data_dir or os.environ.get("MNIST_DIR") or "data").expanduser()


def stratified_split(labels: np.ndarray, sizes: Mapping[str, int], seed: int) -> dict[str, np.ndarray]:
    """Draw disjoint random indices into `labels` [image], ascending, `sizes[name]` for each name.

    Every part has each class in its share of the whole, to within one image or two.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    # Deals the classes out evenly: the k-th of a class of n images comes at (k + 1/2) / n, and any stretch of that
    # sequence is a stratified sample.
    moments = np.empty(len(labels))
    for label in np.unique(labels):
        members = labels[order] == label
        moments[members] = (np.arange(members.sum()) + 0.5) / members.sum()
    dealt = order[np.argsort(moments, kind="stable")]
    ends = np.cumsum(list(sizes.values()))
    return {name: np.sort(dealt[end - size : end]) for (name, size), end in zip(sizes.items(), ends, strict=True)}


def load_splits(name: str, data_dir: Path, split_seed: int) -> Splits:
    """Load the data set's images and labels as "train", "validation" and "test".

    MNIST: 55,000 and 5,000 of its 60,000 training images, and its own 10,000 test images. Digits: 1,297, 200 and
    300. Raise UserError for damaged files and MnistUnavailable.
    """
    if name == "mnist":
        files = load_mnist(data_dir)
        images, labels = files["train-images-idx3-ubyte"], files["train-labels-idx1-ubyte"]
        sizes = {"train": 55_000, "validation": 5_000}
    else:
        images, labels = load_digits()
        sizes = {"train": 1_297, "validation": 200, "test": 300}
    rows = stratified_split(labels, sizes, split_seed)
    splits = {split: _tensors(images[rows[split]], labels[rows[split]]) for split in sizes}
    if name == "mnist":
        splits["test"] = _tensors(files["t10k-images-idx3-ubyte"], files["t10k-labels-idx1-ubyte"])
    return splits


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Load scikit-learn's 1,797 scans of 8 x 8 pixels, scaled to uint8 [1797, 28, 28], and their labels [1797]."""
    import sklearn.datasets  # slow to import, and needed only here

    digits = sklearn.datasets.load_digits()
    scans = (digits.images * (255 / 16)).astype(np.float32)
    scaled = np.stack([cv2.resize(scan, (28, 28), interpolation=cv2.INTER_CUBIC) for scan in scans])
    return scaled.round().clip(0, 255).astype(np.uint8), digits.target


def _tensors(images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    return torch.tensor(images)[:, None], torch.tensor(labels, dtype=torch.int64)


def describe(name: str, splits: Splits) -> DatasetDescription:
    """Return the description of ten classes of digits, with the statistics of the training split."""
    images, _ = splits["train"]
    counts = torch.bincount(images.flatten(), minlength=256).double()
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = float((counts * levels).sum() / counts.sum())
    std = float(((counts * (levels - mean) ** 2).sum() / counts.sum()).sqrt())
    sizes = {split: len(labels) for split, (_, labels) in splits.items()}
    return DatasetDescription(name, images.shape[-1], images.shape[1], tuple("0123456789"), mean, std, sizes)


def warn_of_fallback(data_dir: Path, reason: str) -> None:
    """Print a banner on stderr that cannot be missed; of several processes, in the first alone."""
    if any(os.environ.get(rank, "0") != "0" for rank in RANKS):
        return
    text = (
        f"MNIST was not found in {data_dir}, and {reason}.\n\n"
        "The 1,797 digits of scikit-learn are used instead: 8 x 8 pixels scaled to 28 x 28. "
        "Their results are NOT MNIST results.\n\n"
        "To use MNIST, set data.data_dir=FOLDER or the environment variable MNIST_DIR to a folder that holds its four "
        "files. To stop here instead, set data.fallback=null."
    )
    Console(stderr=True).print(Panel(text, title="NOT MNIST", border_style="bold red", style="bold"))
