"""Where the keys of a model's attention calls lie on its images: measured when it first gets images of a size."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attention_visualizer.attention.callers import may_be_images
from attention_visualizer.attention.function_call import FunctionCall
from attention_visualizer.attention.gradients import asks_for_gradients, gradients_only
from attention_visualizer.attention.own_keys import own_keys
from attention_visualizer.attention.placement import NOWHERE, Lines, PlacedKeys, Unplaced, place
from attention_visualizer.attention.policies import OnlyItself, SwitchedOff
from attention_visualizer.attention.probe import CallPlaces, Probe, Record, UnmeasurableError
from attention_visualizer.attention.receptive_fields import (
    ANSWER,
    Bands,
    ReceptiveFields,
    changed,
    measure,
    other_pixels,
)
from attention_visualizer.attention.streams import Streams, find_streams
from attention_visualizer.attention.undisturbed import both_undisturbed
from attention_visualizer.support.errors import ran_out_of_memory, summary

Array = NDArray[Any]
EDGE = 1e-3  # pixels: less than this is rounding
MAX_LINES = 64  # so many rows or columns of pixels are changed one by one
MAX_BANDS_ALONE = 32  # of a picture's bands, so many are changed one by one, of more every so many together
NUM_CONFIRMATIONS, CONFIRMING_CELLS, CHANGED_SHARE = 12, (8, 8), 0.15  # pictures with some of so many cells changed
MAX_CHANCE = 3  # lines that selected tokens may look like by chance
LEFT_OUT = 0.25  # of a patch: a grid that leaves out more than this of an earlier one's is a selection
MAX_STILL = 0.5  # of what keys move by: a key that sees none of the change moves less, by a norm over all tokens
SMALL = 160 * 160  # pixels of an image
OTHER_BANDS = 32  # a picture is cut into so many where no layer's patches are known


@dataclass(frozen=True)
class MeasuredPlaces:
    """What was measured of a model on images of one size."""

    #: For each input that may be the images: the places in it, by the name of the attention call.
    by_image: tuple[dict[str, CallPlaces | Unplaced], ...] = ()
    failure: str = ""  # why nothing could be measured
    streams: Streams = Streams()

    def of_call(self, name: str) -> CallPlaces | Unplaced:
        """Return the places of a call's keys, in the one input that they answer to."""
        answers = [each[name] for each in self.by_image if name in each]
        if not answers:
            return Unplaced(self.failure or "the model computed it in this pass only")
        somewhere = [each for each in answers if not (isinstance(each, Unplaced) and each.reason == NOWHERE)]
        if len(somewhere) > 1:
            return Unplaced("its keys answer to several of the model's inputs: which is the image?")
        return somewhere[0] if somewhere else answers[0]


def measure_places(probe: Probe) -> dict[str, CallPlaces | Unplaced]:
    """Measure the places of the keys of all attention calls on the first image."""
    image, names, sides = probe.image, list(probe.windows), probe.image.shape[2:]
    moves = probe.moves(changed(image, np.ones((1, image.shape[2]), bool), 0))
    moving = [position for position, name in enumerate(names) if np.count_nonzero(moves[name] > 0) > 1]
    placed = first_place(probe, moving[0]) if moving else None
    if isinstance(placed, PlacedKeys) and len(moving) == len(names) and is_same_in_all(probe, moves, placed):
        return {name: probe.call_places(name, placed) for name in names}
    found: dict[str, CallPlaces | Unplaced] = {}
    more_draws = 4 if image[0, 0].numel() <= SMALL else 2  # where one does not tell places apart
    for policy, draws in ((SwitchedOff, 1), (OnlyItself, 1), (SwitchedOff, more_draws)):
        bands = [bands_of(placed, axis, sides[axis], is_fine=draws == 1) for axis in range(2)]
        # Without residual connections, only their own values pass tokens on.
        left = [name for name in names if isinstance(found.get(name, Unplaced(NOWHERE)), Unplaced)]
        if policy is OnlyItself:
            left = [name for name in left if found[name] == Unplaced(NOWHERE)]
        if not left:
            continue
        probe.policy = policy
        own: dict[str, Tensor] = {}
        if policy is OnlyItself and isinstance(placed, PlacedKeys) and (own := own_keys(probe, bands)):
            probe.policy = partial(OnlyItself, own)
            steps = placed.rows.step, placed.columns.step  # of some rows of tokens, pixels may lie between those left
            bands = [Bands.of(range(size + 1), power_of_two(4 * step)) for size, step in zip(sides, steps, strict=True)]
        fields = measure(probe.moves, image, bands[0], bands[1], range(draws))
        results = {name: place(fields[name]) for name in left}
        for name, result in confirmed(probe, fields, results, are_some=bool(own)).items():
            if isinstance(result, PlacedKeys):
                found[name] = probe.call_places(name, result)
            elif result.reason != NOWHERE or name not in found:  # or the reason before says more
                found[name] = result
    probe.policy = SwitchedOff
    return without_selections(found)


