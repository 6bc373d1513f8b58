"""Analyses that fail or are stopped, and the earlier ones that they leave alone."""

from __future__ import annotations

import csv
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from markdown_it import MarkdownIt
from rich.progress import Progress

from attention_visualizer.analysis import chapters as analysis_chapters
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.report.chapter import Chapter, FigureFile
from attention_visualizer.runs.checkpoint import CHECKPOINT_KEY
from tests.helpers.analyses import (
    Workplace,
    analyze,
    bytes_in,
    content_of,
    embedded_figures,
    read_report,
    read_statistics,
    succeed,
)
from tests.helpers.runs import PROJECT, run_process


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
        "attention_depth.webp",
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
    assert embedded_figures(read_report(work.path / "out")) == ["layer_comparison_sample_0.png", "attention_depth.webp"]


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


@pytest.mark.parametrize(
    ("name", "exit_code"),
    [
        ("SIGKILL", -signal.SIGKILL),
        ("SIGINT", 130),
        ("SIGTERM", 143),
        pytest.param("SIGHUP", 129, marks=pytest.mark.long),
    ],
)
def test_an_analysis_that_is_stopped_leaves_the_earlier_one(
    reported: Path, work: Workplace, name: str, exit_code: int
) -> None:
    """In its second chapter, when figures of the first are there."""
    before = bytes_in(reported)
    beside = set(os.listdir(reported.parent))
    arguments = ["chapters=[patterns,layers]", "num_samples=1"]
    outcome = run_process(name, str(PROJECT / "analyze.py"), *arguments, folder=work.path, program=STOPPED)
    assert outcome.exit_code == exit_code, outcome.err
    assert bytes_in(reported) == before
    left = set(os.listdir(reported.parent)) - beside
    if name != "SIGKILL":
        assert not left and outcome.err.count("\n") == 1 and "interrupted" in outcome.err
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
