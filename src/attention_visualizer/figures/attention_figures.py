"""The figures of attention maps, each from arrays to one Picture: the same in TensorBoard and in the report.

Maps are shares of a query's attention by patch, [..., grid height, grid width], not renormalised; images are uint8
[height, width, channel].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attention_visualizer.figures.panels import (
    ColorScale,
    PanelFigure,
    Tile,
    attention_scale,
    difference_scale,
    mark_patch,
    overlay,
    sequential_scale,
    tile_grid,
)
from attention_visualizer.measures.map_measures import Query
from attention_visualizer.measures.observation import Observation

Array = NDArray[Any]


@dataclass(frozen=True)
class ExplainedImage:
    """One image and what the model attends to on it, for one query.

    maps, rollouts: [layer, grid height, grid width], rollouts up to and including each layer, None where there is no
    rollout; head_maps: [layer, head, grid height, grid width], NaN for heads that a layer does not have; entropy:
    [layer, head] in nats; self_attention: [layer, head], the share that the class token gives to itself, None without
    a class token query; num_keys: of each layer. predicted_class: None where the model classifies nothing.
    """

    image: Array
    head_maps: Array
    rollouts: Array | None
    entropy: Array
    self_attention: Array | None
    num_keys: tuple[int, ...]
    query: Query
    true_class: str | None
    predicted_class: str | None
    probability: float

    @classmethod
    def of(
        cls, observation: Observation, number: int, image: Array, true_class: str | None, class_names: Sequence[str]
    ) -> ExplainedImage:
        """The `number`-th image of an observation."""
        own = observation.self_attention
        return cls(
            image,
            observation.head_maps[number],
            None if observation.rollouts is None else observation.rollouts[number],
            observation.entropy[number],
            None if own is None else own[number],
            observation.num_keys,
            observation.query,
            true_class,
            class_name(class_names, int(observation.predicted[number])) if observation.predicted[number] >= 0 else None,
            float(observation.probability[number]),
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
        """A map of `layer` in the units of `scale`."""
        return attention * (self.num_keys[layer] / self.unit)

    @property
    def verdict(self) -> str:
        true = [] if self.true_class is None else [f"true {self.true_class}"]
        predicted = (
            [] if self.predicted_class is None else [f"predicted {self.predicted_class} ({self.probability:.1%})"]
        )
        return ", ".join(true + predicted)

    def input(self) -> Tile:
        return Tile(self.marked(self.image), "input")

    def layers_over(self) -> list[Array]:
        """Each layer's map over the image."""
        scaled = np.stack([self.scaled(attention, layer) for layer, attention in enumerate(self.maps)])
        return [self.marked(picture) for picture in overlay(self.image, scaled, self.unit)]

    def heads_over(self, layer: int) -> list[Array | None]:
        """Each head's map over the image; None for heads that the layer does not have."""
        maps = self.head_maps[layer]
        there = [not np.isnan(head).all() for head in maps]
        drawn = iter(overlay(self.image, self.scaled(maps[there], layer), self.unit))
        return [self.marked(next(drawn)) if is_there else None for is_there in there]

    def shares_over(self, maps: Array) -> list[Array]:
        """Maps [map, grid height, grid width] over the image, renormalised over the patches: white is 1 / patches."""
        shares = patch_share(maps)
        return [self.marked(picture) for picture in overlay(self.image, shares, shares[0].size)]

    def marked(self, picture: Array) -> Array:
        """With a box around the patch that asks, if it is one patch."""
        if isinstance(self.query, str):
            return picture
        return mark_patch(picture, self.head_maps.shape[-2:], *self.query)

    def layer_caption(self, layer: int) -> str:
        own = None if self.self_attention is None else np.nanmean(self.self_attention[layer])
        return _caption(np.nanmean(self.entropy[layer]), own)

    def head_caption(self, layer: int, head: int) -> str:
        own = None if self.self_attention is None else self.self_attention[layer, head]
        return _caption(self.entropy[layer, head], own)


