"""A page to look at attention by hand: all rows of all heads, of the samples and of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attention_visualizer.analysis.needs import ChapterWriter
from attention_visualizer.analysis.runs.surveyed_runs import images_as_trained
from attention_visualizer.analysis.study.samples import Sample
from attention_visualizer.analysis.study.study import Study, left_out_note, thumbnail
from attention_visualizer.analysis.study.target import Target
from attention_visualizer.explorer.contents import Contents, Group, Layer, Moment, Picture, png
from attention_visualizer.explorer.page import FILE_NAME, render
from attention_visualizer.figures.attention_figures import class_name, moment
from attention_visualizer.files.atomic import write_text
from attention_visualizer.measures.attention_rows import LayerRows, RowLayout, of_one_layout
from attention_visualizer.measures.explanations import METHODS, rows_by_method
from attention_visualizer.measures.observation import Observation, RowOptions
from attention_visualizer.measures.quantised_rows import QuantisedRows, concatenated
from attention_visualizer.report.chapter import Chapter, FigureFile
from attention_visualizer.runs.history import AttentionHistory

FRAME_BYTES = 200_000  # of a page without attention and pictures, at most
STRIDES = (1, 2, 3, 4, 6, 8, 12, 16)  # the first with which MIN_SAMPLES fit is taken
MIN_SAMPLES = 2
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


def contents_of(study: Study, whole: str | None = None) -> Contents | None:
    """Return what the page shows: training, the samples, and the samples by the runs that are compared. None where not
    even a few rows of one sample fit. whole: the name of a layer that every row is shown of.

    Of the bytes that `explorer_mb=` leaves, training takes half at the most, and the others share the rest.
    """
    others = [run for run in study.compared_runs if not run.is_analysed]
    limit = study.explorer_bytes - FRAME_BYTES
    probes = sum(len(png(each.pixels)) for each in probe_pictures(study.history))
    moments = moments_that_fit(study.history, rows_within(limit // 2 - probes))
    training = probes + 4 * sum(AttentionHistory.rows_of(each).nbytes for each in moments) // 3
    observation = observed(study, (limit - training) // (1 + len(others)), whole)
    if moments and (observation is None or stride_of(observation.rows or ()) > 1):
        moments = []  # its rows are not in cells
        observation = observed(study, limit // (1 + len(others)), whole)
    if observation is None or not observation.rows:
        return None
    rows = observation.rows
    samples = study.samples[: len(observation.predicted)]
    warnings = notes_on(study, observation)
    of_all = of_one_layout(rows)
    is_whole = len(rows) == len(observation.layer_names) + len(observation.left_out)
    in_sequence = observation.rollouts is not None and of_all is not None and is_whole
    methods = methods_of(study.target, samples) if in_sequence else {}
    names = "samples", SAMPLES
    groups = [samples_of(study, samples, names, study.weights.split(";")[0], observation, methods)]
    for run in others:
        target = replace(study.target, model=run.loaded.build_model().to(study.target.device))
        options = RowOptions(study.explorer_bytes, stride_of(rows), whole)
        other = observe_samples(target.with_images(images_as_trained(run, study)), samples, options)
        if other.rows is None or [shape_of(each) for each in other.rows] != [shape_of(each) for each in rows]:
            warnings.append(f"{run.label} has other layers, heads or tokens: it is not here")
        else:
            names = f"run{len(groups)}", f"Samples, by {run.label}"
            groups.append(samples_of(study, samples, names, run.label, other))
    if study.history is not None and study.history.rows and not moments:
        warnings.append(f"training is not here: {TOO_LARGE}")
    elif study.history is not None and moments:
        if of_all is not None and all(each["codes"].shape[1:] == of_all.codes.shape[1:] for each in moments):
            groups.insert(0, probes_of(study.history, moments))
            if len(moments) < len(study.history.rows):
                warnings.append(f"{len(moments)} of {len(study.history.rows)} moments are here: {TOO_LARGE}")
        else:
            warnings.append("the history is of other layers, heads or tokens: it is not here")
    # Figures and findings count the layers whose places are known; others follow.
    numbers = {name: number for number, name in enumerate([*observation.layer_names, *observation.left_out], 1)}
    layers = [Layer(each.name, each.layout, each.rows.codes.shape[1], numbers[each.name]) for each in rows]
    facts = [("weights", study.weights.split(";")[0]), ("data", study.target.images.title)]
    return Contents("Attention explorer", facts, warnings, layers, study.target.images.shape[1:], in_sequence, groups)


def rows_within(page_bytes: int) -> int:
    """Return how many bytes of rows fit, as if nothing were gained by deflating: base64 makes 4 bytes of 3."""
    return max(page_bytes, 0) * 3 // 4


def stride_of(layers: Sequence[LayerRows] | Sequence[Layer]) -> int:
    """Return the side of the cells, in patches, that layers are shown in; one of them may be shown whole."""
    return max((each.layout.stride for each in layers), default=1)


def shape_of(layer: LayerRows) -> tuple[RowLayout, int]:
    return layer.layout, layer.rows.codes.shape[1]


def moments_that_fit(history: AttentionHistory | None, max_bytes: int) -> list[dict[str, NDArray[Any]]]:
    """Return the history's entries of rows, as many as fit, evenly spaced, the last and the first among them."""
    entries = [] if history is None else history.rows
    count = min(len(entries), max_bytes // AttentionHistory.rows_of(entries[0]).nbytes) if entries else 0
    chosen = np.linspace(len(entries) - 1, 0, count).round().astype(int)[::-1]
    return [entries[number] for number in chosen]


def notes_on(study: Study, observation: Observation) -> list[str]:
    """Return what a reader must know first."""
    assert observation.rows is not None
    # Layers that other figures leave out are here, as matrices.
    warnings = [note for note in study.output.watermark.split("; ") if note and note != left_out_note(observation)]
    here = {each.name for each in observation.rows}
    missing = [name for name in (*observation.layer_names, *observation.left_out) if name not in here]
    if missing:
        names = f"{', '.join(missing[:3])}{' and others' * (len(missing) > 3)}"
        warnings.append(f"not here: the attention of {names}, not seen, not each image's own, or with weights below 0")
    number, stride = len(observation.predicted), stride_of(observation.rows)
    if number < len(study.samples):
        warnings.append(f"{number} of {len(study.samples)} samples are here: {TOO_LARGE}")
    if stride > 1:
        layouts = [each.layout for each in observation.rows if each.layout.stride > 1]
        cells = (
            f"patches are shown in cells of {stride} x {stride}, as a query by its middle patch, as a key all together"
        )
        some = f"one query of {stride} x {stride} is here, in windows and where queries are no patches"
        said = [cells] * any(each.has_cells for each in layouts) + [some] * any(not each.has_cells for each in layouts)
        warnings.append("; ".join([*said, "rollout and other methods are not", TOO_LARGE]))
    return warnings


def observed(study: Study, page_bytes: int, whole: str | None) -> Observation | None:
    """Observe as many of the samples as fit, in the smallest cells in which a few do; None where not even one does."""
    target, samples = study.target, study.samples
    few = samples[:MIN_SAMPLES]
    picture = max(len(png(thumbnail(sample.image))) for sample in samples)
    first = observe_samples(target, few, RowOptions(rows_within(page_bytes - len(few) * picture), whole=whole))
    for stride in STRIDES:
        of_image = bytes_of_image(first, stride, whole)
        count = min(len(samples), page_bytes // (4 * of_image // 3 + picture + 1))
        if count >= len(few):
            break
    else:
        return None
    if stride == 1 and count == len(few) and first.rows is not None:
        return first
    return observe_samples(target, samples[:count], RowOptions(count * of_image, stride, whole))


def bytes_of_image(observation: Observation, stride: int, whole: str | None) -> int:
    """Return how many bytes the rows of one image take with this stride."""
    return sum(
        replace(layout, stride=1 if name == whole else stride).nbytes(num_heads + len(METHODS) * (stride == 1))
        for name, layout, num_heads in observation.row_layouts
    )


def observe_samples(target: Target, samples: Sequence[Sample], options: RowOptions) -> Observation:
    return target.observe(torch.stack([sample.image for sample in samples]), options)


def picture_of(sample: Sample, class_names: Sequence[str]) -> Picture:
    label = None if sample.label is None else class_name(class_names, sample.label)
    return Picture(thumbnail(sample.image), sample.source, label)


def samples_of(
    study: Study,
    samples: Sequence[Sample],
    names: tuple[str, str],
    weights: str,
    observation: Observation,
    methods: Mapping[str, Sequence[QuantisedRows]] | None = None,
) -> Group:
    """The samples at one moment: by these weights. names: the group's in addresses, and its title; methods: by name, of
    each layer, [picture, 1, query, key]."""
    assert observation.rows is not None
    classes, methods = study.target.images.class_names, methods or {}
    rows = [
        concatenated([layer.rows, *(each[number] for each in methods.values())], axis=1)
        for number, layer in enumerate(observation.rows)
    ]
    moment = Moment(weights, None, rows, *answers(vars(observation), classes))
    return Group(*names, [picture_of(sample, classes) for sample in samples], [moment], tuple(methods))


def methods_of(target: Target, samples: Sequence[Sample]) -> dict[str, list[QuantisedRows]]:
    """Return what other methods say of these samples, by the name of the method: of each layer, [picture, 1, query,
    key]."""
    images = [target.model_input(sample.image[None]) for sample in samples]
    found = [rows_by_method(target.model, image, target.geometry) for image in images]
    return {
        method: [
            QuantisedRows.of(torch.stack([each[method][layer] for each in found])[:, None])
            for layer in range(len(rows))
        ]
        for method, rows in found[0].items()
    }


def probe_pictures(history: AttentionHistory | None) -> list[Picture]:
    if history is None or not history.rows:
        return []
    names = [str(name) for name in history.probe["class_names"]]
    return [
        Picture(image, f"probe image {number}", class_name(names, int(label)) if label >= 0 else None)
        for number, (image, label) in enumerate(zip(history.probe["images"], history.probe["labels"], strict=True), 1)
    ]


def probes_of(history: AttentionHistory, entries: Sequence[dict[str, NDArray[Any]]]) -> Group:
    """The probe images, at these moments that the history keeps whole rows of."""
    names = [str(name) for name in history.probe["class_names"]]
    moments = []
    for entry in entries:
        frame, rows = history.frames[int(entry["frame"])], history.rows_of(entry)
        step = int(frame["step"])
        title = moment(float(frame["epoch"]), step)
        moments.append(
            Moment(title, step, [rows.at(number) for number in range(rows.codes.shape[1])], *answers(frame, names))
        )
    return Group("training", PROBES, probe_pictures(history), moments)


def answers(observed: dict[str, NDArray[Any]], names: Sequence[str]) -> tuple[list[str | None], list[float | None]]:
    """Return the predicted classes and their probabilities, None where there is none."""
    predicted = [class_name(names, int(label)) if label >= 0 else None for label in observed["predicted"]]
    probability = [None if np.isnan(value) else float(value) for value in observed["probability"]]
    return predicted, probability


CHAPTER = ChapterWriter("Explorer", write, ("attention_explorer",))

TEXT = """An interactive page shows each head's attention from any patch, or to it, on {what}. It opens
without a server and fetches nothing. Weights are in 255ths of their row's maximum."""

TOO_LARGE = "more might make the page larger than explorer_mb= says"

UNSUITABLE = """No attention that the explorer can show: weights below 0 are no shares, and of one sample a few rows at
least must fit into the page (explorer_mb=)."""
