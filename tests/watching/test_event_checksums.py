"""The library's checksums are TensorBoard's own, and TensorBoard reads what is written with them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.tensorflow_stub import pywrap_tensorflow
from tensorboard.summary.writer import record_writer

from attention_visualizer.watching.event_checksums import masked_crc32c
from attention_visualizer.watching.loggers import Loggers


@pytest.mark.parametrize("size", [0, 1, 8, 24, 1000, 24_001])
def test_checksums_are_tensorboards(size: int) -> None:
    data = random.Random(size).randbytes(size)
    assert masked_crc32c(data) == pywrap_tensorflow.masked_crc32c(data)


def test_known_checksum() -> None:
    # RFC 3720, B.4: 32 bytes of zeros.
    checksum = 0x8A9136AA
    assert masked_crc32c(bytes(32)) == ((checksum >> 15 | checksum << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF


def test_a_tensorboard_logger_gets_them_while_it_trains(tmp_path: Path) -> None:
    with Loggers().fast_checksums():
        assert record_writer.masked_crc32c is pywrap_tensorflow.masked_crc32c
    loggers = Loggers([TensorBoardLogger(tmp_path, name="board", version="")])
    with loggers.fast_checksums():
        assert record_writer.masked_crc32c is masked_crc32c
        for step in range(3):
            loggers.log_scalars({"number": step / 2}, step)
        loggers.loggers[0].finalize("success")
    assert record_writer.masked_crc32c is pywrap_tensorflow.masked_crc32c
    # Its reader computes the checksums anew, and ends at the first that differs.
    written = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [event.value for event in written.Scalars("number")] == [0.0, 0.5, 1.0]


def test_the_writer_uses_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    loggers = Loggers([TensorBoardLogger(tmp_path, name="board", version="")])
    monkeypatch.setattr(record_writer, "masked_crc32c", lambda data: seen.append(len(data)) or masked_crc32c(data))
    loggers.log_scalars({"number": 1.0}, 0)
    loggers.loggers[0].finalize("success")
    assert 8 in seen and max(seen) > 8  # each record's length, and the records