def common_unit(num_keys: Sequence[int]) -> int:
    """Maps of equal layers are drawn as they are; else they are multiplied with their number of keys first."""
    return num_keys[0] if len(set(num_keys)) == 1 else 1


def moment(epoch: float, step: int) -> str:
    """A point in training, for subtitles: frames of one picture keep one size, so it is no note of its own."""
    text = f"epoch {epoch:.3g}, step {step:,}"
    return text if step else f"{text}: RANDOM WEIGHTS, training has not begun"


def class_name(names: Sequence[str], label: int) -> str:
    """The number itself where there is no name for it."""
    return names[label] if 0 <= label < len(names) else str(label)


def _caption(entropy: float, self_attention: float | None) -> str:
    caption = f"H {entropy:.2f}"
    return caption if self_attention is None else f"{caption}  self {self_attention:.2f}"


def query_name(query: Query) -> str:
    """How a query set is called in titles."""
    if query == "cls":
        return "CLS attention"
    if query == "patches":
        return "attention averaged over patch queries"
    return f"attention of the patch in row {query[0]}, column {query[1]} (from 0)"


def overlay_strip(subject: ExplainedImage, headline: str, subtitle: str = "") -> PanelFigure:
    """The input, each layer's map over it (mean over heads), then the rollout of all layers."""
    tiles: list[Tile | None] = [subject.input()]
    for layer, picture in enumerate(subject.layers_over()):
        tiles.append(Tile(picture, f"layer {layer + 1}", subject.layer_caption(layer)))
    if subject.rollouts is not None:
        tiles.append(Tile(subject.shares_over(subject.rollouts[-1:])[0], "rollout", "over patches"))
    # A little smaller than elsewhere: eight of them fit a TensorBoard card.
    return tile_grid([tiles], headline, subtitle, tile_size=100, scale=subject.scale)


def attention_pattern(subject: ExplainedImage, headline: str, subtitle: str = "") -> PanelFigure:
    """Top row the attention by layer, bottom row the same over the image."""
    scale = subject.scale
    top: list[Tile | None] = [subject.input()]
    top += [
        Tile(scale.to_rgb(subject.scaled(attention, layer)), f"layer {layer + 1}", subject.layer_caption(layer))
        for layer, attention in enumerate(subject.maps)
    ]
    bottom: list[Tile | None] = [None]
    bottom += [Tile(picture) for picture in subject.layers_over()]
    return tile_grid([top, bottom], headline, subtitle, row_titles=["map", "overlay"], scale=scale)


def head_grid(
    subject: ExplainedImage, headline: str, subtitle: str = "", layers: list[int] | None = None
) -> PanelFigure:
    """Layers down, heads across, over the image; `layers` (from 0) keeps some rows."""
    shown = list(range(len(subject.head_maps))) if layers is None else layers
    num_heads = subject.head_maps.shape[1]
    tiles: list[list[Tile | None]] = [
        [
            None if picture is None else Tile(picture, "", subject.head_caption(layer, head))
            for head, picture in enumerate(subject.heads_over(layer))
        ]
        for layer in shown
    ]
    return tile_grid(
        tiles,
        headline,
        subtitle,
        column_titles=[f"head {head + 1}" for head in range(num_heads)],
        row_titles=[f"layer {layer + 1}" for layer in shown],
        scale=subject.scale,
    )


def layer_comparison(subject: ExplainedImage, headline: str, subtitle: str = "") -> PanelFigure:
    """Layers from shallow to deep: the map, the rollout up to there, and what changed since the layer before."""
    layers = range(len(subject.maps))
    tiny = np.finfo(np.float32).tiny
    logs = [np.log2(np.maximum(subject.scaled(subject.maps[layer], layer), tiny)) for layer in layers]
    change_scale = difference_scale(3.0, "change since the layer before")
    rows: dict[str, list[Tile | None]] = {
        "attention": [
            Tile(picture, f"layer {layer + 1}", subject.layer_caption(layer))
            for layer, picture in enumerate(subject.layers_over())
        ]
    }
    if subject.rollouts is not None:
        rows["rollout over patches"] = [Tile(picture) for picture in subject.shares_over(subject.rollouts)]
    rows["change"] = [
        None if layer == 0 else Tile(change_scale.to_rgb(logs[layer] - logs[layer - 1])) for layer in layers
    ]
    return tile_grid(
        list(rows.values()),
        headline,
        subtitle,
        row_titles=list(rows),
        scale=subject.scale,
        second_scale=change_scale,
    )


