"""AttentionVisualizer: the analysis as a class, for notebooks and scripts."""

from __future__ import annotations

import html
import itertools
import logging
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from attention_visualizer.analysis.chapters import CHAPTERS, is_analysis_file
from attention_visualizer.analysis.explorer import chapter as explorer_chapter
from attention_visualizer.analysis.heads import chapter as heads_chapter
from attention_visualizer.analysis.layers import chapter as layers_chapter
from attention_visualizer.analysis.patterns import chapter as patterns_chapter
from attention_visualizer.analysis.preparation import check_output, choose_device, make_study
from attention_visualizer.analysis.statistics.chapter import records
from attention_visualizer.analysis.statistics.figure import draw_layers
from attention_visualizer.analysis.study.analysed_weights import (
    Weights,
    find_weights,
    folder_images,
    random_model,
    test_images,
)
from attention_visualizer.analysis.study.samples import Sample, SampleChoice, check_sample, find_samples
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.analysis.study.survey import survey_model
from attention_visualizer.analysis.writing import print_findings, write_analysis
from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.attention.inputs import check_has_numbers
from attention_visualizer.data.image_sets import ImageSet
from attention_visualizer.data.input_format import InputFormat
from attention_visualizer.explorer.page import FILE_NAME
from attention_visualizer.files import atomic
from attention_visualizer.files.digests import model_digest
from attention_visualizer.report.markdown import PAGE
from attention_visualizer.runs.folders import ANALYSIS
from attention_visualizer.support.errors import UserError
from attention_visualizer.support.extras import missing_package
from attention_visualizer.support.text import print_sanitised

log = logging.getLogger(__name__)

OWNER = "model.json"  # inside an output folder: whose analysis it holds


class ShownPath(type(Path())):  # type: ignore[misc]  # of this system: before Python 3.12 Path itself has no subclasses
    """The path of a page, which a notebook shows."""

    def _page(self) -> Path:
        return Path(self)

    def _repr_html_(self) -> str:
        page = self._page().read_text(encoding="utf-8")
        # Or a link inside the page would lead to the notebook's address.
        page = html.escape(page.replace("<head>", '<head>\n<base href="about:srcdoc">', 1))
        page = page.encode("ascii", "xmlcharrefreplace").decode()  # whatever the notebook's encoding
        return f'<iframe srcdoc="{page}" width="100%" height="900" style="border: 1px solid #ccc"></iframe>'


class ReportPath(ShownPath):
    """The path of a report in Markdown, which a notebook shows as the page beside it."""

    def _page(self) -> Path:
        return self.parent / PAGE


