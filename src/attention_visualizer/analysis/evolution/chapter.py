"""How attention came to be while the model trained: from the history that the run kept."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from attention_visualizer.analysis.study.study import Study
from attention_visualizer.figures import attention_figures as figures
from attention_visualizer.figures import charts
from attention_visualizer.files import atomic
from attention_visualizer.measures import map_measures
from attention_visualizer.report.chapter import Chapter, FigureFile
from attention_visualizer.runs.history import AttentionHistory

FRAME_MILLISECONDS = 600
MOST_FRAMES = 300  # they are in memory together


def write(study: Study) -> Chapter:
    history = study.history
    if history is None or not history.frames:
        return Chapter("Evolution over training", "This checkpoint comes without the history of a training run.")
    written = [
        FigureFile(
            study.save(figure(history, study), "attention_evolution"),
            "Entropy and mean attention distance by layer and head over training.",
        ),
        FigureFile(animate(history, study), "The probe images' attention over training (animated)."),
    ]
    return Chapter("Evolution over training", TEXT.format(frames=len(history.frames)), written)


def figure(history: AttentionHistory, study: Study) -> Figure:
    """Entropy above, distance below: the probe images at every frame, the validation set at every epoch."""
    drawn = Figure(figsize=(12, 8.5), layout="constrained")
    axes = drawn.subplots(2, 1)
    num_keys = {int(keys) for keys in np.atleast_1d(history.probe["num_keys"])}
    reads_cls = history.probe["query"] == "cls"
    part = "validations" if history.validations else "frames"
    steps = history.column(part, "step")
    probe_steps = history.column("frames", "step")
    uniform = map_measures.uniform_entropy(num_keys.pop()) if len(num_keys) == 1 else None
    for axis, name, label, reference in (
        (axes[0], "entropy", "attention entropy (nats)", uniform),
        (axes[1], "distance", "mean attention distance (pixels)", None),
    ):
        values, probe_values = history.column(part, name), history.column("frames", name)
        if name == "distance" and reads_cls and values.shape[1] > 1:
            # The last layer's patch queries cannot affect the logits.
            values[:, -1], probe_values[:, -1] = np.nan, np.nan
        charts.lines_over_training(steps, values, label, axis, reference, probe_steps, probe_values)
    charts.finish(drawn, "Attention while the model trained", study.watermark)
    return drawn


def animate(history: AttentionHistory, study: Study) -> str:
    """Writes attention_evolution.webp, one frame for each look at the probe images; returns its name."""
    frames = []
    step = -(-len(history.frames) // MOST_FRAMES)
    for frame in history.frames[::-step][::-1]:  # the last one among them
        moment = figures.moment(float(frame["epoch"]), int(frame["step"]))
        frames.append(Image.fromarray(figures.probe_sheet(history.probe, frame, moment, study.watermark).to_rgb()))
    path = study.output / "attention_evolution.webp"
    durations = [FRAME_MILLISECONDS] * (len(frames) - 1) + [4 * FRAME_MILLISECONDS]  # rest on the result
    with atomic.atomic_path(path) as temporary:
        frames[0].save(temporary, save_all=True, append_images=frames[1:], duration=durations, loop=0, lossless=True)
    return path.name


TEXT = """{frames} looks at the same probe images, the first before training, most within the first epoch, where most
of the change is. Solid lines are means over the whole validation set (thin ones single heads), dotted lines the probe
images only; in the animation, each row is a probe image and each column a layer. Where a class token is read out, the
last layer's distance is left out: its patch queries cannot affect the logits."""
