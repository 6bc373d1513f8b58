"""The figures of attention maps, each from arrays to one PanelFigure: the same in TensorBoard and in the report.

Maps are shares of a query's attention by patch, [..., grid height, grid width], not renormalised; images are uint8
[height, width, channel].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attention_visualizer.figures.color_scales import (
    ColorScale,
    attention_scale,
    difference_scale,
    sequential_scale,
)
from attention_visualizer.figures.fonts import text_width
from attention_visualizer.figures.panels import PAGE, PanelFigure, Style, fitting_size, mark_patch, overlay, shortened
from attention_visualizer.figures.tile_grid import CARD, Tile, card_tile_size, tile_grid
from attention_visualizer.measures.map_measures import Query
from attention_visualizer.measures.observation import Observation

Array = NDArray[Any]
SMALL_TILE, LARGE_TILE = 56, 420  # pixels
MAX_TITLE_WIDTH = 70  # pixels, of a row in a card


@dataclass(frozen=True)
class ExplainedImage:
    """One image and what the model attends to on it, for one query."""

    image: Array
    head_maps: Array  # [layer, head, grid height, grid width], NaN for heads that a layer does not have
    rollouts: Array | None  # up to and including each layer, [layer, grid height, grid width]; None without rollout
    entropy: Array  # [layer, head], nats
    self_attention: Array | None  # of the class token, [layer, head]; None for other queries
    num_keys: tuple[int, ...]  # of each layer
    query: Query
    true_class: str | None  # None where it is not known
    predicted_class: str | None  # None where the model classifies nothing
    probability: float  # of the predicted class, NaN where it is not known

    @classmethod
    def of(
        cls, observation: Observation, index: int, image: Array, true_class: str | None, class_names: Sequence[str]
    ) -> ExplainedImage:
        """One image of an observation, by its index."""
        predicted = int(observation.predicted[index])
        return cls(
            image,
            observation.head_maps[index],
            None if observation.rollouts is None else observation.rollouts[index],
            observation.entropy[index],
            None if observation.self_attention is None else observation.self_attention[index],
            observation.num_keys,
            observation.query,
            true_class,
            class_name(class_names, predicted) if predicted >= 0 else None,
            float(observation.probability[index]),
        )

    @property
    def maps(self) -> Array:
        """Mean over heads: [layer, grid height, grid width]."""
        return np.nanmean(self.head_maps, axis=1)

    @property
    def unit(self) -> int:
        """The number of keys that colours are relative to."""
        return common_unit(self.num_keys)

    @property
    def scale(self) -> ColorScale:
        return attention_scale(self.unit)

    def scaled(self, attention: Array, layer: int) -> Array:
        """Convert a map of `layer` to the unit of `scale`."""
        return attention * (self.num_keys[layer] / self.unit)

    @property
    def verdict(self) -> str:
        """The true and the predicted class, as far as they are known, and whether they differ."""
        parts = []
        if self.true_class is not None:
            parts.append(f"true {self.true_class}")
        if self.predicted_class is not None:
            share = "" if np.isnan(self.probability) else f" ({self.probability:.1%})"
            parts.append(f"predicted {self.predicted_class}{share}")
        differ = len(parts) == 2 and self.true_class != self.predicted_class
        return ", ".join(parts) + (": wrong" if differ else "")

    def input_tile(self) -> Tile:
        return Tile(self.marked(self.image), "input")

    def layers_over(self) -> list[Array]:
        """Draw each layer's map over the image."""
        scaled = np.stack([self.scaled(attention, layer) for layer, attention in enumerate(self.maps)])
        return [self.marked(picture) for picture in overlay(self.image, scaled, self.unit)]

    def heads_over(self, layer: int) -> list[Array | None]:
        """Draw each head's map over the image; None for heads that the layer does not have."""
        maps = self.head_maps[layer]
        exists = [not np.isnan(head).all() for head in maps]
        pictures = iter(overlay(self.image, self.scaled(maps[exists], layer), self.unit))
        return [self.marked(next(pictures)) if head_exists else None for head_exists in exists]

    def shares_over(self, maps: Array) -> list[Array]:
        """Draw maps [map, grid height, grid width] over the image, renormalised over the patches: white is uniform."""
        shares = patch_share(maps)
        return [self.marked(picture) for picture in overlay(self.image, shares, shares[0].size)]

    def marked(self, picture: Array) -> Array:
        """Draw a box around the patch that is the query, if it is one patch."""
        if isinstance(self.query, str):
            return picture
        return mark_patch(picture, self.head_maps.shape[-2:], *self.query)

    def layer_caption(self, layer: int) -> str:
        """The means over heads."""
        self_attention = None if self.self_attention is None else np.nanmean(self.self_attention[layer])
        return _caption(np.nanmean(self.entropy[layer]), self_attention)

    def head_caption(self, layer: int, head: int) -> str:
        self_attention = None if self.self_attention is None else self.self_attention[layer, head]
        return _caption(self.entropy[layer, head], self_attention)


