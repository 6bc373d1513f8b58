"""The proof of place: what is drawn is where the model sees it, on many random models."""

from __future__ import annotations

import math
from typing import Any

import torch

from attention_visualizer.attention.capture import AttentionLayer, capture
from attention_visualizer.attention.geometry import Geometry
from tests.helpers.random_models import Plan, RandomModel, random_plan

NUM_MODELS = 500


def layers_of(plan: Plan) -> tuple[RandomModel, list[AttentionLayer]]:
    model = RandomModel(plan).eval()
    images = torch.randn(2, 3, *plan.image, generator=torch.Generator().manual_seed(plan.seed))
    with torch.no_grad(), capture(model) as attention:
        model(images)
    return model, list(attention)


def drawn(layer: AttentionLayer, geometry: Geometry) -> dict[int, tuple[float, float]]:
    """Key (of all windows of an image) -> the middle of the patch that its weight is drawn on, in pixels."""
    windows = math.prod(geometry.windows) if geometry.window else 1
    keys = torch.arange(windows * layer.weights.shape[-1]).view(windows, -1)
    usual = geometry.in_usual_order(keys) if geometry.window is None else keys
    places = geometry.to_map(usual[:, 0 if geometry.window else geometry.num_prefix_tokens :])[0]
    return {
        int(places[row, column]): (
            geometry.offset[0] + (row + 0.5) * geometry.patch_size[0],
            geometry.offset[1] + (column + 0.5) * geometry.patch_size[1],
        )
        for row in range(geometry.grid[0])
        for column in range(geometry.grid[1])
    }


def is_right(
    layer: AttentionLayer, geometry: Geometry, truth: list[tuple[float, float] | None] | None, overlapping: bool
) -> bool:
    """Whether each key is drawn where it lies: to the pixel, or to half a patch where patches overlap."""
    if truth is None:
        return False
    places = drawn(layer, geometry)
    known = {key: middle for key, middle in enumerate(truth) if middle is not None}
    if places.keys() != known.keys():
        return False
    reach = [0.51 * side if overlapping else 1.0 for side in geometry.patch_size]
    return all(
        abs(places[key][axis] - known[key][axis]) <= reach[axis] for key in known for axis in range(2)
    )  # fmt: skip


def test_every_place_that_is_drawn_is_right_and_nearly_all_are_drawn() -> None:
    """Where something beside attention is seen of all tokens, more is refused, and nothing is wrong either."""
    wrong, refused = [], 0
    missing: dict[bool, list[Any]] = {False: [], True: []}  # whether something is seen beside attention
    placeable = {False: 0, True: 0}
    for seed in range(NUM_MODELS):
        plan = random_plan(seed)
        model, layers = layers_of(plan)
        assert len(layers) == plan.depth
        for number, layer in enumerate(layers):
            truth, is_mixed = model.middles(number), bool(plan.beside) and number > 0
            is_overlapping = plan.embedding == "overlapping"
            if layer.geometry is not None and not is_right(layer, layer.geometry, truth, is_overlapping):
                wrong.append((plan, number, layer.geometry))
            placeable[is_mixed] += model.has_place(number)
            refused += not model.has_place(number)
            if model.has_place(number) and layer.geometry is None:
                missing[is_mixed].append((plan, number, layer.unplaced))
    assert not wrong, wrong[:3]
    assert placeable[False] > 500 and placeable[True] > 50 and refused > 100
    assert len(missing[False]) <= 0.05 * placeable[False], (len(missing[False]), placeable, missing[False][:5])
    assert len(missing[True]) <= 0.6 * placeable[True], (len(missing[True]), placeable)
