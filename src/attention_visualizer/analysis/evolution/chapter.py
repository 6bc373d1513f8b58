"""Attention over training, from the history that the run kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attention_visualizer.analysis.evolution import film
from attention_visualizer.analysis.evolution.figure import draw, draw_strip
from attention_visualizer.analysis.needs import ChapterWriter, Need
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.report.chapter import Chapter, FigureFile, Finding
from attention_visualizer.runs.history import AttentionHistory

SMALLEST_CHANGE = 0.1  # nats, for a change to be a finding


@dataclass(frozen=True)
class Change:
    """How the probe images' attention entropy changed most, of all layers."""

    layer: int  # from 1
    first: float  # nats, mean over heads and images
    last: float
    half_step: int  # the first captured step with half of the change
    last_step: int


def largest_change(history: AttentionHistory) -> Change:
    entropies = np.nanmean(history.column("frames", "entropy"), axis=2)  # [time, layer]; not all have as many heads
    steps = history.column("frames", "step")
    layer = int(np.abs(entropies[-1] - entropies[0]).argmax())
    first, last = float(entropies[0, layer]), float(entropies[-1, layer])
    done = (entropies[:, layer] - first) / (last - first) if last != first else np.ones(len(steps))
    return Change(layer + 1, first, last, int(steps[int((done >= 0.5).argmax())]), int(steps[-1]))


def write(study: Study) -> Chapter:
    history, output = study.history, study.output
    assert history is not None  # see CHAPTER
    figures = [
        FigureFile(
            output.save(draw_strip(history), "attention_evolution_strip"),
            "The last layer's attention on probe images, from the first captured step to the last.",
        ),
        FigureFile(
            output.save(draw(history), "attention_evolution"),
            "Entropy and mean attention distance by layer and head over training.",
        ),
        FigureFile(
            output.save_film(film.draw_frames(history, output.watermark), "attention_evolution", film.MILLISECONDS),
            "Probe images' attention over training, above the entropy of each layer (film).",
        ),
    ]
    change = largest_change(history)
    begins_at_start = int(history.frames[0]["step"]) == 0
    facts = {
        "frames": len(history.frames),
        "layer": change.layer,
        "first": f"{change.first:.2f}",
        "last": f"{change.last:.2f}",
        "half": f"{change.half_step:,}",
        "end": f"{change.last_step:,}",
    }
    finding = None
    if begins_at_start and abs(change.last - change.first) >= SMALLEST_CHANGE:
        finding = Finding(
            FINDING.format(**facts), figures[0].name, rank=2, view=f"images=1&layer={change.layer}&head=mean&moment=1"
        )
    numbers = {"largest_change": vars(change)}
    return Chapter(CHAPTER.title, TEXT.format(**facts), figures, numbers=numbers, finding=finding)


CHAPTER = ChapterWriter(
    "Evolution over training",
    write,
    ("attention_evolution_strip", "attention_evolution"),
    {Need.HISTORY: "This checkpoint comes without the history of a training run."},
)

FINDING = """Training changed layer {layer} most (picked afterwards): its attention entropy went from {first} to {last}
nats, half of it by step {half} of {end}."""

TEXT = """Attention on the same probe images at {frames} steps, most of them within the first epoch, where most of the
change occurs; step 0 is before training. Of all layers, the entropy of layer {layer} changed most, from {first} to
{last} nats on the probe images (mean over heads); half of the change was there at step {half} of {end}. Solid lines
are means over the whole validation set (thin ones single heads), dotted lines the probe images only; in the
film, each row is a probe image and each column a layer, under the colour of its line. Where a class token is read out,
the last layer's distance is omitted: its patch queries cannot affect the logits."""
