"""The Vision Transformer (Dosovitskiy et al., 2021), pre-norm, in one file.

Parameter names are timm's, so weights move between the two without renaming.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_visualizer.models.vit_config import ViTConfig


class PatchEmbedding(nn.Module):
    """Cut the image into patches and project each: [batch, channel, height, width] -> [batch, patch, embed]."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.patch_size = (config.patch_size, config.patch_size)
        self.proj = nn.Conv2d(config.in_channels, config.embed_dim, kernel_size=self.patch_size, stride=self.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        batch, channels, height, width = images.shape
        patch_height, patch_width = self.patch_size
        # A convolution whose stride is its kernel is one matrix product, and that is faster.
        grid = (height // patch_height, width // patch_width)
        patches = images.reshape(batch, channels, grid[0], patch_height, grid[1], patch_width)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, patches, C * ph * pw)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class ConvolutionalStem(nn.Module):
    """Patches that overlap (after Xiao et al., 2021): a convolution at full resolution, then one of stride 2 for each
    halving until a token is a patch: [batch, channel, height, width] -> [batch, patch, embed].

    The channels double with each convolution and end at the width. Even kernels keep each token's window centred on its
    patch, so that a map shows where its token looks: at 4 pixels, the patch and 4 pixels around it.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.patch_size = (config.patch_size, config.patch_size)
        widths = config.stem_widths
        layers: list[nn.Module] = [nn.Conv2d(config.in_channels, widths[0], kernel_size=3, padding=1), nn.GELU()]
        for width, wider in zip(widths[:-2], widths[1:-1], strict=True):
            layers += [nn.Conv2d(width, wider, kernel_size=4, stride=2, padding=1), nn.GELU()]
        self.convolutions = nn.Sequential(*layers)
        self.proj = nn.Conv2d(widths[-2], config.embed_dim, kernel_size=4, stride=2, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(self.convolutions(images)).flatten(2).transpose(1, 2)


class Dropout(nn.Module):
    """Dropout with a cheap mask on the CPU, where one Bernoulli draw an element is a quarter of a training step.

    Each element takes 16 of a random integer's 64 bits, so `share` is met to 1 / 65,536.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, values: Tensor) -> Tensor:
        if not self.training or self.share == 0.0:
            return values
        if values.device.type != "cpu" or torch.compiler.is_compiling():
            return F.dropout(values, self.share)
        dropped = min(round(self.share * 2**16), 2**16 - 1)
        # The comparison leaves 0 and 1 in place of the bits: by way of a boolean mask it takes four times as long.
        kept = random_bits(values.shape).ge_(dropped - 2**15).to(values.dtype)
        return values * kept.mul_(2**16 / (2**16 - dropped))


class ThreadsGenerator(threading.local):
    """NumPy's generator of a thread, where it has one of its own: PyTorch's takes twice as long."""

    own: np.random.SFC64 | None = None


GENERATOR = ThreadsGenerator()


@contextmanager
def random_numbers_from(seed: int) -> Iterator[None]:
    """Draw the dropout of this thread from a generator of its own, inside, whatever other threads draw."""
    GENERATOR.own = np.random.SFC64(seed)
    try:
        yield
    finally:
        GENERATOR.own = None


def random_bits(shape: torch.Size) -> Tensor:
    """Draw uniform int16 of a shape, from the thread's generator or from one that PyTorch's seeds."""
    generator = GENERATOR.own or np.random.SFC64(int(torch.randint(2**63 - 1, ())))
    words = generator.random_raw(-(-shape.numel() // 4))
    return torch.from_numpy(words.view(np.int16)[: shape.numel()]).view(shape)


class Attention(nn.Module):
    """Multi-head self-attention on the fused `scaled_dot_product_attention`."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.attention_dropout = config.attention_dropout
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)
        self.proj_drop = Dropout(config.dropout)

    def forward(self, tokens: Tensor, num_queries: int | None = None) -> Tensor:
        """[batch, token, embed] -> the same, or [batch, num_queries, embed] for the first tokens only."""
        if num_queries is None:
            query, key, value = self.split_heads(self.qkv(tokens), 3)
        else:
            weights = self.qkv.weight.split([tokens.shape[2], 2 * tokens.shape[2]])
            biases = self.qkv.bias.split([tokens.shape[2], 2 * tokens.shape[2]])
            (query,) = self.split_heads(F.linear(tokens[:, :num_queries], weights[0], biases[0]), 1)
            key, value = self.split_heads(F.linear(tokens, weights[1], biases[1]), 2)
        dropout = self.attention_dropout if self.training else 0.0
        mixed = attend(query, key, value, dropout)
        return self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))  # (B, T, embed)

    def split_heads(self, projected: Tensor, parts: int) -> tuple[Tensor, ...]:
        batch, length, width = projected.shape
        split = projected.view(batch, length, parts, self.num_heads, width // (parts * self.num_heads))
        return split.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, T, head_dim)


def attend(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """Compute the fused attention [batch, head, query, head_dim]; on the CPU at least in float32.

    There, its backward pass in bfloat16 takes ten times as long and would be most of a training step.
    """
    if query.device.type != "cpu" or query.dtype not in (torch.bfloat16, torch.float16):
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    with torch.autocast("cpu", enabled=False):
        mixed = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), dropout_p=dropout)
    return mixed.to(query.dtype)


class Mlp(nn.Module):
    """Two linear layers with a GELU between, applied to each token."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.embed_dim, config.mlp_dim)
        self.fc2 = nn.Linear(config.mlp_dim, config.embed_dim)
        self.drop1 = Dropout(config.dropout)
        self.drop2 = Dropout(config.dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(F.gelu(self.fc1(tokens)))))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.mlp = Mlp(config)

    def forward(self, tokens: Tensor, num_queries: int | None = None) -> Tensor:
        """[batch, token, embed] -> the same, or only the first `num_queries` tokens of it."""
        tokens = tokens[:, :num_queries] + self.attn(self.norm1(tokens), num_queries)
        return tokens + self.mlp(self.norm2(tokens))


class VisionTransformer(nn.Module):
    """Images [batch, channel, height, width] -> logits [batch, class].

    Give a ViTConfig, or its fields by keyword, or both: then the fields replace the config's. Raise UserError for
    fields that make no model.
    """

    __signature__ = inspect.signature(ViTConfig)  # of the keywords, for help() and completion

    def __init__(self, config: ViTConfig | None = None, **fields: Any) -> None:
        super().__init__()
        config = replace(config or ViTConfig(), **fields)
        self.config = config.to_dict()  # plain values: a checkpoint that holds them loads with weights_only
        self.pooling = config.pooling
        self.grid_size = config.grid_size
        self.num_prefix_tokens = config.num_prefix_tokens
        embed_dim = config.embed_dim

        self.patch_embed = PatchEmbedding(config) if config.stem == "patches" else ConvolutionalStem(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if config.pooling == "cls" else None
        self.pos_embed: Tensor | None = None
        if config.positional_embedding == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, config.num_tokens, embed_dim))
        elif config.positional_embedding == "sincos":
            table = sincos_positions(config.grid_size, embed_dim)
            prefix = torch.zeros(config.num_prefix_tokens, embed_dim)
            del self.pos_embed
            self.register_buffer("pos_embed", torch.cat([prefix, table])[None], persistent=False)
        self.pos_drop = Dropout(config.dropout)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.num_layers)))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, config.num_classes)
        self.apply(initialise)
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        if isinstance(self.pos_embed, nn.Parameter):
            # About as large as the projected patches: at the usual 0.02 the model is blind to positions, and the
            # first epoch goes into growing them.
            nn.init.trunc_normal_(self.pos_embed, std=0.5)

    @property
    def draws_by_thread(self) -> bool:
        """Whether `random_numbers_from` covers all random numbers: attention's dropout draws from PyTorch's."""
        return self.config["attention_dropout"] == 0.0

    def embed(self, images: Tensor) -> Tensor:
        """Embed images as tokens with positions: [batch, channel, height, width] -> [batch, token, embed]."""
        tokens = self.patch_embed(images)
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        if self.pos_embed is not None:
            tokens = tokens + self.pos_embed
        return self.pos_drop(tokens)

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.embed(images))

    def classify(self, tokens: Tensor) -> Tensor:
        """Map tokens, all or some (the class token first), to logits: [batch, token, embed] -> [batch, class]."""
        for block in self.blocks[:-1]:
            tokens = block(tokens)
        # Only the class token leaves the last block: while training, its other queries are not computed. In eval mode
        # they are, to be looked at.
        only_class_token = self.training and self.pooling == "cls"
        tokens = self.norm(self.blocks[-1](tokens, 1 if only_class_token else None))
        pooled = tokens[:, 0] if self.pooling == "cls" else tokens.mean(dim=1)
        return self.head(pooled)


def sincos_positions(grid: tuple[int, int], embed_dim: int) -> Tensor:
    """Return fixed two-dimensional sine-cosine positions (He et al., 2022, "MAE"): [patch, embed]."""
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(embed_dim // 4) / (embed_dim / 4))
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angles = [coordinate.flatten()[:, None] * frequencies for coordinate in (columns, rows)]
    return torch.cat([function(angle) for angle in angles for function in (torch.sin, torch.cos)], dim=1)


def initialise(module: nn.Module) -> None:
    """Draw Xavier uniform weights and zero biases, as in the ViT paper's code: they follow the width.

    The deviation of 0.02 that is common for widths of 768 learns far slower at 128.
    """
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
