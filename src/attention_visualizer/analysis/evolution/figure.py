"""Figures of attention over training: curves, and an animation of the probe images."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from attention_visualizer.analysis.study.output import Output
from attention_visualizer.figures import charts
from attention_visualizer.figures.attention_figures import moment, probe_sheet
from attention_visualizer.figures.panels import PanelFigure
from attention_visualizer.files.atomic import atomic_path
from attention_visualizer.measures.map_measures import uniform_entropy
from attention_visualizer.runs.history import AttentionHistory

FRAME_MILLISECONDS = 600
MAX_FRAMES = 300  # they are in memory together


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


def draw_frames(history: AttentionHistory) -> Iterator[PanelFigure]:
    """One figure for each captured frame of the probe images, at most MAX_FRAMES, the last one among them."""
    step = -(-len(history.frames) // MAX_FRAMES)
    for frame in history.frames[::-step][::-1]:
        yield probe_sheet(history.probe, frame, moment(float(frame["epoch"]), int(frame["step"])))


def animate(history: AttentionHistory, output: Output, stem: str) -> str:
    """Write an animated WebP; return its file name."""
    sheets = (sheet.with_watermark(output.watermark) for sheet in draw_frames(history))
    first, *others = (Image.fromarray(sheet.to_rgb()) for sheet in sheets)
    path = output.folder / f"{stem}.webp"
    durations = [FRAME_MILLISECONDS] * len(others) + [4 * FRAME_MILLISECONDS]  # rest on the result
    with atomic_path(path) as temporary:
        first.save(temporary, save_all=True, append_images=others, duration=durations, loop=0, lossless=True)
    return path.name
