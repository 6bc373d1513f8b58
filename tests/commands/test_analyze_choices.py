"""Which checkpoint, samples, query and chapters are meant."""

from __future__ import annotations

import json
import os
import re
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt
from PIL import Image
from safetensors.torch import save_file

from attention_visualizer.analysis.study.output import Output
from attention_visualizer.analysis.study.samples import SampleChoice, choose_samples, find_samples
from attention_visualizer.analysis.study.target import BatchLimit, Target
from attention_visualizer.data.datamodule import ImageDataModule
from attention_visualizer.data.image_sets import LabelledImageSet
from attention_visualizer.data.images import normalise
from attention_visualizer.figures import color_scales, panels
from attention_visualizer.measures.observation import observe
from attention_visualizer.models.vision_transformer import VisionTransformer
from tests.helpers.analyses import (
    FINDINGS_FIGURES,
    LAYERS,
    SIZES,
    STATISTICS_FIGURES,
    Workplace,
    assert_refused,
    contains,
    embedded_figures,
    random_model,
    read_records,
    read_report,
    succeed,
    without_mnist,
)

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
        (["run=2025-01-01_00-00-00-000000"], 10, "validation accuracy 97.00%"),
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
    report = runs.path / outcome.out.splitlines()[-1].removeprefix("Markdown:").strip()
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
    outcome = succeed(f"ckpt={path}", *ONE, *(["num_heads=4"] if kind == "bare" else []), folder=work.path)
    assert "NOT MNIST" in outcome.err
    assert f"width {128 if kind == 'bare' else 22}," in read_report(work.path / "attention_analysis")


def test_a_running_runs_checkpoint_counts_without_its_manifest(work: Workplace, model: VisionTransformer) -> None:
    run = work.add_run("2025-01-01_00-00-00-000000", model)
    run.manifest_path.unlink()
    assert "75.00%" in succeed(*ONE, folder=work.path).out


# --- which samples ---


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
    found = re.fullmatch(r"test image (\d+): true (\d), predicted (\d) \([\d.]+%\)(: wrong)?\.", caption)
    assert found, caption
    index, true, predicted = map(int, found.groups()[:3])
    assert (true != predicted) == bool(found[4])
    return index, true, predicted


def test_the_samples_are_the_first_of_each_class_then_the_second(one_run: Workplace) -> None:
    labels = one_run.digits.splits["test"][1].tolist()
    seen = [parse(caption) for caption in captions(one_run, "num_samples=13")]
    places = {label: [index for index, other in enumerate(labels) if other == label] for label in range(10)}
    expected = sorted(places[label][0] for label in range(10)) + sorted(places[label][1] for label in range(10))[:3]
    assert [index for index, _, _ in seen] == expected
    assert all(labels[index] == true for index, true, _ in seen)


class Learnt(VisionTransformer):
    """Answers as it is told, image by image."""

    def __init__(self, images: torch.Tensor, answers: torch.Tensor) -> None:
        super().__init__(**SIZES)
        self.answers = {image.numpy().tobytes(): int(answer) for image, answer in zip(images, answers, strict=True)}
        self.passes = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.passes += len(images)
        answers = torch.tensor([self.answers.get(image.numpy().tobytes(), 0) for image in images])
        return super().forward(images) * 0 + torch.nn.functional.one_hot(answers, 10)


def target_of(digits: ImageDataModule, errors: list[int], batch: int = 500) -> Target:
    """Of a model that is right about all test images but these."""
    images, labels = digits.splits["test"]
    answers = labels.clone()
    answers[errors] = (labels[errors] + 1) % 10
    model = Learnt(normalise(images, digits.description), answers).eval()
    return Target(model, LabelledImageSet(digits.description, images, labels), limit=BatchLimit(batch))


def chosen(target: Target, **choice: Any) -> list[int]:
    return [int(sample.source.split()[-1]) for sample in find_samples(target, SampleChoice(**choice))]


