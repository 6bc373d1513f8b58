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

# Their names sort behind a project's own loss and accuracy. The mean attention to a patch is the same number as what
# is left of the attention for the class token, and constant without one.
CURVES = tuple(measure for measure in LOGGED_MEASURES if measure.name != "mean")


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

    def log_scalars(self, scalars: dict[str, float], step: int, descriptions: dict[str, str] | None = None) -> None:
        """Log numbers by tag; TensorBoard shows the description of a tag beside it."""
        for logger in self.loggers:
            self.guard.attempt(logger, "numbers", partial(log_scalars, logger, scalars, step, descriptions or {}))

    def log_figure(self, tag: str, figure: PanelFigure, step: int, description: str = "") -> None:
        if self.take_images:
            rgb = figure.to_rgb()
            for logger in filter(takes_images, self.loggers):
                self.guard.attempt(logger, "images", partial(log_image, logger, tag, rgb, step, description))

    def log_histograms(self, summaries: dict[str, MeasureSummary], step: int) -> None:
        self._for_tensorboard("histograms", lambda logger: log_histograms(logger, summaries, step))

    def log_chart_layout(self, num_layers: int, of_heads: bool) -> None:
        """Put all layers, or a layer's heads, into one chart: TensorBoard's Custom Scalars."""
        layout = chart_layout(num_layers, of_heads)
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


def log_image(logger: Any, tag: str, rgb: NDArray[np.uint8], step: int, description: str = "") -> None:
    """Log an image, `rgb`: [height, width, 3]."""
    if is_tensorboard(logger):
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata  # type: ignore[import-untyped]

        # Encoded here: add_image takes three times as long, and so does PNG's usual search for the best filter.
        image = Summary.Image(
            height=rgb.shape[0], width=rgb.shape[1], colorspace=3, encoded_image_string=encode_png(rgb)
        )
        plugin = SummaryMetadata.PluginData(plugin_name="images")
        metadata = SummaryMetadata(summary_description=description, plugin_data=plugin)
        add_summary(logger, Summary(value=[Summary.Value(tag=tag, image=image, metadata=metadata)]), step)
    elif is_kind(logger, "MLFlowLogger"):
        logger.experiment.log_image(logger.run_id, rgb, key=tag, step=step)
    else:
        logger.log_image(key=tag, images=[rgb], step=step)


def log_scalars(logger: Logger, scalars: dict[str, float], step: int, descriptions: dict[str, str]) -> None:
    """Log numbers by tag; for TensorBoard all as one event, with their descriptions."""
    if not is_tensorboard(logger):
        logger.log_metrics(scalars, step=step)
        return
    try:
        log_described_scalars(logger, scalars, step, descriptions)
    except (AttributeError, ImportError):  # of another TensorBoard: the same without descriptions
        logger.log_metrics(scalars, step=step)


def log_described_scalars(
    logger: TensorBoardLogger, scalars: dict[str, float], step: int, descriptions: dict[str, str]
) -> None:
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata

    plugin = SummaryMetadata.PluginData(plugin_name="scalars")
    values = [
        Summary.Value(
            tag=tag,
            simple_value=value,
            metadata=SummaryMetadata(summary_description=descriptions.get(tag, ""), plugin_data=plugin),
        )
        for tag, value in scalars.items()
    ]
    add_summary(logger, Summary(value=values), step)


def layer_scalars(summaries: dict[str, MeasureSummary], of_heads: bool) -> tuple[dict[str, float], dict[str, str]]:
    """Return each measure's mean by layer over heads and images, by tag, and the tags' descriptions.

    of_heads: each head's mean over images as well.
    """
    scalars: dict[str, float] = {}
    descriptions: dict[str, str] = {}
    for measure in CURVES:
        summary = summaries[measure.name]
        for layer, means in enumerate(summary.mean, start=1):
            heads = {head: float(mean) for head, mean in enumerate(means, start=1) if not np.isnan(mean)}
            if not heads:
                continue  # a measure that this layer does not have
            tag = f"vit_{measure.name}/layer_{layer}"
            scalars[tag] = sum(heads.values()) / len(heads)
            over = f"{summary.n:,} validation images"
            descriptions[tag] = f"{measure.label} ({measure.unit}), layer {layer}: mean over heads and {over}"
            for head, mean in heads.items() if of_heads else ():
                tag = f"vit_{measure.name}_by_head/layer_{layer}_head_{head}"
                scalars[tag] = mean
                descriptions[tag] = f"{measure.label} ({measure.unit}), layer {layer}, head {head}: mean over {over}"
    return scalars, descriptions


def probe_scalars(entropy: NDArray[Any], num_images: int) -> tuple[dict[str, float], dict[str, str]]:
    """Return the entropy [layer, head] of the probe images, which are looked at from the first step on, by layer."""
    means = {f"vit_entropy_of_probes/layer_{layer}": float(mean) for layer, mean in enumerate(entropy.mean(1), start=1)}
    text = f"attention entropy (nats): mean over heads and the {num_images} images of the pictures, from step 0 on"
    return means, dict.fromkeys(means, text)


def log_histograms(logger: TensorBoardLogger, summaries: dict[str, MeasureSummary], step: int) -> None:
    """Log one histogram for each layer and measure, over images and heads, straight from the streamed counts."""
    from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary, SummaryMetadata

    for measure in CURVES:
        summary = summaries[measure.name]
        centers = (summary.edges[:-1] + summary.edges[1:]) / 2
        for layer, counts in enumerate(summary.counts.sum(axis=1), start=1):
            filled = np.flatnonzero(counts)
            if not len(filled):
                continue  # a measure that this layer does not have
            first, last = int(filled[0]), int(filled[-1])
            histogram = HistogramProto(
                min=summary.edges[first],
                max=summary.edges[last + 1],
                num=int(counts.sum()),
                sum=float((counts * centers).sum()),
                sum_squares=float((counts * centers**2).sum()),
                bucket_limit=summary.edges[first + 1 : last + 2].tolist(),
                bucket=counts[first : last + 1].tolist(),
            )
            text = f"{measure.label} ({measure.unit}), layer {layer}: of each head on each of {summary.n:,} images"
            tag = f"vit_{measure.name}_distribution/layer_{layer}"
            plugin = SummaryMetadata.PluginData(plugin_name="histograms")
            metadata = SummaryMetadata(summary_description=text, plugin_data=plugin)
            add_summary(logger, Summary(value=[Summary.Value(tag=tag, histo=histogram, metadata=metadata)]), step)


def chart_layout(num_layers: int, of_heads: bool) -> dict[str, dict[str, list[Any]]]:
    """Return a layout of charts as SummaryWriter.add_custom_scalars takes it."""
    return {
        f"{measure.label} ({measure.unit})": {
            "all layers, mean over heads": ["Multiline", [rf"vit_{measure.name}/layer_\d+"]],
            **{
                f"layer {layer}, each head": ["Multiline", [rf"vit_{measure.name}_by_head/layer_{layer}_head_\d+"]]
                for layer in range(1, num_layers + 1)
                if of_heads
            },
        }
        for measure in CURVES
    }
