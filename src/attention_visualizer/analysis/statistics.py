"""Entropy, maximum and mean attention by layer and head over the whole test set."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from attention_visualizer import charts, measures
from attention_visualizer.analysis.study import Study
from attention_visualizer.capture import capture
from attention_visualizer.chapter import Chapter, FigureFile, Table
from attention_visualizer.geometry import Geometry
from attention_visualizer.statistics import MEASURES, AttentionStatistics, Summary

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SHOWN = ("maximum", "mean", "entropy")


def write(study: Study) -> Chapter:
    n = len(study.labels)
    summaries, accuracy = measure(study, study.images, study.labels)
    name = study.save(figure(summaries, study.geometry, n, study.face_note), "attention_statistics")
    by_head = study.save(head_figure(summaries, study.geometry, n, study.face_note), "attention_statistics_by_head")
    query = measures.readout_query(study.geometry)
    unread = " (no distance for the last layer, whose patch queries cannot affect the logits)" if query == "cls" else ""
    who = "the CLS token" if query == "cls" else "the patch queries (mean over them)"
    return Chapter(
        "Statistics over the test set",
        TEXT.format(
            n=n, who=who, accuracy=accuracy, maximum_entropy=measures.uniform_entropy(study.geometry.num_tokens)
        ),
        [
            FigureFile(name, f"Maximum attention, mean attention and entropy by layer, n = {n:,} images x heads."),
            FigureFile(
                by_head, f"Entropy and mean attention distance by layer and head, means over {n:,} images{unread}."
            ),
        ],
        [layer_table(summaries)],
        {"images": n, "accuracy": accuracy, "query": query, "layers": layer_numbers(summaries)},
        records(summaries),
    )


def measure(study: Study, images: Tensor, labels: Tensor) -> tuple[dict[str, Summary], float]:
    """Streams uint8 images [image, channel, height, width] through the model: each measure, and the accuracy."""
    streamed = AttentionStatistics()
    num_correct = 0
    with torch.no_grad():
        for batch, true in study.batches(images, labels):
            with capture(study.model, consume=streamed.update) as attention:
                num_correct += int((study.model(batch).argmax(dim=1) == true).sum())
            study.reconstruction_error = max(study.reconstruction_error, attention.reconstruction_error)
    return streamed.compute(), num_correct / len(labels)


def figure(
    summaries: dict[str, Summary], geometry: Geometry, n: int, face_note: str, images: str = "test images"
) -> Figure:
    """Box plots above, distributions below, for each measure."""
    drawn = Figure(figsize=(14, 8.5), layout="constrained")
    axes = drawn.subplots(2, len(SHOWN))
    uniform = {
        "maximum": 1 / geometry.num_tokens,
        "mean": 1 / geometry.num_tokens,
        "entropy": measures.uniform_entropy(geometry.num_tokens),
    }
    labels = {measure.name: f"{measure.label} ({measure.unit})" for measure in MEASURES}
    for column, name in enumerate(SHOWN):
        summary = summaries[name]
        charts.box_by_layer(
            summary.quantiles(QUANTILES), labels[name], axes[0, column], uniform[name], "uniform attention"
        )
        charts.distribution_by_layer(summary.counts.sum(axis=1), summary.edges, labels[name], axes[1, column])
    charts.finish(drawn, f"Attention over {n:,} {images}, all heads", face_note)
    return drawn


def head_figure(summaries: dict[str, Summary], geometry: Geometry, n: int, face_note: str) -> Figure:
    """Entropy and distance, layers down, heads across; no distance where patch queries cannot affect the logits."""
    last_is_unread = geometry.num_prefix_tokens > 0
    num_layers, num_heads = summaries["entropy"].mean.shape
    drawn = Figure(figsize=(max(10.0, 1.6 * num_heads + 3), max(4.0, 0.55 * num_layers + 1.5)), layout="constrained")
    axes = drawn.subplots(1, 2)
    charts.heat_map(summaries["entropy"].mean, "attention entropy (nats)", axes[0])
    distance = summaries["distance"].mean.copy()
    if last_is_unread and num_layers > 1:
        distance[-1] = np.nan
    charts.heat_map(distance, "mean attention distance (pixels)", axes[1])
    charts.finish(drawn, f"By layer and head, means over {n:,} test images", face_note)
    return drawn


def layer_table(summaries: dict[str, Summary]) -> Table:
    """Mean over images and heads, and between which values the middle 90 % of them lie."""
    columns = ["layer", *(f"{measure.label} ({measure.unit})" for measure in MEASURES)]
    rows = []
    for layer in range(len(summaries["entropy"].mean)):
        row = [str(layer + 1)]
        for measure in MEASURES:
            summary = summaries[measure.name]
            low, _, _, _, high = summary.quantiles(QUANTILES)[layer]
            row.append(f"{summary.mean[layer].mean():.3f} ({low:.3f} to {high:.3f})")
        rows.append(row)
    return Table("Mean over images and heads, with the range of the middle 90 %.", columns, rows)


def layer_numbers(summaries: dict[str, Summary]) -> list[dict[str, Any]]:
    return [
        {
            measure.name: {
                "unit": measure.unit,
                "mean_by_head": summaries[measure.name].mean[layer].tolist(),
                "deviation_by_head": summaries[measure.name].deviation[layer].tolist(),
                "quantiles": dict(
                    zip(map(str, QUANTILES), summaries[measure.name].quantiles(QUANTILES)[layer].tolist(), strict=True)
                ),
            }
            for measure in MEASURES
        }
        for layer in range(len(summaries["entropy"].mean))
    ]


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
        for measure in MEASURES
        for summary in (summaries[measure.name],)
        for (layer, head), mean in np.ndenumerate(summary.mean)
    ]


TEXT = """Over all {n:,} test images (accuracy {accuracy:.2%}), for {who}: the largest and the mean weight on a patch,
and the entropy of the whole row of weights, which is {maximum_entropy:.3f} nats when it is uniform. The mean weight is
what the class token leaves to the image, divided by the number of patches. The mean attention distance is that of the
patch queries; where a class token is read out, the last layer's patch queries cannot affect the logits, so their
distance says nothing about the prediction."""