def common_unit(num_keys: Sequence[int]) -> int:
    """The number of keys of all layers where it is the same; else 1: maps are multiplied by their number of keys."""
    return num_keys[0] if len(set(num_keys)) == 1 else 1


def moment(epoch: float, step: int) -> str:
    """Return a point in training, for subtitles: as no line of its own, so that all frames of an animation have one
    size."""
    if not step:
        return "step 0: RANDOM WEIGHTS, before training"
    if epoch == int(epoch):
        return f"step {step:,} (epoch {epoch:.0f})"
    return f"step {step:,} ({epoch % 1:.2g} of epoch {int(epoch) + 1})"


def class_name(names: Sequence[str], label: int) -> str:
    """The name of a class; its number where it has none."""
    return names[label] if 0 <= label < len(names) else str(label)


def short_class_name(names: Sequence[str], label: int, tile_size: int, style: Style) -> str:
    """Return a tile's caption for a class: its number where its name would be cut, as cut names may be alike."""
    text, width = f"→ {class_name(names, label)}", tile_size + style.gap
    return text if text_width(text, fitting_size([text], style.caption, width)) <= width else f"→ class {label}"


def _caption(entropy: float, self_attention: float | None) -> str:
    caption = f"H {entropy:.2f}"
    return caption if self_attention is None else f"{caption}  self {self_attention:.2f}"


def query_name(query: Query) -> str:
    """Return what a query is called in titles."""
    if query == "cls":
        return "CLS attention"
    if query == "patches":
        return "attention averaged over patch queries"
    return f"attention of the patch in row {query[0]}, column {query[1]} (from 0)"


def layer_card(explained: ExplainedImage, headline: str, subtitle: str = "") -> PanelFigure:
    """Draw the input, each layer's map over it (mean over heads), then the rollout of all layers, for TensorBoard."""
    tiles: list[Tile | None] = [explained.input_tile()]
    for layer, picture in enumerate(explained.layers_over()):
        tiles.append(Tile(picture, f"layer {layer + 1}", explained.layer_caption(layer)))
    if explained.rollouts is not None:
        tiles.append(Tile(explained.shares_over(explained.rollouts[-1:])[0], "rollout", "over patches"))
    columns = math.ceil(math.sqrt(len(tiles)))
    rows = [tiles[first : first + columns] for first in range(0, len(tiles), columns)]
    size = card_tile_size(columns)
    return tile_grid(rows, headline, subtitle, tile_size=size, scale=explained.scale, style=CARD)


def attention_pattern(explained: ExplainedImage, headline: str, subtitle: str = "") -> PanelFigure:
    """Draw the attention by layer, and below it the same over the image."""
    scale = explained.scale
    top: list[Tile | None] = [explained.input_tile()]
    top += [
        Tile(scale.to_rgb(explained.scaled(attention, layer)), f"layer {layer + 1}", explained.layer_caption(layer))
        for layer, attention in enumerate(explained.maps)
    ]
    bottom: list[Tile | None] = [None]
    bottom += [Tile(picture) for picture in explained.layers_over()]
    return tile_grid([top, bottom], headline, subtitle, row_titles=["map", "overlay"], scale=scale)


