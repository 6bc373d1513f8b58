"""TensorBoard's checksums, computed by a library.

TensorBoard ends each record of an event file with a CRC-32C that it computes in Python, byte by byte: 3 ms for a
picture of 24 kB, and although a thread does it, training waits for the interpreter meanwhile. For a frame of ten
pictures that was a third of the whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import google_crc32c

from attention_visualizer.watching.lightning_internals import replace_checksums


def masked_crc32c(data: bytes) -> int:
    """Return the checksum of TensorFlow's record format: a CRC-32C turned by 15 bits, plus a constant."""
    checksum = google_crc32c.value(data)
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


@contextmanager
def fast_checksums() -> Iterator[None]:
    """Write all event files of this process with the library inside; the bytes stay the same."""
    if google_crc32c.implementation != "c":
        yield
        return
    earlier = replace_checksums(masked_crc32c)
    try:
        yield
    finally:
        replace_checksums(earlier)
