"""AttentionLogger: what it writes is what the model attends to, and training does not notice it."""

from __future__ import annotations

import csv
import functools
import io
import itertools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from attention_visualizer.data.datamodule import ImageDataModule
from attention_visualizer.figures import attention_figures
from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.runs.checkpoint import load_checkpoint
from attention_visualizer.runs.history import AttentionHistory
from attention_visualizer.support.errors import UserError
from attention_visualizer.watching.attention_logger import AttentionLogger
from tests.helpers.runs import BATCHES, HEADS, LAYERS, trained_run
from tests.helpers.trainers import (
    CLASSES,
    CURVES,
    IMAGES,
    MEASURES,
    SIZE,
    Foreign,
    Recorder,
    fit,
    kept_in,
    loader,
    new_trainer,
)

FRAMES = [0, 1, 2, 4, 8, 12, 24, 36]  # before training, log-spaced in the first epoch, then each validation
VALIDATIONS = [12, 24, 36]


# --- what a run writes -----------------------------------------------------------------------------------------


@functools.cache
def events() -> EventAccumulator:
    """Everything in the event files of the run that the tests share."""
    everything = {"images": 0, "scalars": 0, "histograms": 0, "tensors": 0}
    return EventAccumulator(str(trained_run().path), size_guidance=everything).Reload()


@functools.cache
def history() -> AttentionHistory:
    return AttentionHistory.load(trained_run().path / "attention_history.npz")


def scalars(tag: str) -> dict[int, float]:
    return {event.step: event.value for event in events().Scalars(tag)}


def test_pictures_come_at_the_stated_steps() -> None:
    tags = events().Tags()["images"]
    sheet, heat_map = "attention_1_maps/all_images", "attention_4_entropy/layers_x_heads"
    overlays = [f"attention_2_layers/class_{number}" for number in range(10)]
    grids = [f"attention_3_heads/class_{number}" for number in range(2)]
    assert sorted(tags) == [sheet, *overlays, *grids, heat_map, "test/confusion"]
    for tag in (sheet, *overlays):
        assert [event.step for event in events().Images(tag)] == FRAMES
    for tag in grids:  # which cost the most
        assert [event.step for event in events().Images(tag)] == [0, *VALIDATIONS]
    assert [event.step for event in events().Images(heat_map)] == VALIDATIONS


def test_pictures_decode_and_evolve() -> None:
    for tag in events().Tags()["images"]:
        pictures = []
        for event in events().Images(tag):
            with Image.open(io.BytesIO(event.encoded_image_string)) as picture:
                assert picture.format == "PNG" and picture.size == (event.width, event.height)
                assert min(picture.size) >= 100
                pictures.append(np.asarray(picture.convert("RGB"), dtype=np.float32))
        assert all(picture.std() > 1 for picture in pictures)
        assert not np.array_equal(pictures[0], pictures[-1]) or tag == "test/confusion"


def test_pictures_of_one_tag_have_one_size() -> None:
    for tag in events().Tags()["images"]:
        sizes = {(event.width, event.height) for event in events().Images(tag)}
        assert len(sizes) == 1, tag  # or the step slider would jump


def test_a_scalar_for_each_measure_layer_and_head() -> None:
    expected = {
        f"vit_{measure}{what}"
        for measure in CURVES
        for layer in range(1, LAYERS + 1)
        for what in (f"/layer_{layer}", *(f"_by_head/layer_{layer}_head_{head}" for head in range(1, HEADS + 1)))
    }
    found = {tag for tag in events().Tags()["scalars"] if re.match("vit_(entropy|maximum|distance)(_by_head)?/", tag)}
    assert found == expected
    for tag in expected:
        assert [event.step for event in events().Scalars(tag)] == VALIDATIONS


