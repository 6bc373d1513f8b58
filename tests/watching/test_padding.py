"""Statistics of several processes count each image once, whatever their samplers repeat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from attention_visualizer.attention.capture import AttentionLayer
from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.measures.streaming import AttentionStatistics
from attention_visualizer.watching.attention_logger import AttentionLogger
from attention_visualizer.watching.padding import BatchShare, share_of_batch
from attention_visualizer.watching.validation import counted
from tests.helpers.trainers import Steps, fit, kept_in, loader, vit

DATA: Any = loader().dataset


@pytest.mark.parametrize("options", [{"shuffle": False}, {"shuffle": True}, {"drop_last": True}], ids=str)
@pytest.mark.parametrize(
    ("number", "processes", "size"), [(23, 2, 5), (24, 2, 5), (23, 5, 2), (2, 4, 3), (1, 3, 1), (31, 2, 16)]
)
def test_each_image_is_counted_once(number: int, processes: int, size: int, options: dict[str, bool]) -> None:
    counted_images: list[Tensor] = []
    data = TensorDataset(torch.arange(number))
    for rank in range(processes):
        sampler = DistributedSampler(data, processes, rank, **options)
        batches = DataLoader(data, size, sampler=sampler)
        for position, (batch,) in enumerate(batches):
            share = share_of_batch(batches, position)
            assert share is None or share.images == len(batch)
            counted_images.append(batch[: len(batch) - (0 if share is None else share.repeated)])
    found = [image for images in counted_images for image in images.tolist()]
    assert len(found) == len(set(found)) == (number // processes * processes if "drop_last" in options else number)


@pytest.mark.parametrize(
    "other", [loader(), [(1, 2)], DataLoader(DATA, batch_size=None, sampler=DistributedSampler(DATA, 2, 1))]
)
def test_other_loaders_repeat_nothing(other: Any) -> None:
    assert share_of_batch(other, 0) is None


def layer(images: int, geometry: Geometry, windows: int = 1) -> AttentionLayer:
    keys = geometry.num_tokens
    weights = torch.randn(images * windows, 3, keys, keys).softmax(dim=-1)
    return AttentionLayer("attn", 0, weights, torch.randn(images * windows, 3, keys, 2), geometry, 0.0)


def test_windows_go_with_their_image() -> None:
    windowed = Geometry((4, 6), 0, (5, 5), window=(2, 2))
    assert len(counted(layer(5, windowed, windows=6), BatchShare(5, 2)).weights) == 3 * 6
    whole = layer(5, Geometry((3, 3), 1, (5, 5)))
    assert torch.equal(counted(whole, BatchShare(5, 1)).weights, whole.weights[:4])
    assert counted(whole, None) is whole and counted(whole, BatchShare(4, 1)) is whole
    twice = layer(10, Geometry((3, 3), 1, (5, 5)))  # an image and its mirror image: which are repeated is not known
    assert counted(twice, BatchShare(5, 1)) is twice


def test_a_batch_of_repeated_images_alone_counts_nothing() -> None:
    statistics = AttentionStatistics()
    statistics.update(counted(layer(2, Geometry((3, 3), 1, (5, 5))), BatchShare(2, 2)))
    assert statistics.layer_names == ["attn"]  # as in the other processes, with which it is added up
    statistics.update(layer(3, Geometry((3, 3), 1, (5, 5))))
    assert statistics.compute()["entropy"].n == 3 and np.isfinite(statistics.compute()["entropy"].mean).all()


def test_a_process_of_a_training_counts_its_share(tmp_path: Path) -> None:
    for rank, images in ((0, 12), (1, 11)):
        torch.manual_seed(5)
        folder = tmp_path / str(rank)
        share = DataLoader(DATA, 5, sampler=DistributedSampler(DATA, 2, rank, shuffle=False))
        watching = AttentionLogger(early_frames=False)
        fit(folder, Steps(vit(num_layers=1)), watching, validation=share, max_epochs=1)
        assert kept_in(folder).column("validations", "images").tolist() == [images]
