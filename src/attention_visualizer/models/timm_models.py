"""Build timm's models by name, with weights from a file that is checked before it is used."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attention_visualizer.files.tensor_files import existing_file, read_tensor_file
from attention_visualizer.files.weights import WEIGHT_TYPES, bare_names, check_weights, finite_weights
from attention_visualizer.support.errors import UserError, summary
from attention_visualizer.support.text import nearest

LEGACY = b"\x80\x02\x8a"  # the first bytes of a file of torch.save before PyTorch 1.6
NESTED = ("state_dict", "model_state_dict", "model", "state_dict_ema", "model_ema", "teacher")


def build(model_from: str, ckpt: str, seed: int = 0) -> nn.Module:
    """Build the model `timm:<name>` in eval mode on the CPU, as many classes as its weights have.

    ckpt: a file of weights (.safetensors, .pth, .ckpt), "random" for untrained ones, or "pretrained" for those that
    timm downloads. Raise UserError for an unknown name and for weights that do not fit it exactly.
    """
    library, _, name = model_from.partition(":")
    if library != "timm" or not name:
        raise UserError(f"model_from={model_from}: write timm:<name>, such as timm:vit_tiny_patch16_224")
    try:
        import timm  # not needed for this project's own models
    except ImportError:
        raise UserError(f"model_from={model_from} needs timm: python -m pip install timm") from None
    if not timm.is_model(name.split(".")[0]):
        similar = nearest(name, timm.list_models(), 5) or timm.list_models("vit_*patch16_224")[:5]
        raise UserError(f"model_from={model_from}: timm has no such model; it has, among others, {', '.join(similar)}")
    if ckpt == "pretrained":
        try:
            with offline_if_unreachable():
                pretrained: Any = timm.create_model(name, pretrained=True).eval()
        except Exception as error:  # the hub's own kinds, requests' and the operating system's
            raise UserError(
                f"ckpt=pretrained: the weights of {name} cannot be downloaded ({summary(error):.120}): "
                "give a file of them as ckpt="
            ) from error
        pretrained.pretrained_cfg.setdefault("label_names", imagenet_names(pretrained))
        return pretrained
    weights: Mapping[str, Tensor] | None = None if ckpt == "random" else read_weights(ckpt)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            options: dict[str, Any] = {}
            if weights is not None:
                with torch.device("meta"):
                    plain = timm.create_model(name)
                weights = without_prefix(weights, plain.state_dict())
                options = options_shown_by(weights, plain)
            model: nn.Module = timm.create_model(name, **options)
        except Exception as error:  # whatever a model's own constructor raises
            raise UserError(f"model_from={model_from}: timm cannot build this model ({summary(error):.120})") from error
    if weights is not None:
        load(model, weights, Path(ckpt))
    return model.eval()


def imagenet_names(model: nn.Module) -> list[str] | None:
    """Return the names of ImageNet's classes where timm knows that the model gives these; else None."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(model)
    names = [] if not subset else ImageNetInfo(subset).label_descriptions()
    return [name.partition(",")[0] for name in names] or None  # without synonyms


@contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Where the hub cannot be reached, use Hugging Face's cache alone, as with HF_HUB_OFFLINE=1.

    Without this its client retries for a minute and prints each attempt.
    """
    logger = logging.getLogger("huggingface_hub")
    constants: Any = sys.modules.get("huggingface_hub.constants")
    before = logger.level, getattr(constants, "HF_HUB_OFFLINE", None)
    logger.setLevel(logging.CRITICAL)
    if before[1] is False and not reaches_hub(str(constants.ENDPOINT)):
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        logger.setLevel(before[0])
        if constants is not None:
            constants.HF_HUB_OFFLINE = before[1]


def reaches_hub(address: str) -> bool:
    """Whether DNS resolves the name of the hub, or a proxy may do so."""
    if any(name.lower() in ("https_proxy", "http_proxy", "all_proxy") for name in os.environ):
        return True
    try:
        socket.getaddrinfo(address.partition("://")[2].split("/")[0].split(":")[0], 443)
    except OSError:
        return False
    return True


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a checked file by name. Raise UserError for one that is broken, unsafe, or holds none."""
    path = existing_file(path)
    with path.open("rb") as start:
        if start.read(len(LEGACY)) == LEGACY:
            raise UserError(f"{path} was written by a PyTorch before 1.6: load it and save it again with a newer one")
    file = read_tensor_file(path, "file of weights")
    content = file.content
    for name in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if isinstance(content, Mapping):
        other = next((name for name, value in content.items() if not isinstance(value, Tensor)), None)
        if other is not None:
            reason = f"holds {other!r:.60} where weights were expected: save the model's state_dict()"
            raise UserError(f"{path} {reason}")
    weights = bare_names(content, path)
    empty = next((name for name, tensor in weights.items() if not tensor.numel()), None)
    if empty is not None:  # its other sizes cost nothing to write, and would be those of a model
        raise UserError(f"{path} holds {empty!r:.60} without any number in it: choose another file")
    # Counters and index tables beside the weights are whole numbers.
    check_weights(weights, path, file.size, (*WEIGHT_TYPES, torch.int64, torch.int32, torch.bool))
    return finite_weights(weights, path)


def without_prefix(weights: Mapping[str, Tensor], expected: Iterable[str]) -> Mapping[str, Tensor]:
    """Take from the names what the modules around the model added ("vit." in a LightningModule), where the rest are
    names of the model alone; vectors of other parts, such as a loss's weights of classes, are left out."""
    inside, found = frozenset(expected), weights
    while not inside.issuperset(found):
        first_parts = {name.partition(".")[0] for name, tensor in found.items() if tensor.ndim > 1}
        if len(first_parts) != 1:
            return weights
        prefix = f"{first_parts.pop()}."
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
    return found or weights


def options_shown_by(weights: Mapping[str, Tensor], plain: Any) -> dict[str, Any]:
    """Return the arguments of timm's constructor that the weights show, other than those of the `plain` model: classes,
    input channels, image size."""
    options: dict[str, Any] = {}
    config: dict[str, Any] = plain.pretrained_cfg or {}
    # A distilled model has two classifiers of one size.
    classifier, first = (
        names[0] if isinstance(names, tuple | list) else names
        for names in (config.get("classifier"), config.get("first_conv"))
    )
    renamed = translated(weights, plain)
    if f"{classifier}.weight" in plain.state_dict():
        head = renamed.get(f"{classifier}.weight")
        options["num_classes"] = 0 if head is None else head.shape[0]
    convolution = renamed.get(f"{first}.weight")
    if convolution is not None and convolution.ndim == 4:
        options["in_chans"] = convolution.shape[1]
    grid = getattr(getattr(plain, "patch_embed", None), "grid_size", None)
    positions, own_positions = weights.get("pos_embed"), plain.state_dict().get("pos_embed")
    if grid is not None and positions is not None and own_positions is not None:
        prefix = own_positions.shape[1] - grid[0] * grid[1]
        side = round(max(positions.shape[1] - prefix, 0) ** 0.5)
        if positions.shape[1] != own_positions.shape[1] and side * side + prefix == positions.shape[1]:
            options["img_size"] = side * plain.patch_embed.patch_size[0]
    return options


def translated(weights: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
    """Rename weights from a model's original publication to timm's names, as timm does for its downloads."""
    translate = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if translate is None or weights.keys() == model.state_dict().keys():
        return weights
    try:
        return translate(dict(weights), model)
    except Exception:  # an unknown layout: `load` reports what does not fit
        return weights


def load(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Load the weights. Raise UserError with the first differences unless they fit the model exactly."""
    weights = translated(weights, model)
    expected = model.state_dict()
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