def explicit_attention(model: VisionTransformer, images: Tensor) -> list[np.ndarray]:
    """Each layer's weights [image, head, query, key] in float64, from the inputs of its linear layer alone."""
    found: list[np.ndarray] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        batch, tokens, _ = output.shape
        query, key, _ = output.double().reshape(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        scores = torch.einsum("bhqd,bhkd->bhqk", query, key) / math.sqrt(query.shape[-1])
        found.append(scores.softmax(dim=-1).numpy())

    hooks = [block.attn.qkv.register_forward_hook(keep) for block in model.blocks]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return found


def explicit_measures(weights: np.ndarray) -> dict[str, np.ndarray]:
    """measure -> [head], the mean over images: [image, head, query, key] of a class token and 4 x 4 patches of 7."""
    readout = weights[:, :, 0]
    patch_keys = weights[:, :, 1:, 1:]
    places = np.array([(7 * row + 3.5, 7 * column + 3.5) for row in range(4) for column in range(4)])
    distances = np.sqrt(((places[:, None] - places[None]) ** 2).sum(axis=-1))
    within = patch_keys / patch_keys.sum(axis=-1, keepdims=True)
    return {
        "entropy": -(readout * np.log(readout)).sum(axis=-1).mean(axis=0),
        "maximum": readout[..., 1:].max(axis=-1).mean(axis=0),
        "mean": readout[..., 1:].mean(axis=-1).mean(axis=0),
        "distance": (within * distances).sum(axis=-1).mean(axis=(0, 2)),
    }


@functools.cache
def validation_images() -> tuple[Tensor, Tensor]:
    data = ImageDataModule(name="digits", batch_size=103)
    data.load()
    images, labels = data.splits["validation"]
    return (images.float() / 255 - data.description.mean) / data.description.std, labels


def test_scalars_are_those_of_the_whole_validation_set() -> None:
    last = load_checkpoint(trained_run().path / "checkpoints" / "last.ckpt")
    layers = explicit_attention(last.build_model(), validation_images()[0])
    assert len(layers) == LAYERS
    for layer, weights in enumerate(layers, start=1):
        for measure, heads in explicit_measures(weights).items():
            if measure not in CURVES:
                continue
            for head, value in enumerate(heads, start=1):
                logged = scalars(f"vit_{measure}_by_head/layer_{layer}_head_{head}")[last.step]
                assert logged == pytest.approx(value, rel=2e-5), (measure, layer, head)
            mean = scalars(f"vit_{measure}/layer_{layer}")[last.step]
            assert mean == pytest.approx(heads.mean(), rel=2e-5)


def test_histograms_count_every_image_and_head() -> None:
    tags = {f"vit_{measure}_distribution/layer_{layer}" for measure in CURVES for layer in (1, 2)}
    assert set(events().Tags()["histograms"]) == tags
    last = load_checkpoint(trained_run().path / "checkpoints" / "last.ckpt")
    for tag in tags:
        by_step = {event.step: event.histogram_value for event in events().Histograms(tag)}
        assert list(by_step) == VALIDATIONS
        histogram = by_step[last.step]
        assert histogram.num == sum(histogram.bucket) == 200 * HEADS
        measure, layer = re.findall("vit_(.*)_distribution/layer_(.)", tag)[0]
        mean = scalars(f"vit_{measure}/layer_{layer}")[last.step]
        width = max(np.diff(histogram.bucket_limit)) if len(histogram.bucket_limit) > 1 else 0.05
        assert histogram.sum / histogram.num == pytest.approx(mean, abs=width)
        assert histogram.min <= mean <= histogram.max


def test_one_chart_overlays_a_layers_heads_or_all_layers() -> None:
    (event,) = events().Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout()
    layout.ParseFromString(event.tensor_proto.string_val[0])
    charts = [chart for category in layout.category for chart in category.chart]
    assert len(charts) == len(CURVES) * (LAYERS + 1)
    tags = events().Tags()["scalars"]
    shown: set[str] = set()
    for chart in charts:
        matched = {tag for tag in tags if any(re.match(pattern, tag) for pattern in chart.multiline.tag)}
        assert len(matched) == (LAYERS if "all layers" in chart.title else HEADS)
        shown |= matched
    assert shown == {tag for tag in tags if re.match("vit_(entropy|maximum|distance)(_by_head)?/", tag)}


def test_the_callback_states_its_own_cost() -> None:
    seconds, share = scalars("watching/seconds"), scalars("watching/share_of_epoch")
    assert list(seconds) == list(share) == VALIDATIONS
    assert all(0 < value < 60 for value in seconds.values())
    assert all(0 < value < 1 for value in share.values())


def test_the_other_logger_gets_the_same_numbers() -> None:
    rows = list(csv.DictReader((trained_run().path / "csv" / "metrics.csv").open()))
    for tag in events().Tags()["scalars"]:
        if tag.startswith(("vit_", "watching")):
            column = {int(row["step"]): float(row[tag]) for row in rows if row[tag]}
            assert column == pytest.approx(scalars(tag), rel=1e-6)


def test_the_history_agrees_with_the_events() -> None:
    assert history().column("frames", "step").tolist() == FRAMES
    assert history().column("validations", "step").tolist() == VALIDATIONS
    assert history().column("validations", "images").tolist() == [200] * 3
    epochs = history().column("frames", "epoch")
    assert epochs.tolist() == pytest.approx([step / BATCHES for step in FRAMES])
    for measure in MEASURES:
        kept = history().column("validations", measure)
        assert kept.shape == (3, LAYERS, HEADS)
        for layer, head in itertools.product(range(LAYERS), range(HEADS)):
            if measure not in CURVES:
                continue
            logged = scalars(f"vit_{measure}_by_head/layer_{layer + 1}_head_{head + 1}")
            np.testing.assert_allclose(kept[:, layer, head], list(logged.values()), rtol=1e-6)


def test_the_probe_images_are_the_first_of_each_class() -> None:
    probe = history().probe
    assert probe["labels"].tolist() == list(range(10)) and probe["class_names"].tolist() == list("0123456789")
    assert str(probe["data"]) == "data: scikit-learn digits (not MNIST)"
    assert probe["images"].shape == (10, 28, 28, 1) and probe["images"].dtype == np.uint8
    images, labels = validation_images()
    for label, shown in enumerate(probe["images"][..., 0]):
        first = images[int((labels == label).nonzero()[0]), 0]
        stretched = 255 * (first - first.min()) / (first.max() - first.min())
        np.testing.assert_allclose(shown, stretched, atol=0.51)


def test_frames_hold_the_probe_images_attention() -> None:
    last = load_checkpoint(trained_run().path / "checkpoints" / "last.ckpt")
    (frame,) = [frame for frame in history().frames if frame["step"] == last.step]
    images, labels = validation_images()
    probes = torch.stack([images[int((labels == label).nonzero()[0])] for label in range(10)])
    model = last.build_model()
    layers = explicit_attention(model, probes)
    rollout = np.eye(17)[None]
    for layer, weights in enumerate(layers):
        expected = weights[:, :, 0, 1:].mean(axis=1).reshape(10, 4, 4)
        np.testing.assert_allclose(frame["maps"][:, layer], expected, rtol=1e-4)
        assert frame["entropy"][layer] == pytest.approx(explicit_measures(weights)["entropy"], rel=1e-4)
        assert frame["distance"][layer] == pytest.approx(explicit_measures(weights)["distance"], rel=1e-4)
        rollout = (weights.mean(axis=1) + np.eye(17)) / 2 @ rollout
    np.testing.assert_allclose(frame["rollout"], rollout[:, 0, 1:].reshape(10, 4, 4), rtol=1e-4)
    with torch.no_grad():
        probability, predicted = model(probes).softmax(dim=1).max(dim=1)
    assert frame["predicted"].tolist() == predicted.tolist()
    np.testing.assert_allclose(frame["probability"], probability, rtol=1e-4)


# --- in anybody's project --------------------------------------------------------------------------------------


def test_training_does_not_notice_it(tmp_path: Path) -> None:
    states, flags, draws = [], [], []
    for number, callbacks in enumerate(([], [AttentionLogger()])):
        module = Foreign()
        fit(tmp_path, module, *callbacks, logger=CSVLogger(tmp_path, name=str(number)))
        states.append(module.state_dict())
        flags.append([part.training for part in module.modules()])
        draws.append(torch.rand(3).tolist() + np.random.default_rng(0).random(2).tolist())
        assert module.validated == 2 * IMAGES  # no second pass over the data
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    assert flags[0] == flags[1] and draws[0] == draws[1]


def test_numbers_and_history_with_a_csv_logger_alone(tmp_path: Path) -> None:
    fit(tmp_path, Foreign(), AttentionLogger(per_head_scalars=True), logger=CSVLogger(tmp_path, name="csv", version=""))
    rows = list(csv.DictReader((tmp_path / "csv" / "metrics.csv").open()))
    by_step = {int(row["step"]): row for row in rows if row["vit_entropy/layer_1"]}
    assert list(by_step) == [5, 10]
    kept = kept_in(tmp_path)
    for number, row in enumerate(by_step.values()):
        for measure, layer, head in itertools.product(CURVES, range(2), range(3)):
            value = float(row[f"vit_{measure}_by_head/layer_{layer + 1}_head_{head + 1}"])
            assert value == pytest.approx(kept.validations[number][measure][layer, head])
    assert kept.column("validations", "images").tolist() == [IMAGES, IMAGES]
    assert kept.column("frames", "step").tolist() == [0, 1, 2, 4, 5, 10]
    assert kept.probe["labels"].tolist() == list(range(CLASSES))
    assert str(kept.probe["query"]) == "cls" and np.all(kept.probe["num_keys"] == 10)
    assert kept.frames[0]["maps"].shape == (CLASSES, 2, 3, 3)
    assert [int(entry["step"]) for entry in kept.rows] == [0, 1, 2, 4, 5, 10]
    rows = kept.rows_of(kept.rows[-1])
    assert rows.codes.shape == (CLASSES, 2, 3, 10, 10)
    np.testing.assert_allclose(rows.entropy[:, :, :, 0].mean(axis=0), kept.frames[-1]["entropy"], atol=2e-3)


def test_the_sanity_check_is_quiet(tmp_path: Path) -> None:
    fit(tmp_path, Foreign(), AttentionLogger(early_frames=False), num_sanity_val_steps=2)
    kept = kept_in(tmp_path)
    assert kept.column("validations", "step").tolist() == [5, 10]
    assert kept.column("validations", "images").tolist() == [IMAGES, IMAGES]
    assert kept.column("frames", "step").tolist() == [0, 5, 10]


def test_validation_outside_training_is_quiet(tmp_path: Path) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path,
                      callbacks=[AttentionLogger()])  # fmt: skip
    trainer.validate(Foreign(), loader(), verbose=False)
    assert list(tmp_path.iterdir()) == []


