"""Models of other libraries by name, with weights from a file that is checked before it is used."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attention_visualizer.checkpoint import (
    EXPECTED,
    WEIGHT_TYPES,
    bare_names,
    check_weights,
    existing_file,
    finite_weights,
    read_safetensors,
    read_torch,
)
from attention_visualizer.errors import UserError

NESTED = ("state_dict", "model_state_dict", "model", "state_dict_ema", "model_ema", "teacher")


def build(model_from: str, ckpt: str, seed: int = 0) -> nn.Module:
    """The model `timm:<name>` in eval mode on the CPU, as many classes as its weights have.

    ckpt: a file of weights (.safetensors, .pth, .ckpt), "random" for untrained ones, or "pretrained" for those that
    timm downloads. Raises UserError for an unknown name and for weights that do not fit it exactly.
    """
    library, _, name = model_from.partition(":")
    if library != "timm" or not name:
        raise UserError(f"model_from={model_from}: write timm:<name>, such as timm:vit_tiny_patch16_224")
    try:
        import timm  # not needed for this project's own models
    except ImportError:
        raise UserError(f"model_from={model_from} needs timm: python -m pip install timm") from None
    if not timm.is_model(name.split(".")[0]):
        similar = timm.list_models(f"*{name.split('.')[0][:12]}*")[:5] or timm.list_models("vit_*patch16_224")[:5]
        raise UserError(f"model_from={model_from}: timm has no such model; it has, among others, {', '.join(similar)}")
    if ckpt == "pretrained":
        try:
            return timm.create_model(name, pretrained=True).eval()
        except Exception as error:  # the hub's own kinds, requests' and the operating system's
            reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
            raise UserError(
                f"ckpt=pretrained: the weights of {name} cannot be downloaded ({reason}): give a file of them as ckpt="
            ) from error
    weights = None if ckpt == "random" else read_weights(ckpt)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {} if weights is None else options_told_by(weights, timm.create_model, name)
        model: nn.Module = timm.create_model(name, **options)
    if weights is not None:
        load(model, weights, Path(ckpt))
    return model.eval()


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checked file by name. Raises UserError for a file that is broken, unsafe, or holds none."""
    path = existing_file(path)
    try:
        with path.open("rb") as file:
            start = file.read(9)
            if start.startswith(b"PK\x03\x04"):
                content: Any = read_torch(file)
            elif start[8:] == b"{":
                content = read_safetensors(path)["model_state_dict"]
            else:
                raise UserError(f"is not a file of weights: {EXPECTED}")
        for name in NESTED:
            if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
                content = content[name]
        weights = bare_names(content)
        # Counters and index tables beside the weights are whole numbers.
        check_weights(weights, path.stat().st_size, (*WEIGHT_TYPES, torch.int64, torch.int32, torch.bool))
        return finite_weights(weights)
    except UserError as error:
        raise UserError(f"{path} {error}") from error


def options_told_by(weights: Mapping[str, Tensor], create: Any, name: str) -> dict[str, Any]:
    """Arguments of timm's constructor that the weights show: classes and input channels."""
    with torch.device("meta"):
        plain = create(name)
    options: dict[str, Any] = {}
    config: dict[str, Any] = plain.pretrained_cfg or {}
    classifier = config.get("classifier")
    if isinstance(classifier, str):
        head = weights.get(f"{classifier}.weight")
        own = plain.state_dict().get(f"{classifier}.weight")
        if own is not None:
            options["num_classes"] = 0 if head is None else head.shape[0]
    first = config.get("first_conv")
    if isinstance(first, str) and f"{first}.weight" in weights and weights[f"{first}.weight"].ndim == 4:
        options["in_chans"] = weights[f"{first}.weight"].shape[1]
    grid = getattr(getattr(plain, "patch_embed", None), "grid_size", None)
    positions, own_positions = weights.get("pos_embed"), plain.state_dict().get("pos_embed")
    if grid is not None and positions is not None and own_positions is not None:
        prefix = own_positions.shape[1] - grid[0] * grid[1]
        side = round(max(positions.shape[1] - prefix, 0) ** 0.5)
        if positions.shape[1] != own_positions.shape[1] and side * side + prefix == positions.shape[1]:
            options["img_size"] = side * plain.patch_embed.patch_size[0]
    return options


def load(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Raises UserError with the first differences unless the weights fit the model exactly."""
    # Translates the names of a model's first publication into timm's, as timm does for its own downloads.
    translate = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    expected = model.state_dict()
    if translate is not None and weights.keys() != expected.keys():
        try:
            weights = translate(dict(weights), model)
        except Exception:  # it knows the layouts that it knows; the comparison below says what is wrong
            pass
    for name, tensor in expected.items():
        if name not in weights:
            raise UserError(f"{path} lacks the weights {name}: it is of another model than {type(model).__name__}")
        if weights[name].shape != tensor.shape:
            shapes = f"{list(weights[name].shape)}, expected {list(tensor.shape)}"
            if "pos_embed" in name:
                raise UserError(
                    f"{path} has {name} of shape {shapes}: it is of another image size, or of another model"
                )
            raise UserError(f"{path} has {name} of shape {shapes}: it is of another model")
    unknown = [name for name in weights if name not in expected]
    if unknown:
        raise UserError(f"{path} has the unknown weights {unknown[0]!r:.60}: it is of another model")
    model.load_state_dict(weights)
