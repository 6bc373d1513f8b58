"""Maps of random weights: how much of what a method gains, and of its map, needs no training."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attention_visualizer.analysis.study.study import FIRST_CONTROL, Study
from attention_visualizer.analysis.trust.rankings import method_maps, own_model
from attention_visualizer.measures import intervals
from attention_visualizer.measures.intervals import Interval
from attention_visualizer.models.untrained import random_weights
from attention_visualizer.models.vision_transformer import VisionTransformer

Array = NDArray[Any]

MAX_CONTROL_IMAGES = 60  # whose maps are made again with random weights: their curves cost as much as all others


def choose_control_rows(num_images: int) -> Array:
    """Return evenly spaced rows."""
    count = min(num_images, MAX_CONTROL_IMAGES)
    return np.arange(count) * num_images // count


def control_maps(study: Study, rows: Array, classes: Array) -> list[dict[str, Array]]:
    """Return each control model's maps, method -> [image, patch], for the classes that the trained model predicts."""
    inputs = study.target.model_input(study.target.images.read(rows.tolist()))
    maps = []
    for model in study.control_models:
        assert isinstance(model, VisionTransformer)
        maps.append(method_maps(model, inputs, torch.from_numpy(classes)))
    return maps


def randomisation(
    study: Study, rows: Array, classes: Array, original: dict[str, Array]
) -> tuple[dict[str, Interval], list[str]]:
    """Return method -> likeness [stage] to the original maps, and the stages' names."""
    inputs = study.target.model_input(study.target.images.read(rows.tolist()))
    likeness: dict[str, list[Array]] = {name: [] for name in original}
    stages = []
    for stage, model in cascade(own_model(study), FIRST_CONTROL):
        study.progress(f"random weights down to the {stage}")
        stages.append(stage)
        for name, maps in method_maps(model, inputs, torch.from_numpy(classes)).items():
            likeness[name].append(rank_correlations(original[name], maps))
    return {name: intervals.bootstrap_mean(np.stack(each, axis=1)) for name, each in likeness.items()}, stages


def cascade(model: VisionTransformer, seed: int) -> Iterator[tuple[str, VisionTransformer]]:
    """The model with its weights made random from the output down, stage by stage (Adebayo et al., 2018)."""
    fresh = random_weights(model, seed).state_dict()
    changed = copy.deepcopy(model)
    depth = len(model.blocks)
    stages: list[tuple[str, tuple[str, ...]]] = [("head", ("head.", "norm."))]
    stages += [(f"block {number + 1}", (f"blocks.{number}.",)) for number in reversed(range(depth))]
    stages += [("embedding", ("patch_embed.", "cls_token", "pos_embed"))]
    for name, prefixes in stages:
        part = {key: value for key, value in fresh.items() if key.startswith(prefixes)}
        changed.load_state_dict(part, strict=False)
        yield name, changed


def rank_correlations(first: Array, second: Array) -> Array:
    """Return Spearman's for each image: [image, patch] twice -> [image]; 0 where a map is the same everywhere."""
    return np.nan_to_num(intervals.spearman(first, second))
