"""TensorBoard's checksums, computed by a library.

TensorBoard ends each record of an event file with a CRC-32C that it computes in Python, byte by byte: 3 ms for a
picture of 24 kB, and although a thread does it, training waits for the interpreter meanwhile. For a frame of ten
pictures that was a third of the whole.
"""

from __future__ import annotations

import google_crc32c
from tensorboard.summary.writer import record_writer  # type: ignore[import-untyped]


def masked_crc32c(data: bytes) -> int:
    """As in TensorFlow's record format: the checksum turned by 15 bits, plus a constant."""
    checksum = google_crc32c.value(data)
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


def use_fast_checksums() -> None:
    """For all event files that this process writes from now on; the files are the same, byte for byte."""
    if google_crc32c.implementation == "c" and hasattr(record_writer, "masked_crc32c"):
        record_writer.masked_crc32c = masked_crc32c
