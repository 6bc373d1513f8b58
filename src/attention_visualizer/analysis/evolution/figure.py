"""Figures of attention over training: curves, and a strip of probe images."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from attention_visualizer.figures import charts
from attention_visualizer.figures.attention_figures import (
    class_name,
    common_unit,
    query_name,
    query_of,
)
from attention_visualizer.figures.color_scales import attention_scale
from attention_visualizer.figures.panels import Array, PanelFigure, overlay
from attention_visualizer.figures.tile_grid import Tile, tile_grid
from attention_visualizer.measures.map_measures import uniform_entropy
from attention_visualizer.runs.history import AttentionHistory

STRIP_MOMENTS, STRIP_IMAGES = 6, 4


def draw(history: AttentionHistory) -> Figure:
    """Entropy above, distance below: the probe images at every frame, the validation set at every epoch."""
    figure = Figure(figsize=(12, 8.5), layout="constrained")
    axes = figure.subplots(2, 1)
    num_keys = {int(keys) for keys in np.atleast_1d(history.probe["num_keys"])}
    reads_class_token = history.probe["query"] == "cls"
    part = "validations" if history.validations else "frames"
    steps = history.column(part, "step")
    probe_steps = history.column("frames", "step")
    uniform = uniform_entropy(num_keys.pop()) if len(num_keys) == 1 else None
    for axis, name, label, reference in (
        (axes[0], "entropy", "attention entropy (nats)", uniform),
        (axes[1], "distance", "mean attention distance (pixels)", None),
    ):
        values, probe_values = history.column(part, name), history.column("frames", name)
        if name == "distance" and reads_class_token and values.shape[1] > 1:
            # The last layer's patch queries cannot affect the logits.
            values[:, -1], probe_values[:, -1] = np.nan, np.nan
        charts.lines_over_training(steps, values, label, axis, reference, probe_steps, probe_values)
    return charts.with_headline(figure, "Attention during training")


def chosen_frames(history: AttentionHistory, count: int) -> list[dict[str, Array]]:
    """Return at most `count` frames, the first and the last among them, and most of them early, as the change is."""
    frames = history.frames
    if len(frames) <= count:
        return frames
    steps = np.log1p([float(frame["step"]) for frame in frames])
    wanted = np.linspace(steps[0], steps[-1], count)
    return [frames[index] for index in sorted({int(np.abs(steps - each).argmin()) for each in wanted})]


def draw_strip(history: AttentionHistory) -> PanelFigure:
    """Draw the last layer's attention on a few probe images, from the first captured step to the last."""
    probe, frames = history.probe, chosen_frames(history, STRIP_MOMENTS)
    num_keys = np.atleast_1d(probe["num_keys"])
    unit = common_unit(np.broadcast_to(num_keys, frames[0]["maps"].shape[1]).tolist())
    names, labels = [str(name) for name in probe["class_names"]], probe["labels"][:STRIP_IMAGES].tolist()
    rows: list[list[Tile | None]] = []
    for number in range(len(labels)):
        image = probe["images"][number]
        maps = np.stack([frame["maps"][number, -1] for frame in frames]) * (num_keys[-1] / unit)
        rows.append([Tile(image), *(Tile(picture) for picture in overlay(image, maps, unit))])
    return tile_grid(
        rows,
        f"During training: {query_name(query_of(probe))} of the last layer, mean over heads",
        f"From {'random weights' if not frames[0]['step'] else 'the first captured step'} to the last captured step",
        column_titles=["input", *(f"step {int(frame['step']):,}" for frame in frames)],
        row_titles=[class_name(names, label) if label >= 0 else f"image {i + 1}" for i, label in enumerate(labels)],
        tile_size=72,
        scale=attention_scale(unit),
    )
