"""The recipe: its schedule, weight decay, loss, metrics, and batches whose random state is a function of integers."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.support.errors import UserError
from attention_visualizer.training.classifier import Classifier, parameter_groups

CLASSES = 5


def loader(num_images: int, batch_size: int) -> DataLoader:
    random = torch.Generator().manual_seed(0)
    images = torch.randn(num_images, 1, 3, 7, generator=random)
    return DataLoader(TensorDataset(images, torch.arange(num_images) % CLASSES), batch_size)


class Dropped(nn.Module):
    """A linear classifier of noisy pixels, which remembers what it was given after dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(21, CLASSES)
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        pixels = self.drop(images.flatten(1))
        self.seen.append(pixels.detach().clone())
        return self.head(pixels)


class Fixed(nn.Module):
    """Gives the logits that it was made with, whatever the images; its one weight changes nothing."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.weight = nn.Parameter(torch.zeros(()))
        self.given = 0

    def forward(self, images: Tensor) -> Tensor:
        start = self.given
        self.given = (start + len(images)) % len(self.logits)
        return self.logits[start : start + len(images)] + 0 * self.weight


def trainer(folder: Path, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    plain = {"accelerator": "cpu", "enable_checkpointing": False, "default_root_dir": folder}
    return Trainer(**(quiet | plain | options))


# --- optimiser and schedule ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("warmup_share", "warmup_steps"), [(0.3, 6), (0.0, 1)])
def test_learning_rate_rises_linearly_and_falls_as_a_cosine_to_zero(
    tmp_path: Path, warmup_share: float, warmup_steps: int
) -> None:
    rates = []

    class Recording(Classifier):
        def on_train_batch_end(self, *_: Any) -> None:
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    module = Recording(Dropped(), CLASSES, learning_rate=0.7, warmup_share=warmup_share)
    trainer(tmp_path, max_epochs=4).fit(module, loader(35, 7))
    # The rate after step k is that of step k + 1; 4 epochs of 5 batches are 20 steps.
    steps = range(1, 21)
    rising = [0.7 * (step + 1) / warmup_steps for step in steps if step < warmup_steps]
    falling = [
        0.35 * (1 + math.cos(math.pi * (step - warmup_steps) / (20 - warmup_steps)))
        for step in steps
        if step >= warmup_steps
    ]
    assert rates == pytest.approx(rising + falling, abs=1e-12)
    assert rates[-1] == pytest.approx(0.0, abs=1e-12) and max(rates) == pytest.approx(0.7)


@pytest.mark.parametrize(("pooling", "positions"), [("cls", "learned"), ("mean", "none"), ("cls", "sincos")])
def test_only_matrices_decay(pooling: Any, positions: Any) -> None:
    model = VisionTransformer(
        img_size=15, patch_size=5, embed_dim=12, num_heads=3, num_layers=2, mlp_dim=17,
        pooling=pooling, positional_embedding=positions,
    )  # fmt: skip
    decaying, still = parameter_groups(model, 0.3)
    assert (decaying["weight_decay"], still["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying_names = [names.pop(id(parameter)) for parameter in decaying["params"]]
    still_names = [names.pop(id(parameter)) for parameter in still["params"]]
    assert not names  # each parameter is in exactly one group
    kinds = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
    matrices = [f"blocks.{block}.{kind}" for block in range(2) for kind in kinds]
    assert sorted(decaying_names) == sorted(["patch_embed.proj.weight", "head.weight", *matrices])
    assert ("cls_token" in still_names) == (pooling == "cls")
    assert ("pos_embed" in still_names) == (positions == "learned")


def test_frozen_parameters_are_left_out() -> None:
    model = Dropped()
    model.head.bias.requires_grad = False
    assert [len(group["params"]) for group in parameter_groups(model, 0.1)] == [1, 0]


# --- random state ----------------------------------------------------------------------------------------------


def dropout_of(folder: Path, seed: int, disturbance: int) -> list[Tensor]:
    model = Dropped()
    torch.manual_seed(disturbance)
    trainer(folder, max_epochs=2).fit(Classifier(model, CLASSES, seed=seed), loader(14, 7))
    return model.seen


def test_dropout_is_a_function_of_the_seed_and_the_number_of_the_batch(tmp_path: Path) -> None:
    first, again, other = (dropout_of(tmp_path, *state) for state in ((2, 0), (2, 12345), (3, 0)))
    assert len(first) == 4
    for number, pixels in enumerate(first):
        assert torch.equal(pixels, again[number])
        assert not torch.equal(pixels == 0, other[number] == 0)
    assert not torch.equal(first[0] == 0, first[2] == 0)  # the same images in the second epoch


class Gradients(Callback):
    """Remembers the largest gradient and the norm of all before each step of the optimiser."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        gradients = [parameter.grad.flatten() for parameter in pl_module.parameters() if parameter.grad is not None]
        if gradients:
            everything = torch.cat(gradients)
            self.seen.append((float(everything.abs().max()), float(everything.norm())))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(("algorithm", "expected"), [("norm", 0.01), ("value", 0.01), (None, 0.01)])