def test_the_model_is_given_by_its_path() -> None:
    with pytest.raises(UserError, match='model=Foreign: give its dotted path, such as "backbone.vit"'):
        AttentionLogger(model=Foreign())  # type: ignore[arg-type]


def test_a_training_without_validation_says_what_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("attention_visualizer.watching.attention_logger.rank_zero_info", told.append)
    images = next(iter(loader()))[0][:3]
    fit(tmp_path, Foreign(), AttentionLogger(probe_images=images), limit_val_batches=0)
    assert any("; without validation only the first batches are watched" in line for line in told)
    told.clear()
    fit(tmp_path / "validated", Foreign(), AttentionLogger(probe_images=images))
    assert told and not any("without validation" in line for line in told)


def test_every_n_epochs(tmp_path: Path) -> None:
    fit(tmp_path, Foreign(), AttentionLogger(every_n_epochs=2, early_frames=False), max_epochs=5)
    kept = kept_in(tmp_path)
    assert kept.column("validations", "step").tolist() == [10, 20]
    assert kept.column("frames", "step").tolist() == [0, 10, 20]


@pytest.mark.parametrize("options", [{"val_check_interval": 2}, {"accumulate_grad_batches": 2}], ids=str)
def test_each_step_is_seen_once(tmp_path: Path, options: dict[str, Any]) -> None:
    fit(tmp_path, Foreign(), AttentionLogger(), **options)
    for part in ("frames", "validations"):
        steps = kept_in(tmp_path).column(part, "step").tolist()
        assert steps == sorted(set(steps)), part


