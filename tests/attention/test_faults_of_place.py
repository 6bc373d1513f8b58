"""Kinds of models whose maps were drawn at wrong places, or as layers that they are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_visualizer import measures
from attention_visualizer.attention.capture import AttentionLayer, capture
from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.attention.undisturbed import undisturbed
from attention_visualizer.measures.explanations import explain
from attention_visualizer.measures.observation import observe
from attention_visualizer.support.errors import UserError

WIDTH, HEADS = 24, 3


def images(*size: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def layers_of(call: Callable[..., Any], *inputs: Any, model: nn.Module, **options: Any) -> list[AttentionLayer]:
    with torch.no_grad(), capture(model.eval(), **options) as attention:
        call(*inputs)
    return list(attention)


def attended(qkv: Tensor) -> Tensor:
    q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        return attended(self.qkv(tokens))


class Small(nn.Module):
    """A class token, 16 x 16 patches and two blocks of a kind."""

    def __init__(self, kind: Callable[[], nn.Module] = Layer) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cut = nn.Conv2d(3, WIDTH, 16, 16)
        self.first = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.blocks = nn.ModuleList(kind() for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)
        with torch.no_grad():
            for parameter in self.blocks.parameters():
                parameter.mul_(3)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.cut(x).flatten(2).mT
        x = torch.cat([self.first.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = x + block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x)[:, 0])


# --- how the model is called -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 32), (32, 64), (16, 128)])
@pytest.mark.parametrize("method", ["__call__", "forward", "forward_features", "get_intermediate_layers"])
def test_the_images_of_any_method_are_found(size: tuple[int, int], method: str) -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=WIDTH, depth=1, num_heads=HEADS, dynamic_img_size=True
    )
    (layer,) = layers_of(getattr(model, method), images(*size), model=model)
    assert layer.geometry == Geometry((size[0] // 16, size[1] // 16), 1, (16, 16))


def test_of_two_passes_in_other_ways_each_has_its_own_places() -> None:
    model = Small().eval()
    with torch.no_grad(), capture(model) as attention:
        model(images(32, 64))
        model.forward_features(images(64, 32))
    assert [layer.geometry for layer in attention] == [Geometry((4, 2), 1, (16, 16))] * 2


def test_bytes_are_images_too() -> None:
    class Bytes(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float() / 255)

    pixels = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    model = Bytes()
    assert layers_of(model, pixels, model=model)[0].geometry == Geometry((2, 3), 1, (16, 16))


@pytest.mark.parametrize(("size", "kernel"), [((16, 128), (16, 32)), ((128, 16), (48, 16)), ((160, 160), (48, 16))])
def test_patches_that_overlap_by_far_are_drawn_where_they_are_seen(
    size: tuple[int, int], kernel: tuple[int, int]
) -> None:
    """Each sees several times what it would alone, and so much more than the number of patches tells."""
    model = Small()
    beside = tuple((side - 16) // 2 for side in kernel)
    model.cut = nn.Conv2d(3, WIDTH, kernel, 16, padding=beside)
    layers = layers_of(model, images(*size), model=model)
    assert [layer.geometry for layer in layers] == [Geometry((size[0] // 16, size[1] // 16), 1, (16, 16))] * 2


# --- several inputs ----------------------------------------------------------------------------------------------


class OfTwo(Small):
    """Attends over the first image's patches and the second's, or over one of them alone."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.which = which

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        parts = {"one": self.cut(one).flatten(2).mT, "other": self.cut(other).flatten(2).mT}
        tokens = torch.cat(list(parts.values()), dim=1) if self.which == "both" else parts[self.which]
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return tokens.mean(dim=1) + parts["one"].mean(dim=1)


@pytest.mark.parametrize(("which", "grid"), [("one", (2, 4)), ("other", (4, 1))])
def test_the_image_is_the_one_that_keys_answer_to(which: str, grid: tuple[int, int]) -> None:
    model = OfTwo(which)
    layers = layers_of(model, images(32, 64), images(64, 16), model=model)
    assert [layer.geometry for layer in layers] == [Geometry(grid, 0, (16, 16))] * 2


def test_keys_of_two_images_have_no_place_unless_it_is_given() -> None:
    model, pair = OfTwo("both"), (images(32, 64), images(64, 16))
    layers = layers_of(model, *pair, model=model)
    assert all("answer to several of the model's inputs" in str(layer.unplaced) for layer in layers)
    given = Geometry((4, 1), 8, (16, 16))
    for layer in layers_of(model, *pair, model=model, geometry=given):
        assert layer.geometry == given and layer.geometry.evidence == "given and confirmed"