def test_a_quarter_of_the_samples_are_the_first_wrong_answers_of_different_classes(digits: ImageDataModule) -> None:
    labels = digits.splits["test"][1]
    usual = chosen(target_of(digits, []))
    assert usual == choose_samples(labels, 8, None, None, None), "a perfect model's are the usual ones"
    later = [row for row in range(100, 300) if row not in usual]
    first = later[3]
    same = next(row for row in later if row > first and labels[row] == labels[first])
    other = next(row for row in later if row > same and labels[row] != labels[first])
    errors = [first, same, other, *later[-20:]]
    target = target_of(digits, errors, batch=20)
    assert chosen(target) == [*usual[:6], first, other]
    assert target.model.passes < 300, "no more is looked at than is needed"  # type: ignore[operator]
    assert chosen(target_of(digits, [same])) == [*usual[:7], same], "the only error there is"
    assert chosen(target_of(digits, usual[:6])) == usual, "errors that are shown anyway"
    assert chosen(target_of(digits, [usual[7]])) == usual
    assert chosen(target, num_samples=3) == usual[:3]
    assert chosen(target, num_samples=4) == [*usual[:3], first]
    assert chosen(target, samples=[5, 7, 5, 9]) == [5, 7, 5, 9]
    of_class = (labels == labels[first]).nonzero()[:4, 0].tolist()
    assert chosen(target, class_=int(labels[first]), num_samples=4) == of_class


def test_a_model_that_has_learnt_nothing_has_the_usual_samples(digits: ImageDataModule) -> None:
    labels = digits.splits["test"][1]
    errors = (labels != 3).nonzero()[:, 0].tolist()  # it always says the same
    assert chosen(target_of(digits, errors)) == choose_samples(labels, 8, None, None, None)


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
        colors = color_scales.attention_scale(17).to_rgb(maps[layer].mean(axis=0))
        assert contains(pixels, panels.resize(colors, 112, 112)), f"the map of layer {layer + 1} is not in the picture"


def test_the_last_layers_heads_alone(one_run: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    save = Output.save
    monkeypatch.setattr(
        Output,
        "save",
        lambda self, figure, stem: (
            rows.append([text.text for text in figure.texts if text.text.startswith("layer ")])
            or save(self, figure, stem)
        ),
    )
    for which in ("all", "last"):
        succeed("chapters=[heads]", "num_samples=1", f"head_layers={which}", f"output_dir={which}", folder=one_run.path)
    assert rows == [[f"layer {layer + 1}" for layer in range(LAYERS)], [f"layer {LAYERS}"]]


@pytest.mark.parametrize(
    "chapters", [["heads"], ["statistics", "layers"], ["methods"], ["roles", "atlas"], ["importance"], ["evolution"]]
)
def test_only_the_chapters_that_were_asked_for(work: Workplace, model: VisionTransformer, chapters: list[str]) -> None:
    work.add_run("2025-01-01_00-00-00-000000", model, with_history=True)
    succeed(f"chapters=[{','.join(chapters)}]", "num_samples=2", "output_dir=deep/out", folder=work.path)
    files = {
        "heads": {f"attention_heads_sample_{number}.png" for number in range(2)},
        "layers": {*(f"layer_comparison_sample_{number}.png" for number in range(2)), "attention_depth.webp"},
        "methods": {f"attention_methods_sample_{number}.png" for number in range(2)},
        "statistics": {*(f"{stem}.png" for stem in STATISTICS_FIGURES), "attention_statistics.csv"},
        "atlas": {f"{stem}.png" for stem in FINDINGS_FIGURES[:3]},
        "roles": {f"{stem}.png" for stem in FINDINGS_FIGURES[3:5]},
        "importance": {"attention_interventions.png", "attention_importance.png"},
        "trust": {"attention_trust.png"},
        "claims": {"attention_claims.png"},
        "evolution": {"attention_evolution_strip.png", "attention_evolution.png", "attention_evolution.webp"},
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
