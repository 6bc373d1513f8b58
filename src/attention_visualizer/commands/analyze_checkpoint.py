"""What `python analyze.py` does once its options are checked: from a checkpoint to a report."""

from __future__ import annotations

import logging
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from attention_visualizer.analysis.chapters import CHAPTERS, check_chapters, is_analysis_file
from attention_visualizer.analysis.preparation import check_output, choose_device, make_study
from attention_visualizer.analysis.study.analysed_weights import (
    Weights,
    find_weights,
    folder_images,
    test_images,
    timm_weights,
)
from attention_visualizer.analysis.study.budget import FULL, QUICK
from attention_visualizer.analysis.study.compared_runs import ComparedRun, find_compared_runs
from attention_visualizer.analysis.study.samples import SampleChoice
from attention_visualizer.analysis.writing import print_findings, write_analysis
from attention_visualizer.data.image_sets import ImageSet
from attention_visualizer.data.images import read_picture
from attention_visualizer.files import atomic
from attention_visualizer.measures.observation import RolloutOptions
from attention_visualizer.runs.folders import ANALYSIS
from attention_visualizer.support.errors import UserError
from attention_visualizer.support.invocation import invocation
from attention_visualizer.support.machine import peak_memory
from attention_visualizer.support.text import print_sanitised
from attention_visualizer.training.overrides import override


def analyze(options: dict[str, Any]) -> None:
    """Write the analysis that `options`, checked, ask for."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    chapters = options["chapters"] if isinstance(options["chapters"], list) else list(CHAPTERS)
    check_chapters(chapters)
    choose_device(options["device"])  # before a large folder is read
    single = options["image"]
    if single is not None and options["images"] is None and (options["model_from"] or Path(single).is_dir()):
        options["images"], options["image"] = single, None  # there is no test set beside it
    if options["image"] is not None:
        read_picture(options["image"], channels=1)
    budget = FULL if options["chapters"] == "full" else QUICK
    if options["subset"] is not None:
        budget = replace(budget, images=None if options["subset"] == "all" else options["subset"], max_cost=None)
    if options["model_from"] is None:
        weights = find_weights(options["ckpt"], options["run"], options["runs_dir"], num_heads=options["num_heads"])
    else:
        weights = timm_weights(options["model_from"], options["ckpt"])
    print_sanitised(f"Checkpoint: {weights.text}")
    folder = check_output(output_folder(options["output_dir"], weights, options["images"]))
    images: ImageSet
    if options["images"] is None:
        images = test_images(weights, options["data_dir"])
    else:
        images = folder_images(weights, options["images"], skip=is_analysis_file)
    compared_runs: list[ComparedRun] = []
    if options["runs"] is not None:
        assert weights.loaded is not None  # see check_sources
        compared_runs = find_compared_runs(options["runs"], weights.loaded, weights.run, options["num_heads"])
        print(f"Compared:   {len(compared_runs)} runs, this one among them")
    study = make_study(
        weights,
        images,
        folder,
        SampleChoice(options["num_samples"], options["samples"], options["class"], options["wrong"], options["image"]),
        query=tuple(query) if isinstance(query := options["query"], list) else query,
        rollout=RolloutOptions(options["rollout_fusion"], options["rollout_discard"]),
        device=options["device"],
        file_format=options["format"],
        film_format=options["format_film"],
        head_layers=options["head_layers"],
        explorer_mb=options["explorer_mb"],
        budget=budget,
        compared_runs=compared_runs,
    )
    command = shlex.join([*invocation("analyze"), *reproducing_overrides(weights)])
    written = write_analysis(study, command, chapters)
    print_findings(written)
    print(f"Memory:     {peak_memory(study.target.device)}")
    print_sanitised(f"HTML:       {atomic.short_path(written.page)}")
    print_sanitised(f"Markdown:   {atomic.short_path(written.report)}")
    if written.missing:
        raise SystemExit(1)


def reproducing_overrides(weights: Weights) -> list[str]:
    """Return this command's overrides with the checkpoint by its path: "best" may mean another one tomorrow."""
    overrides = [str(override) for override in HydraConfig.get().overrides.task]
    if weights.random or weights.loaded is None:
        return overrides
    others = [override for override in overrides if override.split("=")[0] not in ("ckpt", "run", "runs_dir")]
    return [override("ckpt", atomic.short_path(weights.loaded.path)), *others]


def output_folder(output_dir: str | None, weights: Weights, images: str | None = None) -> Path:
    """Return where the analysis goes: as asked for, else a folder of the run, another one for images of one's own.
    Raise UserError for one outside it."""
    if output_dir is not None:
        if not output_dir:
            raise UserError("output_dir= is empty: name a folder")
        return Path(output_dir)
    name = f"{ANALYSIS}_random" if weights.random else ANALYSIS
    if weights.run is None:
        return Path(name)
    if images is not None:
        name += "_" + re.sub(r"[^\w-]+", "_", Path(images).resolve().stem)
    output = weights.run.path / name
    if not output.resolve().is_relative_to(weights.run.path.resolve()):  # a run may come from elsewhere
        raise UserError(f"{output} leads out of the run's folder: choose another with output_dir=")
    return output