def last_layer(explained: ExplainedImage, headline: str, subtitle: str = "") -> PanelFigure:
    """Draw the input and the last layer's map over it, large."""
    tiles: list[Tile | None] = [explained.input_tile(), Tile(explained.layers_over()[-1], "last layer")]
    return tile_grid([tiles], headline, subtitle, tile_size=LARGE_TILE, scale=explained.scale)


def head_card(explained: ExplainedImage, headline: str, subtitle: str = "") -> PanelFigure:
    """Draw layers down, heads across, over the image, for TensorBoard."""
    return head_grid(explained, headline, subtitle, style=CARD)


def head_grid(
    explained: ExplainedImage,
    headline: str,
    subtitle: str = "",
    layers: list[int] | None = None,
    style: Style = PAGE,
) -> PanelFigure:
    """Draw layers down, heads across, over the image. layers: zero-based, None for all."""
    shown = list(range(len(explained.head_maps))) if layers is None else layers
    num_heads = explained.head_maps.shape[1]
    tiles: list[list[Tile | None]] = [
        [
            None if picture is None else Tile(picture, "", explained.head_caption(layer, head))
            for head, picture in enumerate(explained.heads_over(layer))
        ]
        for layer in shown
    ]
    row_titles = [f"layer {layer + 1}" for layer in shown]
    return tile_grid(
        tiles,
        headline,
        subtitle,
        column_titles=[f"head {head + 1}" for head in range(num_heads)],
        row_titles=row_titles,
        tile_size=card_tile_size(num_heads, row_titles) if style.is_card else 112,
        scale=explained.scale,
        style=style,
    )


def layer_comparison(explained: ExplainedImage, headline: str, subtitle: str = "") -> PanelFigure:
    """Draw each layer's map, the rollout up to there, and what changed since the layer before."""
    layers = range(len(explained.maps))
    tiny = np.finfo(np.float32).tiny
    logs = [np.log2(np.maximum(explained.scaled(explained.maps[layer], layer), tiny)) for layer in layers]
    change_scale = difference_scale(3.0, "change from previous layer")
    rows: dict[str, list[Tile | None]] = {
        "attention": [
            Tile(picture, f"layer {layer + 1}", explained.layer_caption(layer))
            for layer, picture in enumerate(explained.layers_over())
        ]
    }
    if explained.rollouts is not None:
        rows["rollout over patches"] = [Tile(picture) for picture in explained.shares_over(explained.rollouts)]
    rows["change"] = [
        None if layer == 0 else Tile(change_scale.to_rgb(logs[layer] - logs[layer - 1])) for layer in layers
    ]
    return tile_grid(
        list(rows.values()),
        headline,
        subtitle,
        row_titles=list(rows),
        scale=explained.scale,
        second_scale=change_scale,
    )


def method_comparison(
    explained: ExplainedImage, maps: dict[str, Array], headline: str, subtitle: str = ""
) -> PanelFigure:
    """Draw maps (method -> [grid height, grid width]), and below them the same over the image, renormalised over the
    patches."""
    stacked = np.stack(list(maps.values()))
    shares = patch_share(stacked)
    scale = replace(attention_scale(shares[0].size), title=f"share / uniform share (1/{shares[0].size})")
    top: list[Tile | None] = [explained.input_tile()]
    top += [Tile(scale.to_rgb(share), *two_lines(name)) for name, share in zip(maps, shares, strict=True)]
    bottom: list[Tile | None] = [None, *(Tile(picture) for picture in explained.shares_over(stacked))]
    return tile_grid([top, bottom], headline, subtitle, row_titles=["map", "overlay"], scale=scale)


def two_lines(name: str) -> tuple[str, str]:
    """Split a method's name at the comma, into a title and what stands under the tile."""
    title, _, rest = name.partition(", ")
    return title, rest


