"""What is put to the test, and how the model answers along it.

Maps by every method; baselines that know nothing or only the ink; rankings by Shapley values and leave-one-out, which
ask the model itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attention_visualizer.analysis.study.study import Study
from attention_visualizer.analysis.study.target import batch_size
from attention_visualizer.analysis.trust.verdict import (
    AMOUNT,
    EDGES,
    HALVES,
    INKED,
    LEAVE_ONE_OUT,
    OPERATOR_NAMES,
    RANDOM,
    SHAPLEY,
)
from attention_visualizer.data import ink, strokes
from attention_visualizer.figures.attention_figures import query_name
from attention_visualizer.measures.explanations import explain
from attention_visualizer.measures.perturbation import OPERATORS, Curves, Operator, Perturbation, ranking_with_ties
from attention_visualizer.measures.shapley import leave_one_out, shapley_values
from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.support.parallel import on_all_cores

Array = NDArray[Any]

LAST_LAYER = "attention, last layer"  # what `explain` calls it
MAX_TOKENS = 1000  # of a block of images, which goes through the model once for each of some ten rankings together


@dataclass(frozen=True)
class MappedImages:
    """Some images with the model's maps of them, and their ink."""

    classes: Array  # that the model predicts, [image]
    maps: dict[str, Array]  # method -> [image, patch]
    inked: Array  # which patches hold ink, bool [image, patch]
    ink_amount: Array  # [image, patch]
    edge_amount: Array  # how much of each patch is the edge of a stroke, [image, patch]

    @classmethod
    def concatenate(cls, parts: list[MappedImages]) -> MappedImages:
        arrays = ("classes", "inked", "ink_amount", "edge_amount")
        return cls(
            maps={name: np.concatenate([part.maps[name] for part in parts]) for name in parts[0].maps},
            **{name: np.concatenate([getattr(part, name) for part in parts]) for name in arrays},
        )

    def baseline_maps(self) -> dict[str, Array]:
        """Return what each baseline knows of an image: name -> [image, patch]."""
        nothing = np.ones_like(self.ink_amount)
        return {RANDOM: nothing, INKED: self.inked.astype(float), AMOUNT: self.ink_amount, EDGES: self.edge_amount}


def own_model(study: Study) -> VisionTransformer:
    assert isinstance(study.target.model, VisionTransformer)
    return study.target.model


def memory_bounded_slices(study: Study, num_images: int) -> Iterator[slice]:
    """Return slices of the images for one pass each."""
    num_patches = int(np.prod(own_model(study).grid_size))
    size = min(batch_size(study.target.images.shape), max(1, MAX_TOKENS // num_patches))
    return (slice(start, start + size) for start in range(0, num_images, size))


def map_images(study: Study, rows: Array) -> MappedImages:
    """Predict the classes of the images of these rows, and explain them by every method."""
    model, parts = own_model(study), []
    for batch in memory_bounded_slices(study, len(rows)):
        images = study.target.images.read(rows[batch].tolist())
        inputs = study.target.model_input(images)
        with torch.no_grad():
            classes = model(inputs).argmax(dim=1)
        inked, amount = (each(images, model.grid_size).numpy() for each in (ink.inked_patches, ink.ink_amount))
        edges = strokes.amount_in_patches(strokes.edges_of(ink.ink_pixels(images).numpy()), model.grid_size)
        parts.append(MappedImages(classes.cpu().numpy(), method_maps(model, inputs, classes), inked, amount, edges))
    return MappedImages.concatenate(parts)


def method_maps(model: VisionTransformer, inputs: Tensor, classes: Tensor) -> dict[str, Array]:
    """Return method -> [image, patch], for the readout query and the given classes."""
    maps = explain(model, inputs, classes).maps
    attention = query_name("cls" if model.num_prefix_tokens else "patches")
    names = {LAST_LAYER: attention}
    names |= {name: name for name in ("value-weighted", "rollout", "relevance", "gradient x attention")}
    return {name: maps[method].reshape(len(inputs), -1) for method, name in names.items()}


def curves_along(
    study: Study, rows: Array, classes: Array, rankings: dict[str, Array], weights: str, orders: Array | None = None
) -> dict[tuple[str, Operator], Curves]:
    """(ranking, operator) -> curves of the study's model. rankings: name -> [image, patch]; weights: those that the
    rankings are of, for the progress bar; orders: `antithetic_pairs`, for the rankings that ask the model itself."""
    blocks = list(memory_bounded_slices(study, len(rows)))

    def run_block(task: tuple[Operator, slice]) -> dict[str, Curves]:
        operator, block = task
        study.progress(f"deletion and insertion, {OPERATOR_NAMES[operator]} ({weights}), image {block.start + 1:,}")
        images = study.target.images.read(rows[block].tolist())
        perturbation = Perturbation(own_model(study), images, classes[block], study.target.model_input)
        own = {name: ranking[block] for name, ranking in rankings.items()}
        if orders is not None:
            own |= rankings_by_asking(perturbation, operator, orders[:, :, block])
        return dict(zip(own, perturbation.curves(np.stack(list(own.values())), operator), strict=True))

    tasks = [(operator, block) for operator in OPERATORS for block in blocks]
    parts: dict[tuple[str, Operator], list[Curves]] = {}
    for (operator, _), found in zip(tasks, on_all_cores(run_block, tasks, study.target.device), strict=True):
        for name, curves in found.items():
            parts.setdefault((name, operator), []).append(curves)
    return {task: Curves.concatenate(each) for task, each in parts.items()}


def rankings_by_asking(perturbation: Perturbation, operator: Operator, orders: Array) -> dict[str, Array]:
    """Return name -> [image, patch]: by Shapley values from all orders [pair, 2, image, patch] and from either half of
    them, and by leaving out each patch alone."""

    def value(visible: Array) -> Array:
        return perturbation.probabilities(visible, operator)

    halves = [shapley_values(value, half.reshape(-1, *orders.shape[2:])) for half in (orders[::2], orders[1::2])]
    values = {SHAPLEY: np.mean(halves, axis=0), **dict(zip(HALVES, halves, strict=True))}
    values[LEAVE_ONE_OUT] = leave_one_out(value, *orders.shape[2:])
    return {name: ranking_with_ties(each, orders[0, 0]) for name, each in values.items()}
