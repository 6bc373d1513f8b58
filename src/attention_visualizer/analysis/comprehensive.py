"""The whole analysis of one study: chapters, then the report that holds them together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from attention_visualizer import report, storage
from attention_visualizer.analysis import CHAPTERS, write_chapters
from attention_visualizer.analysis.study import Study

# What an analysis writes. Figures of an earlier one of the same weights stay; of others, they would mislead.
OURS = re.compile(
    r"(attention_(pattern|heads)|layer_comparison)_sample_\d+\.(png|pdf|svg)"
    r"|attention_(statistics(_by_head)?|evolution)\.(png|pdf|svg|webp|csv|json)"
)


def write_analysis(
    study: Study, command: str, chapters: Sequence[str] = tuple(CHAPTERS), language: str = "bash"
) -> Path:
    """Writes figures, numbers and the report into the study's output folder; returns the report's path."""
    study.output.mkdir(parents=True, exist_ok=True)
    earlier = earlier_weights(study.output)
    written = write_chapters(study, chapters)
    path = report.write(study.output, summarise(study, command, language), written)
    kept = {figure.name for chapter in written.values() for figure in chapter.figures}
    kept |= {f"{report.STATISTICS}.json"}
    kept |= {f"{report.STATISTICS}.csv"} if any(chapter.records for chapter in written.values()) else set()
    for old in study.output.iterdir():
        if OURS.fullmatch(old.name) and old.name not in kept and earlier != identity(study.weights):
            old.unlink()
    return path


def earlier_weights(folder: Path) -> str | None:
    """Which weights the analysis in `folder` is of; None where there is none."""
    path = folder / f"{report.STATISTICS}.json"
    return identity(storage.read_json(path)["facts"].get("weights", "")) if path.is_file() else None


def identity(weights: str) -> str:
    """Of a description of weights, what does not depend on how they were asked for."""
    found = re.search(r"sha256 \w+", weights)
    return found.group() if found else weights


def summarise(study: Study, command: str, language: str) -> report.Summary:
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
        "samples": "; ".join(sample.source for sample in study.samples)
        + " (unless named: in test-set order, the first of each class, then the second of each, ...)",
    }
    if study.reconstruction_error:
        facts["proof"] = (
            "the maps are the model's own: weights times values differ from its fused output by at most "
            f"{study.reconstruction_error:.1e}"
        )
    return report.Summary("Attention analysis", facts, [study.face_note] if study.face_note else [], command, language)
