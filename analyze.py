"""Analyse the attention of a trained Vision Transformer. `python analyze.py --help` shows what can be set."""

from __future__ import annotations

import atexit
import gc
import logging
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from attention_visualizer.commands import command_line
from attention_visualizer.files import atomic
from attention_visualizer.support.errors import UserError
from attention_visualizer.support.text import print_sanitised
from attention_visualizer.training.overrides import override
from attention_visualizer.training.stopping import StopRequest

# All else is imported when it is needed: it loads torch, for which --help and a misspelt field shall not wait.
if TYPE_CHECKING:
    from attention_visualizer.analysis.study.compared_runs import ComparedRun
    from attention_visualizer.analysis.study.weights import Weights
    from attention_visualizer.data.image_sets import ImageSet

# What each field of conf/analyze.yaml may be; null is allowed where it is the default.
TYPES = {
    "num_samples": int,
    "samples": list,
    "class": int,
    "wrong": bool,
    **dict.fromkeys(
        (
            *("ckpt", "run", "runs_dir", "model_from", "images", "image", "head_layers", "rollout_fusion", "format"),
            *("output_dir", "data_dir", "device", "runs"),
        ),
        str,
    ),
    "rollout_discard": float,
}


MIXED = ("query", "chapters", "subset")  # a word or something else, checked where they are used
KINDS: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    list: "a list such as [1,2]",
    bool: "true or false",
    str: "a text",
}
OPTIONAL = ("run", "runs", "model_from", "images", "samples", "class", "image", "output_dir", "data_dir")


@hydra.main(version_base="1.3", config_path="conf", config_name="analyze")
def main(config: DictConfig) -> None:
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        command_line.fail(UserError("analyze.py takes one checkpoint at a time: compare several with runs=<glob>"))
    options: Any = OmegaConf.to_container(config, resolve=True)
    command_line.begin()
    try:
        check_types(options)
        check_sources(options)
    except UserError as error:
        command_line.fail(error)
    import_analysis()
    from attention_visualizer.attention.capture import CaptureError

    with StopRequest():
        try:
            analyze(options)
        except Exception as error:
            if not (command_line.is_foreseen(error) or isinstance(error, CaptureError)):
                raise
            command_line.fail(error)
        except SystemExit as stop:
            if stop.code in (130, 143):  # Ctrl-C, SIGTERM
                print("interrupted: nothing was written, an earlier analysis is as it was", file=sys.stderr)
            raise


def import_analysis() -> None:
    """Looking for garbage among half a million imported objects takes a sixth of the time to import them."""
    if "torch" in sys.modules:
        return
    gc.disable()
    try:
        from attention_visualizer import analysis  # noqa: F401

        gc.freeze()
        atexit.register(gc.unfreeze)  # or Triton says at the end that they leaked
    finally:
        gc.enable()


def analyze(options: dict[str, Any]) -> None:
    from attention_visualizer.analysis.chapters import CHAPTERS, check_chapters, is_analysis_file
    from attention_visualizer.analysis.preparation import check_output, make_study
    from attention_visualizer.analysis.study.budget import FULL, QUICK
    from attention_visualizer.analysis.study.compared_runs import find_compared_runs
    from attention_visualizer.analysis.study.samples import SampleChoice
    from attention_visualizer.analysis.study.weights import find_weights, folder_images, test_images, timm_weights
    from attention_visualizer.analysis.writing import write_analysis
    from attention_visualizer.measures.observation import RolloutOptions

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    chapters = options["chapters"] if isinstance(options["chapters"], list) else list(CHAPTERS)
    check_chapters(chapters)
    budget = FULL if options["chapters"] == "full" else QUICK
    if options["subset"] is not None:
        budget = replace(budget, images=None if options["subset"] == "all" else options["subset"], max_cost=None)
    if options["model_from"] is None:
        weights = find_weights(options["ckpt"], options["run"], options["runs_dir"])
    else:
        weights = timm_weights(options["model_from"], options["ckpt"])
    print_sanitised(f"Checkpoint: {weights.text}")
    folder = check_output(output_folder(options["output_dir"], weights))
    images: ImageSet
    if options["images"] is None:
        images = test_images(weights, options["data_dir"])
    else:
        images = folder_images(weights, options["images"], skip=is_analysis_file)
    compared_runs: list[ComparedRun] = []
    if options["runs"] is not None:
        assert weights.loaded is not None  # see check_sources
        compared_runs = find_compared_runs(options["runs"], weights.loaded, weights.run)
        print(f"Compared:   {len(compared_runs)} runs, this one among them")
    study = make_study(
        weights,
        images,
        folder,
        SampleChoice(options["num_samples"], options["samples"], options["class"], options["wrong"], options["image"]),
        query=options["query"],
        rollout=RolloutOptions(options["rollout_fusion"], options["rollout_discard"]),
        device=options["device"],
        file_format=options["format"],
        head_layers=options["head_layers"],
        budget=budget,
        compared_runs=compared_runs,
    )
    command = shlex.join(["python", "analyze.py", *reproducing_overrides(weights)])
    written = write_analysis(study, command, chapters)
    print_sanitised(f"Page:       {atomic.short_path(written.page)}")
    print_sanitised(f"Report:     {atomic.short_path(written.report)}")
    if written.missing:
        raise SystemExit(1)


