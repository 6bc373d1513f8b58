"""From what was asked for to a Study: which checkpoint, which data, which samples, where to. All mistakes surface here,
before anything is written."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from attention_visualizer.analysis.study.study import ANALYSIS_FILE_NAMES, FileFormat, HeadLayers, Sample, Study
from attention_visualizer.attention.capture import CaptureError
from attention_visualizer.attention.geometry import Geometry, Size
from attention_visualizer.data.datamodule import ImageDataModule
from attention_visualizer.data.image_sets import ImageFolder, ImageSet, InputFormat, LabelledImageSet, read_picture
from attention_visualizer.data.images import DatasetDescription, read_image
from attention_visualizer.data.mnist import MnistUnavailable, holds_all
from attention_visualizer.files.atomic import short_path
from attention_visualizer.files.plain_files import read_yaml
from attention_visualizer.files.tensor_files import first_line
from attention_visualizer.measures.map_measures import Fusion, Query
from attention_visualizer.measures.observation import Observation, RolloutOptions
from attention_visualizer.models import timm_models
from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.runs.checkpoint import LoadedCheckpoint
from attention_visualizer.runs.checkpoint_choice import choose_checkpoint, load_chosen
from attention_visualizer.runs.folders import RunFolder
from attention_visualizer.runs.history import AttentionHistory
from attention_visualizer.support.errors import UserError
from attention_visualizer.support.text import printable

log = logging.getLogger(__name__)

RANDOM_NOTE = "random weights (untrained)"


@dataclass(frozen=True)
class SampleChoice:
    """Which pictures to look at: see `choose_samples`. image: a picture file instead of test images."""

    num_samples: int = 8
    samples: Sequence[int] | None = None
    class_: int | None = None
    wrong: bool = False
    image: str | None = None


@dataclass(frozen=True)
class Weights:
    """A model ready to be looked at, and what is known of where it comes from."""

    model: nn.Module
    text: str
    loaded: LoadedCheckpoint | None = None
    run: RunFolder | None = None
    random: bool = False


def find_weights(ckpt: str, run: str | None, runs_dir: str, seed: int = 0) -> Weights:
    """The model of a checkpoint; `ckpt="random"` gives untrained weights in the newest run's architecture."""
    if ckpt != "random":
        choice = choose_checkpoint(ckpt, run, runs_dir)
        loaded = load_chosen(choice.path)
        check_run(loaded, choice.run)
        origin = f"{choice.reason}; {short_path(choice.path)}, sha256 {loaded.sha256}"
        trained = "" if loaded.epoch is None else f", epoch {loaded.epoch + 1}, step {loaded.step}"
        return Weights(loaded.build_model(), origin + trained, loaded, choice.run, random=False)
    try:
        choice = choose_checkpoint("best", run, runs_dir)
    except UserError:
        if run is not None:
            raise
        return Weights(random_model(seed), "random weights, no training, default model", None, None, random=True)
    loaded = load_chosen(choice.path)
    model = random_model(seed, **loaded.model_config)
    return Weights(model, f"random weights, no training, the model of {choice.path}", loaded, choice.run, random=True)


def check_run(loaded: LoadedCheckpoint, run: RunFolder | None) -> None:
    """Raises UserError for a checkpoint of another model, or other data, than the run that it lies in. What the run
    does not say is not compared."""
    if run is None:
        return
    config: Any = {}
    manifest: Any = {}
    with suppress(OSError, UserError):
        config = read_yaml(run.config_path)
    with suppress(UserError):
        manifest = run.read_manifest()
    for group, path, theirs, mine in (
        ("model.", run.config_path, config.get("model") if isinstance(config, dict) else None, loaded.model_config),
        ("the data set's ", run.manifest_path, manifest.get("data"), loaded.data or {}),
    ):
        for field, value in mine.items():
            # Dropout may change when a run is resumed.
            if isinstance(theirs, dict) and field in theirs and "dropout" not in field and theirs[field] != value:
                raise UserError(
                    f"{loaded.path} was trained with {group}{field}={value!r:.60} and {path} says "
                    f"{theirs[field]!r:.60}: it is of another run, which is to be named with ckpt=, outside this folder"
                )


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
    # A file must not decide where something is downloaded to.
    recorded = loaded.data_dir if loaded.data_dir and holds_all(Path(loaded.data_dir)) else None
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


def foreign_weights(model_from: str, ckpt: str) -> Weights:
    """A model of another library: see foreign_models.build."""
    model = timm_models.build(model_from, ckpt)
    if ckpt == "random":
        return Weights(model, f"random weights, no training, {model_from}", random=True)
    if ckpt == "pretrained":
        return Weights(model, f"{model_from}, pretrained weights as published")
    with Path(ckpt).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return Weights(model, f"{model_from}; {short_path(Path(ckpt))}, sha256 {sha256}")


def test_pictures(weights: Weights, data: ImageDataModule) -> LabelledImageSet:
    """The test set, normalised as the model was trained. Raises UserError where it does not fit the model."""
    description = data.description
    if weights.loaded is not None and weights.loaded.data is not None:
        # The model's own normalisation, whatever split the images come from now.
        description = DatasetDescription.from_dict(weights.loaded.data)
    assert isinstance(weights.model, VisionTransformer)
    check_fit(weights.model, description)
    return LabelledImageSet(description, *data.splits["test"])


