"""Checkpoints, checked before they are used: nothing is built from a file that has not been looked through.

A checkpoint holds plain scalars, lists and dictionaries beside its tensors, and nothing is ever instantiated from
a name found inside it.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from attention_visualizer.files.atomic import atomic_path
from attention_visualizer.files.tensor_files import (
    CHECKPOINT_KEY,
    EXPECTED,
    existing_file,
    read_safetensors,
    read_torch,
)
from attention_visualizer.files.weights import bare_names, check_weights, finite_weights
from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.models.vit_config import ViTConfig
from attention_visualizer.runs.config_fields import is_architecture, values_before_added
from attention_visualizer.support.errors import UserError

FORMAT = 1
LARGEST_GRID = 256  # patches a side; beyond it attention would not fit any memory
DEFAULT_CONFIG = ViTConfig().to_dict()


@dataclass(frozen=True, eq=False)
class LoadedCheckpoint:
    """A checked checkpoint: `state_dict` (float32, names without prefixes) fits `model_config` exactly.

    data: the data set's description, None in files that do not know it, like each field after it.
    sha256: the first 16 digits of the file's hash, to tell checkpoints of one name apart.
    """

    path: Path
    sha256: str
    model_config: dict[str, Any]
    state_dict: dict[str, Tensor]
    data: dict[str, Any] | None = None
    data_dir: str | None = None
    split_seed: int | None = None
    seed: int | None = None
    epoch: int | None = None
    step: int | None = None
    validation_accuracy: float | None = None
    #: All that the file holds, where it was asked for: what training goes on from.
    content: dict[str, Any] | None = None

    def build_model(self) -> VisionTransformer:
        """The model on the CPU in eval mode. Leaves the global random state alone."""
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            model = VisionTransformer(**self.model_config)
        model.load_state_dict(self.state_dict)
        return model.eval()


def block_for(
    model_config: dict[str, Any],
    data: dict[str, Any] | None,
    *,
    data_dir: str | None,
    split_seed: int | None,
    seed: int | None,
) -> dict[str, Any]:
    """What `load_checkpoint` needs beside the weights; goes into a Lightning checkpoint under the name BLOCK."""
    return {
        "format": FORMAT,
        "model": dict(model_config),
        "data": data,
        "data_dir": data_dir,
        "split_seed": split_seed,
        "seed": seed,
        "validation_accuracy": None,
    }


def load_checkpoint(path: str | Path, keep_content: bool = False) -> LoadedCheckpoint:
    """Read a `.ckpt` of this project, a `.pth` of {"model_state_dict", "config"}, a bare state dict, or safetensors.

    The last two may lack a configuration; they are then taken for VisionTransformer's defaults. Raises UserError
    with the reason for any file that is broken, unsafe, or of another architecture. (Safetensors files carry no
    checksum, but for those that `export.export_safetensors` writes: in others a flipped bit cannot be noticed.)
    """
    path = existing_file(path)
    try:
        with path.open("rb") as file:  # one handle: a run that is still training may replace the file meanwhile
            start = file.read(9)
            if start.startswith(b"PK\x03\x04"):
                content = read_torch(file)
            elif start[8:] == b"{":  # eight bytes of length, then a JSON header
                content = read_safetensors(path)
            else:
                raise UserError(f"is not a checkpoint: {EXPECTED}")
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        fields = interpret(content)
        check_weights(fields["state_dict"], size)
        check_architecture(fields["state_dict"], fields["model_config"])
        fields["state_dict"] = finite_weights(fields["state_dict"])
    except UserError as error:
        raise UserError(f"{path} {error!s:.300}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    return LoadedCheckpoint(path=path, sha256=sha256, **fields, content=content if keep_content else None)


def interpret(content: Any) -> dict[str, Any]:
    """LoadedCheckpoint's fields from any of the known layouts. Raises UserError for others."""
    if not isinstance(content, Mapping):
        raise UserError(f"holds a {type(content).__name__} where a dictionary of weights was expected")
    if CHECKPOINT_KEY in content:
        return interpret_block(content)
    if "model_state_dict" in content:
        config = content.get("config", {})
        if not isinstance(config, Mapping):
            raise UserError(f"has a config that is a {type(config).__name__}: expected a dictionary")
        known = {name: config[name] for name in DEFAULT_CONFIG if name in config}
        return {"state_dict": bare_names(content["model_state_dict"]), "model_config": DEFAULT_CONFIG | known}
    if "state_dict" in content:
        raise UserError(
            f"does not say which model it holds (it has no {CHECKPOINT_KEY!r} entry): it is from another project"
        )
    return {"state_dict": bare_names(content), "model_config": dict(DEFAULT_CONFIG)}