def test_a_validation_limited_to_some_batches(tmp_path: Path) -> None:
    fit(tmp_path, Foreign(), AttentionLogger(), limit_val_batches=2)
    kept = kept_in(tmp_path)
    assert kept.column("validations", "images").tolist() == [10, 10]


@pytest.mark.parametrize("batch", [0, 2])
def test_an_exception_in_validation_is_the_one_that_is_raised(tmp_path: Path, batch: int) -> None:
    flags = []
    for callbacks in ([], [AttentionLogger()]):
        module = Foreign(fail_in_batch=batch)
        with pytest.raises(RuntimeError, match="^broken batch$"):
            fit(tmp_path, module, *callbacks)
        flags.append([part.training for part in module.modules()])
        assert torch._C._len_torch_function_stack() == 0
    assert flags[0] == flags[1]


def test_an_exception_while_the_probes_are_looked_at(tmp_path: Path) -> None:
    """Here while they are looked at for the first time: the module cannot be run, the ViT inside can."""
    module = Foreign(fail_in_eval=True)
    with pytest.raises(UserError, match=r'model="" \(Foreign\).*RuntimeError: broken forward$'):
        fit(tmp_path, module, AttentionLogger(model=""))
    assert module.backbone.training and not module.frozen.training
    with pytest.raises(RuntimeError, match="^broken forward$"):  # in validation, as without the callback
        fit(tmp_path, module, AttentionLogger())


# --- pictures --------------------------------------------------------------------------------------------------


def test_images_go_to_every_logger_that_takes_them(tmp_path: Path) -> None:
    recorder, board = Recorder(), TensorBoardLogger(tmp_path, name="board", version="")
    fit(
        tmp_path,
        Foreign(),
        AttentionLogger(head_grids=1, per_head_scalars=True),
        logger=[recorder, board, CSVLogger(tmp_path)],
        max_epochs=1,
    )
    numbers = {name for step, metrics in recorder.metrics for name in metrics if step == 5}
    assert {"vit_entropy_by_head/layer_2_head_3", "watching/share_of_epoch"} <= numbers
    accumulator = EventAccumulator(str(tmp_path / "board"), size_guidance={"images": 0}).Reload()
    for tag in accumulator.Tags()["images"]:
        for event in accumulator.Images(tag):
            (picture,) = [image for key, step, image in recorder.images if (key, step) == (tag, event.step)]
            with Image.open(io.BytesIO(event.encoded_image_string)) as decoded:
                assert np.array_equal(np.asarray(decoded), picture)
    assert len({tag for tag, _, _ in recorder.images}) == 1 + CLASSES + 1 + 1


