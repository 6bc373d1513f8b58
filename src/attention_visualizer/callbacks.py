"""AttentionLogger: when attention is looked at during training and where it is written. No maths, no drawing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.seed import isolate_rng
from numpy.typing import NDArray
from torch import Tensor

from attention_visualizer import attention_figures as figures
from attention_visualizer.capture import CapturedAttention, capture
from attention_visualizer.errors import UserError
from attention_visualizer.history import AttentionHistory
from attention_visualizer.observation import Observation, observe
from attention_visualizer.panels import Picture
from attention_visualizer.progress import batches_done
from attention_visualizer.statistics import MEASURES, AttentionStatistics, Summary

MOST_PROBES = 10
HISTORY_NAME = "attention_history.npz"


class AttentionLogger(Callback):
    """Logs a Vision Transformer's attention while it trains, at the validations of every `every_n_epochs`-th epoch.

    Statistics cover the whole validation set and are measured in the validation pass's own forward. Overlays and
    head grids show a fixed probe batch: the first validation image of each class (`probe_images`
    [probe, channel, height, width], as the model takes them, replaces it). `early_frames` adds overlays before training
    and after 1, 2, 4, 8 ... batches of the first epoch. `head_grids` is the number of probe images with a layers x
    heads grid, before training and at validations. Numbers go to every logger, images to those that take images, and
    both to attention_history.npz in the trainer's root folder. Weights train the same to the bit with it and without.
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        early_frames: bool = True,
        head_grids: int = 2,
        probe_images: Tensor | None = None,
        probe_labels: Tensor | None = None,
    ) -> None:
        if every_n_epochs < 1:
            raise UserError(f"callbacks.attention_logger.every_n_epochs={every_n_epochs}: give at least 1")
        if head_grids < 0:
            raise UserError(f"callbacks.attention_logger.head_grids={head_grids}: give 0 or more")
        self.every_n_epochs = every_n_epochs
        self.early_frames = early_frames
        self.head_grids = head_grids
        self.probe_images = probe_images
        self.probe_labels = probe_labels
        self.history = AttentionHistory()
        self._statistics: AttentionStatistics | None = None
        self._watching = ExitStack()
        self._attention: CapturedAttention | None = None
        self._seconds = 0.0
        self._epoch_began = time.perf_counter()

    # --- when ---

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch_began = time.perf_counter()
        if not trainer.is_global_zero:
            return
        with self._timed():
            path = history_path(trainer)
            resumed = trainer.global_step > 0
            if resumed and path.exists():
                self.history = AttentionHistory.load(path)
                self.history.discard_after(trainer.global_step)
            self._choose_probes(trainer, pl_module)
            if not resumed:
                self._log_frame(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = batch_idx + 1
        power_of_two = done & (done - 1) == 0
        if not (self.early_frames and trainer.current_epoch == 0 and power_of_two and trainer.is_global_zero):
            return
        if done < trainer.num_training_batches:  # the last batch's frame is the validation's
            with self._timed():
                self._log_frame(trainer, pl_module, early=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        due = (trainer.current_epoch + 1) % self.every_n_epochs == 0
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        self._statistics = AttentionStatistics() if fitting and due else None

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._statistics is not None:
            self._attention = self._watching.enter_context(capture(pl_module, consume=self._statistics.update))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._watching.close()
        if self._attention is not None:
            self._seconds += self._attention.seconds
            self._attention = None

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._statistics is None:
            return
        with self._timed():
            self._reduce_over_processes(trainer)
            if trainer.is_global_zero:
                self._log_statistics(trainer, self._statistics.compute())
                self._log_frame(trainer, pl_module)
                self.history.save(history_path(trainer))
            self._statistics = None
        if trainer.is_global_zero:
            now = time.perf_counter()
            share = self._seconds / max(now - self._epoch_began, 1e-9)
            cost = {"attention_logger/seconds": self._seconds, "attention_logger/share_of_epoch": share}
            _log_numbers(trainer, cost)
            self._seconds, self._epoch_began = 0.0, now

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.history.frames and trainer.is_global_zero:
            self.history.save(history_path(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.history.frames and trainer.is_global_zero:
            self.history.save(history_path(trainer))
        # Handed through, so that it, and not an incomplete capture, is what is reported.
        self._watching.__exit__(type(exception), exception, exception.__traceback__)

    # --- what ---

    def _choose_probes(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.probe_images is None:
            # Looking through a loader draws random numbers, which training must not notice.
            with isolate_rng():
                self.probe_images, self.probe_labels = first_of_each_class(trainer.val_dataloaders)
        images = self.probe_images
        labels = torch.full((len(images),), -1) if self.probe_labels is None else self.probe_labels
        self.probe_images, self.probe_labels = images.to(pl_module.device), labels
        description = getattr(getattr(trainer, "datamodule", None), "description", None)
        names = getattr(description, "class_names", None) or [str(label) for label in range(int(labels.max()) + 1)]
        self.history.probe = {
            "images": displayable(images),
            "labels": labels.cpu().numpy(),
            "class_names": np.array(names),
            "data": np.array(getattr(description, "face_note", "")),
        }

    def _log_frame(self, trainer: Trainer, pl_module: LightningModule, early: bool = False) -> None:
        """Looks at the probe images and writes what is seen: to the history, to the loggers as pictures.

        An early frame has no head grids, which cost the most.
        """
        assert self.probe_images is not None
        if self.history.frames and self.history.frames[-1]["step"] == trainer.global_step:
            return  # a validation right after an early frame, or a batch of accumulated gradients
        training = [module for module in pl_module.modules() if module.training]
        pl_module.eval()
        try:
            with isolate_rng():
                seen = observe(pl_module, self.probe_images)
        finally:
            for module in training:
                module.training = True
        probe = self.history.probe
        if "num_keys" not in probe:  # the first look at this model
            probe |= {"num_keys": np.array(seen.geometry.num_tokens), "query": np.array(str(seen.query))}
            _add_chart_layout(trainer, seen.entropy.shape[1])
        self.history.frames.append(
            {
                "step": np.array(trainer.global_step),
                "epoch": np.array(progress_in_epochs(trainer)),
                "maps": seen.head_maps.mean(axis=2),
                "rollout": seen.rollouts[:, -1],
                "entropy": seen.entropy.mean(axis=0),
                "distance": seen.distance.mean(axis=0),
                "predicted": seen.predicted,
                "probability": seen.probability,
            }
        )
        if any(takes_images(logger) for logger in trainer.loggers):
            self._log_pictures(trainer, seen, early)

    def _log_pictures(self, trainer: Trainer, seen: Observation, early: bool) -> None:
        probe = self.history.probe
        names, note = [str(name) for name in probe["class_names"]], str(probe["data"])
        moment = figures.moment(progress_in_epochs(trainer), trainer.global_step)
        for number, label in enumerate(probe["labels"]):
            true_class = names[label] if label >= 0 else None
            subject = figures.Subject.of(seen, number, probe["images"][number], true_class, names)
            tag = f"probe_{number}" if true_class is None else f"probe_{number}_class_{true_class}"
            subtitle = f"{figures.query_name(seen.query)}, {moment}"
            _log_picture(
                trainer, f"attention_overlay/{tag}", figures.overlay_strip(subject, subject.verdict, subtitle, note)
            )
            if number < self.head_grids and not early:
                _log_picture(
                    trainer, f"attention_heads/{tag}", figures.head_grid(subject, subject.verdict, subtitle, note)
                )

    def _log_statistics(self, trainer: Trainer, summaries: dict[str, Summary]) -> None:
        numbers: dict[str, float] = {}
        for measure in MEASURES:
            summary = summaries[measure.name]
            for layer, heads in enumerate(summary.mean, start=1):
                group = f"attention_{measure.name}/layer_{layer}"
                numbers[f"{group}_mean"] = float(heads.mean())
                numbers |= {f"{group}_head_{head}": float(mean) for head, mean in enumerate(heads, start=1)}
        _log_numbers(trainer, numbers)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                _log_histograms(logger, summaries, trainer.global_step)
        entropy = summaries["entropy"]
        headline = f"attention entropy, mean over {entropy.n:,} validation images"
        picture = figures.entropy_heat_map(entropy.mean, entropy.edges[-1], headline, str(self.history.probe["data"]))
        _log_picture(trainer, "attention_entropy_heat_map", picture)
        entry = {name: summary.mean for name, summary in summaries.items()}
        self.history.validations.append(
            entry
            | {
                "step": np.array(trainer.global_step),
                "epoch": np.array(progress_in_epochs(trainer)),
                "images": np.array(summaries["entropy"].n),
            }
        )

    def _reduce_over_processes(self, trainer: Trainer) -> None:
        assert self._statistics is not None
        if trainer.world_size > 1:
            for distributions in self._statistics.distributions.values():
                for distribution in distributions:
                    for sums in distribution.state():
                        sums.copy_(trainer.strategy.reduce(sums, reduce_op="sum"))
                    distribution.largest = trainer.strategy.reduce(distribution.largest, reduce_op="max")
                    distribution.smallest = -trainer.strategy.reduce(-distribution.smallest, reduce_op="max")

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - began


def history_path(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / HISTORY_NAME


def progress_in_epochs(trainer: Trainer) -> float:
    """How far training has come, in epochs: 0.25 a quarter through the first."""
    return batches_done(trainer) / max(1, trainer.num_training_batches)


def first_of_each_class(loaders: Any) -> tuple[Tensor, Tensor]:
    """The probe rule: the first image of each class in the validation set's own order, by class, at most ten."""
    found: dict[int, Tensor] = {}
    if not loaders:
        raise UserError("AttentionLogger: there is no validation data to choose images from: pass probe_images=")
    loader = loaders[0] if isinstance(loaders, list | tuple) else loaders
    for batch in loader:
        if not (isinstance(batch, list | tuple) and len(batch) >= 2):
            raise UserError("AttentionLogger: validation batches are not (images, labels): pass probe_images=")
        for image, label in zip(batch[0], batch[1].tolist(), strict=True):
            found.setdefault(int(label), image)
        if len(found) >= MOST_PROBES:
            break
    labels = sorted(found)[:MOST_PROBES]
    return torch.stack([found[label] for label in labels]), torch.tensor(labels)


def displayable(images: Tensor) -> NDArray[np.uint8]:
    """Model inputs as pictures, each stretched from its darkest to its lightest value: [n, height, width, channel]."""
    low = images.amin(dim=(1, 2, 3), keepdim=True)
    high = images.amax(dim=(1, 2, 3), keepdim=True)
    scaled = (images - low) / (high - low).clamp_min(1e-12)
    return (scaled * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def _log_numbers(trainer: Trainer, numbers: dict[str, float]) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(numbers, step=trainer.global_step)


def _log_picture(trainer: Trainer, tag: str, picture: Picture) -> None:
    takers = [logger for logger in trainer.loggers if takes_images(logger)]
    if not takers:
        return
    rgb = picture.to_rgb()
    for logger in takers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, rgb, trainer.global_step, dataformats="HWC")
        else:
            logger.log_image(key=tag, images=[rgb], step=trainer.global_step)  # type: ignore[attr-defined]


def takes_images(logger: Logger) -> bool:
    """TensorBoard, and the loggers with Lightning's log_image (Weights & Biases and others)."""
    return isinstance(logger, TensorBoardLogger) or hasattr(logger, "log_image")


def _log_histograms(logger: TensorBoardLogger, summaries: dict[str, Summary], step: int) -> None:
    """One histogram a layer and measure, over images and heads, straight from the streamed counts."""
    for name, summary in summaries.items():
        for layer, counts in enumerate(summary.counts.sum(axis=1), start=1):
            filled = np.flatnonzero(counts)
            first, last = int(filled[0]), int(filled[-1])
            centers = (summary.edges[:-1] + summary.edges[1:]) / 2
            logger.experiment.add_histogram_raw(
                f"attention_{name}_distribution/layer_{layer}",
                min=summary.edges[first],
                max=summary.edges[last + 1],
                num=int(counts.sum()),
                sum=float((counts * centers).sum()),
                sum_squares=float((counts * centers**2).sum()),
                bucket_limits=summary.edges[first + 1 : last + 2].tolist(),
                bucket_counts=counts[first : last + 1].tolist(),
                global_step=step,
            )


def _add_chart_layout(trainer: Trainer, num_layers: int) -> None:
    """TensorBoard's Custom Scalars: all layers, or a layer's heads, in one chart."""
    layout = {
        f"{measure.label} ({measure.unit})": {
            "all layers, mean over heads": ["Multiline", [rf"attention_{measure.name}/layer_\d+_mean"]],
            **{
                f"layer {layer}, each head": ["Multiline", [rf"attention_{measure.name}/layer_{layer}_head_\d+"]]
                for layer in range(1, num_layers + 1)
            },
        }
        for measure in MEASURES
    }
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_custom_scalars(layout)
