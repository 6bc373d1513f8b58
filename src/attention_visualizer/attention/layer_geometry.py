"""The geometry of each layer of a forward pass, or the reason why it has none."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from attention_visualizer.attention.callers import Stack
from attention_visualizer.attention.geometry import NEARLY, ClassToken, Geometry, declared_class_token
from attention_visualizer.attention.layers import Part
from attention_visualizer.attention.placement import Lines, Unplaced
from attention_visualizer.attention.places import MeasuredPlaces, places_of
from attention_visualizer.attention.probe import CallPlaces, Record
from attention_visualizer.support.errors import UserError


@dataclass(frozen=True)
class LayerShape:
    """What is known of an attention layer when it is put on the image."""

    name: str
    weights: torch.Size  # [batch, head, query, key]
    images: list[torch.Size]  # of what may be images, [image, channel, height, width]
    is_text: bool = False

    @property
    def keys(self) -> int:
        return self.weights[-1]


class GeometryFinder:
    """Find the geometry of each layer: measured, and compared with that which the user gave.

    `given` is the user's, for models that declare nothing; it goes to every layer of as many keys.
    """

    def __init__(self, model: nn.Module, given: Geometry | None, record: Record) -> None:
        self.model = model
        self.given = given
        self.record = record
        self.class_token: ClassToken = declared_class_token(model)
        self.measured = MeasuredPlaces(failure="the model was called without images")
        self.misfit: int | None = None  # the number of keys that the given geometry did not fit
        self.is_given_used = False

    def begin_pass(self, stack: Stack) -> None:
        """Measure the places of a pass's layers, or look them up, when the first of them is met."""
        if stack.call is None or stack.owner is None:
            self.measured = MeasuredPlaces(failure="the model was called without images")
        else:
            self.measured = places_of(stack.owner, self.model, stack.call, self.record)

    def of_layer(self, layer: LayerShape) -> Geometry | Unplaced:
        if layer.is_text:
            return Unplaced("it attends over text")
        if self.given is not None:
            return self._given(layer, self.given)
        found = self.measured.of_call(layer.name)
        if isinstance(found, Unplaced):
            return found
        return self._measured(layer, found)

    def _measured(self, layer: LayerShape, found: CallPlaces) -> Geometry | Unplaced:
        num_images = layer.images[0][0] if layer.images else 0
        if layer.keys != found.num_keys or layer.weights[0] != num_images * found.num_windows:
            return Unplaced(
                f"it has {layer.keys} keys for {layer.weights[0]} images or windows, not those whose places were "
                f"measured, {found.num_keys} for {found.num_windows} of each image"
            )
        geometry = geometry_of(found)
        if isinstance(geometry, Unplaced):
            return geometry
        return replace(geometry, class_token=self.class_token if geometry.num_prefix_tokens else "read")

    def part(self, name: str) -> Part | None:
        """Return what part of a layer a call is; None where it is all of one."""
        return self.measured.streams.parts.get(name)

    def is_in_sequence(self, name: str) -> bool:
        return name not in self.measured.streams.beside

    # --- the given geometry ----------------------------------------------------------------------------------------

    def _given(self, layer: LayerShape, given: Geometry) -> Geometry | Unplaced:
        if given.num_tokens != layer.keys:
            self.misfit = layer.keys
            return Unplaced(f"the given geometry has {given.num_tokens} tokens, the layer {layer.keys} keys")
        answers = [each.get(layer.name) for each in self.measured.by_image]
        found = [geometry_of(each) for each in answers if isinstance(each, CallPlaces)]
        self.is_given_used = True
        if any(isinstance(each, Geometry) and is_same_place(given, each) for each in found):
            return replace(given, evidence="given and confirmed")
        if found:
            measured = found[0].reason if isinstance(found[0], Unplaced) else f"it is {in_words(found[0])}"
            raise UserError(
                f"the given geometry says {in_words(given)}, but measured on {layer.name} {measured}: "
                "leave geometry= out, or give another one"
            )
        if layer.images and not any(given.fits((size[2], size[3])) for size in layer.images):
            size = layer.images[0]
            raise UserError(
                f"the given geometry says {in_words(given)}, but the images have {size[2]} x {size[3]} pixels: "
                "give another grid or patch_size"
            )
        reasons = [each.reason for each in answers if isinstance(each, Unplaced)]
        reason = self.measured.failure or next(iter(reasons), "the model computed it in this pass only")
        return replace(given, evidence=f"given, not confirmed: {reason}")

    def finish(self) -> None:
        """Raise UserError if the given geometry fitted none of the layers."""
        if self.given is not None and not self.is_given_used:
            given = self.given
            raise UserError(
                f"the given geometry has {given.num_tokens} tokens ({given.num_prefix_tokens} before a grid of "
                f"{given.grid[0]} x {given.grid[1]}), but the model's layers have {self.misfit}: give another one"
            )


