"""From shallow to deep on each sample: the map, the rollout up to there, and what each layer changes."""

from __future__ import annotations

from attention_visualizer.analysis.methods.chapter import describe_rollout
from attention_visualizer.analysis.study.study import Sample, Study
from attention_visualizer.figures import attention_figures as figures
from attention_visualizer.figures.attention_figures import ExplainedImage
from attention_visualizer.figures.panels import PanelFigure
from attention_visualizer.report.chapter import Chapter


def picture(study: Study, subject: ExplainedImage, sample: Sample) -> PanelFigure:
    headline = f"From shallow to deep: {figures.query_name(subject.query)}, mean over heads"
    return figures.layer_comparison(subject, headline, f"{sample.source}: {subject.verdict}", study.watermark)


def write(study: Study) -> Chapter:
    has_rollout = study.subjects[0].rollouts is not None
    middle = ROLLOUT.format(options=describe_rollout(study)) if has_rollout else NO_ROLLOUT
    return Chapter(
        "From shallow to deep", TEXT.format(middle=middle), study.save_for_samples(picture, "layer_comparison")
    )


TEXT = """Top: the map of each layer. {middle} Bottom: the change of the map since the layer before, in doublings."""

ROLLOUT = """Middle: attention rollout (Abnar and Zuidema, 2020; {options}), which follows attention through the
residual stream from the input up to that layer, renormalised over the patches."""

NO_ROLLOUT = """There is no rollout: this model's layers do not all work on the same tokens."""
