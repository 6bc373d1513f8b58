"""What an explorer's page shows: pictures, the moments that their attention is known at, the rows of it."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from attention_visualizer.figures.color_scales import DOUBLINGS, attention_scale, color_table, difference_scale
from attention_visualizer.measures.attention_rows import RowLayout
from attention_visualizer.measures.quantised_rows import QuantisedRows

Array = NDArray[Any]


@dataclass(frozen=True)
class Layer:
    """A layer of attention: its name in the model, which tokens its rows are of, and how many heads it has."""

    name: str
    layout: RowLayout
    num_heads: int
    number: int  # from 1, as figures and findings count layers


@dataclass(frozen=True)
class Picture:
    pixels: Array  # uint8 [height, width, 1 or 3]
    name: str  # "test image 7"
    label: str | None  # its class, where it is known


@dataclass(frozen=True)
class Moment:
    """The pictures' attention by one state of the weights."""

    title: str  # "step 429, epoch 1"
    step: int | None
    #: Of each layer: [picture, head, row, key]; behind the heads, what the group's methods say.
    rows: Sequence[QuantisedRows]
    predicted: Sequence[str | None]  # class of each picture; None where nothing is classified
    probability: Sequence[float | None]


@dataclass(frozen=True)
class Group:
    """Pictures that are known at the same moments, such as those that training was watched on."""

    key: str  # in addresses: "training", "samples", "run1"
    title: str
    pictures: Sequence[Picture]
    moments: Sequence[Moment]  # in the order of time
    methods: Sequence[str] = ()  # that are known of these pictures beside the attention

    def as_json(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "title": self.title,
            "methods": list(self.methods),
            "pictures": [
                {"name": each.name, "label": each.label, "png": png(each.pixels)} for each in self.pictures
            ],
            "moments": [
                {
                    "title": each.title,
                    "step": each.step,
                    "predicted": list(each.predicted),
                    "probability": [None if value is None else round(float(value), 4) for value in each.probability],
                }
                for each in self.moments
            ],
        }  # fmt: skip


@dataclass(frozen=True)
class Contents:
    """All that a page shows."""

    title: str
    facts: Sequence[tuple[str, str]]  # what it is of: label, text
    warnings: Sequence[str]  # what a reader must know first
    layers: Sequence[Layer]
    image: tuple[int, int]  # pixels of the model's images: height, width
    are_in_sequence: bool  # layers, of the same tokens: rollout goes through them
    groups: Sequence[Group]

    def header(self) -> dict[str, Any]:
        """Return all but the attention, as plain values for JSON."""
        layouts = list(dict.fromkeys(layer.layout for layer in self.layers))
        return {
            "title": self.title,
            "facts": [list(each) for each in self.facts],
            "warnings": list(self.warnings),
            "layouts": [layout_as_json(layout) for layout in layouts],
            "layers": [
                {
                    "name": layer.name,
                    "number": layer.number,
                    "layout": layouts.index(layer.layout),
                    "heads": layer.num_heads,
                }
                for layer in self.layers
            ],
            "image": list(self.image),
            "rollout": self.are_in_sequence,
            "groups": [group.as_json() for group in self.groups],
            "doublings": DOUBLINGS,
            "colors": {
                "relative": encoded(attention_scale(1).table),
                "share": encoded(color_table("viridis")),
                "difference": encoded(difference_scale(DOUBLINGS, "").table),
            },
        }

    def rows(self) -> Array:
        """Return the attention as bytes.

        For each group and layer the codes [moment, picture, head, row, key], then the rows' maxima and then their
        entropies [moment, picture, head, row], as half-precision numbers of two bytes, the low one first.
        """
        parts: list[Array] = []
        for group in self.groups:
            for layer in range(len(self.layers)):
                rows = [moment.rows[layer] for moment in group.moments]
                parts += [each.codes.reshape(-1) for each in rows]
                for name in ("maximum", "entropy"):
                    parts += [getattr(each, name).astype("<f2").reshape(-1).view(np.uint8) for each in rows]
        return np.concatenate(parts)


def layout_as_json(layout: RowLayout) -> dict[str, Any]:
    """Return which tokens rows are of, as plain values; lists that tell nothing are null."""
    geometry = layout.kept_geometry
    values: dict[str, Any] = {
        "windows": layout.num_windows,
        "rows": len(layout.kept_queries),  # of a window
        "keys": layout.num_kept_keys,
        "queries": layout.num_queries,  # of the model
        "all_keys": layout.num_keys,
        "stride": layout.stride,
        "has_cells": layout.has_cells,
        "are_queries_patches": layout.are_queries_patches,
        "unplaced": layout.unplaced,
    }
    for name in ("keys_in_each", "row_of_key", "key_of_row", "key_of_patch"):
        array = getattr(layout, name)
        values[name] = None if array is None else array.tolist()
    if geometry is not None:
        values |= {
            "prefix": geometry.num_prefix_tokens,
            "class_token": geometry.class_token if geometry.num_prefix_tokens else "absent",
            "grid": list(geometry.grid),
            "patch": list(geometry.patch_size),
            "offset": list(geometry.offset),
        }
    return values


def encoded(values: Array) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")


def deflated(values: Array) -> str:
    """Return bytes as raw deflate in base64, which a browser inflates by itself."""
    compress = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return base64.b64encode(compress.compress(values.tobytes()) + compress.flush()).decode("ascii")


def png(pixels: Array) -> str:
    """Return a picture, uint8 [height, width, 1 or 3], as an address that holds it."""
    picture = pixels if pixels.shape[2] == 1 else pixels[:, :, ::-1]  # OpenCV writes blue first
    is_written, content = cv2.imencode(".png", picture)
    assert is_written
    return "data:image/png;base64," + base64.b64encode(content.tobytes()).decode("ascii")
