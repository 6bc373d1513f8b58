"""Vision Transformers that several tests share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.models.vision_transformer import VisionTransformer


def random_vit(seed: int = 0, **overrides: Any) -> VisionTransformer:
    """Return this project's ViT for images of 15 x 15, in eval mode: 25 patches, 3 heads of 7 columns, 5 layers.

    Every parameter is random and large enough for attention to be far from uniform.
    """
    sizes: dict[str, Any] = {"img_size": 15, "patch_size": 3, "embed_dim": 21, "num_heads": 3, "num_layers": 5}
    model = VisionTransformer(**(sizes | {"mlp_dim": 11} | overrides))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model.eval()


class HandWritten(nn.Module):
    """A ViT whose attributes nobody knows: patches of 5 x 5 by unfolding, a class token, attention in two lines."""

    def __init__(self, channels: int = 1, dim: int = 6, classes: int = 7) -> None:
        super().__init__()
        self.tokenise = nn.Linear(channels * 25, dim)
        self.first = nn.Parameter(torch.randn(1, 1, dim))
        self.mixers = nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in range(2))
        self.out = nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.tokenise(nn.functional.unfold(images, 5, stride=5).transpose(1, 2))
        tokens = torch.cat([self.first.expand(len(tokens), -1, -1), tokens], dim=1)
        for mixer in self.mixers:
            query, key, value = mixer(tokens).chunk(3, dim=-1)
            tokens = tokens + (query @ key.transpose(1, 2) / 6**0.5).softmax(dim=-1) @ value
        return self.out(tokens[:, 0])


HAND_WRITTEN_GEOMETRY = Geometry((3, 3), 1, (5, 5))  # of its tokens, on images of 15 x 15


class Merging(nn.Linear):
    """Adds its low-rank part to the weight for evaluation, as LoRA layers do."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.part, self.merged = nn.Parameter(torch.full_like(self.weight, 0.01)), False

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.part.data
            self.merged = not mode
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        assert self.merged is not self.training
        return super().forward(inputs) if self.merged else super().forward(inputs) + F.linear(inputs, self.part)
