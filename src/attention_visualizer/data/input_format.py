"""What pictures a model takes: their size, channels and normalization, as it declares them and as it uses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from attention_visualizer.attention.capture import force_eager
from attention_visualizer.attention.geometry import Size, as_size, declared_layout
from attention_visualizer.attention.policies import PassIsOver
from attention_visualizer.support.errors import UserError

Fit = Literal["center", "squash", "border", "ink"]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPEN_CLIP_FITS = {"shortest": "center", "squash": "squash", "longest": "border"}
OF_BYTES = 0.1  # a model that multiplies its pixels by less takes 0..255, not 0..1
GIVE_FORMAT = "give image_format=InputFormat(size, channels, mean, std)"


@dataclass(frozen=True)
class InputFormat:
    """What a model of any origin takes: pixels as (height, width), the share of a picture's shorter side that is cut
    out of its middle, the mean and deviation of each channel in 0..1 units, and whether they are known to be the
    model's.

    fit: how a picture of another shape is brought to the model's: its middle is cut out ("center"), it is stretched
    ("squash"), or all of it is shown on a ground of the mean colour ("border") or, as light ink on dark, of its own
    border's colour ("ink": inverted where that is light, as MNIST's digits are).
    """

    size: Size
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_share: float = 1.0
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    declares_mean: bool = True
    fit: Fit = "center"

    @classmethod
    def of(cls, model: nn.Module, size: Size | int | None = None) -> InputFormat:
        """Read it from what models of timm, OpenCLIP, Hugging Face and torchvision declare, also inside others; `size`
        overrides theirs. What is done to the pixels on their way to the part that declares it is measured.

        Raise UserError where no size is declared, or it is not clear how pixels are to be normalized. Undeclared
        normalization is that of ImageNet, unless the model normalizes its images itself.
        """
        part, declared = declared_input(model)
        layout = declared_layout(model)
        pixels = as_size(size)
        if pixels is None and layout.grid is not None and layout.patch_size is not None:
            pixels = layout.grid[0] * layout.patch_size[0], layout.grid[1] * layout.patch_size[1]
        pixels = pixels or next(filter(None, (declared_by(each).get("size") for each in part.modules())), None)
        if pixels is None:
            raise UserError("the image size of this model is unknown: give it with image_size=")
        first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
        channels = first.in_channels if first is not None else 3
        mean, std = (
            values if len(values) == channels else (sum(values) / len(values),) * channels
            for values in (declared.get("mean", IMAGENET_MEAN), declared.get("std", IMAGENET_STD))
        )
        others = {name: declared[name] for name in ("crop_share", "interpolation", "fit") if name in declared}
        return outside_of(part, model, cls(pixels, channels, mean, std, declares_mean="mean" in declared, **others))


# --- as it is declared -------------------------------------------------------------------------------------------


def declared_input(model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """Return the outermost part that declares a normalization, with the fields of InputFormat that it declares; `model`
    itself where none does. Raise UserError where parts declare different ones."""
    found: list[tuple[nn.Module, dict[str, Any]]] = []
    waiting = [model]
    for module in waiting:
        declared = declared_by(module)
        if "mean" in declared:
            found.append((module, declared))
        else:
            waiting += module.children()
    if len({(each["mean"], each["std"]) for _, each in found}) > 1:
        raise UserError(f"parts of {type(model).__name__} declare different normalizations: {GIVE_FORMAT}")
    if found:
        return found[0]
    return model, {}


def declared_by(module: nn.Module) -> dict[str, Any]:
    """Return what a module declares, by the fields of InputFormat: as timm does, or OpenCLIP."""
    config: Any = getattr(module, "pretrained_cfg", None) or getattr(module, "preprocess_cfg", None)
    config = config if isinstance(config, Mapping) else {}
    inner: Any = getattr(module, "config", None)
    declared = {
        "size": as_size(tuple(config.get("input_size") or ())[1:])
        or as_size(config.get("size"))
        or as_size(getattr(module, "image_size", None))
        or as_size(getattr(inner, "image_size", None)),
        "mean": as_numbers(config.get("mean", getattr(module, "image_mean", None))),
        "std": as_numbers(config.get("std", getattr(module, "image_std", None))),
        "crop_share": config.get("crop_pct"),
        "interpolation": "bilinear" if config.get("interpolation") == "bilinear" else None,
        "fit": config.get("crop_mode", OPEN_CLIP_FITS.get(config.get("resize_mode", ""))),
    }
    if declared["fit"] not in get_args(Fit):
        del declared["fit"]
    if (declared["mean"] is None) != (declared["std"] is None):
        del declared["mean"], declared["std"]
    return {name: value for name, value in declared.items() if value is not None}


def as_numbers(value: Any) -> tuple[float, ...] | None:
    """Return a sequence of numbers, one a channel; None for anything else."""
    if isinstance(value, Tensor):
        value = value.flatten().tolist()
    is_numbers = isinstance(value, Sequence) and bool(value) and all(isinstance(each, int | float) for each in value)
    return tuple(map(float, value)) if is_numbers else None


# --- as it is used -----------------------------------------------------------------------------------------------


def outside_of(part: nn.Module, model: nn.Module, declared: InputFormat) -> InputFormat:
    """Return what `model` takes, so that `part` of it gets what is `declared`: pixels may be normalized, or scaled from
    bytes, on their way to it."""
    scaling = measured_scaling(part, model, declared)
    if scaling is None and part is not model:
        raise UserError(f"what {type(model).__name__} does to the pixels of its images is not known: {GIVE_FORMAT}")
    if scaling is None or scaling.is_none:
        return declared
    if not declared.declares_mean:  # it normalizes them itself
        largest = 1 / 255 if float(scaling.factor.abs().max()) < OF_BYTES else 1.0
        channels = declared.channels
        return replace(declared, mean=(0.0,) * channels, std=(largest,) * channels, declares_mean=True)
    if part is model:
        both = f"{type(model).__name__} declares a normalization of its images and scales them itself as well"
        raise UserError(f"{both}: {GIVE_FORMAT}")
    mean, std = (torch.tensor(values, dtype=torch.float64)[scaling.order] for values in (declared.mean, declared.std))
    outer_mean, outer_std = mean + std * scaling.shift, std * scaling.factor
    return replace(declared, mean=tuple(outer_mean.tolist()), std=tuple(outer_std.tolist()))


@dataclass(frozen=True)
class Scaling:
    """How pixels arrive inside a model: each channel times a factor, plus a shift, as another channel; [channel]."""

    factor: Tensor
    shift: Tensor
    order: Tensor

    @property
    def is_none(self) -> bool:
        is_same = bool((self.factor - 1).abs().max() < 1e-3 and self.shift.abs().max() < 1e-3)
        return is_same and bool((self.order.diff() > 0).all())


def measured_scaling(part: nn.Module, model: nn.Module, declared: InputFormat) -> Scaling | None:
    """Return how the pixels of the model's images arrive at `part`, or, if that is the model itself, at its first
    convolution; None where they are not seen to arrive. A model that cannot take such images at all says so later.

    Black and one image of each pure color are given; their middles are compared. Raise UserError where channels are
    mixed, or an image decides how it is scaled.
    """
    channels, (height, width) = declared.channels, declared.size
    arrived: list[Tensor] = []

    def note(module: nn.Module, inputs: Any) -> None:
        given = next((each for each in inputs if isinstance(each, Tensor)), None)
        if given is not None and given.ndim == 4 and given.shape[1] == channels and len(given) > channels:
            arrived.append(given[: channels + 1, :, given.shape[2] // 2, given.shape[3] // 2].double().cpu())
            raise PassIsOver

    weight = next((each for each in model.parameters() if each.is_floating_point()), torch.zeros(()))
    pictures = torch.zeros(channels + 1, channels, height, width, dtype=weight.dtype, device=weight.device)
    for channel in range(channels):
        pictures[channel + 1, channel] = 1
    watched: list[nn.Module] = [module for module in part.modules() if isinstance(module, nn.Conv2d)]
    watched += [] if part is model else [part]
    if not watched:
        return None
    with ExitStack() as stack, torch.no_grad(), force_eager():
        for module in watched:
            stack.enter_context(module.register_forward_pre_hook(note))
        stack.enter_context(torch.random.fork_rng(devices=[weight.device] if weight.device.type == "cuda" else []))
        with suppress(PassIsOver):
            try:
                model(pictures)
            except Exception:
                arrived.append(pictures[:, :, 0, 0].double().cpu())
    if not arrived:
        return None
    shift, factors = arrived[0][0], arrived[0][1:] - arrived[0][0]  # [channel]; [given channel, arriving channel]
    order = factors.abs().argmax(dim=1)
    factor = factors.gather(1, order[:, None])[:, 0]
    rest = factors.scatter(1, order[:, None], 0.0).abs().max()
    is_finite, is_permuted = bool(factors.isfinite().all()), order.unique().numel() == channels
    if not (is_finite and is_permuted and rest <= 1e-3 * factor.abs().min()):
        mixes = f"{type(model).__name__} mixes the channels of its images, or scales each image by itself"
        raise UserError(f"{mixes}: {GIVE_FORMAT}")
    return Scaling(factor, shift[order], order)
