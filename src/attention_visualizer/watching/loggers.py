"""What goes to which of Lightning's loggers: numbers to all, pictures to those that take them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial, wraps
from typing import Any
from weakref import WeakSet

import numpy as np
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from numpy.typing import NDArray

from attention_visualizer.figures.panels import PanelFigure, encode_png
from attention_visualizer.measures.streaming import MEASURES, MeasureSummary
from attention_visualizer.support.errors import summary

SILENT: WeakSet[Logger] = WeakSet()  # those that could not write


class Loggers:
    """A trainer's loggers. One that fails is warned of once and gets no more of that kind; training goes on."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.loggers = list(loggers)
        if any(isinstance(logger, TensorBoardLogger) for logger in self.loggers):
            with suppress(ImportError):  # of another TensorBoard, whose own are slower, no more
                from attention_visualizer.watching.event_checksums import use_fast_checksums

                use_fast_checksums()
        self._failed: set[tuple[int, str]] = set()

    def numbers(self, numbers: dict[str, float], step: int) -> None:
        for logger in self.loggers:
            self._guarded(logger, "numbers", partial(logger.log_metrics, numbers, step=step))

    @property
    def take_images(self) -> bool:
        return any(takes_images(logger) for logger in self.loggers)

    def picture(self, tag: str, picture: PanelFigure, step: int) -> None:
        takers = [logger for logger in self.loggers if takes_images(logger)]
        if not takers:
            return
        rgb = picture.to_rgb()
        for logger in takers:
            self._guarded(logger, "images", partial(log_image, logger, tag, rgb, step))

    def histograms(self, summaries: dict[str, MeasureSummary], step: int) -> None:
        """To TensorBoard, whose histograms take counts."""
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                self._guarded(logger, "histograms", partial(log_histograms, logger, summaries, step))

    def chart_layout(self, num_layers: int) -> None:
        """TensorBoard's Custom Scalars: all layers, or a layer's heads, in one chart."""
        layout = chart_layout(num_layers)
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                self._guarded(logger, "charts", partial(add_layout, logger, layout))

    def _guarded(self, logger: Logger, kind: str, write: Callable[[], Any]) -> None:
        if logger in SILENT or (id(logger), kind) in self._failed:
            return
        try:
            write()
        except Exception as error:  # of somebody's service: its network, its disk, its version
            if isinstance(logger, TensorBoardLogger) and isinstance(error, OSError):
                silence(logger, error)
                return
            self._failed.add((id(logger), kind))
            rank_zero_warn(f"AttentionLogger: {type(logger).__name__} gets no more {kind}: {summary(error)}")


def guard(logger: Logger) -> None:
    """From now on, a logger that cannot write (a full disk) is warned of once and left alone; training goes on."""

    def guarded(write: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(write)
        def attempt(*arguments: Any, **named: Any) -> Any:
            if logger in SILENT:
                return None
            try:
                return write(*arguments, **named)
            except Exception as error:  # TensorBoard makes a ValueError of a full disk
                silence(logger, error)

        return attempt

    for name in ("log_metrics", "log_hyperparams", "save", "finalize", "after_save_checkpoint"):
        setattr(logger, name, guarded(getattr(logger, name)))

    if isinstance(logger, TensorBoardLogger):
        threading.excepthook = without_writers(threading.excepthook)


def silence(logger: Logger, error: Exception) -> None:
    SILENT.add(logger)
    rank_zero_warn(f"{type(logger).__name__} writes no more, training goes on: {first_cause(error)}")


def log_figure(logger: TensorBoardLogger, tag: str, figure: Any, step: int) -> None:
    """Of a guarded logger: where it cannot write, nothing happens."""
    if logger not in SILENT:
        try:
            logger.experiment.add_figure(tag, figure, step)
        except OSError as error:
            silence(logger, error)


def first_cause(error: BaseException) -> str:
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return summary(error)


def without_writers(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """TensorBoard's thread hands its errors on to the next call, and shows them as a traceback, too."""

    def shown(arguments: Any) -> None:
        if not (isinstance(arguments.exc_value, OSError) and "Writer" in type(arguments.thread).__name__):
            hook(arguments)

    return shown


def flush(loggers: Sequence[Logger]) -> None:
    """All that was logged goes to the disk, where a kill does not reach it."""
    for logger in loggers:
        logger.save()


def takes_images(logger: Logger) -> bool:
    """TensorBoard, MLflow, and the loggers with Lightning's log_image (Weights & Biases and others)."""
    return isinstance(logger, TensorBoardLogger | MLFlowLogger) or hasattr(logger, "log_image")


def log_image(logger: Any, tag: str, rgb: NDArray[np.uint8], step: int) -> None:
    """rgb: [height, width, 3]."""
    if isinstance(logger, TensorBoardLogger):
        from tensorboard.compat.proto.summary_pb2 import Summary as EventSummary  # type: ignore[import-untyped]

        # Encoded here: add_image takes three times as long, and so does PNG's usual search for the best filter.
        image = EventSummary.Image(
            height=rgb.shape[0], width=rgb.shape[1], colorspace=3, encoded_image_string=encode_png(rgb)
        )
        event = EventSummary(value=[EventSummary.Value(tag=tag, image=image)])
        logger.experiment._get_file_writer().add_summary(event, step)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_image(logger.run_id, rgb, key=tag, step=step)
    else:
        logger.log_image(key=tag, images=[rgb], step=step)


def add_layout(logger: TensorBoardLogger, layout: dict[str, dict[str, list[Any]]]) -> None:
    logger.experiment.add_custom_scalars(layout)


def log_histograms(logger: TensorBoardLogger, summaries: dict[str, MeasureSummary], step: int) -> None:
    """One histogram a layer and measure, over images and heads, straight from the streamed counts."""
    for name, measured in summaries.items():
        for layer, counts in enumerate(measured.counts.sum(axis=1), start=1):
            filled = np.flatnonzero(counts)
            if not len(filled):
                continue  # a measure that this layer does not have
            first, last = int(filled[0]), int(filled[-1])
            centers = (measured.edges[:-1] + measured.edges[1:]) / 2
            logger.experiment.add_histogram_raw(
                f"attention_{name}_distribution/layer_{layer}",
                min=measured.edges[first],
                max=measured.edges[last + 1],
                num=int(counts.sum()),
                sum=float((counts * centers).sum()),
                sum_squares=float((counts * centers**2).sum()),
                bucket_limits=measured.edges[first + 1 : last + 2].tolist(),
                bucket_counts=counts[first : last + 1].tolist(),
                global_step=step,
            )


def chart_layout(num_layers: int) -> dict[str, dict[str, list[Any]]]:
    """As SummaryWriter.add_custom_scalars takes it."""
    return {
        f"{measure.label} ({measure.unit})": {
            "all layers, mean over heads": ["Multiline", [rf"attention_{measure.name}/layer_\d+_mean"]],
            **{
                f"layer {layer}, each head": ["Multiline", [rf"attention_{measure.name}/layer_{layer}_head_\d+"]]
                for layer in range(1, num_layers + 1)
            },
        }
        for measure in MEASURES
    }
