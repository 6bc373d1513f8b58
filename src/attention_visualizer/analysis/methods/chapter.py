"""What different methods say on each sample: attention alone, through the layers, with values, with gradients."""

from __future__ import annotations

import numpy as np

from attention_visualizer.analysis.study.study import Sample, Study
from attention_visualizer.figures import attention_figures as figures
from attention_visualizer.figures.attention_figures import ExplainedImage
from attention_visualizer.figures.panels import PanelFigure
from attention_visualizer.measures.explanations import explain
from attention_visualizer.report.chapter import Chapter


def explanations(study: Study, sample: Sample) -> dict[str, np.ndarray]:
    """Method -> [grid height, grid width].

    Without maps of nothing but zeros: the gradient of a query of the last layer that no score depends on.
    """
    found = explain(
        study.model,
        study.model_input(sample.image[None]),
        query=study.query,
        geometry=study.given_geometry,
        rollout=study.rollout,
    )
    return {name: np.asarray(maps[0]) for name, maps in found.maps.items() if maps[0].any()}


def picture(study: Study, subject: ExplainedImage, sample: Sample) -> PanelFigure:
    maps = explanations(study, sample)
    headline = f"By method: {figures.query_name(subject.query)}"
    return figures.method_comparison(subject, maps, headline, f"{sample.source}: {subject.verdict}", study.watermark)


def write(study: Study) -> Chapter:
    shown = explanations(study, study.samples[0])
    sentences = [
        text.format(rollout=describe_rollout(study))
        for start, text in SAID.items()
        if any(n.startswith(start) for n in shown)
    ]
    text = " ".join([INTRODUCTION, *sentences, CONCLUSION])
    return Chapter("Method by method", text, study.save_for_samples(picture, "attention_methods"))


def describe_rollout(study: Study) -> str:
    fusion, discard = study.rollout.fusion, study.rollout.discard
    cut = f", the smallest {discard:.0%} of each row dropped" if discard else ""
    return f"{fusion} over heads{cut}"


INTRODUCTION = """The same image and query by several methods, each renormalised over the patches, so that white is an
even share."""
SAID = {
    "attention": "**Attention** of the last layer, mean over heads.",
    "value-weighted": "**Value-weighted** attention (Kobayashi et al., 2020): the length of what each patch adds, "
    "A v W_O (A v where the model's output projection is not known); attention alone also counts a patch that carries "
    "nothing.",
    "rollout": "**Rollout** (Abnar and Zuidema, 2020; {rollout}) follows attention through all layers.",
    "gradient": "**Gradient x attention** keeps what raises the score of the predicted class.",
    "relevance": "**Relevance** (Chefer et al., ICCV 2021) does so through all layers.",
}
CONCLUSION = """They can disagree: none of them is a proof of what the answer rests on."""