def power_of_two(least: float) -> int:
    return 2 ** int(np.ceil(np.log2(least)))


def confirmed(
    probe: Probe, fields: dict[str, ReceptiveFields], results: dict[str, PlacedKeys | Unplaced], are_some: bool = False
) -> dict[str, PlacedKeys | Unplaced]:
    """Take the place of layers of which a key stays as it is where pixels of its patch change, or moves where none do
    that it answers to: so do tokens that are selected by their content, or shuffled.

    Other pixels, and other random numbers, than those that the places were found with.
    """
    placed = [result for result in results.values() if isinstance(result, PlacedKeys)]
    if not placed:
        return results
    image = probe.image
    sides = image.shape[2:]
    generator = torch.Generator().manual_seed(0)
    cells = torch.rand(NUM_CONFIRMATIONS, 1, *CONFIRMING_CELLS, generator=generator) < CHANGED_SHARE
    rows = max((each.rows for each in placed), key=lambda lines: lines.number)
    columns = max((each.columns for each in placed), key=lambda lines: lines.number)
    masks = np.concatenate(
        [
            torch.nn.functional.interpolate(cells.float(), sides).bool()[:, 0].numpy(),
            np.repeat(in_binary(rows, sides[0])[:, :, None], sides[1], axis=2),
            np.repeat(in_binary(columns, sides[1])[:, None, :], sides[0], axis=1),
        ]
    )
    different = torch.from_numpy(masks)[:, None].to(image.device)
    moves = probe.moves(torch.where(different, other_pixels(image, draw=99), image))
    checked = dict(results)
    for name, result in results.items():
        if isinstance(result, PlacedKeys) and not is_confirmed(result, fields[name], masks, moves[name], are_some):
            checked[name] = Unplaced("its keys do not answer as patches would: tokens are selected by their content")
    return checked


def is_confirmed(
    placed: PlacedKeys, fields: ReceptiveFields, changed: Array, moves: Array, are_some: bool = False
) -> bool:
    """changed: bool [picture, row, column], of pixels; moves: [picture, key].

    are_some: whether keys are some of the tokens before, which have pixels between them that they do not answer to.
    """
    height, width = changed.shape[1:]
    rows, columns = edges_of(placed.rows, height), edges_of(placed.columns, width)
    (top, bottom), (left, right) = fields.extent(0), fields.extent(1)
    moving, still = [], []
    for number, key in enumerate(placed.order):
        row, column = divmod(number, placed.columns.number)
        patch = [rows[row], rows[row + 1], columns[column], columns[column + 1]]
        if are_some:
            patch[::2] = max(patch[0], top[key]), max(patch[2], left[key])
            patch[1::2] = min(patch[1], bottom[key]), min(patch[3], right[key])
            if patch[0] >= patch[1] or patch[2] >= patch[3]:
                return False
        inside = changed[:, patch[0] : patch[1], patch[2] : patch[3]].any(axis=(1, 2))
        seen = changed[:, top[key] : bottom[key], left[key] : right[key]].any(axis=(1, 2))
        moving.append(moves[inside, key])
        still.append(moves[~seen, key])
    moved, stayed = np.concatenate(moving), np.concatenate(still)
    scale = np.median(moved) if len(moved) else 0.0
    return bool(len(moved) and (moved > ANSWER * scale).all() and (stayed < MAX_STILL * scale).all())


