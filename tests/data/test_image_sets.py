"""Pictures of any kind come out as the model expects them, and what is no picture is named."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.datasets
import timm
import torch
import torchvision
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from attention_visualizer import AttentionVisualizer
from attention_visualizer.data.image_sets import ImageFolder, read_formatted
from attention_visualizer.data.input_format import IMAGENET_MEAN, InputFormat
from attention_visualizer.support.errors import UserError

COLOUR = InputFormat((32, 48), 3, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
GREY = InputFormat((32, 48), 1, (0.5,), (0.2,))


def photo(width: int = 96, height: int = 64) -> Image.Image:
    return Image.fromarray(sklearn.datasets.load_sample_image("china.jpg")).resize((width, height))


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000), (9_001, 3)], ids=str)
def test_a_very_long_picture_is_never_scaled_as_a_whole(
    tmp_path: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """60,000 pixels by one, brought to a height of 224, are nine gigabytes."""
    sizes: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def watched(picture: Image.Image, wanted: tuple[int, int], *more: Any, **options: Any) -> Image.Image:
        sizes.append(wanted)
        return resize(picture, wanted, *more, **options) if np.prod(wanted) < 1e7 else Image.new("RGB", (1, 1))

    monkeypatch.setattr(Image.Image, "resize", watched)
    Image.new("RGB", size, (200, 10, 10)).save(tmp_path / "line.png")
    form = InputFormat((224, 224), 3, (0.5,) * 3, (0.5,) * 3)
    pixels = read_formatted(tmp_path / "line.png", form)
    assert max(np.prod(wanted) for wanted in sizes) < 1e7
    assert (pixels.flatten(1) == torch.tensor([[200], [10], [10]])).all()


def see_through_palette() -> Image.Image:
    """Its first colour, black, is not there."""
    picture = Image.new("P", (64, 64), 0)
    picture.putpalette([0, 0, 0, 250, 0, 0])
    picture.paste(1, (0, 0, 64, 32))
    picture.info["transparency"] = 0
    return picture


ODD: dict[str, Any] = {
    "one pixel": lambda: Image.new("RGB", (1, 1), (200, 10, 10)),
    "a line": lambda: Image.new("RGB", (400, 1), (200, 10, 10)),
    "an upright line": lambda: Image.new("RGB", (1, 400), (200, 10, 10)),
    "tall": lambda: photo(20, 300),
    "grey": lambda: photo().convert("L"),
    "black and white": lambda: photo().convert("1"),
    "CMYK": lambda: photo().convert("CMYK"),
    "palette": lambda: photo().convert("P"),
    "palette, see-through": see_through_palette,
    "grey, see-through": lambda: Image.new("LA", (64, 64), (200, 128)),
    "half transparent": lambda: Image.new("RGBA", (64, 64), (200, 10, 10, 128)),
    "16 bits": lambda: Image.fromarray(np.full((64, 64), 30_000, np.uint16)),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("form", [COLOUR, GREY], ids=["colour", "grey"])
def test_odd_pictures_come_out_in_the_models_shape(tmp_path: Path, kind: str, form: InputFormat) -> None:
    picture = ODD[kind]()
    path = tmp_path / ("picture.tif" if kind in ("CMYK", "16 bits") else "picture.png")
    picture.save(path)
    pixels = read_formatted(path, form)
    assert pixels.shape == (form.channels, 32, 48) and pixels.dtype == torch.uint8
    if kind in ("one pixel", "a line", "an upright line"):
        assert (pixels.flatten(1) == pixels[:, :1, 0]).all()
        assert pixels[:, 0, 0].tolist() == ([200, 10, 10] if form is COLOUR else [67])
    if kind == "palette, see-through" and form is COLOUR:
        assert pixels[:, 2, 24].tolist() == [250, 0, 0] and pixels[:, -2, 24].tolist() == [255, 255, 255]
    if kind == "grey, see-through":
        assert set(pixels.unique().tolist()) == {227}
    if kind == "half transparent" and form is COLOUR:  # over white
        assert pixels[:, 5, 5].tolist() == [227, 132, 132]
    if kind == "16 bits":
        assert int(pixels.float().mean()) in (116, 117)  # 30,000 of 65,535


def test_a_turned_photo_is_turned_upright(tmp_path: Path) -> None:
    upright = np.zeros((60, 60, 3), np.uint8)
    upright[:30] = 255  # light above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(upright[::-1, ::-1]).save(tmp_path / "turned.png", exif=exif)
    pixels = read_formatted(tmp_path / "turned.png", COLOUR).float()
    assert pixels[:, :10].mean() > 250 and pixels[:, -10:].mean() < 5


def test_a_photo_on_its_side_is_turned_upright(tmp_path: Path) -> None:
    """Width and height change places."""
    stored = np.zeros((40, 80, 3), np.uint8)
    stored[:, :40, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise: left comes above
    Image.fromarray(stored).save(tmp_path / "photo.jpg", exif=exif, quality=100)
    pixels = read_formatted(tmp_path / "photo.jpg", InputFormat((80, 40), 3, (0.5,) * 3, (0.5,) * 3)).float()
    assert pixels[0, :36].mean() > 245 and pixels[0, 44:].mean() < 10


def test_the_first_picture_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (48, 32), color) for color in ((250, 0, 0), (0, 0, 250))]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert read_formatted(tmp_path / "moving.gif", COLOUR)[:, 9, 9].tolist() == [250, 0, 0]


def test_the_middle_is_cut_out_and_nothing_is_stretched(tmp_path: Path) -> None:
    columns = np.repeat(np.arange(96, dtype=np.uint8)[None], 32, axis=0)
    Image.fromarray(columns).save(tmp_path / "wide.png")
    pixels = read_formatted(tmp_path / "wide.png", GREY)
    np.testing.assert_array_equal(pixels[0, 7], np.arange(24, 72))


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(480, 320), (211, 307), (37, 23), (90, 1000)], ids=str)
def test_every_way_of_timm_to_fit_a_picture(tmp_path: Path, mode: Any, size: tuple[int, int]) -> None:
    transform: Any = create_transform(
        (3, 112, 112), interpolation="bicubic", crop_pct=0.875, crop_mode=mode, mean=(0.5,) * 3, std=(1.0,) * 3
    )
    picture = photo(*size)
    picture.save(tmp_path / "photo.png")
    model = timm.create_model("test_vit", img_size=112, num_classes=2)
    model.pretrained_cfg = model.pretrained_cfg | {"crop_mode": mode, "crop_pct": 0.875}
    form = InputFormat.of(model)
    assert (form.fit, form.size, form.crop_share) == (mode, (112, 112), 0.875)
    ours = read_formatted(tmp_path / "photo.png", form).float() / 255 - 0.5
    torch.testing.assert_close(ours, transform(picture), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_it_is_what_timms_own_transform_gives(tmp_path: Path, name: str) -> None:
    model = timm.create_model(name)
    transform: Any = create_transform(**resolve_model_data_config(model))
    picture = photo(480, 320)
    picture.save(tmp_path / "photo.png")
    folder = ImageFolder.find(tmp_path, InputFormat.of(model))
    ours = folder.model_input(folder.read([0]))[0]
    theirs = transform(picture)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_the_folder_is_read_by_name_with_those_below_it(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("c.png", "a.JPG", "b/d.webp"):
        photo().save(tmp_path / name, format="PNG")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    whole = (tmp_path / "c.png").read_bytes()
    (tmp_path / "truncated.png").write_bytes(whole[: len(whole) // 2])
    folder = ImageFolder.find(tmp_path, COLOUR)
    assert [folder.name(number) for number in range(len(folder))] == ["a.JPG", "b/d.webp", "c.png"]
    assert set(folder.broken) == {"broken.png", "truncated.png"} and folder.shape == (3, 32, 48)
    pictures = folder.read([2, 0])
    normal = (pictures.double() / 255 - torch.tensor(COLOUR.mean)[:, None, None]) / torch.tensor(COLOUR.std)[
        :, None, None
    ]
    torch.testing.assert_close(folder.model_input(pictures).double(), normal, atol=1e-6, rtol=0)


def test_names_that_are_no_text_can_be_told(tmp_path: Path) -> None:
    strange = tmp_path / os.fsdecode(b"caf\xe9\nphoto.png")
    photo().save(strange)
    (tmp_path / os.fsdecode(b"broken\xe9.png")).write_bytes(b"nothing")
    folder = ImageFolder.find(tmp_path, COLOUR)
    for text in (folder.name(0), *folder.broken):
        assert text.isprintable() and text.encode()
    assert folder.name(0).startswith("caf") and folder.read([0]).shape == (1, 3, 32, 48)


def test_links_in_a_circle_end_and_files_to_skip_are_skipped(tmp_path: Path) -> None:
    photo().save(tmp_path / "photo.png")
    photo().save(tmp_path / "figure.png")
    (tmp_path / "again").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "folder.png").mkdir()
    folder = ImageFolder.find(tmp_path, COLOUR, skip=lambda path: path.name == "figure.png")
    assert [folder.name(number) for number in range(len(folder))] == ["photo.png"]


def test_the_folder_one_is_in_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "holiday").mkdir()
    photo().save(tmp_path / "holiday/photo.png")
    monkeypatch.chdir(tmp_path / "holiday")
    assert ImageFolder.find(".", COLOUR).title == "images in holiday"


@pytest.mark.parametrize(("name", "said"), [("", "this is a folder"), ("none.png", "no such file")])
def test_a_picture_that_is_none_is_named(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_formatted(tmp_path / name, COLOUR)


def test_folders_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contains no images"):
        ImageFolder.find(tmp_path, COLOUR)
    with pytest.raises(UserError, match="there is no such folder"):
        ImageFolder.find(tmp_path / "none", COLOUR)
    (tmp_path / "file.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"1 cannot be read, such as file\.png"):
        ImageFolder.find(tmp_path / "file.png", COLOUR)
    with pytest.raises(UserError, match=r"1 cannot be read, such as file\.png"):
        ImageFolder.find(tmp_path, COLOUR)


def test_what_a_model_takes_is_found_or_asked_for() -> None:
    tiny = InputFormat.of(timm.create_model("vit_tiny_patch16_224", img_size=(64, 32), in_chans=1))
    assert (tiny.size, tiny.channels, tiny.mean, tiny.declares_mean) == ((64, 32), 1, (0.5,), True)
    torchvisions = InputFormat.of(torchvision.models.VisionTransformer(64, 16, 1, 2, 8, 8))
    assert (torchvisions.size, torchvisions.mean, torchvisions.declares_mean) == ((64, 64), IMAGENET_MEAN, False)
    transformers = pytest.importorskip("transformers")
    hugging = transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=40, patch_size=8, num_channels=1, hidden_size=24, num_hidden_layers=1)
    )
    assert (InputFormat.of(hugging).size, InputFormat.of(hugging).channels) == ((40, 40), 1)
    silent = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten())
    with pytest.raises(UserError, match="give it with image_size="):
        InputFormat.of(silent)
    assert InputFormat.of(silent, 40).size == (40, 40) and InputFormat.of(silent, (40, 24)).size == (40, 24)


def test_a_size_that_a_model_takes_only_when_it_is_asked_to(tmp_path: Path) -> None:
    """Hugging Face's ViTs interpolate their positions with an option of their forward."""
    transformers = pytest.importorskip("transformers")
    names = {0: "ant", 1: "bee", 2: "cat"}
    config = transformers.ViTConfig(
        image_size=16, patch_size=8, hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=8
    )
    config.id2label = names
    model = transformers.ViTForImageClassification(config).eval()
    Image.new("RGB", (32, 32)).save(tmp_path / "0.png")

    def study_of(model: nn.Module) -> Any:
        options: Any = {"images": tmp_path, "output_dir": tmp_path / "out", "device": "cpu"}
        return AttentionVisualizer(model=model, image_size=32, **options).study

    with pytest.raises(UserError, match=r"leave out image_size=, or .* interpolate_pos_encoding=True"):
        _ = study_of(model)

    class Interpolating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, images: torch.Tensor) -> Any:
            return self.inner(images, interpolate_pos_encoding=True)

    study = study_of(Interpolating())
    assert study.first_observation.geometries[0].grid == (4, 4)
    assert list(study.target.images.class_names) == list(names.values())
