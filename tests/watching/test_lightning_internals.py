"""The canary: every private part of Lightning and TensorBoard that is used is still there, and what its loss costs."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer, record_writer
from torch.utils.tensorboard import SummaryWriter

from attention_visualizer.support.errors import UserError
from attention_visualizer.watching.attention_logger import AttentionLogger
from attention_visualizer.watching.lightning_internals import (
    SAVER_PARTS,
    is_event_writer,
    missing_for_saving,
    require_saving,
)
from tests.helpers.runs import BRIEF, run_folders, run_train
from tests.helpers.trainers import Steps, attention_warnings, fit, kept_in, new_trainer, vit

VERSIONS = ", ".join(f"{name} {version(name)}" for name in ("lightning", "torch", "tensorboard"))


def trainer(folder: Path) -> Trainer:
    return new_trainer(folder, ModelCheckpoint(), enable_checkpointing=True)


def test_every_private_part_is_there(tmp_path: Path) -> None:
    parts = (
        (SummaryWriter, "_get_file_writer"),
        (event_file_writer, "_AsyncWriterThread"),
        (record_writer, "masked_crc32c"),
    )
    missing = missing_for_saving(trainer(tmp_path))
    missing += [f"{owner.__name__}.{name}" for owner, name in parts if not hasattr(owner, name)]
    assert not missing, f"gone from {VERSIONS}: {missing}; see watching/lightning_internals.py"


def test_tensorboards_own_thread_is_known(tmp_path: Path) -> None:
    writer = event_file_writer.EventFileWriter(str(tmp_path))
    assert is_event_writer(writer._async_writer._worker) and not is_event_writer(None)
    writer.close()


@pytest.mark.parametrize("name", [name for name in SAVER_PARTS if name != "_last_global_step_saved"])
def test_without_a_part_for_saving_nothing_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delattr(ModelCheckpoint, name)
    message = f"lightning {version('lightning')} has no ModelCheckpoint.{name}: install lightning>=2.6.6,<2.7"
    with pytest.raises(UserError, match=message):
        require_saving(trainer(tmp_path))


def test_without_parts_for_saving_train_py_ends_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attention_visualizer.watching.lightning_internals.BATCH_PROGRESS", "gone")
    outcome = run_train(*BRIEF, folder=tmp_path)
    assert outcome.exit_code == 2 and "has no gone in the fit loop's state" in outcome.err
    assert not run_folders(tmp_path)


def test_without_a_part_for_watching_there_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(logger: TensorBoardLogger, *_: object) -> None:
        logger.experiment._get_the_file_writer()

    monkeypatch.setattr("attention_visualizer.watching.loggers.add_summary", gone)
    with attention_warnings() as lines:
        fit(tmp_path, Steps(vit()), AttentionLogger(), logger=TensorBoardLogger(tmp_path, name="board", version=""))
    assert [line.split("'")[0] for line in lines] == [
        f"AttentionLogger: TensorBoardLogger gets no more {kind}: " for kind in ("images", "histograms")
    ]
    assert len(kept_in(tmp_path).frames) == 6
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    assert "vit_entropy/layer_1" in board.Tags()["scalars"]
