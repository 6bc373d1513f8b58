"""Checkpoints as training writes them, of a small model of distinct sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from attention_visualizer.data.images import DatasetDescription
from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.models.vit_config import ViTConfig
from attention_visualizer.runs.checkpoint import CHECKPOINT_KEY, LoadedCheckpoint, block_for

SIZES: dict[str, Any] = {
    "img_size": 21,
    "patch_size": 7,
    "in_channels": 2,
    "num_classes": 5,
    "embed_dim": 44,
    "num_heads": 4,
    "num_layers": 3,
    "mlp_dim": 13,
}
DATA = DatasetDescription("mnist", 21, 2, tuple("01234"), 0.13, 0.31, {"train": 7, "validation": 5, "test": 3})


def small_model(**fields: Any) -> VisionTransformer:
    torch.manual_seed(7)
    return VisionTransformer(**SIZES | fields).eval()


def content_of(model: VisionTransformer, accuracy: float | None = 0.875) -> Any:
    """The content of a Lightning checkpoint of the model, as a run writes it."""
    block = block_for(ViTConfig(**model.config), DATA, data_dir="data", split_seed=3, seed=11)
    return {
        "state_dict": {f"model.{name}": tensor for name, tensor in model.state_dict().items()},
        "epoch": 2,
        "global_step": 17,
        "optimizer_states": [{"state": {0: {"step": torch.tensor(17.0)}}, "param_groups": [{"lr": 0.1}]}],
        CHECKPOINT_KEY: block | {"validation_accuracy": accuracy},
    }


def saved_in(folder: Path, model: VisionTransformer) -> Path:
    """Write the checkpoint of the model."""
    path = folder / "best.ckpt"
    torch.save(content_of(model), path)
    return path


def same_weights(loaded: LoadedCheckpoint, model: VisionTransformer) -> bool:
    expected = model.state_dict()
    return loaded.state_dict.keys() == expected.keys() and all(
        torch.equal(loaded.state_dict[name], tensor) for name, tensor in expected.items()
    )
