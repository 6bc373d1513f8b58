"""What `python analyze.py ckpt=best` writes, and its numbers, recomputed another way."""

from __future__ import annotations

import csv
import json
import os
import re
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.spatial.distance  # type: ignore[import-untyped]
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from attention_visualizer.analysis.study.output import Output
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.analysis.study.target import Target
from attention_visualizer.data.datamodule import ImageDataModule
from attention_visualizer.data.image_sets import LabelledImageSet
from attention_visualizer.data.images import normalise
from attention_visualizer.models.vision_transformer import VisionTransformer
from tests.helpers.analyses import (
    FINDINGS_FIGURES,
    FRAMES,
    HEADS,
    LAYERS,
    NOT_MNIST,
    SAMPLE_FIGURES,
    STATISTICS_FIGURES,
    Analysis,
    Workplace,
    embedded_figures,
    listing,
    num_frames,
    random_model,
    read_records,
    read_report,
    read_statistics,
    succeed,
)
from tests.helpers.documentation import documented
from tests.helpers.runs import PROJECT


def test_every_promised_file_is_written_and_no_other(analysis: Analysis) -> None:
    expected = {f"{stem}_sample_{number}.png" for stem in SAMPLE_FIGURES for number in range(8)}
    expected |= {f"{stem}.png" for stem in STATISTICS_FIGURES + FINDINGS_FIGURES}
    expected |= {"attention_evolution_strip.png", "attention_evolution.png", "attention_evolution.webp"}
    expected |= {"attention_depth.webp"}
    expected |= {
        "attention_analysis_report.md",
        "attention_analysis_report.html",
        "attention_explorer.html",
        "attention_statistics.csv",
        "attention_statistics.json",
    }
    assert set(os.listdir(analysis.output)) == expected
    assert listing(analysis.run.path.parents[1]) == {
        "runs",
        f"runs/{analysis.run.name}",
        *(f"runs/{analysis.run.name}/{name}" for name in listing(analysis.run.path)),
    }
    assert os.listdir(analysis.run.path.parents[1]) == ["runs"]


def test_every_figure_can_be_opened_and_none_of_its_panels_is_empty(second_analysis: Any) -> None:
    """What a figure shows is asked of its artists: empty axes draw as many pixels as full ones."""
    folder, figures = second_analysis
    assert {f"{stem}.png" for stem in figures} == {path.name for path in folder.glob("*.png")}
    for stem, figure in figures.items():
        with Image.open(folder / f"{stem}.png") as picture:
            picture.verify()
        if isinstance(figure, Figure):
            axes = [each for each in figure.findobj(Axes) if each.get_visible()]
            assert axes and all(each.has_data() or each.texts for each in axes), stem
        else:
            assert len(figure.images) > 2 and all(image.rgb.size for image in figure.images), stem


def test_the_animation_has_one_frame_for_each_look(analysis: Analysis) -> None:
    with Image.open(analysis.output / "attention_evolution.webp") as animation:
        assert animation.format == "WEBP" and num_frames(animation) == FRAMES
        frames, durations = [], []
        for number in range(FRAMES):
            animation.seek(number)
            animation.load()
            frames.append(np.asarray(animation.convert("RGB")))
            durations.append(animation.info["duration"])
    assert all(not np.array_equal(one, other) for one, other in zip(frames, frames[1:], strict=False))
    assert min(durations) >= 200 and durations[-1] > durations[0] > durations[1]


def test_the_report_embeds_every_figure_and_no_other(analysis: Analysis) -> None:
    figures = {path.name for path in analysis.output.iterdir() if path.suffix in (".png", ".webp")}
    embedded = embedded_figures(read_report(analysis.output))
    assert set(embedded) == figures and len(embedded) == len(figures)


def test_it_says_which_checkpoint_and_why(analysis: Analysis) -> None:
    first, *_, last = analysis.outcome.out.strip().splitlines()
    assert first.startswith("Checkpoint: best.ckpt of the newest run 2025-01-02_03-04-05-000006")
    assert "75.00%" in first and last.startswith("Markdown: ")
    assert (analysis.run.path.parents[1] / last.removeprefix("Markdown:").strip()).is_file()
    assert analysis.outcome.err == ""


