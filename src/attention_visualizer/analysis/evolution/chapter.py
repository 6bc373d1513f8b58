"""Attention over training, from the history that the run kept."""

from __future__ import annotations

from attention_visualizer.analysis.evolution.figure import animate, draw
from attention_visualizer.analysis.needs import ChapterWriter, Need
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.report.chapter import Chapter, FigureFile


def write(study: Study) -> Chapter:
    history, output = study.history, study.output
    assert history is not None  # see CHAPTER
    figures = [
        FigureFile(
            output.save(draw(history), "attention_evolution"),
            "Entropy and mean attention distance by layer and head over training.",
        ),
        FigureFile(
            animate(history, output, "attention_evolution"), "The probe images' attention over training (animated)."
        ),
    ]
    return Chapter(CHAPTER.title, TEXT.format(frames=len(history.frames)), figures)


CHAPTER = ChapterWriter(
    "Evolution over training",
    write,
    ("attention_evolution",),
    {Need.HISTORY: "This checkpoint comes without the history of a training run."},
)

TEXT = """Attention on the same probe images at {frames} steps, the first before training, most within the first epoch,
where most of the change occurs. Solid lines are means over the whole validation set (thin ones single heads), dotted
lines the probe images only; in the animation, each row is a probe image and each column a layer. Where a class token is
read out, the last layer's distance is omitted: its patch queries cannot affect the logits."""