def geometry_of(found: CallPlaces) -> Geometry | Unplaced:
    """Return measured places as a geometry; those that leave out or add more than a patch have none on the image."""
    rows, columns, order = found.keys.rows, found.keys.columns, found.keys.order
    for lines, side, names in zip((rows, columns), found.image, ("rows", "columns"), strict=True):
        if abs(lines.start) > NEARLY * side or abs(lines.end - side) >= max(lines.step, 1 + NEARLY * side):
            return Unplaced(
                f"its patches cover {names} {lines.start:g} to {lines.end:g} of the image's {side}: the model crops or "
                "pads its images, so give it images that are cropped or padded already"
            )
    grid, num_patches = (rows.number, columns.number), len(order)
    patch_size = side_of(rows), side_of(columns)
    offset = rows.start, columns.start
    if found.num_windows == 1:
        prefix = found.num_keys - num_patches
        is_usual = np.array_equal(order, np.arange(prefix, found.num_keys))
        usual = Geometry(grid, prefix, patch_size, offset=offset, evidence="measured")
        return usual if is_usual else replace(usual, order=tuple(order.tolist()))
    window = window_of(found)
    if window is None:
        return Unplaced(f"its {found.num_windows} windows of {found.num_keys} keys are no windows of {grid} patches")
    geometry = Geometry(grid, 0, patch_size, window, offset=offset, evidence="measured")
    keys = torch.arange(found.num_windows * found.num_keys).view(found.num_windows, found.num_keys)
    if math.prod(geometry.windows) == found.num_windows:
        for shift in np.ndindex(window):
            shifted = replace(geometry, shift=(int(shift[0]), int(shift[1])))
            if np.array_equal(shifted.to_map(keys)[0].flatten().numpy(), order):
                return shifted
    return Unplaced(f"its windows of {window[0]} x {window[1]} patches are not neighbours")


def side_of(lines: Lines) -> float:
    """Return the distance between lines, a whole number where it is one."""
    return round(lines.step) if abs(lines.step - round(lines.step)) < 1e-6 else lines.step


def window_of(found: CallPlaces) -> tuple[int, int] | None:
    """Return the number of rows and columns of patches in a window, the same in all; None where they differ."""
    window_of_patch = found.keys.order.reshape(found.keys.rows.number, -1) // found.num_keys
    sizes = set()
    for number in range(found.num_windows):
        rows, columns = np.nonzero(window_of_patch == number)
        sizes.add((len(np.unique(rows)), len(np.unique(columns))))
    height, width = max(sizes, default=(0, 0))
    return (height, width) if height * width == found.num_keys else None


def is_same_place(given: Geometry, measured: Geometry) -> bool:
    """Whether both put all patches on the same pixels, to a pixel, at the same keys."""
    if (given.grid, given.num_tokens, given.window, given.shift) != (
        (measured.grid, measured.num_tokens, measured.window, measured.shift)
    ) or given.order != measured.order:
        return False
    for axis in range(2):
        first = given.offset[axis] - measured.offset[axis]
        last = first + given.grid[axis] * (given.patch_size[axis] - measured.patch_size[axis])
        if max(abs(first), abs(last)) > max(1.0, 0.25 * measured.patch_size[axis]):
            return False
    return True


def in_words(geometry: Geometry) -> str:
    (rows, columns), (height, width) = geometry.grid, geometry.patch_size
    text = f"{rows} x {columns} patches of {height:g} x {width:g} pixels"
    if geometry.num_prefix_tokens:
        where = "among" if geometry.order else "behind"
        text += f", {where} {geometry.num_prefix_tokens} other tokens"
    return text + (", in another order" if geometry.order else "")
