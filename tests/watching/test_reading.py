"""Choosing probes reads what is shown and no more, and no loader, sampler, data set or stream notices."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from attention_visualizer.support.errors import UserError
from attention_visualizer.watching.attention_logger import AttentionLogger
from attention_visualizer.watching.probes import first_of_each, known_labels, spread, validated_indices
from tests.helpers.trainers import CLASSES, IMAGES, SIZE, Steps, attention_warnings, kept_in, loader, new_trainer, vit

DATA: Any = loader().dataset


class Reads(Dataset):
    """Notes what is read, and tells the classes if asked to."""

    def __init__(self, tells: bool) -> None:
        self.read: list[int] = []
        if tells:
            self.targets = DATA.tensors[1].tolist()

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        READ.append(number)
        return DATA[number]


READ: list[int] = []


class Noisy(Dataset):
    def __init__(self, draw: Callable[[], float]) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        image, label = DATA[number]
        return image + self.draw(), label


class Counting(Noisy):
    """Keeps what it read, and returns another image each time."""

    def __init__(self) -> None:
        self.times: dict[int, int] = {}

    def draw_of(self, number: int) -> int:
        self.times[number] = self.times.get(number, 0) + 1
        return self.times[number]

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        image, label = DATA[number]
        return image * self.draw_of(number), label


class Stream(IterableDataset):
    """Goes on where it stopped."""

    def __init__(self, batches: Any) -> None:
        self.left = batches

    def __iter__(self) -> Iterator[Any]:
        return self.left


def stream() -> DataLoader:
    random = torch.Generator().manual_seed(2)
    batches = [(torch.randn(4, 1, SIZE, SIZE, generator=random), torch.tensor([2, 0, 2, 1])) for _ in range(30)]
    return DataLoader(Stream(iter(batches)), batch_size=None)


def pairs(kind: str) -> tuple[Any, Any]:
    """A training and a validation loader that share what moves when one of them is read."""
    shared, numbers = torch.Generator().manual_seed(0), np.random.default_rng(0)
    if kind == "a generator of both loaders":
        return DataLoader(DATA, 5, shuffle=True, generator=shared), DataLoader(DATA, 5, generator=shared)
    if kind == "a generator of both samplers":
        return tuple(DataLoader(DATA, 5, sampler=RandomSampler(DATA, generator=shared)) for _ in range(2))  # type: ignore
    if kind == "a generator of both data sets":
        return tuple(DataLoader(Noisy(lambda: float(torch.rand(1, generator=shared))), 5) for _ in range(2))  # type: ignore
    if kind == "a generator of NumPy":
        return tuple(DataLoader(Noisy(numbers.random), 5) for _ in range(2))  # type: ignore
    if kind == "the generator of Python":
        return tuple(DataLoader(Noisy(random.random), 5) for _ in range(2))  # type: ignore
    if kind == "an iterator of both data sets":
        left = itertools.count()
        return tuple(DataLoader(Noisy(lambda: next(left) / 9), 5) for _ in range(2))  # type: ignore
    if kind == "a data set that counts":
        both = Counting()
        return DataLoader(both, 5), DataLoader(both, 5)
    if kind == "a part drawn at random":
        return (
            DataLoader(DATA, 5, sampler=SubsetRandomSampler(range(12), generator=shared)),
            DataLoader(DATA, 5, sampler=SubsetRandomSampler(range(12, 23), generator=shared)),
        )
    if kind == "a stream":
        return DataLoader(DATA, 5), stream()
    if kind == "a stream for both":
        both_loaders = stream()
        return both_loaders, both_loaders
    assert kind == "a loader of another kind"
    return DataLoader(DATA, 5), Endless(shared)


class Endless:
    """Somebody's own loader."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield torch.randn(4, 1, SIZE, SIZE, generator=self.generator), torch.tensor([2, 0, 2, 1])


KINDS = (
    "a generator of both loaders", "a generator of both samplers", "a generator of both data sets",
    "a generator of NumPy", "the generator of Python", "an iterator of both data sets", "a data set that counts",
    "a part drawn at random", "a stream", "a stream for both", "a loader of another kind",
)  # fmt: skip


