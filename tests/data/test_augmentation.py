"""Augmentation moves each image in its own way, within its bounds, and repeatably."""

from __future__ import annotations

import pytest
import torch

from attention_visualizer.data.augmentation import augment_batch, elastic_displacement

STILL = {"rotation": 0.0, "translation": 0.0, "scaling": 0.0, "shear": 0.0, "elastic": 0.0}
CPU = torch.device("cpu")


def test_augmentation_by_nothing_changes_nothing() -> None:
    images = torch.randint(0, 256, (5, 3, 11, 13), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    same = augment_batch(images, torch.Generator(), **STILL)
    torch.testing.assert_close(same, images / 255, atol=1e-5, rtol=0)


def test_augmentation_repeats_with_its_generator_and_differs_between_images() -> None:
    images = torch.rand(1, 1, 28, 28).expand(7, 1, 28, 28)
    strong = {"rotation": 20.0, "translation": 3.0, "scaling": 0.2, "shear": 0.2, "elastic": 1.0}
    first, again, other = (augment_batch(images, torch.Generator().manual_seed(seed), **strong) for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len({image.numpy().tobytes() for image in first}) == 7


@pytest.mark.parametrize(
    ("movement", "reach"),  # pixels that a dot 10 to the right of the centre may move by
    [({"rotation": 30.0}, 5.3), ({"translation": 4.0}, 5.7), ({"scaling": 0.2}, 2.05), ({"shear": 0.3}, 0.2)],
)
def test_augmentation_stays_within_its_bounds_and_uses_them(movement: dict[str, float], reach: float) -> None:
    height, width = 41, 53  # not square, so that mixed-up axes show
    rows, columns = torch.meshgrid(torch.arange(height) - 20.0, torch.arange(width) - 26.0, indexing="ij")
    dot = torch.exp(-(rows**2 + (columns - 10) ** 2) / 4)
    images = dot.expand(499, 1, height, width)
    moved = augment_batch(images, torch.Generator().manual_seed(2), **{**STILL, **movement})[:, 0]
    mass = moved.sum(dim=(1, 2))
    y, x = (moved * rows).sum(dim=(1, 2)) / mass, (moved * columns).sum(dim=(1, 2)) / mass
    distance = torch.hypot(y, x - 10)
    assert distance.max() < reach
    if "shear" in movement:  # a dot at the centre's height stays
        return
    assert distance.max() > 0.85 * reach
    if "rotation" in movement:
        torch.testing.assert_close(torch.hypot(y, x), torch.full_like(x, 10), atol=0.05, rtol=0)
        assert y.min() < -4 and y.max() > 4


def test_shear_moves_sideways_what_lies_below() -> None:
    rows, columns = torch.meshgrid(torch.arange(41) - 20.0, torch.arange(53) - 26.0, indexing="ij")
    dot = torch.exp(-((rows - 10) ** 2 + columns**2) / 4)
    moved = augment_batch(dot.expand(199, 1, 41, 53), torch.Generator().manual_seed(2), **{**STILL, "shear": 0.3})[:, 0]
    mass = moved.sum(dim=(1, 2))
    y, x = (moved * rows).sum(dim=(1, 2)) / mass, (moved * columns).sum(dim=(1, 2)) / mass
    torch.testing.assert_close(y, torch.full_like(y, 10), atol=0.05, rtol=0)
    assert 2.7 < x.abs().max() < 3.05


def test_elastic_displacement_has_its_deviation_in_pixels_along_both_axes() -> None:
    # Not square, so that mixed-up axes show.
    field = elastic_displacement(997, (20, 36), 1.5, torch.Generator().manual_seed(3), CPU)
    assert field.shape == (997, 20, 36, 2)
    pixels = field * torch.tensor([36 / 2, 20 / 2])
    torch.testing.assert_close(pixels.std(dim=(0, 1, 2)), torch.full((2,), 1.5), atol=0.02, rtol=0)
    assert pixels.mean().abs() < 0.02
    assert pixels[..., 0].flatten().dot(pixels[..., 1].flatten()).abs() / pixels[..., 0].numel() < 0.05


def test_elastic_displacement_is_smooth_but_not_the_same_everywhere() -> None:
    field = elastic_displacement(499, (28, 28), 1.0, torch.Generator().manual_seed(3), CPU) * 14
    neighbours = (field[:, :, 1:] - field[:, :, :-1]).std()
    corners = field[:, 0, 0], field[:, -1, -1]
    assert 0.05 < neighbours < 0.4
    correlation = (corners[0] * corners[1]).mean() / (corners[0].std() * corners[1].std())
    assert correlation.abs() < 0.1


def test_a_dot_moves_by_the_displacement_where_it_is() -> None:
    rows, columns = torch.meshgrid(torch.arange(41) - 20.0, torch.arange(53) - 26.0, indexing="ij")
    dot = torch.exp(-(rows**2 + columns**2) / 2)
    images = dot.expand(199, 1, 41, 53)
    moved = augment_batch(images, torch.Generator().manual_seed(4), **{**STILL, "elastic": 1.0})[:, 0]
    generator = torch.Generator().manual_seed(4)
    torch.rand(5, 199, generator=generator)  # the affine draws come first
    field = elastic_displacement(199, (41, 53), 1.0, generator, CPU)[:, 20, 26] * torch.tensor([53 / 2, 41 / 2])
    mass = moved.sum(dim=(1, 2))
    found = torch.stack([(moved * columns).sum(dim=(1, 2)) / mass, (moved * rows).sum(dim=(1, 2)) / mass], dim=1)
    # The field says where a pixel is read, so what is there moves the other way.
    assert torch.corrcoef(torch.stack([found.flatten(), -field.flatten()]))[0, 1] > 0.97