def test_the_report_says_what_was_analysed(analysis: Analysis, model: VisionTransformer) -> None:
    report = read_report(analysis.output)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    for fact in ("3 layers x 2 heads", f"{parameters:,} parameters", "4 x 4 patches of 7 x 7 pixels", "300 images"):
        assert fact in report
    assert NOT_MNIST in report


def test_the_report_tells_how_to_make_it_again_when_there_are_newer_runs(analysis: Analysis) -> None:
    """`ckpt=best` alone would be another checkpoint tomorrow."""
    command = read_report(analysis.output).split("```bash\n")[1].split("```")[0]
    assert command.startswith(f"python {PROJECT / 'analyze.py'} ") and analysis.run.name in command


# --- the numbers ---


def independent_divergence(rows: Tensor) -> Tensor:
    """Mean Jensen-Shannon divergence of each head's row from the others', [image, head, key] -> [image, head]."""
    found = np.zeros(rows.shape[:2])
    for one, other in permutations(range(rows.shape[1]), 2):
        distance = scipy.spatial.distance.jensenshannon(rows[:, one], rows[:, other], axis=-1)
        found[:, one] += distance**2 / (rows.shape[1] - 1)
    return torch.tensor(found)


OF_ALL_QUERIES = ("distance", "sink", "confidence")  # not of the last layer, which is read by its class token alone


def independent_statistics(model: VisionTransformer, images: Tensor) -> dict[str, np.ndarray]:
    """Each measure [image, layer, head], with float64 weights from a forward of this test's own."""
    double: Any = VisionTransformer(**model.config).eval().double()
    double.load_state_dict(model.state_dict())
    prefix = double.num_prefix_tokens
    rows, columns = np.divmod(np.arange(16), 4)
    distance = torch.tensor(7 * np.hypot(rows[:, None] - rows, columns[:, None] - columns))
    found: dict[str, list[Tensor]] = {
        name: []
        for name in ("entropy", "maximum", "mean", "distance", "sink", "divergence", "effective_tokens", "confidence")
    }
    found |= {"class_token": []} if prefix else {}
    with torch.no_grad():
        tokens = double.embed(images.double())
        for block in double.blocks:
            normed = block.norm1(tokens)
            query, key, _ = block.attn.qkv(normed).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1)
            readout = weights[:, :, :1] if prefix else weights
            found["entropy"].append(-(readout * readout.log()).sum(dim=-1).mean(dim=-1))
            found["effective_tokens"].append((readout**-readout).prod(dim=-1).mean(dim=-1))
            found["confidence"].append(weights.amax(dim=-1).mean(dim=-1))
            if prefix:
                found["class_token"].append(weights[:, :, 0, 0])
            found["maximum"].append(readout.mean(dim=2)[..., prefix:].amax(dim=-1))
            found["mean"].append(readout.mean(dim=2)[..., prefix:].mean(dim=-1))
            patches = weights[:, :, prefix:, prefix:]
            spread = (patches * distance).sum(dim=-1) / patches.sum(dim=-1)
            found["distance"].append(spread.mean(dim=-1))
            found["sink"].append(weights.mean(dim=2).amax(dim=-1))
            found["divergence"].append(independent_divergence(readout.mean(dim=2)))
            tokens = block(tokens)
    return {name: torch.stack(layers, dim=1).numpy() for name, layers in found.items()}


@pytest.fixture(scope="session")
def truth(model: VisionTransformer, digits: ImageDataModule) -> dict[str, np.ndarray]:
    return independent_statistics(model, normalise(digits.splits["test"][0], digits.description))


def test_the_numbers_are_those_of_the_whole_test_set(analysis: Analysis, truth: dict[str, np.ndarray]) -> None:
    records = read_records(analysis.output)
    assert len(records) == 9 * LAYERS * HEADS - len(OF_ALL_QUERIES) * HEADS
    assert not {(name, LAYERS, 1) for name in OF_ALL_QUERIES} & records.keys()
    layers = read_statistics(analysis.output)["chapters"]["statistics"]["numbers"]["layers"]
    for (measure, layer, head), record in records.items():
        values = truth[measure][:, layer - 1, head - 1]
        assert float(record["mean"]) == pytest.approx(values.mean(), rel=1e-5), (measure, layer, head)
        assert float(record["standard_deviation"]) == pytest.approx(values.std(), rel=1e-3, abs=1e-6)
        assert record["images"] == "300"
        told = layers[layer - 1][measure]
        assert told["mean_by_head"][head - 1] == float(record["mean"]) and told["unit"] == record["unit"]