def first_place(probe: Probe, position: int) -> PlacedKeys | Unplaced:
    """Place the keys of the first call that answers to the image, to the pixel; no later calls are computed."""
    name = list(probe.windows)[position]
    sides = probe.image.shape[2:]
    pixels = max(sides[0] * sides[1] / (probe.windows[name] * probe.keys[name]), 1.0)
    modulus = power_of_two(2 * np.sqrt(pixels))
    probe.stop = position
    try:
        while True:
            rows, columns = (Bands.of(range(size + 1), modulus) for size in sides)
            fields = measure(probe.moves, probe.image, rows, columns)[name]
            # What is as wide as the modulus answers to every residue: which pixels it sees is not told.
            if fields.typical_width < modulus or modulus >= max(sides):
                return place(fields)
            modulus *= 2
    finally:
        probe.stop = None


def is_same_in_all(probe: Probe, moves: dict[str, Array], placed: PlacedKeys) -> bool:
    """Whether the keys of all calls are those patches, in the same order.

    moves: of the keys where the whole image is changed. Rows and columns of patches are then changed in a binary code,
    so that no two patches change in the same pictures.
    """
    if set(probe.windows.values()) != {1} or len(set(probe.keys.values())) != 1:
        return False

    def is_expected(moves: dict[str, Array], of_patches: Array) -> bool:
        expected = np.zeros((len(of_patches), next(iter(probe.keys.values()))), bool)
        expected[:, placed.order] = of_patches
        return all(np.array_equal(have_moved(each), expected) for each in moves.values())

    if not is_expected(moves, np.ones((1, len(placed.order)), bool)):
        return False
    row, column = np.divmod(np.arange(len(placed.order)), placed.columns.number)
    for axis, (lines, line) in enumerate(((placed.rows, row), (placed.columns, column))):
        of_pixels = in_binary(lines, probe.image.shape[2 + axis])
        if len(of_pixels) and not is_expected(
            probe.moves(changed(probe.image, of_pixels, axis, draw=1)), binary_code(lines.number)[:, line]
        ):
            return False
    return True


def binary_code(number: int) -> Array:
    """Return the numbers below `number` in binary: bool [bit, number]."""
    bits = np.arange((number - 1).bit_length())[:, None]
    return (np.arange(number) >> bits & 1).astype(bool)


def in_binary(lines: Lines, size: int) -> Array:
    """Return for each pixel along a side of `size` pixels the number of its line, in binary: bool [bit, pixel]."""
    code, edges = binary_code(lines.number), edges_of(lines, size)
    of_pixels = np.zeros((len(code), size), bool)
    for number, (start, end) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        of_pixels[:, start:end] = code[:, number, None]
    return of_pixels


def have_moved(moves: Array) -> Array:
    """Return whether each key moved by more than rounding: bool [picture, key]."""
    some = moves[moves > 0]
    return moves > ANSWER * (np.median(some) if len(some) else 1.0)


def edges_of(lines: Lines, size: int) -> list[int]:
    """Return the pixels between which the lines of patches lie, cut off at the edges of the image."""
    return [min(max(round(lines.start + number * lines.step), 0), size) for number in range(lines.number + 1)]


def bands_of(placed: PlacedKeys | Unplaced | None, axis: int, size: int, is_fine: bool) -> Bands:
    """Return the bands of pixels to change: each line of a small image, if they are fine; else the lines of patches,
    and where an edge lies within a pixel, that pixel too."""
    if size <= MAX_LINES and is_fine:
        return Bands.of(range(size + 1), size)
    if isinstance(placed, PlacedKeys):
        lines = placed.rows if axis == 0 else placed.columns
        cuts = lines.start + lines.step * np.arange(lines.number + 1)
        inner = np.concatenate([np.floor(cuts + EDGE), np.ceil(cuts - EDGE)]).clip(0, size)
    else:
        inner = np.linspace(0, size, min(OTHER_BANDS, size) + 1).round()
    edges = sorted({0, *inner.astype(int).tolist(), size})
    return Bands.of(edges, len(edges) if len(edges) - 1 <= MAX_BANDS_ALONE else 16)


