"""Search for the Vision Transformer inside a module, by running its parts on images, or look it up by name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from attention_visualizer.attention.capture import AttentionLayer, CaptureError, InternalCaptureError, capture
from attention_visualizer.attention.classifiers import watched_head
from attention_visualizer.attention.geometry import NO_GEOMETRY, Geometry, patch_embedding
from attention_visualizer.attention.gradients import asks_for_gradients, gradients_only
from attention_visualizer.attention.torch_internals import without_wrappers
from attention_visualizer.support.errors import UserError, summary

NUM_PROBE_IMAGES = 2  # with one alone, some models drop the batch axis
MAX_NAMES = 20  # in an error message


@dataclass(frozen=True)
class FoundModel:
    """A Vision Transformer inside a module, and how to run it."""

    name: str  # its dotted path, "" for the module itself
    model: nn.Module
    layers: tuple[str, ...]  # its attention layers, as `capture(model)` names them
    unplaced: frozenset[str]  # those of the layers whose place on the image is not known
    #: What to run on images: the outermost module with just these layers, so that its output is that of the whole.
    runs: nn.Module
    num_classes: int  # that `runs` gives scores of; 0 where it gives features
    others: tuple[str, ...] = ()  # names of Vision Transformers that were not chosen
    needs_gradients: bool = False  # its forward fails where none are recorded


@dataclass(frozen=True)
class ProbeRun:
    """Attention layers that a module showed when it was run on images, or the reason why it showed none."""

    geometries: dict[str, Geometry | None] = field(default_factory=dict)  # by layer, in the order of computation
    unplaced: dict[str, str] = field(default_factory=dict)  # why a layer has no geometry
    failure: str = ""
    is_internal: bool = False  # capturing itself failed: the failure says nothing of the module
    needs_gradients: bool = False  # it ran, with gradients alone

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(self.geometries)


def find_model(
    module: nn.Module, images: Tensor, name: str | None = None, geometry: Geometry | None = None
) -> FoundModel:
    """Find the Vision Transformer in `module`, which should be in eval mode, with images [n, channel, height, width].

    `name` is its dotted path; None: searched from the outside in. Of several, it is the one that `module` runs on
    images, else the only one with trainable parameters.

    Raise UserError, with the cause, when there is none, when several could be meant, when `name` names none, or when
    it is not known where its tokens lie on the image; InternalCaptureError when the search itself failed.
    """
    images = images[:NUM_PROBE_IMAGES]
    if name is None:
        name, runs, others = _search(module, images)
    else:
        name, runs, others = name, named_part(module, name), ()
    model = named_part(module, name)
    probe = run_on(model, images, geometry)
    if probe.is_internal:
        raise InternalCaptureError(f"{described(module, name)}: {probe.failure}")
    if not probe.layers:
        shape = shape_of(images)
        raise UserError(f"{described(module, name)} shows no attention on images of {shape}: {probe.failure}")
    if len(probe.unplaced) == len(probe.layers):
        layer, reason = next(iter(probe.unplaced.items()))
        raise UserError(f"{described(module, name)}: {NO_GEOMETRY} (of {layer}: {reason})")
    needs_gradients = (probe if runs is model else run_on(runs, images)).needs_gradients
    num_classes = count_classes(module, runs, images, needs_gradients)
    unplaced = frozenset(probe.unplaced)
    return FoundModel(name, model, probe.layers, unplaced, runs, num_classes, others, needs_gradients)


def run_on(
    model: nn.Module, images: Tensor, geometry: Geometry | None = None, needs_gradients: bool = False
) -> ProbeRun:
    """Run a module on images and note its attention layers. Raise UserError only where `geometry` does not fit."""
    geometries: dict[str, Geometry | None] = {}
    unplaced: dict[str, str] = {}

    def note(layer: AttentionLayer) -> None:
        geometries[layer.name] = layer.geometry
        if layer.unplaced is not None:
            unplaced[layer.name] = layer.unplaced

    try:
        with gradients_only(needs_gradients), capture(model, consume=note, geometry=geometry):
            model(images)
    except Exception as error:  # whatever a module raises that was not made for images
        if geometry is not None and isinstance(error, UserError):
            raise
        if asks_for_gradients(error) and not needs_gradients:
            return run_on(model, images, geometry, needs_gradients=True)
        text = summary(error) if isinstance(error, CaptureError) else f"{type(error).__name__}: {summary(error)}"
        return ProbeRun(failure=text, is_internal=isinstance(error, InternalCaptureError))
    return ProbeRun(geometries, unplaced, needs_gradients=needs_gradients)


# --- search ----------------------------------------------------------------------------------------------------


def _search(module: nn.Module, images: Tensor) -> tuple[str, nn.Module, tuple[str, ...]]:
    """Return the name of the Vision Transformer, what to run for it, and the names of the others."""
    failures: dict[str, ProbeRun] = {}
    parts = list(working_parts(module, images, failures))
    if not parts:
        raise _nothing_found(module, images, failures)
    names = [inner for outer, probe in parts for inner in _models_inside(module, outer, probe, images)]
    trained = [name for name in names if any(each.requires_grad for each in named_part(module, name).parameters())]
    chosen = names if len(names) == 1 else trained
    if len(chosen) != 1:
        choices = ", ".join(f'model="{name}"' for name in names)
        raise UserError(f"{type(module).__name__} has several Vision Transformers: choose with one of {choices}")
    (name,) = chosen
    outer, probe = next((outer, probe) for outer, probe in parts if is_inside(name, outer))
    alone = run_on(named_part(module, name), images)
    # An outer module may also put another one's patches in place.
    is_same = list(alone.geometries.values()) == list(probe.geometries.values())
    return name, named_part(module, outer if is_same else name), tuple(other for other in names if other != name)


def working_parts(
    module: nn.Module, images: Tensor, failures: dict[str, ProbeRun] | None = None, prefix: str = ""
) -> Iterator[tuple[str, ProbeRun]]:
    """Yield the outermost parts that show attention on images, by name, from the outside in.

    `failures` gains each part that should have shown some: it cuts images into patches, or capturing itself failed.
    """
    probed: set[int] = set()
    level = [(prefix, module)]
    while level:
        below = []
        for name, part in level:
            if id(part) in probed or next(part.parameters(), None) is None:
                continue  # without parameters it has no attention, and running it may count (a metric)
            probed.add(id(part))
            probe = run_on(part, images)
            if probe.layers:
                yield name, probe
                continue
            embeds = any(patch_embedding(inner) is not None for inner in part.modules())
            if failures is not None and (embeds or probe.is_internal):
                failures[name] = probe
            below += [(joined(name, child), inner) for child, inner in part.named_children()]
        level = below


def _models_inside(module: nn.Module, outer: str, probe: ProbeRun, images: Tensor) -> list[str]:
    """Name the Vision Transformers that the working part `outer` is made of: mostly one, itself or a part of it."""
    layers = [joined(outer, layer.partition("#")[0]) for layer in probe.layers]
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
        is_candidate = is_inside(name, outer) and takes_images(parts[name], images.shape[1])
        if is_candidate and len(run_on(parts[name], images).layers) == len(probe.layers):
            return [name]
    return [outer]


def takes_images(module: nn.Module, channels: int) -> bool:
    """Whether the first convolution is one of images, or there is a patch embedding. A block alone has neither."""
    convolution = next((inner for inner in module.modules() if isinstance(inner, nn.Conv2d)), None)
    embeds = any(patch_embedding(inner) is not None for inner in module.modules())
    return embeds or (convolution is not None and convolution.in_channels == channels)


def _nothing_found(module: nn.Module, images: Tensor, failures: dict[str, ProbeRun]) -> Exception:
    """Return the error that says why the search was in vain."""
    kind = type(module).__name__
    internal = next((probe.failure for probe in failures.values() if probe.is_internal), None)
    if internal is not None:
        return InternalCaptureError(f"the search for a Vision Transformer in {kind} failed: {internal}")
    text = f"no Vision Transformer was found in {kind} by running it on images of {shape_of(images)}"
    if not images.is_floating_point():
        text += " (if the step makes floating-point numbers of them, pass probe_images= as the model takes them)"
    if failures:
        name, probe = failures.popitem()  # the innermost, which knows best
        return UserError(f"{text}: {described(module, name)} fails with {probe.failure}")
    return UserError(f'{text}; if a part takes other images, pass probe_images= and model="..."')


# --- names -----------------------------------------------------------------------------------------------------


def module_names(module: nn.Module) -> dict[str, nn.Module]:
    """Return the modules by the names that `capture` gives: those of torch.compile's wrappers are left out."""
    names: dict[str, nn.Module] = {}
    for name, part in module.named_modules():
        names.setdefault(without_wrappers(name), part)
    return names