def test_quantiles_are_those_of_all_images_and_heads(analysis: Analysis, truth: dict[str, np.ndarray]) -> None:
    layers = read_statistics(analysis.output)["chapters"]["statistics"]["numbers"]["layers"]
    widths = {"entropy": np.log(17), "maximum": 1.0, "mean": 1 / 16, "distance": 7 * np.hypot(3, 3)}
    widths |= {"sink": 1.0, "divergence": np.log(2), "effective_tokens": 17, "confidence": 1.0, "class_token": 1.0}
    for measure, width in widths.items():
        for layer in range(LAYERS):
            for share, value in layers[layer][measure]["quantiles"].items():
                if measure in OF_ALL_QUERIES and layer == LAYERS - 1:
                    assert value is None and layers[layer][measure]["mean_by_head"] == [None] * HEADS
                    continue
                values, bin_width = truth[measure][:, layer], width / 512
                low, high = (np.quantile(values, float(share), method=method) for method in ("lower", "higher"))
                assert low - bin_width <= value <= high + bin_width, (measure, layer, share)


def test_boxes_of_nearly_uniform_attention_are_no_artefact_of_the_bins(work: Workplace) -> None:
    """All images may fall into one bin of the histogram; its width is not their spread."""
    model = random_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "qkv" in name:
                parameter.mul_(0.05)
    work.add_run("2025-01-01_00-00-00-000000", model)
    succeed("chapters=[statistics]", "output_dir=out", folder=work.path)
    layers = read_statistics(work.path / "out")["chapters"]["statistics"]["numbers"]["layers"]
    truth = independent_statistics(model, normalise(work.digits.splits["test"][0], work.digits.description))
    for layer in range(LAYERS):
        told = layers[layer]["entropy"]["quantiles"]
        low, high = np.quantile(truth["entropy"][:, layer], [0.05, 0.95])
        assert told["0.95"] - told["0.05"] <= 2 * (high - low) + 1e-6, f"layer {layer + 1}"


def test_findings_are_short_and_their_numbers_are_found_again(analysis: Analysis) -> None:
    content = json.loads((analysis.output / "attention_statistics.json").read_text())
    report = (analysis.output / "attention_analysis_report.md").read_text()
    sections = {part.partition("\n")[0].partition(". ")[2]: part for part in re.split(r"^## ", report, flags=re.M)}
    found = {name: each for name, each in content["chapters"].items() if each["finding"] is not None}
    assert len(found) >= 5
    for name, each in found.items():
        text = re.sub(r"\*", "", each["finding"]["text"])
        for sentence in re.split(r"(?<=[.:]) (?=[A-Z0-9])", text):
            assert len(sentence.split()) <= 25, (name, sentence)
        section = sections[each["title"]] + json.dumps(each["numbers"])
        for number in re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", re.sub(r"Figure \d+", "", text)):
            assert re.search(rf"(?<![\d.]){re.escape(number)}", section), (name, number)


def test_the_accuracy_is_the_models(analysis: Analysis, model: VisionTransformer, digits: ImageDataModule) -> None:
    images, labels = digits.splits["test"]
    with torch.no_grad():
        right = (model(normalise(images, digits.description)).argmax(dim=1) == labels).float().mean()
    told = read_statistics(analysis.output)["chapters"]["statistics"]["numbers"]
    assert told["accuracy"] == pytest.approx(float(right)) and told["images"] == 300
    assert f"accuracy {100 * right:.0f}% (" in read_report(analysis.output)


