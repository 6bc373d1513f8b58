"""What each logger gets is what the history has: read back from real files."""

from __future__ import annotations

import csv
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from attention_visualizer.runs.history import AttentionHistory
from attention_visualizer.watching.attention_logger import AttentionLogger
from attention_visualizer.watching.loggers import takes_images
from tests.helpers.trainers import CURVES, Recorder, Steps, attention_warnings, fit, kept_in, loader, vit

STEPS = [0, 1, 2, 4, 5, 10]
PROBES = torch.stack([loader().dataset[number][0] for number in range(2)])


def train(folder: Path, logger: Any) -> AttentionHistory:
    torch.manual_seed(5)
    callback = AttentionLogger(
        head_grids=1, per_head_scalars=True, probe_images=PROBES, probe_labels=torch.tensor([0, 1])
    )
    fit(folder, Steps(vit()), callback, logger=logger)
    return kept_in(folder)


def numbers_of(kept: AttentionHistory, validation: int) -> dict[str, float]:
    """As they are logged, by tag."""
    return {
        f"vit_{measure}_by_head/layer_{layer + 1}_head_{head + 1}": float(value)
        for measure in CURVES
        for (layer, head), value in np.ndenumerate(kept.validations[validation][measure])
    }


PICTURES = {
    "attention_1_maps/all_images": STEPS,
    "attention_2_layers/class_0": STEPS,
    "attention_2_layers/class_1": STEPS,
    "attention_3_heads/class_0": [0, 5, 10],
    "attention_4_entropy/layers_x_heads": [5, 10],
}


def test_the_other_package_of_lightning(tmp_path: Path) -> None:
    """pytorch_lightning has the same classes once more: what is logged is the same."""

    class Same(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = vit()

        training_step, validation_step = Steps.training_step, Steps.validation_step
        configure_optimizers = Steps.configure_optimizers

        def loss(self, batch: Any) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    tags = []
    for package, module in ((lightning.pytorch, Steps(vit())), (pytorch_lightning, Same())):
        folder = tmp_path / package.__name__
        logger = package.loggers.TensorBoardLogger(folder, name="board", version="")
        plain = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        trainer = package.Trainer(
            default_root_dir=folder, logger=logger, max_epochs=1, accelerator="cpu", **plain,
            callbacks=[AttentionLogger(probe_images=PROBES)],
        )  # fmt: skip
        with attention_warnings() as lines:
            trainer.fit(module, loader(), loader())
        assert lines == []
        tags.append(EventAccumulator(str(folder / "board"), size_guidance={"images": 0}).Reload().Tags())
    assert tags[0] == tags[1]
    assert all(tags[1][kind] for kind in ("scalars", "images", "histograms"))


def test_every_number_and_picture_says_what_it_is(tmp_path: Path) -> None:
    train(tmp_path, TensorBoardLogger(tmp_path, name="board", version=""))
    board = EventAccumulator(str(tmp_path / "board"), size_guidance={"images": 0, "histograms": 0}).Reload()
    ours = [tag for kind in ("scalars", "images", "histograms") for tag in board.Tags()[kind]]
    ours = [tag for tag in ours if tag.startswith(("attention_", "vit_", "watching"))]
    assert len(ours) > 20
    told = {tag: board.SummaryMetadata(tag).summary_description for tag in ours}
    assert [tag for tag, text in told.items() if len(text) < 30] == []
    assert told["vit_distance/layer_1"].startswith("mean attention distance (pixels), layer 1: ")


@pytest.mark.parametrize("name", ["TensorBoardLogger", "MLFlowLogger", "WandbLogger"])
@pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning])
def test_loggers_of_both_packages_take_images(package: Any, name: str) -> None:
    kind = getattr(package.loggers, name)
    for each in (kind, type("Own", (kind,), {})):
        assert takes_images(each.__new__(each))
    assert not takes_images(package.loggers.CSVLogger.__new__(package.loggers.CSVLogger))


def test_tensorboard(tmp_path: Path) -> None:
    kept = train(tmp_path, TensorBoardLogger(tmp_path, name="board", version=""))
    read = EventAccumulator(str(tmp_path / "board"), size_guidance={"images": 0, "scalars": 0}).Reload()
    assert {tag: [event.step for event in read.Images(tag)] for tag in read.Tags()["images"]} == PICTURES
    for number, step in enumerate((5, 10)):
        for tag, value in numbers_of(kept, number).items():
            (found,) = [event.value for event in read.Scalars(tag) if event.step == step]
            assert found == pytest.approx(value, rel=1e-6)


