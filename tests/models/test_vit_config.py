"""A configuration counts its model's parameters, and refuses sizes that make no model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.models.vit_config import ViTConfig
from attention_visualizer.support.errors import UserError

SIZES = ["img_size", "patch_size", "in_channels", "num_classes", "embed_dim", "num_heads", "num_layers", "mlp_dim"]

CONFIGURATIONS = st.fixed_dictionaries(
    {
        "img_size": st.sampled_from([8, 16, 24]),
        "patch_size": st.sampled_from([1, 2, 4, 8]),
        "in_channels": st.integers(1, 5),
        "num_classes": st.integers(1, 11),
        "embed_dim": st.sampled_from([4, 12, 20, 44]),
        "num_heads": st.sampled_from([1, 2, 4]),
        "num_layers": st.integers(1, 3),
        "mlp_dim": st.integers(1, 17),
        "positional_embedding": st.sampled_from(["learned", "sincos", "none"]),
        "pooling": st.sampled_from(["cls", "mean"]),
        "stem": st.sampled_from(["patches", "convolutions"]),
    }
)


@settings(max_examples=150, deadline=None)
@given(CONFIGURATIONS)
def test_parameters_are_counted_without_the_model(fields: dict[str, Any]) -> None:
    assume(fields["stem"] == "patches" or fields["patch_size"] > 1)
    config = ViTConfig(**fields)
    with torch.device("meta"):
        parameters = VisionTransformer(config).parameters()
    assert config.num_parameters == sum(parameter.numel() for parameter in parameters)


def test_the_default_model_has_the_seeds_number_of_parameters() -> None:
    assert ViTConfig().num_parameters == 805_130


def assert_refused(field: str, value: Any, **others: Any) -> str:
    with pytest.raises(UserError) as caught:
        ViTConfig(**{**others, field: value})
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"model.{field}=")
    return message


@pytest.mark.parametrize("field", SIZES)
@pytest.mark.parametrize("value", [0, -3, 7.0, math.nan, True, "7", None])
def test_a_size_is_a_whole_number_of_at_least_one(field: str, value: Any) -> None:
    assert repr(value) in assert_refused(field, value)


@pytest.mark.parametrize("field", ["dropout", "attention_dropout"])
@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, math.nan, math.inf, True, False, "0.1", None])
def test_a_dropout_is_a_share_below_one(field: str, value: Any) -> None:
    assert repr(value) in assert_refused(field, value)


@pytest.mark.parametrize(
    ("field", "choices"), [("positional_embedding", ["learned", "sincos", "none"]), ("pooling", ["cls", "mean"])]
)
@pytest.mark.parametrize("value", ["rope", "CLS", "", None, True, ["cls"]])
def test_a_choice_is_one_of_those_listed(field: str, choices: list[str], value: Any) -> None:
    message = assert_refused(field, value)
    assert all(choice in message for choice in choices)


def test_sizes_must_fit_together_and_the_message_lists_those_that_do() -> None:
    assert "1, 2, 4, 7, 14, 28" in assert_refused("patch_size", 5)
    assert "num_heads=3" in assert_refused("embed_dim", 32, num_heads=3)
    assert "4" in assert_refused("positional_embedding", "sincos", embed_dim=30, num_heads=3)
    ViTConfig(embed_dim=30, num_heads=3, num_layers=1)  # fine with learned positions


def test_a_convolutional_stem_needs_a_patch_that_is_a_power_of_two() -> None:
    for patch_size in (7, 1):
        with pytest.raises(UserError, match=rf"model\.patch_size={patch_size} must be 2, 4, 8"):
            ViTConfig(stem="convolutions", patch_size=patch_size)
    ViTConfig(stem="convolutions", patch_size=2, img_size=8)
