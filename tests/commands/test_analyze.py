"""`python analyze.py`: the right checkpoint, every promised file, numbers that an independent computation confirms,
and for every mistake one line and nothing else."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cv2
import matplotlib
import numpy as np
import pytest
import scipy.spatial.distance  # type: ignore[import-untyped]
import torch
from markdown_it import MarkdownIt
from PIL import Image
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor

from attention_visualizer.analysis import chapters as analysis_chapters
from attention_visualizer.analysis.study.output import Output
from attention_visualizer.analysis.study.samples import choose_samples
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.analysis.study.target import Target
from attention_visualizer.data.datamodule import ImageDataModule, normalise
from attention_visualizer.data.image_sets import LabelledImageSet
from attention_visualizer.data.mnist import MnistUnavailable
from attention_visualizer.figures import panels
from attention_visualizer.figures.attention_figures import moment
from attention_visualizer.files.atomic import write_json
from attention_visualizer.measures.observation import observe
from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.report.chapter import Chapter, FigureFile
from attention_visualizer.runs.checkpoint import CHECKPOINT_KEY, block_for
from attention_visualizer.runs.folders import RunFolder
from attention_visualizer.runs.history import AttentionHistory
from attention_visualizer.support.errors import UserError
from tests.helpers.runs import Outcome, run_script
from tests.report.test_report import documented

PROJECT = Path(__file__).resolve().parents[2]
LAYERS, HEADS = 3, 2
SIZES: dict[str, Any] = {"embed_dim": 22, "num_heads": HEADS, "num_layers": LAYERS, "mlp_dim": 29}
FRAMES = 5
REPORTS = {"attention_analysis_report.md", "attention_analysis_report.html"}
NOT_MNIST = "data: scikit-learn digits (not MNIST)"
SAMPLE_FIGURES = ("attention_pattern", "attention_heads", "layer_comparison", "attention_methods")
STATISTICS_FIGURES = ("attention_statistics", "attention_statistics_by_head", "attention_statistics_by_class")
FINDINGS_FIGURES = (
    "attention_atlas",
    "attention_atlas_rollout",
    "attention_atlas_differences",
    "attention_roles",
    "attention_redundancy",
    "attention_importance",
    "attention_trust",
    "attention_claims",
)


# --- runs to analyse ---


def random_model(seed: int = 0, **config: Any) -> VisionTransformer:
    """Weights large enough for attention to be far from uniform, so that no two layers or heads are alike."""
    model = VisionTransformer(**SIZES | config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.35)
    return model


@pytest.fixture(scope="session")
def digits() -> ImageDataModule:
    data = ImageDataModule(name="digits")
    data.load()
    return data


@pytest.fixture(scope="session")
def model() -> VisionTransformer:
    return random_model()


def content_of(model: VisionTransformer, digits: ImageDataModule, accuracy: float | None = 0.75) -> dict[str, Any]:
    """What training writes, as far as it matters here."""
    block = block_for(model.config, digits.description.to_dict(), data_dir=None, split_seed=0, seed=0)
    return {
        "state_dict": {f"model.{name}": tensor for name, tensor in model.state_dict().items()},
        "epoch": 2,
        "global_step": 17,
        CHECKPOINT_KEY: block | {"validation_accuracy": accuracy},
    }


def history_of(model: VisionTransformer, digits: ImageDataModule) -> AttentionHistory:
    """As AttentionLogger keeps it, of a model that changes a little from frame to frame."""
    images = digits.splits["validation"][0][:3]
    history = AttentionHistory()
    for number in range(FRAMES):
        earlier = random_model(num_layers=model.config["num_layers"], pooling=model.config["pooling"])
        with torch.no_grad():
            for parameter in earlier.parameters():
                parameter.mul_(0.5 + 0.1 * number)
        seen = observe(earlier, normalise(images, digits.description))
        entry = {
            "step": np.array(0 if number == 0 else 2**number),
            "epoch": np.array(number / 3),
            "entropy": seen.entropy.mean(axis=0),
            "distance": seen.distance.mean(axis=0),
        }
        probes = {
            "maps": seen.head_maps.mean(axis=2),
            "rollout": seen.rollouts[:, -1],
            "predicted": seen.predicted,
            "probability": seen.probability,
        }
        history.frames.append(entry | probes)
        if number > 2:
            history.validations.append(entry | {"images": np.array(200)})
    history.probe = {
        "images": images.permute(0, 2, 3, 1).numpy(),
        "labels": digits.splits["validation"][1][:3].numpy(),
        "class_names": np.array(digits.description.class_names),
        "data": np.array(digits.description.watermark),
        "num_keys": np.array(seen.num_keys),
        "query": np.array(str(seen.query)),
    }
    return history


@dataclass(frozen=True)
class Workplace:
    """A folder to work in, with runs/."""

    path: Path
    digits: ImageDataModule

    def add_run(
        self,
        name: str,
        model: VisionTransformer,
        accuracy: float = 0.75,
        files: tuple[str, ...] = ("best.ckpt", "last.ckpt"),
        with_history: bool = False,
        status: str = "completed",
    ) -> RunFolder:
        run = RunFolder(self.path / "runs" / name)
        run.checkpoints.mkdir(parents=True)
        for file in files:
            torch.save(content_of(model, self.digits, accuracy), run.checkpoints / file)
        facts = {"metrics": {"validation_accuracy": accuracy}, "data": self.digits.description.to_dict()}
        write_json(run.manifest_path, {"status": status} | facts)
        if with_history:
            history_of(model, self.digits).save(run.history_path)
        return run


@pytest.fixture
def work(tmp_path: Path, digits: ImageDataModule) -> Workplace:
    return Workplace(tmp_path, digits)


# --- the command ---


def analyze(*arguments: str, folder: Path) -> Outcome:
    """`python analyze.py ...` in `folder`, within this process and its environment."""
    environment = {name: value for name, value in os.environ.items() if name not in ("HYDRA_FULL_ERROR", "MNIST_DIR")}
    return run_script("analyze.py", *arguments, folder=folder, environment=environment)


def succeed(*arguments: str, folder: Path) -> Outcome:
    outcome = analyze(*arguments, folder=folder)
    assert outcome.exit_code == 0, outcome.err
    return outcome


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def embedded_figures(report: str) -> list[str]:
    """Also those that Markdown can only link."""
    tokens = MarkdownIt("commonmark").parse(report)
    children = [child for token in tokens for child in token.children or []]
    addresses = [str(child.attrs.get("src", child.attrs.get("href", ""))) for child in children]
    return [each for each in addresses if each.endswith((".png", ".webp", ".svg", ".pdf"))]


def read_report(output: Path) -> str:
    return (output / "attention_analysis_report.md").read_text(encoding="utf-8")


def read_statistics(output: Path) -> dict[str, Any]:
    return json.loads((output / "attention_statistics.json").read_text(encoding="utf-8"))


def read_records(output: Path) -> dict[tuple[str, int, int], dict[str, str]]:
    with (output / "attention_statistics.csv").open(newline="") as file:
        return {(row["measure"], int(row["layer"]), int(row["head"])): row for row in csv.DictReader(file)}


def num_frames(animation: Image.Image) -> int:
    return getattr(animation, "n_frames", 1)


def svg_text(path: Path) -> str:
    return " ".join(text.strip() for text in ElementTree.parse(path).getroot().itertext() if text.strip())


# --- what is written ---


@dataclass(frozen=True)
class Analysis:
    run: RunFolder
    output: Path
    outcome: Outcome


@pytest.fixture(scope="session")
def analysis(tmp_path_factory: pytest.TempPathFactory, digits: ImageDataModule, model: VisionTransformer) -> Analysis:
    """`python analyze.py ckpt=best` in a process of its own; no test changes it."""
    work = Workplace(tmp_path_factory.mktemp("analysis"), digits)
    run = work.add_run("2025-01-02_03-04-05-000006", model, with_history=True)
    run.config_path.unlink(missing_ok=True)  # the checkpoint alone suffices
    command = [sys.executable, str(PROJECT / "analyze.py"), "ckpt=best"]
    environment = {name: value for name, value in os.environ.items() if name not in ("MNIST_DIR", "HYDRA_FULL_ERROR")}
    done = subprocess.run(
        command, cwd=work.path, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200
    )
    outcome = Outcome(done.returncode, done.stdout, done.stderr)
    assert outcome.exit_code == 0, outcome.err
    return Analysis(run, run.path / "attention_analysis", outcome)


def test_every_promised_file_is_written_and_no_other(analysis: Analysis) -> None:
    expected = {f"{stem}_sample_{number}.png" for stem in SAMPLE_FIGURES for number in range(8)}
    expected |= {f"{stem}.png" for stem in STATISTICS_FIGURES + FINDINGS_FIGURES}
    expected |= {"attention_evolution.png", "attention_evolution.webp"}
    expected |= {
        "attention_analysis_report.md",
        "attention_analysis_report.html",
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


def test_every_picture_can_be_opened_and_shows_something(analysis: Analysis) -> None:
    for path in analysis.output.glob("*.png"):
        pixels = cv2.imread(str(path))
        assert pixels is not None and min(pixels.shape[:2]) > 100 and pixels.std() > 10, path.name
        with Image.open(path) as picture:
            picture.verify()


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
    assert min(durations) >= 200 and durations[-1] > durations[0]


def test_the_report_embeds_every_figure_and_no_other(analysis: Analysis) -> None:
    figures = {path.name for path in analysis.output.iterdir() if path.suffix in (".png", ".webp")}
    embedded = embedded_figures(read_report(analysis.output))
    assert set(embedded) == figures and len(embedded) == len(figures)


def test_it_says_which_checkpoint_and_why(analysis: Analysis) -> None:
    first, *_, last = analysis.outcome.out.strip().splitlines()
    assert first.startswith("Checkpoint: best.ckpt of the newest run 2025-01-02_03-04-05-000006")
    assert "0.7500" in first and last.startswith("Report: ")
    assert (analysis.run.path.parents[1] / last.removeprefix("Report:").strip()).is_file()
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
    assert command.startswith("python analyze.py") and analysis.run.name in command


# --- the numbers ---


def independent_divergence(rows: Tensor) -> Tensor:
    """Mean Jensen-Shannon divergence of each head's row from the others', [image, head, key] -> [image, head]."""
    found = np.zeros(rows.shape[:2])
    for one, other in permutations(range(rows.shape[1]), 2):
        distance = scipy.spatial.distance.jensenshannon(rows[:, one], rows[:, other], axis=-1)
        found[:, one] += distance**2 / (rows.shape[1] - 1)
    return torch.tensor(found)


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
    assert len(records) == 9 * LAYERS * HEADS
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


def test_the_accuracy_is_the_models(analysis: Analysis, model: VisionTransformer, digits: ImageDataModule) -> None:
    images, labels = digits.splits["test"]
    with torch.no_grad():
        right = (model(normalise(images, digits.description)).argmax(dim=1) == labels).float().mean()
    told = read_statistics(analysis.output)["chapters"]["statistics"]["numbers"]
    assert told["accuracy"] == pytest.approx(float(right)) and told["images"] == 300
    assert f"accuracy {100 * right:.2f} % (" in read_report(analysis.output)


@pytest.mark.parametrize("chapters", ["[patterns]", "[statistics]"])
def test_the_headline_has_the_accuracy_with_its_interval(
    one_run: Workplace, model: VisionTransformer, digits: ImageDataModule, chapters: str
) -> None:
    """Whether or not a chapter looks at all images. Wilson's interval by its own formula."""
    images, labels = digits.splits["test"]
    with torch.no_grad():
        right = model(normalise(images, digits.description)).argmax(dim=1) == labels
    n, share, z = len(right), right.double().mean().item(), 1.959963984540054
    centre, scale = share + z**2 / (2 * n), 1 + z**2 / n
    spread = z * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    low, high = (centre - spread) / scale, (centre + spread) / scale
    expected = f"{share:.2%} ({low:.2%} to {high:.2%}), n = {n}".replace("%", "").replace(" (", " % (")
    succeed(f"chapters={chapters}", "num_samples=1", "output_dir=headline", folder=one_run.path)
    assert read_statistics(one_run.path / "headline")["facts"]["accuracy"] == expected
    headline = read_report(one_run.path / "headline").split("\n\n")[1]
    assert headline.endswith(f"accuracy {expected}") and headline.startswith(f"{LAYERS} layers x {HEADS} heads")


