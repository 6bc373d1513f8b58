"""TensorBoard for one run: its events lie in the run's folder, and each number says what it is."""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import loggers
from omegaconf import DictConfig, OmegaConf

from attention_visualizer.runs.config_fields import field_named
from attention_visualizer.training.schemas import CLASSES
from attention_visualizer.watching.loggers import log_described_scalars

DESCRIPTIONS = {
    "train/loss": "training loss (label smoothing included) of every tenth batch",
    "train/accuracy": "accuracy on the training images of an epoch, augmented as they were trained on",
    "train/learning_rate": "learning rate: linear warm-up, then cosine decay",
    "validation/loss": "cross-entropy on the validation set",
    "validation/accuracy": "accuracy on the validation set; the best epoch's weights are best.ckpt",
    "validation/best_accuracy": "accuracy on the validation set of best.ckpt",
    "test/loss": "cross-entropy of best.ckpt on the test set, measured once",
    "test/accuracy": "accuracy of best.ckpt on the test set, measured once",
}
#: What the HParams tab shows of every run, beside what differs from the defaults.
SHOWN = (
    *("model.embed_dim", "model.num_heads", "model.num_layers", "model.patch_size", "optimizer.learning_rate"),
    *("optimizer.weight_decay", "data.name", "data.batch_size", "trainer.max_epochs", "seed"),
)


class TensorBoardLogger(loggers.TensorBoardLogger):
    """Lightning's, without its curve of the epoch's number and its copy of the configuration."""

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        scalars = {name: float(value) for name, value in metrics.items() if name != "epoch"}
        log_described_scalars(self, scalars, 0 if step is None else step, DESCRIPTIONS)

    def save(self) -> None:
        self.experiment.flush()


def wait_for_a_later_second(folder: Path) -> None:
    """Wait until a new file of events sorts behind those in `folder`, whose names begin with the second they began in.

    TensorBoard reads them in the order of their names, which go on with the process: of two in one second the resumed
    run's may come first, and what it replaces would be shown beside it.
    """
    began = [re.match(r"events\.out\.tfevents\.(\d+)\.", path.name) for path in folder.glob("events.out.tfevents.*")]
    newest = max((int(each[1]) for each in began if each), default=0)
    give_up = time.time() + 2  # of a clock that was set back
    while time.time() < min(newest + 1, give_up):
        time.sleep(0.01)


def shown_parameters(config: DictConfig) -> dict[str, Any]:
    """Return the settings that the HParams tab shows, by dotted name."""
    names = [*SHOWN]
    for group in ("model", "data", "optimizer", "trainer"):
        defaults = inspect.signature(CLASSES[group]).parameters
        for name, value in config[group].items():
            changed = name in defaults and value != defaults[name].default
            if changed and field_named(f"{group}.{name}").is_hyperparameter:
                names.append(f"{group}.{name}")
    return {name: OmegaConf.select(config, name) for name in dict.fromkeys(names)}
