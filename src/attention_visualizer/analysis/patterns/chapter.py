"""Attention by layer on each sample: the map, and the map over the image."""

from __future__ import annotations

from attention_visualizer.analysis.study.study import Sample, Study
from attention_visualizer.figures import attention_figures as figures
from attention_visualizer.figures.attention_figures import ExplainedImage
from attention_visualizer.figures.panels import PanelFigure
from attention_visualizer.report.chapter import Chapter


def picture(study: Study, subject: ExplainedImage, sample: Sample) -> PanelFigure:
    headline = f"By layer: {figures.query_name(subject.query)}, mean over heads"
    return figures.attention_pattern(subject, headline, f"{sample.source}: {subject.verdict}", study.watermark)


def write(study: Study) -> Chapter:
    return Chapter(
        "Attention by layer",
        TEXT.format(
            query=figures.query_name(study.subjects[0].query),
            self_note="" if study.subjects[0].self_attention is None else SELF_NOTE,
        ),
        study.save_for_samples(picture, "attention_pattern"),
    )


TEXT = """Each column is a layer, from shallow to deep; the colour is the {query}, averaged over heads, relative to a
query that prefers nothing: white is uniform, each step of red doubles it and each step of blue halves it. H is the
entropy in nats{self_note}."""

SELF_NOTE = ', "self" the share that the class token keeps for itself'
