"""When places are measured, with which of a call's arguments, and what is kept for the next pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attention_visualizer.attention import places
from attention_visualizer.attention.capture import capture
from attention_visualizer.attention.function_call import FunctionCall
from attention_visualizer.attention.placement import Lines, PlacedKeys, Unplaced, place
from attention_visualizer.attention.places import bands_of, is_usable, signature
from attention_visualizer.attention.receptive_fields import Bands, measure

PATCH, WIDTH = 4, 8


def test_images_are_real_numbers_of_two_pixels_at_least() -> None:
    image = torch.rand(1, 3, 8, 8)
    assert is_usable(image) and is_usable((255 * image).byte())
    assert not is_usable(image.to(torch.complex64))
    assert not is_usable(image[:, :, :1]) and not is_usable(image[:, :, :, :1])
    for broken in (torch.nan, torch.inf):
        assert not is_usable(image.where(image > 0.1, broken))


def test_a_call_with_other_sizes_or_options_is_measured_by_itself() -> None:
    model = nn.Linear(2, 2)

    def of(side: int = 8, **options: Any) -> Any:
        return signature(model, FunctionCall(model.forward, (torch.rand(5, 3, side, side),), options))

    assert of() == of() and of(crop=True) == of(crop=True)
    assert len({of(), of(16), of(crop=True), of(crop=False), of(mode="mean")}) == 5
    assert of() == signature(model, FunctionCall(model.forward, (torch.rand(2, 3, 8, 8),), {}))


@pytest.mark.parametrize(
    ("start", "step", "edges"),
    [
        (0.0, 8.0, (0, 8, 16, 24)),
        (0.5, 7.5, (0, 1, 8, 15, 16, 23, 24)),  # the pixel that an edge lies in is a band of its own
        (-2.0, 9.0, (0, 7, 16, 24)),
    ],
)
def test_bands_end_where_patches_do(start: float, step: float, edges: tuple[int, ...]) -> None:
    lines = Lines(3, start, step)
    placed = PlacedKeys(lines, lines, np.arange(9))
    for axis in range(2):
        assert bands_of(placed, axis, 24, is_fine=False).edges == edges


def test_keys_whose_moves_are_not_known_depend_on_the_picture() -> None:
    bands = Bands.of(range(9), 8)

    def moves(pictures: Tensor) -> dict[str, Any]:
        return {"layer": np.full((len(pictures), 4), np.nan)}

    fields = measure(moves, torch.rand(1, 1, 8, 8), bands, bands)["layer"]
    result = place(fields)
    assert isinstance(result, Unplaced) and "depends on the picture" in result.reason


class Model(nn.Module):
    """One layer over patches, in which something else happens first."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, images: Tensor, *others: Tensor) -> Tensor:
        self.first(images, *others)
        query, key, value = self.qkv(self.cut(images).flatten(2).mT)[:, None].chunk(3, dim=-1)
        return nn.functional.scaled_dot_product_attention(query, key, value)[:, 0].mean(dim=1)

    def first(self, images: Tensor, *others: Tensor) -> None:
        pass


class OneValueAnImage(Model):
    def first(self, images: Tensor, *others: Tensor) -> None:
        assert all(len(other) == len(images) for other in others)


class OwnGradient(Model):
    def first(self, images: Tensor, *others: Tensor) -> None:
        parameter = self.cut.weight
        torch.autograd.grad(self.cut(images).square().sum(), parameter)


class OutOfMemory(Model):
    is_full = True  # of the class: a model's own attributes are as before after a look

    def first(self, images: Tensor, *others: Tensor) -> None:
        if OutOfMemory.is_full and places.is_measuring():
            raise torch.OutOfMemoryError("CUDA out of memory")


class AttendsOverPixels(nn.Module):
    """Attention that is called with the images themselves: there is nothing before it to measure."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(images, images, images)


def layer_of(model: nn.Module, *inputs: Tensor, gradients: bool = False) -> Any:
    torch.manual_seed(0)
    with torch.set_grad_enabled(gradients), capture(model.eval()) as attention:
        model(*inputs)
    return attention[0]


IMAGES = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def test_what_belongs_to_each_image_goes_along() -> None:
    assert layer_of(OneValueAnImage(), IMAGES, torch.arange(3), torch.rand(3, 2)).geometry.grid == (4, 4)


def test_a_forward_that_asks_for_gradients_has_them() -> None:
    assert layer_of(OwnGradient(), IMAGES, gradients=True).geometry.grid == (4, 4)


def test_where_there_was_no_memory_the_next_pass_measures_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = OutOfMemory()
    first = layer_of(model, IMAGES)
    assert first.geometry is None and "no memory to measure places" in first.unplaced
    monkeypatch.setattr(OutOfMemory, "is_full", False)
    assert layer_of(model, IMAGES).geometry.grid == (4, 4)


def test_what_attention_itself_is_called_with_is_no_image() -> None:
    layer = layer_of(AttendsOverPixels(), IMAGES)
    assert layer.geometry is None and "without images" in layer.unplaced
