"""What different methods say on each sample: attention alone, through the layers, with values, with gradients."""

from __future__ import annotations

import numpy as np
import torch

from attention_visualizer import attention_figures as figures
from attention_visualizer.analysis.study import Sample, Study
from attention_visualizer.attention_figures import Subject
from attention_visualizer.chapter import Chapter
from attention_visualizer.explanations import explain
from attention_visualizer.panels import Picture


def picture(study: Study, subject: Subject, sample: Sample) -> Picture:
    found = explain(
        study.model,
        study.model_input(sample.image[None]),
        query=study.query,
        geometry=study.given_geometry,
        rollout=study.rollout,
    )
    maps = {name: np.asarray(maps[0]) for name, maps in found.maps.items()}
    headline = f"By method: {figures.query_name(subject.query)}"
    return figures.method_comparison(subject, maps, headline, f"{sample.source}: {subject.verdict}", study.face_note)


def write(study: Study) -> Chapter:
    text = TEXT.format(rollout=describe_rollout(study))
    with torch.random.fork_rng(devices=[]):
        return Chapter("Method by method", text, study.save_for_samples(picture, "attention_methods"))


def describe_rollout(study: Study) -> str:
    fusion, discard = study.rollout.fusion, study.rollout.discard
    cut = f", the smallest {discard:.0%} of each row dropped" if discard else ""
    return f"{fusion} over heads{cut}"


TEXT = """The same image and query by five methods, each renormalised over the patches, so that white is an even share.
**Attention** of the last layer, mean over heads. **Value-weighted** attention (Kobayashi et al., 2020): the length of
what each patch adds, A v W_O, where attention alone counts a patch that carries nothing. **Rollout** (Abnar and
Zuidema, 2020; {rollout}) follows attention through all layers. **Gradient x attention** keeps what raises the score of
the predicted class. **Relevance** (Chefer et al., ICCV 2021) does so through all layers. Methods that do not apply to
this model are left out. They disagree: none of them is a proof of what the answer rests on."""
