"""Write a checkpoint's weights as a safetensors file, for programs that take no pickle."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save

from attention_visualizer.files.atomic import atomic_path
from attention_visualizer.files.digests import weights_digest
from attention_visualizer.files.tensor_files import CHECKPOINT_KEY, HASH
from attention_visualizer.runs.checkpoint import block_for, load_checkpoint


def export_safetensors(checkpoint: str | Path, path: str | Path, num_heads: int | None = None) -> Path:
    """Write the checkpoint's weights, float32, with the model's configuration, the data set's description and a hash
    over all of them; return `path`. `load_checkpoint` reads it back and refuses it when a bit has changed.

    num_heads: of the model, for a checkpoint that does not say it."""
    loaded = load_checkpoint(checkpoint, num_heads=num_heads)
    block = block_for(
        loaded.model_config, loaded.data, data_dir=None, split_seed=loaded.split_seed, seed=loaded.seed
    ) | {"validation_accuracy": loaded.validation_accuracy}
    settings = json.dumps({CHECKPOINT_KEY: block, "epoch": loaded.epoch, "global_step": loaded.step}, sort_keys=True)
    weights = {name: tensor.contiguous() for name, tensor in loaded.state_dict.items()}
    metadata = {"format": "pt", CHECKPOINT_KEY: settings, HASH: weights_digest(weights, settings)}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(weights, metadata))
    return Path(path)
