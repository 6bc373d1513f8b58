"""Features are not taken for scores of classes, and scores not for features, whatever surrounds the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from attention_visualizer.attention.classifiers import watched_head
from attention_visualizer.measures.explanations import explain
from attention_visualizer.measures.observation import observe

WIDTH = 12
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def vit(num_classes: int = 0) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": WIDTH, "depth": 1, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, **sizes).eval()


class Own(nn.Module):
    """A model and what is done with its output."""

    def __init__(self, model: nn.Module, use: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.early = parts.pop("early", nn.Identity())
        self.backbone = model
        self.use = use
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, images: Tensor) -> Tensor:
        return self.use(self, self.early(images))


def beheaded(module: nn.Module) -> None:
    if hasattr(module, "heads"):
        module.heads = nn.Identity()


class Functional(nn.Module):
    """Class embeddings in a buffer, as in zero-shot classification."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = vit()
        self.register_buffer("names", torch.randn(4, WIDTH))

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(images) @ self.names.T  # type: ignore[operator]


FEATURES: dict[str, Callable[[], nn.Module]] = {
    "bare": vit,
    "DataParallel": lambda: nn.DataParallel(vit()),
    "Sequential": lambda: nn.Sequential(nn.Identity(), vit()),
    "average": lambda: AveragedModel(vit()),
    "compiled": lambda: torch.compile(vit(), backend="eager"),
    "deep": lambda: nn.Sequential(nn.DataParallel(AveragedModel(vit()))),
    "of length 1": lambda: Own(vit(), lambda self, images: F.normalize(self.backbone(images), dim=1)),
    "normalised by a layer": lambda: nn.Sequential(vit(), nn.LayerNorm(WIDTH)),
    "behind an adapter": lambda: nn.Sequential(nn.Conv2d(3, 3, 1), vit()),
    "beside a head that is not used": lambda: Own(
        vit(), lambda self, images: self.backbone(images), head_of_another_task=nn.Linear(WIDTH, 4)
    ),
    "in front of the head": lambda: Own(vit(4), lambda self, images: self.backbone.forward_features(images)[:, 0]),
    "of PyTorch's own attention, beheaded": lambda: nn.Sequential(
        torchvision.models.VisionTransformer(16, 8, 1, 3, WIDTH, 8, num_classes=4).apply(beheaded)
    ),
    "two, averaged": lambda: Own(vit(), lambda self, images: (self.backbone(images) + self.backbone(-images)) / 2),
}
SCORES: dict[str, Callable[[], nn.Module]] = {
    "bare": lambda: vit(4),
    "DataParallel": lambda: nn.DataParallel(vit(4)),
    "as many classes as features": lambda: vit(WIDTH),
    "as many classes as PyTorch's own attention is wide": lambda: torchvision.models.VisionTransformer(
        16, 8, 1, 3, WIDTH, 8, num_classes=WIDTH
    ),
    "head behind features": lambda: nn.Sequential(vit(), nn.Linear(WIDTH, 4)),
    "head that is named first": lambda: Own(
        vit(), lambda self, images: self.last(self.backbone(images)), last=nn.Linear(WIDTH, 4)
    ),
    "head of two layers": lambda: nn.Sequential(vit(), nn.Linear(WIDTH, 9), nn.ReLU(), nn.Linear(9, 4)),
    "low-rank head": lambda: nn.Sequential(vit(), nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, 4)),
    "class embeddings": Functional,
    "adapter and head": lambda: nn.Sequential(nn.Conv2d(3, 3, 1), vit(), nn.Linear(WIDTH, 4)),
}


@pytest.mark.parametrize("kind", FEATURES)
def test_features_are_no_classes(kind: str) -> None:
    model = FEATURES[kind]().eval()
    looked, explained = observe(model, IMAGES), explain(model, IMAGES)
    assert looked.predicted.tolist() == explained.target.tolist() == [-1, -1] and looked.num_classes == 0
    assert not {"gradient x attention", "relevance"} & explained.maps.keys()


@pytest.mark.parametrize("kind", SCORES)
def test_scores_behind_features_are_classes(kind: str) -> None:
    model = SCORES[kind]().eval()
    with torch.no_grad():
        scores = model(IMAGES)
    looked, explained = observe(model, IMAGES), explain(model, IMAGES)
    assert looked.predicted.tolist() == explained.target.tolist() == scores.argmax(dim=1).tolist()
    assert looked.num_classes == scores.shape[1] and looked.probability == pytest.approx(
        scores.softmax(dim=1).amax(dim=1).numpy()
    )
    assert "relevance" in explained.maps


def test_a_model_of_hugging_face_without_its_head() -> None:
    transformers = pytest.importorskip("transformers")  # 8 s, once a process
    config = transformers.ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=3, intermediate_size=8, image_size=16, patch_size=8
    )
    pooled = Own(transformers.ViTModel(config), lambda self, images: self.backbone(images).pooler_output).eval()
    assert observe(pooled, IMAGES).num_classes == 0
    classifier = transformers.ViTForImageClassification(config).eval()
    for model in (classifier, nn.Sequential(classifier), nn.Sequential(pooled, nn.Linear(WIDTH, 2)).eval()):
        assert observe(model, IMAGES).num_classes == 2


def test_watching_leaves_nothing_behind() -> None:
    model = SCORES["head behind features"]()
    with pytest.raises(ZeroDivisionError), watched_head(model):
        raise ZeroDivisionError
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
