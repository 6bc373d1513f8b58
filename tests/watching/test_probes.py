"""The images that are observed again and again: taken from batches of any usual form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from attention_visualizer.support.errors import UserError
from attention_visualizer.watching.probes import displayable, first_of_each_class, images_and_labels

IMAGES = torch.arange(5.0).reshape(5, 1, 1, 1).expand(5, 1, 3, 2)
LABELS = torch.tensor([4, 2, 4, 7, 2])


@pytest.mark.parametrize(
    "batch",
    [
        (IMAGES, LABELS),
        [IMAGES, LABELS, ["a.png"] * 5],
        {"pixel_values": IMAGES, "labels": LABELS},
        {"image": IMAGES, "label": LABELS, "pixel_mask": None},
        {"images": IMAGES, "target": LABELS},
    ],
)
def test_batches_of_the_usual_forms(batch: Any) -> None:
    images, labels = first_of_each_class([batch, batch])
    assert labels.tolist() == [2, 4, 7] and images[:, 0, 0, 0].tolist() == [1, 0, 3]


@pytest.mark.parametrize(
    "batch",
    [
        IMAGES,
        [IMAGES],
        "images",
        {"x": IMAGES, "labels": LABELS},
        {"image": IMAGES},
        ([IMAGES, IMAGES], LABELS),  # several crops
        (IMAGES[0], LABELS),
        (IMAGES > 1, LABELS),  # masks
        (IMAGES, LABELS.float()),
        (IMAGES, LABELS[:3]),
        (IMAGES, LABELS[:, None].expand(5, 4)),  # several labels each
        (IMAGES, ["cat"] * 5),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_other_batches(batch: Any) -> None:
    assert images_and_labels(batch) is None
    with pytest.raises(UserError, match="pass probe_images="):
        first_of_each_class([batch])


def test_ten_classes_end_the_search() -> None:
    def batches() -> Any:
        yield torch.zeros(11, 1, 3, 2), torch.arange(11).flip(0)
        raise AssertionError("more was read")

    images, labels = first_of_each_class(batches())
    assert labels.tolist() == list(range(10)) and len(images) == 10


def test_images_of_different_sizes_and_none_at_all() -> None:
    with pytest.raises(UserError, match="of different sizes: pass probe_images="):
        first_of_each_class([(IMAGES, LABELS), (torch.zeros(1, 1, 3, 3), torch.tensor([1]))])
    with pytest.raises(UserError, match="no validation data"):
        first_of_each_class([])


@pytest.mark.parametrize(("channels", "shown"), [(1, 1), (2, 1), (3, 3), (5, 1)])
def test_images_are_shown_from_dark_to_light(channels: int, shown: int) -> None:
    images = torch.randn(2, channels, 7, 5, dtype=torch.bfloat16)
    pictures = displayable(images)
    assert pictures.shape == (2, 7, 5, shown) and pictures.dtype == np.uint8
    assert (pictures.min(axis=(1, 2, 3)) == 0).all() and (pictures.max(axis=(1, 2, 3)) == 255).all()
    assert displayable(torch.full((1, channels, 7, 5), 3.0)).max() == 0  # one colour
