"""Control models: nothing that was learnt is left, and nothing else changes."""

from __future__ import annotations

import copy
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

from attention_visualizer.models.untrained import random_weights
from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.support.errors import UserError

# No two sizes are equal.
OURS: dict[str, Any] = {
    "img_size": 12,
    "patch_size": 4,
    "embed_dim": 14,
    "num_heads": 2,
    "num_layers": 3,
    "mlp_dim": 19,
    "num_classes": 5,
    "dropout": 0.1,
}


def own(**changes: Any) -> nn.Module:
    return VisionTransformer(**OURS | changes)


def of_timm() -> nn.Module:
    sizes: dict[str, Any] = {"img_size": 12, "patch_size": 4, "in_chans": 1, "embed_dim": 14, "depth": 2}
    return timm.create_model("vit_tiny_patch16_224", num_heads=2, num_classes=5, init_values=0.1, **sizes)


def of_torchvision() -> nn.Module:
    return torchvision.models.VisionTransformer(12, 4, 2, 2, 14, 19, num_classes=5)


def swin() -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=16, window_size=2, embed_dim=6, depths=(2, 1), num_heads=(2, 3)
    )


class Plain(nn.Module):
    """Another's model with parameters of its own, a convolution, normalisation with statistics, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Sequential(nn.Conv2d(1, 14, 4, 4), nn.BatchNorm2d(14))
        self.class_token = nn.Parameter(torch.zeros(1, 1, 14))
        self.positions = nn.Parameter(torch.zeros(1, 10, 14))
        self.attention = nn.MultiheadAttention(14, 2, dropout=0.3, batch_first=True)
        self.head = nn.Linear(14, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], dim=1) + self.positions
        return self.head(self.attention(tokens, tokens, tokens)[0][:, 0])


MAKERS = {"own": own, "timm": of_timm, "torchvision": of_torchvision, "swin": swin, "plain": Plain}
CHANNELS = {"torchvision": 3, "swin": 3}


@cache
def trained(name: str) -> nn.Module:
    """As if trained: every number is another one, far from where initialisation puts it. In train mode, on purpose."""
    torch.manual_seed(3)
    model = MAKERS[name]()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) * 2 + 5)
    return model.train()


def images(name: str) -> torch.Tensor:
    size = 16 if name == "swin" else 12
    return torch.randn(4, CHANNELS.get(name, 1), size, size, generator=torch.Generator().manual_seed(0))


each_model = pytest.mark.parametrize("name", MAKERS)


@each_model
def test_no_weight_is_left(name: str) -> None:
    model = trained(name)
    fresh = random_weights(model, 0)
    theirs, ours = dict(model.named_parameters()), dict(fresh.named_parameters())
    assert theirs.keys() == ours.keys()
    for parameter, value in ours.items():
        assert value.shape == theirs[parameter].shape
        share_left = (value == theirs[parameter]).float().mean().item()
        assert share_left < 0.5 if value.numel() > 1 else True, parameter
    # All that has a way to be initialised is near 0 or 1, not between 5 and 7; the rest is shuffled.
    layers = [module for module in fresh.modules() if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm)]
    assert layers and all(module.weight.abs().max() <= 2 for module in layers)


@each_model
def test_the_same_seed_gives_the_same_weights_and_another_gives_others(name: str) -> None:
    first, again, other = (random_weights(trained(name), seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    matrices = [key for key, value in first.items() if value.ndim >= 2 and value.is_floating_point()]
    assert len(matrices) >= 4
    for key in matrices:
        constant = first[key].unique().numel() == 1
        assert constant or not torch.equal(first[key], other[key]), key


@each_model
def test_what_the_trained_weights_were_does_not_matter_where_there_is_an_initialisation(name: str) -> None:
    model = trained(name)
    halved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in halved.parameters():
            parameter.mul_(0.5)
    linear = {key for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    fresh, of_halved = (dict(random_weights(each, 4).named_modules()) for each in (model, halved))
    assert linear
    for key in linear:
        assert torch.equal(fresh[key].weight, of_halved[key].weight)


@each_model
def test_the_model_and_the_global_random_state_stay_as_they_are(name: str) -> None:
    model = trained(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(11)
    np.random.seed(11)
    state, of_numpy = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    fresh = random_weights(model, 0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (np.random.get_state()[1] == of_numpy).all()  # type: ignore[index]
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    own_memory = {value.data_ptr() for value in model.state_dict().values()}
    assert own_memory.isdisjoint(value.data_ptr() for value in fresh.state_dict().values())


@each_model
def test_no_gpu_is_seeded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of a GPU's generator would not be put back."""
    model, seeded = trained(name), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    random_weights(model, 0)
    assert not seeded
    torch.manual_seed(0)
    assert seeded == [0]  # so a seed would have been noticed


@each_model
def test_controls_answer_in_eval_mode(name: str) -> None:
    fresh = random_weights(trained(name), 0)
    assert not any(module.training for module in fresh.modules())
    with torch.no_grad():
        first, second = fresh(images(name)), fresh(images(name))
    assert torch.equal(first, second) and first.isfinite().all() and first.std() > 0


def test_our_own_is_the_model_before_its_training() -> None:
    model = trained("own")
    with torch.random.fork_rng():
        torch.manual_seed(9)
        expected = own()
    fresh = random_weights(model, 9)
    assert isinstance(fresh, VisionTransformer) and fresh.config == model.config
    for key, value in expected.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value)