def test_a_second_analysis_gives_the_same_numbers_and_pictures(analysis: Analysis, tmp_path: Path) -> None:
    path = str(analysis.run.best)
    succeed(f"ckpt={path}", "num_samples=1", f"output_dir={tmp_path}/again", folder=tmp_path)
    for name in ("attention_statistics.csv", "attention_pattern_sample_0.png", "attention_evolution.webp"):
        assert (tmp_path / "again" / name).read_bytes() == (analysis.output / name).read_bytes(), name
    told = [read_statistics(folder)["chapters"] for folder in (analysis.output, tmp_path / "again")]
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


ONE = ("chapters=[patterns]", "num_samples=1")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, digits: ImageDataModule) -> Workplace:
    """Three runs and a sweep; told apart by their width. No test adds a run."""
    work = Workplace(tmp_path_factory.mktemp("runs"), digits)
    work.add_run("2025-01-01_00-00-00-000000", random_model(embed_dim=10), 0.97)
    work.add_run("2025-01-03_00-00-00-000000", random_model(embed_dim=14), 0.5, status="interrupted")
    sweep = "2025-01-02_00-00-00-000000"
    for job, width, accuracy in ((0, 16, 0.6), (1, 18, 0.8), (2, 20, 0.7)):
        work.add_run(f"{sweep}/{job}_model.embed_dim-{width}", random_model(embed_dim=width), accuracy)
    (work.path / "runs" / sweep / "multirun.yaml").write_text("")
    return work


