"""The images that a model is looked at with: a data set in memory, or a folder of pictures read as they are needed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image, ImageOps
from torch import Tensor

from attention_visualizer.data.images import (
    DatasetDescription,
    as_light_ink,
    decode,
    has_light_border,
    normalise,
    read_picture,
    to_unit,
)
from attention_visualizer.data.input_format import InputFormat
from attention_visualizer.support.errors import UserError, ran_out_of_memory
from attention_visualizer.support.text import printable

log = logging.getLogger(__name__)

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
INVERTED = "{count} of {total} images have a light border, so they are inverted to light ink on dark"
MAX_ASPECT = 100  # times the other side: of a longer picture only the middle is scaled, as it might not fit the memory


class VanishedPicture(UserError):
    """A picture that could be read when its folder was listed, and cannot be any more."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(reason)
        self.path = path


class ImageSet(Protocol):
    """A numbered collection of pictures of one shape, uint8 [channel, height, width], as they are shown.

    title: for headings; watermark: what every figure must say, or nothing; kind: what one of them is called;
    class_names: of the model's classes, as far as known; labels: [image], None where they are not known.
    """

    @property
    def title(self) -> str: ...
    @property
    def watermark(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def class_names(self) -> Sequence[str]: ...
    @property
    def num_classes(self) -> int | None: ...
    @property
    def labels(self) -> Tensor | None: ...
    @property
    def shape(self) -> tuple[int, int, int]: ...
    @property
    def has_ink(self) -> bool:
        """Whether the images show ink on an empty background."""

    def __len__(self) -> int: ...

    def name(self, number: int) -> str:
        """Return what one picture is called in a report."""

    def read(self, numbers: Iterable[int]) -> Tensor:
        """Read uint8 [image, channel, height, width]. Raise UserError for a picture that is broken."""

    def model_input(self, pictures: Tensor) -> Tensor:
        """Convert uint8, or floats in 0..1, [image, channel, height, width], as the model expects them: float32."""


@dataclass(frozen=True)
class LabelledImageSet:
    """The test set that a model of this project was trained beside. images: uint8 [image, channel, height, width]."""

    description: DatasetDescription
    images: Tensor
    labels: Tensor | None
    kind: str = "test image"
    has_ink: bool = True

    @property
    def title(self) -> str:
        return self.description.title

    @property
    def watermark(self) -> str:
        return self.description.watermark

    @property
    def class_names(self) -> Sequence[str]:
        return self.description.class_names

    @property
    def num_classes(self) -> int | None:
        return self.description.num_classes

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.description.channels, self.description.image_size, self.description.image_size

    def __len__(self) -> int:
        return len(self.images)

    def name(self, number: int) -> str:
        return f"{self.kind} {number}"

    def read(self, numbers: Iterable[int]) -> Tensor:
        numbers = list(numbers)
        if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
            return self.images[numbers[0] : numbers[0] + len(numbers)]  # without a copy
        return self.images[numbers]

    def model_input(self, pictures: Tensor) -> Tensor:
        return normalise(pictures, self.description)


@dataclass(frozen=True)
class ImageFolder:
    """Pictures of any size in a folder and those below it, by name; each is scaled and cut to what the model takes."""

    folder: Path
    format: InputFormat
    files: tuple[Path, ...]
    num_classes: int | None = None
    class_names: Sequence[str] = ()
    labels: Tensor | None = None
    watermark: str = ""
    kind: str = "image"
    broken: dict[str, str] = field(default_factory=dict)
    inverted: int = 0  # how many had a light border, where light ink on dark is wanted
    has_ink: bool = False

    @classmethod
    def find(
        cls, folder: str | Path, format: InputFormat, skip: Callable[[Path], bool] = lambda path: False, **known: Any
    ) -> ImageFolder:
        """Find the pictures of a folder, or take a single one. Raise UserError where there is none.

        Files that cannot be read are named in `broken`. skip: whether to leave out a file.
        """
        folder = Path(folder)
        if folder.is_file():
            folder, found = folder.parent, [folder]
        elif folder.is_dir():
            every = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
            found = sorted(path for path in every if not skip(path))
        else:
            raise UserError(f"images={folder}: there is no such folder or file")
        pictures = cls(folder, format, (), **known)
        readable, inverted = [], 0
        for path in found:
            try:
                if format.fit == "ink":
                    inverted += has_light_border(decode(path, 1))
                else:
                    decode(path, format.channels)
                readable.append(path)
            except Exception as error:  # Pillow raises many kinds for broken files
                reason = str(error).replace(str(path), path.name)
                pictures.broken[printable(path.relative_to(folder))] = printable(f"{type(error).__name__}: {reason}")
        if not readable:
            broken = f"; {len(found)} cannot be read, such as {printable(found[0].name)}" if found else ""
            raise UserError(f"images={folder}: it contains no images (such as .png or .jpg){broken}")
        for name in pictures.broken:
            log.warning("%s cannot be read and is left out", printable(folder / name))
        if inverted:
            log.info("%s", INVERTED.format(count=f"{inverted:,}", total=f"{len(readable):,}"))
        return cls(folder, format, tuple(readable), broken=pictures.broken, inverted=inverted, **known)

    @property
    def title(self) -> str:
        return printable(f"images in {self.folder.absolute().name}")

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.format.channels, *self.format.size

    def __len__(self) -> int:
        return len(self.files)

    def name(self, number: int) -> str:
        return printable(self.files[number].relative_to(self.folder))

    def read(self, numbers: Iterable[int]) -> Tensor:
        return torch.stack([self._read(self.files[number]) for number in numbers])

    def _read(self, path: Path) -> Tensor:
        try:
            return read_formatted(path, self.format)
        except UserError as error:
            if ran_out_of_memory(error):
                raise
            raise VanishedPicture(path, str(error)) from error

    def without(self, gone: VanishedPicture) -> ImageFolder:
        """Return the folder without a picture, and without all others that are not there any more. Raise UserError
        where none is left."""
        missing = [path for path in self.files if path == gone.path or not path.is_file()]
        files = tuple(path for path in self.files if path not in missing)
        if not files:
            raise UserError(f"images={self.folder}: its images are not there any more")
        names = {printable(path.relative_to(self.folder)): "not readable any more" for path in missing}
        for name in names:
            log.warning("%s cannot be read any more and is left out", printable(self.folder / name))
        return replace(self, files=files, broken=self.broken | names)

    def model_input(self, pictures: Tensor) -> Tensor:
        mean = torch.tensor(self.format.mean, device=pictures.device)[:, None, None]
        std = torch.tensor(self.format.std, device=pictures.device)[:, None, None]
        return (to_unit(pictures) - mean) / std


def read_formatted(path: str | Path, format: InputFormat) -> Tensor:
    """Read a picture as uint8 [channel, height, width], scaled and cut as timm's and torchvision's transforms do.

    Where the format wants ink, it is what `read_image` makes of it. Raise UserError for a file that is not a readable
    image.
    """
    if format.fit == "ink":
        return as_light_ink(read_picture(path, 1), format.size[0]).repeat(format.channels, 1, 1)
    picture = read_picture(path, format.channels)
    pixels = torch.frombuffer(bytearray(fitted(picture, format).tobytes()), dtype=torch.uint8)
    return pixels.view(*format.size, -1).permute(2, 0, 1).contiguous()


def fitted(picture: Image.Image, format: InputFormat) -> Image.Image:
    """Return the picture in the model's size."""
    height, width = format.size
    wanted = int(width / format.crop_share), int(height / format.crop_share)
    if format.fit == "center" and max(picture.size) > MAX_ASPECT * min(picture.size):
        longest = MAX_ASPECT * min(picture.size)
        picture = ImageOps.fit(picture, (min(picture.width, longest), min(picture.height, longest)))
    shares = wanted[0] / picture.width, wanted[1] / picture.height
    if format.fit != "squash":
        shares = (min(shares) if format.fit == "border" else max(shares),) * 2
    rounded = int if format.fit == "center" and wanted[0] == wanted[1] else round  # as torchvision, as timm
    scaled = [max(1, rounded(side * share + 1e-6)) for side, share in zip(picture.size, shares, strict=True)]
    if format.fit == "center":
        scaled = [max(width, scaled[0]), max(height, scaled[1])]
    resampling = Image.Resampling.BILINEAR if format.interpolation == "bilinear" else Image.Resampling.BICUBIC
    picture = picture.resize((scaled[0], scaled[1]), resampling)
    if scaled[0] < width or scaled[1] < height:
        ground = tuple(round(255 * mean) for mean in format.mean)
        canvas = Image.new(picture.mode, (max(width, scaled[0]), max(height, scaled[1])), ground)
        canvas.paste(picture, ((canvas.width - scaled[0]) // 2, (canvas.height - scaled[1]) // 2))
        picture = canvas
    left, top = round((picture.width - width) / 2), round((picture.height - height) / 2)
    return picture.crop((left, top, left + width, top + height))