def test_gradients_are_clipped_with_a_fused_optimiser(
    tmp_path: Path, precision: Any, algorithm: str | None, expected: float
) -> None:
    watch = Gradients()
    clipping: dict[str, Any] = {"gradient_clip_val": expected, "gradient_clip_algorithm": algorithm}
    fitted = trainer(tmp_path, max_steps=3, precision=precision, callbacks=[watch], **clipping)
    fitted.fit(Classifier(Dropped(), CLASSES), loader(21, 7))
    assert fitted.optimizers[0].defaults["fused"] is True
    largest, norm = zip(*watch.seen, strict=True)
    clipped = largest if algorithm == "value" else norm
    assert clipped == pytest.approx([expected] * len(clipped), rel=1e-3) and len(clipped) >= 2


def test_loss_and_learning_rate_are_logged_at_the_steps_that_loggers_take(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    module = Classifier(Dropped(), CLASSES)
    trainer(tmp_path, max_epochs=2, log_every_n_steps=2, logger=logger).fit(module, loader(21, 7))
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open(newline="")))
    assert [int(row["step"]) for row in rows if row["train/loss"]] == [1, 3, 5]
    assert [int(row["step"]) for row in rows if row["train/learning_rate"]] == [1, 3, 5]


# --- loss and metrics ------------------------------------------------------------------------------------------


def test_loss_smooths_labels_as_in_the_paper(tmp_path: Path) -> None:
    logits = torch.randn(7, CLASSES, generator=torch.Generator().manual_seed(1))
    module = Classifier(Fixed(logits), CLASSES, label_smoothing=0.2)
    fitted = trainer(tmp_path, max_steps=1, log_every_n_steps=1)
    fitted.fit(module, loader(7, 7))
    labels = torch.arange(7) % CLASSES
    # Szegedy et al., 2016: the target is (1 - s) one-hot plus s / classes everywhere.
    targets = 0.8 * F.one_hot(labels, CLASSES) + 0.2 / CLASSES
    by_hand = -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()
    assert fitted.callback_metrics["train/loss"] == pytest.approx(float(by_hand), abs=1e-6)


def test_validation_counts_images_not_batches(tmp_path: Path) -> None:
    logits = torch.randn(11, CLASSES, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(11) % CLASSES
    scores = trainer(tmp_path).validate(Classifier(Fixed(logits), CLASSES), loader(11, 7), verbose=False)[0]
    assert scores["validation/accuracy"] == pytest.approx(float((logits.argmax(dim=1) == labels).float().mean()))
    assert scores["validation/loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), abs=1e-6)


def test_confusion_is_true_by_predicted(tmp_path: Path) -> None:
    predicted = torch.tensor([3, 3, 3, 3, 3, 1, 1])  # of the true classes 0 1 2 3 4 0 1
    module = Classifier(Fixed(F.one_hot(predicted, CLASSES).float()), CLASSES)
    scores = trainer(tmp_path).test(module, loader(7, 7), verbose=False)[0]
    expected = torch.zeros(CLASSES, CLASSES, dtype=torch.long)
    for true, guess in ((0, 3), (1, 3), (2, 3), (3, 3), (4, 3), (0, 1), (1, 1)):
        expected[true, guess] += 1
    assert torch.equal(module.test_confusion.compute(), expected)
    assert scores["test/accuracy"] == pytest.approx(2 / 7)


# --- checkpoints and mistakes ----------------------------------------------------------------------------------


def test_the_block_is_saved_with_the_accuracy_as_a_plain_number(tmp_path: Path) -> None:
    module = Classifier(Dropped(), CLASSES)
    module.checkpoint_block = {"format": 1}
    fitted = trainer(tmp_path, max_epochs=1)
    fitted.fit(module, loader(14, 7), loader(11, 7))
    saved: dict[str, Any] = {}
    module.on_save_checkpoint(saved)
    accuracy = saved["attention_visualizer"].pop("validation_accuracy")
    assert type(accuracy) is float and accuracy == float(fitted.callback_metrics["validation/accuracy"])
    counted = {"train_right": 0, "train_images": 0}  # the epoch is over
    assert saved == {"attention_visualizer": {"format": 1, "precision": "32-true", **counted}}
    assert module.checkpoint_block == {"format": 1}


def test_without_a_block_nothing_is_added() -> None:
    saved: dict[str, Any] = {}
    Classifier(Dropped(), CLASSES).on_save_checkpoint(saved)
    assert saved == {}


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "beta1", "beta2", "warmup_share", "label_smoothing"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_values_that_cannot_train_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"^optimizer.{name}={value}: give"):
        Classifier(Dropped(), CLASSES, **{name: value})


@pytest.mark.parametrize("field", [{"learning_rate": 0.0}, {"beta1": 1.0}, {"warmup_share": 1.0}])
def test_bounds_that_are_not_included(field: dict[str, float]) -> None:
    with pytest.raises(UserError, match="optimizer"):
        Classifier(Dropped(), CLASSES, **field)


def test_bounds_that_are_included() -> None:
    Classifier(Dropped(), CLASSES, weight_decay=0.0, beta1=0.0, beta2=0.0, warmup_share=0.0, label_smoothing=0.0)
