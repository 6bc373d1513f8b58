"""Films from pictures: animated WebP and GIF with Pillow; MP4 with PyAV, which brings its own encoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from attention_visualizer.files.atomic import atomic_path

FilmFormat = Literal["webp", "mp4", "gif"]
FRAMES_A_SECOND = 10  # of MP4, where a picture stays for a whole number of frames
COLORS = 256  # of GIF
# One quality for all frames, and no smoothing between blocks: either would let a picture waver that stays.
H264 = {"qp": "18", "bf": "0", "x264-params": "no-deblock=1"}


def write_film(
    path: Path, film_format: FilmFormat, pictures: Iterable[NDArray[np.uint8]], milliseconds: Sequence[int]
) -> None:
    """Write a film that begins again at its end, whole or not at all.

    pictures: [height, width, 3], all of one size, even for MP4; milliseconds: how long each stays.
    """
    with atomic_path(path) as temporary:
        if film_format == "mp4":
            write_mp4(temporary, pictures, milliseconds)
            return
        frames = [Image.fromarray(picture) for picture in pictures]
        options: dict[str, Any] = {"lossless": True, "quality": 30, "method": 1}  # a sixth of method 0's size
        if film_format == "gif":
            frames, options = with_common_colors(frames), {"optimize": False}
        first, *others = frames
        durations = list(milliseconds)
        first.save(temporary, film_format, save_all=True, append_images=others, duration=durations, loop=0, **options)


def with_common_colors(frames: Sequence[Image.Image]) -> list[Image.Image]:
    """Give all frames the same 256 colours: what does not move shall not flicker."""
    width, height = frames[0].size
    every = Image.new("RGB", (width, height * len(frames)))
    for number, frame in enumerate(frames):
        every.paste(frame, (0, number * height))
    palette = every.quantize(COLORS, Image.Quantize.FASTOCTREE)
    return [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]


def write_mp4(path: Path, pictures: Iterable[NDArray[np.uint8]], milliseconds: Sequence[int]) -> None:
    """Write H.264 with halved colour resolution (yuv420p), the one kind that browsers and slides play everywhere."""
    import av
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=FRAMES_A_SECOND, options=H264)
        context = stream.codec_context
        context.pix_fmt = "yuv420p"
        # Said, not left to the player to guess: colours are what these films are about.
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for picture, duration in zip(pictures, milliseconds, strict=True):
            if not context.is_open:
                context.height, context.width = picture.shape[:2]
            for _ in range(round(duration * FRAMES_A_SECOND / 1000)):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame = frame.reformat(
                    format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
                )
                container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