def subtitles(folder: Path, monkeypatch: pytest.MonkeyPatch, module: Foreign, **options: Any) -> list[tuple[str, ...]]:
    """(headline, subtitle) of every image's card of one epoch."""
    seen = []
    card = attention_figures.layer_card

    def spying(subject: Any, headline: str, subtitle: str = "") -> Any:
        seen.append((headline, subtitle))
        return card(subject, headline, subtitle)

    monkeypatch.setattr(attention_figures, "layer_card", spying)
    fit(folder, module, AttentionLogger(head_grids=0, **options), logger=Recorder(), max_epochs=1)
    return seen


@pytest.mark.parametrize(
    ("pooling", "words"), [("mean", "attention averaged over patch queries"), ("cls", "CLS attention")]
)
def test_pictures_say_whose_attention_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pooling: str, words: str
) -> None:
    seen = subtitles(tmp_path, monkeypatch, Foreign(pooling))
    assert len(seen) == 5 * CLASSES  # steps 0, 1, 2, 4, 5
    assert all(subtitle.startswith(words) for _, subtitle in seen)
    for number, (headline, _) in enumerate(seen):
        assert re.match(rf"true {number % CLASSES}, predicted \d \(\d+\.\d%\)", headline)
    assert "step 0: " in seen[0][1] and "step 5 (epoch 1)" in seen[-1][1]
    assert ["RANDOM WEIGHTS" in line for _, line in seen] == [True] * CLASSES + [False] * 4 * CLASSES
    query = str(kept_in(tmp_path).probe["query"])
    assert query == ("patches" if pooling == "mean" else "cls")


def test_given_probe_images_take_the_place_of_the_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probes = torch.randn(3, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    options = {"probe_images": probes, "probe_labels": torch.tensor([6, 0, 6])}
    seen = subtitles(tmp_path, monkeypatch, Foreign(), **options)
    assert [headline.split(",")[0] for headline, _ in seen[:3]] == ["true 6", "true 0", "true 6"]
    kept = kept_in(tmp_path)
    assert kept.probe["labels"].tolist() == [6, 0, 6] and kept.frames[0]["maps"].shape[0] == 3


def test_probe_images_without_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probes = torch.randn(3, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    seen = subtitles(tmp_path, monkeypatch, Foreign(), probe_images=probes)
    assert all(re.match(r"predicted \d \(", headline) for headline, _ in seen)


def test_a_model_with_more_classes_than_the_validation_set(tmp_path: Path) -> None:
    module = Foreign()
    with torch.no_grad():
        module.backbone.head.bias[CLASSES - 1] = 50.0  # always predicts a class that has no image
    fit(tmp_path, module, AttentionLogger(), validation=loader(classes=2), logger=Recorder(), max_epochs=1)
    kept = kept_in(tmp_path)
    assert kept.probe["labels"].tolist() == [0, 1]
    assert kept.frames[0]["predicted"].tolist() == [CLASSES - 1] * 2


# --- mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"every_n_epochs": 0}, {"every_n_epochs": -1}, {"head_grids": -1}], ids=str)
def test_values_that_make_no_sense_are_refused_by_name(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(UserError, match=f"AttentionLogger: {name}={options[name]}: give"):
        AttentionLogger(**options)


def test_batches_that_are_not_images_and_labels(tmp_path: Path) -> None:
    images = torch.randn(IMAGES, 1, SIZE, SIZE)
    with pytest.raises(UserError, match="probe_images="):
        fit(tmp_path, Foreign(), AttentionLogger(), validation=DataLoader(TensorDataset(images), batch_size=5))


def test_training_without_validation_asks_for_probe_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="probe_images="):
        new_trainer(tmp_path, AttentionLogger()).fit(Foreign(), loader())
    probes = torch.randn(3, 1, SIZE, SIZE)
    fit(tmp_path, Foreign(), AttentionLogger(probe_images=probes), limit_val_batches=0)
    kept = kept_in(tmp_path)
    assert kept.column("frames", "step").tolist()[:4] == [0, 1, 2, 4] and kept.validations == []
