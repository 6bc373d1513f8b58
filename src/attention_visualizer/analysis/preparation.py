"""From what was asked for to a Study: which checkpoint, which data, which samples, where to. All mistakes surface here,
before anything is written."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from attention_visualizer.analysis.study import FileFormat, HeadLayers, Sample, Study
from attention_visualizer.checkpoint import LoadedCheckpoint, load_checkpoint
from attention_visualizer.checkpoint_choice import choose_checkpoint
from attention_visualizer.data import ImageDataModule
from attention_visualizer.errors import UserError
from attention_visualizer.geometry import find_geometry
from attention_visualizer.history import AttentionHistory
from attention_visualizer.images import DatasetDescription, read_image
from attention_visualizer.measures import Query
from attention_visualizer.mnist_files import MnistUnavailable
from attention_visualizer.model import VisionTransformer
from attention_visualizer.storage import RunFolder, short_path

log = logging.getLogger(__name__)

RANDOM_NOTE = "random weights (untrained)"


@dataclass(frozen=True)
class Subjects:
    """Which pictures to look at: see `choose_samples`. image: a picture file instead of test images."""

    num_samples: int = 8
    samples: Sequence[int] | None = None
    class_: int | None = None
    wrong: bool = False
    image: str | None = None


@dataclass(frozen=True)
class Weights:
    """A model ready to be looked at, and what is known of where it comes from."""

    model: VisionTransformer
    text: str
    loaded: LoadedCheckpoint | None
    run: RunFolder | None
    random: bool


def find_weights(ckpt: str, run: str | None, runs_dir: str, seed: int = 0) -> Weights:
    """The model of a checkpoint; `ckpt="random"` gives untrained weights in the newest run's architecture."""
    if ckpt != "random":
        choice = choose_checkpoint(ckpt, run, runs_dir)
        loaded = load_checkpoint(choice.path)
        origin = f"{choice.reason}; {short_path(choice.path)}, sha256 {loaded.sha256}"
        trained = "" if loaded.epoch is None else f", epoch {loaded.epoch + 1}, step {loaded.step}"
        return Weights(loaded.build_model(), origin + trained, loaded, choice.run, random=False)
    try:
        choice = choose_checkpoint("best", run, runs_dir)
    except UserError:
        if run is not None:
            raise
        return Weights(random_model(seed), "random weights, no training, default model", None, None, random=True)
    loaded = load_checkpoint(choice.path)
    model = random_model(seed, **loaded.model_config)
    return Weights(model, f"random weights, no training, the model of {choice.path}", loaded, choice.run, random=True)


def random_model(seed: int = 0, **config: Any) -> VisionTransformer:
    """An untrained model in eval mode; leaves the global random state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VisionTransformer(**config).eval()


def load_data(loaded: LoadedCheckpoint | None, data_dir: str | None = None) -> ImageDataModule:
    """The data set that the checkpoint was trained on; for files that do not say, MNIST or what stands in for it.

    Raises UserError when the checkpoint's own data set cannot be had: another one would give other findings.
    """
    if loaded is None or loaded.data is None:
        data = ImageDataModule(data_dir=data_dir)
        data.load()
        return data
    described = DatasetDescription.from_dict(loaded.data)
    recorded = loaded.data_dir if loaded.data_dir and Path(loaded.data_dir).is_dir() else None
    name: Any = described.name
    data = ImageDataModule(name=name, data_dir=data_dir or recorded, fallback=None, split_seed=loaded.split_seed or 0)
    try:
        data.load()
    except UserError as error:
        if not isinstance(error.__cause__, MnistUnavailable):
            raise
        raise UserError(
            f"data_dir={data.data_dir}: {described.title}, on which {loaded.path} was trained, is not there, and "
            f"{error.__cause__}: name the folder of its files, here or in the environment variable MNIST_DIR"
        ) from error
    return data


def prepare(
    weights: Weights,
    data: ImageDataModule,
    output: Path,
    subjects: Subjects,
    query: Query | None = None,
    device: str = "auto",
    file_format: FileFormat = "png",
    head_layers: HeadLayers = "all",
) -> Study:
    """A Study with its samples chosen. Raises UserError for whatever does not fit together."""
    check_choice("format", file_format, FileFormat)
    check_choice("head_layers", head_layers, HeadLayers)
    chosen_device = choose_device(device)
    description = data.description
    if weights.loaded is not None and weights.loaded.data is not None:
        # The model's own normalisation, whatever split the images come from now.
        description = DatasetDescription.from_dict(weights.loaded.data)
    check_fit(weights.model, description)
    images, labels = data.splits["test"]
    notes = [RANDOM_NOTE] if weights.random else []
    notes += [description.face_note] if description.face_note else []
    study = Study(
        weights.model.to(chosen_device),
        description,
        images,
        labels,
        output,
        weights.text,
        "; ".join(notes),
        find_history(None if weights.random else weights.run),
        query=check_query(weights.model, query),
        file_format=file_format,
        head_layers=head_layers,
        device=chosen_device,
    )
    study.samples = find_samples(study, subjects)
    return study


def find_history(run: RunFolder | None) -> AttentionHistory | None:
    """The history of the run's training. Raises UserError for one that is broken."""
    if run is None or not run.history_path.is_file():
        return None
    try:
        return AttentionHistory.load(run.history_path)
    except UserError as error:
        raise UserError(f"{error}: delete it to analyse without the evolution over training") from error


