"""Lightning's reader and writer of checkpoints writes whole files, reads only whole ones, and reads one once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from attention_visualizer.runs.checkpoint import load_checkpoint
from attention_visualizer.support.errors import UserError
from attention_visualizer.training.checkpoint_io import AtomicCheckpointIO
from tests.helpers.checkpoints import content_of, same_weights, saved_in, small_model


def test_checkpoint_io_writes_whole_files_and_reads_only_whole_ones(tmp_path: Path) -> None:
    model = small_model()
    path = tmp_path / "checkpoints" / "last.ckpt"
    io = AtomicCheckpointIO()
    io.save_checkpoint(content_of(model), str(path))
    assert os.listdir(path.parent) == ["last.ckpt"]
    assert io.load_checkpoint(str(path))["global_step"] == 17
    assert same_weights(load_checkpoint(path), model)
    whole = path.read_bytes()
    with pytest.raises(AttributeError):  # what cannot be pickled leaves the old file
        io.save_checkpoint({"function": lambda: None}, path)
    assert path.read_bytes() == whole and os.listdir(path.parent) == ["last.ckpt"]
    path.write_bytes(whole[:-101])
    with pytest.raises(UserError, match=r"last\.ckpt is truncated or corrupt"):
        io.load_checkpoint(path)
    io.remove_checkpoint(path)
    with pytest.raises(UserError, match=r"last\.ckpt does not exist"):
        io.load_checkpoint(path)


def test_checkpoint_io_serves_a_trainer(tmp_path: Path) -> None:
    class Tiny(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 2)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.layer(batch).square().sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    def trainer(max_epochs: int) -> Trainer:
        return Trainer(
            max_epochs=max_epochs,
            plugins=AtomicCheckpointIO(),
            callbacks=ModelCheckpoint(tmp_path, "best", save_last=True),
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    batches = torch.utils.data.DataLoader(torch.ones(6, 3), batch_size=2)  # type: ignore[var-annotated,arg-type]
    trainer(1).fit(Tiny(), batches)
    assert sorted(os.listdir(tmp_path)) == ["best.ckpt", "last.ckpt"]
    resumed = trainer(2)
    resumed.fit(Tiny(), batches, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert resumed.global_step == 6


def test_a_resumed_checkpoint_is_handed_out_once_and_its_file_not_read_again(tmp_path: Path) -> None:
    saved = saved_in(tmp_path, small_model())
    io = AtomicCheckpointIO(load_checkpoint(saved, keep_content=True))
    whole = saved.read_bytes()
    saved.write_bytes(whole[:-101])
    assert io.load_checkpoint(str(saved))["global_step"] == 17
    with pytest.raises(UserError, match="truncated or corrupt"):  # best.ckpt may have been replaced while training
        io.load_checkpoint(str(saved))
    saved.write_bytes(whole)
    torch.save({"other": 3}, tmp_path / "other.ckpt")
    assert AtomicCheckpointIO(load_checkpoint(saved, keep_content=True)).load_checkpoint(tmp_path / "other.ckpt") == {
        "other": 3
    }
