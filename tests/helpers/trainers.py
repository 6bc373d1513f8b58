"""Small models, data and trainers of somebody else's project, into which AttentionLogger is put."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.runs.history import AttentionHistory

MEASURES = ("entropy", "maximum", "mean", "distance")
CURVES = ("entropy", "maximum", "distance")  # of which loggers get curves
CLASSES, IMAGES, SIZE = 7, 23, 15  # validated in batches of 5, so the last one is smaller


class Foreign(LightningModule):
    """Somebody else's module around the ViT: SGD, noise of its own, no data module."""

    def __init__(self, pooling: Any = "cls", fail_in_batch: int | None = None, fail_in_eval: bool = False) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.backbone = VisionTransformer(
            img_size=SIZE, patch_size=5, num_classes=CLASSES, embed_dim=6, num_heads=3, num_layers=2, mlp_dim=11,
            attention_dropout=0.2, pooling=pooling,
        )  # fmt: skip
        self.frozen = nn.Dropout(0.5).eval()  # a part that is kept in eval mode while the rest trains
        self.fail_in_batch = fail_in_batch
        self.fail_in_eval = fail_in_eval
        self.validated = 0

    def forward(self, images: Tensor) -> Tensor:
        if self.fail_in_eval and not self.backbone.training:
            raise RuntimeError("broken forward")
        return self.backbone(images + 0.01 * torch.rand_like(images))  # random also in eval mode

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        assert self.backbone.training and not self.frozen.training
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if batch_idx == self.fail_in_batch:
            raise RuntimeError("broken batch")
        self.validated += len(batch[0])
        self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(classes: int = CLASSES, shuffle: bool = False) -> DataLoader:
    random = torch.Generator().manual_seed(3)
    images = torch.randn(IMAGES, 1, SIZE, SIZE, generator=random)
    return DataLoader(TensorDataset(images, torch.arange(IMAGES) % classes), batch_size=5, shuffle=shuffle)


def new_trainer(folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    plain = {"enable_checkpointing": False, "default_root_dir": folder, "num_sanity_val_steps": 0, "max_epochs": 2}
    return Trainer(**(quiet | plain | options), callbacks=list(callbacks))


def fit(folder: Path, module: LightningModule, *callbacks: Any, validation: Any = None, **options: Any) -> Trainer:
    trainer = new_trainer(folder, *callbacks, **options)
    torch.manual_seed(11)
    trainer.fit(module, loader(shuffle=True), loader() if validation is None else validation)
    return trainer


def vit(**options: Any) -> VisionTransformer:
    sizes = {"img_size": SIZE, "patch_size": 5, "num_classes": CLASSES, "embed_dim": 6, "num_heads": 3}
    return VisionTransformer(**(sizes | {"num_layers": 2, "mlp_dim": 11} | options))


class Steps(LightningModule):
    """Without forward: what is run, and on what, is in the steps alone."""

    def __init__(self, model: nn.Module, head: nn.Module | None = None, **parts: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.head = head or nn.Identity()
        for name, part in parts.items():
            setattr(self, name, part)

    def loss(self, batch: Any) -> Tensor:
        output = self.model(batch[0])
        return F.cross_entropy(self.head(getattr(output, "logits", output)), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def kept_in(folder: Path) -> AttentionHistory:
    """The history of the last training in a folder."""
    return AttentionHistory.load(max(folder.glob("attention_history*.npz"), key=lambda path: path.stat().st_mtime_ns))


@contextmanager
def attention_warnings() -> Iterator[list[str]]:
    """Collect what AttentionLogger and its loggers warn of inside."""
    lines: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lines
    lines += [str(each.message) for each in caught if re.search("AttentionLogger|writes no more", str(each.message))]


class Recorder(Logger):
    """A logger of some other service: takes numbers, and images as Weights & Biases does."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: list[tuple[int | None, dict[str, float]]] = []
        self.images: list[tuple[str, int, np.ndarray]] = []

    name = "recorder"  # type: ignore[assignment]
    version = 0  # type: ignore[assignment]

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append((step, dict(metrics)))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        assert step is not None
        self.images += [(key, step, image) for image in images]