def check_fit(model: VisionTransformer, description: DatasetDescription) -> None:
    for name, mine, theirs in (
        ("image size", model.config["img_size"], description.image_size),
        ("number of channels", model.config["in_channels"], description.channels),
        ("number of classes", model.config["num_classes"], description.num_classes),
    ):
        if mine != theirs:
            raise UserError(f"the model's {name} is {mine}, but {description.title} has {theirs}")


def check_query(model: VisionTransformer, query: Any) -> Query | None:
    """None, "cls", "patches" or (row, column); raises UserError for a query that the model does not have."""
    geometry = find_geometry(model)
    assert geometry is not None
    if query is None or query == "patches":
        return query
    if query == "cls":
        if not geometry.num_prefix_tokens:
            raise UserError(
                "query=cls: this model pools the mean of its patches and has no CLS token; use query=patches"
            )
        return "cls"
    pair = isinstance(query, list | tuple) and len(query) == 2
    if not (pair and all(isinstance(number, int) and not isinstance(number, bool) for number in query)):
        raise UserError(f"query={query}: give cls, patches or a patch such as query=[1,2] (row and column from 0)")
    geometry.token_of_patch(*query)
    return (query[0], query[1])


def find_samples(study: Study, subjects: Subjects) -> list[Sample]:
    named = [name for name in ("image", "samples") if getattr(subjects, name) is not None]
    rules = [name for name, on in (("class", subjects.class_ is not None), ("wrong", subjects.wrong)) if on]
    if len(named) + bool(rules) > 1:
        raise UserError(f"{named[0]}= says which pictures: leave out {', '.join([*named[1:], *rules])}=")
    if subjects.image is not None:
        return [Sample(read_image(subjects.image, study.description), None, Path(subjects.image).name)]
    if subjects.num_samples < 1:
        raise UserError(f"num_samples={subjects.num_samples}: give a whole number of at least 1")
    classes = study.description.num_classes
    if subjects.class_ is not None and not 0 <= subjects.class_ < classes:
        raise UserError(f"class={subjects.class_}: give a class from 0 to {classes - 1}")
    wrong = wrong_predictions(study) if subjects.wrong else None
    chosen = choose_samples(study.labels, subjects.num_samples, subjects.samples, subjects.class_, wrong)
    return [Sample(study.images[index], int(study.labels[index]), f"test image {index}") for index in chosen]


def choose_samples(
    labels: Tensor, num_samples: int, chosen: Sequence[int] | None, class_: int | None, wrong: Tensor | None
) -> list[int]:
    """Indices into the test set, by a fixed rule.

    `chosen` are taken as they are. Else, among the images of class `class_` and of the mask `wrong` where those are
    given: in test-set order, the first image of each class, then the second of each, and so on.
    Raises UserError for indices outside, and when nothing is left to choose from.
    """
    if chosen is not None:
        outside = [index for index in chosen if not 0 <= index < len(labels)]
        if outside or not chosen:
            raise UserError(f"samples={list(chosen)}: give indices from 0 to {len(labels) - 1} of the test set")
        return list(chosen)
    allowed = torch.ones(len(labels), dtype=torch.bool) if wrong is None else wrong.cpu().clone()
    if class_ is not None:
        allowed &= labels == class_
    candidates = allowed.nonzero()[:, 0]
    if not len(candidates):
        raise UserError("no test image fits: the model makes no such mistake (leave out wrong= or class=)")
    rounds = torch.zeros(len(candidates), dtype=torch.long)
    for label in labels[candidates].unique():
        of_class = labels[candidates] == label
        rounds[of_class] = torch.arange(int(of_class.sum()))
    order = np.lexsort((candidates.numpy(), rounds.numpy()))  # by round, then as in the test set
    return candidates[order[:num_samples]].tolist()


def wrong_predictions(study: Study) -> Tensor:
    """Mask [image] of the test images that the model gets wrong."""
    with torch.no_grad():
        batches = study.batches(study.images, study.labels)
        return torch.cat([(study.model(images).argmax(dim=1) != labels).cpu() for images, labels in batches])


def choose_device(device: str) -> torch.device:
    """Raises UserError for a device that is not there."""
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


def check_choice(name: str, value: str, choices: object) -> None:
    allowed = get_args(choices)
    if value not in allowed:
        raise UserError(f"{name}={value}: choose one of {', '.join(allowed)}")


def check_output(output: Path) -> Path:
    """Raises UserError for a folder that cannot be made or written; leaves none behind."""
    missing = []
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