@pytest.mark.parametrize(
    ("arguments", "width", "said"),
    [
        (["ckpt=best"], 14, "best.ckpt of the newest run 2025-01-03"),
        (["ckpt=last"], 14, "last.ckpt of the newest run 2025-01-03"),
        (["ckpt=best", "run=runs/2025-01-01_00-00-00-000000"], 10, "2025-01-01"),
        (["run=2025-01-01_00-00-00-000000"], 10, "validation accuracy 0.9700"),
        (["run=all"], 10, "the best of 5"),
        (["run=2025-01-02_00-00-00-000000"], 18, "1_model.embed_dim-18, the best job of sweep"),
        (["ckpt=runs/2025-01-01_00-00-00-000000"], 10, "2025-01-01"),
        (["ckpt=runs/2025-01-02_00-00-00-000000/2_model.embed_dim-20/checkpoints/last.ckpt"], 20, "as asked for"),
    ],
    ids=["best", "last", "run folder", "run name", "all", "sweep", "ckpt is a run", "path"],
)
def test_the_checkpoint_that_was_meant(runs: Workplace, arguments: list[str], width: int, said: str) -> None:
    outcome = succeed(*arguments, *ONE, folder=runs.path)
    assert said in outcome.out.splitlines()[0]
    report = runs.path / outcome.out.splitlines()[-1].removeprefix("Report:").strip()
    assert f"width {width}," in report.read_text() and report.parent.name == "attention_analysis"


def test_random_weights_take_the_architecture_and_not_the_weights(runs: Workplace) -> None:
    outcome = succeed("ckpt=random", "num_samples=1", "format=svg", "chapters=[heads,statistics]", folder=runs.path)
    assert "random weights" in outcome.out.splitlines()[0]
    output = runs.path / "runs/2025-01-03_00-00-00-000000/attention_analysis_random"
    report = read_report(output)
    assert "width 14," in report and "random weights" in report
    trained = succeed("ckpt=best", "chapters=[statistics]", "output_dir=trained", folder=runs.path)
    assert trained.exit_code == 0
    means = [
        [float(row["mean"]) for row in read_records(folder).values()] for folder in (output, runs.path / "trained")
    ]
    assert means[0] != means[1]
    again = succeed("ckpt=random", "chapters=[statistics]", "output_dir=again", folder=runs.path)
    assert again.exit_code == 0
    assert (runs.path / "again/attention_statistics.csv").read_text() == (
        output / "attention_statistics.csv"
    ).read_text()


def test_random_weights_of_a_run_that_does_not_exist_are_refused(runs: Workplace) -> None:
    assert_refused(runs.path, "ckpt=random", "run=no_such_run", said="run=no_such_run")


