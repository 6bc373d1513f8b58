"""Figures of mean maps by class, and of where those of two classes differ."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from attention_visualizer.analysis.atlas.measure import Atlas
from attention_visualizer.figures.attention_figures import query_name
from attention_visualizer.figures.color_scales import attention_scale, signed_scale
from attention_visualizer.figures.panels import PanelFigure, overlay
from attention_visualizer.figures.tile_grid import Tile, tile_grid

Array = NDArray[Any]

MARKED_SIZE = 224  # pixels of a grid with marks, about


def draw_maps(atlas: Atlas) -> PanelFigure:
    subtitle = f"{query_name(atlas.query)}, mean over heads and {atlas.images}"
    return draw_classes(atlas, atlas.maps, layer_titles(atlas), "Mean attention by class and layer", subtitle)


def draw_rollouts(atlas: Atlas) -> PanelFigure:
    assert atlas.rollouts is not None
    columns = [f"up to {title}" for title in layer_titles(atlas)]
    subtitle = f"from the input up to each layer, mean over {atlas.images}"
    return draw_classes(atlas, atlas.rollouts, columns, "Mean attention rollout by class and layer", subtitle)


def layer_titles(atlas: Atlas) -> list[str]:
    return [f"layer {layer + 1}" for layer in range(atlas.maps.shape[1])]


def draw_classes(atlas: Atlas, maps: Array, columns: list[str], headline: str, subtitle: str) -> PanelFigure:
    """Draw a row for each class: the mean image, then the mean map of each layer over it.

    maps: [class, layer, patch].
    """
    num_patches = maps.shape[-1]
    tiles: list[list[Tile | None]] = [
        [Tile(image), *(Tile(rgb) for rgb in overlay(image, each.reshape(-1, *atlas.grid), num_patches))]
        for image, each in zip(atlas.mean_images, maps, strict=True)
    ]
    return tile_grid(
        tiles,
        headline,
        subtitle,
        column_titles=["mean image", *columns],
        row_titles=[f"{name} (n = {count:,})" for name, count in zip(atlas.names, atlas.counts, strict=True)],
        tile_size=84,
        scale=replace(attention_scale(num_patches), title=f"share / uniform share (1/{num_patches})"),
    )


def draw_differences(atlas: Atlas) -> PanelFigure:
    """Draw a row for each pair of classes: the difference by layer, then that of the ink."""
    grid, differences = atlas.grid, atlas.differences
    largest = max(float(np.abs(each.attention.value[0, 0]).max()) for each in differences)
    largest_ink = max(float(np.abs(each.ink.value).max()) for each in differences)
    scale = signed_scale(largest, "difference of the share of attention", "PuOr_r")
    ink_scale = signed_scale(largest_ink, "difference of the ink", "RdGy_r")
    tiles: list[list[Tile | None]] = []
    for each in differences:
        row: list[Tile | None] = [
            Tile(marked(scale.to_rgb(values.reshape(grid)), differs.reshape(grid), in_all.reshape(grid)))
            for values, differs, in_all in zip(
                each.attention.value[0, 0], each.differs[0, 0], each.differs_in_all, strict=True
            )
        ]
        ink = ink_scale.to_rgb(each.ink.value.reshape(grid))
        row.append(Tile(marked(ink, each.ink_differs.reshape(grid), np.zeros(grid, bool))))
        tiles.append(row)
    return tile_grid(
        tiles,
        "Where the maps of two classes differ",
        "first class minus second; ring: significant; full dot: also beyond each regression on the ink",
        column_titles=[*layer_titles(atlas), "ink"],
        row_titles=[f"{atlas.names[each.first]} minus {atlas.names[each.second]}" for each in differences],
        tile_size=96,
        scale=scale,
        second_scale=ink_scale,
    )


def marked(rgb: Array, ring: Array, dot: Array) -> Array:
    """Enlarge a grid of colours [height, width, 3] and mark its cells. ring, dot: bool [height, width]."""
    cell = max(12, MARKED_SIZE // max(rgb.shape[:2]))
    enlarged = np.ascontiguousarray(rgb.repeat(cell, axis=0).repeat(cell, axis=1))
    radius, edge = cell // 7, max(1, cell // 18)
    for row, column in np.argwhere(ring | dot):
        center = (int((column + 0.5) * cell), int((row + 0.5) * cell))
        width = max(2, cell // 20)
        # A light edge, for dark cells.
        if dot[row, column]:
            cv2.circle(enlarged, center, radius + edge, (255, 255, 255), -1, cv2.LINE_AA)
            cv2.circle(enlarged, center, radius, (17, 17, 17), -1, cv2.LINE_AA)
        else:
            cv2.circle(enlarged, center, radius, (255, 255, 255), width + 2 * edge, cv2.LINE_AA)
            cv2.circle(enlarged, center, radius, (17, 17, 17), width, cv2.LINE_AA)
    return enlarged