def check_types(options: dict[str, Any]) -> None:
    """Raises UserError for a value of the wrong type."""
    for name in options.keys() - {*TYPES, *MIXED}:  # added with "+"
        raise UserError(f"{name}: there is no such field; see --help for those there are")
    for name in {*TYPES, *MIXED} - options.keys():  # taken away with "~"
        raise UserError(f"{name} is needed: give a value instead of taking it away")
    for name, kind in TYPES.items():
        value = options[name]
        optional = name in OPTIONAL
        kinds = (float, int) if kind is float else kind
        right = isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))
        if not (right or (value is None and optional)):
            raise UserError(f"{name}={value}: give {KINDS[kind]}")
    if not isinstance(options["chapters"], list) and options["chapters"] not in ("quick", "full"):
        raise UserError(f"chapters={options['chapters']}: give quick, full or a list such as [statistics,roles]")
    subset = options["subset"]
    if (
        subset is not None
        and subset != "all"
        and (isinstance(subset, bool) or not isinstance(subset, int) or subset < 2)
    ):
        raise UserError(f"subset={subset}: give a whole number of at least 2, or all")
    if any(not isinstance(index, int) or isinstance(index, bool) for index in options["samples"] or []):
        raise UserError(f"samples={options['samples']}: give whole numbers, such as samples=[12,57]")


def check_sources(options: dict[str, Any]) -> None:
    """Raises UserError for fields that speak of different models or pictures."""
    if options["images"] == "":
        raise UserError("images= is empty: name a folder of pictures")
    if options["runs"] is not None and (options["model_from"] is not None or options["ckpt"] == "random"):
        other = "ckpt=random" if options["ckpt"] == "random" else "model_from="
        raise UserError(f"runs= compares trained runs of this project: leave out {other} or runs=")
    if options["model_from"] is None:
        return
    if options["images"] is None:
        raise UserError("model_from= is a model of another library: say which pictures with images=<folder>")
    if options["ckpt"] in ("best", "last"):
        raise UserError(
            f"model_from={options['model_from']}: say which weights with ckpt=<file> (.safetensors, .pth), "
            "ckpt=pretrained (downloads them) or ckpt=random"
        )
    if options["run"] is not None:
        raise UserError("model_from= and run= speak of different models: leave one out")


def reproducing_overrides(weights: Weights) -> list[str]:
    """This command's overrides with the checkpoint by its path: "best" may mean another one tomorrow."""
    overrides = [str(override) for override in HydraConfig.get().overrides.task]
    if weights.random or weights.loaded is None:
        return overrides
    others = [override for override in overrides if override.split("=")[0] not in ("ckpt", "run", "runs_dir")]
    return [override("ckpt", atomic.short_path(weights.loaded.path)), *others]


def output_folder(output_dir: str | None, weights: Weights) -> Path:
    if output_dir is not None:
        if not output_dir:
            raise UserError("output_dir= is empty: name a folder")
        return Path(output_dir)
    name = "attention_analysis_random" if weights.random else "attention_analysis"
    if weights.run is None:
        return Path(name)
    output = weights.run.path / name
    if not output.resolve().is_relative_to(weights.run.path.resolve()):  # a run may come from elsewhere
        raise UserError(f"{output} leads out of the run's folder: say where to with output_dir=")
    return output


if __name__ == "__main__":
    if {"-m", "--multirun"} & set(sys.argv[1:]):
        command_line.fail(UserError("analyze.py takes one checkpoint at a time: compare several with runs=<glob>"))
    command_line.run(main)