def without_selections(found: Mapping[str, CallPlaces | Unplaced]) -> dict[str, CallPlaces | Unplaced]:
    """Take the place of layers whose keys cover a part only of what those of an earlier layer cover: what is left out
    may be another part in another picture."""
    widest: tuple[Lines, Lines] | None = None
    checked: dict[str, CallPlaces | Unplaced] = {}
    for name, each in found.items():
        checked[name] = each
        if isinstance(each, Unplaced):
            continue
        lines = (each.keys.rows, each.keys.columns)
        widest = widest or lines
        for line, first in zip(lines, widest, strict=True):
            left_out = LEFT_OUT * first.step
            if line.start > first.start + left_out or line.end < first.end - left_out:
                checked[name] = Unplaced("its keys are a part only of the patches: tokens were selected")
            elif line.number <= MAX_CHANCE and abs(line.step / first.step - round(line.step / first.step)) > LEFT_OUT:
                checked[name] = Unplaced("its keys are no whole numbers of patches: tokens were selected or merged")
    return checked


# --- calling a model again ---------------------------------------------------------------------------------------


def images_of(call: FunctionCall) -> list[Tensor]:
    """Return the tensors among the arguments that may be images [image, channel, height, width]."""
    return [tensor for tensor in call.tensors() if may_be_images(tensor) and is_usable(tensor)]


def is_usable(tensor: Tensor) -> bool:
    """Whether other pixels of its range can take the place of a tensor's."""
    if tensor.is_complex() or min(tensor.shape[2:]) < 2:
        return False
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor[:1]).all())


# --- kept for the next pass --------------------------------------------------------------------------------------

_cache: weakref.WeakKeyDictionary[nn.Module, dict[Any, MeasuredPlaces]] = weakref.WeakKeyDictionary()
_thread = threading.local()


def is_measuring() -> bool:
    """Whether this thread is measuring places: captures that are active do not look at those passes."""
    return getattr(_thread, "measuring", False)


@contextmanager
def _measuring() -> Iterator[None]:
    _thread.measuring = True
    try:
        yield
    finally:
        _thread.measuring = False


def signature(model: nn.Module, call: FunctionCall) -> Any:
    """Return what places depend on: the parts of the model, the function, the sizes of its arguments."""
    name = getattr(call.function, "__name__", "")
    sizes = tuple((tuple(each.shape[1:]), each.dtype) for each in call.tensors())
    others = tuple(repr(value) for value in call.kwargs.values() if isinstance(value, bool | int | str))
    return name, sizes, others, tuple(id(module) for module in model.modules())


def places_of(owner: nn.Module, model: nn.Module, call: FunctionCall, record: Record) -> MeasuredPlaces:
    """Return the places of the attention calls of `call`, a call of `owner` with images; measured once.

    `record` runs a call with attention off.
    """
    key = signature(owner, call)
    known = _cache.setdefault(owner, {})
    if key not in known:
        try:
            with _measuring(), both_undisturbed(owner, model):
                known[key] = measured_with(call, record, model)
        except UnmeasurableError as error:
            known[key] = MeasuredPlaces(failure=str(error))
        except Exception as error:  # whatever a model raises on other pictures
            if ran_out_of_memory(error):  # which another pass may not do
                return MeasuredPlaces(failure=f"there was no memory to measure places: {summary(error)}")
            known[key] = MeasuredPlaces(
                failure=f"places could not be measured: {type(error).__name__}: {summary(error)}"
            )
    return known[key]


def measured_with(call: FunctionCall, record: Record, model: nn.Module, gradients: bool = False) -> MeasuredPlaces:
    """Measure the places of a call, with gradients where its forward asks for them."""
    try:
        with gradients_only(gradients):
            return measured_places([Probe(call, images, record) for images in images_of(call)], model)
    except Exception as error:
        if gradients or not asks_for_gradients(error):
            raise
    return measured_with(call, record, model, gradients=True)


def measured_places(probes: list[Probe], model: nn.Module) -> MeasuredPlaces:
    """Measure with each of the tensors that may be the images."""
    probes = [probe for probe in probes if probe.is_image]
    by_image = tuple(measure_places(probe) for probe in probes)
    measured = MeasuredPlaces(by_image)
    if not probes:
        return replace(measured, failure="the model was called without images")
    return replace(
        measured, streams=find_streams(probes[0], {name: measured.of_call(name) for name in by_image[0]}, model)
    )
