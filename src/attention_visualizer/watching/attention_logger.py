"""AttentionLogger: when attention is captured during training and where it is written. No maths, no drawing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.attention.model_search import FoundModel, find_model
from attention_visualizer.data.class_names import declared_class_names
from attention_visualizer.figures import attention_figures as figures
from attention_visualizer.measures.observation import Observation, observe
from attention_visualizer.measures.streaming import LOGGED_MEASURES, AttentionStatistics
from attention_visualizer.runs.folders import HISTORY
from attention_visualizer.runs.history import AttentionHistory
from attention_visualizer.support.errors import UserError, summary
from attention_visualizer.support.eval_mode import eval_mode
from attention_visualizer.support.training_progress import batches_done
from attention_visualizer.watching.log_guard import LogGuard
from attention_visualizer.watching.loggers import Loggers
from attention_visualizer.watching.probes import check_probes, displayable, first_of_each_class, validation_batches
from attention_visualizer.watching.validation import ValidationWatch, ran_out_of_memory


class AttentionLogger(Callback):
    """Log a Vision Transformer's attention while it trains, at the validations of every `every_n_epochs`-th epoch.

    It goes into any LightningModule that contains one: `model` is its dotted path in the module, None to find it;
    `geometry` tells where its tokens lie, for one that does not declare it.

    Statistics cover the whole validation set and are measured in the validation pass's own forward. Overlays and
    head grids show a fixed probe batch: the first validation image of each class (`probe_images`
    [probe, channel, height, width], as the model expects them, and `probe_labels` [probe] replace it). `early_frames`
    adds overlays before training and after 1, 2, 4, 8 ... batches of the first epoch. `head_grids` is the number of
    probe images with a layers x heads grid, before training and at validations. Numbers go to every logger, images to
    those that take images, and both to attention_history.npz in the trainer's root folder. Weights train the same to
    the bit with it and without.

    What the user can correct is a UserError before training begins. Whatever else goes wrong in watching is warned of,
    once for each kind of thing that is then missing, and training goes on; where memory ends, that kind of thing is
    not tried again.
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
        self.log_guard: LogGuard | None = None  # of a run that guards its loggers itself
        self._epoch_began = 0.0
        self._forget_training()

    def _forget_training(self) -> None:
        """Reset what belongs to one training: a callback may serve several, one after the other."""
        self.history = AttentionHistory()
        self._saved = (0, 0)  # numbers of frames and validations in the history's file
        self._found: FoundModel | None = None  # None: nothing is watched
        self._probes: Tensor | None = None
        self._loggers = Loggers()
        self._validation_due = False  # the same in all processes
        self._validation: ValidationWatch | None = None
        self._batch = ExitStack()  # of the validation, while it is watched
        self._process_settings = ExitStack()
        self._warned: set[str] = set()
        self._given_up: set[str] = set()
        self._seconds = 0.0

    # --- when ---

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forget_training()
        self._epoch_began = time.perf_counter()
        require_unsharded_model(trainer)
        with self._timed():
            self._attempt("attention", partial(self._begin, trainer, pl_module), before_training=True)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with eval_mode(pl_module):
            self._probes, labels = self._choose_probes(trainer, pl_module)
            found = find_model(pl_module, self._probes, self.model, self.geometry)
        if trainer.is_global_zero:
            if found.others:
                others = ", ".join(found.others)
                rank_zero_info(f'AttentionLogger captures {found.name}; others are {others} (model="..." chooses)')
            self._loggers = Loggers(trainer.loggers, self.log_guard)
            self._process_settings.enter_context(self._loggers.fast_checksums())
            resumed = trainer.global_step > 0
            declared = declared_class_names(pl_module)
            self._begin_history(trainer, labels, resumed, declared if len(declared) == found.num_classes else ())
        self._found = found
        if trainer.is_global_zero and not resumed:
            self._attempt("frame", partial(self._log_frame, trainer, pl_module), before_training=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = batch_idx + 1
        power_of_two = done & (done - 1) == 0
        if not (self.early_frames and trainer.current_epoch == 0 and power_of_two and trainer.is_global_zero):
            return
        if done < trainer.num_training_batches:  # the last batch's frame is the validation's
            with self._timed():
                self._attempt("frame", partial(self._log_frame, trainer, pl_module, early=True))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        self._validation_due = fitting and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        watched = self._validation_due and self._found is not None and "statistics" not in self._given_up
        self._validation = ValidationWatch(self._found, self.geometry) if watched and self._found else None

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._validation is not None:
            self._batch.enter_context(self._validation.batch())

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._batch.close()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._validation_due:
            return
        watch, self._validation = self._validation, None
        self._validation_due = False
        with self._timed():
            # Processes agree, also with one that could not watch, before they add up what they have.
            if trainer.strategy.reduce_boolean_decision(watch is not None and self._accept(watch), all=True):
                assert watch is not None
                self._attempt("statistics", partial(self._log_statistics, trainer, watch.statistics))
            if trainer.is_global_zero:
                self._attempt("frame", partial(self._log_frame, trainer, pl_module))
                self._save_history(trainer)
        if watch is not None:
            self._seconds += watch.seconds
        if trainer.is_global_zero and self._found is not None:
            now = time.perf_counter()
            share = self._seconds / max(now - self._epoch_began, 1e-9)
            cost = {"attention_logger/seconds": self._seconds, "attention_logger/share_of_epoch": share}
            self._loggers.log_scalars(cost, trainer.global_step)
            self._seconds, self._epoch_began = 0.0, now

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._save_history(trainer)  # a run that goes on from this checkpoint has all that was captured before it

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save_history(trainer)
        self._process_settings.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._save_history(trainer)
        self._process_settings.close()
        # Handed through, so that it, and not an incomplete capture, is what is reported.
        self._batch.__exit__(type(exception), exception, exception.__traceback__)

    # --- what ---

    def _choose_probes(self, trainer: Trainer, pl_module: LightningModule) -> tuple[Tensor, Tensor]:
        """Return images in the model's format, device and type, and their labels, -1 where unknown."""
        if self.probe_images is None:
            images, labels = first_of_each_class(validation_batches(trainer))
        else:
            images = self.probe_images
            labels = torch.full((len(images),), -1) if self.probe_labels is None else self.probe_labels
        floating = (parameter.dtype for parameter in pl_module.parameters() if parameter.is_floating_point())
        return images.to(pl_module.device, next(floating, torch.float32)), labels

    def _begin_history(self, trainer: Trainer, labels: Tensor, resumed: bool, declared_names: Sequence[str]) -> None:
        assert self._probes is not None
        description = getattr(getattr(trainer, "datamodule", None), "description", None)
        names = getattr(description, "class_names", None) or declared_names
        names = names or [str(label) for label in range(int(labels.max()) + 1)]
        probe = {
            "images": displayable(self._probes),
            "labels": labels.cpu().numpy(),
            "class_names": np.array(names),
            "data": np.array(getattr(description, "watermark", "")),
        }
        path = history_path(trainer)
        if resumed and path.exists():
            self._load_history(path, probe, trainer.global_step)
        self.history.probe |= probe

    def _load_history(self, path: Path, probe: dict[str, Any], step: int) -> None:
        """Go on with the history up to `step`; one that cannot be read, or is of other images, is begun anew."""
        try:
            history = AttentionHistory.load(path)
        except UserError as error:
            self._warn("earlier history", f"{error}; a new one is started")
            return
        if all(np.array_equal(history.probe.get(name, ()), probe[name]) for name in ("images", "labels")):
            self.history = history
            self.history.discard_after(step)
        else:
            self._warn("earlier history", f"{path} is of other probe images, a new one is started")

    def _save_history(self, trainer: Trainer) -> None:
        entries = len(self.history.frames), len(self.history.validations)
        if entries == self._saved or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return

        def save() -> None:
            self.history.save(history_path(trainer))
            self._saved = entries

        self._attempt("history", save)

    def _log_frame(self, trainer: Trainer, pl_module: LightningModule, early: bool = False) -> None:
        """Observe the probe images and write that to the history and, as figures, to the loggers.

        An early frame has no head grids, which cost the most.
        """
        if self._found is None or self._probes is None:
            return
        if self.history.frames and self.history.frames[-1]["step"] == trainer.global_step:
            return  # a validation right after an early frame, or a batch of accumulated gradients
        with eval_mode(pl_module):
            observation = observe(self._found.runs, self._probes, geometry=self.geometry)
        if not self._found.num_classes:
            nothing = np.full_like(observation.predicted, -1), np.full_like(observation.probability, np.nan)
            observation = replace(observation, predicted=nothing[0], probability=nothing[1])
        probe = self.history.probe
        if "num_keys" not in probe:  # the first frame of this model
            probe |= {"num_keys": np.array(observation.num_keys), "query": np.array(str(observation.query))}
            self._loggers.log_chart_layout(observation.entropy.shape[1])
        self.history.frames.append(
            {
                "step": np.array(trainer.global_step),
                "epoch": np.array(progress_in_epochs(trainer)),
                "maps": np.nanmean(observation.head_maps, axis=2),
                **({} if observation.rollouts is None else {"rollout": observation.rollouts[:, -1]}),
                "entropy": observation.entropy.mean(axis=0),
                "distance": observation.distance.mean(axis=0),
                "predicted": observation.predicted,
                "probability": observation.probability,
            }
        )
        if self._loggers.take_images:
            self._attempt("figures", partial(self._log_probe_figures, trainer, observation, early))

    def _log_probe_figures(self, trainer: Trainer, observation: Observation, early: bool) -> None:
        probe = self.history.probe
        names, watermark = [str(name) for name in probe["class_names"]], str(probe["data"])
        moment = figures.moment(progress_in_epochs(trainer), trainer.global_step)
        for number, label in enumerate(probe["labels"]):
            true_class = figures.class_name(names, int(label)) if label >= 0 else None
            image = figures.ExplainedImage.of(observation, number, probe["images"][number], true_class, names)
            tag = f"probe_{number}" if true_class is None else f"probe_{number}_class_{true_class}"
            subtitle = f"{figures.query_name(observation.query)}, {moment}"
            strip = figures.overlay_strip(image, image.verdict, subtitle).with_watermark(watermark)
            self._loggers.log_figure(f"attention_overlay/{tag}", strip, trainer.global_step)
            if number < self.head_grids and not early:
                grid = figures.head_grid(image, image.verdict, subtitle).with_watermark(watermark)
                self._loggers.log_figure(f"attention_heads/{tag}", grid, trainer.global_step)

    def _accept(self, watch: ValidationWatch) -> bool:
        """Warn of what was unusual in a validation; return whether all of it was measured."""
        if watch.out_of_memory:
            self._given_up.add("statistics")
        for kind, remark in watch.remarks().items():
            self._warn(kind, remark)
        return bool(watch.statistics.layer_names) and watch.failure is None

    def _log_statistics(self, trainer: Trainer, statistics: AttentionStatistics) -> None:
        if trainer.world_size > 1:
            statistics.reduce(trainer.strategy.reduce)
        if not trainer.is_global_zero:
            return
        summaries = statistics.compute()
        scalars: dict[str, float] = {}
        for measure in LOGGED_MEASURES:
            for layer, means in enumerate(summaries[measure.name].mean, start=1):
                heads = {head: float(mean) for head, mean in enumerate(means, start=1) if not np.isnan(mean)}
                if not heads:
                    continue  # a measure that this layer does not have
                group = f"attention_{measure.name}/layer_{layer}"
                scalars[f"{group}_mean"] = sum(heads.values()) / len(heads)
                scalars |= {f"{group}_head_{head}": mean for head, mean in heads.items()}
        self._loggers.log_scalars(scalars, trainer.global_step)
        self._loggers.log_histograms(summaries, trainer.global_step)
        entropy = summaries["entropy"]

        def log_heat_map() -> None:
            headline = f"attention entropy, mean over {entropy.n:,} validation images"
            heat_map = figures.entropy_heat_map(entropy.mean, entropy.edges[-1], headline)
            heat_map = heat_map.with_watermark(str(self.history.probe["data"]))
            self._loggers.log_figure("attention_entropy_heat_map", heat_map, trainer.global_step)

        self._attempt("figures", log_heat_map)
        self.history.validations.append(
            {name: measured.mean for name, measured in summaries.items()}
            | {
                "step": np.array(trainer.global_step),
                "epoch": np.array(progress_in_epochs(trainer)),
                "images": np.array(entropy.n),
            }
        )

    # --- and training goes on ---

    def _attempt(self, kind: str, work: Callable[[], None], before_training: bool = False) -> None:
        """Do `work`; turn an error into a warning, once for each `kind` of output that is missing because of it.

        Raise UserError `before_training`, when the user can still correct it.
        """
        if kind in self._given_up:
            return
        try:
            work()
        except Exception as error:
            if before_training and isinstance(error, UserError):
                raise
            again = "this time"
            if ran_out_of_memory(error):
                self._given_up.add(kind)
                again = "any more"
            self._warn(kind, f"no {kind} {again}: {summary(error)}")

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            rank_zero_warn(f"AttentionLogger: {text}")

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - began


def history_path(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / HISTORY


def progress_in_epochs(trainer: Trainer) -> float:
    """Return how far training has come: 0.25 a quarter through the first epoch; whole if its length is unknown."""
    if math.isinf(trainer.num_training_batches):
        return float(trainer.current_epoch)
    return batches_done(trainer) / max(1, trainer.num_training_batches)


def require_unsharded_model(trainer: Trainer) -> None:
    """Raise UserError where no process has the whole model."""
    strategy = type(trainer.strategy).__name__
    if trainer.world_size > 1 and strategy in ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"):
        raise UserError(
            f"AttentionLogger cannot capture the attention of a model that {strategy} spreads over processes: use ddp"
        )
