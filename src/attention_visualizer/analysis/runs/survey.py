"""The compared runs, each looked at with the same pictures, and what is measured of each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attention_visualizer.analysis.study.compared_runs import ComparedRun
from attention_visualizer.analysis.study.study import FIRST_CONTROL, Study
from attention_visualizer.analysis.study.survey import Survey
from attention_visualizer.analysis.study.target import Target
from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.attention.outputs import logits_of
from attention_visualizer.data.image_sets import LabelledImageSet
from attention_visualizer.data.ink import inked_patches
from attention_visualizer.measures.intervals import BootstrapMeans, Interval
from attention_visualizer.measures.map_measures import mean_attention_distance, uniform_entropy
from attention_visualizer.models.untrained import random_weights
from attention_visualizer.report.chapter import Table
from attention_visualizer.runs.config_fields import is_architecture

Array = NDArray[Any]
PICTURES = 1000  # that each run is surveyed on
CONTROL_FACTOR = 1.5  # how far beyond random weights an effect must go
SEED_CLAIMS = 8  # seeds from which on statements about seeds are more than descriptive: 2 / 2^8 < 0.01


@dataclass(frozen=True)
class SurveyedRun:
    """One run over the pictures. right: [picture], whether each is classified right; of a run, over all pictures of the
    study, else over those of the survey."""

    run: ComparedRun
    survey: Survey
    right: Array | None

    @cached_property
    def accuracies(self) -> BootstrapMeans | None:
        if self.right is None:
            return None
        means = BootstrapMeans()
        for start in range(0, len(self.right), PICTURES):  # bounds memory
            means.update(self.right[start : start + PICTURES].astype(np.float64))
        return means

    @property
    def accuracy(self) -> Interval | None:
        return None if self.accuracies is None else self.accuracies.of_group()


def survey_runs(study: Study) -> list[SurveyedRun]:
    """In the order of `study.compared_runs`."""
    looked = []
    rows = study.stratified_rows(PICTURES)
    for position, run in enumerate(study.compared_runs):
        study.progress(f"run {position + 1} of {len(study.compared_runs)}, {run.label}")
        model = run.loaded.build_model().to(study.target.device)
        target = replace(study.target, model=model, images=images_for(run, study))
        survey = target.survey(rows)
        study.errors.append(survey.reconstruction_error)
        looked.append(SurveyedRun(run, survey, classified_right(target)))
    return looked


def random_weights_of(study: Study, looked: list[SurveyedRun]) -> list[list[SurveyedRun]]:
    """For each run, so many models with random weights in its architecture as the study's effort says."""
    rows = study.stratified_rows(PICTURES)
    found: dict[str, list[SurveyedRun]] = {}
    every = []
    for each in looked:
        # What training alone knows of makes no other model.
        config = {
            name: value for name, value in each.run.loaded.model_config.to_dict().items() if is_architecture(name)
        }
        if repr(config) not in found:
            study.progress(f"random weights in the architecture of {each.run.label}")
            models = [
                random_weights(each.run.loaded.build_model().to(study.target.device), FIRST_CONTROL + number)
                for number in range(study.budget.controls)
            ]
            surveys = [study.target.with_model(model).survey(rows) for model in models]
            found[repr(config)] = [SurveyedRun(each.run, survey, survey.right) for survey in surveys]
        every.append(found[repr(config)])
    return every


def images_for(run: ComparedRun, study: Study) -> LabelledImageSet:
    """The study's images, normalised as the run was trained: another split has another mean."""
    images = study.target.images
    assert isinstance(images, LabelledImageSet)
    if run.loaded.data is None:
        return images
    return replace(images, description=run.loaded.data)


def classified_right(target: Target) -> Array | None:
    """Whether each image is classified right: [image]; None where classes or logits are not known."""
    if target.images.labels is None:
        return None
    with torch.no_grad():
        found = []
        for batch, labels in target.batches():
            logits = logits_of(target.model(batch))
            if logits is None or labels is None:
                return None
            found.append((logits.argmax(dim=1) == labels).cpu().numpy())
    return np.concatenate(found)


# --- quantities that mean the same in models of different sizes -----------------------------------------------------


def uniform_distance(geometry: Geometry) -> float:
    """The mean attention distance of uniform attention, in pixels."""
    tokens = geometry.num_tokens
    uniform: Tensor = torch.full((1, 1, tokens, tokens), 1 / tokens)
    return float(mean_attention_distance(uniform, geometry))


def scales(survey: Survey, measure: str) -> Array:
    """What each layer's values are divided by, to be relative to uniform attention; NaN where a layer does not count:
    [layer]."""
    found = np.ones(len(survey.geometries))
    if measure == "entropy":
        found = np.array([uniform_entropy(geometry.num_tokens) for geometry in survey.geometries])
    if measure == "distance":
        found = np.array([uniform_distance(geometry) for geometry in survey.geometries])
        if survey.reads_class_token:
            found[-1] = np.nan  # the last layer's patch queries cannot affect the logits
    return found


def by_head(survey: Survey, measure: str) -> Array:
    """Means over pictures, relative to uniform attention where that has a value: [layer, head]."""
    return survey.summaries[measure].mean / scales(survey, measure)[:, None]


def ink_ratios(survey: Survey, inked: Array) -> Array:
    """Attention to inked patches relative to that of a head that attends to all patches alike: [layer, head].

    inked: [kept, patch], bool. Of each head's attention to patches; 1 is uniform.
    """
    on_ink = np.einsum("nlhp,np->lh", survey.shares.astype(np.float64), inked.astype(np.float64)) / len(inked)
    return on_ink / inked.mean()


def inked_of(study: Study, survey: Survey) -> Array:
    """Which patches hold ink in the pictures whose maps `survey` kept: [kept, patch]."""
    numbers = study.stratified_rows(PICTURES)[survey.kept]
    return inked_patches(study.target.images.read(numbers.tolist()), survey.grid).numpy()


# --- tables ---------------------------------------------------------------------------------------------------------


def table_of_runs(looked: list[SurveyedRun]) -> Table:
    rows = []
    for each in looked:
        run, accuracy = each.run, each.accuracy
        rows.append(
            [
                run.label + (" (this one)" if run.own else ""),
                "–" if run.seed is None else str(run.seed),
                ", ".join(run.setting) or "–",
                "–" if run.validation_accuracy is None else f"{run.validation_accuracy:.2%}",
                "–" if accuracy is None else accuracy.text(2, percent=True),
            ]
        )
    n = "" if looked[0].right is None else f", over {len(looked[0].right):,} pictures with its 95 % interval"
    return Table(
        f"The runs: validation accuracy as the run recorded it, accuracy on the pictures here{n}.",
        ["run", "seed", "settings that differ", "validation accuracy", "accuracy here"],
        rows,
    )


def remarks_of(looked: list[SurveyedRun]) -> str:
    """What was left out, and why, as a paragraph; empty if nothing was."""
    remarks = [remark for each in looked for remark in each.run.remarks]
    return f"\n\nOf what was matched: {'; '.join(remarks)}." if remarks else ""


def numbers_of_runs(looked: list[SurveyedRun]) -> list[dict[str, Any]]:
    return [
        {
            "run": each.run.label,
            "seed": each.run.seed,
            "settings": each.run.knobs,
            "sha256": each.run.loaded.sha256,
            "validation_accuracy": each.run.validation_accuracy,
            "accuracy": None if each.accuracy is None else each.accuracy.numbers(),
        }
        for each in looked
    ]
