"""Every head of every layer on each sample, on one scale."""

from __future__ import annotations

from attention_visualizer.analysis.study.study import Sample, Study
from attention_visualizer.figures import attention_figures as figures
from attention_visualizer.figures.attention_figures import ExplainedImage
from attention_visualizer.figures.panels import PanelFigure
from attention_visualizer.report.chapter import Chapter


def picture(study: Study, subject: ExplainedImage, sample: Sample) -> PanelFigure:
    layers = [len(subject.head_maps) - 1] if study.head_layers == "last" else None
    headline = f"Heads of {'the last layer' if layers else 'each layer'}: {figures.query_name(subject.query)}"
    return figures.head_grid(subject, headline, f"{sample.source}: {subject.verdict}", study.watermark, layers)


def write(study: Study) -> Chapter:
    return Chapter("Attention by head", TEXT, study.save_for_samples(picture, "attention_heads"))


TEXT = """Heads stand in the order of their index: a head has no identity across training runs, and nothing says what
it is for. All panels share one scale, so a pale head really is close to uniform."""