def interpret_block(content: Mapping[str, Any]) -> dict[str, Any]:
    """As `interpret`, for a file written through `block_for`: exactly the known fields."""
    block = content[CHECKPOINT_KEY]
    if not isinstance(block, Mapping) or not isinstance(block.get("format"), int) or block["format"] != FORMAT:
        found = block.get("format") if isinstance(block, Mapping) else block
        raise UserError(f"is of format {found!r:.60}, this version reads {FORMAT}: update attention-visualizer")
    config = block.get("model")
    if isinstance(config, Mapping):
        added = {name.removeprefix("model."): value for name, value in values_before_added("model.").items()}
        config = added | dict(config)
    if not isinstance(config, Mapping) or set(config) != set(DEFAULT_CONFIG):
        odd = set(config) ^ set(DEFAULT_CONFIG) if isinstance(config, Mapping) else {"model"}
        raise UserError(f"has unknown or missing model fields: {sorted(map(str, odd))!r:.90}")
    data = typed(block, "data", dict)
    if any(isinstance(value, Tensor) for value in (data or {}).values()):
        raise UserError("describes its data set with tensors: it was changed, choose another checkpoint")
    return {
        "state_dict": bare_names(content.get("state_dict")),
        "model_config": {name: config[name] for name in DEFAULT_CONFIG},
        "data": data,
        "data_dir": typed(block, "data_dir", str),
        "split_seed": typed(block, "split_seed", int),
        "seed": typed(block, "seed", int),
        "epoch": typed(content, "epoch", int),
        "step": typed(content, "global_step", int),
        "validation_accuracy": typed(block, "validation_accuracy", float),
    }


def typed(fields: Mapping[str, Any], name: str, kind: type) -> Any:
    """`fields[name]`, which may be absent or None. Raises UserError if it is of another kind."""
    value = fields.get(name)
    if value is not None and not isinstance(value, kind):
        raise UserError(f"has {name}={value!r:.60}: expected a {kind.__name__}")
    return value


def check_architecture(weights: Mapping[str, Tensor], config: dict[str, Any]) -> None:
    """Raises UserError with the first difference between `weights` and the model that `config` describes."""
    for field, value in config.items():
        if not isinstance(value, int | float | str):
            raise UserError(f"has model.{field} as a {type(value).__name__}: expected a number or a word")
    told = config_told_by(weights)
    for field, value in told.items():
        if config[field] != value:
            raise UserError(f"has weights of model.{field}={value}, but its configuration says {config[field]!r:.60}")
    # Only now are the sizes known to be sane: they are those of tensors that fit into the file.
    if "img_size" not in told and isinstance(config["img_size"], int):
        if config["img_size"] > LARGEST_GRID * told["patch_size"]:
            raise UserError(f"has model.img_size={config['img_size']}, over {LARGEST_GRID} patches a side: too large")
    with torch.device("meta"):
        expected = VisionTransformer(**config).state_dict()
    for name, tensor in expected.items():
        if name not in weights:
            raise UserError(f"lacks the weights {name}: it is of another architecture")
        if weights[name].shape != tensor.shape:
            shapes = f"{list(weights[name].shape)}, expected {list(tensor.shape)}"
            raise UserError(f"has {name} of shape {shapes}: it is of another architecture")
    for name in weights:
        if name not in expected:
            raise UserError(f"has the unknown weights {name!r:.60}: it is of another architecture")


def config_told_by(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of a model's configuration that its weights show (the number of heads they do not)."""
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    ranks = {"patch_embed.proj.weight": 4, "head.weight": 2, "blocks.0.mlp.fc1.weight": 2}
    for name, rank in ranks.items():
        if len(shapes.get(name, ())) != rank:
            raise UserError(f"is of another architecture: no VisionTransformer of this project ({name} is not there)")
    _, in_channels, _, patch_size = shapes["patch_embed.proj.weight"]
    convolutions = [shapes[name] for name in shapes if re.fullmatch(r"patch_embed\.convolutions\.\d+\.weight", name)]
    if convolutions:
        if len(convolutions[0]) != 4:
            raise UserError("is of another architecture: patch_embed.convolutions.0.weight is no convolution's")
        in_channels, patch_size = convolutions[0][1], 2 ** len(convolutions)
    num_classes, embed_dim = shapes["head.weight"]
    told: dict[str, Any] = {
        "patch_size": patch_size,
        "in_channels": in_channels,
        "num_classes": num_classes,
        "embed_dim": embed_dim,
        "num_layers": len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
        "mlp_dim": shapes["blocks.0.mlp.fc1.weight"][0],
        "pooling": "cls" if "cls_token" in shapes else "mean",
        "stem": "convolutions" if convolutions else "patches",
    }
    if "pos_embed" in shapes:
        told["positional_embedding"] = "learned"
        if len(shapes["pos_embed"]) == 3:
            num_patches = shapes["pos_embed"][1] - ("cls_token" in shapes)
            told["img_size"] = math.isqrt(max(0, num_patches)) * patch_size
    return told


def refuse_other_settings(loaded: LoadedCheckpoint, model_config: dict[str, Any], data: dict[str, Any]) -> None:
    """Raises UserError if training cannot go on from `loaded` with this model and data set."""
    for field, value in model_config.items():
        if is_architecture(field) and value != loaded.model_config[field]:
            trained = loaded.model_config[field]
            raise UserError(f"model.{field}={value} cannot resume {loaded.path}, which was trained with {trained}")
    for field, value in (loaded.data or {}).items():
        if data.get(field) != value:
            raise UserError(
                f"the data set's {field} is {data.get(field)!r:.60} and {loaded.path} was trained with {value!r:.60}: "
                "resume with the data set of the run"
            )


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
        try:
            with path.open("rb") as file:
                return read_torch(file, map_location)
        except UserError as error:
            raise UserError(f"{path} {error}") from error
