"""From shallow to deep on each sample: the map, the rollout up to there, and what each layer changes."""

from __future__ import annotations

from attention_visualizer.analysis.layers import film
from attention_visualizer.analysis.methods.chapter import describe_rollout
from attention_visualizer.analysis.needs import ChapterWriter
from attention_visualizer.analysis.study.samples import Sample
from attention_visualizer.analysis.study.study import Study, save_for_samples
from attention_visualizer.figures import attention_figures
from attention_visualizer.figures.attention_figures import ExplainedImage, query_name
from attention_visualizer.figures.panels import PanelFigure
from attention_visualizer.report.chapter import Chapter, FigureFile


def draw(study: Study, image: ExplainedImage, sample: Sample) -> PanelFigure:
    headline = f"From shallow to deep: {query_name(image.query)}, mean over heads"
    return attention_figures.layer_comparison(image, headline, sample.described(image.verdict))


def write(study: Study) -> Chapter:
    has_rollout = study.explained_images[0].rollouts is not None
    middle = ROLLOUT.format(options=describe_rollout(study.target.rollout)) if has_rollout else NO_ROLLOUT
    films = save_film(study)
    text = f"{TEXT.format(middle=middle)} {FILM if films else NO_FILM}"
    return Chapter(CHAPTER.title, text, [*save_for_samples(study, draw, "layer_comparison"), *films])


def save_film(study: Study) -> list[FigureFile]:
    """Write the film of the first sample, where there are layers enough for one."""
    sample, image, output = study.samples[0], study.explained_images[0], study.output
    if len(image.head_maps) < film.MIN_LAYERS:
        return []
    described = sample.described(image.verdict)
    frames = film.draw_frames(image, described, output.watermark)
    name = output.save_film(frames, "attention_depth", film.MILLISECONDS)
    return [FigureFile(name, f"{described}; layer by layer with every head, above the entropy over depth (film).")]


CHAPTER = ChapterWriter("From shallow to deep", write, ("layer_comparison_sample_#", "attention_depth"))

TEXT = """Top: the map of each layer. {middle} Bottom: the change of the map from the previous layer, in doublings."""

FILM = """{figure:attention_depth} shows the first image one layer after the other, with every head."""

NO_FILM = f"""There is no film through the layers: it would have fewer than {film.MIN_LAYERS} frames."""

ROLLOUT = """Middle: attention rollout (Abnar and Zuidema, 2020; {options}), which propagates attention through
the residual stream from the input up to that layer, renormalised over the patches."""

NO_ROLLOUT = """There is no rollout: this model's layers do not all share the same tokens."""
