"""Which part of a module is the Vision Transformer: found by running its parts on images, or named."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attention_visualizer.attention.capture import AttentionLayer, CaptureError, capture
from attention_visualizer.attention.geometry import NO_GEOMETRY, Geometry, patch_embedding
from attention_visualizer.attention.outputs import has_head, logits_of
from attention_visualizer.support.errors import UserError

TRIAL_IMAGES = 2  # of one alone, some models drop the batch axis
MOST_NAMES = 20


@dataclass(frozen=True)
class FoundModel:
    """name: of the Vision Transformer inside the module, "" for the module itself.

    model: the Vision Transformer; layers: its attention layers, as `capture(model)` names them; unplaced: those of them
    whose place on the image is not known.
    runs: what to run on images, the outermost module that shows just these layers, so that what it returns is what the
    whole gives; classifies: that is scores of classes.
    others: names of Vision Transformers that were not chosen.
    """

    name: str
    model: nn.Module
    layers: tuple[str, ...]
    unplaced: frozenset[str]
    runs: nn.Module
    classifies: bool
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class ProbeRun:
    """What a module showed on images: its attention layers, or why it showed none."""

    layers: tuple[str, ...] = ()
    geometries: tuple[Geometry | None, ...] = ()
    failure: str = ""


def find_model(
    module: nn.Module, images: Tensor, name: str | None = None, geometry: Geometry | None = None
) -> FoundModel:
    """The Vision Transformer in `module`, which should be in eval mode, for images [n, channel, height, width].

    `name` is its dotted path; None: searched from the outside in. Of several, it is the one that `module` runs on
    images, else the only one with trainable parameters.

    Raises UserError, with the cause, when there is none, when several could be meant, when `name` names none, or when
    nothing says where its tokens lie on the image.
    """
    images = images[:TRIAL_IMAGES]
    if name is None:
        name, runs, others = _search(module, images)
    else:
        name, runs, others = name, named_part(module, name), ()
    model = named_part(module, name)
    trial = run_on(model, images, geometry)
    if not trial.layers:
        raise UserError(f"{called(module, name)} shows no attention on images of {shape_of(images)}: {trial.failure}")
    places = zip(trial.layers, trial.geometries, strict=True)
    unplaced = frozenset(layer for layer, place in places if place is None)
    if len(unplaced) == len(trial.layers):
        raise UserError(f"{called(module, name)}: {NO_GEOMETRY}")
    return FoundModel(name, model, trial.layers, unplaced, runs, classifies(module, runs, images), others)


def run_on(model: nn.Module, images: Tensor, geometry: Geometry | None = None) -> ProbeRun:
    """Raises UserError only where `geometry` is given and does not fit."""
    places: dict[str, Geometry | None] = {}

    def note(layer: AttentionLayer) -> None:
        places[layer.name] = layer.geometry

    try:
        with torch.no_grad(), capture(model, consume=note, geometry=geometry):
            model(images)
    except Exception as error:  # whatever a module raises that was not made for images
        if geometry is not None and isinstance(error, UserError):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return ProbeRun(failure=reason if isinstance(error, CaptureError) else f"{type(error).__name__}: {reason}")
    return ProbeRun(tuple(places), tuple(places.values()))


# --- search ----------------------------------------------------------------------------------------------------


def _search(module: nn.Module, images: Tensor) -> tuple[str, nn.Module, tuple[str, ...]]:
    """(name, what to run, names of the others)."""
    failures: dict[str, str] = {}
    found = list(working_parts(module, images, failures))
    if not found:
        raise UserError(_nothing_found(module, images, failures))
    names = [inside for outer, trial in found for inside in _inside(module, outer, trial, images)]
    trained = [name for name in names if any(each.requires_grad for each in named_part(module, name).parameters())]
    chosen = names if len(names) == 1 else trained
    if len(chosen) != 1:
        listed = ", ".join(f'model="{name}"' for name in names)
        raise UserError(f"{type(module).__name__} has several Vision Transformers: choose with one of {listed}")
    (name,) = chosen
    outer, trial = next((outer, trial) for outer, trial in found if is_inside(name, outer))
    own = run_on(named_part(module, name), images)
    runs = outer if own.geometries == trial.geometries else name  # an outer module may also hold another's patches
    return name, named_part(module, runs), tuple(other for other in names if other != name)


def working_parts(
    module: nn.Module, images: Tensor, failures: dict[str, str] | None = None, prefix: str = ""
) -> Iterator[tuple[str, ProbeRun]]:
    """The outermost parts that show attention on images, as (name, trial), from the outside in.

    failures: gains the reason of each part that cuts images into patches and still does not work.
    """
    seen: set[int] = set()
    level = [(prefix, module)]
    while level:
        below = []
        for name, part in level:
            if id(part) in seen or next(part.parameters(), None) is None:
                continue  # without parameters it has no attention, and running it may count (a metric)
            seen.add(id(part))
            trial = run_on(part, images)
            if trial.layers:
                yield name, trial
                continue
            if failures is not None and any(patch_embedding(inside) is not None for inside in part.modules()):
                failures[name] = trial.failure
            below += [(joined(name, child), inside) for child, inside in part.named_children()]
        level = below


def _inside(module: nn.Module, outer: str, trial: ProbeRun, images: Tensor) -> list[str]:
    """The Vision Transformers that the working part `outer` is made of: mostly one, it or a part of it."""
    layers = [joined(outer, layer.partition("#")[0]) for layer in trial.layers]
    parts = module_names(module)
    if not all(layer in parts for layer in layers):
        return [outer]  # which computes attention in its own forward
    common = os.path.commonprefix([layer.split(".") for layer in layers])
    branches = dict.fromkeys(".".join(layer.split(".")[: len(common) + 1]) for layer in layers)
    if len(branches) > 1:
        several = [
            name
            for branch in branches
            for name, _ in working_parts(parts[branch], images, prefix=branch)
            if takes_images(parts.get(name, module), images.shape[1])
        ]
        if len(several) > 1:
            return several
    for depth in range(len(common), 0, -1):
        name = ".".join(common[:depth])
        inner = is_inside(name, outer) and takes_images(parts[name], images.shape[1])
        if inner and len(run_on(parts[name], images).layers) == len(trial.layers):
            return [name]
    return [outer]


def takes_images(module: nn.Module, channels: int) -> bool:
    """Whether its first convolution is one of images, or it states a patch embedding. A block alone does neither."""
    first = next((inside for inside in module.modules() if isinstance(inside, nn.Conv2d)), None)
    stated = any(patch_embedding(inside) is not None for inside in module.modules())
    return stated or (first is not None and first.in_channels == channels)


def _nothing_found(module: nn.Module, images: Tensor, failures: dict[str, str]) -> str:
    text = f"no Vision Transformer was found in {type(module).__name__} by running it on images of {shape_of(images)}"
    if failures:
        name, failure = failures.popitem()  # the innermost, which knows best
        return f"{text}: {called(module, name)} fails with {failure}"
    return f'{text}; if a part takes other images, pass probe_images= and model="..."'


# --- names -----------------------------------------------------------------------------------------------------


def module_names(module: nn.Module) -> dict[str, nn.Module]:
    """By the names that `capture` gives: those of compiled modules are left out."""
    names: dict[str, nn.Module] = {}
    for name, part in module.named_modules():
        names.setdefault(joined(*name.split(".")), part)
    return names


def joined(*steps: str) -> str:
    return ".".join(step for step in steps if step not in ("", "_orig_mod"))


def named_part(module: nn.Module, name: str) -> nn.Module:
    """Raises UserError that says which names there are."""
    names = module_names(module)
    if name in names:
        return names[name]
    around = name
    while around not in names:
        around = around.rpartition(".")[0]
    children = [child for child in names if child.rpartition(".")[0] == around and child]
    listed = ", ".join(children[:MOST_NAMES]) + (" ..." if len(children) > MOST_NAMES else "")
    raise UserError(f'model="{name}": {type(module).__name__} has no such part; there are {listed or "none"}')


def is_inside(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(f"{outer}.")


def called(module: nn.Module, name: str) -> str:
    return f'model="{name}" ({type(named_part(module, name)).__name__})'


def shape_of(images: Tensor) -> str:
    return f"[n, {', '.join(str(size) for size in images.shape[1:])}]"


# --- classes ---------------------------------------------------------------------------------------------------


def classifies(module: nn.Module, model: nn.Module, images: Tensor) -> bool:
    """Whether what `model`, a part of `module` or all of it, returns are scores of classes and not features.

    Features look like scores. They are features where the model states no classes, where its head was taken off, and
    where a linear layer that the model does not run waits for a vector of that length.
    """
    waiting: dict[nn.Module, int] = {part: part.in_features for part in module.modules() if isinstance(part, nn.Linear)}

    def ran(part: nn.Module, inputs: Any) -> None:
        waiting.pop(part, None)

    hooks = [part.register_forward_pre_hook(ran) for part in waiting]
    try:
        with torch.no_grad(), capture(model, consume=lambda layer: None):  # in which nothing is compiled
            logits = logits_of(model(images))
    finally:
        for hook in hooks:
            hook.remove()
    return logits is not None and has_head(model) and logits.shape[1] not in waiting.values()
