"""A page to look at attention by hand: all rows of all heads, of the samples and of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attention_visualizer.analysis.needs import ChapterWriter
from attention_visualizer.analysis.runs.surveyed_runs import images_as_trained
from attention_visualizer.analysis.study.samples import Sample
from attention_visualizer.analysis.study.study import Study, thumbnail
from attention_visualizer.analysis.study.target import Target
from attention_visualizer.explorer.contents import Contents, Group, Layout, Moment, Picture
from attention_visualizer.explorer.page import FILE_NAME, render
from attention_visualizer.figures.attention_figures import class_name, moment
from attention_visualizer.files.atomic import write_text
from attention_visualizer.measures.observation import Observation
from attention_visualizer.report.chapter import Chapter, FigureFile
from attention_visualizer.runs.history import AttentionHistory

MAX_BYTES = 12 * 2**20  # of the samples' rows: with base64, and little gained by deflating, some 16 MB of a page
PROBES, SAMPLES = "Images that training was watched on", "Samples, by the weights of this report"


def write(study: Study) -> Chapter:
    contents = contents_of(study)
    if contents is None:
        return Chapter(CHAPTER.title, UNSUITABLE, applies=False)
    size = write_page(study, contents)
    what = "the samples"
    if len(training := contents.groups[0].moments) > 1:
        what += f" and, at {len(training)} moments of training, on the images that it was watched on"
    figure = FigureFile(FILE_NAME, f"A page to look at by hand, {size / 1e6:.1f} MB.")
    return Chapter(CHAPTER.title, TEXT.format(what=what), [figure])


def write_page(study: Study, contents: Contents) -> int:
    """Write the page into the output folder; return its bytes."""
    page = render(contents)
    write_text(study.output.folder / FILE_NAME, page)
    return len(page.encode("utf-8"))


def contents_of(study: Study) -> Contents | None:
    """Return what the page shows: training, the samples, and the samples by the runs that are compared. None for a
    model that it cannot show."""
    observation = observed(study.target, study.samples)
    if observation is None or observation.rows is None:
        return None
    shape = observation.rows.codes.shape  # [image, layer, head, query, key]
    samples = study.samples[: len(observation.predicted)]
    warnings = [study.output.watermark] if study.output.watermark else []
    if len(samples) < len(study.samples):
        warnings.append(f"{len(samples)} of {len(study.samples)} samples are here: more would make the page too large")
    groups = [samples_of(study, samples, ("samples", SAMPLES), study.weights.split(";")[0], observation)]
    for run in study.compared_runs:
        if run.is_analysed:
            continue
        target = replace(study.target, model=run.loaded.build_model().to(study.target.device))
        other = observed(target.with_images(images_as_trained(run, study)), samples)
        if other is None or other.rows is None or other.rows.codes.shape != shape:
            warnings.append(f"{run.label} has other layers, heads or tokens: it is not here")
        else:
            names = f"run{len(groups)}", f"Samples, by {run.label}"
            groups.append(samples_of(study, samples, names, run.label, other))
    history = study.history
    if history is not None and history.rows:
        if all(entry["codes"].shape[1:] == shape[1:] for entry in history.rows):
            groups.insert(0, probes_of(history))
        else:
            warnings.append("the history is of other layers, heads or tokens: it is not here")
    layout = Layout(observation.geometries[0], shape[1], shape[2], study.target.images.shape[1:])
    facts = [("report of", study.weights.split(";")[0]), ("data", study.target.images.title)]
    return Contents("Attention explorer", facts, warnings, layout, groups)


def observed(target: Target, samples: Sequence[Sample]) -> Observation | None:
    """Observe as many of the samples as fit MAX_BYTES, with all rows; None where not even one does, or where layers do
    not hand on the same tokens."""
    images = torch.stack([sample.image for sample in samples])
    first = target.observe(images[:1], row_bytes=MAX_BYTES)
    if first.rows is None:
        return None
    count = min(len(images), MAX_BYTES // first.rows.codes.nbytes)
    return first if count == 1 else target.observe(images[:count], row_bytes=MAX_BYTES)


def samples_of(
    study: Study, samples: Sequence[Sample], names: tuple[str, str], weights: str, observation: Observation
) -> Group:
    """The samples at one moment: by these weights. names: the group's in addresses, and its title."""
    assert observation.rows is not None
    classes = study.target.images.class_names
    labels = [None if sample.label is None else class_name(classes, sample.label) for sample in samples]
    pictures = [
        Picture(thumbnail(sample.image), sample.source, label) for sample, label in zip(samples, labels, strict=True)
    ]
    return Group(*names, pictures, [Moment(weights, None, observation.rows, *answers(vars(observation), classes))])


def probes_of(history: AttentionHistory) -> Group:
    """The probe images, at the moments that the history keeps whole rows of."""
    names = [str(name) for name in history.probe["class_names"]]
    pictures = [
        Picture(image, f"probe image {number}", class_name(names, int(label)) if label >= 0 else None)
        for number, (image, label) in enumerate(zip(history.probe["images"], history.probe["labels"], strict=True), 1)
    ]
    moments = []
    for entry in history.rows:
        frame = history.frames[int(entry["frame"])]
        step = int(frame["step"])
        title = moment(float(frame["epoch"]), step)
        moments.append(Moment(title, step, history.rows_of(entry), *answers(frame, names)))
    return Group("training", PROBES, pictures, moments)


def answers(observed: dict[str, NDArray[Any]], names: Sequence[str]) -> tuple[list[str | None], list[float | None]]:
    """Return the predicted classes and their probabilities, None where there is none."""
    predicted = [class_name(names, int(label)) if label >= 0 else None for label in observed["predicted"]]
    probability = [None if np.isnan(value) else float(value) for value in observed["probability"]]
    return predicted, probability


CHAPTER = ChapterWriter("Explorer", write, ("attention_explorer",))

TEXT = """An interactive page shows each head's attention from any patch, or to it, on {what}. It opens
without a server and fetches nothing. Weights are in 255ths of their row's maximum."""

UNSUITABLE = """The explorer needs layers that hand on the same tokens, without windows or pooling, and few enough of
them; this model's are not."""
