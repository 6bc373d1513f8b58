"""Pictures of any kind come out as the model takes them, and what is no picture is named."""

from __future__ import annotations

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

from attention_visualizer.errors import UserError
from attention_visualizer.pictures import IMAGENET_MEAN, InputFormat, PictureFolder, read_picture

COLOUR = InputFormat((32, 48), 3, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
GREY = InputFormat((32, 48), 1, (0.5,), (0.2,))


def photo(width: int = 96, height: int = 64) -> Image.Image:
    return Image.fromarray(sklearn.datasets.load_sample_image("china.jpg")).resize((width, height))


ODD: dict[str, Any] = {
    "one pixel": lambda: Image.new("RGB", (1, 1), (200, 10, 10)),
    "a line": lambda: Image.new("RGB", (400, 1), (200, 10, 10)),
    "tall": lambda: photo(20, 300),
    "grey": lambda: photo().convert("L"),
    "black and white": lambda: photo().convert("1"),
    "CMYK": lambda: photo().convert("CMYK"),
    "palette": lambda: photo().convert("P"),
    "half transparent": lambda: Image.new("RGBA", (64, 64), (200, 10, 10, 128)),
    "16 bits": lambda: Image.fromarray(np.full((64, 64), 30_000, np.uint16)),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("form", [COLOUR, GREY], ids=["colour", "grey"])
def test_odd_pictures_come_out_in_the_models_shape(tmp_path: Path, kind: str, form: InputFormat) -> None:
    picture = ODD[kind]()
    path = tmp_path / ("picture.tif" if kind in ("CMYK", "16 bits") else "picture.png")
    picture.save(path)
    pixels = read_picture(path, form)
    assert pixels.shape == (form.channels, 32, 48) and pixels.dtype == torch.uint8
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
    pixels = read_picture(tmp_path / "turned.png", COLOUR).float()
    assert pixels[:, :10].mean() > 250 and pixels[:, -10:].mean() < 5


def test_the_middle_is_cut_out_and_nothing_is_stretched(tmp_path: Path) -> None:
    columns = np.repeat(np.arange(96, dtype=np.uint8)[None], 32, axis=0)
    Image.fromarray(columns).save(tmp_path / "wide.png")
    pixels = read_picture(tmp_path / "wide.png", GREY)
    np.testing.assert_array_equal(pixels[0, 7], np.arange(24, 72))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_it_is_what_timms_own_transform_gives(tmp_path: Path, name: str) -> None:
    model = timm.create_model(name)
    transform: Any = create_transform(**resolve_model_data_config(model))
    picture = photo(480, 320)
    picture.save(tmp_path / "photo.png")
    folder = PictureFolder.find(tmp_path, InputFormat.of(model))
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
    folder = PictureFolder.find(tmp_path, COLOUR)
    assert [folder.name(number) for number in range(len(folder))] == ["a.JPG", "b/d.webp", "c.png"]
    assert set(folder.broken) == {"broken.png", "truncated.png"} and folder.shape == (3, 32, 48)
    pictures = folder.read([2, 0])
    normal = (pictures.double() / 255 - torch.tensor(COLOUR.mean)[:, None, None]) / torch.tensor(COLOUR.std)[
        :, None, None
    ]
    torch.testing.assert_close(folder.model_input(pictures).double(), normal, atol=1e-6, rtol=0)


def test_folders_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no pictures in it"):
        PictureFolder.find(tmp_path, COLOUR)
    with pytest.raises(UserError, match="there is no such folder"):
        PictureFolder.find(tmp_path / "none", COLOUR)
    (tmp_path / "file.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match="this is a file, not a folder"):
        PictureFolder.find(tmp_path / "file.png", COLOUR)
    with pytest.raises(UserError, match=r"1 cannot be read, such as file\.png"):
        PictureFolder.find(tmp_path, COLOUR)


def test_what_a_model_takes_is_found_or_asked_for() -> None:
    tiny = InputFormat.of(timm.create_model("vit_tiny_patch16_224", img_size=(64, 32), in_chans=1))
    assert (tiny.size, tiny.channels, tiny.mean, tiny.stated) == ((64, 32), 1, (0.5,), True)
    torchvisions = InputFormat.of(torchvision.models.VisionTransformer(64, 16, 1, 2, 8, 8))
    assert (torchvisions.size, torchvisions.mean, torchvisions.stated) == ((64, 64), IMAGENET_MEAN, False)
    silent = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten())
    with pytest.raises(UserError, match="say it with image_size="):
        InputFormat.of(silent)
    assert InputFormat.of(silent, 40).size == (40, 40) and InputFormat.of(silent, (40, 24)).size == (40, 24)
