"""AttentionLogger in trainings of every kind: nothing else to write, nothing changed, and no end because of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.figures import attention_figures
from attention_visualizer.support.errors import UserError
from attention_visualizer.watching import attention_logger
from attention_visualizer.watching.attention_logger import AttentionLogger
from tests.helpers.models import HAND_WRITTEN_GEOMETRY, HandWritten
from tests.helpers.trainers import (
    CLASSES,
    IMAGES,
    SIZE,
    Foreign,
    Recorder,
    Steps,
    attention_warnings,
    fit,
    kept_in,
    loader,
    new_trainer,
    vit,
)

PROBES = torch.randn(3, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


# --- models ----------------------------------------------------------------------------------------------------


def timm_backbone() -> Steps:
    timm = pytest.importorskip("timm")
    small = {"img_size": SIZE, "patch_size": 5, "in_chans": 1, "embed_dim": 12, "num_heads": 3, "depth": 2}
    return Steps(
        timm.create_model("vit_tiny_patch16_224", num_classes=0, drop_rate=0.3, **small), nn.Linear(12, CLASSES)
    )


def torchvision_model() -> Steps:
    from torchvision.models import VisionTransformer as Torchvision

    model = Torchvision(SIZE, 5, num_layers=2, num_heads=3, hidden_dim=12, mlp_dim=11, dropout=0.1, num_classes=CLASSES)
    model.conv_proj = nn.Conv2d(1, 12, 5, 5)
    return Steps(model)


def hugging_face_model() -> Steps:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=11, image_size=SIZE, patch_size=5,
        num_channels=1, num_labels=CLASSES, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.1,
    )  # fmt: skip
    return Steps(transformers.ViTForImageClassification(config))


def student_and_teacher() -> Steps:
    return Steps(vit(dropout=0.2), teacher=vit(patch_size=3).requires_grad_(False))


def compiled_model() -> Steps:
    return Steps(torch.compile(vit(attention_dropout=0.2, num_layers=1), backend="eager"))


@pytest.mark.parametrize(
    ("make", "layers", "classifies"),
    [
        (timm_backbone, 2, False),
        (torchvision_model, 2, True),
        (hugging_face_model, 2, True),
        (student_and_teacher, 2, True),
        (compiled_model, 1, True),
    ],
)
def test_models_of_every_kind(tmp_path: Path, make: Any, layers: int, classifies: bool) -> None:
    states = []
    for watching in ([], [AttentionLogger()]):
        torch.manual_seed(5)
        module = make()
        fit(tmp_path, module, *watching, max_epochs=1)
        states.append(module.state_dict())
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    kept = kept_in(tmp_path)
    assert kept.column("frames", "step").tolist() == [0, 1, 2, 4, 5]
    assert kept.column("validations", "images").tolist() == [IMAGES]
    assert kept.validations[0]["entropy"].shape == (layers, 3)
    assert kept.frames[0]["maps"].shape == (CLASSES, layers, 3, 3)
    predicted, probability = kept.frames[-1]["predicted"], kept.frames[-1]["probability"]
    if classifies:
        with torch.no_grad():
            output = module.model.eval()(torch.stack([loader().dataset[number][0] for number in range(CLASSES)]))
        assert predicted.tolist() == getattr(output, "logits", output).argmax(dim=1).tolist()
    else:
        assert predicted.tolist() == [-1] * CLASSES and np.isnan(probability).all()


@pytest.mark.parametrize(("names", "kept"), [(range(CLASSES), True), (range(CLASSES + 1), False)])
def test_names_of_classes_are_the_models_own_where_they_are_of_its_classes(
    tmp_path: Path, names: range, kept: bool
) -> None:
    module = Steps(vit(num_layers=1))
    module.model.class_names = [f"kind {name}" for name in names]  # type: ignore[assignment]
    fit(tmp_path, module, AttentionLogger(early_frames=False, head_grids=0), max_epochs=1)
    expected = [f"kind {name}" for name in names] if kept else [str(name) for name in range(CLASSES)]
    assert kept_in(tmp_path).probe["class_names"].tolist() == expected


def test_a_model_that_declares_no_geometry_needs_none_and_may_be_given_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the given geometry has 17 tokens"):
        fit(tmp_path, Steps(HandWritten()), AttentionLogger(geometry=Geometry((4, 4), 1, (5, 5))))
    assert list(tmp_path.glob("*.npz")) == []
    for number, geometry in enumerate((None, HAND_WRITTEN_GEOMETRY)):
        folder = tmp_path / str(number)
        folder.mkdir()
        fit(folder, Steps(HandWritten()), AttentionLogger(geometry=geometry), max_epochs=1)
        assert kept_in(folder).column("validations", "images").tolist() == [IMAGES]


def test_statistics_are_those_of_the_chosen_model(tmp_path: Path) -> None:
    """The other one is larger, and runs in the same steps."""

    class Both(Steps):
        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch) + self.other(batch[0]).square().mean()

    module = Both(vit(), other=vit(num_layers=5))
    with pytest.raises(UserError, match='model="model", model="other"'):
        fit(tmp_path, module, AttentionLogger())
    for name, layers in (("model", 2), ("other", 5)):
        fit(tmp_path, module, AttentionLogger(model=name), max_epochs=1)
        kept = kept_in(tmp_path)
        assert kept.validations[0]["entropy"].shape == (layers, 3) and kept.frames[0]["maps"].shape[1] == layers
        assert kept.column("validations", "images").tolist() == [IMAGES]


def test_a_name_of_nothing_ends_before_training(tmp_path: Path) -> None:
    module = Steps(vit())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(UserError, match='model="backbone": Steps has no such part; there are model, head'):
        fit(tmp_path, module, AttentionLogger(model="backbone"))
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


# --- trainers --------------------------------------------------------------------------------------------------


class ByHand(Steps):
    def __init__(self) -> None:
        super().__init__(vit(dropout=0.1))
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        for _ in range(2):  # steps of a batch
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()


def test_manual_optimisation(tmp_path: Path) -> None:
    fit(tmp_path, ByHand(), AttentionLogger(), max_epochs=1)
    assert kept_in(tmp_path).column("frames", "step").tolist() == [0, 2, 4, 8, 10]
    assert kept_in(tmp_path).column("frames", "epoch").tolist() == [0.0, 0.2, 0.4, 0.8, 1.0]


def test_several_validation_loaders(tmp_path: Path) -> None:
    for loaders in ([loader(), loader(classes=2)], {"one": loader(), "two": loader(classes=2)}):
        fit(tmp_path, Steps(vit()), AttentionLogger(), validation=loaders, max_epochs=1)
        kept = kept_in(tmp_path)
        assert kept.column("validations", "images").tolist() == [2 * IMAGES]
        assert kept.probe["labels"].tolist() == list(range(CLASSES))  # of the first


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions(tmp_path: Path, precision: str) -> None:
    """Entropies and distances are those of single precision, but for the rounding of the model itself."""
    entropies, distances = [], []
    for each in ("32-true", precision):
        torch.manual_seed(5)
        fit(tmp_path, Steps(vit()), AttentionLogger(probe_images=PROBES), precision=each, max_epochs=1)
        kept = kept_in(tmp_path)
        assert kept.column("validations", "images").tolist() == [IMAGES]
        entropies.append([kept.frames[0]["entropy"], kept.validations[0]["entropy"]])
        distances.append([kept.frames[0]["distance"], kept.validations[0]["distance"]])
        assert torch.get_default_dtype() == torch.float32
    np.testing.assert_allclose(*entropies, rtol=2e-3)
    np.testing.assert_allclose(*distances, rtol=1e-2)


def test_a_fast_development_run_shows_frames_and_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    card = attention_figures.layer_card
    monkeypatch.setattr(attention_figures, "layer_card", lambda *given: drawn.append(given) or card(*given))
    fit(tmp_path, Steps(vit()), AttentionLogger(), fast_dev_run=True, logger=True)
    assert len(drawn) == 2 * 5 and list(tmp_path.iterdir()) == []  # the images of one batch, before and after


def test_without_any_validation(tmp_path: Path) -> None:
    class NoValidation(Foreign):
        validation_step = None  # type: ignore[assignment]

    fit(tmp_path, NoValidation(), AttentionLogger(probe_images=PROBES), limit_val_batches=0)
    assert kept_in(tmp_path).column("frames", "step").tolist() == [0, 1, 2, 4]
    with pytest.raises(UserError, match="there is no validation data .*pass probe_images="):
        new_trainer(tmp_path, AttentionLogger()).fit(NoValidation(), loader())
    fit(tmp_path, NoValidation(), AttentionLogger(), limit_val_batches=0)  # images are there to choose from
    assert kept_in(tmp_path).probe["labels"].tolist() == list(range(CLASSES))


def test_endless_data(tmp_path: Path) -> None:
    class Endless(IterableDataset):
        def __iter__(self) -> Iterator[tuple[Tensor, int]]:
            while True:
                yield PROBES[0], 1

    endless = DataLoader(Endless(), batch_size=5)
    fit(tmp_path, Steps(vit()), AttentionLogger(), validation=endless, limit_val_batches=2, max_epochs=1)
    assert kept_in(tmp_path).probe["labels"].tolist() == [1]
    new_trainer(tmp_path, AttentionLogger(probe_images=PROBES), max_steps=7).fit(Steps(vit()), endless)
    assert kept_in(tmp_path).column("frames", "epoch").tolist() == [0.0] * 4


def test_one_logger_for_two_trainings_begins_anew(tmp_path: Path) -> None:
    callback = AttentionLogger()
    for epochs in (2, 1):
        fit(tmp_path, Steps(vit()), callback, max_epochs=epochs)
    assert kept_in(tmp_path).column("frames", "step").tolist() == [0, 1, 2, 4, 5]


def test_resuming(tmp_path: Path) -> None:
    def train(epochs: int, watching: AttentionLogger, **options: Any) -> Steps:
        torch.manual_seed(5)
        module = Steps(vit(dropout=0.2))
        saving = ModelCheckpoint(tmp_path, save_last=True)
        trainer = new_trainer(tmp_path, watching, saving, enable_checkpointing=True, max_epochs=epochs)
        trainer.fit(module, loader(), loader(), **options)
        return module

    train(1, AttentionLogger())
    train(2, AttentionLogger(), ckpt_path=tmp_path / "last.ckpt")
    kept = kept_in(tmp_path)
    assert kept.column("frames", "step").tolist() == [0, 1, 2, 4, 5, 10]
    assert kept.column("validations", "step").tolist() == [5, 10]
    with pytest.warns(UserWarning, match="is of other probe images, a new one is started"):
        train(3, AttentionLogger(probe_images=PROBES), ckpt_path=tmp_path / "last.ckpt")
    assert kept_in(tmp_path).column("frames", "step").tolist() == [15]


# --- data ------------------------------------------------------------------------------------------------------


class Dictionaries(Dataset):
    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, number: int) -> dict[str, Any]:
        image, label = loader().dataset[number]
        return {"pixel_values": image, "labels": label, "file": f"{number}.png"}


def test_batches_that_are_dictionaries(tmp_path: Path) -> None:
    class Module(Steps):
        def loss(self, batch: Any) -> Tensor:
            return F.cross_entropy(self.model(pixel_values=batch["pixel_values"]), batch["labels"])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = vit()

        def forward(self, pixel_values: Tensor) -> Tensor:
            return self.vit(pixel_values)

    data = DataLoader(Dictionaries(), batch_size=5)
    new_trainer(tmp_path, AttentionLogger(), max_epochs=1).fit(Module(Model()), data, data)
    # The set does not tell the classes without its images.
    assert kept_in(tmp_path).probe["labels"].tolist() == [number * IMAGES // 10 % CLASSES for number in range(10)]
    assert kept_in(tmp_path).column("validations", "images").tolist() == [IMAGES]


def test_probe_images_are_what_the_hooks_make_of_a_batch(tmp_path: Path) -> None:
    class Scaling(LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            return loader()

        def val_dataloader(self) -> DataLoader:
            return loader()

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            assert self.trainer is not None
            return [100 * batch[0] if self.trainer.training else 3 * batch[0], batch[1]]

    callback = AttentionLogger()
    new_trainer(tmp_path, callback, max_epochs=1).fit(Steps(vit()), datamodule=Scaling())
    assert callback._probes is not None and torch.equal(callback._probes[2], 3 * loader().dataset[2][0])


# --- no end because of it --------------------------------------------------------------------------------------


def test_what_fails_while_training_is_warned_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    observe, looks = attention_logger.observe, []

    def failing(*given: Any, **options: Any) -> Any:
        looks.append(given)
        if len(looks) > 1:
            raise RuntimeError("out of order\nand more")
        return observe(*given, **options)

    monkeypatch.setattr(attention_logger, "observe", failing)
    with attention_warnings() as lines:
        fit(tmp_path, Steps(vit()), AttentionLogger())
    assert lines == ["AttentionLogger: no frame this time: out of order"] and len(looks) == 6
    kept = kept_in(tmp_path)
    assert len(kept.frames) == 1 and kept.column("validations", "step").tolist() == [5, 10]


def test_a_training_that_diverges_goes_its_own_way(tmp_path: Path) -> None:
    class Diverging(Steps):
        def on_train_batch_end(self, *given: Any) -> None:
            if self.global_step == 3:
                nn.init.constant_(self.model.blocks[0].attn.qkv.weight, float("nan"))

    steps = []
    for watching in ([], [AttentionLogger()]):
        trainer = fit(tmp_path, Diverging(vit()), *watching)
        steps.append((trainer.global_step, bool(trainer.callback_metrics["loss"].isnan())))
    assert steps == [(10, True)] * 2
    assert kept_in(tmp_path).column("frames", "step").tolist() == [0, 1, 2] and kept_in(tmp_path).validations == []


# --- pictures --------------------------------------------------------------------------------------------------


def test_images_of_many_channels_are_shown_in_grey(tmp_path: Path) -> None:
    probes = torch.randn(2, 5, SIZE, SIZE)
    recorder = Recorder()
    module = Steps(vit(in_channels=5))
    data = DataLoader([(image, 1) for image in torch.randn(4, 5, SIZE, SIZE)], batch_size=2)
    new_trainer(tmp_path, AttentionLogger(probe_images=probes), logger=recorder, max_epochs=1).fit(module, data, data)
    shown = kept_in(tmp_path).probe["images"]
    assert shown.shape == (2, SIZE, SIZE, 1)
    mean = probes.mean(dim=1).numpy()
    order = shown[0, ..., 0].flatten().argsort()
    assert (np.diff(mean[0].flatten()[order]) > -0.02).all()
    assert {tag for tag, _, _ in recorder.images} >= {"attention_2_layers/image_0", "attention_2_layers/image_1"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"probe_images": PROBES[0]}, r"probe_images is torch.float32 \[1, 15, 15\]: give"),
        ({"probe_images": (PROBES > 0)}, r"probe_images is torch.bool"),
        ({"probe_images": PROBES[:0]}, r"probe_images is torch.float32 \[0, 1, 15, 15\]"),
        ({"probe_images": PROBES.numpy()}, "probe_images is of type ndarray"),
        ({"probe_images": PROBES / 0}, "NaN or infinite"),
        (
            {"probe_images": PROBES, "probe_labels": torch.tensor([1, 2])},
            r"probe_labels is torch.int64 \[2\]: give a torch.Tensor of 3 whole numbers",
        ),
        ({"probe_images": PROBES, "probe_labels": torch.ones(3)}, r"probe_labels is torch.float32"),
        ({"probe_labels": torch.tensor([1, 2])}, "without probe_images="),
    ],
)
def test_probes_that_make_no_sense(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AttentionLogger(**given)


def test_probes_of_another_size_end_before_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"on images of \[n, 3, 15, 15\]"):
        fit(tmp_path, Steps(vit()), AttentionLogger(probe_images=torch.randn(2, 3, SIZE, SIZE)))