@pytest.mark.parametrize("name", ["timm", "torchvision", "plain"])
def test_class_token_and_positions_are_shuffled(name: str) -> None:
    """They have no initialisation that is known, so their numbers stay and only their places change."""
    model, shuffled = trained(name), 0
    fresh = dict(random_weights(model, 0).named_parameters())
    for key, value in model.named_parameters():
        if key.split(".")[-1] in ("cls_token", "class_token", "pos_embed", "pos_embedding", "positions"):
            assert torch.equal(fresh[key].flatten().sort().values, value.flatten().sort().values), key
            assert not torch.equal(fresh[key], value), key
            shuffled += 1
    assert shuffled == 2


def test_statistics_of_normalisation_are_forgotten() -> None:
    normalisation = random_weights(trained("plain"), 0).patches[1]  # type: ignore[index]
    assert normalisation.running_mean.eq(0).all() and normalisation.running_var.eq(1).all()


def test_attention_of_pytorchs_own_module_is_initialised() -> None:
    attention = random_weights(trained("plain"), 0).attention
    assert attention.in_proj_weight.abs().max() < 1 and attention.out_proj.weight.abs().max() < 1  # type: ignore
    assert attention.in_proj_bias.eq(0).all()  # type: ignore[union-attr]


def test_frozen_models_have_controls_too() -> None:
    model = copy.deepcopy(trained("timm")).requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh = random_weights(model, 0)
    assert all(
        not torch.equal(value, dict(model.named_parameters())[key])
        for key, value in fresh.named_parameters()
        if value.ndim > 1
    )


# --- weights in other places than a module's own parameters ---


class Extra(nn.Linear):
    """A linear map with a learnt part of its own beside weight and bias."""

    def __init__(self) -> None:
        super().__init__(6, 4)
        self.more = nn.Parameter(torch.randn(4, 6))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images) + nn.functional.linear(images, self.more)


class Asking(Extra):
    """Its reset asks for a number, and does the half of it."""

    def reset_parameters(self, bound: float | None = None) -> None:
        if hasattr(self, "more") and bound is None:
            raise TypeError
        super().reset_parameters()


class WholeNumbers(nn.Module):
    """A quantised linear map: whole numbers and a scale, in buffers; and a table, in which nothing was learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-9, 9, (4, 6), dtype=torch.int8))
        self.register_buffer("table", torch.arange(6.0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(images + self.table, self.weight.float())  # type: ignore[operator]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gains = nn.Parameter(torch.tensor([2.0, 3.0]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([images[:, :2] * self.gains, images[:, 2:4]], dim=1)


PLACES: dict[str, Any] = {
    "weight norm": lambda: nn.utils.weight_norm(nn.Linear(6, 4)),  # type: ignore[no-untyped-call]
    "parametrized weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)),
    "spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(6, 4)),
    "parametrized spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4)),
    "orthogonal": lambda: nn.utils.parametrizations.orthogonal(nn.Linear(6, 4)),
    "another parameter": Extra,
    "a reset that asks": Asking,
    "buffers": WholeNumbers,
    "two numbers": Pair,
}


class Keeping(nn.Module):
    """Keeps what it computed, in attributes and containers, as models do that are looked into."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), head
        self.kept: dict[str, Any] = {"list": []}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.last = self.body(images)
        self.kept["list"].append(self.last.relu())
        return self.head(self.last)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", PLACES)
def test_no_learnt_matrix_is_left_wherever_it_is_kept(place: str) -> None:
    torch.manual_seed(4)
    model = Keeping(PLACES[place]()).eval()
    model(torch.randn(3, 6))
    for seed in range(3):
        control = random_weights(model, seed)
        ours, theirs = (dict(each.named_parameters()) for each in (control, model))
        assert not [name for name, value in ours.items() if torch.equal(value, theirs[name])]
        effective, learnt = (
            torch.as_tensor(getattr(each.head, "weight", each.body.weight)) for each in (control, model)
        )
        assert not torch.equal(effective, learnt) and control.last.shape == (3, 6) and not control.last.requires_grad
        if "spectral" in place:
            with torch.no_grad():
                control(torch.randn(3, 6))
            assert torch.linalg.matrix_norm(control.head.weight.detach(), 2).item() == pytest.approx(1, abs=0.05)  # type: ignore
        if place == "buffers":
            assert torch.equal(control.head.table, model.head.table)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")
def test_a_model_whose_weights_cannot_be_made_random_is_refused() -> None:
    packed = torch.ao.quantization.quantize_dynamic(Keeping(nn.Linear(6, 4)), {nn.Linear}, torch.qint8)
    packed.register_parameter("scale", nn.Parameter(torch.ones(2)))
    with pytest.raises(UserError, match="the weights of Linear are packed, so the model has no control models"):
        random_weights(packed, 0)
    locked = Keeping(nn.Linear(6, 4))
    locked.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(UserError, match="Keeping cannot be copied, so it has no control models: cannot pickle"):
        random_weights(locked, 0)


def test_controls_made_at_the_same_time_are_those_made_one_after_the_other() -> None:
    model = own(embed_dim=98, num_layers=5)  # large enough that they overlap
    seeds = range(8)
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda seed: random_weights(model, seed), seeds))
    for seed, control in zip(seeds, together, strict=True):
        alone = random_weights(model, seed).state_dict()
        assert all(torch.equal(value, alone[name]) for name, value in control.state_dict().items())
