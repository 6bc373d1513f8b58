"""The proof of place: what is drawn is where the model sees it, on many random models."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_visualizer.attention.capture import AttentionLayer, capture
from attention_visualizer.attention.geometry import Geometry
from tests.helpers.random_models import WIDTH, Plan, RandomModel, random_plan

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


class Thinning(nn.Module):
    """LeViT in small: attention whose queries are some of the tokens, of which it alone makes the next ones."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        chance = random.Random(seed)
        self.patch = chance.randint(2, 3)
        self.grid = chance.randint(5, 11), chance.randint(5, 11)
        self.cut = nn.Conv2d(3, WIDTH, self.patch + 2 * (seed % 2), self.patch, padding=seed % 2)
        self.first, self.middle, self.last = (nn.Linear(WIDTH, 3 * WIDTH) for _ in range(3))
        self.residual = chance.random() < 0.5
        self.kind = chance.choice(["strided", "strided", "shuffled", "chosen", "largest", "pooled"])
        numbers = torch.arange(math.prod(self.grid)).view(self.grid)
        start = chance.randint(0, 1), chance.randint(0, 1)
        self.some = numbers[start[0] :: 2, start[1] :: 2].flatten()
        generator = torch.Generator().manual_seed(seed)
        if self.kind == "shuffled":
            self.some = self.some[torch.randperm(len(self.some), generator=generator)]
        if self.kind == "chosen":
            self.some = torch.randperm(numbers.numel(), generator=generator)[: len(self.some)]
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.cut(images).flatten(2).mT
        tokens = F.layer_norm(self.attended(self.first, tokens, tokens) + self.residual * tokens, (WIDTH,))
        tokens = F.layer_norm(self.attended(self.middle, self.queries(tokens), tokens), (WIDTH,))
        return self.attended(self.last, tokens, tokens)

    def queries(self, tokens: Tensor) -> Tensor:
        if self.kind == "largest":
            largest = tokens[:, :, 0].topk(len(self.some), dim=1).indices
            return tokens.take_along_dim(largest[:, :, None], dim=1)
        if self.kind == "pooled":
            return F.avg_pool2d(tokens.mT.unflatten(2, self.grid), 2).flatten(2).mT
        return tokens[:, self.some]

    def attended(self, layer: nn.Linear, queries: Tensor, tokens: Tensor) -> Tensor:
        q, k, v = layer(queries)[..., :WIDTH], *layer(tokens)[..., WIDTH:].chunk(2, dim=-1)
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]


def test_tokens_that_attention_made_lie_where_its_queries_do() -> None:
    """To half a patch, as what is left of tokens lies at one side of the larger patches that are drawn."""
    placed: dict[str, list[bool]] = {}
    for seed in range(40):
        model = Thinning(seed).eval()
        images = torch.randn(
            2, 3, *(side * model.patch for side in model.grid), generator=torch.Generator().manual_seed(seed)
        )
        with torch.no_grad(), capture(model) as attention:
            model(images)
        layer = list(attention)[-1]
        placed.setdefault(model.kind, []).append(layer.geometry is not None)
        if layer.geometry is None:
            continue
        assert model.kind in ("strided", "shuffled"), (seed, model.kind, layer.geometry)
        for key, middle in drawn(layer, layer.geometry).items():
            row, column = divmod(int(model.some[key]), model.grid[1])
            truth = (row + 0.5) * model.patch, (column + 0.5) * model.patch
            for axis in range(2):
                assert abs(middle[axis] - truth[axis]) <= 0.51 * layer.geometry.patch_size[axis], (seed, layer.geometry)
    assert len(placed) == 5 and sum(placed["strided"]) >= 3 and sum(placed["shuffled"]) >= 1, placed
