"""Which part of somebody's module is the Vision Transformer, and what is said where that is not clear."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from lightning import LightningModule
from torch import Tensor, nn

from attention_visualizer.attention import recording
from attention_visualizer.attention.capture import InternalCaptureError
from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.attention.model_search import FoundModel, find_model, named_part
from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.support.errors import UserError
from tests.helpers.models import HAND_WRITTEN_GEOMETRY, HandWritten

CLASSES, SIZE = 7, 15
IMAGES = torch.randn(3, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


def vit(**options: Any) -> VisionTransformer:
    sizes = {"img_size": SIZE, "patch_size": 5, "num_classes": CLASSES, "embed_dim": 6, "num_heads": 3}
    return VisionTransformer(**(sizes | {"num_layers": 2, "mlp_dim": 11} | options))


class Holder(LightningModule):
    """A LightningModule without forward, of whatever parts."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


class Forwarding(Holder):
    """With a forward, which runs the part called `run`, then `after`, if there is one."""

    def forward(self, images: Tensor) -> Any:
        output = self.run(images)
        return self.after(output) if hasattr(self, "after") else output


class OfBatches(Holder):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(batch["images"])


def found_in(module: nn.Module, images: Tensor = IMAGES, **options: Any) -> FoundModel:
    return find_model(module.eval(), images, **options)


def trained_with(trained: bool, model: nn.Module) -> nn.Module:
    return model.requires_grad_(trained)


# --- found -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "name", "runs"),
    [
        (vit(), "", ""),
        (Holder(model=vit()), "model", "model"),
        (Forwarding(run=vit()), "run", ""),
        (OfBatches(model=vit()), "model", "model"),
        (Holder(parts=nn.ModuleDict({"first": nn.Linear(3, 2), "vit": vit()})), "parts.vit", "parts.vit"),
        (Forwarding(run=nn.Sequential(nn.Upsample(30), vit(img_size=30))), "run", ""),
        (Forwarding(run=nn.Sequential(nn.Dropout(0.1), vit())), "run.1", ""),
        (Holder(convolutions=nn.Conv2d(1, 3, 3), model=vit()), "model", "model"),
        # of two, the one that forward runs, and else the one that is trained
        (Forwarding(teacher=vit(patch_size=3), run=vit()), "run", ""),
        (Holder(teacher=trained_with(False, vit()), student=vit()), "student", "student"),
        (Holder(net=nn.ModuleDict({"teacher": trained_with(False, vit()), "student": vit()})), *["net.student"] * 2),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_found(module: nn.Module, name: str, runs: str) -> None:
    found = found_in(module)
    assert found.name == name and found.model is named_part(module, name)
    assert found.runs is named_part(module, runs)
    assert [re.search(r"blocks\.\d", layer)[0] for layer in found.layers] == ["blocks.0", "blocks.1"]  # type: ignore[index]
    assert found.unplaced == frozenset() and found.num_classes


def test_a_frozen_backbone_is_found_where_it_is_the_only_one() -> None:
    assert found_in(Holder(head=nn.Linear(3, 2), backbone=trained_with(False, vit()))).name == "backbone"


def test_the_one_that_was_not_chosen_is_named() -> None:
    assert found_in(Holder(student=vit(), teacher=trained_with(False, vit()))).others == ("teacher",)
    assert found_in(Holder(student=vit())).others == ()


def test_named_parts_are_taken_as_they_are() -> None:
    module = Forwarding(run=vit(), teacher=vit(patch_size=3))
    found = found_in(module, name="teacher")
    assert found.model is found.runs is module.teacher


def test_compiled_models_are_found_by_the_name_that_users_write() -> None:
    module = Holder(backbone=torch.compile(vit(), backend="eager"))
    assert found_in(module).name == "backbone" and len(found_in(module).layers) == 2
    inside = Holder(outer=nn.ModuleDict({"vit": torch.compile(vit(), backend="eager")}))
    assert found_in(inside).model is inside.outer["vit"]
    assert found_in(inside, name="outer.vit").layers == found_in(inside).layers


def test_a_hand_written_model_needs_no_geometry_and_may_have_one() -> None:
    for options in ({}, {"geometry": HAND_WRITTEN_GEOMETRY}):
        found = found_in(Holder(net=HandWritten()), **options)
        assert found.name == "net" and len(found.layers) == 2 and found.unplaced == frozenset() and found.num_classes


@pytest.mark.parametrize("dim", [SIZE, 6])
def test_blocks_that_would_work_on_the_images_are_no_models(dim: int) -> None:
    """Its two mixers take anything whose last axis is `dim`, as images of that width are."""

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(dim, 3 * dim)

        def forward(self, tokens: Tensor) -> Tensor:
            query, key, value = self.project(tokens).chunk(3, dim=-1)
            return (query @ key.transpose(-2, -1)).softmax(dim=-1) @ value

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_embed = nn.Conv2d(1, dim, 5, 5)
            self.mixers = nn.Sequential(Mixer(), Mixer())

        def forward(self, images: Tensor) -> Tensor:
            return self.mixers(self.patch_embed(images).flatten(2).transpose(1, 2)).mean(dim=1)

    assert found_in(Holder(vit=Model())).name == "vit"


def test_searching_changes_nothing() -> None:
    module = Holder(
        normed=nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 2, 3)), vit=vit(), ema=trained_with(False, vit())
    )
    before = copy.deepcopy(module.state_dict())
    found_in(module)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert torch._C._len_torch_function_stack() == 0 and not torch.nn.modules.module._global_forward_pre_hooks


