"""What goes to which of Lightning's loggers: scalars to all, images to those that take them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attention_visualizer.figures.panels import PanelFigure, encode_png
from attention_visualizer.measures.streaming import LOGGED_MEASURES, MeasureSummary
from attention_visualizer.watching.lightning_internals import add_summary, is_kind, is_tensorboard
from attention_visualizer.watching.lightning_package import Logger, TensorBoardLogger
from attention_visualizer.watching.log_guard import LogGuard


class Loggers:
    """The loggers of a trainer. One that fails at something is not asked for it again; training goes on."""

    def __init__(self, loggers: Sequence[Logger] = (), guard: LogGuard | None = None) -> None:
        self.loggers = list(loggers)
        self.guard = guard or LogGuard()

    @property
    def take_images(self) -> bool:
        return any(takes_images(logger) for logger in self.loggers)

    @contextmanager
    def fast_checksums(self) -> Iterator[None]:
        """Write TensorBoard's event files without its slow checksums, inside the block."""
        with ExitStack() as stack:
            if any(map(is_tensorboard, self.loggers)):
                with suppress(ImportError, AttributeError):  # of another TensorBoard, whose own are slower, no more
                    from attention_visualizer.watching.event_checksums import fast_checksums

                    stack.enter_context(fast_checksums())
            yield

    def log_scalars(self, scalars: dict[str, float], step: int) -> None:
        for logger in self.loggers:
            self.guard.attempt(logger, "numbers", partial(logger.log_metrics, scalars, step=step))

    def log_figure(self, tag: str, figure: PanelFigure, step: int) -> None:
        if self.take_images:
            rgb = figure.to_rgb()
            for logger in filter(takes_images, self.loggers):
                self.guard.attempt(logger, "images", partial(log_image, logger, tag, rgb, step))

    def log_histograms(self, summaries: dict[str, MeasureSummary], step: int) -> None:
        self._for_tensorboard("histograms", lambda logger: log_histograms(logger, summaries, step))

    def log_chart_layout(self, num_layers: int) -> None:
        """Put all layers, or a layer's heads, into one chart: TensorBoard's Custom Scalars."""
        layout = chart_layout(num_layers)
        self._for_tensorboard("charts", lambda logger: logger.experiment.add_custom_scalars(layout))

    def _for_tensorboard(self, kind: str, write: Callable[[TensorBoardLogger], None]) -> None:
        for logger in self.loggers:
            if is_tensorboard(logger):
                self.guard.attempt(logger, kind, partial(write, logger))


def flush(loggers: Sequence[Logger]) -> None:
    """Bring all that was logged to the disk, where a kill does not reach it."""
    for logger in loggers:
        logger.save()


def takes_images(logger: Logger) -> bool:
    """Whether it takes images, as TensorBoard, MLflow and loggers with Lightning's log_image do."""
    return is_tensorboard(logger) or is_kind(logger, "MLFlowLogger") or hasattr(logger, "log_image")


def log_image(logger: Any, tag: str, rgb: NDArray[np.uint8], step: int) -> None:
    """Log an image, `rgb`: [height, width, 3]."""
    if is_tensorboard(logger):
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

        # Encoded here: add_image takes three times as long, and so does PNG's usual search for the best filter.
        image = Summary.Image(
            height=rgb.shape[0], width=rgb.shape[1], colorspace=3, encoded_image_string=encode_png(rgb)
        )
        add_summary(logger, Summary(value=[Summary.Value(tag=tag, image=image)]), step)
    elif is_kind(logger, "MLFlowLogger"):
        logger.experiment.log_image(logger.run_id, rgb, key=tag, step=step)
    else:
        logger.log_image(key=tag, images=[rgb], step=step)


def scalars_of(summaries: dict[str, MeasureSummary]) -> dict[str, float]:
    """Return each measure's mean for each layer and head, and for each layer, by tag."""
    scalars: dict[str, float] = {}
    for measure in LOGGED_MEASURES:
        for layer, means in enumerate(summaries[measure.name].mean, start=1):
            heads = {head: float(mean) for head, mean in enumerate(means, start=1) if not np.isnan(mean)}
            if not heads:
                continue  # a measure that this layer does not have
            group = f"attention_{measure.name}/layer_{layer}"
            scalars[f"{group}_mean"] = sum(heads.values()) / len(heads)
            scalars |= {f"{group}_head_{head}": mean for head, mean in heads.items()}
    return scalars


def log_histograms(logger: TensorBoardLogger, summaries: dict[str, MeasureSummary], step: int) -> None:
    """Log one histogram for each layer and measure, over images and heads, straight from the streamed counts."""
    for name, summary in summaries.items():
        for layer, counts in enumerate(summary.counts.sum(axis=1), start=1):
            filled = np.flatnonzero(counts)
            if not len(filled):
                continue  # a measure that this layer does not have
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


def chart_layout(num_layers: int) -> dict[str, dict[str, list[Any]]]:
    """Return a layout of charts as SummaryWriter.add_custom_scalars takes it."""
    return {
        f"{measure.label} ({measure.unit})": {
            "all layers, mean over heads": ["Multiline", [rf"attention_{measure.name}/layer_\d+_mean"]],
            **{
                f"layer {layer}, each head": ["Multiline", [rf"attention_{measure.name}/layer_{layer}_head_\d+"]]
                for layer in range(1, num_layers + 1)
            },
        }
        for measure in LOGGED_MEASURES
    }
