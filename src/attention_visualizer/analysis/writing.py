"""The whole analysis of one study: chapters, then the report that holds them together."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from attention_visualizer.analysis.chapters import CHAPTERS, is_analysis_file, write_chapters
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.data.image_sets import ImageFolder, InputFormat
from attention_visualizer.files import atomic
from attention_visualizer.files.staging import move_in, staging
from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.report import markdown as markdown_report
from attention_visualizer.runs import folders
from attention_visualizer.support.errors import UserError

NUMBERS = (".csv", ".json")
SOFTWARE = ("attention-visualizer", "torch", "numpy")
MOST_UNREAD = 5  # pictures that are named


@dataclass(frozen=True)
class Written:
    """Where a report lies, and the chapters that are missing from it, with their reasons."""

    report: Path
    missing: dict[str, str]

    @property
    def page(self) -> Path:
        return self.report.with_name(markdown_report.PAGE)


def write_analysis(
    study: Study, command: str, chapters: Sequence[str] = tuple(CHAPTERS), language: str = "bash"
) -> Written:
    """Writes figures, numbers and the report into the study's output folder, all of them at the end or none.

    If a chapter fails, an earlier report of the same weights stays as it is, and what there is goes into
    <output>_incomplete.
    """
    with staging(study.output.folder) as new:
        staged = replace(study, output=replace(study.output, folder=new))
        written = write_chapters(staged, chapters)
        missing = {name: chapter.missing for name, chapter in written.items() if chapter.missing}
        target = study.output.folder
        earlier = EarlierAnalysis.of(target)
        if missing and earlier is not None and earlier.reported and earlier.identity == identity(study.weights):
            target = target.with_name(f"{target.name}_incomplete")
            earlier = EarlierAnalysis.of(target)
        same = earlier is not None and earlier.identity == identity(study.weights)
        figures = sorted(figure.name for chapter in written.values() for figure in chapter.figures)
        old = files_of_ours(target, earlier)
        # Figures of an earlier analysis of the same weights stay; of others, they would mislead.
        kept = sorted(name for name in old - set(figures) if Path(name).suffix not in NUMBERS) if same else []
        markdown_report.write(new, summarise(staged, command, language), written, kept)
        numbers = [name for suffix in NUMBERS if (new / (name := f"{markdown_report.STATISTICS}{suffix}")).exists()]
        files = [*figures, *numbers, markdown_report.PAGE, markdown_report.REPORT]
        move_in(new, target, files, [] if same else sorted(old - set(files)))
        if not missing:
            discard(target.with_name(f"{target.name}_incomplete"))
    return Written(target / markdown_report.REPORT, missing)


@dataclass(frozen=True)
class EarlierAnalysis:
    """What an output folder says of the analysis in it. identity: of its weights; reported: whether a report is there;
    figures: that it names."""

    identity: str
    reported: bool
    figures: frozenset[str]

    @classmethod
    def of(cls, folder: Path) -> EarlierAnalysis | None:
        """None where there is none, or one that cannot be read."""
        try:
            told = atomic.read_json(folder / f"{markdown_report.STATISTICS}.json")
            named = set(told.get("earlier_figures", []))
            if told["schema"] > 1:
                named |= {figure["name"] for each in told["chapters"].values() for figure in each["figures"]}
            reported = (folder / markdown_report.REPORT).is_file()
            return cls(identity(told["facts"]["weights"]), reported, frozenset(named))
        except (UserError, LookupError, TypeError, AttributeError):
            return None


def files_of_ours(folder: Path, earlier: EarlierAnalysis | None) -> set[str]:
    """What an analysis left in `folder`, reports apart: figures that it lists itself, and files with a name of ours."""
    if not folder.is_dir():
        return set()
    listed = earlier.figures if earlier is not None else frozenset()
    files = [path for path in folder.iterdir() if path.is_file()]
    return {path.name for path in files if path.name in listed or is_analysis_file(path)}


def discard(folder: Path) -> None:
    """Removes the report in `folder` and what belongs to it, and the folder if nothing else is in it."""
    if (folder / markdown_report.REPORT).is_file():
        numbers = {f"{markdown_report.STATISTICS}{suffix}" for suffix in NUMBERS}
        for name in (
            files_of_ours(folder, EarlierAnalysis.of(folder)) | numbers | {markdown_report.PAGE, markdown_report.REPORT}
        ):
            (folder / name).unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()


def identity(weights: str) -> str:
    """Of a description of weights, what does not depend on how they were asked for."""
    found = re.search(r"sha256 \w+", weights)
    return found.group() if found else weights


def summarise(study: Study, command: str, language: str) -> markdown_report.ReportHeader:
    pictures = study.target.images
    whole_set = f"{pictures.title}, test set of {len(pictures):,} images"
    facts = {
        "weights": study.weights,
        "model": describe_model(study),
        "tokens": describe_tokens(study.first_observation.geometries),
        "data": whole_set if pictures.kind == "test image" else f"{pictures.title}, {len(pictures):,} {pictures.kind}s",
        "samples": "; ".join(sample.source for sample in study.samples)
        + (CHOSEN if pictures.labels is not None else ""),
    }
    accuracy = study.accuracy
    if accuracy is not None:
        facts["accuracy"] = f"{accuracy.text(2, percent=True)}, n = {accuracy.n:,}"
    error = study.reconstruction_error
    facts["proof"] = "the maps are the model's own: weights times values differ from its own attention output " + (
        f"by at most {error:.1e}" if error else "by nothing"
    )
    if isinstance(pictures, ImageFolder):
        facts["input"] = describe_input(pictures.format)
    versions = ", ".join(f"{name} {folders.installed_version(name) or 'from a folder'}" for name in SOFTWARE)
    facts["software"] = f"{versions}, Python {platform.python_version()}"
    headline = [facts["model"], facts["data"], *([f"accuracy {facts['accuracy']}"] if accuracy is not None else [])]
    return markdown_report.ReportHeader("Attention analysis", facts, warnings_of(study), command, language, headline)


def warnings_of(study: Study) -> list[str]:
    told = [study.output.watermark] if study.output.watermark else []
    if study.first_observation.left_out:
        names = ", ".join(study.first_observation.left_out)
        told.append(f"layers whose keys cannot be placed on the image are left out: {names}")
    broken = getattr(study.target.images, "broken", {})
    unread = [f"{name} could not be read and is left out ({reason})" for name, reason in broken.items()]
    told += unread[:MOST_UNREAD]
    if len(unread) > MOST_UNREAD:
        told.append(f"{len(unread) - MOST_UNREAD:,} more pictures could not be read and are left out")
    return told


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
    parameters = f"{sum(parameter.numel() for parameter in study.target.model.parameters()):,} parameters"
    if isinstance(study.target.model, VisionTransformer):
        config = study.target.model.config
        return (
            f"{config['num_layers']} layers x {config['num_heads']} heads, width {config['embed_dim']}, "
            f"MLP {config['mlp_dim']}, {config['positional_embedding']} positions, {config['pooling']} pooling, "
            + parameters
        )
    seen = study.first_observation
    heads = [int((~np.isnan(layer)).sum()) for layer in seen.entropy[0]]
    told = f"{heads[0]}" if len(set(heads)) == 1 else f"{min(heads)} to {max(heads)}"
    return f"{type(study.target.model).__name__}, {len(heads)} layers with attention x {told} heads, {parameters}"


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
