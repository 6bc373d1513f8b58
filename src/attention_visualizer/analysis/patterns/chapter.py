"""Attention by layer on each sample: the map, and the map over the image."""

from __future__ import annotations

from attention_visualizer.analysis.needs import ChapterWriter
from attention_visualizer.analysis.study.samples import Sample
from attention_visualizer.analysis.study.study import Study, save_for_samples
from attention_visualizer.figures import attention_figures
from attention_visualizer.figures.attention_figures import ExplainedImage, query_name
from attention_visualizer.figures.panels import PanelFigure
from attention_visualizer.report.chapter import Chapter


def draw(study: Study, image: ExplainedImage, sample: Sample) -> PanelFigure:
    headline = f"By layer: {query_name(image.query)}, mean over heads"
    return attention_figures.attention_pattern(image, headline, sample.described(image.verdict))


def write(study: Study) -> Chapter:
    first = study.explained_images[0]
    text = TEXT.format(query=query_name(first.query), self_note="" if first.self_attention is None else SELF_NOTE)
    large = [] if study.target.images.has_ink else save_for_samples(study, draw_last_layer, "attention_last_layer")
    return Chapter(CHAPTER.title, text, [*large, *save_for_samples(study, draw, "attention_pattern")])


def draw_last_layer(study: Study, image: ExplainedImage, sample: Sample) -> PanelFigure:
    """A photograph has many small patches: this one is large enough to see them."""
    headline = f"Last layer: {query_name(image.query)}, mean over heads"
    return attention_figures.last_layer(image, headline, sample.described(image.verdict))


CHAPTER = ChapterWriter("Attention by layer", write, ("attention_last_layer_sample_#", "attention_pattern_sample_#"))

TEXT = """Each column is a layer, from shallow to deep; the colour is the {query}, averaged over heads, relative to
uniform attention (white): each step of red doubles it and each step of blue halves it. H is the entropy in
nats{self_note}."""

SELF_NOTE = ', "self" the share that the class token gives to itself'