@pytest.mark.parametrize("kind", ["pth", "safetensors", "bare"])
def test_other_files_are_analysed_beside_where_the_command_runs(
    work: Workplace, model: VisionTransformer, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_mnist(monkeypatch)
    path = work.path / f"a model.{kind}"
    if kind == "pth":
        torch.save({"model_state_dict": model.state_dict(), "config": model.config}, path)
    elif kind == "bare":
        torch.save(VisionTransformer().state_dict(), path)
    else:
        save_file(dict(model.state_dict()), path, {"config": json.dumps(model.config)})
    outcome = succeed(f"ckpt={path}", *ONE, folder=work.path)
    assert "NOT MNIST" in outcome.err
    assert f"width {128 if kind == 'bare' else 22}," in read_report(work.path / "attention_analysis")


def without_mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with neither MNIST nor a network."""

    def refuse(_: Path) -> dict[str, np.ndarray]:
        raise MnistUnavailable("there is no network in this test")

    monkeypatch.setattr("attention_visualizer.data.datamodule.load_mnist", refuse)


def test_a_running_runs_checkpoint_counts_without_its_manifest(work: Workplace, model: VisionTransformer) -> None:
    run = work.add_run("2025-01-01_00-00-00-000000", model)
    run.manifest_path.unlink()
    assert "0.7500" in succeed(*ONE, folder=work.path).out


# --- which samples ---


@pytest.fixture(scope="module")
def one_run(tmp_path_factory: pytest.TempPathFactory, digits: ImageDataModule, model: VisionTransformer) -> Workplace:
    """One run for questions that leave its checkpoint alone; each writes into an output folder of its own."""
    work = Workplace(tmp_path_factory.mktemp("one_run"), digits)
    work.add_run("2025-01-01_00-00-00-000000", model)
    return work


def captions(work: Workplace, *arguments: str, chapter: str = "patterns") -> list[str]:
    """What the report says of each sample."""
    output = work.path / "out"
    shutil.rmtree(output, ignore_errors=True)
    succeed(*arguments, f"chapters=[{chapter}]", "output_dir=out", folder=work.path)
    tokens = MarkdownIt("commonmark").parse(read_report(output))
    children = [child for token in tokens for child in token.children or []]
    return [child.content for child in children if child.type == "image"]


def parse(caption: str) -> tuple[int, int, int]:
    """Test image, true class, predicted class."""
    found = re.fullmatch(r"test image (\d+): true (\d), predicted (\d) \([\d.]+%\)\.", caption)
    assert found, caption
    index, true, predicted = map(int, found.groups())
    return index, true, predicted


def test_the_samples_are_the_first_of_each_class_then_the_second(one_run: Workplace) -> None:
    labels = one_run.digits.splits["test"][1].tolist()
    seen = [parse(caption) for caption in captions(one_run, "num_samples=13")]
    places = {label: [index for index, other in enumerate(labels) if other == label] for label in range(10)}
    expected = sorted(places[label][0] for label in range(10)) + sorted(places[label][1] for label in range(10))[:3]
    assert [index for index, _, _ in seen] == expected
    assert all(labels[index] == true for index, true, _ in seen)


def test_samples_by_number_in_the_order_asked_for(one_run: Workplace, model: VisionTransformer) -> None:
    seen = [parse(caption) for caption in captions(one_run, "samples=[57,12,299,0]")]
    images, labels = one_run.digits.splits["test"]
    with torch.no_grad():
        predicted = model(normalise(images[[57, 12, 299, 0]], one_run.digits.description)).argmax(dim=1).tolist()
    assert seen == [(i, int(labels[i]), p) for i, p in zip((57, 12, 299, 0), predicted, strict=True)]


def test_samples_of_one_class(one_run: Workplace) -> None:
    labels = one_run.digits.splits["test"][1]
    seen = [parse(caption) for caption in captions(one_run, "class=4", "num_samples=3")]
    assert [index for index, _, _ in seen] == (labels == 4).nonzero()[:3, 0].tolist()
    assert {true for _, true, _ in seen} == {4}


def test_wrong_samples_are_really_misclassified(one_run: Workplace, model: VisionTransformer) -> None:
    images, labels = one_run.digits.splits["test"]
    with torch.no_grad():
        predicted = model(normalise(images, one_run.digits.description)).argmax(dim=1)
    seen = [parse(caption) for caption in captions(one_run, "wrong=true", "num_samples=11")]
    assert len(seen) == 11 and len(set(seen)) == 11
    for index, true, said in seen:
        assert predicted[index] == said != true == labels[index]
    of_class = [parse(caption) for caption in captions(one_run, "wrong=true", "class=3", "num_samples=400")]
    assert [index for index, _, _ in of_class] == ((labels == 3) & (predicted != 3)).nonzero()[:, 0].tolist()


def test_a_picture_of_ones_own(one_run: Workplace, model: VisionTransformer) -> None:
    """Dark on white and larger than the model's images, as a scan would be."""
    digit = 255 - one_run.digits.splits["test"][0][7, 0].numpy()
    Image.fromarray(digit).resize((140, 140), Image.Resampling.NEAREST).convert("RGB").save(
        one_run.path / "meine 7é.png"
    )
    (caption,) = captions(one_run, "image='meine 7é.png'")
    with torch.no_grad():
        image = normalise(one_run.digits.splits["test"][0][7:8], one_run.digits.description)
        probability, predicted = model(image).softmax(dim=1).max(dim=1)
    assert caption == f"meine 7é.png: predicted {int(predicted)} ({float(probability):.1%})."


# --- queries, chapters, formats, places ---


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("cls", "CLS attention"),
        ("patches", "attention averaged over patch queries"),
        ("[1,2]", "attention of the patch in row 1, column 2"),
    ],
)
def test_the_query_that_was_asked_for_is_drawn_and_named(
    one_run: Workplace, model: VisionTransformer, query: str, name: str
) -> None:
    output = one_run.path / name.replace(",", "")
    arguments = (f"query={query}", "samples=[7]", "chapters=[patterns,heads]", f"output_dir={output.name}")
    succeed(*arguments, folder=one_run.path)
    assert name in read_report(output)
    wanted: Any = (1, 2) if query == "[1,2]" else query
    images = normalise(one_run.digits.splits["test"][0][7:8], one_run.digits.description)
    maps = observe(model, images, wanted).head_maps[0]
    pixels = np.asarray(Image.open(output / "attention_pattern_sample_0.png").convert("RGB"))
    for layer in range(LAYERS):
        colors = panels.attention_scale(17).to_rgb(maps[layer].mean(axis=0))
        assert contains(pixels, panels.resize(colors, 112, 112)), f"the map of layer {layer + 1} is not in the picture"


def contains(picture: np.ndarray, part: np.ndarray) -> bool:
    """Whether `part` lies somewhere in `picture`, pixel by pixel."""
    distance = cv2.matchTemplate(picture, part, cv2.TM_SQDIFF)
    return bool(distance.min() <= 1e-6 * part.size * 255**2)


def test_the_last_layers_heads_alone(one_run: Workplace) -> None:
    heights = {}
    for which in ("all", "last"):
        output = one_run.path / which
        succeed("chapters=[heads]", "num_samples=1", f"head_layers={which}", f"output_dir={which}", folder=one_run.path)
        heights[which] = Image.open(output / "attention_heads_sample_0.png").height
    assert heights["all"] - heights["last"] == pytest.approx(2 * 134, abs=6)


