"""Which weights are analysed: of a checkpoint, of another library's model, or random ones; and their test images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attention_visualizer.attention.geometry import Size
from attention_visualizer.data.datasets import Dataset, load_dataset, mnist_folder
from attention_visualizer.data.image_sets import ImageFolder, LabelledImageSet
from attention_visualizer.data.images import DatasetDescription
from attention_visualizer.data.input_format import InputFormat
from attention_visualizer.data.mnist import MnistUnavailable, holds_all
from attention_visualizer.files.atomic import short_path
from attention_visualizer.files.digests import file_digest
from attention_visualizer.files.plain_files import read_yaml
from attention_visualizer.models import timm_models
from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.runs.checkpoint import LoadedCheckpoint
from attention_visualizer.runs.checkpoint_choice import choose_checkpoint
from attention_visualizer.runs.config_fields import is_architecture
from attention_visualizer.runs.folders import RunFolder
from attention_visualizer.support.errors import UserError


@dataclass(frozen=True)
class Weights:
    model: nn.Module
    text: str  # where they come from, in words
    loaded: LoadedCheckpoint | None = None
    run: RunFolder | None = None
    random: bool = False
    digest: str | None = None  # the first 16 hex digits of SHA-256, of the file or of a given model's tensors


def find_weights(ckpt: str, run: str | None, runs_dir: str, seed: int = 0, num_heads: int | None = None) -> Weights:
    """Return the model of a checkpoint; `ckpt="random"` gives untrained weights in the newest run's architecture.

    num_heads: of the model in a file that does not say it."""
    if ckpt != "random":
        choice = choose_checkpoint(ckpt, run, runs_dir, num_heads)
        loaded = choice.loaded
        check_run(loaded, choice.run)
        origin = f"{choice.reason}; {short_path(choice.path)}, sha256 {loaded.sha256}"
        trained = "" if loaded.epoch is None else f", epoch {loaded.epoch + 1}, step {loaded.step}"
        return Weights(loaded.build_model(), origin + trained, loaded, choice.run, digest=loaded.sha256)
    try:
        choice = choose_checkpoint("best", run, runs_dir)
    except UserError:
        if run is not None:
            raise
        return Weights(random_model(seed), "random weights, no training, default model", random=True)
    loaded = choice.loaded
    model = random_model(seed, **loaded.model_config.to_dict())
    return Weights(model, f"random weights, no training, the model of {choice.path}", loaded, choice.run, random=True)


def check_run(loaded: LoadedCheckpoint, run: RunFolder | None) -> None:
    """Raise UserError for a checkpoint of another model, or other data, than the run that it lies in. What the run
    does not say is not compared."""
    if run is None:
        return
    config: Any = {}
    with suppress(OSError, UserError):
        config = read_yaml(run.config_path)
    manifest = run.manifest_or_empty()
    trained_on = {} if loaded.data is None else loaded.data.to_dict()
    architecture = loaded.model_config.to_dict()
    for group, path, theirs, mine in (
        ("model.", run.config_path, config.get("model") if isinstance(config, dict) else None, architecture),
        ("the data set's ", run.manifest_path, manifest.get("data"), trained_on),
    ):
        for field, value in mine.items():
            fixed = group != "model." or is_architecture(field)
            if isinstance(theirs, dict) and field in theirs and fixed and theirs[field] != value:
                raise UserError(
                    f"{loaded.path} was trained with {group}{field}={value!r:.60} and {path} says "
                    f"{theirs[field]!r:.60}: it belongs to another run: give it with ckpt=, outside this folder"
                )


def random_model(seed: int = 0, **config: Any) -> VisionTransformer:
    """Return an untrained model in eval mode. Leave the global random state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VisionTransformer(**config).eval()


def timm_weights(model_from: str, ckpt: str) -> Weights:
    """Return a model of timm: see timm_models.build."""
    model = timm_models.build(model_from, ckpt)
    if ckpt == "random":
        return Weights(model, f"random weights, no training, {model_from}", random=True)
    if ckpt == "pretrained":
        return Weights(model, f"{model_from}, pretrained weights as published")
    digest = file_digest(Path(ckpt))
    return Weights(model, f"{model_from}; {short_path(Path(ckpt))}, sha256 {digest}", digest=digest)


def load_data(loaded: LoadedCheckpoint | None, data_dir: str | None = None) -> Dataset:
    """Return the data set that the checkpoint was trained on; for files that do not say, MNIST or what stands in for
    it.

    Raise UserError when the checkpoint's own data set cannot be had: another one would give other findings.
    """
    if loaded is None or loaded.data is None:
        return load_dataset("mnist", data_dir)
    described = loaded.data
    # A file must not decide where something is downloaded to.
    recorded = loaded.data_dir if loaded.data_dir and holds_all(Path(loaded.data_dir)) else None
    folder = mnist_folder(data_dir or recorded)
    try:
        return load_dataset(described.name, folder, loaded.split_seed or 0, fallback=None)
    except UserError as error:
        if not isinstance(error.__cause__, MnistUnavailable):
            raise
        raise UserError(
            f"data_dir={folder}: {described.title}, on which {loaded.path} was trained, is not there, and "
            f"{error.__cause__}: name the folder of its files, here or in the environment variable MNIST_DIR"
        ) from error


def test_images(weights: Weights, data_dir: str | None = None) -> LabelledImageSet:
    """Return the test set, normalised as the model was trained. Raise UserError where it does not fit the model."""
    data = load_data(weights.loaded, data_dir)
    description = data.description
    if weights.loaded is not None and weights.loaded.data is not None:
        # The model's own normalisation, whatever split the images come from now.
        description = weights.loaded.data
    assert isinstance(weights.model, VisionTransformer)
    check_fit(weights.model, description)
    return LabelledImageSet(description, *data.splits["test"])


def check_fit(model: VisionTransformer, description: DatasetDescription) -> None:
    for name, mine, theirs in (
        ("image size", model.config["img_size"], description.image_size),
        ("number of channels", model.config["in_channels"], description.channels),
        ("number of classes", model.config["num_classes"], description.num_classes),
    ):
        if mine != theirs:
            raise UserError(f"the model's {name} is {mine}, but {description.title} has {theirs}")


def folder_images(
    weights: Weights,
    folder: str,
    image_format: InputFormat | None = None,
    class_names: Sequence[str] = (),
    image_size: Size | int | None = None,
    skip: Callable[[Path], bool] = lambda path: False,
) -> ImageFolder:
    """Return a folder's pictures as the model expects them. Raise UserError where there are none. skip: files to leave
    out."""
    model, watermark = weights.model, ""
    if isinstance(model, VisionTransformer) and image_format is None:
        data = weights.loaded.data if weights.loaded is not None else None
        channels, side = int(model.config["in_channels"]), int(model.config["img_size"])
        mean, std = (0.5, 0.5) if data is None else (data.mean, data.std)
        image_format = InputFormat((side, side), channels, (mean,) * channels, (std,) * channels)
        if data is not None:  # trained on digits
            image_format = replace(image_format, fit="ink")
            class_names = class_names or data.class_names
            watermark = data.watermark.replace("data: ", "trained on ")
    return ImageFolder.find(
        folder,
        image_format or InputFormat.of(model, image_size),
        skip=skip,
        class_names=class_names,
        watermark=watermark,
    )