def test_an_additive_mask_is_no_image() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.qkv = nn.Embedding(31, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)

        def attend(self, tokens: Tensor, mask: Tensor) -> Tensor:
            q, k, v = self.qkv(tokens).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v, mask)

        def forward(self, words: Tensor) -> Tensor:
            return self.inner(self.words(words), torch.zeros(len(words), 1, words.shape[1], words.shape[1]))

    class Inner(nn.Module):
        def __init__(self, attend: Callable[[Tensor, Tensor], Tensor]) -> None:
            super().__init__()
            self.attend = attend

        def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
            return self.attend(tokens, mask)

    model = Words()
    model.inner = Inner(model.attend)
    (layer,) = layers_of(model, torch.arange(16).expand(2, 16), model=model)
    assert layer.geometry is None


# --- what the model does to its images ---------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [False, True])
def test_mirrored_images_are_drawn_where_they_are_seen(columns: bool) -> None:
    class Mirrored(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flip(3 if columns else 2))

    model = Mirrored()
    geometry = layers_of(model, images(32, 48), model=model)[0].geometry
    order = [[3, 2, 1, 6, 5, 4], [4, 5, 6, 1, 2, 3]][not columns]
    assert geometry == Geometry((2, 3), 1, (16, 16), order=tuple(order))


def test_quarters_through_one_model_have_no_place_on_the_whole() -> None:
    class Quarters(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = Small()

        def forward(self, x: Tensor) -> Tensor:
            return sum(self.vit(x[..., r : r + 32, c : c + 32]) for r in (0, 32) for c in (0, 32))

    with pytest.raises(UserError, match=r"patches cover rows 0 to 32 of the image's 64"):
        observe(Quarters().eval(), images(64, 64))


def test_a_geometry_is_not_given_to_a_model_that_crops() -> None:
    model = nn.Sequential(Cropped(), Small())
    with pytest.raises(UserError, match="measured on 1.blocks.0 its patches cover rows 16 to 48 of the image's 64"):
        layers_of(model, images(64, 64), model=model, geometry=Geometry((2, 2), 1, (32, 32)))


class Cropped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., 16:48, 16:48]


class Planted(nn.Module):
    """Its values are its own, not the image's: there is nothing to measure."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.randn(1, HEADS, 4, 8))

    def forward(self, x: Tensor) -> Tensor:
        values = self.values.expand(len(x), -1, -1, -1)
        return F.scaled_dot_product_attention(values, values, values)


def test_a_geometry_that_cannot_be_confirmed_must_fit_the_image() -> None:
    model = Planted()
    (layer,) = layers_of(model, images(32, 32), model=model, geometry=Geometry((2, 2), 0, (16, 16)))
    assert layer.geometry is not None and layer.geometry.evidence.startswith("given, not confirmed: its keys answer")
    with pytest.raises(UserError, match="2 x 2 patches of 8 x 8 pixels, but the images have 32 x 32"):
        layers_of(model, images(32, 32), model=model, geometry=Geometry((2, 2), 0, (8, 8)))


class Padding(Small):
    """Pads its images to whole patches."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, -x.shape[3] % 16, 0, -x.shape[2] % 16)))


def test_maps_of_padded_images_are_drawn_where_they_are_seen() -> None:
    look = observe(Padding().eval(), images(24, 32))
    assert look.geometries[0] == Geometry((2, 2), 1, (16, 16)) and look.head_maps.shape[-2:] == (3, 2)
    assert (look.head_maps[..., 0, :] == look.head_maps[..., 1, :]).all()  # 16 rows of pixels, and the 8 that are left
    with pytest.raises(UserError, match=r"query=\[1,1\]: layers have other grids"):
        observe(Padding().eval(), images(24, 32), query=(1, 1))


# --- whose attention it is ---------------------------------------------------------------------------------------


