"""AttentionLogger: when attention is looked at during training and where it is written. No maths, no drawing."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.attention.model_search import FoundModel, find_model
from attention_visualizer.figures import attention_figures as figures
from attention_visualizer.measures.observation import Observation, observe
from attention_visualizer.measures.streaming import MEASURES, AttentionStatistics, MeasureSummary
from attention_visualizer.runs.history import AttentionHistory
from attention_visualizer.support.errors import UserError, summary
from attention_visualizer.support.training_progress import batches_done
from attention_visualizer.watching.loggers import Loggers
from attention_visualizer.watching.probes import check_probes, displayable, first_of_each_class
from attention_visualizer.watching.validation import ValidationWatch

HISTORY_NAME = "attention_history.npz"


class AttentionLogger(Callback):
    """Logs a Vision Transformer's attention while it trains, at the validations of every `every_n_epochs`-th epoch.

    It goes into any LightningModule that contains one: `model` is its dotted path in the module, None to find it;
    `geometry` says where its tokens lie, for one that does not state it.

    Statistics cover the whole validation set and are measured in the validation pass's own forward. Overlays and
    head grids show a fixed probe batch: the first validation image of each class (`probe_images`
    [probe, channel, height, width], as the model takes them, and `probe_labels` [probe] replace it). `early_frames`
    adds overlays before training and after 1, 2, 4, 8 ... batches of the first epoch. `head_grids` is the number of
    probe images with a layers x heads grid, before training and at validations. Numbers go to every logger, images to
    those that take images, and both to attention_history.npz in the trainer's root folder. Weights train the same to
    the bit with it and without.

    What the user can mend is a UserError before training begins; after that, what cannot be seen or written is warned
    of, once, and training goes on.
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        early_frames: bool = True,
        head_grids: int = 2,
        probe_images: Tensor | None = None,
        probe_labels: Tensor | None = None,
        model: str | None = None,
        geometry: Geometry | None = None,
    ) -> None:
        if every_n_epochs < 1:
            raise UserError(f"callbacks.attention_logger.every_n_epochs={every_n_epochs}: give at least 1")
        if head_grids < 0:
            raise UserError(f"callbacks.attention_logger.head_grids={head_grids}: give 0 or more")
        if probe_images is not None:
            check_probes(probe_images, probe_labels)
        elif probe_labels is not None:
            raise UserError("probe_labels= are given without probe_images=")
        self.every_n_epochs = every_n_epochs
        self.early_frames = early_frames
        self.head_grids = head_grids
        self.probe_images = probe_images
        self.probe_labels = probe_labels
        self.model = model
        self.geometry = geometry
        self.history = AttentionHistory()
        self._found: FoundModel | None = None
        self._probes: Tensor | None = None
        self._loggers = Loggers(())
        self._validation: ValidationWatch | None = None
        self._watching = ExitStack()
        self._warned: set[str] = set()
        self._saved = (0, 0)  # how many entries of the history are in its file
        self._seconds = 0.0
        self._epoch_began = time.perf_counter()

    # --- when ---

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch_began = time.perf_counter()
        require_unsharded_model(trainer)
        with self._timed():
            with eval_mode(pl_module):
                self._probes, labels = self._choose_probes(trainer, pl_module)
                self._found = find_model(pl_module, self._probes, self.model, self.geometry)
            if not trainer.is_global_zero:
                return
            if self._found.others:
                others = ", ".join(self._found.others)
                rank_zero_info(f'AttentionLogger watches {self._found.name}; others are {others} (model="..." chooses)')
            self._loggers = Loggers(trainer.loggers)
            resumed = trainer.global_step > 0
            self._begin_history(trainer, labels, resumed)
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
            with self._timed(), self._warning_only("frame"):
                self._log_frame(trainer, pl_module, early=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        due = (trainer.current_epoch + 1) % self.every_n_epochs == 0
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        self._validation = ValidationWatch(self._found, self.geometry) if fitting and due and self._found else None

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._validation is not None:
            self._watching.enter_context(self._validation.batch())

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

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._validation is None:
            return
        watch, self._validation = self._validation, None
        with self._timed():
            for kind, remark in watch.remarks().items():
                self._warn(kind, remark)
            measured = bool(watch.statistics.layer_names) and watch.failure is None
            measured = trainer.strategy.reduce_boolean_decision(measured, all=True)
            if measured:
                self._reduce_over_processes(trainer, watch.statistics)
            if trainer.is_global_zero:
                if measured:
                    with self._warning_only("statistics"):
                        self._log_statistics(trainer, watch.statistics.compute())
                with self._warning_only("frame"):
                    self._log_frame(trainer, pl_module)
                self._save_history(trainer)
        self._seconds += watch.seconds
        if trainer.is_global_zero:
            now = time.perf_counter()
            share = self._seconds / max(now - self._epoch_began, 1e-9)
            cost = {"attention_logger/seconds": self._seconds, "attention_logger/share_of_epoch": share}
            self._loggers.numbers(cost, trainer.global_step)
            self._seconds, self._epoch_began = 0.0, now

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._save_history(trainer)  # a run that goes on from this checkpoint misses nothing of what was seen before it

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save_history(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._save_history(trainer)
        # Handed through, so that it, and not an incomplete capture, is what is reported.
        self._watching.__exit__(type(exception), exception, exception.__traceback__)

    # --- what ---

    def _choose_probes(self, trainer: Trainer, pl_module: LightningModule) -> tuple[Tensor, Tensor]:
        """Images as the model takes them, on its device and of its type, and their labels, -1 where unknown."""
        if self.probe_images is None:
            images, labels = first_of_each_class(validation_batches(trainer))
        else:
            images = self.probe_images
            labels = torch.full((len(images),), -1) if self.probe_labels is None else self.probe_labels
        floating = (parameter.dtype for parameter in pl_module.parameters() if parameter.is_floating_point())
        return images.to(pl_module.device, next(floating, torch.float32)), labels

    def _begin_history(self, trainer: Trainer, labels: Tensor, resumed: bool) -> None:
        assert self._probes is not None
        description = getattr(getattr(trainer, "datamodule", None), "description", None)
        names = getattr(description, "class_names", None) or [str(label) for label in range(int(labels.max()) + 1)]
        probe = {
            "images": displayable(self._probes),
            "labels": labels.cpu().numpy(),
            "class_names": np.array(names),
            "data": np.array(getattr(description, "watermark", "")),
        }
        self.history = AttentionHistory()
        path = history_path(trainer)
        if resumed and path.exists():
            self._go_on_with(path, probe, trainer.global_step)
        self.history.probe |= probe

    def _go_on_with(self, path: Path, probe: dict[str, Any], step: int) -> None:
        """The history up to `step`; one that cannot be read, or is of other images, is begun anew."""
        try:
            kept = AttentionHistory.load(path)
        except UserError as error:
            self._warn("history", f"{error}; it is begun anew")
            return
        if all(np.array_equal(kept.probe.get(name, ()), probe[name]) for name in ("images", "labels")):
            self.history = kept
            self.history.discard_after(step)
        else:
            self._warn("history", f"{path} is of other probe images and is begun anew")

    def _save_history(self, trainer: Trainer) -> None:
        entries = len(self.history.frames), len(self.history.validations)
        if entries == self._saved or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        with self._warning_only("history"):
            self.history.save(history_path(trainer))
            self._saved = entries

    def _log_frame(self, trainer: Trainer, pl_module: LightningModule, early: bool = False) -> None:
        """Looks at the probe images and writes what is seen: to the history, to the loggers as pictures.

        An early frame has no head grids, which cost the most.
        """
        assert self._found is not None and self._probes is not None
        if self.history.frames and self.history.frames[-1]["step"] == trainer.global_step:
            return  # a validation right after an early frame, or a batch of accumulated gradients
        with eval_mode(pl_module):
            seen = observe(self._found.runs, self._probes, geometry=self.geometry)
        if not self._found.classifies:
            nothing = np.full_like(seen.predicted, -1), np.full_like(seen.probability, np.nan)
            seen = replace(seen, predicted=nothing[0], probability=nothing[1])
        probe = self.history.probe
        if "num_keys" not in probe:  # the first look at this model
            probe |= {"num_keys": np.array(seen.num_keys), "query": np.array(str(seen.query))}
            self._loggers.chart_layout(seen.entropy.shape[1])
        self.history.frames.append(
            {
                "step": np.array(trainer.global_step),
                "epoch": np.array(progress_in_epochs(trainer)),
                "maps": np.nanmean(seen.head_maps, axis=2),
                **({} if seen.rollouts is None else {"rollout": seen.rollouts[:, -1]}),
                "entropy": seen.entropy.mean(axis=0),
                "distance": seen.distance.mean(axis=0),
                "predicted": seen.predicted,
                "probability": seen.probability,
            }
        )
        if self._loggers.take_images:
            self._log_pictures(trainer, seen, early)

    def _log_pictures(self, trainer: Trainer, seen: Observation, early: bool) -> None:
        probe = self.history.probe
        names, note = [str(name) for name in probe["class_names"]], str(probe["data"])
        moment = figures.moment(progress_in_epochs(trainer), trainer.global_step)
        for number, label in enumerate(probe["labels"]):
            true_class = figures.class_name(names, int(label)) if label >= 0 else None
            subject = figures.ExplainedImage.of(seen, number, probe["images"][number], true_class, names)
            tag = f"probe_{number}" if true_class is None else f"probe_{number}_class_{true_class}"
            subtitle = f"{figures.query_name(seen.query)}, {moment}"
            strip = figures.overlay_strip(subject, subject.verdict, subtitle).with_watermark(note)
            self._loggers.picture(f"attention_overlay/{tag}", strip, trainer.global_step)
            if number < self.head_grids and not early:
                grid = figures.head_grid(subject, subject.verdict, subtitle).with_watermark(note)
                self._loggers.picture(f"attention_heads/{tag}", grid, trainer.global_step)

    def _log_statistics(self, trainer: Trainer, summaries: dict[str, MeasureSummary]) -> None:
        numbers: dict[str, float] = {}
        for measure in MEASURES:
            for layer, means in enumerate(summaries[measure.name].mean, start=1):
                heads = {head: float(mean) for head, mean in enumerate(means, start=1) if not np.isnan(mean)}
                if not heads:
                    continue  # a measure that this layer does not have
                group = f"attention_{measure.name}/layer_{layer}"
                numbers[f"{group}_mean"] = sum(heads.values()) / len(heads)
                numbers |= {f"{group}_head_{head}": mean for head, mean in heads.items()}
        self._loggers.numbers(numbers, trainer.global_step)
        self._loggers.histograms(summaries, trainer.global_step)
        entropy = summaries["entropy"]
        headline = f"attention entropy, mean over {entropy.n:,} validation images"
        picture = figures.entropy_heat_map(entropy.mean, entropy.edges[-1], headline)
        picture = picture.with_watermark(str(self.history.probe["data"]))
        self._loggers.picture("attention_entropy_heat_map", picture, trainer.global_step)
        entry = {name: measured.mean for name, measured in summaries.items()}
        self.history.validations.append(
            entry
            | {
                "step": np.array(trainer.global_step),
                "epoch": np.array(progress_in_epochs(trainer)),
                "images": np.array(summaries["entropy"].n),
            }
        )

    def _reduce_over_processes(self, trainer: Trainer, statistics: AttentionStatistics) -> None:
        if trainer.world_size > 1:
            for distributions in statistics.distributions.values():
                for distribution in distributions:
                    for sums in distribution.state():
                        sums.copy_(trainer.strategy.reduce(sums, reduce_op="sum"))
                    distribution.few = None  # each process has its own
                    distribution.largest = trainer.strategy.reduce(distribution.largest, reduce_op="max")
                    distribution.smallest = -trainer.strategy.reduce(-distribution.smallest, reduce_op="max")

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            rank_zero_warn(f"AttentionLogger: {text}")

    @contextmanager
    def _warning_only(self, kind: str) -> Iterator[None]:
        """Training has begun, and looking at it is no reason to end it."""
        try:
            yield
        except Exception as error:
            self._warn(kind, f"no {kind} this time: {summary(error)}")

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
    """How far training has come, in epochs: 0.25 a quarter through the first. Whole if their length is unknown."""
    if math.isinf(trainer.num_training_batches):
        return float(trainer.current_epoch)
    return batches_done(trainer) / max(1, trainer.num_training_batches)


def validation_batches(trainer: Trainer) -> Iterator[Any]:
    """Of the first validation loader, as the module's validation step gets them: on its device, after its hooks."""
    loader: Any = trainer.val_dataloaders
    while isinstance(loader, list | tuple | dict):
        loader = next(iter(loader.values() if isinstance(loader, dict) else loader), None)
    if loader is None:
        return
    limit = next(iter(trainer.num_val_batches), math.inf)
    for batch in itertools.islice(loader, None if math.isinf(limit) else int(limit)):
        stage = trainer.state.stage
        trainer.state.stage = RunningStage.VALIDATING  # hooks that augment ask for it
        try:
            batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)
        finally:
            trainer.state.stage = stage
        yield batch


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """In eval mode; afterwards each part's mode and the random numbers are as they were."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with isolate_rng():
            yield
    finally:
        for part in training:
            part.training = True


def require_unsharded_model(trainer: Trainer) -> None:
    """Raises UserError where no process has the whole model."""
    strategy = type(trainer.strategy).__name__
    if trainer.world_size > 1 and strategy in ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"):
        raise UserError(f"AttentionLogger cannot look at a model that {strategy} spreads over processes: use ddp")