def test_metrics_beside_the_model_are_not_run() -> None:
    class Counting(nn.Module):
        runs = 0

        def forward(self, images: Tensor) -> Tensor:
            self.runs += 1
            return images

    module = Holder(metric=Counting(), model=vit())
    found_in(module)
    assert module.metric.runs == 0


# --- other libraries -------------------------------------------------------------------------------------------


def test_timm() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=48, num_classes=0, depth=3)
    images = torch.randn(2, 3, 48, 48)
    found = found_in(Holder(backbone=model, head=nn.Linear(192, 5)), images)
    assert found.name == "backbone" and len(found.layers) == 3 and not found.num_classes
    with_head = Forwarding(run=model, after=nn.Linear(192, 5))
    found = found_in(with_head, images)
    assert found.name == "run" and found.runs is with_head and found.num_classes


def test_torchvision() -> None:
    from torchvision.models import VisionTransformer as Torchvision

    model = Torchvision(image_size=30, patch_size=10, num_layers=2, num_heads=3, hidden_dim=12, mlp_dim=11)
    images = torch.randn(2, 3, 30, 30)
    found = found_in(Holder(vit=model, loss=nn.CrossEntropyLoss()), images)
    assert found.name == "vit" and len(found.layers) == 2 and found.num_classes
    model.heads = nn.Identity()
    assert not found_in(Holder(vit=model), images).num_classes


def test_hugging_face() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=11, image_size=30, patch_size=10,
        num_channels=1, num_labels=5,
    )  # fmt: skip
    images = torch.randn(2, 1, 30, 30)
    found = found_in(Holder(model=transformers.ViTForImageClassification(config)), images)
    assert found.name.startswith("model") and len(found.layers) == 2 and found.num_classes
    found = found_in(Holder(encoder=transformers.ViTModel(config), head=nn.Linear(12, 5)), images)
    assert found.name == "encoder" and not found.num_classes
    with pytest.raises(UserError, match=r"fails with .*30"):
        found_in(Holder(model=transformers.ViTForImageClassification(config)), torch.randn(2, 1, 20, 20))


def test_vit_pytorch() -> None:
    library = pytest.importorskip("vit_pytorch")
    model = library.ViT(image_size=30, patch_size=10, num_classes=5, dim=12, depth=2, heads=3, mlp_dim=11)
    found = found_in(Forwarding(run=model), torch.randn(2, 3, 30, 30))
    assert found.name == "run" and len(found.layers) == 2 and found.num_classes


# --- classes ---------------------------------------------------------------------------------------------------


