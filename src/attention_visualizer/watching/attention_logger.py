"""AttentionLogger: when attention is captured during training and where it is written. No maths, no drawing."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.attention.inputs import as_input
from attention_visualizer.attention.model_search import FoundModel, find_model
from attention_visualizer.data.class_names import declared_class_names
from attention_visualizer.figures import attention_figures as figures
from attention_visualizer.measures.attention_rows import of_one_layout
from attention_visualizer.measures.observation import Observation, RowOptions, observe
from attention_visualizer.measures.streaming import AttentionStatistics
from attention_visualizer.runs.history import MAX_ROW_BYTES, AttentionHistory
from attention_visualizer.support.errors import UserError
from attention_visualizer.support.training_progress import progress_in_epochs
from attention_visualizer.watching.attempts import Attempts
from attention_visualizer.watching.history_file import HistoryFile, frame_of
from attention_visualizer.watching.lightning_package import Callback, LightningModule, Trainer, rank_zero_info
from attention_visualizer.watching.log_guard import LogGuard
from attention_visualizer.watching.loggers import Loggers, layer_scalars, probe_scalars
from attention_visualizer.watching.padding import share_of_batch
from attention_visualizer.watching.probes import (
    check_probes,
    displayable,
    first_of_each_class,
    flat_loaders,
    images_of_validation,
)
from attention_visualizer.watching.tags import DESCRIPTIONS, image_tags, size_of_attention, where_to_look
from attention_visualizer.watching.unnoticed import unnoticed
from attention_visualizer.watching.validation import ValidationWatch


class AttentionLogger(Callback):
    """Log a Vision Transformer's attention while it trains, at the validations of every `every_n_epochs`-th epoch.

    It goes into any LightningModule that contains one: `model` is its dotted path in the module, None to find it;
    `geometry` tells where its tokens lie, for one that does not declare it.

    Statistics cover the whole validation set and are measured in the validation pass's own forward. Overlays and
    head grids show a fixed probe batch: the first validation image of each class (`probe_images`
    [probe, channel, height, width], as the model expects them, and `probe_labels` [probe] replace it). Where a data set
    does not tell the classes without its images, it is ten images, from the first to the last; where images cannot be
    read without moving the loader, such as a stream's, they are those of the first validation batch. `early_frames`
    adds overlays before training and after 1, 2, 4, 8 ... batches of the first epoch. `head_grids` is the number of
    probe images with a layers x heads grid, before training and at validations. `per_head_scalars` logs each head's
    means beside the layers', which the heat map and the history have in any case. Numbers go to every logger, images to
    those that take images, and both to attention_history.npz in the trainer's root folder (with a number where that is
    another training's). Weights train the same to the bit with it and without; so do loaders, logged values and all
    that the module keeps.

    What the user can correct is a UserError before training begins. Whatever else goes wrong in watching is warned of,
    once for each kind of thing that is then missing, and training goes on; where memory ends, that kind of thing is
    not tried again.
    """

    def __init__(
        self,
        *,
        every_n_epochs: int = 1,
        early_frames: bool = True,
        head_grids: int = 2,
        probe_images: Tensor | None = None,
        probe_labels: Tensor | None = None,
        model: str | None = None,
        geometry: Geometry | None = None,
        per_head_scalars: bool = False,
    ) -> None:
        if every_n_epochs < 1:
            raise UserError(f"AttentionLogger: every_n_epochs={every_n_epochs}: give at least 1")
        if head_grids < 0:
            raise UserError(f"AttentionLogger: head_grids={head_grids}: give 0 or more")
        if model is not None and not isinstance(model, str):
            raise UserError(
                f'AttentionLogger: model={type(model).__name__}: give its dotted path, such as "backbone.vit"'
            )
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
        self.per_head_scalars = per_head_scalars
        self.log_guard: LogGuard | None = None  # of a run that guards its loggers itself
        self.owns_folder = False  # whether the trainer's root folder is this training's alone
        self._epoch_began = 0.0
        self._forget_training()

    def _forget_training(self) -> None:
        """Reset what belongs to one training: a callback may serve several, one after the other."""
        self._file = HistoryFile(Path())
        self._resumed = False
        self._resumed_run: str | None = None  # whose checkpoint training goes on from, where it says so
        self._found: FoundModel | None = None  # None: nothing is watched
        self._probes: Tensor | None = None
        self._checked: tuple[Tensor, Tensor] | UserError | None = None  # what the sanity check has for probes
        self._waits_for_images = False
        self._loggers = Loggers()
        self._validation_due = False  # the same in all processes
        self._validation: ValidationWatch | None = None
        self._batch = ExitStack()  # of the validation, while it is watched
        self._process_settings = ExitStack()
        self._attempts = Attempts()
        self._seconds = 0.0

    @property
    def history(self) -> AttentionHistory:
        return self._file.history

    # --- when ---

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._forget_training()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.owns_folder else {"run": self._file.run}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed_run = state_dict.get("run")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch_began = time.perf_counter()
        self._resumed = trainer.global_step > 0
        require_unsharded_model(trainer)
        with self._timed():
            self._attempts.attempt("attention", partial(self._begin, trainer, pl_module), before_training=True)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        probes = self._choose_probes(trainer, pl_module)
        if probes is None:
            self._waits_for_images = True
            return
        self._watch(trainer, pl_module, *probes)
        if trainer.is_global_zero and not self._resumed:
            self._attempts.attempt("frame", partial(self._log_frame, trainer, pl_module), before_training=True)

    def _watch(self, trainer: Trainer, pl_module: LightningModule, images: Tensor, labels: Tensor) -> None:
        """Find the model with the probe images, and begin the history."""
        self._probes = as_input(images.to(pl_module.device), pl_module)
        with unnoticed(trainer, pl_module):
            found = find_model(pl_module, self._probes, self.model, self.geometry)
        if trainer.is_global_zero:
            if found.others:
                others = ", ".join(found.others)
                rank_zero_info(f'AttentionLogger captures {found.name}; others are {others} (model="..." chooses)')
            self._loggers = Loggers(trainer.loggers, self.log_guard)
            self._process_settings.enter_context(self._loggers.fast_checksums())
            declared = declared_class_names(pl_module)
            self._begin_history(trainer, labels, declared if len(declared) == found.num_classes else ())
        self._found = found

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = batch_idx + 1
        power_of_two = done & (done - 1) == 0
        if not (self.early_frames and trainer.current_epoch == 0 and power_of_two and trainer.is_global_zero):
            return
        if done < trainer.num_training_batches:  # the last batch's frame is the validation's
            with self._timed():
                self._attempts.attempt("frame", partial(self._log_frame, trainer, pl_module, early=True))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        self._validation_due = fitting and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        self._validation = self._new_validation()

    def _new_validation(self) -> ValidationWatch | None:
        if self._found is None or not self._validation_due or "statistics" in self._attempts.given_up:
            return None
        return ValidationWatch(self._found, self.geometry)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.state.fn == "fit" and batch_idx == dataloader_idx == 0:
            with self._timed():
                self._take_images(trainer, pl_module, batch)
        if self._validation is not None:
            share = share_of_batch(flat_loaders(trainer.val_dataloaders)[dataloader_idx], batch_idx)
            self._batch.enter_context(self._validation.batch(share))

    def _take_images(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Take probes from the first validation batch, where they could not be read without it."""
        if trainer.sanity_checking and self.probe_images is None:
            try:
                self._checked = first_of_each_class([batch])
            except UserError as error:
                self._checked = error
        elif self._waits_for_images:
            self._waits_for_images = False

            def watch() -> None:
                self._watch(trainer, pl_module, *first_of_each_class([batch]))
                self._validation = self._new_validation()

            self._attempts.attempt("attention", watch)

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
                self._attempts.attempt("statistics", partial(self._log_statistics, trainer, watch.statistics))
            if trainer.is_global_zero:
                self._attempts.attempt("frame", partial(self._log_frame, trainer, pl_module))
                self._save_history(trainer)
        if watch is not None:
            self._seconds += watch.seconds
        if trainer.is_global_zero and self._found is not None:
            now = time.perf_counter()
            share = self._seconds / max(now - self._epoch_began, 1e-9)
            cost = {"watching/seconds": self._seconds, "watching/share_of_epoch": share}
            self._loggers.log_scalars(cost, trainer.global_step, dict.fromkeys(cost, DESCRIPTIONS["watching"]))
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

    def _choose_probes(self, trainer: Trainer, pl_module: LightningModule) -> tuple[Tensor, Tensor] | None:
        """Return images and their labels, -1 where unknown; None before the first validation, where it has them alone.

        Raise UserError where there are none.
        """
        if self.probe_images is not None:
            unknown = torch.full((len(self.probe_images),), -1)
            return self.probe_images, unknown if self.probe_labels is None else self.probe_labels
        chosen = images_of_validation(trainer, pl_module)
        if chosen is None and isinstance(self._checked, UserError):
            raise self._checked
        return chosen or self._checked  # type: ignore[return-value]

    def _begin_history(self, trainer: Trainer, labels: Tensor, declared_names: Sequence[str]) -> None:
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
        self._file = HistoryFile(Path(trainer.default_root_dir), self.owns_folder)
        if self._resumed:
            try:
                self._file.resume(self._resumed_run, probe, trainer.global_step)
            except UserError as error:
                self._attempts.warn("earlier history", str(error))
        self.history.probe |= probe

    def _save_history(self, trainer: Trainer) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._attempts.attempt("history", self._file.save)

    def _log_frame(self, trainer: Trainer, pl_module: LightningModule, early: bool = False) -> None:
        """Observe the probe images and write that to the history and, as figures, to the loggers.

        An early frame has no head grids, which cost the most.
        """
        if (found := self._found) is None or self._probes is None:
            return
        if self.history.frames and self.history.frames[-1]["step"] == trainer.global_step:
            return  # a validation right after an early frame, or a batch of accumulated gradients
        with unnoticed(trainer, pl_module):
            geometry, gradients = self.geometry, found.needs_gradients
            observation = observe(found.runs, self._probes, None, geometry, None, gradients, RowOptions(MAX_ROW_BYTES))
        if not found.num_classes:
            nothing = np.full_like(observation.predicted, -1), np.full_like(observation.probability, np.nan)
            observation = replace(observation, predicted=nothing[0], probability=nothing[1])
        probe = self.history.probe
        if "num_keys" not in probe:  # the first frame of this model
            probe |= {"num_keys": np.array(observation.num_keys), "query": np.array(str(observation.query))}
            name, command = found.name or "the model", where_to_look(trainer)
            rank_zero_info(f"AttentionLogger: {name}, {size_of_attention(observation)}{command}")
            self._loggers.log_chart_layout(observation.entropy.shape[1], self.per_head_scalars)
        frame = frame_of(observation, trainer.global_step, progress_in_epochs(trainer))
        self.history.add_frame(frame, of_one_layout(observation.rows))
        scalars, descriptions = probe_scalars(frame["entropy"], len(self._probes))
        self._loggers.log_scalars(scalars, trainer.global_step, descriptions)
        if self._loggers.take_images:
            self._attempts.attempt("figures", partial(self._log_probe_figures, trainer, observation, early))

    def _log_probe_figures(self, trainer: Trainer, observation: Observation, early: bool) -> None:
        probe, step = self.history.probe, trainer.global_step
        names, watermark = [str(name) for name in probe["class_names"]], str(probe["data"])
        moment = figures.moment(progress_in_epochs(trainer), step)
        sheet = figures.probe_card(probe, self.history.frames[-1], moment).with_watermark(watermark)
        self._loggers.log_figure("attention_1_maps/all_images", sheet, step, DESCRIPTIONS["maps"])
        tags = image_tags(probe["labels"].tolist(), names)
        for number, (label, tag) in enumerate(zip(probe["labels"], tags, strict=True)):
            true_class = figures.class_name(names, int(label)) if label >= 0 else None
            image = figures.ExplainedImage.of(observation, number, probe["images"][number], true_class, names)
            subtitle = f"{figures.query_name(observation.query)}, {moment}"
            card = figures.layer_card(image, image.verdict, subtitle).with_watermark(watermark)
            self._loggers.log_figure(f"attention_2_layers/{tag}", card, step, DESCRIPTIONS["layers"])
            if number < self.head_grids and not early:
                grid = figures.head_card(image, image.verdict, subtitle).with_watermark(watermark)
                self._loggers.log_figure(f"attention_3_heads/{tag}", grid, step, DESCRIPTIONS["heads"])

    def _accept(self, watch: ValidationWatch) -> bool:
        """Warn of what was unusual in a validation; return whether all of it was measured."""
        if watch.out_of_memory:
            self._attempts.given_up.add("statistics")
        for kind, remark in watch.remarks().items():
            self._attempts.warn(kind, remark)
        return bool(watch.statistics.layer_names) and watch.failure is None

    def _log_statistics(self, trainer: Trainer, statistics: AttentionStatistics) -> None:
        if trainer.world_size > 1:
            statistics.reduce(trainer.strategy.reduce)
        if not trainer.is_global_zero:
            return
        summaries = statistics.compute()
        scalars, descriptions = layer_scalars(summaries, self.per_head_scalars)
        self._loggers.log_scalars(scalars, trainer.global_step, descriptions)
        self._loggers.log_histograms(summaries, trainer.global_step)
        entropy = summaries["entropy"]

        def log_heat_map() -> None:
            moment = figures.moment(progress_in_epochs(trainer), trainer.global_step)
            subtitle = f"{entropy.n:,} validation images, {moment}"
            heat_map = figures.entropy_heat_map(
                entropy.mean, entropy.edges[-1], "Attention entropy of each head", subtitle
            )
            heat_map = heat_map.with_watermark(str(self.history.probe["data"]))
            tag = "attention_4_entropy/layers_x_heads"
            self._loggers.log_figure(tag, heat_map, trainer.global_step, DESCRIPTIONS["entropy"])

        self._attempts.attempt("figures", log_heat_map)
        self.history.validations.append(
            {name: measured.mean for name, measured in summaries.items()}
            | {
                "step": np.array(trainer.global_step),
                "epoch": np.array(progress_in_epochs(trainer)),
                "images": np.array(entropy.n),
            }
        )

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - began


def require_unsharded_model(trainer: Trainer) -> None:
    """Raise UserError where no process has the whole model."""
    strategy = type(trainer.strategy).__name__
    if trainer.world_size > 1 and strategy in ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"):
        raise UserError(
            f"AttentionLogger cannot capture the attention of a model that {strategy} spreads over processes: use ddp"
        )