def folder_pictures(
    weights: Weights,
    folder: str,
    image_format: InputFormat | None = None,
    class_names: Sequence[str] = (),
    image_size: Size | int | None = None,
) -> ImageFolder:
    """A folder's pictures as the model takes them. Raises UserError where there are none."""
    model = weights.model
    if isinstance(model, VisionTransformer) and image_format is None:
        described = weights.loaded.data if weights.loaded is not None else None
        data = None if described is None else DatasetDescription.from_dict(described)
        channels, side = int(model.config["in_channels"]), int(model.config["img_size"])
        mean, std = (0.5, 0.5) if data is None else (data.mean, data.std)
        image_format = InputFormat((side, side), channels, (mean,) * channels, (std,) * channels)
        class_names = class_names or (() if data is None else data.class_names)
    num_classes = getattr(model, "num_classes", None)
    return ImageFolder.find(
        folder,
        image_format or InputFormat.of(model, image_size),
        skip=lambda path: bool(ANALYSIS_FILE_NAMES.fullmatch(path.name)),  # an earlier analysis inside the folder
        num_classes=num_classes if isinstance(num_classes, int) and num_classes else None,
        class_names=class_names,
    )


def prepare(
    weights: Weights,
    pictures: ImageSet,
    output: Path,
    subjects: SampleChoice,
    query: Query | None = None,
    device: str = "auto",
    file_format: FileFormat = "png",
    head_layers: HeadLayers = "all",
    rollout: RolloutOptions | None = None,
    geometry: Geometry | None = None,
) -> Study:
    """A Study with its samples chosen. Raises UserError for whatever does not fit together."""
    check_choice("format", file_format, FileFormat)
    check_choice("head_layers", head_layers, HeadLayers)
    rollout = rollout or RolloutOptions()
    check_choice("rollout_fusion", rollout.fusion, Fusion)
    if not 0 <= rollout.discard < 1:
        raise UserError(f"rollout_discard={rollout.discard}: give a share from 0 up to, but not, 1")
    chosen_device = choose_device(device)
    notes = [RANDOM_NOTE] if weights.random else []
    notes += [pictures.watermark] if pictures.watermark else []
    study = Study(
        weights.model.to(chosen_device),
        pictures,
        output,
        weights.text,
        "; ".join(notes),
        find_history(None if weights.random else weights.run),
        query=check_query(query),
        given_geometry=geometry,
        rollout=rollout,
        file_format=file_format,
        head_layers=head_layers,
        device=chosen_device,
    )
    study.samples = find_samples(study, subjects)
    seen = look(study)
    if seen.left_out:
        shown, num_layers = len(seen.layer_names), len(seen.layer_names) + len(seen.left_out)
        notes.append(f"only the {shown} of {num_layers} layers whose keys have a place on the image")
        study.watermark = "; ".join(notes)
    return study


def look(study: Study) -> Observation:
    """The first look, where mistakes in the query, unknown layouts and pictures of a wrong size surface."""
    try:
        return study.first_look
    except (UserError, CaptureError):
        raise
    except Exception as error:  # whatever the model's own forward raises
        channels, height, width = study.pictures.shape
        raise UserError(
            f"{type(study.model).__name__} cannot take pictures of {height} x {width} pixels with {channels} channels "
            f"({first_line(error)}): in Python, say what it takes with image_size= or image_format="
        ) from error


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


def check_query(query: Any) -> Query | None:
    """None, "cls", "patches" or (row, column). Whether the model has it shows when it is first looked at."""
    if query is None or query in ("cls", "patches"):
        return query
    pair = isinstance(query, list | tuple) and len(query) == 2
    if not (pair and all(isinstance(number, int) and not isinstance(number, bool) for number in query)):
        raise UserError(f"query={query}: give cls, patches or a patch such as query=[1,2] (row and column from 0)")
    return (query[0], query[1])


def find_samples(study: Study, subjects: SampleChoice) -> list[Sample]:
    named = [name for name in ("image", "samples") if getattr(subjects, name) is not None]
    rules = [name for name, on in (("class", subjects.class_ is not None), ("wrong", subjects.wrong)) if on]
    if len(named) + bool(rules) > 1:
        raise UserError(f"{named[0]}= says which pictures: leave out {', '.join([*named[1:], *rules])}=")
    pictures = study.pictures
    if subjects.image is not None:
        if isinstance(pictures, LabelledImageSet):
            picture = read_image(subjects.image, pictures.description)
        else:
            assert isinstance(pictures, ImageFolder)
            picture = read_picture(subjects.image, pictures.format)
        return [Sample(picture, None, printable(Path(subjects.image).name))]
    if subjects.num_samples < 1:
        raise UserError(f"num_samples={subjects.num_samples}: give a whole number of at least 1")
    labels = pictures.labels
    if labels is None and rules:
        raise UserError(f"{rules[0]}= needs pictures whose classes are known, such as a test set: leave it out")
    classes = pictures.num_classes
    if subjects.class_ is not None and classes is not None and not 0 <= subjects.class_ < classes:
        raise UserError(f"class={subjects.class_}: give a class from 0 to {classes - 1}")
    wrong = wrong_predictions(study) if subjects.wrong else None
    alike = torch.zeros(len(pictures), dtype=torch.long) if labels is None else labels
    chosen = choose_samples(alike, subjects.num_samples, subjects.samples, subjects.class_, wrong)
    return [
        Sample(picture, None if labels is None else int(labels[number]), pictures.name(number))
        for number, picture in zip(chosen, pictures.read(chosen), strict=True)
    ]


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
        found = [(study.model(images).argmax(dim=1) != labels).cpu() for images, labels in study.batches()]
        return torch.cat(found)


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