@pytest.mark.parametrize("chapters", ["[patterns]", "[statistics]"])
def test_the_headline_has_the_accuracy_with_its_interval(
    one_run: Workplace, model: VisionTransformer, digits: ImageDataModule, chapters: str
) -> None:
    """Whether or not a chapter looks at all images. Wilson's interval by its own formula, and both halves; then
    that this is one model."""
    images, labels = digits.splits["test"]
    with torch.no_grad():
        right = model(normalise(images, digits.description)).argmax(dim=1) == labels
    n, share, z = len(right), right.double().mean().item(), 1.959963984540054
    centre, scale = share + z**2 / (2 * n), 1 + z**2 / n
    spread = z * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    low, high = (centre - spread) / scale, (centre + spread) / scale
    halves = [half.double().mean().item() for half in (right[: n // 2], right[n // 2 :])]
    low, high = min(low, *halves), max(high, *halves)
    assert 0.02 < high - low < 0.2  # so that no decimal of a percentage survives
    expected = f"{100 * share:.0f}% ({100 * low:.0f} to {100 * high:.0f}), n = {n}"
    succeed(f"chapters={chapters}", "num_samples=1", "output_dir=headline", folder=one_run.path)
    assert read_statistics(one_run.path / "headline")["facts"]["accuracy"] == expected
    headline = read_report(one_run.path / "headline").split("\n\n")[1]
    assert f"accuracy {expected} · one model: another seed" in headline
    assert headline.startswith(f"{LAYERS} layers x {HEADS} heads")


@pytest.fixture(scope="module")
def second_analysis(analysis: Analysis, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The same checkpoint analysed again, in this process: the output folder, and each figure as it was saved."""
    folder, figures, save = tmp_path_factory.mktemp("again"), {}, Output.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Output, "save", lambda self, figure, stem: figures.update({stem: figure}) or save(self, figure, stem)
        )
        succeed(f"ckpt={analysis.run.best}", "num_samples=1", f"output_dir={folder}/out", folder=folder)
    return folder / "out", figures


def test_a_second_analysis_gives_the_same_numbers_and_pictures(analysis: Analysis, second_analysis: Any) -> None:
    again, _ = second_analysis
    for name in ("attention_statistics.csv", "attention_pattern_sample_0.png", "attention_evolution.webp"):
        assert (again / name).read_bytes() == (analysis.output / name).read_bytes(), name
    told = [read_statistics(folder)["chapters"] for folder in (analysis.output, again)]
    numbers = [{chapter: each["numbers"] for chapter, each in chapters.items()} for chapters in told]
    assert numbers[0] == numbers[1]


def test_mean_pooling_is_measured_at_the_patches(work: Workplace) -> None:
    model = random_model(pooling="mean")
    work.add_run("2025-01-01_00-00-00-000000", model)
    succeed("chapters=[statistics]", "output_dir=out", folder=work.path)
    images = normalise(work.digits.splits["test"][0], work.digits.description)
    truth = independent_statistics(model, images)
    for (measure, layer, head), record in read_records(work.path / "out").items():
        expected = truth[measure][:, layer - 1, head - 1].mean()
        assert float(record["mean"]) == pytest.approx(expected, rel=1e-5), (measure, layer, head)
    assert "patch queries" in read_report(work.path / "out")


def test_memory_does_not_grow_with_the_test_set(
    model: VisionTransformer, digits: ImageDataModule, tmp_path: Path
) -> None:
    """What the model sees at once is bounded, and nothing of it is kept."""
    images = digits.splits["test"][0].repeat(5, 1, 1, 1)[:1307]
    pictures = LabelledImageSet(digits.description, images, torch.zeros(1307, dtype=torch.long))
    study = Study(Target(model, pictures), Output(tmp_path), "weights")
    sizes: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    try:
        survey = study.survey
    finally:
        handle.remove()
    assert sum(sizes) == 1307 and max(sizes) <= 500 and len(sizes) > 2
    for summary in survey.summaries.values():
        assert summary.n == 1307 and summary.counts.shape == (LAYERS, HEADS, 512)


# --- which checkpoint ---


def test_the_numbers_of_every_chapter_are_documented(analysis: Analysis) -> None:
    told = read_statistics(analysis.output)["chapters"]
    there = {f"{chapter}.{name}" for chapter, each in told.items() for name in each["numbers"]}
    assert set(documented("Numbers of the chapters")) == there
    with (analysis.output / "attention_statistics.csv").open(newline="") as file:
        assert documented("attention_statistics.csv") == next(csv.reader(file))


def test_the_weights_are_left_as_they_were(analysis: Analysis, model: VisionTransformer) -> None:
    content = torch.load(analysis.run.best, weights_only=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(content["state_dict"][f"model.{name}"], tensor)
