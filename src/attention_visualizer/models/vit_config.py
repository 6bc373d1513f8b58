"""The fields of a VisionTransformer: their types, defaults and bounds, and what follows from them by arithmetic."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_type_hints

from attention_visualizer.support.errors import UserError
from attention_visualizer.support.field_types import SHARE, at_least, at_most, check_fields

PositionalEmbedding = Literal["learned", "sincos", "none"]
Pooling = Literal["cls", "mean"]
Stem = Literal["patches", "convolutions"]

MAX_DIMENSION = 1_000_000  # sanity bound on every whole number, far beyond what trains
MAX_LAYERS = 1_000


@dataclass(frozen=True)
class ViTConfig:
    """The checked fields of a model. Raise UserError, naming the field, for what makes none."""

    img_size: int = 28  # pixels of a square
    patch_size: int = 7  # pixels of a square
    in_channels: int = 1
    num_classes: int = 10
    embed_dim: int = 128
    num_heads: int = 4
    num_layers: int = 6
    mlp_dim: int = 256
    dropout: float = 0.0  # after the embedding, after the attention projection and in the MLP
    attention_dropout: float = 0.0  # of attention weights
    positional_embedding: PositionalEmbedding = "learned"
    pooling: Pooling = "cls"  # cls: prepend a class token and classify from it; mean: classify from the mean patch
    stem: Stem = "patches"  # how patches become tokens

    def __post_init__(self) -> None:
        hints = {name: bounded(name, hint) for name, hint in get_type_hints(type(self)).items()}
        check_fields("model", vars(self), hints)
        check_combinations(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, as a checkpoint holds them."""
        return dataclasses.asdict(self)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.img_size // self.patch_size, self.img_size // self.patch_size

    @property
    def num_prefix_tokens(self) -> int:
        return 1 if self.pooling == "cls" else 0

    @property
    def num_tokens(self) -> int:
        rows, columns = self.grid_size
        return self.num_prefix_tokens + rows * columns

    @property
    def stem_widths(self) -> list[int]:
        """Channels after each convolution of the stem: doubled each time, the embedding's width at the end."""
        halvings = self.patch_size.bit_length() - 1
        return [max(1, self.embed_dim >> (halvings - step)) for step in range(halvings + 1)]

    @property
    def num_parameters(self) -> int:
        """The number of trained parameters, without making the model."""
        width = self.embed_dim
        norm = 2 * width
        attention = linear(width, 3 * width) + linear(width, width)
        block = 2 * norm + attention + linear(width, self.mlp_dim) + linear(self.mlp_dim, width)
        total = self.num_layers * block + norm + linear(width, self.num_classes) + self.num_prefix_tokens * width
        if self.positional_embedding == "learned":
            total += self.num_tokens * width
        if self.stem == "patches":
            return total + linear(self.in_channels * self.patch_size**2, width)
        first, *wider = self.stem_widths
        total += linear(self.in_channels * 3 * 3, first)
        for inputs, outputs in zip([first, *wider], wider, strict=False):
            total += linear(inputs * 4 * 4, outputs)
        return total


def linear(inputs: int, outputs: int) -> int:
    """Return the number of weights and biases of a linear map."""
    return (inputs + 1) * outputs


def bounded(name: str, hint: Any) -> Any:
    """Add the bounds of a field to its type."""
    if hint is int:
        return Annotated[int, at_least(1), at_most(MAX_LAYERS if name == "num_layers" else MAX_DIMENSION)]
    if hint is float:
        return Annotated[float, SHARE]
    return Annotated[hint, f"choose one of {', '.join(get_args(hint))}"]


def check_combinations(config: ViTConfig) -> None:
    """Raise UserError for values that do not fit together."""
    if config.img_size % config.patch_size:
        raise UserError(
            f"model.patch_size={config.patch_size} does not divide img_size={config.img_size}: "
            f"choose a divisor ({', '.join(str(d) for d in divisors(config.img_size))})"
        )
    if config.stem == "convolutions" and (config.patch_size == 1 or config.patch_size.bit_count() != 1):
        raise UserError(
            f"model.stem=convolutions halves the image again and again: model.patch_size={config.patch_size} must "
            "be 2, 4, 8 or another power of two"
        )
    if config.embed_dim % config.num_heads:
        raise UserError(
            f"model.embed_dim={config.embed_dim} is not divisible by num_heads={config.num_heads}: "
            f"choose num_heads from {', '.join(str(d) for d in divisors(config.embed_dim))}"
        )
    if config.positional_embedding == "sincos" and config.embed_dim % 4:
        raise UserError(f"model.positional_embedding=sincos needs an embed_dim divisible by 4, not {config.embed_dim}")


def divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
