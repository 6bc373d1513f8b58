"""The whole analysis of one study: chapters, then the report that holds them together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attention_visualizer import report
from attention_visualizer.analysis import CHAPTERS, write_chapters
from attention_visualizer.analysis.study import Study


def write_analysis(study: Study, command: str, chapters: Sequence[str] = tuple(CHAPTERS)) -> Path:
    """Writes figures, numbers and the report into the study's output folder; returns the report's path."""
    study.output.mkdir(parents=True, exist_ok=True)
    written = write_chapters(study, chapters)
    return report.write(study.output, summarise(study, command), written)


def summarise(study: Study, command: str) -> report.Summary:
    geometry, description = study.geometry, study.description
    config = study.model.config
    parameters = sum(parameter.numel() for parameter in study.model.parameters())
    facts = {
        "weights": study.weights,
        "model": f"{config['num_layers']} layers x {config['num_heads']} heads, width {config['embed_dim']}, "
        f"MLP {config['mlp_dim']}, {config['positional_embedding']} positions, {config['pooling']} pooling, "
        f"{parameters:,} parameters",
        "tokens": f"{geometry.grid[0]} x {geometry.grid[1]} patches of {geometry.patch_size[0]} x "
        f"{geometry.patch_size[1]} pixels" + (", and the class token" if geometry.num_prefix_tokens else ""),
        "data": f"{description.title}, test set of {len(study.labels):,} images",
        "samples": "; ".join(sample.source for sample in study.samples),
    }
    if study.reconstruction_error:
        facts["proof"] = (
            "the maps are the model's own: weights times values differ from its fused output by at most "
            f"{study.reconstruction_error:.1e}"
        )
    return report.Summary("Attention analysis", facts, [study.face_note] if study.face_note else [], command)