def method_comparison(
    subject: ExplainedImage, maps: dict[str, Array], headline: str, subtitle: str = ""
) -> PanelFigure:
    """maps: method -> [grid height, grid width]. The map above, over the image below, renormalised over the patches."""
    stacked = np.stack(list(maps.values()))
    shares = patch_share(stacked)
    scale = replace(attention_scale(shares[0].size), title=f"share / even share (1/{shares[0].size})")
    top: list[Tile | None] = [subject.input()]
    top += [Tile(scale.to_rgb(share), *two_lines(name)) for name, share in zip(maps, shares, strict=True)]
    bottom: list[Tile | None] = [None, *(Tile(picture) for picture in subject.shares_over(stacked))]
    return tile_grid([top, bottom], headline, subtitle, row_titles=["map", "overlay"], scale=scale)


def two_lines(name: str) -> tuple[str, str]:
    """A title and, after a comma, what stands under the tile."""
    title, _, rest = name.partition(", ")
    return title, rest


def patch_share(maps: Array) -> Array:
    """Renormalised over the patches: after few layers, rollout keeps much of its mass on the query itself."""
    return maps / np.maximum(maps.sum(axis=(-2, -1), keepdims=True), np.finfo(np.float32).tiny)


def entropy_heat_map(entropy: Array, highest: float, headline: str) -> PanelFigure:
    """Layers down, heads across: entropy in nats [layer, head], dark (one key) to yellow (uniform)."""
    scale = sequential_scale(0.0, highest, "entropy (nats)")
    tiles: list[list[Tile | None]] = [
        [None if np.isnan(value) else Tile(scale.to_rgb(np.full((1, 1), value)), "", f"{value:.2f}") for value in heads]
        for heads in entropy
    ]
    return tile_grid(
        tiles,
        headline,
        column_titles=[f"head {head + 1}" for head in range(entropy.shape[1])],
        row_titles=[f"layer {layer + 1}" for layer in range(entropy.shape[0])],
        tile_size=56,
        scale=scale,
    )


def probe_sheet(probe: dict[str, Array], frame: dict[str, Array], moment: str) -> PanelFigure:
    """One frame of a training run's history: a row for each probe image, the input, each layer, the rollout.

    probe and frame: as in AttentionHistory.
    """
    names = [str(name) for name in probe["class_names"]]
    num_layers = frame["maps"].shape[1]
    num_keys = np.broadcast_to(probe["num_keys"], num_layers)  # one number where all layers have as many
    unit = common_unit(num_keys.tolist())
    query: Query = "cls" if probe["query"] == "cls" else "patches"
    has_rollout = "rollout" in frame
    tiles: list[list[Tile | None]] = []
    titles = []
    for number, image in enumerate(probe["images"]):
        predicted = int(frame["predicted"][number])
        scaled = frame["maps"][number] * (num_keys / unit)[:, None, None]
        row = [
            Tile(image, caption=f"→ {class_name(names, predicted)}" if predicted >= 0 else ""),
            *(Tile(picture) for picture in overlay(image, scaled, unit)),
        ]
        if has_rollout:
            rollout = patch_share(frame["rollout"][number])
            row.append(Tile(overlay(image, rollout, rollout.size)))
        tiles.append([*row])
        label = int(probe["labels"][number])
        titles.append(f"true {names[label]}" if label >= 0 else f"image {number + 1}")
    columns = ["input", *(f"layer {layer + 1}" for layer in range(num_layers)), *(["rollout"] * has_rollout)]
    return tile_grid(
        tiles,
        f"By layer: {query_name(query)}, mean over heads",
        moment,
        column_titles=columns,
        row_titles=titles,
        tile_size=56,
        scale=attention_scale(unit),
    )