@pytest.mark.parametrize(
    "chapters", [["heads"], ["statistics", "layers"], ["methods"], ["roles", "atlas"], ["importance"], ["evolution"]]
)
def test_only_the_chapters_that_were_asked_for(work: Workplace, model: VisionTransformer, chapters: list[str]) -> None:
    work.add_run("2025-01-01_00-00-00-000000", model, with_history=True)
    succeed(f"chapters=[{','.join(chapters)}]", "num_samples=2", "output_dir=deep/out", folder=work.path)
    files = {
        "heads": {f"attention_heads_sample_{number}.png" for number in range(2)},
        "layers": {f"layer_comparison_sample_{number}.png" for number in range(2)},
        "methods": {f"attention_methods_sample_{number}.png" for number in range(2)},
        "statistics": {*(f"{stem}.png" for stem in STATISTICS_FIGURES), "attention_statistics.csv"},
        "atlas": {f"{stem}.png" for stem in FINDINGS_FIGURES[:3]},
        "roles": {f"{stem}.png" for stem in FINDINGS_FIGURES[3:5]},
        "importance": {"attention_importance.png"},
        "trust": {"attention_trust.png"},
        "claims": {"attention_claims.png"},
        "evolution": {"attention_evolution.png", "attention_evolution.webp"},
    }
    expected = {"attention_analysis_report.md", "attention_analysis_report.html", "attention_statistics.json"}.union(
        *(files[name] for name in chapters)
    )
    assert set(os.listdir(work.path / "deep/out")) == expected
    report = read_report(work.path / "deep/out")
    assert set(embedded_figures(report)) == {name for name in expected if name.endswith((".png", ".webp"))}
    named = set(re.findall(r"attention_\w+\.(?:csv|json)", report))
    assert named <= expected, f"the report names {named - expected}, which is not there"


def test_a_run_without_history_says_so(one_run: Workplace) -> None:
    succeed("chapters=[evolution]", "output_dir=evolution", folder=one_run.path)
    assert "without the history" in read_report(one_run.path / "evolution")
    assert not list((one_run.path / "evolution").glob("attention_evolution*"))


@pytest.mark.parametrize("file_format", ["pdf", "svg"])
def test_vector_formats(work: Workplace, model: VisionTransformer, file_format: str) -> None:
    """Every figure in that format, each with the note that these are not MNIST's."""
    work.add_run("2025-01-01_00-00-00-000000", model, with_history=True)
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        succeed(f"format={file_format}", "num_samples=1", "output_dir=out", folder=work.path)
    figures = sorted((work.path / "out").glob(f"*.{file_format}"))
    names = [
        *(f"{stem}_sample_0" for stem in SAMPLE_FIGURES),
        *STATISTICS_FIGURES,
        *FINDINGS_FIGURES,
        "attention_evolution",
    ]
    assert {path.stem for path in figures} == set(names)
    assert not list((work.path / "out").glob("*.png"))
    assert set(embedded_figures(read_report(work.path / "out"))) == {
        *(path.name for path in figures),
        "attention_evolution.webp",
    }
    for path in figures:
        if file_format == "pdf":
            content = path.read_bytes()
            assert content.startswith(b"%PDF-") and content.rstrip().endswith(b"%%EOF")
        else:
            assert NOT_MNIST in svg_text(path), path.name


def test_random_weights_stand_on_the_face_of_every_figure(work: Workplace, model: VisionTransformer) -> None:
    work.add_run("2025-01-01_00-00-00-000000", model, with_history=True)
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        succeed("ckpt=random", "format=svg", "num_samples=1", "output_dir=out", folder=work.path)
    figures = sorted((work.path / "out").glob("*.svg"))
    assert len(figures) == len(SAMPLE_FIGURES) + len(STATISTICS_FIGURES) + len(
        FINDINGS_FIGURES
    )  # a random model has no history
    for path in figures:
        text = svg_text(path)
        assert "random weights" in text and NOT_MNIST in text, path.name
    assert "random weights" in read_report(work.path / "out")


def test_each_frame_says_that_the_data_are_not_mnist(analysis: Analysis) -> None:
    with Image.open(analysis.output / "attention_evolution.webp") as animation:
        for number in range(FRAMES):
            animation.seek(number)
            assert red_pixels(np.asarray(animation.convert("RGB"))) > 100


def test_the_first_frame_says_that_the_weights_are_random(analysis: Analysis) -> None:
    """It shows the model before training; "every figure that is not from trained weights says so on its face"."""
    assert "RANDOM WEIGHTS" in moment(0.0, 0) and "RANDOM WEIGHTS" not in moment(0.1, 1)
    with Image.open(analysis.output / "attention_evolution.webp") as animation:
        first = subtitle_pixels(np.asarray(animation.convert("RGB")))
        animation.seek(FRAMES - 1)
        last = subtitle_pixels(np.asarray(animation.convert("RGB")))
    assert first > 1.5 * last


def red_pixels(rgb: np.ndarray) -> int:
    """Pixels of the colour of notes on a figure's face, outside maps and bars: in its upper rows."""
    return int((np.abs(rgb[:75].astype(int) - np.array(panels.RED)).max(axis=2) < 12).sum())


def subtitle_pixels(rgb: np.ndarray) -> int:
    """Pixels of the line under the headline, where a frame says which moment it shows."""
    return int((rgb[36:52] < 200).all(axis=2).sum())


def test_an_animation_of_a_shallow_model(work: Workplace) -> None:
    """Narrow pictures: a longer line of text must not give a frame another size."""
    work.add_run("2025-01-01_00-00-00-000000", random_model(num_layers=1, pooling="mean"), with_history=True)
    succeed("chapters=[evolution]", "output_dir=out", folder=work.path)
    with Image.open(work.path / "out/attention_evolution.webp") as animation:
        assert num_frames(animation) == FRAMES