def patch_share(maps: Array) -> Array:
    """Renormalise over the patches: after few layers, rollout keeps much of its mass on the query itself."""
    return maps / np.maximum(maps.sum(axis=(-2, -1), keepdims=True), np.finfo(np.float32).tiny)


def entropy_heat_map(entropy: Array, highest: float, headline: str, subtitle: str = "") -> PanelFigure:
    """Draw entropy in nats [layer, head], layers down, heads across, from dark (one key) to yellow (uniform), for
    TensorBoard."""
    ends = ((0.0, "0: one patch"), (highest, f"{highest:.2f}: uniform"))
    scale = replace(sequential_scale(0.0, highest, "entropy (nats)"), ticks=ends)
    tiles: list[list[Tile | None]] = [
        [None if np.isnan(value) else Tile(scale.to_rgb(np.full((1, 1), value)), "", f"{value:.2f}") for value in heads]
        for heads in entropy
    ]
    row_titles = [f"layer {layer + 1}" for layer in range(entropy.shape[0])]
    return tile_grid(
        tiles,
        headline,
        subtitle,
        column_titles=[f"head {head + 1}" for head in range(entropy.shape[1])],
        row_titles=row_titles,
        tile_size=min(SMALL_TILE, card_tile_size(entropy.shape[1], row_titles)),
        scale=scale,
        style=CARD,
    )


def query_of(probe: dict[str, Array]) -> Query:
    """Return whose attention a history holds."""
    return "cls" if probe["query"] == "cls" else "patches"


def probe_card(probe: dict[str, Array], frame: dict[str, Array], moment: str) -> PanelFigure:
    """Draw one frame of a training run's history, for TensorBoard: a row for each probe image, with the input, each
    layer, the rollout.

    probe, frame: as in AttentionHistory.
    """
    names = [str(name) for name in probe["class_names"]]
    columns = ["input", *(f"L{layer + 1}" for layer in range(frame["maps"].shape[1]))]
    if "rollout" in frame:
        columns.append("rollout")
    titles = [shortened(title, CARD.label, MAX_TITLE_WIDTH) for title in probe_titles(probe)]
    size = card_tile_size(len(columns), titles)
    tiles: list[list[Tile | None]] = []
    for number, image in enumerate(probe["images"]):
        predicted = int(frame["predicted"][number])
        caption = short_class_name(names, predicted, size, CARD) if predicted >= 0 else ""
        tiles.append([Tile(image, caption=caption), *(Tile(each) for each in probe_overlays(probe, frame, number))])
    return tile_grid(
        tiles,
        f"By layer: {query_name(query_of(probe))}, mean over heads",
        moment,
        column_titles=columns,
        row_titles=titles,
        tile_size=size,
        scale=attention_scale(probe_unit(probe, frame)),
        style=CARD,
    )


def probe_titles(probe: dict[str, Array]) -> list[str]:
    """The class of each probe image, or its number where that is not known."""
    names = [str(name) for name in probe["class_names"]]
    labels = map(int, probe["labels"])
    return [class_name(names, label) if label >= 0 else f"image {number}" for number, label in enumerate(labels, 1)]


def probe_unit(probe: dict[str, Array], frame: dict[str, Array]) -> int:
    """The number of keys that the colours of a history's maps are relative to."""
    return common_unit(np.broadcast_to(probe["num_keys"], frame["maps"].shape[1]).tolist())


def probe_overlays(probe: dict[str, Array], frame: dict[str, Array], number: int) -> list[Array]:
    """Draw each layer's map over a probe image, by its number, then the rollout where there is one."""
    image, unit, maps = probe["images"][number], probe_unit(probe, frame), frame["maps"][number]
    num_keys = np.broadcast_to(probe["num_keys"], len(maps))  # one number where all layers have as many
    pictures = list(overlay(image, maps * (num_keys / unit)[:, None, None], unit))
    if "rollout" in frame:
        rollout = patch_share(frame["rollout"][number])
        pictures.append(overlay(image, rollout, rollout.size))
    return pictures
