"""The Vision Transformer (Dosovitskiy et al., 2021), pre-norm, in one file.

Parameter names are timm's, so weights move between the two without renaming.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_visualizer.support.errors import UserError

PositionalEmbedding = Literal["learned", "sincos", "none"]
Pooling = Literal["cls", "mean"]
Stem = Literal["patches", "convolutions"]

MAX_DIMENSION = 1_000_000  # of any of the model's numbers: far beyond what trains, and soon found out
LARGEST_SIZES = {"num_layers": 1_000}


class PatchEmbedding(nn.Module):
    """Cuts the image into patches and projects each: [batch, channel, height, width] -> [batch, patch, embed]."""

    def __init__(self, in_channels: int, embed_dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.proj = nn.Conv2d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size)

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

    def __init__(self, in_channels: int, embed_dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        halvings = patch_size.bit_length() - 1
        widths = [max(1, embed_dim >> (halvings - step)) for step in range(halvings + 1)]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], kernel_size=3, padding=1), nn.GELU()]
        for width, wider in zip(widths[:-2], widths[1:-1], strict=True):
            layers += [nn.Conv2d(width, wider, kernel_size=4, stride=2, padding=1), nn.GELU()]
        self.convolutions = nn.Sequential(*layers)
        self.proj = nn.Conv2d(widths[-2], embed_dim, kernel_size=4, stride=2, padding=1)

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
        if values.device.type != "cpu":
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
    """Dropout of this thread draws from a generator of its own, whatever other threads draw."""
    GENERATOR.own = np.random.SFC64(seed)
    try:
        yield
    finally:
        GENERATOR.own = None


@torch.compiler.disable  # the generator is NumPy's
def random_bits(shape: torch.Size) -> Tensor:
    """Uniform int16 of a shape, from the thread's generator or from one that PyTorch's seeds."""
    generator = GENERATOR.own or np.random.SFC64(int(torch.randint(2**63 - 1, ())))
    words = generator.random_raw(-(-shape.numel() // 4))
    return torch.from_numpy(words.view(np.int16)[: shape.numel()]).view(shape)


class Attention(nn.Module):
    """Multi-head self-attention on the fused `scaled_dot_product_attention`."""

    def __init__(self, embed_dim: int, num_heads: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = Dropout(dropout)

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
    """The fused attention [batch, head, query, head_dim]; on the CPU at least in float32.

    There, its backward pass in bfloat16 takes ten times as long and would be most of a training step.
    """
    if query.device.type != "cpu" or query.dtype not in (torch.bfloat16, torch.float16):
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    with torch.autocast("cpu", enabled=False):
        mixed = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), dropout_p=dropout)
    return mixed.to(query.dtype)


class Mlp(nn.Module):
    """Two linear layers with a GELU between, applied to each token."""

    def __init__(self, embed_dim: int, mlp_dim: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, mlp_dim)
        self.fc2 = nn.Linear(mlp_dim, embed_dim)
        self.drop1 = Dropout(dropout)
        self.drop2 = Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(F.gelu(self.fc1(tokens)))))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, embed_dim: int, num_heads: int, mlp_dim: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.attn = Attention(embed_dim, num_heads, dropout, attention_dropout)
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.mlp = Mlp(embed_dim, mlp_dim, dropout)

    def forward(self, tokens: Tensor, num_queries: int | None = None) -> Tensor:
        """[batch, token, embed] -> the same, or only the first `num_queries` tokens of it."""
        tokens = tokens[:, :num_queries] + self.attn(self.norm1(tokens), num_queries)
        return tokens + self.mlp(self.norm2(tokens))


class VisionTransformer(nn.Module):
    """Images [batch, channel, height, width] -> logits [batch, class].

    img_size and patch_size are pixels of a square; `stem` says how patches become tokens; `pooling="cls"` prepends a
    class token and classifies from it, "mean" has none and classifies from the mean patch. `dropout` sits after the
    embedding, after the attention projection and in the MLP; `attention_dropout` drops attention weights.
    Raises UserError for sizes that do not fit together.
    """

    def __init__(
        self,
        img_size: int = 28,
        patch_size: int = 7,
        in_channels: int = 1,
        num_classes: int = 10,
        embed_dim: int = 128,
        num_heads: int = 4,
        num_layers: int = 6,
        mlp_dim: int = 256,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        positional_embedding: PositionalEmbedding = "learned",
        pooling: Pooling = "cls",
        stem: Stem = "patches",
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "img_size": img_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "num_classes": num_classes,
            "embed_dim": embed_dim,
            "num_heads": num_heads,
            "num_layers": num_layers,
            "mlp_dim": mlp_dim,
            "dropout": dropout,
            "attention_dropout": attention_dropout,
            "positional_embedding": positional_embedding,
            "pooling": pooling,
            "stem": stem,
        }
        validate_model_config(self.config)
        self.pooling = pooling
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_prefix_tokens = 1 if pooling == "cls" else 0
        num_tokens = self.num_prefix_tokens + self.grid_size[0] * self.grid_size[1]

        embedding = PatchEmbedding if stem == "patches" else ConvolutionalStem
        self.patch_embed = embedding(in_channels, embed_dim, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if pooling == "cls" else None
        self.pos_embed: Tensor | None = None
        if positional_embedding == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, embed_dim))
        elif positional_embedding == "sincos":
            table = sincos_positions(self.grid_size, embed_dim)
            prefix = torch.zeros(self.num_prefix_tokens, embed_dim)
            del self.pos_embed
            self.register_buffer("pos_embed", torch.cat([prefix, table])[None], persistent=False)
        self.pos_drop = Dropout(dropout)
        self.blocks = nn.Sequential(
            *(Block(embed_dim, num_heads, mlp_dim, dropout, attention_dropout) for _ in range(num_layers))
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)
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
        """Images to tokens with positions: [batch, channel, height, width] -> [batch, token, embed]."""
        tokens = self.patch_embed(images)
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        if self.pos_embed is not None:
            tokens = tokens + self.pos_embed
        return self.pos_drop(tokens)

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.embed(images))

    def classify(self, tokens: Tensor) -> Tensor:
        """Tokens, all or some of them (the class token first), to logits: [batch, token, embed] -> [batch, class]."""
        for block in self.blocks[:-1]:
            tokens = block(tokens)
        # Only the class token leaves the last block: while training, its other queries are not computed. In eval mode
        # they are, to be looked at.
        only_class_token = self.training and self.pooling == "cls"
        tokens = self.norm(self.blocks[-1](tokens, 1 if only_class_token else None))
        pooled = tokens[:, 0] if self.pooling == "cls" else tokens.mean(dim=1)
        return self.head(pooled)


def validate_model_config(config: dict[str, Any]) -> None:
    """Raises UserError, naming the field, for a value or a combination that makes no model."""
    sizes = "img_size patch_size in_channels num_classes embed_dim num_heads num_layers mlp_dim".split()
    for name in sizes:
        value = config[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"model.{name}={value!r}: give a whole number of at least 1")
        if value > LARGEST_SIZES.get(name, MAX_DIMENSION):
            raise UserError(f"model.{name}={value}: give at most {LARGEST_SIZES.get(name, MAX_DIMENSION)}")
    for name in ("dropout", "attention_dropout"):
        value = config[name]
        # NaN fails both comparisons.
        if isinstance(value, bool) or not (isinstance(value, int | float) and 0.0 <= value < 1.0):
            raise UserError(f"model.{name}={value!r}: give a share from 0 up to, but not, 1")
    for name, choices in (("positional_embedding", PositionalEmbedding), ("pooling", Pooling), ("stem", Stem)):
        if config[name] not in get_args(choices):
            raise UserError(f"model.{name}={config[name]!r}: choose one of {', '.join(get_args(choices))}")
    if config["img_size"] % config["patch_size"]:
        raise UserError(
            f"model.patch_size={config['patch_size']} does not divide img_size={config['img_size']}: "
            f"choose a divisor ({', '.join(str(d) for d in divisors(config['img_size']))})"
        )
    if config["stem"] == "convolutions" and (config["patch_size"] == 1 or config["patch_size"].bit_count() != 1):
        raise UserError(
            f"model.stem=convolutions halves the image again and again: model.patch_size={config['patch_size']} must "
            "be 2, 4, 8 or another power of two"
        )
    if config["embed_dim"] % config["num_heads"]:
        raise UserError(
            f"model.embed_dim={config['embed_dim']} is not divisible by num_heads={config['num_heads']}: "
            f"choose num_heads from {', '.join(str(d) for d in divisors(config['embed_dim']))}"
        )
    if config["positional_embedding"] == "sincos" and config["embed_dim"] % 4:
        raise UserError(
            f"model.positional_embedding=sincos needs an embed_dim divisible by 4, not {config['embed_dim']}"
        )


def num_parameters(config: dict[str, Any]) -> int:
    """Of a VisionTransformer with these arguments, without making one."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in VisionTransformer(**config).parameters())


def divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def sincos_positions(grid: tuple[int, int], embed_dim: int) -> Tensor:
    """Fixed two-dimensional sine-cosine positions (He et al., 2022, "MAE"): [patch, embed]."""
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(embed_dim // 4) / (embed_dim / 4))
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angles = [coordinate.flatten()[:, None] * frequencies for coordinate in (columns, rows)]
    return torch.cat([function(angle) for angle in angles for function in (torch.sin, torch.cos)], dim=1)


def initialise(module: nn.Module) -> None:
    """Xavier uniform weights and zero biases, as in the ViT paper's code: they follow the width.

    The deviation of 0.02 that is common for widths of 768 learns far slower at 128.
    """
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