def test_a_second_analysis_keeps_figures_of_the_same_weights_only(work: Workplace, model: VisionTransformer) -> None:
    """Else the folder mixes figures of two checkpoints."""
    run = work.add_run("2025-01-01_00-00-00-000000", model)
    succeed("chapters=[patterns,statistics]", "num_samples=3", folder=work.path)
    output = work.path / "runs/2025-01-01_00-00-00-000000/attention_analysis"
    (output / "notes.txt").write_text("a file of the user's own")
    before = {path.name for path in output.iterdir()}
    succeed("chapters=[heads]", "num_samples=1", folder=work.path)
    assert {path.name for path in output.iterdir()} == before | {"attention_heads_sample_0.png"}
    content = torch.load(run.best, weights_only=True)
    content["state_dict"]["model.head.bias"] += 1
    torch.save(content, run.best)
    succeed("chapters=[patterns]", "num_samples=1", folder=work.path)
    assert (output / "notes.txt").exists()
    assert {path.name for path in output.glob("*.png")} == set(embedded_figures(read_report(output)))
    assert not (output / "attention_statistics.csv").exists()


# --- when something goes wrong on the way ---


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def reported(work: Workplace, model: VisionTransformer) -> Path:
    """The output of an analysis of two chapters."""
    run = work.add_run("2025-01-01_00-00-00-000000", model)
    succeed("chapters=[patterns,layers]", "num_samples=2", folder=work.path)
    return run.path / "attention_analysis"


def raising(study: Study) -> Chapter:
    study.progress("what [cannot] be done")
    raise RuntimeError("no <b>such</b>\nthing | here")


