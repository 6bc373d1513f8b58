"""Read checkpoints, checked before they are used.

A checkpoint holds plain scalars, lists and dictionaries beside its tensors, and nothing is ever instantiated from
a name found inside it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attention_visualizer.data.images import DatasetDescription
from attention_visualizer.files.tensor_files import CHECKPOINT_KEY, existing_file, read_tensor_file
from attention_visualizer.files.weights import bare_names, check_weights, finite_weights
from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.models.vit_config import ViTConfig
from attention_visualizer.runs.config_fields import is_architecture, values_before_added
from attention_visualizer.support.errors import UserError

FORMAT = 1
MAX_GRID = 256  # patches a side; beyond it attention would not fit any memory
MODEL_FIELDS = {field.name for field in dataclasses.fields(ViTConfig)}
TRAINING_FIELDS = {"dropout", "attention_dropout"}  # which a trained model computes nothing with


@dataclass(frozen=True, eq=False)
class LoadedCheckpoint:
    """A checked checkpoint. Fields that default to None are None in files that do not record them."""

    path: Path
    sha256: str  # the first 16 digits of the file's hash, to tell checkpoints of one name apart
    model_config: ViTConfig
    state_dict: dict[str, Tensor]  # float32, names without prefixes; fits `model_config` exactly
    data: DatasetDescription | None = None  # the data set that it was trained on
    data_dir: str | None = None
    split_seed: int | None = None
    seed: int | None = None
    epoch: int | None = None
    step: int | None = None
    validation_accuracy: float | None = None
    content: dict[str, Any] | None = None  # all that the file holds, where it was asked for: to resume training

    def build_model(self) -> VisionTransformer:
        """Build the model on the CPU in eval mode. Leave the global random state alone."""
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            model = VisionTransformer(self.model_config)
        model.load_state_dict(self.state_dict)
        return model.eval()


def block_for(
    model_config: ViTConfig,
    data: DatasetDescription | None,
    *,
    data_dir: str | None,
    split_seed: int | None,
    seed: int | None,
) -> dict[str, Any]:
    """Make the entry CHECKPOINT_KEY of a Lightning checkpoint: what `load_checkpoint` needs beside the weights."""
    return {
        "format": FORMAT,
        "model": model_config.to_dict(),
        "data": None if data is None else data.to_dict(),
        "data_dir": data_dir,
        "split_seed": split_seed,
        "seed": seed,
        "validation_accuracy": None,
    }


def load_checkpoint(path: str | Path, keep_content: bool = False, num_heads: int | None = None) -> LoadedCheckpoint:
    """Read a `.ckpt` of this project, a `.pth` of {"model_state_dict", "config"}, a bare state dict, or safetensors.

    The last two may lack a configuration: sizes are then read off the weights, which do not show the number of heads:
    `num_heads` gives it. Raise UserError with the reason for any file that is broken, unsafe, of another architecture,
    or does not say which model it holds. (Safetensors files carry no checksum, but for those that
    `export.export_safetensors` writes: in others a flipped bit cannot be noticed.)
    """
    path = existing_file(path)
    file = read_tensor_file(path)
    fields = interpret(file.content, path)
    weights = bare_names(fields.pop("state_dict"), path)
    check_weights(weights, path, file.size)
    given = {} if num_heads is None else {"num_heads": num_heads}
    config = check_architecture(weights, given | fields["model_config"], path)
    if config.num_heads != given.get("num_heads", config.num_heads):
        raise UserError(f"{path} says that its model has {config.num_heads} heads: leave out num_heads={num_heads}")
    fields["model_config"] = config
    return LoadedCheckpoint(
        path=path,
        sha256=file.digest,
        state_dict=finite_weights(weights, path),
        content=file.content if keep_content else None,
        **fields,
    )


def interpret(content: Any, path: Path) -> dict[str, Any]:
    """Return LoadedCheckpoint's fields, unchecked weights and those fields of the model configuration that the file
    holds among them, from any of the known layouts. Raise UserError for others."""
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__} where a dictionary of weights was expected")
    if CHECKPOINT_KEY in content:
        return interpret_block(content, path)
    if "model_state_dict" in content:
        config = content.get("config", {})
        if not isinstance(config, Mapping):
            raise UserError(f"{path} has a config that is a {type(config).__name__}: expected a dictionary")
        known = {name: config[name] for name in MODEL_FIELDS if name in config}
        return {"state_dict": content["model_state_dict"], "model_config": known}
    if "state_dict" in content:
        reason = f"does not say which model it holds (it has no {CHECKPOINT_KEY!r} entry)"
        raise UserError(f"{path} {reason}: it is from another project")
    return {"state_dict": content, "model_config": {}}


def interpret_block(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """As `interpret`, for a file with a block of `block_for`: exactly the known fields."""
    block = content[CHECKPOINT_KEY]
    if not isinstance(block, Mapping) or not isinstance(block.get("format"), int) or block["format"] != FORMAT:
        other = block.get("format") if isinstance(block, Mapping) else block
        raise UserError(f"{path} is of format {other!r:.60}, this version reads {FORMAT}: update attention-visualizer")
    config = block.get("model")
    if isinstance(config, Mapping):
        added = {name.removeprefix("model."): value for name, value in values_before_added("model.").items()}
        config = added | dict(config)
    wrong = config.keys() ^ MODEL_FIELDS if isinstance(config, dict) else {"model"}
    if wrong:
        raise UserError(f"{path} has unknown or missing model fields: {sorted(map(str, wrong))!r:.90}")

    def typed(fields: Mapping[str, Any], name: str, kind: type) -> Any:
        value = fields.get(name)
        if value is not None and not isinstance(value, kind):
            raise UserError(f"{path} has {name}={value!r:.60}: expected a {kind.__name__}")
        return value

    data = typed(block, "data", dict)
    try:
        description = None if data is None else DatasetDescription.from_dict(data)
    except UserError as error:
        raise UserError(f"{path} has a broken {error}") from error
    return {
        "state_dict": content.get("state_dict"),
        "model_config": config,
        "data": description,
        "data_dir": typed(block, "data_dir", str),
        "split_seed": typed(block, "split_seed", int),
        "seed": typed(block, "seed", int),
        "epoch": typed(content, "epoch", int),
        "step": typed(content, "global_step", int),
        "validation_accuracy": typed(block, "validation_accuracy", float),
    }


def check_architecture(weights: Mapping[str, Tensor], fields: Mapping[str, Any], path: Path) -> ViTConfig:
    """Return the model configuration of these fields, and for those that are not there, of what the weights show.

    Raise UserError with the first difference between `weights` and the model that it describes, and for a field that
    neither tells."""
    for field, value in fields.items():
        if not isinstance(value, int | float | str):
            raise UserError(f"{path} has model.{field} as a {type(value).__name__}: expected a number or a word")
    shown = fields_shown_by(weights, path)
    for field, value in shown.items():
        if fields.get(field, value) != value:
            difference = f"has weights of model.{field}={value}, but its configuration says {fields[field]!r:.60}"
            raise UserError(f"{path} {difference}")
    fields = shown | dict(fields)
    unknown = MODEL_FIELDS - fields.keys() - TRAINING_FIELDS
    if "num_heads" in unknown:
        raise UserError(f"{path} does not say how many attention heads its model has: give num_heads=")
    if unknown:
        missing = f"does not say its model's {min(unknown)}, nor do its weights"
        raise UserError(f'{path} {missing}: save it as {{"model_state_dict": ..., "config": ...}}')
    # Only now are the sizes known to be sane: they are those of tensors that fit into the file.
    size = fields["img_size"]
    if "img_size" not in shown and isinstance(size, int) and size > MAX_GRID * shown["patch_size"]:
        raise UserError(f"{path} has model.img_size={size}, over {MAX_GRID} patches a side: too large")
    try:
        config = ViTConfig(**fields)
    except UserError as error:
        raise UserError(f"{path} {error!s:.300}") from error
    with torch.device("meta"):
        expected = VisionTransformer(config).state_dict()
    for name, tensor in expected.items():
        if name not in weights:
            raise UserError(f"{path} lacks the weights {name}: it is of another architecture")
        if weights[name].shape != tensor.shape:
            shapes = f"{list(weights[name].shape)}, expected {list(tensor.shape)}"
            raise UserError(f"{path} has {name} of shape {shapes}: it is of another architecture")
    for name in weights:
        if name not in expected:
            raise UserError(f"{path} has the unknown weights {name!r:.60}: it is of another architecture")
    return config


def fields_shown_by(weights: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Return the fields of a model's configuration that its weights show (the number of heads they do not)."""
    other = f"{path} is of another architecture"
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    ranks = {"patch_embed.proj.weight": 4, "head.weight": 2, "blocks.0.mlp.fc1.weight": 2}
    for name, rank in ranks.items():
        if len(shapes.get(name, ())) != rank:
            raise UserError(f"{other}: no VisionTransformer of this project ({name} is not there)")
    _, in_channels, _, patch_size = shapes["patch_embed.proj.weight"]
    convolutions = [shapes[name] for name in shapes if re.fullmatch(r"patch_embed\.convolutions\.\d+\.weight", name)]
    if convolutions:
        if len(convolutions[0]) != 4:
            raise UserError(f"{other}: patch_embed.convolutions.0.weight is no convolution's")
        in_channels, patch_size = convolutions[0][1], 2 ** len(convolutions)
    num_classes, embed_dim = shapes["head.weight"]
    shown: dict[str, Any] = {
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
        shown["positional_embedding"] = "learned"
        if len(shapes["pos_embed"]) == 3:
            num_patches = shapes["pos_embed"][1] - ("cls_token" in shapes)
            shown["img_size"] = math.isqrt(max(0, num_patches)) * patch_size
    return shown


def refuse_other_settings(loaded: LoadedCheckpoint, model_config: ViTConfig, data: DatasetDescription) -> None:
    """Raise UserError if training cannot go on from `loaded` with this model and data set."""
    trained = loaded.model_config.to_dict()
    for field, value in model_config.to_dict().items():
        if is_architecture(field) and value != trained[field]:
            raise UserError(
                f"model.{field}={value} cannot resume {loaded.path}, which was trained with {trained[field]}"
            )
    asked = data.to_dict()
    for field, value in ({} if loaded.data is None else loaded.data.to_dict()).items():
        if asked[field] != value:
            raise UserError(
                f"the data set's {field} is {asked[field]!r:.60} and {loaded.path} was trained with {value!r:.60}: "
                "resume with the data set of the run"
            )
