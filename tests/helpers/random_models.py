"""Random models whose tokens have known places, for tests of what is measured of them."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS = 12, 3


@dataclass(frozen=True)
class Plan:
    """What a model does to its images and tokens; the same numbers make the same model."""

    seed: int
    grid: tuple[int, int]
    patch: tuple[int, int]
    prefix: int
    suffix: int
    order: str  # of patches: "rows", "columns", "shuffled"
    embedding: str  # "convolution", "unfold", "overlapping"
    window: tuple[int, int] | None
    shift: tuple[int, int]
    margin: (
        str  # "", "resized" to half the size inside, "cropped" by a patch at each side, or "padded" to whole patches
    )
    #: Before the second layer: "", "pooled" two by two, "half" (those of largest norm), "first" rows only, "turned" to
    #: the other order, "sorted" by their norms, or the first is "replaced" by a token of no picture.
    later: str
    residual: bool
    by_hand: bool
    depth: int
    #: What tokens see of each other beside attention: "", a "norm" over all of them, a "gate" of the channels by their
    #: mean, a "summary" token that is their mean, a "convolution" of neighbors.
    beside: str
    #: Before the first layer: "" all patches, "some" or some "lines" of them, the same for all pictures, or as many as
    #: "the picture" says.
    kept: str = ""

    @property
    def inner(self) -> tuple[int, int]:
        """Pixels that are cut into patches."""
        return self.grid[0] * self.patch[0], self.grid[1] * self.patch[1]

    @property
    def image(self) -> tuple[int, int]:
        height, width = self.inner
        if self.margin == "resized":
            return 2 * height, 2 * width
        if self.margin == "cropped":
            return height + 2 * self.patch[0], width + 2 * self.patch[1]
        if self.margin == "padded":
            return height - self.patch[0] // 2, width - self.patch[1] // 2
        return height, width


def random_plan(seed: int) -> Plan:
    chance = random.Random(seed)
    windowed = chance.random() < 0.2
    window = (chance.randint(1, 3), chance.randint(2, 3)) if windowed else None
    if window is None:
        grid = chance.randint(1, 6), chance.randint(2, 6)
    else:
        grid = window[0] * chance.randint(2, 3), window[1] * chance.randint(1, 3)
    shift = (chance.randrange(window[0]), chance.randrange(window[1])) if window and chance.random() < 0.5 else (0, 0)
    later = chance.choice(["", "", "", "half", "first", "pooled"]) if window is None else ""
    if later == "pooled" and (grid[0] % 2 or grid[1] % 2):
        later = ""
    if later == "first" and grid[0] < 2:
        later = ""
    plan = Plan(
        seed=seed,
        grid=grid,
        patch=(chance.randint(2, 5), chance.randint(2, 5)),
        prefix=0 if window else chance.choice([0, 1, 1, 2, 4]),
        suffix=0 if window else chance.choice([0, 0, 0, 1, 3]),
        order="rows" if window or later == "pooled" else chance.choice(["rows", "rows", "columns", "shuffled"]),
        embedding=chance.choice(["convolution", "unfold", "overlapping"]),
        window=window,
        shift=shift,
        margin=chance.choice(["", "", "", "resized", "cropped", "padded"]),
        later=later,
        residual=chance.random() < 0.8,
        by_hand=chance.random() < 0.4,
        depth=2 if later else chance.randint(1, 3),
        beside="",
    )
    beside = random.Random(f"beside {seed}").choice([""] * 8 + ["norm", "gate", "summary", "convolution"])
    if beside == "convolution" and window is None:
        return replace(plan, grid=(3 + grid[0], 3 + grid[1]), order="rows", later="", beside=beside)
    is_plain = window is None and not plan.later and not beside
    if is_plain and random.Random(f"kept {seed}").random() < 0.25:
        kept = random.Random(f"what is kept {seed}").choice(["some", "lines", "lines", "lines", "the picture"])
        return replace(plan, kept=kept, depth=1)
    if is_plain and plan.depth > 1 and random.Random(f"later {seed}").random() < 0.4:
        # Of two or three patches one may have the larger norm in all pictures.
        kinds = ["turned", "replaced", "sorted"] if math.prod(grid) > 3 else ["turned", "replaced"]
        return replace(plan, later=random.Random(f"what is later {seed}").choice(kinds))
    if beside == "convolution" or (beside == "summary" and not plan.prefix):
        return plan
    return replace(plan, beside=beside)


class RandomModel(nn.Module):
    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        generator = torch.Generator().manual_seed(plan.seed)
        height, width = plan.patch
        kernel = (height + 2, width + 2) if plan.embedding == "overlapping" else plan.patch
        self.cut = nn.Conv2d(3, WIDTH, kernel, plan.patch, padding=1 if plan.embedding == "overlapping" else 0)
        self.extra = nn.Parameter(torch.randn(1, plan.prefix + plan.suffix, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, math.prod(plan.grid), WIDTH))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(plan.depth))
        self.mixes = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(plan.depth))
        self.kernel = nn.Parameter(torch.empty(WIDTH, 1, 3, 3))  # last, so that the others do not depend on it
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.7)
        count = math.prod(plan.grid)
        orders = {
            "rows": torch.arange(count),
            "columns": torch.arange(count).view(plan.grid).T.flatten(),
            "shuffled": torch.randperm(count, generator=generator),
        }
        self.order = orders[plan.order]  # the patch at each place among the tokens
        if plan.kept in ("some", "lines"):
            places = torch.rand(plan.grid, generator=generator) < 0.6
            if plan.kept == "lines":
                places = places[:, :1] & places[:1]
            places = places if places.any() else ~places
            self.order = self.order[places.flatten()[self.order]]

    def forward(self, images: Tensor) -> Tensor:
        plan = self.plan
        tokens = self.embed(self.prepared(images)) + self.positions
        tokens = tokens[:, self.order]
        if plan.kept == "the picture":
            tokens = tokens[:, : 1 + int(1000 * tokens.square().mean()) % tokens.shape[1]]
        extra = self.extra.expand(len(tokens), -1, -1)
        tokens = torch.cat([extra[:, : plan.prefix], tokens, extra[:, plan.prefix :]], dim=1)
        for number, (layer, mix) in enumerate(zip(self.layers, self.mixes, strict=True)):
            if number == 1 and plan.later:
                tokens = self.shortened(tokens)
            attended = self.attend(layer, tokens)
            tokens = F.layer_norm(tokens + attended if plan.residual else attended, (WIDTH,))
            tokens = tokens + mix(tokens).tanh()
            tokens = self.seen_beside(tokens)
        return tokens.mean(dim=1)

    def seen_beside(self, tokens: Tensor) -> Tensor:
        plan = self.plan
        if plan.beside == "norm":
            return F.layer_norm(tokens, tokens.shape[1:])
        if plan.beside == "gate":
            return tokens * tokens.mean(dim=1, keepdim=True).sigmoid()
        if plan.beside == "summary":
            return torch.cat([tokens[:, 1:].mean(dim=1, keepdim=True), tokens[:, 1:]], dim=1)
        if plan.beside == "convolution":
            first, behind = plan.prefix, plan.prefix + math.prod(plan.grid)
            image = tokens[:, first:behind].mT.unflatten(2, plan.grid)
            seen = tokens[:, first:behind] + F.conv2d(image, self.kernel, padding=1, groups=WIDTH).flatten(2).mT
            return torch.cat([tokens[:, :first], seen, tokens[:, behind:]], dim=1)
        return tokens

    def prepared(self, images: Tensor) -> Tensor:
        plan = self.plan
        if plan.margin == "resized":
            return F.interpolate(images, scale_factor=0.5, mode="area")
        if plan.margin == "cropped":
            height, width = plan.patch
            return images[:, :, height : height + plan.inner[0], width : width + plan.inner[1]]
        if plan.margin == "padded":
            return F.pad(images, (0, plan.inner[1] - images.shape[3], 0, plan.inner[0] - images.shape[2]))
        return images

    def embed(self, images: Tensor) -> Tensor:
        if self.plan.embedding == "unfold":
            return F.unfold(images, self.plan.patch, stride=self.plan.patch).mT @ self.cut.weight.flatten(1).T
        return self.cut(images).flatten(2).mT

    def shortened(self, tokens: Tensor) -> Tensor:
        plan, count = self.plan, math.prod(self.plan.grid)
        before, patches = tokens[:, : plan.prefix], tokens[:, plan.prefix : plan.prefix + count]
        behind = tokens[:, plan.prefix + count :]
        if plan.later == "pooled":
            rows, columns = plan.grid
            patches = patches.unflatten(1, (rows // 2, 2, columns // 2, 2)).mean(dim=(2, 4)).flatten(1, 2)
        elif plan.later == "half":
            chosen = patches.norm(dim=2).topk(count // 2, dim=1).indices
            patches = patches.take_along_dim(chosen[:, :, None], dim=1)
        elif plan.later == "turned":
            patches = patches.flip(1)
        elif plan.later == "sorted":
            patches = patches.take_along_dim(patches.norm(dim=2).argsort(dim=1)[:, :, None], dim=1)
        elif plan.later == "replaced":
            patches = torch.cat([self.positions[:, :1].expand(len(patches), -1, -1), patches[:, 1:]], dim=1)
        else:
            patches = patches[:, : count // 2]
        return torch.cat([before, patches, behind], dim=1)

    def attend(self, layer: nn.Module, tokens: Tensor) -> Tensor:
        window, images = self.plan.window, len(tokens)
        if window is not None:
            tokens = self.windows(tokens)
        q, k, v = layer(tokens).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if self.plan.by_hand:
            out = (2 * q @ k.mT).softmax(dim=-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, scale=2.0)
        out = out.transpose(1, 2).flatten(2)
        return out if window is None else self.joined(out, images)

    def windows(self, tokens: Tensor) -> Tensor:
        (rows, columns), (height, width) = self.plan.grid, self.window
        image = tokens.unflatten(1, (rows, columns)).roll([-by for by in self.plan.shift], dims=(1, 2))
        tiles = image.unflatten(2, (-1, width)).unflatten(
            1, (-1, height)
        )  # image, down, height, across, width, channel
        return tiles.transpose(2, 3).flatten(3, 4).flatten(0, 2)

    def joined(self, tokens: Tensor, images: int) -> Tensor:
        (rows, columns), (height, width) = self.plan.grid, self.window
        tiles = tokens.unflatten(0, (images, rows // height, columns // width)).unflatten(3, (height, width))
        whole = tiles.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return whole.roll(self.plan.shift, dims=(1, 2)).flatten(1, 2)

    @property
    def window(self) -> tuple[int, int]:
        assert self.plan.window is not None
        return self.plan.window

    def middles(self, number: int) -> list[tuple[float, float] | None] | None:
        """Where each key of a layer lies: the middle of its patch in pixels of the image, None for other tokens; None
        for a layer whose places nobody can draw on the image. For windows, all of an image, one after the other."""
        plan = self.plan
        if plan.margin == "cropped" or plan.kept == "the picture":
            return None
        if plan.later in ("half", "first", "sorted") and number:
            return None
        scale = 2 if plan.margin == "resized" else 1
        of_patch = [
            (scale * (row + 0.5) * plan.patch[0], scale * (column + 0.5) * plan.patch[1])
            for row in range(plan.grid[0])
            for column in range(plan.grid[1])
        ]
        if plan.later == "pooled" and number:
            of_patch = [
                (scale * (2 * row + 1) * plan.patch[0], scale * (2 * column + 1) * plan.patch[1])
                for row in range(plan.grid[0] // 2)
                for column in range(plan.grid[1] // 2)
            ]
        elif plan.window is not None:
            numbers = torch.arange(len(of_patch)).view(1, -1, 1)
            return [of_patch[each] for each in self.windows(numbers).flatten().tolist()]
        else:
            of_patch = [of_patch[each] for each in self.order.tolist()]
        found: list[Any] = [None] * plan.prefix + of_patch + [None] * plan.suffix
        if plan.later == "turned" and number:
            found[plan.prefix : plan.prefix + len(of_patch)] = of_patch[::-1]
        if plan.later == "replaced" and number:
            found[plan.prefix] = None
        return found

    def has_place(self, number: int) -> bool:
        """Whether the keys of a layer are all patches of a grid."""
        is_part = bool(self.plan.kept) or (self.plan.later == "replaced" and number > 0)
        return self.middles(number) is not None and not is_part
