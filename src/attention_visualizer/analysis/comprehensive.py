"""The whole analysis of one study: chapters, then the report that holds them together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from attention_visualizer import report, storage
from attention_visualizer.analysis import CHAPTERS, write_chapters
from attention_visualizer.analysis.study import OURS, Study
from attention_visualizer.geometry import Geometry
from attention_visualizer.model import VisionTransformer
from attention_visualizer.pictures import InputFormat, PictureFolder


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
    # Figures of an earlier analysis of the same weights stay; of others, they would mislead.
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
    pictures = study.pictures
    whole_set = f"{pictures.title}, test set of {len(pictures):,} images"
    facts = {
        "weights": study.weights,
        "model": describe_model(study),
        "tokens": describe_tokens(study.first_look.geometries),
        "data": whole_set if pictures.kind == "test image" else f"{pictures.title}, {len(pictures):,} {pictures.kind}s",
        "samples": "; ".join(sample.source for sample in study.samples)
        + (CHOSEN if pictures.labels is not None else ""),
    }
    error = study.reconstruction_error
    facts["proof"] = "the maps are the model's own: weights times values differ from its own attention output " + (
        f"by at most {error:.1e}" if error else "by nothing"
    )
    if isinstance(pictures, PictureFolder):
        facts["input"] = describe_input(pictures.format)
    notes = [study.face_note] if study.face_note else []
    if study.first_look.left_out:
        names = ", ".join(study.first_look.left_out)
        notes.append(f"layers whose keys cannot be placed on the image are left out: {names}")
    broken = getattr(pictures, "broken", {})
    notes += [f"{name} could not be read and is left out ({reason})" for name, reason in broken.items()]
    return report.Summary("Attention analysis", facts, notes, command, language)


def describe_input(format: InputFormat) -> str:
    mean, std = ([f"{value:.3g}" for value in values] for values in (format.mean, format.std))
    cut = "" if format.crop_share == 1 else f", the middle {format.crop_share:.0%} of each side"
    origin = "" if format.stated else " (those of ImageNet, because the model states none)"
    return (
        f"{format.size[0]} x {format.size[1]} pixels{cut}; mean {', '.join(mean)} and deviation {', '.join(std)} "
        f"of the channels are taken out{origin}"
    )


CHOSEN = " (unless named: in test-set order, the first of each class, then the second of each, ...)"


def describe_model(study: Study) -> str:
    parameters = f"{sum(parameter.numel() for parameter in study.model.parameters()):,} parameters"
    if isinstance(study.model, VisionTransformer):
        config = study.model.config
        return (
            f"{config['num_layers']} layers x {config['num_heads']} heads, width {config['embed_dim']}, "
            f"MLP {config['mlp_dim']}, {config['positional_embedding']} positions, {config['pooling']} pooling, "
            + parameters
        )
    seen = study.first_look
    heads = [int((~np.isnan(layer)).sum()) for layer in seen.entropy[0]]
    told = f"{heads[0]}" if len(set(heads)) == 1 else f"{min(heads)} to {max(heads)}"
    return f"{type(study.model).__name__}, {len(heads)} layers with attention x {told} heads, {parameters}"


def describe_tokens(geometries: Sequence[Geometry]) -> str:
    """Each layout once, in the order of the layers."""
    told = []
    for geometry in dict.fromkeys(replace(geometry, shift=(0, 0)) for geometry in geometries):
        text = (
            f"{geometry.grid[0]} x {geometry.grid[1]} patches of {geometry.patch_size[0]} x "
            f"{geometry.patch_size[1]} pixels"
        )
        prefix = geometry.num_prefix_tokens
        text += ", and the class token" if prefix == 1 else f", and {prefix} prefix tokens" if prefix else ""
        text += f", in windows of {geometry.window[0]} x {geometry.window[1]}" if geometry.window else ""
        told.append(text)
    return "; then ".join(told)
