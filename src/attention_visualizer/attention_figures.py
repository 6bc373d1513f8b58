"""The figures of attention maps, each from arrays to one Picture: the same in TensorBoard and in the report.

Maps are shares of a query's attention by patch, [..., grid height, grid width], not renormalised; images are uint8
[height, width, channel].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attention_visualizer.measures import Query
from attention_visualizer.observation import Observation
from attention_visualizer.panels import (
    Picture,
    Tile,
    attention_scale,
    difference_scale,
    mark_patch,
    overlay,
    sequential_scale,
    tile_grid,
)

Array = NDArray[Any]


@dataclass(frozen=True)
class Subject:
    """One image and what the model attends to on it, for one query.

    maps, rollouts: [layer, grid height, grid width], rollouts up to and including each layer; head_maps:
    [layer, head, grid height, grid width]; entropy: [layer, head] in nats; self_attention: [layer, head], the
    share that the class token gives to itself, None without a class token query.
    """

    image: Array
    head_maps: Array
    rollouts: Array
    entropy: Array
    self_attention: Array | None
    num_keys: int
    query: Query
    true_class: str | None
    predicted_class: str
    probability: float

    @classmethod
    def of(
        cls, observation: Observation, number: int, image: Array, true_class: str | None, class_names: Sequence[str]
    ) -> Subject:
        """The `number`-th image of an observation."""
        own = observation.self_attention
        return cls(
            image,
            observation.head_maps[number],
            observation.rollouts[number],
            observation.entropy[number],
            None if own is None else own[number],
            observation.geometry.num_tokens,
            observation.query,
            true_class,
            class_name(class_names, int(observation.predicted[number])),
            float(observation.probability[number]),
        )

    @property
    def maps(self) -> Array:
        """Mean over heads: [layer, grid height, grid width]."""
        return self.head_maps.mean(axis=1)

    @property
    def verdict(self) -> str:
        predicted = f"predicted {self.predicted_class} ({self.probability:.1%})"
        return predicted if self.true_class is None else f"true {self.true_class}, {predicted}"

    def input(self) -> Tile:
        return Tile(self.marked(self.image), "input")

    def over(self, attention: Array) -> list[Array]:
        """Maps [map, grid height, grid width] of this query, each over the image."""
        return [self.marked(picture) for picture in overlay(self.image, attention, self.num_keys)]

    def rollouts_over(self) -> list[Array]:
        """The rollout up to each layer over the image, renormalised over the patches."""
        rollouts = patch_share(self.rollouts)
        return [self.marked(picture) for picture in overlay(self.image, rollouts, rollouts[0].size)]

    def marked(self, picture: Array) -> Array:
        """With a box around the patch that asks, if it is one patch."""
        if isinstance(self.query, str):
            return picture
        return mark_patch(picture, self.head_maps.shape[-2:], *self.query)

    def layer_caption(self, layer: int) -> str:
        return _caption(
            self.entropy[layer].mean(), None if self.self_attention is None else self.self_attention[layer].mean()
        )

    def head_caption(self, layer: int, head: int) -> str:
        own = None if self.self_attention is None else self.self_attention[layer, head]
        return _caption(self.entropy[layer, head], own)


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


def overlay_strip(subject: Subject, headline: str, subtitle: str = "", face_note: str = "") -> Picture:
    """The input, each layer's map over it (mean over heads), then the rollout of all layers."""
    tiles: list[Tile | None] = [subject.input()]
    for layer, picture in enumerate(subject.over(subject.maps)):
        tiles.append(Tile(picture, f"layer {layer + 1}", subject.layer_caption(layer)))
    tiles.append(Tile(subject.rollouts_over()[-1], "rollout", "over patches"))
    scale = attention_scale(subject.num_keys)
    # A little smaller than elsewhere: eight of them fit a TensorBoard card.
    return tile_grid([tiles], headline, subtitle, face_note=face_note, tile_size=100, scale=scale)


def attention_pattern(subject: Subject, headline: str, subtitle: str = "", face_note: str = "") -> Picture:
    """Top row the attention by layer, bottom row the same over the image."""
    scale = attention_scale(subject.num_keys)
    layers = range(len(subject.maps))
    top: list[Tile | None] = [subject.input()]
    top += [
        Tile(scale.to_rgb(subject.maps[layer]), f"layer {layer + 1}", subject.layer_caption(layer)) for layer in layers
    ]
    bottom: list[Tile | None] = [None]
    bottom += [Tile(picture) for picture in subject.over(subject.maps)]
    return tile_grid([top, bottom], headline, subtitle, row_titles=["map", "overlay"], face_note=face_note, scale=scale)