def joined(*names: str) -> str:
    return without_wrappers(".".join(names))


def named_part(module: nn.Module, name: str) -> nn.Module:
    """Return the part of that name; raise UserError, which says the names that there are, if there is none."""
    names = module_names(module)
    if name in names:
        return names[name]
    around = name
    while around not in names:
        around = around.rpartition(".")[0]
    children = [child for child in names if child.rpartition(".")[0] == around and child]
    names_below = ", ".join(children[:MAX_NAMES]) + (" ..." if len(children) > MAX_NAMES else "")
    raise UserError(f'model="{name}": {type(module).__name__} has no such part; there are {names_below or "none"}')


def is_inside(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(f"{outer}.")


def described(module: nn.Module, name: str) -> str:
    return f'model="{name}" ({type(named_part(module, name)).__name__})'


def shape_of(images: Tensor) -> str:
    shape = f"[n, {', '.join(str(size) for size in images.shape[1:])}]"
    return shape if images.is_floating_point() else f"{shape} of {str(images.dtype).removeprefix('torch.')}"


# --- classes ---------------------------------------------------------------------------------------------------


def count_classes(module: nn.Module, model: nn.Module, images: Tensor, needs_gradients: bool) -> int:
    """Return of how many classes `model`, a part of `module` or all of it, returns scores; 0 where it returns features
    or something else."""
    # In a capture nothing is compiled.
    with (
        gradients_only(needs_gradients),
        capture(model, consume=lambda layer: None),
        watched_head(model, around=module) as head,
    ):
        output = model(images)
    scores = head.class_scores(images, output)
    return 0 if scores is None else scores.logits.shape[1]
