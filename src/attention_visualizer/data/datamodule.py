"""The data set's splits as batches for Lightning: normalised, ordered and augmented.

`seed` moves only the order of the training images and their augmentation.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import torch
from lightning import LightningDataModule
from torch import Tensor

from attention_visualizer.data.augmentation import augment_batch
from attention_visualizer.data.datasets import DEFAULTS, Dataset, Splits, load_dataset, mnist_folder
from attention_visualizer.data.images import DatasetDescription, DatasetName, normalise
from attention_visualizer.support import training_progress
from attention_visualizer.support.errors import UserError
from attention_visualizer.support.field_types import at_least, between, check_arguments

Batch = tuple[Tensor, Tensor]  # images float32 [batch, channel, height, width], labels int64 [batch]


def generator_for(*key: int | str) -> torch.Generator:
    """Return a CPU generator that is a function of `key`, with unrelated streams for different keys."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


class BatchLoader:
    """`length` batches for Lightning; each `iter` calls `batches` anew, when its first batch is asked for."""

    def __init__(self, length: int, batches: Callable[[], Iterator[Batch]]) -> None:
        self.length = length
        self.batches = batches

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        yield from self.batches()  # lazily: Lightning makes the iterator before it restores where it stood

    # These two tell Lightning that training can resume within an epoch; there is no state to keep, since the
    # position is the trainer's own count of batches.
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class ImageDataModule(LightningDataModule):
    """MNIST or the embedded digits, in memory, on the training device where they fit.

    name: "mnist" or "digits". data_dir: where MNIST is or shall be downloaded to (None: the environment variable
    MNIST_DIR, or else "data"). fallback: "digits" take the place of an MNIST that cannot be had; None makes that an
    error. batch_size: training images a step and process (None: the data set's own number). eval_batch_size: images
    a step without gradients. split_seed: which images are for validation. seed: order and augmentation of training
    images. augment: whether training images are moved at random, within rotation (degrees), translation (pixels),
    scaling (share of the size) and shear (pixels sideways for each pixel down), to either side, and by a smooth
    displacement of deviation elastic (pixels). fade: the last part of training, as a share, in which all of these
    fall to zero.
    Raise UserError for values that make no sense.
    """

    def __init__(
        self,
        name: DatasetName = "mnist",
        data_dir: Annotated[str | None, "give the path of a folder"] = None,
        fallback: Annotated[Literal["digits", "null"] | None, "give digits, or null for none"] = "digits",
        batch_size: Annotated[int | None, at_least(1)] = None,
        eval_batch_size: Annotated[int, at_least(1)] = 500,
        split_seed: Annotated[int, at_least(0)] = 0,
        seed: Annotated[int, at_least(0)] = 0,
        augment: bool = True,
        rotation: Annotated[float, between("degrees", 0, 180)] = 15.0,
        translation: Annotated[float, between("pixels", 0, 28)] = 2.5,
        scaling: Annotated[float, between("a share", 0, 0.9)] = 0.15,
        shear: Annotated[float, between("a share", 0, 1)] = 0.15,
        elastic: Annotated[float, between("pixels", 0, 28)] = 0.6,
        fade: Annotated[float, between("a share", 0, 1)] = 0.3,
    ) -> None:
        check_arguments("data", ImageDataModule.__init__, locals())
        super().__init__()
        self.name: DatasetName = name
        self.data_dir = mnist_folder(data_dir)
        self.fallback = None if fallback == "null" else fallback
        self.eval_batch_size = eval_batch_size
        self.split_seed = split_seed
        self.seed = seed
        self.augment = augment
        self.movement = {
            "rotation": rotation,
            "translation": translation,
            "scaling": scaling,
            "shear": shear,
            "elastic": elastic,
        }
        self.fade = fade
        self._batch_size = batch_size
        self._dataset: Dataset | None = None
        self._resident: Splits = {}  # the splits where the batches are made

    def load(self) -> None:
        """Read the images into memory, once. Raise UserError."""
        if self._dataset is not None:
            return
        dataset = load_dataset(self.name, self.data_dir, self.split_seed, self.fallback)
        training_images = len(dataset.splits["train"][1])
        if self._batch_size is not None and self._batch_size > training_images:
            raise UserError(
                f"data.batch_size={self._batch_size}: the training split has {training_images} images: give fewer"
            )
        self._dataset = dataset
        self._resident = dataset.splits

    @property
    def splits(self) -> Splits:
        """The images and labels of each split; empty before `load`."""
        return {} if self._dataset is None else self._dataset.splits

    @property
    def description(self) -> DatasetDescription:
        """Of the data set that was loaded, which a fallback may have chosen."""
        if self._dataset is None:
            raise RuntimeError("call load() first")
        return self._dataset.description

    @property
    def batch_size(self) -> int:
        """Training images a step and process."""
        return self._batch_size or DEFAULTS[self.description.name].batch_size

    @property
    def default_epochs(self) -> int:
        """Epochs that suit the data set."""
        return DEFAULTS[self.description.name].epochs

    def prepare_data(self) -> None:
        self.load()

    def setup(self, stage: str) -> None:
        self.load()
        device = self.trainer.strategy.root_device if self.trainer is not None else torch.device("cpu")
        num_bytes = sum(tensor.nbytes for split in self.splits.values() for tensor in split)
        if num_bytes < 0.25 * free_memory(device):
            self._resident = {
                split: (images.to(device), labels.to(device)) for split, (images, labels) in self.splits.items()
            }

    def teardown(self, stage: str) -> None:
        self._resident = self.splits

    @property
    def _processes(self) -> tuple[int, int]:
        """How many processes share the images, and which this one is."""
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    @property
    def batches_per_epoch(self) -> int:
        """Training batches an epoch and process, within the trainer's limit; the last, partial batch is dropped."""
        return self.batches_in(None if self.trainer is None else self.trainer.limit_train_batches)

    def batches_in(self, limit: int | float | None) -> int:
        """Count the training batches of an epoch under Lightning's `limit_train_batches`: a number, or a share."""
        batches = len(self.train_dataloader())
        if limit is None:
            return batches
        return min(batches, limit) if isinstance(limit, int) else int(batches * limit)

    @property
    def batches_done(self) -> int:
        """Training batches behind the trainer, over all epochs and, where it resumed, over all its runs."""
        if self.trainer is None:
            return 0
        # A count of our own would be one ahead after an interruption in mid-batch. This one counts a batch when its
        # step is done, before the hooks that save checkpoints.
        return training_progress.batches_done(self.trainer)

    def training_batches(self, batches_done: int) -> Iterator[Batch]:
        """Yield the batches that remain of an epoch, `batches_done` after the start of training.

        A function of integers: each epoch's order of (seed, epoch), each batch's augmentation of
        (seed, epoch, batch, rank); so it can begin anywhere.
        """
        world_size, rank = self._processes
        epoch, first = divmod(batches_done, self.batches_per_epoch)
        images, labels = self._resident["train"]
        order = torch.randperm(len(labels), generator=generator_for("order", self.seed, epoch)).to(labels.device)
        for batch in range(first, self.batches_per_epoch):
            start = (batch * world_size + rank) * self.batch_size
            chosen = order[start : start + self.batch_size]
            pixels = images[chosen]
            if self.augment:
                generator = generator_for("augmentation", self.seed, epoch, batch, rank)
                strength = self.strength(epoch * self.batches_per_epoch + batch)
                movement = {name: amount * strength for name, amount in self.movement.items()}
                pixels = augment_batch(pixels, generator, **movement)
            yield normalise(pixels, self.description), labels[chosen]

    def strength(self, batches_done: int) -> float:
        """Return the augmentation's strength: 1, falling to 0 in the last `fade` of a training of known length."""
        total = None if self.trainer is None else training_progress.total_batches(self.trainer, self.batches_per_epoch)
        if total is None or self.fade == 0.0:
            return 1.0
        return min(1.0, max(0.0, (1.0 - batches_done / total) / self.fade))

    def evaluation_batches(self, split: str) -> Iterator[Batch]:
        """Yield all images of a split in their order; each process has every world-size-th of them."""
        world_size, rank = self._processes
        images, labels = (tensor[rank::world_size] for tensor in self._resident[split])
        for pixels, truth in zip(images.split(self.eval_batch_size), labels.split(self.eval_batch_size), strict=True):
            yield normalise(pixels, self.description), truth

    def train_dataloader(self) -> BatchLoader:
        world_size, _ = self._processes
        length = len(self.splits["train"][1]) // (self.batch_size * world_size)
        return BatchLoader(length, lambda: self.training_batches(self.batches_done))

    def val_dataloader(self) -> BatchLoader:
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> BatchLoader:
        return self._evaluation_loader("test")

    def _evaluation_loader(self, split: str) -> BatchLoader:
        world_size, rank = self._processes
        num_images = len(range(rank, len(self.splits[split][1]), world_size))
        length = math.ceil(num_images / self.eval_batch_size)
        return BatchLoader(length, lambda: self.evaluation_batches(split))

    def _recipe(self) -> dict[str, Any]:
        """Return what must be the same for a resumed run to go on with the same sequence of batches."""
        return {
            "name": self.description.name,
            "batch_size": self.batch_size,
            "split_seed": self.split_seed,
            "seed": self.seed,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"batches_done": self.batches_done, **self._recipe()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare only: the position itself is the trainer's own count. Raise UserError before a muddled resume."""
        if self.trainer is not None and self.trainer.state.fn != "fit":
            return
        if not isinstance(state_dict, dict):
            raise UserError(f"the checkpoint's data are {state_dict!r:.60}: it was edited, start a new run")
        for field, value in self._recipe().items():
            found = state_dict.get(field, value)
            if not isinstance(found, type(value)) or found != value:
                raise UserError(
                    f"data.{field}={value}: the run to resume has {found!r:.60}: give the same, "
                    "or start a new run without ckpt_path"
                )


def free_memory(device: torch.device) -> float:
    """Return the bytes that are free on an accelerator; 0 for the CPU, where the images are already."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return 0
