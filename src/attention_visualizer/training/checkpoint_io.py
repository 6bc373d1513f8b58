"""How Lightning writes checkpoints, whole, and reads those that training goes on from."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from attention_visualizer.files.atomic import atomic_path
from attention_visualizer.files.tensor_files import existing_file, read_torch
from attention_visualizer.runs.checkpoint import LoadedCheckpoint
from attention_visualizer.support.errors import reading


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's reader and writer of checkpoints, except that a kill never leaves half a file under the final
    name, and that only intact files of plain data and tensors are resumed from.

    loaded: a checkpoint that was read with its content, which is handed out, once, in the place of reading its file.
    """

    def __init__(self, loaded: LoadedCheckpoint | None = None) -> None:
        super().__init__()
        self._loaded = loaded

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if storage_options is not None:
            raise TypeError("AtomicCheckpointIO writes to a local disk and takes no storage_options")
        # Through memory, as Lightning does: torch.save into a file reports a full disk as a RuntimeError of its own.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        with atomic_path(path) as temporary:
            temporary.write_bytes(buffer.getbuffer())

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Load with weights_only=True, whatever is asked for."""
        if self._loaded is not None and self._loaded.content is not None and Path(path) == self._loaded.path:
            content, self._loaded = self._loaded.content, None
            return content
        path = existing_file(path)
        with reading(path), path.open("rb") as file:
            return read_torch(file, path, map_location)
