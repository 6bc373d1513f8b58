"""From shallow to deep on each sample: the map, the rollout up to there, and what each layer changes."""

from __future__ import annotations

from attention_visualizer.analysis.methods.chapter import describe_rollout
from attention_visualizer.analysis.needs import ChapterWriter
from attention_visualizer.analysis.study.samples import Sample
from attention_visualizer.analysis.study.study import Study, save_for_samples
from attention_visualizer.figures import attention_figures
from attention_visualizer.figures.attention_figures import ExplainedImage, query_name
from attention_visualizer.figures.panels import PanelFigure
from attention_visualizer.report.chapter import Chapter


def draw(study: Study, image: ExplainedImage, sample: Sample) -> PanelFigure:
    headline = f"From shallow to deep: {query_name(image.query)}, mean over heads"
    return attention_figures.layer_comparison(image, headline, sample.described(image.verdict))


def write(study: Study) -> Chapter:
    has_rollout = study.explained_images[0].rollouts is not None
    middle = ROLLOUT.format(options=describe_rollout(study.target.rollout)) if has_rollout else NO_ROLLOUT
    return Chapter(CHAPTER.title, TEXT.format(middle=middle), save_for_samples(study, draw, "layer_comparison"))


CHAPTER = ChapterWriter("From shallow to deep", write, ("layer_comparison_sample_#",))

TEXT = """Top: the map of each layer. {middle} Bottom: the change of the map from the previous layer, in doublings."""

ROLLOUT = """Middle: attention rollout (Abnar and Zuidema, 2020; {options}), which propagates attention through
the residual stream from the input up to that layer, renormalised over the patches."""

NO_ROLLOUT = """There is no rollout: this model's layers do not all share the same tokens."""
