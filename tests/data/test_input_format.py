"""Pictures reach a model as its own part declares, whatever surrounds it and does to the pixels on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from attention_visualizer import AttentionVisualizer
from attention_visualizer.data.class_names import declared_class_names
from attention_visualizer.data.image_sets import ImageFolder
from attention_visualizer.data.input_format import IMAGENET_MEAN, IMAGENET_STD, InputFormat
from attention_visualizer.support.errors import UserError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def vit(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", **sizes | {"num_classes": 3} | options).eval()
    model.pretrained_cfg = {"mean": MEAN, "std": STD, "interpolation": "bilinear", "crop_pct": 0.9}
    return model


class Before(nn.Module):
    """Does something to the pixels."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, images: Tensor) -> Tensor:
        return self.change(images)


class Around(nn.Module):
    def __init__(self, inner: nn.Module, run: Callable[[Any, Tensor], Tensor] = lambda inner, images: inner(images)):
        super().__init__()
        self.backbone, self.run = inner, run

    def forward(self, images: Tensor) -> Tensor:
        return self.run(self.backbone, images)


WRAPPED: dict[str, Callable[[Any], nn.Module]] = {
    "bare": lambda inner: inner,
    "compiled": lambda inner: torch.compile(inner),
    "DataParallel": nn.DataParallel,
    "Sequential": nn.Sequential,
    "average": AveragedModel,
    "own class": Around,
    "own class, features alone": lambda inner: Around(
        inner, lambda inner, images: inner.forward_features(images)[:, 0]
    ),
    "deep": lambda inner: nn.Sequential(nn.DataParallel(AveragedModel(inner))),
    "resizing": lambda inner: nn.Sequential(nn.Upsample((16, 16)), inner),
    "padding": lambda inner: nn.Sequential(nn.ZeroPad2d(2), nn.Upsample((16, 16)), inner),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_what_is_declared_inside_holds_outside(kind: str) -> None:
    form = InputFormat.of(WRAPPED[kind](vit()))
    assert form == InputFormat((16, 16), 3, MEAN, STD, 0.9, "bilinear")


def in_their_own_way(mean: Tensor, std: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda images: (images - mean) / std


COLUMN = tuple(torch.tensor(values)[:, None, None] for values in (MEAN, STD))
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "normalizes": in_their_own_way(*COLUMN),
    "takes bytes": lambda images: (images / 255 - COLUMN[0]) / COLUMN[1],
    "takes -1 to 1": lambda images: ((images + 1) / 2 - COLUMN[0]) / COLUMN[1],
    "blue first": lambda images: (images.flip(1) - COLUMN[0]) / COLUMN[1],
    "doubles the contrast": lambda images: images * 2 - 0.5,
    "normalizes and scales": lambda images: nn.functional.interpolate(in_their_own_way(*COLUMN)(images), (16, 16)),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_model_inside_gets_its_own_normalization_once(tmp_path: Path, kind: str) -> None:
    inner, arrived = vit(), []
    model = nn.Sequential(Before(CHANGES[kind]), nn.DataParallel(inner))
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "0.png")
    folder = ImageFolder.find(tmp_path, InputFormat.of(model, 16))
    inner.register_forward_pre_hook(lambda module, given: arrived.append(given[0]))
    pictures = folder.read([0])
    with torch.no_grad():
        model(folder.model_input(pictures))
    pictures = pictures.flip(1) if kind == "blue first" else pictures
    torch.testing.assert_close(arrived[0], (pictures / 255 - COLUMN[0]) / COLUMN[1], atol=1e-4, rtol=0)


def undeclared() -> nn.Module:
    model = vit()
    model.pretrained_cfg = {}
    return model


@pytest.mark.parametrize(
    ("change", "mean", "std"),
    [
        (lambda images: images, IMAGENET_MEAN, IMAGENET_STD),
        (CHANGES["normalizes"], (0.0,) * 3, (1.0,) * 3),
        (CHANGES["takes bytes"], (0.0,) * 3, (1 / 255,) * 3),
    ],
)
def test_a_model_without_a_declaration_may_normalize_images_itself(change: Any, mean: Any, std: Any) -> None:
    form = InputFormat.of(nn.Sequential(Before(change), undeclared()))
    assert (form.mean, form.std, form.declares_mean) == (mean, pytest.approx(std), mean != IMAGENET_MEAN)


class Subclass(nn.Module):
    """Declares a normalization and scales its images as well: what is declared could be meant before or after."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = undeclared()
        self.image_mean, self.image_std = MEAN, STD

    def forward(self, images: Tensor) -> Tensor:
        return self.inner((images - 0.5) / 0.5)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = vit(), vit()
        self.second.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}

    def forward(self, images: Tensor) -> Tensor:
        return self.first(images) + self.second(images)


ASKED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "declared and done": (Subclass, "declares a normalization of its images and scales them itself as well"),
    "grey": (
        lambda: nn.Sequential(Before(lambda x: x.mean(1, keepdim=True).expand_as(x)), vit()),
        "mixes the channels",
    ),
    "learnt colors": (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), vit()), "mixes the channels"),
    "each image by itself": (
        lambda: nn.Sequential(
            Before(lambda x: (x - x.mean((1, 2, 3), True)) / (x.std((1, 2, 3), keepdim=True))), vit()
        ),
        "scales each image by itself",
    ),
    "not seen to arrive": (
        lambda: Around(vit(), lambda inner, images: inner.blocks(images.flatten(2)[:, :, :12])[:, 0]),
        "what Around does to the pixels of its images is not known",
    ),
    "two": (Pair, "parts of Pair declare different normalizations"),
}


@pytest.mark.parametrize("kind", ASKED)
def test_what_is_not_clear_is_asked_for(kind: str) -> None:
    make, said = ASKED[kind]
    with pytest.raises(UserError, match=f"{said}.*: give image_format=InputFormat"):
        InputFormat.of(make())


class Tower(nn.Module):
    """Declares its input as OpenCLIP does, with attributes or a dictionary."""

    def __init__(self, **declared: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 8, 8)
        for name, value in declared.items():
            setattr(self, name, value)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv1(images).flatten(1)


@pytest.mark.parametrize(
    "declared",
    [
        {"image_size": (32, 24), "image_mean": MEAN, "image_std": list(STD)},
        {"preprocess_cfg": {"size": (32, 24), "mean": MEAN, "std": STD, "resize_mode": "squash"}},
        {"config": SimpleNamespace(image_size=(32, 24)), "image_mean": torch.tensor(MEAN), "image_std": STD},
    ],
)
def test_towers_with_names_of_their_own(declared: dict[str, Any]) -> None:
    for model in (Tower(**declared), nn.Sequential(Tower(**declared))):
        form = InputFormat.of(model)
        assert form.size == (32, 24) and form.mean == pytest.approx(MEAN) and form.std == pytest.approx(STD)
        assert form.fit == ("squash" if "preprocess_cfg" in declared else "center") and form.declares_mean


def test_measuring_leaves_the_model_and_the_random_numbers_as_they_were() -> None:
    model = nn.Sequential(Before(lambda images: images + torch.rand(()) * 0), vit())
    state = torch.get_rng_state()
    InputFormat.of(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(part._forward_pre_hooks for part in model.modules())


# --- classes ---

NAMES = ("ant", "bee", "cat")


@pytest.mark.parametrize(
    "declared",
    [
        {"config": SimpleNamespace(id2label={0: "ant", 1: "bee", 2: "cat"})},
        {"config": SimpleNamespace(id2label={"2": "cat", "0": "ant", "1": "bee"})},
        {"pretrained_cfg": {"label_names": list(NAMES), "mean": MEAN, "std": STD}},
        {"class_names": NAMES},
    ],
)
def test_names_of_classes_are_the_models_own(tmp_path: Path, declared: dict[str, Any]) -> None:
    model = vit()
    for name, value in declared.items():
        setattr(model, name, value)
    assert declared_class_names(nn.Sequential(model)) == NAMES
    Image.new("RGB", (16, 16)).save(tmp_path / "0.png")

    def images_of(model: nn.Module, **options: Any) -> Any:
        out = tmp_path / "out"
        return AttentionVisualizer(
            model=model, images=tmp_path, output_dir=out, device="cpu", **options
        ).study.target.images

    for wrapped in (model, nn.DataParallel(model)):
        assert images_of(wrapped).class_names == NAMES and images_of(wrapped).num_classes == 3
    assert images_of(model, class_names=("x", "y", "z")).class_names == ("x", "y", "z")
    assert images_of(nn.Sequential(model, nn.Linear(3, 5))).class_names == ()  # of other classes
    with pytest.raises(UserError, match="class_names= has 2 names, and the model gives scores of 3 classes"):
        images_of(model, class_names=("x", "y"))


def test_placeholders_are_no_names() -> None:
    model = nn.Identity()
    model.config = SimpleNamespace(id2label={0: "LABEL_0", 1: "LABEL_1"})  # type: ignore[assignment]
    assert declared_class_names(model) == ()
