"""The report's header: the facts of what was analysed, and warnings."""

from __future__ import annotations

import platform
from collections.abc import Sequence

import numpy as np

from attention_visualizer.analysis.runs.surveyed_runs import FEW_SEEDS
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.data.image_sets import INVERTED, ImageFolder
from attention_visualizer.data.input_format import InputFormat
from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.report.markdown import ReportHeader
from attention_visualizer.support import machine

ONE_MODEL = "one model: another seed gives other heads and other values (runs= compares them)"
SOFTWARE = ("attention-visualizer", "torch", "numpy")
MAX_UNREAD = 5  # pictures that are named


def report_header(study: Study, command: str, language: str) -> ReportHeader:
    """What was analysed, in words; to be made after the chapters, whose captures are the proof that it states.

    command: what makes the report again, in `language` ("bash" or "python").
    """
    images = study.target.images
    whole_set = f"{images.title}, test set of {len(images):,} images"
    facts = {
        "weights": study.weights,
        "model": describe_model(study),
        "tokens": describe_tokens(study.first_observation.geometries),
        "data": whole_set if images.kind == "test image" else f"{images.title}, {len(images):,} {images.kind}s",
        "samples": "; ".join(sample.source for sample in study.samples) + (CHOSEN if images.labels is not None else ""),
    }
    accuracy = study.accuracy
    if accuracy is not None:
        facts["accuracy"] = f"{accuracy.text(2, percent=True)}, n = {accuracy.n:,}"
    error = study.reconstruction_error
    facts["proof"] = "weights times values differ from the model's own attention output " + (
        f"by at most {error:.1e}" if error else "by 0"
    )
    facts["proof"] += f"; positions of the keys on the image: {describe_evidence(study.first_observation.geometries)}"
    if isinstance(images, ImageFolder):
        facts["input"] = describe_input(images.format)
        if images.inverted:
            facts["input"] += f"; {INVERTED.format(count=f'{images.inverted:,}', total=f'{len(images):,}')}"
    versions = ", ".join(f"{name} {machine.installed_version(name) or 'from a folder'}" for name in SOFTWARE)
    facts["software"] = f"{versions}, Python {platform.python_version()}"
    headline = [facts["model"], facts["data"], *([f"accuracy {facts['accuracy']}"] if accuracy is not None else [])]
    headline.append(describe_seeds(study))
    return ReportHeader("Attention analysis", facts, warnings_of(study), command, language, headline)


def warnings_of(study: Study) -> list[str]:
    """What a reader must know before believing the report, one sentence each."""
    warnings = [study.output.watermark] if study.output.watermark else []
    if study.first_observation.left_out:
        names = ", ".join(study.first_observation.left_out)
        warnings.append(
            f"layers without a known position on the image, or hidden by their kernel, are left out: {names}"
        )
    broken = getattr(study.target.images, "broken", {})
    unread = [f"{name} could not be read and is left out ({reason})" for name, reason in broken.items()]
    warnings += unread[:MAX_UNREAD]
    if len(unread) > MAX_UNREAD:
        warnings.append(f"{len(unread) - MAX_UNREAD:,} more images could not be read and are left out")
    return warnings


def describe_seeds(study: Study) -> str:
    """Say how many runs there are, and what follows for another one."""
    settings = [run.setting for run in study.compared_runs]
    if len(settings) >= FEW_SEEDS and len(set(settings)) == 1:
        return f"{len(settings)} seeds of one model; all chapters but their comparison are of one run"
    return ONE_MODEL


def describe_input(format: InputFormat) -> str:
    mean, std = ([f"{value:.3g}" for value in values] for values in (format.mean, format.std))
    cut = "" if format.crop_share == 1 else f", the middle {format.crop_share:.0%} of each side"
    origin = "" if format.declares_mean else " (those of ImageNet, because the model declares none)"
    return (
        f"{format.size[0]} x {format.size[1]} pixels{cut}; channels normalised with mean {', '.join(mean)} and "
        f"standard deviation {', '.join(std)}{origin}"
    )


CHOSEN = (
    " (unless named: in test-set order, the first of each class, then the second of each, ...; the last quarter are "
    "the first wrong answers, of different classes, where a trained model gives any)"
)


def describe_model(study: Study) -> str:
    parameters = f"{study.target.num_parameters:,} parameters"
    if isinstance(study.target.model, VisionTransformer):
        config = study.target.model.config
        return (
            f"{config['num_layers']} layers x {config['num_heads']} heads, width {config['embed_dim']}, "
            f"MLP {config['mlp_dim']}, {config['positional_embedding']} positions, {config['pooling']} pooling, "
            + parameters
        )
    heads = [int((~np.isnan(layer)).sum()) for layer in study.first_observation.entropy[0]]
    num_heads = f"{heads[0]}" if len(set(heads)) == 1 else f"{min(heads)} to {max(heads)}"
    return f"{type(study.target.model).__name__}, {len(heads)} layers with attention x {num_heads} heads, {parameters}"


def describe_evidence(geometries: Sequence[Geometry]) -> str:
    """Say how the positions of keys are known, each way once."""
    ways = {"measured": "measured, by changing pixels and seeing which keys' values move with attention off"}
    return "; ".join(dict.fromkeys(ways.get(geometry.evidence, geometry.evidence) for geometry in geometries))


def describe_tokens(geometries: Sequence[Geometry]) -> str:
    """Describe each token layout once, in the order of the layers."""
    return "; then ".join(dict.fromkeys(str(geometry) for geometry in geometries))
