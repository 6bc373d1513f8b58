"""From what was asked for to a Study. All mistakes surface here, before anything is written."""

from __future__ import annotations

import inspect
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from attention_visualizer.analysis.study.analysed_weights import Weights
from attention_visualizer.analysis.study.budget import QUICK, Budget
from attention_visualizer.analysis.study.compared_runs import ComparedRun
from attention_visualizer.analysis.study.output import FileFormat, Output
from attention_visualizer.analysis.study.samples import SampleChoice, find_samples
from attention_visualizer.analysis.study.study import HeadLayers, Study, left_out_note
from attention_visualizer.analysis.study.target import Target, affordable_images, batch_size
from attention_visualizer.attention.capture import CaptureError
from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.attention.gradients import asks_for_gradients
from attention_visualizer.data.class_names import declared_class_names
from attention_visualizer.data.image_sets import ImageFolder, ImageSet
from attention_visualizer.files.films import FilmFormat
from attention_visualizer.measures.map_measures import Query
from attention_visualizer.measures.observation import Observation, RolloutOptions
from attention_visualizer.runs.folders import RunFolder
from attention_visualizer.runs.history import AttentionHistory
from attention_visualizer.support.errors import UserError, summary
from attention_visualizer.support.machine import available_memory

RANDOM_NOTE = "random weights (untrained)"


def make_study(
    weights: Weights,
    images: ImageSet,
    folder: Path,
    choice: SampleChoice | None = None,
    *,
    query: Query | None = None,
    geometry: Geometry | None = None,
    rollout: RolloutOptions | None = None,
    device: str = "auto",
    file_format: FileFormat = "png",
    film_format: FilmFormat = "webp",
    head_layers: HeadLayers = "all",
    budget: Budget | None = None,
    compared_runs: Sequence[ComparedRun] = (),
    explorer_mb: float = 25,
) -> Study:
    """Return a study with its samples chosen, whose figures go to `folder`. Raise UserError for whatever does not fit
    together."""
    chosen_device = choose_device(device)
    history = find_history(None if weights.random else weights.run)
    model = moved(weights.model, chosen_device)
    target = Target(model, images, geometry, query, rollout or RolloutOptions(), chosen_device)
    observation = first_observation(target)
    target = with_classes(target)
    affordable = affordable_images(observation, available_memory(chosen_device))
    target.limit.images = min(len(images), batch_size(images.shape), affordable)
    samples = find_samples(target, choice or SampleChoice())
    notes = [RANDOM_NOTE] if weights.random else []
    notes += [images.watermark] if images.watermark else []
    notes += [left_out_note(observation)] if observation.left_out else []
    if any(each.evidence.startswith("given, not confirmed") for each in observation.geometries):
        notes.append("positions as given, not confirmed")
    return Study(
        target,
        Output(folder, file_format, "; ".join(notes), film_format),
        weights.text,
        budget or QUICK,
        samples,
        history,
        compared_runs,
        head_layers,
        weights_digest=weights.digest,
        explorer_bytes=int(explorer_mb * 1e6),
        controls_folder=folder / "controls",
    )


ABOUT_SIZES = "(?i)size|shape|dimension|channel|match|expect|height|width|pixel|divisible"


def with_classes(target: Target) -> Target:
    """Return the target with the classes that its model was seen to give scores of, for a folder's pictures. Raise
    UserError for another number of class names than of classes."""
    images, count = target.images, target.first_observation.num_classes
    if not isinstance(images, ImageFolder):
        return target
    names = images.class_names
    if names and count and len(names) != count:
        raise UserError(f"class_names= has {len(names)} names, and the model gives scores of {count} classes")
    declared = declared_class_names(target.model)
    if not names and len(declared) == count:
        names = declared
    return target.with_images(replace(images, class_names=names, num_classes=count or None))


def first_observation(target: Target) -> Observation:
    """Observe one image. Mistakes in the query, unknown layouts and images of a wrong size surface here."""
    try:
        observation = target.first_observation
    except (UserError, CaptureError):
        raise
    except Exception as error:  # whatever the model's own forward raises
        raise UserError(reason_of_failure(target, error)) from error
    _, height, width = target.images.shape
    for geometry in observation.geometries:
        if geometry.drawn_grid((height, width)) != geometry.grid:  # chapters count patches, all of one size
            down, across = geometry.patch_size
            raise UserError(
                f"images of {height} x {width} pixels are no whole number of patches of {down:g} x {across:g}: give "
                "another size with image_size="
            )
    return observation


def parameters_of(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Return the arguments of a module's forward, by name."""
    return inspect.signature(module.forward).parameters


def reason_of_failure(target: Target, error: Exception) -> str:
    """Return why a model's forward fails on the first image, in one line, with what to do about it."""
    channels, height, width = target.images.shape
    text = (
        f"{type(target.model).__name__} fails on an image of {height} x {width} pixels with {channels} channels: "
        f"{type(error).__name__}: {summary(error):.120}"
    )
    if asks_for_gradients(error):
        return f"{text}; its forward needs gradients, and an analysis runs it without (torch.no_grad)"
    if any("interpolate_pos_encoding" in parameters_of(module) for module in target.model.modules()):
        return (
            f"{text}; leave out image_size=, or give model= a module whose forward calls it with "
            "interpolate_pos_encoding=True, which it needs for another size than its own"
        )
    if re.search(ABOUT_SIZES, str(error)):
        return f"{text}; if it takes other images: in Python, give its input format with image_size= or image_format="
    return text


def moved(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model on the device. Raise UserError where it is elsewhere and cannot be moved."""
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type != "meta"]
    if all(tensor.device == torch.empty(0, device=device).device for tensor in tensors):
        return model
    try:
        return model.to(device)
    except Exception as error:  # of many kinds: quantised models, and those spread over devices, refuse
        raise UserError(
            f"{type(model).__name__} cannot be moved to {device} ({summary(error):.120}): move it to one device "
            "yourself, and give that as device="
        ) from error


def find_history(run: RunFolder | None) -> AttentionHistory | None:
    """Return the history of the run's training. Raise UserError for one that is broken, UnreadableError for one that
    cannot be read at the moment."""
    if run is None or not run.history_path.is_file():
        return None
    try:
        return AttentionHistory.load(run.history_path)
    except UserError as error:
        raise UserError(f"{error}: delete it to analyse without the evolution over training") from error


def choose_device(device: str) -> torch.device:
    """Raise UserError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"device={device}: choose auto, cpu or cuda") from None
    if chosen.type == "cuda" and not (torch.cuda.is_available() and (chosen.index or 0) < torch.cuda.device_count()):
        raise UserError(f"device={device}: no such GPU is available; use device=cpu")
    if chosen.type not in ("cpu", "cuda", "mps") or (chosen.type == "mps" and not torch.backends.mps.is_available()):
        raise UserError(f"device={device}: choose auto, cpu or cuda")
    return chosen


def check_output(output: Path) -> Path:
    """Raise UserError for a folder that cannot be made or written; leave none behind."""
    missing = []
    if output.name in ("", ".."):  # it has a folder beside it
        output = output.resolve()
        if not output.name:
            raise UserError(f"output_dir={output}: name a folder inside it")
    try:
        path = output
        while not path.exists():
            missing.append(path)
            path = path.parent
        if not path.is_dir():
            raise UserError(f"output_dir={output}: {path} is a file, not a folder")
        for folder in reversed(missing):
            folder.mkdir()
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise UserError(f"output_dir={str(output):.200} cannot be written: {error.strerror}") from error
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
    return output