def head_grid(
    subject: Subject, headline: str, subtitle: str = "", face_note: str = "", layers: list[int] | None = None
) -> Picture:
    """Layers down, heads across, over the image; `layers` (from 0) keeps some rows."""
    shown = list(range(len(subject.head_maps))) if layers is None else layers
    num_heads = subject.head_maps.shape[1]
    tiles: list[list[Tile | None]] = [
        [
            Tile(picture, "", subject.head_caption(layer, head))
            for head, picture in enumerate(subject.over(subject.head_maps[layer]))
        ]
        for layer in shown
    ]
    return tile_grid(
        tiles,
        headline,
        subtitle,
        column_titles=[f"head {head + 1}" for head in range(num_heads)],
        row_titles=[f"layer {layer + 1}" for layer in shown],
        face_note=face_note,
        scale=attention_scale(subject.num_keys),
    )


def layer_comparison(subject: Subject, headline: str, subtitle: str = "", face_note: str = "") -> Picture:
    """Layers from shallow to deep: the map, the rollout up to there, and what changed since the layer before."""
    scale = attention_scale(subject.num_keys)
    layers = range(len(subject.maps))
    tiny = np.finfo(np.float32).tiny
    logs = np.log2(np.maximum(subject.maps, tiny))
    change_scale = difference_scale(3.0, "change since the layer before")
    tiles: list[list[Tile | None]] = [
        [
            Tile(picture, f"layer {layer + 1}", subject.layer_caption(layer))
            for layer, picture in enumerate(subject.over(subject.maps))
        ],
        [Tile(picture) for picture in subject.rollouts_over()],
        [None if layer == 0 else Tile(change_scale.to_rgb(logs[layer] - logs[layer - 1])) for layer in layers],
    ]
    return tile_grid(
        tiles,
        headline,
        subtitle,
        row_titles=["attention", "rollout over patches", "change"],
        face_note=face_note,
        scale=scale,
        second_scale=change_scale,
    )


def patch_share(maps: Array) -> Array:
    """Renormalised over the patches: after few layers, rollout keeps much of its mass on the query itself."""
    return maps / np.maximum(maps.sum(axis=(-2, -1), keepdims=True), np.finfo(np.float32).tiny)


def entropy_heat_map(entropy: Array, highest: float, headline: str, face_note: str = "") -> Picture:
    """Layers down, heads across: entropy in nats [layer, head], dark (one key) to yellow (uniform)."""
    scale = sequential_scale(0.0, highest, "entropy (nats)")
    tiles: list[list[Tile | None]] = [
        [Tile(scale.to_rgb(np.full((1, 1), value)), "", f"{value:.2f}") for value in heads] for heads in entropy
    ]
    return tile_grid(
        tiles,
        headline,
        column_titles=[f"head {head + 1}" for head in range(entropy.shape[1])],
        row_titles=[f"layer {layer + 1}" for layer in range(entropy.shape[0])],
        face_note=face_note,
        tile_size=56,
        scale=scale,
    )


def probe_sheet(probe: dict[str, Array], frame: dict[str, Array], moment: str, face_note: str = "") -> Picture:
    """One frame of a training run's history: a row for each probe image, the input, each layer, the rollout.

    probe and frame: as in AttentionHistory.
    """
    names, num_keys = [str(name) for name in probe["class_names"]], int(probe["num_keys"])
    query: Query = "cls" if probe["query"] == "cls" else "patches"
    tiles: list[list[Tile | None]] = []
    titles = []
    for number, image in enumerate(probe["images"]):
        rollout = patch_share(frame["rollout"][number])
        predicted = class_name(names, int(frame["predicted"][number]))
        tiles.append(
            [
                Tile(image, caption=f"→ {predicted}"),
                *(Tile(picture) for picture in overlay(image, frame["maps"][number], num_keys)),
                Tile(overlay(image, rollout, rollout.size)),
            ]
        )
        label = int(probe["labels"][number])
        true_class = names[label] if label >= 0 else "?"
        titles.append(f"true {true_class}")
    num_layers = frame["maps"].shape[1]
    return tile_grid(
        tiles,
        f"By layer: {query_name(query)}, mean over heads",
        moment,
        column_titles=["input", *(f"layer {layer + 1}" for layer in range(num_layers)), "rollout"],
        row_titles=titles,
        face_note=face_note,
        tile_size=56,
        scale=attention_scale(num_keys),
    )
