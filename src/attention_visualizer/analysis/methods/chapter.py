"""What different methods say on each sample: attention alone, through the layers, with values, with gradients."""

from __future__ import annotations

import numpy as np

from attention_visualizer.analysis.needs import ChapterWriter
from attention_visualizer.analysis.study.samples import Sample
from attention_visualizer.analysis.study.study import Study, save_for_samples
from attention_visualizer.figures import attention_figures
from attention_visualizer.figures.attention_figures import ExplainedImage, query_name
from attention_visualizer.figures.panels import PanelFigure
from attention_visualizer.measures.explanations import explain
from attention_visualizer.measures.observation import RolloutOptions
from attention_visualizer.report.chapter import Chapter


def measure(study: Study, sample: Sample) -> dict[str, np.ndarray]:
    """Return method -> map [grid height, grid width], without maps of nothing but zeros: the gradient of a query of the
    last layer that no score depends on."""
    target = study.target
    explanations = explain(
        target.model,
        target.model_input(sample.image[None]),
        query=target.query,
        geometry=target.geometry,
        rollout=target.rollout,
    )
    return {name: np.asarray(maps[0]) for name, maps in explanations.maps.items() if maps[0].any()}


def draw(study: Study, image: ExplainedImage, sample: Sample) -> PanelFigure:
    maps = measure(study, sample)
    headline = f"By method: {query_name(image.query)}"
    return attention_figures.method_comparison(image, maps, headline, sample.described(image.verdict))


def write(study: Study) -> Chapter:
    methods = measure(study, study.samples[0])
    sentences = [
        sentence.format(rollout=describe_rollout(study.target.rollout))
        for start, sentence in SENTENCES.items()
        if any(name.startswith(start) for name in methods)
    ]
    text = " ".join([INTRODUCTION, *sentences, CONCLUSION])
    return Chapter(CHAPTER.title, text, save_for_samples(study, draw, "attention_methods"))


def describe_rollout(options: RolloutOptions) -> str:
    cut = f", the smallest {options.discard:.0%} of each row dropped" if options.discard else ""
    return f"{options.fusion} over heads{cut}"


CHAPTER = ChapterWriter("Methods compared", write, ("attention_methods_sample_#",))

INTRODUCTION = """The same image and query by several methods, each renormalised over the patches, so that white is
the uniform share."""
SENTENCES = {
    "attention": "**Attention** of the last layer, mean over heads.",
    "value-weighted": "**Value-weighted** attention (Kobayashi et al., 2020): the length of the vector that each patch "
    "contributes, A v W_O (A v where the model's output projection is not known); plain attention also counts a patch "
    "that contributes nothing.",
    "rollout": "**Rollout** (Abnar and Zuidema, 2020; {rollout}) propagates attention through all layers.",
    "gradient": "**Gradient x attention** keeps what raises the score of the predicted class.",
    "relevance": "**Relevance** (Chefer et al., ICCV 2021) does so through all layers.",
}
CONCLUSION = """They can disagree: none of them proves what the prediction depends on."""