class OneHead(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(WIDTH, size), nn.Linear(WIDTH, size), nn.Linear(WIDTH, size)

    def forward(self, tokens: Tensor) -> Tensor:
        scores = self.query(tokens) @ self.key(tokens).mT / self.query.out_features**0.5
        return scores.softmax(dim=-1) @ self.value(tokens)


class HeadModules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(OneHead(WIDTH // HEADS) for _ in range(HEADS))

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.cat([head(tokens) for head in self.heads], dim=-1)


class ImageByImage(HeadModules):
    def forward(self, tokens: Tensor) -> Tensor:
        return torch.stack([super(ImageByImage, self).forward(image) for image in tokens])


class HeadLoop(Layer):
    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(tokens).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        heads = [(q[:, i] @ k[:, i].mT * q.shape[-1] ** -0.5).softmax(dim=-1) @ v[:, i] for i in range(HEADS)]
        return torch.cat(heads, dim=-1)


class QueryChunks(Layer):
    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(tokens).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        parts = [F.scaled_dot_product_attention(part, k, v) for part in q.split(5, dim=2)]
        return torch.cat(parts, dim=2).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("kind", "one_by_one"), [(Layer, HeadLoop), (Layer, QueryChunks)])
def test_heads_and_queries_one_by_one_are_one_layer(kind: type[nn.Module], one_by_one: type[nn.Module]) -> None:
    together, apart = Small(kind).eval(), Small(one_by_one).eval()
    apart.load_state_dict(together.state_dict())
    expected = layers_of(together, images(64, 64), model=together)
    found = layers_of(apart, images(64, 64), model=apart)
    assert [layer.name for layer in found] == ["blocks.0", "blocks.1"]
    for layer, other in zip(found, expected, strict=True):
        torch.testing.assert_close(layer.weights, other.weights)
        torch.testing.assert_close(layer.values, other.values)
        assert layer.geometry == other.geometry == Geometry((4, 4), 1, (16, 16))
    for one, other in ((observe(together, images(64, 64)), observe(apart, images(64, 64))),):
        assert one.rollouts is not None and other.rollouts is not None
        assert abs(one.rollouts - other.rollouts).max() < 1e-5
    maps, others = (explain(model, images(64, 64)).maps for model in (together, apart))
    for method in ("rollout", "relevance", "gradient x attention"):
        assert abs(maps[method] - others[method]).max() < 1e-4 * abs(maps[method]).max(), method


def test_heads_that_are_modules_are_one_layer() -> None:
    model = Small(HeadModules)
    layers = layers_of(model, images(64, 64), model=model)
    assert [(layer.name, layer.weights.shape[1]) for layer in layers] == [("blocks.0.heads", 3), ("blocks.1.heads", 3)]
    rollouts = observe(model, images(64, 64)).rollouts
    right = measures.attention_rollout(layer.weights for layer in layers)[:, 0, 1:].unflatten(1, (4, 4))
    assert rollouts is not None and abs(rollouts[:, -1] - right.numpy()).max() < 1e-6


def test_branches_of_other_tokens_side_by_side_have_no_rollout() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.coarse, self.fine = Small(), Small()

        def forward(self, x: Tensor) -> Tensor:
            return self.coarse(x) + self.fine(x)

    model = Branches().eval()
    layers = layers_of(model, images(64, 64), model=model)
    assert [layer.in_sequence for layer in layers] == [True, True, False, True]
    assert observe(model, images(64, 64)).rollouts is None
    assert "relevance" not in explain(model, images(64, 64)).maps


def test_images_one_by_one_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="images are computed one by one, in a loop"):
        observe(Small(ImageByImage).eval(), images(64, 64, count=4))


# --- measuring leaves the model as it was ------------------------------------------------------------------------


class Remembering(Small):
    """Its forward keeps things of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.calls, self.seen, self.by_name = 0, [torch.zeros(2)], {"last": 0.0}
        self.generator = torch.Generator().manual_seed(3)
        self.norm = nn.BatchNorm1d(3)

    def train(self, mode: bool = True) -> Remembering:
        self.switched = getattr(self, "switched", 0) + 1
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.calls += 1
        self.mean.lerp_(out.detach().mean(0), 0.1)
        self.seen.append(out)
        self.seen[0] += 1
        self.by_name["last"] = float(out.detach().sum())
        self.extra = torch.randn(3) + torch.randn(3, generator=self.generator)
        return self.norm(out) + self.extra


def state(model: Remembering) -> list[Any]:
    return [
        *(tensor.clone() for tensor in (*model.state_dict().values(), model.seen[0], model.generator.get_state())),
        *(torch.tensor(number) for number in (model.calls, len(model.seen), model.by_name["last"], model.switched)),
        torch.get_rng_state(),
        torch.tensor([module.training for module in model.modules()]),
        torch.tensor(hasattr(model, "extra")),
    ]


@pytest.mark.parametrize("training", [False, True])
def test_a_look_leaves_everything_as_it_was(training: bool) -> None:
    model = Remembering().train(training)
    called: list[int] = []
    model.blocks[0].register_forward_hook(lambda *_: called.append(1))
    before = state(model)
    with torch.no_grad(), undisturbed(model):
        model(images(32, 32))
        assert not model.training
    for one, other in zip(before, state(model), strict=True):
        assert torch.equal(one, other)
    assert not called


def test_a_captured_pass_is_the_pass_alone() -> None:
    results = []
    for watched in (False, True):
        model = Remembering().train()
        torch.manual_seed(5)
        if watched:
            with capture(model) as attention:
                output = model(images(32, 32))
            assert [layer.geometry for layer in attention] == [Geometry((2, 2), 1, (16, 16))] * 2
        else:
            output = model(images(32, 32))
        results.append([output.detach(), *state(model)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
