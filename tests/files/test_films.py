"""Films are read back as what was written: as many pictures, each as long as asked, in their colours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from attention_visualizer.files.films import FilmFormat, write_film

av = pytest.importorskip("av")
HEIGHT, WIDTH = 38, 74  # even, and no multiple of what an encoder likes
COLORS = ((200, 30, 40), (40, 80, 200), (250, 250, 250))
MILLISECONDS = (1800, 600, 3000)


def pictures() -> list[np.ndarray]:
    """Each in one colour, but for a black and a white square that do not move."""
    found = []
    for color in COLORS:
        picture = np.full((HEIGHT, WIDTH, 3), color, np.uint8)
        picture[8:16, 8:16], picture[8:16, 32:40] = 0, 255
        found.append(picture)
    return found


def stills(path: Path) -> tuple[list[np.ndarray], list[float]]:
    """The pictures of an animated image, and how long each stays."""
    frames, durations = [], []
    with Image.open(path) as film:
        assert film.info["loop"] == 0  # for ever
        for number in range(getattr(film, "n_frames", 1)):
            film.seek(number)
            film.load()
            frames.append(np.asarray(film.convert("RGB")))
            durations.append(film.info["duration"])
    return frames, durations


@pytest.mark.parametrize("film_format", ["webp", "gif"])
def test_an_animated_image(tmp_path: Path, film_format: FilmFormat) -> None:
    path = tmp_path / f"film.{film_format}"
    write_film(path, film_format, iter(pictures()), MILLISECONDS)
    frames, durations = stills(path)
    np.testing.assert_allclose(np.array(frames, int), pictures(), atol=0 if film_format == "webp" else 6)
    assert durations == list(MILLISECONDS)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_what_does_not_move_has_one_colour_in_a_gif(tmp_path: Path) -> None:
    """Also where there are more colours than a GIF has: a palette for each frame would flicker."""
    shades = np.arange(16 * 40, dtype=np.uint32).reshape(16, 40) * 3
    still = np.stack([shades % 256, shades // 8 % 256, 255 - shades % 251], axis=2).astype(np.uint8)
    frames = []
    for color in range(0, 250, 50):
        frame = np.full((32, 40, 3), (color, 250 - color, 90), np.uint8)
        frame[16:] = still
        frames.append(frame)
    write_film(tmp_path / "film.gif", "gif", frames, [600] * len(frames))
    shown, _ = stills(tmp_path / "film.gif")
    assert len(shown) == len(frames)
    assert all(np.array_equal(each[16:], shown[0][16:]) for each in shown)
    assert np.abs(shown[0][16:].astype(int) - still).mean() < 12


def test_an_mp4_that_plays_everywhere(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    write_film(path, "mp4", iter(pictures()), MILLISECONDS)
    with av.open(str(path)) as film:
        (stream,) = film.streams
        assert isinstance(stream, av.VideoStream) and stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert (stream.width, stream.height) == (WIDTH, HEIGHT)
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(stream)]
        assert stream.duration is not None and stream.time_base is not None
        assert float(stream.duration * stream.time_base) == pytest.approx(sum(MILLISECONDS) / 1000)
    shown = [0] * 18 + [1] * 6 + [2] * 30
    assert len(frames) == len(shown)
    for frame, number in zip(frames, shown, strict=True):
        for row, column in ((30, 60), (12, 12), (12, 36)):
            expected = pictures()[number][row, column].astype(int)
            assert np.abs(frame[row, column] - expected).max() <= 12, (number, row, column)
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # a browser can begin before it has all
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("film_format", ["webp", "gif", "mp4"])
def test_a_film_that_fails_leaves_the_old_one(tmp_path: Path, film_format: FilmFormat) -> None:
    path = tmp_path / f"film.{film_format}"
    path.write_bytes(b"the old one")

    def broken() -> Iterator[np.ndarray]:
        yield from pictures()[:2]
        raise ValueError("no third picture")

    with pytest.raises(ValueError, match="no third picture"):
        write_film(path, film_format, broken(), MILLISECONDS)
    assert path.read_bytes() == b"the old one" and len(list(tmp_path.iterdir())) == 1