class Answering(nn.Module):
    """A ViT that puts its scores in some form."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.vit, self.form = vit(), form

    def forward(self, images: Tensor) -> Any:
        return self.form(self.vit(images))


@pytest.mark.parametrize(
    ("form", "num_classes"),
    [
        (lambda scores: {"loss": scores.mean(), "logits": scores}, CLASSES),
        (lambda scores: (scores, scores.mean()), CLASSES),
        (lambda scores: scores.softmax(dim=1), CLASSES),
        (lambda scores: {"loss": scores.mean()}, 0),
        (lambda scores: scores.mean(), 0),
        (lambda scores: scores[:, :1], 2),  # one score is for or against something
        (lambda scores: None, 0),
        (lambda scores: [scores[:, :, None]], 0),
    ],
)
def test_outputs_of_other_forms(form: Any, num_classes: int) -> None:
    assert found_in(Forwarding(run=Answering(form))).num_classes == num_classes


def test_features_are_no_scores_where_a_head_waits_for_them() -> None:
    headless = HandWritten(classes=13)  # 13 features, for all that it says
    assert found_in(Holder(net=headless), geometry=HAND_WRITTEN_GEOMETRY).num_classes
    assert not found_in(Holder(net=headless, head=nn.Linear(13, CLASSES)), geometry=HAND_WRITTEN_GEOMETRY).num_classes
    assert found_in(Forwarding(run=headless, after=nn.Linear(13, CLASSES)), geometry=HAND_WRITTEN_GEOMETRY).num_classes
    beheaded = vit()
    beheaded.head = nn.Identity()
    assert not found_in(Holder(vit=beheaded)).num_classes


# --- mistakes --------------------------------------------------------------------------------------------------


def test_several_that_could_be_meant() -> None:
    with pytest.raises(UserError, match='Holder has several .*model="left", model="right"'):
        found_in(Holder(left=vit(), right=vit()))
    both = Answering(lambda scores: scores)
    both.other = vit(patch_size=3)
    both.form = lambda scores: scores
    both.forward = lambda images: both.vit(images) + both.other(images)  # type: ignore[method-assign]
    with pytest.raises(UserError, match='model="pair.vit", model="pair.other"'):
        found_in(Holder(pair=both))


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("vti", "there are vit, head"),
        ("vit.block", r"there are vit.patch_embed, .*vit\.blocks"),
        ("a.b", "are vit, head"),
    ],
)
def test_a_name_of_nothing(name: str, listed: str) -> None:
    with pytest.raises(UserError, match=f'model="{name}": Holder has no such part; .*{listed}'):
        found_in(Holder(vit=vit(), head=nn.Linear(3, 2)), name=name)


def test_a_name_of_something_else() -> None:
    with pytest.raises(UserError, match=r'model="head" \(Linear\) shows no attention on images of \[n, 1, 15, 15\]'):
        found_in(Holder(vit=vit(), head=nn.Linear(3, 2)), name="head")
    with pytest.raises(UserError, match=r'model="net" \(Conv2d\) shows no attention'):
        found_in(Holder(net=nn.Conv2d(1, 2, 3)), name="net")


def test_images_that_the_model_does_not_take() -> None:
    with pytest.raises(UserError, match=r'on images of \[n, 3, 15, 15\]: model="vit" \(VisionTransformer\) fails with'):
        found_in(Holder(vit=vit()), torch.randn(3, 3, SIZE, SIZE))


def test_a_module_without_attention() -> None:
    with pytest.raises(UserError, match=r"no Vision Transformer was found in Holder .*\[n, 1, 15, 15\]"):
        found_in(Holder(net=nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())))


def test_a_search_that_fails_itself_says_so_and_names_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise AttributeError("no such thing")

    monkeypatch.setattr(recording, "calling_stack", fail)
    for module in (vit(), Holder(vit=vit())):
        message = rf"for a Vision Transformer in {type(module).__name__} failed: .* blocks\.0\.attn .* no such thing"
        with pytest.raises(InternalCaptureError, match=message):
            found_in(module)
    with pytest.raises(InternalCaptureError, match=r'model="vit" .*: the attention of blocks\.0.*no such thing'):
        found_in(Holder(vit=vit()), name="vit")


def test_a_geometry_that_does_not_fit() -> None:
    with pytest.raises(UserError, match="the given geometry has 17 tokens"):
        found_in(Holder(net=HandWritten()), geometry=Geometry((4, 4), 1, (5, 5)))