def test_csv(tmp_path: Path) -> None:
    kept = train(tmp_path, CSVLogger(tmp_path, name="csv", version=""))
    rows = list(csv.DictReader((tmp_path / "csv" / "metrics.csv").open()))
    for number, step in enumerate((5, 10)):
        (row,) = [row for row in rows if row["step"] == str(step) and row["vit_entropy/layer_1"]]
        assert {tag: float(row[tag]) for tag in numbers_of(kept, number)} == pytest.approx(numbers_of(kept, number))


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(offline=True, save_dir=tmp_path, project="any")
    kept = train(tmp_path, logger)
    wandb.teardown()  # waits until all is written
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    rows = wandb_rows(next(folder.glob("*.wandb")))
    pictures: dict[str, list[int]] = {}
    for row in rows:
        for key, value in row.items():
            if isinstance(value, dict) and value.get("_type") == "images/separated":
                pictures.setdefault(key, []).append(row["trainer/global_step"])
                for name in value["filenames"]:
                    with Image.open(folder / "files" / name) as picture:
                        assert picture.size == (value["width"], value["height"]) and np.asarray(picture).std() > 1
    assert pictures == PICTURES
    for number, step in enumerate((5, 10)):
        (row,) = [row for row in rows if row.get("trainer/global_step") == step and "vit_entropy/layer_1" in row]
        assert {tag: row[tag] for tag in numbers_of(kept, number)} == pytest.approx(numbers_of(kept, number))


def wandb_rows(path: Path) -> list[dict[str, Any]]:
    """What was logged, a dictionary for each call."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for data in wandb_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            row: dict[str, Any] = {}
            for item in record.history.item:
                *outer, name = item.nested_key or [item.key]
                (row.setdefault(outer[0], {}) if outer else row)[name] = json.loads(item.value_json)
            rows.append(row)
    return rows


def wandb_records(content: bytes) -> Iterator[bytes]:
    """LevelDB's log format: blocks of 32 KiB, of parts with a checksum, a length, and 1 whole or 2 first ... 4 last."""
    position, parts = 7, []  # behind the file's own header
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        parts.append(content[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []


def test_mlflow(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    from lightning.pytorch.loggers import MLFlowLogger

    logger = MLFlowLogger(
        tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}", artifact_location=(tmp_path / "artifacts").as_uri()
    )
    kept = train(tmp_path, logger)
    client, run = logger.experiment, logger.run_id
    for number, step in enumerate((5, 10)):
        for tag, value in numbers_of(kept, number).items():
            (found,) = [each.value for each in client.get_metric_history(run, tag) if each.step == step]
            assert found == pytest.approx(value)
    pictures = [path for path in (tmp_path / "artifacts").rglob("*.png") if "compressed" not in path.name]
    assert len(pictures) == sum(len(steps) for steps in PICTURES.values())
    for path in pictures:
        with Image.open(path) as picture:
            assert np.asarray(picture).std() > 1
    names = [path.name.replace("#", "~") for path in pictures]  # in place of a slash, by version
    for tag, steps in PICTURES.items():
        assert sum(name.startswith(tag.replace("/", "~")) for name in names) == len(steps), names


# --- several, none, broken -------------------------------------------------------------------------------------


class Broken(Recorder):
    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        raise ConnectionError("the service is away\nTraceback ...")


def test_a_logger_that_fails_takes_nothing_from_the_others(tmp_path: Path) -> None:
    broken, whole = Broken(), Recorder()
    with attention_warnings() as lines:
        train(tmp_path, [broken, whole, CSVLogger(tmp_path)])
    assert lines == ["AttentionLogger: Broken gets no more images: the service is away"]
    found: dict[str, list[int]] = {}
    for tag, step, _ in whole.images:
        found.setdefault(tag, []).append(step)
    assert found == PICTURES
    for logger in (broken, whole):  # numbers come all the same
        assert [step for step, metrics in logger.metrics if "vit_entropy/layer_1" in metrics] == [5, 10]


def test_no_logger_draws_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attention_visualizer.figures.attention_figures.probe_card", None)
    kept = train(tmp_path, False)
    assert kept.column("frames", "step").tolist() == STEPS and len(kept.validations) == 2