class AttentionVisualizer:
    """Show what a Vision Transformer attends to: this project's in `model_path`, or any other as `model`.

    model_path: a .ckpt, .pth or .safetensors file. Where it does not exist, a warning is given and random weights
    are shown, and every figure says so; a file that is not a usable checkpoint raises UserError.
    model: a PyTorch module instead, from whatever library; it is put into eval mode and moved to the device, and stays
    so. Then `images` says which pictures: a folder of them in any size. What the model does not state itself is given
    by `geometry` (where tokens lie), `image_size` (pixels, one number or height and width), or `image_format` (size,
    channels and normalisation). `num_heads` is for a file of this project's weights that does not say it.
    device: "auto", "cpu" or "cuda". output_dir: None is attention_analysis/ in the current folder, or, if that holds
    the analysis of another model, attention_analysis_<model>/.
    data_dir: where MNIST is; None is where the model was trained, or the environment variable MNIST_DIR.
    """

    def __init__(
        self,
        model_path: str | Path | None = None,
        device: str = "auto",
        output_dir: str | Path | None = None,
        data_dir: str | None = None,
        *,
        model: nn.Module | None = None,
        images: str | Path | None = None,
        geometry: Geometry | None = None,
        image_size: int | tuple[int, int] | None = None,
        image_format: InputFormat | None = None,
        class_names: Sequence[str] = (),
        num_heads: int | None = None,
    ) -> None:
        if (model_path is None) == (model is None):
            raise UserError("give either model_path= (a checkpoint of this project) or model= (any PyTorch ViT)")
        if model is not None and not isinstance(model, nn.Module):
            raise UserError(f"model={model!r:.60} is no PyTorch module: give the model itself, or model_path=")
        if model is not None and images is None:
            raise UserError("model= needs images: give images=<folder>")
        if images is not None and not isinstance(images, str | Path):
            raise UserError(f"images= is a {type(images).__name__}: give the path of a folder or a file")
        if model is not None:
            check_has_numbers(model)
            if model.training:
                log.warning("model= is put into eval mode: call its train() before you train it on")
        self.model_path = Path(model_path) if model_path is not None else Path(type(model).__name__)
        self.device = choose_device(device)
        self.data_dir = data_dir
        self._asked_output = None if output_dir is None else Path(output_dir)
        self._model = model
        self._images = images
        self._geometry = geometry
        self._image_size = image_size
        self._image_format = image_format
        self._class_names = class_names
        self._num_heads = num_heads
        self._study: Study | None = None
        self._digest = ""  # of a given model's weights
        self._warning = ""  # said first, and last

    def __repr__(self) -> str:
        return f"AttentionVisualizer({str(self.model_path)!r}, device={str(self.device)!r})"

    def load_optimal_model(self) -> nn.Module:
        """Return the model, in eval mode on the device; read once."""
        return self.study.target.model

    @property
    def study(self) -> Study:
        """Model, data and output folder together; made when first needed."""
        if self._study is None:
            weights = self._read_weights()
            self._study = make_study(
                weights,
                self._find_images(weights),
                check_output(self._output_folder()),
                device=str(self.device),
                geometry=self._geometry,
            )
            log.debug("%s on %s, figures go to %s", self._study.weights, self.device, self._study.output.folder)
        return self._study

    def _find_images(self, weights: Weights) -> ImageSet:
        if self._images is None:
            return test_images(weights, self.data_dir)
        return folder_images(
            weights, str(self._images), self._image_format, self._class_names, self._image_size, is_analysis_file
        )

    def get_test_samples(self, num_samples: int = 8) -> list[tuple[Tensor, int | None]]:
        """Return images, float32 [channel, height, width] in 0..1, with their classes (None where they are not known),
        by the report's fixed rule."""
        samples = find_samples(self.study.target, SampleChoice(num_samples))
        return [(sample.image.float() / 255, sample.label) for sample in samples]

    def visualize_attention_patterns(self, image: Any, label: int | None, i: int = 0) -> Figure:
        """Draw attention by layer, alone and over the image; saved as attention_pattern_sample_<i>.png."""
        return self._draw(patterns_chapter, "attention_pattern", image, label, i)

    def analyze_attention_heads(self, image: Any, label: int | None, i: int = 0) -> Figure:
        """Draw layers x heads; saved as attention_heads_sample_<i>.png."""
        return self._draw(heads_chapter, "attention_heads", image, label, i)

    def create_layer_comparison(self, image: Any, label: int | None, i: int = 0) -> Figure:
        """Draw attention from shallow to deep layers; saved as layer_comparison_sample_<i>.png."""
        return self._draw(layers_chapter, "layer_comparison", image, label, i)

    def create_attention_statistics(self, samples: Sequence[tuple[Any, int | None]]) -> tuple[Figure, pd.DataFrame]:
        """Draw statistics over `samples`, saved as attention_statistics.png. Return the figure and a table with a row
        for each measure, layer and head."""
        if not samples:
            raise UserError("there are no samples to make statistics of: give a list of (image, label)")
        given = [as_sample(image, label, i) for i, (image, label) in enumerate(samples)]
        target, output = self.study.target, self.study.output
        for sample in given:
            check_sample(sample, target.images)
        inputs = target.model_input(torch.stack([sample.image for sample in given]))
        known = [sample.label for sample in given if sample.label is not None]
        labels = torch.tensor(known, device=inputs.device) if len(known) == len(given) else None
        survey = survey_model(target.model, [(inputs, labels)], labels, len(given), target.geometry, target.rollout)
        self.study.errors.append(survey.reconstruction_error)
        figure = draw_layers(survey, f"{len(given):,} given images")
        self._sign_output()
        output.save(figure, "attention_statistics")
        return figure, pd.DataFrame(records(survey))

    def run_comprehensive_analysis(self, model_path: str | Path | None = None) -> ReportPath:
        """Write every figure, the statistics over the whole test set and the report, in Markdown and HTML. Return the
        path of the Markdown report, which a notebook shows as the page.

        A chapter that fails is named on stderr and in the report, which then may lie in <output>_incomplete: see
        `write_analysis`.

        Another `model_path` than before switches to that model.
        """
        if model_path is not None and Path(model_path) != self.model_path:
            if self._model is not None:  # what was said of it does not hold for the other one
                self._geometry, self._image_size, self._image_format, self._class_names = None, None, None, ()
            self.model_path, self._model, self._study, self._num_heads = Path(model_path), None, None, None
        self._sign_output()
        given = repr(str(self.model_path)) if self._model is None else f"model=model, images={str(self._images)!r}"
        given += "" if self._num_heads is None else f", num_heads={self._num_heads}"
        command = (
            "from attention_visualizer import AttentionVisualizer\n\n"
            f"AttentionVisualizer({given}).run_comprehensive_analysis()"
        )
        written = write_analysis(self.study, command, tuple(CHAPTERS), language="python")
        log.info("report written to %s", written.report)
        print_findings(written)
        print_sanitised(f"HTML:       {written.page}")
        print_sanitised(f"Markdown:   {written.report}")
        if self._warning:
            print_sanitised(self._warning)
        return ReportPath(written.report)

    def explore(self, samples: Sequence[tuple[Any, int | None]] = (), explorer_mb: float = 25) -> ShownPath:
        """Write attention_explorer.html: every head's attention from every patch, to look at by hand, on `samples`, by
        default the report's. Return its path, which a notebook shows as the page. explorer_mb: the most that it may
        take, in millions of bytes; raise UserError where nothing fits into that."""
        given = [as_sample(image, label, i) for i, (image, label) in enumerate(samples)]
        for sample in given:
            check_sample(sample, self.study.target.images)
        study = replace(self.study, samples=given or self.study.samples, explorer_bytes=int(explorer_mb * 1e6))
        contents = explorer_chapter.contents_of(study)
        if contents is None:
            raise UserError(" ".join(explorer_chapter.UNSUITABLE.split()))
        self._sign_output()
        explorer_chapter.write_page(study, contents)
        return ShownPath(study.output.folder / FILE_NAME)

    def explore_live(self, image: int = 0, explorer_mb: float = 25) -> Any:
        """Return a widget for a notebook: the explorer of one of the images, by its number from 0, where others can be
        asked for, heads be switched off and, of large models, every patch of a layer be shown.

        Needs anywidget. Raise UserError where that is missing, and where there is no such image.
        """
        try:
            from attention_visualizer.analysis.explorer.live import LiveExplorer
        except ModuleNotFoundError as error:
            raise missing_package("explore_live()", error, "live") from None
        return LiveExplorer(replace(self.study, explorer_bytes=int(explorer_mb * 1e6)), image)

    def _draw(self, chapter: Any, stem: str, image: Any, label: int | None, i: int) -> Figure:
        sample = as_sample(image, label, i)
        (explained,) = self.study.explain_images([sample])
        figure, output = chapter.draw(self.study, explained, sample), self.study.output
        self._sign_output()
        output.save(figure, f"{stem}_sample_{i}")
        return output.as_matplotlib(figure)

    def _read_weights(self) -> Weights:
        self._warning = ""
        if self._model is not None:
            self._digest = model_digest(self._model)
            text = f"{type(self._model).__name__} as given, sha256 {self._digest}"
            return Weights(self._model.eval(), text, digest=self._digest)
        if not self.model_path.exists():
            self._warning = f"{self.model_path} does not exist: RANDOM WEIGHTS are used, which have learnt nothing"
            warnings.warn(self._warning, UserWarning, stacklevel=4)
            log.warning(self._warning)
            return Weights(random_model(), f"random weights ({self.model_path} does not exist)", random=True)
        return find_weights(str(self.model_path), None, "runs", num_heads=self._num_heads)

    def _output_folder(self) -> Path:
        if self._asked_output is not None:
            return self._asked_output
        parts = [ANALYSIS, self.model_path.stem, self.model_path.absolute().parent.name]
        # attention_analysis, attention_analysis_<model>, ..._<folder>, then numbered: the first that is nobody else's.
        named = (Path("_".join(parts[: length + 1])) for length in range(len(parts)))
        numbered = (Path("_".join([*parts, str(number)])) for number in itertools.count(2))
        return next(path for path in itertools.chain(named, numbered) if self._owner(path) in (None, self._identity()))

    def _identity(self) -> str:
        return str(self.model_path.absolute()) if self._model is None else f"{self.model_path} {self._digest}"

    @staticmethod
    def _owner(folder: Path) -> str | None:
        path = folder / OWNER
        return atomic.read_json(path).get("model") if path.exists() else None

    def _sign_output(self) -> None:
        folder = self.study.output.folder
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write_json(folder / OWNER, {"model": self._identity()})


def as_sample(image: Any, label: int | None, number: int) -> Sample:
    return Sample(as_bytes(image), None if label is None else int(label), f"sample {number}")


def as_bytes(image: Any) -> Tensor:
    """Convert an image to uint8 [channel, height, width], from uint8 0..255 or floats in 0..1, with or without a batch
    or channel axis. Raise UserError for other values."""
    tensor = torch.as_tensor(np.asarray(image) if not isinstance(image, Tensor) else image).detach().cpu()
    while tensor.ndim > 3 and tensor.shape[0] == 1:
        tensor = tensor[0]
    tensor = tensor[None] if tensor.ndim == 2 else tensor
    if tensor.ndim != 3:
        raise UserError(f"an image has shape [channel, height, width], not {list(tensor.shape)}")
    if tensor.dtype == torch.uint8:
        return tensor
    if not bool(((tensor >= 0) & (tensor <= 1)).all()):
        raise UserError("give image values from 0 to 1 (as get_test_samples returns them) or uint8 from 0 to 255")
    return (tensor.float() * 255).round().to(torch.uint8)
