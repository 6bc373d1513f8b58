"""Entropy, maximum and mean attention by layer and head over the whole test set."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from attention_visualizer import charts, measures
from attention_visualizer.analysis.study import Study
from attention_visualizer.capture import capture
from attention_visualizer.chapter import Chapter, FigureFile, Table
from attention_visualizer.geometry import Geometry
from attention_visualizer.prediction import logits_of
from attention_visualizer.statistics import ALL_MEASURES, MEASURES, AttentionStatistics, Summary

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SHOWN = ("maximum", "mean", "entropy")
BY_HEAD = ("entropy", "distance", "sink", "divergence")


def write(study: Study) -> Chapter:
    n = len(study.pictures)
    measured = measure(study, study.batches())
    kind = f"{study.pictures.kind}s"
    name = study.save(figure(measured, f"{n:,} {kind}", study.face_note), "attention_statistics")
    by_head = study.save(head_figure(measured, f"{n:,} {kind}", study.face_note), "attention_statistics_by_head")
    unread = (
        " (no distance for the last layer, whose patch queries cannot affect the logits)" if measured.reads_cls else ""
    )
    who = "the CLS token" if measured.reads_cls else "the patch queries (mean over them)"
    accuracy = "" if measured.accuracy is None else f" (accuracy {measured.accuracy:.2%})"
    uniform = measured.uniform_entropy
    highest = "" if uniform is None else f", which is {uniform:.3f} nats when it is uniform"
    text = TEXT.format(n=n, kind=kind, who=who, accuracy=accuracy, highest=highest)
    if measured.left_out:
        text += "\n\n" + LEFT_OUT.format(count=len(measured.left_out), names=", ".join(measured.left_out))
    return Chapter(
        f"Statistics over the {kind}",
        text,
        [
            FigureFile(name, f"Maximum attention, mean attention and entropy by layer, n = {n:,} {kind} x heads."),
            FigureFile(
                by_head,
                "Entropy, mean attention distance, sink strength and divergence from the layer's other heads by layer "
                f"and head, means over {n:,} {kind}{unread}.",
            ),
        ],
        [layer_table(measured.summaries)],
        {
            "images": n,
            "accuracy": measured.accuracy,
            "query": "cls" if measured.reads_cls else "patches",
            "layer_names": measured.layer_names,
            "layers": layer_numbers(measured.summaries),
        },
        records(measured.summaries),
    )


@dataclass(frozen=True)
class Measured:
    """Each measure over a stream of images, and the accuracy where labels are known."""

    summaries: dict[str, Summary]
    geometries: list[Geometry]
    layer_names: list[str]
    left_out: list[str]
    accuracy: float | None

    @property
    def reads_cls(self) -> bool:
        """Whether the last layer has a class token to read."""
        return self.geometries[-1].num_prefix_tokens > 0

    @property
    def uniform_entropy(self) -> float | None:
        """None where layers have different numbers of keys."""
        counts = {geometry.num_tokens for geometry in self.geometries}
        return measures.uniform_entropy(counts.pop()) if len(counts) == 1 else None


def measure(study: Study, batches: Iterable[tuple[Tensor, Tensor | None]]) -> Measured:
    """Streams model inputs [image, channel, height, width] and labels through the model."""
    streamed = AttentionStatistics(ALL_MEASURES)
    num_correct, num_labelled = 0, 0
    with torch.no_grad():
        for batch, true in batches:
            with capture(study.model, streamed.update, study.given_geometry) as attention:
                logits = logits_of(study.model(batch))
            if true is not None and logits is not None:
                num_correct += int((logits.argmax(dim=1) == true).sum())
                num_labelled += len(true)
            study.reconstruction_error = max(study.reconstruction_error, attention.reconstruction_error)
    return Measured(
        streamed.compute(),
        streamed.geometries,
        streamed.layer_names,
        list(streamed.left_out),
        num_correct / num_labelled if num_labelled else None,
    )


def figure(measured: Measured, images: str, face_note: str) -> Figure:
    """Box plots above, distributions below, for each measure."""
    drawn = Figure(figsize=(14, 8.5), layout="constrained")
    axes = drawn.subplots(2, len(SHOWN))
    uniform: dict[str, float | None] = dict.fromkeys(SHOWN)
    if measured.uniform_entropy is not None:
        share = 1 / measured.geometries[0].num_tokens
        uniform = {"maximum": share, "mean": share, "entropy": measured.uniform_entropy}
    labels = {measure.name: f"{measure.label} ({measure.unit})" for measure in MEASURES}
    for column, name in enumerate(SHOWN):
        summary = measured.summaries[name]
        charts.box_by_layer(
            summary.quantiles(QUANTILES), labels[name], axes[0, column], uniform[name], "uniform attention"
        )
        medians = summary.quantiles((0.5,))[:, 0]
        charts.distribution_by_layer(summary.counts.sum(axis=1), summary.edges, labels[name], axes[1, column], medians)
    charts.finish(drawn, f"Attention over {images}, all heads", face_note)
    return drawn


def head_figure(measured: Measured, images: str, face_note: str) -> Figure:
    """Layers down, heads across; no distance where patch queries cannot affect the logits."""
    means = {name: summary.mean.copy() for name, summary in measured.summaries.items()}
    num_layers, num_heads = means["entropy"].shape
    if measured.reads_cls and num_layers > 1:
        means["distance"][-1] = np.nan
    shown = [each for each in ALL_MEASURES if each.name in BY_HEAD and not np.isnan(means[each.name]).all()]
    columns = 2
    rows = -(-len(shown) // columns)
    cell = 0.62 if num_layers * num_heads <= charts.MOST_ANNOTATED else 0.3
    size = max(11.0, columns * (cell * num_heads + 1.8)), rows * max(2.8, 0.36 * num_layers + 1.2) + 0.4
    drawn = Figure(figsize=size, layout="constrained")
    axes = drawn.subplots(rows, columns, squeeze=False).flatten()
    for axis, each in zip(axes, shown, strict=False):
        charts.heat_map(means[each.name], f"{each.label} ({each.unit})", axis)
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    charts.finish(drawn, f"By layer and head, means over {images}", face_note)
    return drawn


def layer_table(summaries: dict[str, Summary]) -> Table:
    """Mean over images and heads, and between which values the middle 90 % of them lie."""
    columns = ["layer", *(f"{measure.label} ({measure.unit})" for measure in ALL_MEASURES)]
    rows = []
    for layer in range(len(summaries["entropy"].mean)):
        row = [str(layer + 1)]
        for measure in ALL_MEASURES:
            summary = summaries[measure.name]
            low, _, _, _, high = summary.quantiles(QUANTILES)[layer]
            defined = not np.isnan(summary.mean[layer]).all()
            row.append(f"{np.nanmean(summary.mean[layer]):.3f} ({low:.3f} to {high:.3f})" if defined else "–")
        rows.append(row)
    return Table("Mean over images and heads, with the range of the middle 90 %.", columns, rows)


def layer_numbers(summaries: dict[str, Summary]) -> list[dict[str, Any]]:
    return [
        {
            measure.name: {
                "unit": measure.unit,
                "mean_by_head": numbers(summaries[measure.name].mean[layer]),
                "deviation_by_head": numbers(summaries[measure.name].deviation[layer]),
                "quantiles": dict(
                    zip(map(str, QUANTILES), numbers(summaries[measure.name].quantiles(QUANTILES)[layer]), strict=True)
                ),
            }
            for measure in ALL_MEASURES
        }
        for layer in range(len(summaries["entropy"].mean))
    ]


def numbers(values: NDArray[np.float64]) -> list[float | None]:
    """For JSON, which knows no NaN."""
    return [None if np.isnan(value) else float(value) for value in values]


def records(summaries: dict[str, Summary]) -> list[dict[str, Any]]:
    """One row for each measure, layer and head."""
    return [
        {
            "measure": measure.name,
            "unit": measure.unit,
            "layer": layer + 1,
            "head": head + 1,
            "mean": float(mean),
            "standard_deviation": float(summary.deviation[layer, head]),
            "images": summary.n,
        }
        for measure in ALL_MEASURES
        for summary in (summaries[measure.name],)
        for (layer, head), mean in np.ndenumerate(summary.mean)
        if not np.isnan(mean)
    ]


TEXT = """Over {n:,} {kind}{accuracy}, for {who}: the largest and the mean weight on a patch, and the entropy of the
whole row of weights{highest}. The mean weight is what prefix tokens leave to the image, divided by the number of
patches. The mean attention distance is that of the patch queries; where a class token is read out, the last layer's
patch queries cannot affect the logits, so their distance says nothing about the prediction. Sink strength is the share
of all queries' attention that the most attended key draws; the divergence of a head is its mean Jensen-Shannon
divergence from the layer's other heads, 0 for a copy and 0.693 for heads that have no key in common."""

LEFT_OUT = """Left out, because their keys cannot be placed on the image: {count} layers ({names})."""