def test_a_failing_chapter_is_named_and_the_others_go_on(
    work: Workplace, model: VisionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    work.add_run("2025-01-01_00-00-00-000000", model)
    monkeypatch.setitem(analysis_chapters.CHAPTERS, "heads", raising)
    outcome = analyze("chapters=[patterns,heads,layers]", "num_samples=1", "output_dir=out", folder=work.path)
    assert outcome.exit_code == 1
    assert outcome.err == "chapter heads is missing: RuntimeError: no <b>such</b> thing | here\n"
    assert os.listdir(work.path / "out") and not (work.path / "out_incomplete").exists()
    told = read_statistics(work.path / "out")["chapters"]
    assert [each["status"] for each in told.values()] == ["complete", "missing", "complete"]
    assert told["heads"]["reason"] == "RuntimeError: no <b>such</b> thing | here"
    page = (work.path / "out/attention_analysis_report.html").read_text()
    assert "RuntimeError: no &lt;b&gt;such&lt;/b&gt; thing | here" in page and "<b>such" not in page
    assert "Missing:" in page.split("<nav")[0]
    assert "Missing:" in read_report(work.path / "out").split("## Contents")[0]
    assert embedded_figures(read_report(work.path / "out")) == [
        "attention_pattern_sample_0.png",
        "layer_comparison_sample_0.png",
    ]


@pytest.mark.parametrize(
    "fault",
    [
        lambda study: Chapter("Title", "see {figure:none}"),
        lambda study: Chapter("Title", "", [FigureFile("none.png", "")]),
        lambda study: Chapter("Title", "", numbers={"a": object()}),
        lambda study: None,
        lambda study: 1 / 0,
    ],
    ids=["placeholder", "figure", "numbers", "nothing", "exception"],
)
def test_whatever_a_chapter_does_wrong_the_others_are_reported(
    work: Workplace, model: VisionTransformer, monkeypatch: pytest.MonkeyPatch, fault: Callable[[Study], Any]
) -> None:
    work.add_run("2025-01-01_00-00-00-000000", model)
    monkeypatch.setitem(analysis_chapters.CHAPTERS, "heads", fault)
    outcome = analyze("chapters=[heads,layers]", "num_samples=1", "output_dir=out", folder=work.path)
    assert outcome.exit_code == 1 and re.fullmatch(r"chapter heads is missing: \w+: [^\n]+\n", outcome.err)
    assert embedded_figures(read_report(work.path / "out")) == ["layer_comparison_sample_0.png"]


def test_an_incomplete_result_does_not_replace_a_report_of_the_same_weights(
    reported: Path, work: Workplace, model: VisionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bytes_in(reported)
    with monkeypatch.context() as changed:
        changed.setitem(analysis_chapters.CHAPTERS, "layers", raising)
        outcome = analyze("chapters=[heads,layers]", "num_samples=1", folder=work.path)
    incomplete = reported.with_name("attention_analysis_incomplete")
    assert outcome.exit_code == 1 and str(incomplete.relative_to(work.path)) in outcome.out
    assert bytes_in(reported) == before
    assert {path.name for path in incomplete.glob("*.png")} == {"attention_heads_sample_0.png"}
    succeed("chapters=[heads,layers]", "num_samples=1", folder=work.path)
    assert not incomplete.exists()
    # Of other weights, the report that is there would mislead.
    content = torch.load(reported.parent / "checkpoints/best.ckpt", weights_only=True)
    content["state_dict"]["model.head.bias"] += 1
    torch.save(content, reported.parent / "checkpoints/best.ckpt")
    monkeypatch.setitem(analysis_chapters.CHAPTERS, "layers", raising)
    assert analyze("chapters=[heads,layers]", "num_samples=1", folder=work.path).exit_code == 1
    assert {path.name for path in reported.glob("*.png")} == {"attention_heads_sample_0.png"}
    assert "Missing:" in read_report(reported)


STOPPED = """
import os, runpy, signal, sys
from attention_visualizer.analysis import chapters
def stop(study):
    assert list(study.output.folder.glob("*.png")), "the chapter before has been written"
    os.kill(os.getpid(), getattr(signal, name))
    import time; time.sleep(60)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without it
chapters.CHAPTERS["layers"] = stop
name, sys.argv = sys.argv[1], sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(("name", "exit_code"), [("SIGKILL", -signal.SIGKILL), ("SIGINT", 130), ("SIGTERM", 143)])
def test_an_analysis_that_is_stopped_leaves_the_earlier_one(
    reported: Path, work: Workplace, name: str, exit_code: int
) -> None:
    """In its second chapter, when figures of the first are there."""
    before = bytes_in(reported)
    beside = set(os.listdir(reported.parent))
    arguments = ["chapters=[patterns,layers]", "num_samples=1"]
    command = [sys.executable, "-c", STOPPED, name, str(PROJECT / "analyze.py"), *arguments]
    environment = {name: value for name, value in os.environ.items() if name not in ("MNIST_DIR", "HYDRA_FULL_ERROR")}
    done = subprocess.run(
        command, cwd=work.path, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == exit_code, done.stderr
    assert bytes_in(reported) == before
    left = set(os.listdir(reported.parent)) - beside
    if name != "SIGKILL":
        assert not left and done.stderr.count("\n") == 1 and "interrupted" in done.stderr
    else:
        assert len(left) == 1 and left.pop().startswith(".attention_analysis.partial-")
        succeed("chapters=[patterns]", "num_samples=2", folder=work.path)
        assert set(os.listdir(reported.parent)) == beside


def test_progress_says_which_chapter_and_what_is_done_in_it(
    work: Workplace, model: VisionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    work.add_run("2025-01-01_00-00-00-000000", model)
    seen = []
    made = analysis_chapters.progress_bar

    def watched() -> Progress:
        progress = made()
        monkeypatch.setattr(progress, "update", lambda task, **fields: seen.append(fields))
        return progress

    monkeypatch.setattr(analysis_chapters, "progress_bar", watched)
    monkeypatch.setitem(analysis_chapters.CHAPTERS, "heads", raising)
    analyze("chapters=[heads,statistics]", "num_samples=1", "output_dir=out", folder=work.path)
    assert seen[:3] == [
        {"description": "heads", "doing": ""},
        {"doing": "what [cannot] be done"},
        {"description": "statistics", "doing": ""},
    ]
    assert any(fields["doing"].startswith("attention of") for fields in seen[3:])
    assert seen[-1] == {"description": "done", "doing": ""}


HOSTILE = "=1+1|<img src=x onerror=alert(1)> [a](b) `c` {figure:d} $\\frac$"


def test_foreign_names_are_text_in_every_file(work: Workplace, model: VisionTransformer) -> None:
    """A checkpoint may call its classes, and lie, as it likes."""
    folder = work.path / "=2 <script>alert(2)</script>".replace("/", "|")
    folder.mkdir()
    content = content_of(model, work.digits)
    names = [f"{HOSTILE}{number}" for number in range(10)]
    content[CHECKPOINT_KEY]["data"]["class_names"] = names
    torch.save(content, folder / "x.ckpt")
    chapters = "[patterns,statistics,atlas,roles]"
    succeed(f"ckpt='{folder / 'x.ckpt'}'", f"chapters={chapters}", "num_samples=2", "output_dir=out", folder=work.path)
    output = work.path / "out"
    told = read_statistics(output)
    assert told["chapters"]["atlas"]["numbers"]["class_names"] == names and "<script>" in told["facts"]["weights"]
    page = (output / "attention_analysis_report.html").read_text()
    assert "<script" not in page and "<img src=x" not in page and "&lt;img src=x onerror=alert(1)&gt;" in page
    assert all(tag.startswith('<img src="data:image/') for tag in re.findall(r"<img[^>]*>", page))
    text = read_report(output)
    tokens = [
        each
        for token in MarkdownIt("commonmark").enable("table").parse(text)
        for each in (token, *(token.children or []))
    ]
    html = [token.content for token in tokens if token.type in ("html_inline", "html_block")]
    assert not [each for each in html if "alert" in each or "script" in each]
    assert not [token for token in tokens if token.type == "link_open" and token.attrs["href"] in ("b", "e")]
    shown = [child for token in tokens if token.type == "image" for child in token.children or []]
    assert any(HOSTILE in child.content for child in shown)
    with (output / "attention_statistics.csv").open(newline="") as file:
        assert not [cell for row in csv.reader(file) for cell in row if cell[:1] in ("=", "+", "@")]


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


def test_help_names_every_field(tmp_path: Path) -> None:
    outcome = succeed("--help", folder=tmp_path)
    for field in (
        "ckpt",
        "run",
        "num_samples",
        "samples",
        "class",
        "wrong",
        "image",
        "query",
        "head_layers",
        "chapters",
    ):
        assert re.search(rf"\b{field}[:=]", outcome.out), field
    assert not os.listdir(tmp_path)


# --- mistakes ---


def assert_refused(folder: Path, *arguments: str, said: str) -> None:
    """One line on stderr, exit code not 0, nothing written."""
    before = listing(folder)
    outcome = analyze(*arguments, folder=folder)
    assert outcome.exit_code != 0
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), outcome.err
    assert said in lines[0]
    assert "Traceback" not in outcome.out and "Report" not in outcome.out
    assert listing(folder) == before


def test_into_the_folder_one_is_in(one_run: Workplace, tmp_path: Path) -> None:
    run = next((one_run.path / "runs").iterdir())
    outcome = analyze(f"run={run}", "chapters=[patterns]", "num_samples=1", "output_dir=.", folder=tmp_path)
    assert outcome.exit_code == 0 and (tmp_path / "attention_analysis_report.md").is_file(), outcome.err
    assert_refused(one_run.path, "output_dir=/", said="name a folder inside it")
    assert_refused(one_run.path, "chapters=[[patterns]]", said="choose from")


@pytest.mark.parametrize("arguments", [["ckpt=best"], ["ckpt=last"], [], ["run=all"]])
def test_without_any_checkpoint_it_says_how_to_train(tmp_path: Path, arguments: list[str]) -> None:
    assert_refused(tmp_path, *arguments, said="python train.py")


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("nope=1", "nope"),
        ("num_samples=abc", "num_samples=abc"),
        ("num_samples=0", "num_samples=0"),
        ("num_samples=-3", "num_samples=-3"),
        ("num_samples=1.5", "num_samples=1.5"),
        ("num_samples=true", "num_samples=True"),
        ("num_samples=null", "num_samples"),
        ("wrong=perhaps", "wrong=perhaps"),
        ("class=abc", "class=abc"),
        ("class=10", "from 0 to 9"),
        ("class=-1", "from 0 to 9"),
        ("samples=12", "samples=12"),
        ("samples=[]", "samples=[]"),
        ("samples=[1,a]", "samples"),
        ("samples=[7,300]", "from 0 to 299"),
        ("samples=[-1]", "from 0 to 299"),
        ("chapters=[nope]", "choose from patterns, heads, layers, methods, statistics, atlas, roles"),
        ("chapters=[]", "patterns, heads"),
        ("chapters=patterns", "chapters=patterns"),
        ("chapters=[1]", "chapters="),
        ("format=gif", "png, pdf, svg"),
        ("head_layers=first", "all, last"),
        ("query=nope", "query=nope"),
        ("query=[4,0]", "outside the 4 x 4 patch grid"),
        ("query=[0,-1]", "outside the 4 x 4 patch grid"),
        ("query=[1,2,3]", "query="),
        ("query=[a,b]", "query="),
        ("query=5", "query=5"),
        ("query=1.5", "query=1.5"),
        ("query=true", "query=True"),
        ("device=gpu", "device=gpu"),
        ("device=mps", "device=mps"),
        ("device=cuda:99", "device=cuda:99"),
        ("ckpt=nowhere.ckpt", "nowhere.ckpt does not exist"),
        ("ckpt=null", "ckpt="),
        ("run=nowhere", "run=nowhere"),
        ("image=nowhere.png", "nowhere.png"),
        ("image=runs", "runs"),
        ("output_dir=''", "output_dir"),
        (f"output_dir={'long' * 100}", "output_dir="),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(one_run: Workplace, argument: str, said: str) -> None:
    if argument == "device=mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has one")
    assert_refused(one_run.path, argument, said=said)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(one_run: Workplace) -> None:
    assert_refused(one_run.path, "device=cuda", said="device=cuda: no such GPU is available; use device=cpu")


def test_a_mistake_in_a_process_of_its_own(tmp_path: Path) -> None:
    """As above, with all that Hydra and the interpreter add."""
    command = [sys.executable, str(PROJECT / "analyze.py"), "ckpt=best"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and done.stdout == "" and not os.listdir(tmp_path)
    assert done.stderr == "error: no checkpoint yet in runs/: train one first with `python train.py`\n"


def test_a_file_that_is_no_picture(one_run: Workplace) -> None:
    (one_run.path / "text.png").write_text("no picture")
    assert_refused(one_run.path, "image=text.png", said="text.png: not a picture")


def test_a_file_in_the_way_of_the_output(one_run: Workplace) -> None:
    (one_run.path / "taken").write_text("a file")
    assert_refused(one_run.path, "output_dir=taken", said="taken is a file, not a folder")
    assert_refused(one_run.path, "output_dir=taken/deeper", said="taken is a file, not a folder")
    assert (one_run.path / "taken").read_text() == "a file"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that not even root can write")
def test_a_folder_that_cannot_be_written(one_run: Workplace) -> None:
    assert_refused(one_run.path, "output_dir=/proc/analysis", said="output_dir=/proc/analysis")


def other_architecture(content: dict[str, Any]) -> None:
    content["state_dict"] = {"model.conv1.weight": torch.zeros(3, 5)}


def more_heads_in_the_configuration(content: dict[str, Any]) -> None:
    content[CHECKPOINT_KEY]["model"]["num_layers"] = 5


@pytest.mark.parametrize("change", [other_architecture, more_heads_in_the_configuration])
def test_a_checkpoint_of_another_architecture(
    work: Workplace, model: VisionTransformer, change: Callable[[dict[str, Any]], None]
) -> None:
    run = work.add_run("2025-01-01_00-00-00-000000", model)
    content = content_of(model, work.digits)
    change(content)
    torch.save(content, run.best)
    assert_refused(work.path, said="best.ckpt")


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 no checkpoint either"])
def test_a_file_that_is_no_checkpoint(work: Workplace, content: bytes) -> None:
    (work.path / "model.ckpt").write_bytes(content)
    assert_refused(work.path, "ckpt=model.ckpt", said="model.ckpt")


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_a_truncated_checkpoint(work: Workplace, model: VisionTransformer, share: float) -> None:
    run = work.add_run("2025-01-01_00-00-00-000000", model)
    whole = run.best.read_bytes()
    run.best.write_bytes(whole[: int(len(whole) * share)])
    assert_refused(work.path, said="best.ckpt is truncated or corrupt")
    run.last.write_bytes(whole)
    assert_refused(work.path, said="last.ckpt (step 17) is whole")


def test_a_broken_history_is_found_before_any_work(work: Workplace, model: VisionTransformer) -> None:
    run = work.add_run("2025-01-01_00-00-00-000000", model, with_history=True)
    whole = run.history_path.read_bytes()
    run.history_path.write_bytes(whole[: len(whole) // 2])
    assert_refused(work.path, "num_samples=1", said="attention_history.npz")


def test_a_model_without_a_class_token_has_no_such_query(work: Workplace) -> None:
    work.add_run("2025-01-01_00-00-00-000000", random_model(pooling="mean"))
    assert_refused(work.path, "query=cls", said="query=cls: this model")


def test_a_model_that_makes_no_mistakes_has_no_wrong_samples(digits: ImageDataModule) -> None:
    labels = digits.splits["test"][1]
    nothing = torch.zeros(len(labels), dtype=torch.bool)
    with pytest.raises(UserError, match="no test image fits"):
        choose_samples(labels, 8, None, None, nothing)


def test_mnist_that_is_gone_is_named_by_the_field_of_this_command(
    work: Workplace, model: VisionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's own data set or none: digits would give other findings. `data.fallback` is no field here."""
    without_mnist(monkeypatch)
    run = work.add_run("2025-01-01_00-00-00-000000", model)
    content = content_of(model, work.digits)
    content[CHECKPOINT_KEY]["data"]["name"] = "mnist"
    torch.save(content, run.best)
    run.update_manifest(data=content[CHECKPOINT_KEY]["data"])
    assert_refused(work.path, "data_dir=elsewhere", said="error: data_dir=elsewhere")
    assert "data.fallback" not in analyze("data_dir=elsewhere", folder=work.path).err


@pytest.fixture(autouse=True)
def pyplot_is_left_alone() -> Iterator[None]:
    """No analysis opens a figure that somebody must close, or changes how other figures look."""
    import matplotlib.pyplot as plt

    plt.get_backend()
    settings = matplotlib.rcParams.copy()
    yield
    assert not plt.get_fignums() and matplotlib.rcParams == settings