def left_by(folder: Path, kind: str, *callbacks: Any, **options: Any) -> list[Any]:
    torch.manual_seed(5)
    random.seed(5)
    module, (train, validation) = Steps(vit(num_layers=1)), pairs(kind)
    trainer = new_trainer(folder, *callbacks, limit_train_batches=2, limit_val_batches=2, **options)
    trainer.fit(module, train, validation)
    return [*module.state_dict().values(), trainer.callback_metrics["loss"], torch.rand(2), random.random()]


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_validation_get_the_same_data(tmp_path: Path, kind: str) -> None:
    with attention_warnings() as lines:
        watched = left_by(tmp_path, kind, AttentionLogger(head_grids=0))
    for one, other in zip(left_by(tmp_path, kind), watched, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
    assert lines == []
    # What cannot be read without moving it shows its images from the first validation on.
    late = kind.startswith("a stream") or kind == "a loader of another kind"
    kept = kept_in(tmp_path)
    assert kept.column("frames", "step").tolist() == ([2, 4] if late else [0, 1, 2, 4])
    assert kept.column("validations", "step").tolist() == [2, 4]


def test_a_sanity_check_has_a_streams_images_before_training(tmp_path: Path) -> None:
    states = []
    for watching in ([], [AttentionLogger()]):
        states.append(left_by(tmp_path, "a stream", *watching, num_sanity_val_steps=1))
    assert all(
        torch.equal(*pair) if isinstance(pair[0], Tensor) else pair[0] == pair[1] for pair in zip(*states, strict=True)
    )
    kept = kept_in(tmp_path)
    assert kept.column("frames", "step").tolist() == [0, 1, 2, 4] and kept.probe["labels"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("tells", [True, False])
def test_only_what_is_shown_is_read(tmp_path: Path, tells: bool) -> None:
    READ.clear()
    validation = DataLoader(Reads(tells), 5)
    new_trainer(tmp_path, AttentionLogger(), limit_val_batches=0, max_epochs=1).fit(
        Steps(vit(num_layers=1)), loader(), validation
    )
    assert READ == (list(range(CLASSES)) if tells else [number * IMAGES // 10 for number in range(10)])
    assert kept_in(tmp_path).probe["labels"].tolist() == [number % CLASSES for number in READ]


def test_a_batch_that_is_no_pair_of_images_and_labels(tmp_path: Path) -> None:
    class Images(IterableDataset):
        def __iter__(self) -> Iterator[Tensor]:
            while True:
                yield DATA[0][0]

    class OfImages(Steps):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("loss", self.model(batch).sum())

    for sanity in (1, 0):  # before training where that is known, else a line while it goes on
        options = {"num_sanity_val_steps": sanity, "limit_val_batches": 1, "max_epochs": 1}
        trainer = new_trainer(tmp_path, AttentionLogger(), **options)
        if sanity:
            with pytest.raises(UserError, match="validation batches are not .* pass probe_images="):
                trainer.fit(OfImages(vit()), loader(), DataLoader(Images(), 5))
            continue
        with attention_warnings() as lines:
            trainer.fit(OfImages(vit()), loader(), DataLoader(Images(), 5))
        (line,) = lines
        assert "no attention this time: AttentionLogger: validation batches are not" in line
        assert trainer.global_step == 5


class Module(LightningDataModule):
    """Draws its split when it is asked for the loader."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def train_dataloader(self) -> DataLoader:
        return DataLoader(DATA, 5, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        self.asked += 1
        return DataLoader(Subset(DATA, torch.randperm(IMAGES)[:12].tolist()), 5)


class Own(Steps):
    def val_dataloader(self) -> DataLoader:
        return Module().val_dataloader()


@pytest.mark.parametrize("source", ["loaders", "data module", "module"])
def test_probes_are_there_before_the_first_validation(tmp_path: Path, source: str) -> None:
    """Of an epoch that is not the first; nobody notices that the loader was asked for."""
    states = []
    for watching in ([], [AttentionLogger(head_grids=0)]):
        torch.manual_seed(5)
        data = Module()
        module = (Own if source == "module" else Steps)(vit(num_layers=1))
        trainer = new_trainer(tmp_path, *watching, check_val_every_n_epoch=2)
        if source == "data module":
            trainer.fit(module, datamodule=data)
        else:
            trainer.fit(module, data.train_dataloader(), None if source == "module" else loader())
        states.append([*module.state_dict().values(), torch.rand(2), data.asked])
    for one, other in zip(*states, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
    kept = kept_in(tmp_path)
    assert kept.column("frames", "step").tolist() == [0, 1, 2, 4, 10]
    assert kept.column("validations", "step").tolist() == [10]


def test_a_loader_that_cannot_be_had_before_its_time(tmp_path: Path) -> None:
    class Late(Steps):
        def val_dataloader(self) -> DataLoader:
            assert self.trainer.global_step, "not yet"
            return DataLoader(DATA, 5)

    with attention_warnings() as lines:
        trainer = new_trainer(tmp_path, AttentionLogger(head_grids=0), check_val_every_n_epoch=2)
        trainer.fit(Late(vit(num_layers=1)), loader())
    assert lines == [] and kept_in(tmp_path).column("frames", "step").tolist() == [10]


# --- which images ----------------------------------------------------------------------------------------------


def labelled(labels: Any) -> Any:
    data: Any = Reads(tells=False)
    data.labels = labels
    return data


@pytest.mark.parametrize(
    ("dataset", "labels"),
    [
        (DATA, [number % CLASSES for number in range(IMAGES)]),
        (Subset(DATA, [8, 3]), [1, 3]),
        (ConcatDataset([Subset(DATA, [2]), Subset(DATA, [1])]), [2, 1]),
        (ConcatDataset([Subset(DATA, [2]), Reads(tells=False)]), None),
        (labelled(np.arange(IMAGES)), list(range(IMAGES))),
        (labelled([float(each) for each in range(IMAGES)]), None),
        (labelled(["cat"] * IMAGES), None),
        (labelled([1, 2]), None),
        (TensorDataset(torch.zeros(3, 2)), None),
        (TensorDataset(torch.zeros(3, 2), torch.zeros(3, 4).long()), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_labels_that_are_known_without_the_images(dataset: Any, labels: Any) -> None:
    assert known_labels(dataset) == labels


def test_the_first_of_each_class_and_images_from_first_to_last() -> None:
    assert first_of_each([5, 1, 3, 9], [0, 2, 0, 1, 0, 0, 0, 0, 0, 0]) == [5, 3, 1]
    assert len(first_of_each(range(30), list(range(30)))) == 10
    assert spread(range(23)) == [0, 2, 4, 6, 9, 11, 13, 16, 18, 20] and spread([4, 7]) == [4, 7] and spread([]) == []


@pytest.mark.parametrize(("limit", "number"), [(None, 23), (1.0, 23), (2, 10), (0.5, 10), (0, 23), (99, 23)])
def test_indices_are_those_of_a_validation(limit: Any, number: int) -> None:
    assert validated_indices(DataLoader(DATA, 5), limit) == list(range(number))
