"""Every head of every layer on each sample, on one scale."""

from __future__ import annotations

from attention_visualizer.analysis.needs import ChapterWriter
from attention_visualizer.analysis.study.samples import Sample
from attention_visualizer.analysis.study.study import Study, save_for_samples
from attention_visualizer.figures import attention_figures
from attention_visualizer.figures.attention_figures import ExplainedImage, query_name
from attention_visualizer.figures.panels import PanelFigure
from attention_visualizer.report.chapter import Chapter


def draw(study: Study, image: ExplainedImage, sample: Sample) -> PanelFigure:
    layers = [len(image.head_maps) - 1] if study.head_layers == "last" else None
    headline = f"Heads of {'the last layer' if layers else 'each layer'}: {query_name(image.query)}"
    return attention_figures.head_grid(image, headline, sample.described(image.verdict), layers)


def write(study: Study) -> Chapter:
    return Chapter(CHAPTER.title, TEXT, save_for_samples(study, draw, "attention_heads"))


CHAPTER = ChapterWriter("Attention by head", write, ("attention_heads_sample_#",))

TEXT = """Heads are in the order of their index: a head has no identity across training runs, and the index does not
say what it is for. All panels share one scale, so a pale head really is close to uniform."""
