"""The fields of conf/analyze.yaml: their types, and which of them do not go together. Needs no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from attention_visualizer.support.errors import UserError
from attention_visualizer.support.extras import missing_package
from attention_visualizer.support.field_types import SHARE, at_least, between, fits, remedy

# The words of a field are those of the type that it is passed on as, in modules that load torch; a test compares them.
FIELDS: dict[str, Any] = {
    "ckpt": str,
    "run": str | None,
    "runs_dir": str,
    "runs": str | None,
    "num_heads": Annotated[int | None, at_least(1)],
    "model_from": str | None,
    "images": str | None,
    "num_samples": Annotated[int, at_least(1)],
    "samples": Annotated[list[int] | None, "give whole numbers, such as samples=[12,57]"],
    "class": int | None,
    "wrong": bool,
    "image": str | None,
    "query": Annotated[
        Literal["cls", "patches"] | tuple[int, int] | None,
        "give cls, patches or a patch such as query=[1,2] (row and column from 0)",
    ],
    "head_layers": Annotated[Literal["all", "last"], "choose one of all, last"],
    "rollout_fusion": Annotated[Literal["mean", "max", "min"], "choose one of mean, max, min"],
    "rollout_discard": Annotated[float, SHARE],
    "chapters": Annotated[Literal["quick", "full"] | list, "give quick, full or a list such as [statistics,roles]"],
    "subset": Annotated[
        Literal["all"] | Annotated[int, at_least(2)] | None, "give a whole number of at least 2, or all"
    ],
    "format": Annotated[Literal["png", "pdf", "svg"], "choose one of png, pdf, svg"],
    "explorer_mb": Annotated[float, between("megabytes", 1, 1000)],
    "format_film": Annotated[Literal["webp", "mp4", "gif"], "choose one of webp, mp4, gif"],
    "output_dir": str | None,
    "data_dir": str | None,
    "device": str,
}


def check_options(options: dict[str, Any]) -> None:
    """Raise UserError for fields that are not of their type, are missing, or are none; see also `check_sources`."""
    for name in options.keys() - FIELDS.keys():  # added with "+"
        raise UserError(f"{name}: there is no such field; see --help for all fields")
    for name in FIELDS.keys() - options.keys():  # taken away with "~"
        raise UserError(f"{name} is needed: give a value instead of removing it")
    for name, hint in FIELDS.items():
        if not fits(options[name], hint):
            raise UserError(f"{name}={options[name]}: {remedy(hint, options[name])}")
    check_sources(options)
    check_encoder(options["format_film"])


def check_encoder(film_format: str) -> None:
    """Raise UserError where what writes such films is not installed."""
    if film_format == "mp4":
        try:
            import av  # noqa: F401
        except ModuleNotFoundError as error:
            raise missing_package("format_film=mp4", error, "film") from error


def check_sources(options: dict[str, Any]) -> None:
    """Raise UserError for fields that speak of different models or pictures."""
    if options["num_heads"] is not None and (
        options["model_from"] is not None or options["ckpt"] in ("best", "last", "random")
    ):
        raise UserError("num_heads= is for a file of this project's weights that does not say it: name it with ckpt=")
    if options["images"] == "":
        raise UserError("images= is empty: name a folder of images")
    if options["runs"] is not None and (options["model_from"] is not None or options["ckpt"] == "random"):
        other = "ckpt=random" if options["ckpt"] == "random" else "model_from="
        raise UserError(f"runs= compares trained runs of this project: leave out {other} or runs=")
    chapters = options["chapters"]
    if options["runs"] is not None and isinstance(chapters, list) and not {"runs", "explorer"} & set(chapters):
        raise UserError("runs= is for the chapters runs and explorer: add one to chapters=[...], or leave out runs=")
    if options["model_from"] is None:
        return
    if options["images"] is None and options["image"] is None:
        raise UserError("model_from= is a model of another library: give images=<folder> or image=<file>")
    if options["ckpt"] in ("best", "last"):
        raise UserError(
            f"model_from={options['model_from']}: give the weights with ckpt=<file> (.safetensors, .pth), "
            "ckpt=pretrained (downloads them) or ckpt=random"
        )
    if options["run"] is not None:
        raise UserError("model_from= and run= refer to different models: leave one out")
