"""What a model must know of its images, and how pixels are brought to the form that it was trained on."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from attention_visualizer.files.plain_files import open_file
from attention_visualizer.support.errors import UserError
from attention_visualizer.support.text import printable

log = logging.getLogger(__name__)

DatasetName = Literal["mnist", "digits"]
MAX_NAME_LENGTH = 100
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 64_000_000
TITLES: dict[str, str] = {"mnist": "MNIST", "digits": "scikit-learn digits (not MNIST)"}


@dataclass(frozen=True)
class DatasetDescription:
    """What a model must know of the images it was trained on.

    image_size: pixels of a square. mean, std: of the training split's pixels, in 0..1 units. sizes: images in
    "train", "validation" and "test".
    """

    name: str
    image_size: int
    channels: int
    class_names: tuple[str, ...]
    mean: float
    std: float
    sizes: dict[str, int]

    @property
    def title(self) -> str:
        """The name for headings and figures."""
        return TITLES[self.name]

    @property
    def watermark(self) -> str:
        """What every figure of these images must say on its face; nothing for the real data set."""
        return "" if self.name == "mnist" else f"data: {self.title}"

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def to_dict(self) -> dict[str, Any]:
        """Return plain scalars, lists and dicts, fit for a checkpoint that is loaded with `weights_only=True`."""
        return {**dataclasses.asdict(self), "class_names": list(self.class_names)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DatasetDescription:
        """Invert `to_dict`. Raise UserError for anything but what it writes."""
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, Mapping) or set(values) != names:
            raise UserError(f"data set description: its fields must be exactly {', '.join(sorted(names))}")

        def require(name: str, holds: bool, wanted: str) -> None:
            if not holds:
                raise UserError(f"data set description: {name}={values[name]!r:.80} must be {wanted}")

        class_names, sizes = values["class_names"], values["sizes"]
        require("name", isinstance(values["name"], str) and values["name"] in TITLES, " or ".join(TITLES))
        for name in ("image_size", "channels"):
            require(name, is_whole(values[name], 1), "a whole number of at least 1")
        require(
            "class_names",
            isinstance(class_names, list) and class_names != [] and all(is_name(item) for item in class_names),
            f"a list of names of 1 to {MAX_NAME_LENGTH} printable characters",
        )
        require("mean", is_number(values["mean"], 0.0, 1.0), "a number from 0 to 1")
        require("std", is_number(values["std"], 0.0, 1.0) and values["std"] > 0, "a number above 0 and up to 1")
        require(
            "sizes",
            isinstance(sizes, dict)
            and set(sizes) == {"train", "validation", "test"}
            and all(is_whole(size, 0) for size in sizes.values()),
            "the number of images in train, validation and test",
        )
        return cls(**{**values, "class_names": tuple(class_names), "sizes": dict(sizes)})


def is_name(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME_LENGTH and value.isprintable()


def is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object, least: float, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most  # not NaN


def to_unit(images: Tensor) -> Tensor:
    """Convert uint8 to float32 in 0..1; floats, which are there already, pass."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def normalise(images: Tensor, description: DatasetDescription) -> Tensor:
    """Normalise uint8, or floats in 0..1, to the float32 that the model is trained on, of the same shape."""
    return (to_unit(images) - description.mean) / description.std


def read_image(path: str | Path, description: DatasetDescription) -> Tensor:
    """Read a picture of any size and mode as uint8 [channel, size, size], light ink on dark as in the data set, and say
    where that meant to invert it. Raise UserError for a file that is not a readable image."""
    picture = read_picture(path, 1)
    if has_light_border(picture):
        log.info("%s: its border is light, so it is inverted to light ink on dark", printable(path))
    return as_light_ink(picture, description.image_size).repeat(description.channels, 1, 1)


def border_of(grey: np.ndarray) -> np.ndarray:
    """Return the pixels of all four sides."""
    return np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])


def has_light_border(picture: Image.Image) -> bool:
    """Whether a grey picture is taken for dark ink on a light ground."""
    return bool(np.median(border_of(np.asarray(picture))) > 127)


def as_light_ink(picture: Image.Image, size: int) -> Tensor:
    """Return a grey picture as uint8 [size, size] of light ink on dark: inverted where its border is light, scaled to
    fit, and centred on the border's colour."""
    grey = np.asarray(picture)
    if has_light_border(picture):
        grey = 255 - grey
    border = border_of(grey)
    height, width = grey.shape
    share = size / max(height, width)
    height, width = max(1, round(height * share)), max(1, round(width * share))
    if grey.shape != (height, width):
        grey = cv2.resize(grey, (width, height), interpolation=cv2.INTER_AREA if share < 1 else cv2.INTER_LINEAR)
    canvas = np.full((size, size), np.median(border), np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    canvas[top : top + height, left : left + width] = grey
    return torch.from_numpy(canvas)


def read_picture(path: str | Path, channels: int) -> Image.Image:
    """Decode a picture as `decode` does. Raise UserError for a file that is not a readable image."""
    try:
        return decode(path, channels)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file: give the path of an image") from None
    except IsADirectoryError:
        raise UserError(f"{path}: this is a folder: give the path of an image") from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: not a readable image: give a PNG or JPEG file") from None
    except UserError:
        raise
    except Exception as error:  # Pillow raises many kinds for broken files
        raise UserError(f"{path}: this image cannot be read ({error}): save it again as PNG") from error


def decode(path: str | Path, channels: int) -> Image.Image:
    """Decode a picture of any mode, upright, transparency over white, as grey (one channel) or RGB.

    Raise UserError for one that is too large, ValueError for values that are not grey levels, and what Pillow
    raises.
    """
    # Not every format that Pillow knows: for some it starts another program.
    with open_file(Path(path)) as file, Image.open(file, formats=FORMATS) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            size = f"{picture.width:,} x {picture.height:,} pixels"
            raise UserError(f"{path}: {size} are more than {MAX_PIXELS:,}: make the image smaller")
        upright = ImageOps.exif_transpose(picture)
        if upright.mode.startswith(("I", "F")):  # 16 bits a pixel, or 32, of which files use 16
            upright = Image.fromarray(grey_pixels(upright))
        if upright.has_transparency_data:
            upright = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
        return upright.convert("L" if channels == 1 else "RGB")


def grey_pixels(image: Image.Image) -> np.ndarray:
    """Scale the values of a picture of more than 8 bits a pixel to uint8 [height, width]. Raise ValueError for values
    that are not grey levels."""
    values = np.asarray(image)
    least, most = values.min(), values.max()
    if not (np.isfinite(least) and np.isfinite(most)):
        raise ValueError("it has pixels that are NaN or infinite")
    if not 0 <= least <= most <= 65535:
        raise ValueError(f"its values from {least:g} to {most:g} are not grey levels")
    top = 65535 if image.mode.startswith("I;16") or most > 255 else 255
    top = 1 if image.mode.startswith("F") and 0 < most <= 1 else top
    grey = np.empty(values.shape, np.uint8)
    for row, line in enumerate(values):  # one at a time: a large picture has room only once
        grey[row] = (line.astype(np.float64) * (255 / top)).round()
    return grey
