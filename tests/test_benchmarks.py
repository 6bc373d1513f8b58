"""The benchmarks run: what they measure is in docs/models.md."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from torch import Tensor, nn

from attention_visualizer.runs.checkpoint import load_checkpoint

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(FOLDER / script), *arguments], capture_output=True, text=True)


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("model_families")


@pytest.fixture
def cost(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("capture_cost")


@pytest.mark.parametrize(
    "script",
    [
        "model_families.py",
        "capture_cost.py",
        "watching.py",
        "analysing.py",
        "start_up.py",
        "training.py",
        "accuracy.py",
        "long_run.py",
        "findings.py",
        "explorer.py",
    ],
)
def test_help_says_how_to_run_it_also_without_torch_and_timm(script: str) -> None:
    # -S: without site-packages, so that nothing but Python is there.
    result = subprocess.run([sys.executable, "-S", str(FOLDER / script), "--help"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"python benchmarks/{script}" in result.stdout


def test_one_model_as_markdown() -> None:
    result = run("model_families.py", "--only", "attention-visualizer", "--markdown")
    assert result.returncode == 0, result.stderr
    assert "| ViT | attention-visualizer `VisionTransformer` | 6 | rebuilt |" in result.stdout
    assert "| 4x4 + 1 |" in result.stdout


def test_a_name_that_no_model_has_is_an_error(families: Any) -> None:
    result = run("model_families.py", "--only", "no such model")
    assert (result.returncode, result.stdout) == (1, "")
    assert "no such model" in result.stderr


class OtherPath(nn.Module):
    """Attention whose explicit path is another one by `off`."""

    def __init__(self, explicit: bool, off: float) -> None:
        super().__init__()
        self.factor = 1.0 + off if explicit else 1.0

    def forward(self, images: Tensor) -> Tensor:
        tokens = images.flatten(2)
        return (tokens @ tokens.transpose(1, 2) * self.factor).softmax(dim=-1) @ tokens


@pytest.mark.parametrize(("off", "code"), [(0.0, 0), (0.1, 1)])
def test_weights_that_are_not_those_of_the_explicit_path_are_an_error(
    families: Any, off: float, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = families.Example("toy", "OtherPath", "", lambda explicit: OtherPath(explicit, off), "softmax", 3)
    silent = families.Example("toy", "Flatten", "", lambda explicit: nn.Flatten(), None, 3)
    monkeypatch.setattr(sys, "argv", ["model_families.py"])
    monkeypatch.setattr(families, "EXAMPLES", [example])
    assert families.main() == code
    assert ("differ from the explicit path's" in capsys.readouterr().err) == bool(code)
    monkeypatch.setattr(families, "EXAMPLES", [example, silent])
    assert families.main() == 1
    assert "no attention of Flatten was captured" in capsys.readouterr().err


def test_the_softmaxes_of_a_model_are_read_and_then_left_alone(families: Any) -> None:
    before = Tensor.softmax
    with families.softmax_results() as found:
        expected = nn.functional.softmax(torch.eye(3), dim=-1)
        nn.Softmax(dim=0)(torch.eye(2))
    assert [tuple(each.shape) for each in found] == [(3, 3), (2, 2)]
    assert torch.equal(found[0], expected)
    assert Tensor.softmax is before


def test_a_cost_is_measured_in_a_process_of_its_own(cost: Any) -> None:
    result = run("capture_cost.py", "--child", json.dumps(["streamed", asdict(cost.QUICK)]))
    assert result.returncode == 0, result.stderr
    seconds, peak_bytes, checksum = json.loads(result.stdout)
    assert seconds > 0.0 and peak_bytes > 2**20 and checksum > 0.0


def test_the_cost_on_paper_is_that_of_one_float_for_each_pair_of_tokens(cost: Any) -> None:
    stored, streamed = cost.on_paper(cost.VIT_LARGE)
    one_map, values = 16 * (37 * 37 + 1) ** 2 * 4, (37 * 37 + 1) * 1024 * 4
    assert stored == 24 * (one_map + values)
    assert streamed == 2 * one_map + values


def test_a_part_that_does_not_exist_is_an_error() -> None:
    result = run("capture_cost.py", "everything")
    assert result.returncode == 2
    assert "default, base, depth, places, paper" in result.stderr


def test_what_watching_costs_is_measured_in_real_runs() -> None:
    result = run("watching.py", "--quick", "--markdown")
    assert result.returncode == 0, result.stderr
    assert "| an early frame | - | 0." in result.stdout
    assert "| all statistics | 0." in result.stdout


def test_the_analysis_is_measured_beside_a_forward_pass_and_matplotlib() -> None:
    result = run("analysing.py", "statistics", "figures", "--quick", "--markdown")
    assert result.returncode == 0, result.stderr
    assert "| plain forward pass |" in result.stdout and "| statistics of analyze.py |" in result.stdout
    assert "| matplotlib: subplots, imshow, savefig |" in result.stdout and "| figures of analyze.py |" in result.stdout


def test_a_start_is_measured_beside_its_libraries() -> None:
    result = run("start_up.py", "--quick", "--markdown")
    assert result.returncode == 0, result.stderr
    assert "| analyze.py --help |" in result.stdout and "| analyze.py num_samples=x |" in result.stdout


def test_an_installation_without_extras_is_the_smallest() -> None:
    result = run("start_up.py", "packages", "--markdown")
    assert result.returncode == 0, result.stderr
    rows = re.findall(r"\| attention-visualizer(?:\[(\w+)\])? \| (\d+) \| ([\d,]+) \|", result.stdout)
    packages = {extra: int(count) for extra, count, _ in rows}
    size = {extra: int(megabytes.replace(",", "")) for extra, _, megabytes in rows}
    assert packages.keys() == {"", "train", "report", "film", "all"}
    assert 10 < packages[""] < min(packages["train"], packages["report"]) < packages["all"]
    assert 200 < size[""] <= size["report"] <= size["all"]  # PyTorch's own among them


def test_training_is_measured_beside_the_peers() -> None:
    result = run("training.py", "peers", "--quick", "--markdown")
    assert result.returncode == 0, result.stderr
    assert "| train.py | " in result.stdout and "| vit-pytorch, plain loop, images in memory | " in result.stdout


def test_a_long_run_keeps_its_memory_and_files() -> None:
    result = run("long_run.py", "--quick", "--markdown")
    assert result.returncode == 0, result.stderr
    lines = [line.replace(",", "") for line in result.stdout.splitlines() if re.match(r"\| \d", line)]
    rows = [[float(cell) for cell in line.strip("|").split("|")] for line in lines]
    epochs, memory, _, files, events, history, _ = zip(*rows, strict=True)
    assert epochs == (3, 6, 12)
    assert len(set(files)) == 1  # none is added by an epoch
    assert memory[2] - memory[1] < 30
    assert 1.5 < (events[2] - events[1]) / (events[1] - events[0]) < 2.5  # in proportion to epochs
    assert history[2] < 2.5 * history[1]
    assert "bytes of events an epoch: " in result.stdout


def test_the_parts_of_a_step_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    training = importlib.import_module("training")
    now = [0.0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: now[0])
    watch = training.Stopwatch()
    with watch.part("step"):
        now[0] += 1.0
        with watch.part("forward"):
            now[0] += 2.0
        now[0] += 4.0
        with watch.part("forward"):
            now[0] += 8.0
    now[0] += 16.0  # outside of every part
    assert dict(watch.seconds) == {"step": 5.0, "forward": 10.0}


def test_matrix_products_of_a_step_are_all_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    found = importlib.import_module("training").measure_products(3, "cpu")
    # By hand, in multiplications: each of 17 tokens through qkv, projection and MLP, and the patches' own projection.
    # In the last block, only the class token has a query, a projection and an MLP. Backward costs twice as much.
    block = 17 * (128 * 384 + 128 * 128 + 2 * 128 * 256) + 2 * 17 * 17 * 128
    last = 17 * 128 * 256 + 2 * 128 * 128 + 2 * 128 * 256 + 2 * 17 * 128
    forward = 16 * 49 * 128 + 5 * block + last + 1280
    assert found["operations"] == pytest.approx(2 * 3 * forward, rel=0.03)


def test_accuracy_is_of_the_last_weights_over_seeds_and_nothing_is_done_twice(tmp_path: Path) -> None:
    brief = ["data=digits", "model.num_layers=1", "model.mlp_dim=29", "trainer.max_epochs=2"]
    command = ["accuracy.py", "no-fade", "--seeds", "3", "4", "--folder", str(tmp_path), "--", *brief]
    result = run(*command)
    assert result.returncode == 0, result.stderr
    runs = sorted(tmp_path.glob("no-fade/seed_*/*"))
    tested = [json.loads((path / "last_weights.json").read_text()) for path in runs]
    assert len(runs) == 2
    each = ", ".join(f"{100 * of_run['test']:.2f}" for of_run in tested)
    assert f"({each})" in result.stdout and "python train.py data.fade=0 data=digits" in result.stdout
    # The number is the trainer's own for these weights.
    last = load_checkpoint(runs[0] / "checkpoints" / "last.ckpt")
    assert last.validation_accuracy == pytest.approx(tested[0]["validation"], abs=1e-6)
    (runs[1] / "run.json").write_text((runs[1] / "run.json").read_text().replace("completed", "interrupted"))
    before = (runs[0] / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    again = run(*command)
    assert again.stdout == result.stdout and again.stderr.count("train.py") == 1
    assert (runs[0] / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before
    with FileLock(tmp_path / ".lock"):
        busy = run(*command)
    assert busy.returncode == 1 and "another accuracy.py is at work there" in busy.stderr
    # Its number would stand beside a command that did not give it.
    other = run(*command[:-1], "trainer.max_epochs=1")
    assert other.returncode == 1 and "give another --folder" in other.stderr
    assert "differs in trainer.max_epochs=1, trainer.max_epochs=2" in other.stderr


# --- findings of planted nulls and truths ---


@pytest.fixture(scope="module")
def planted() -> Any:
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(FOLDER)
        importlib.import_module("planted_kinds")
        yield importlib.import_module("planted")


@pytest.fixture(scope="module")
def kinds(planted: Any) -> Any:
    """One model of each kind, on 200 digits."""
    return importlib.import_module("planted_kinds").Kinds(planted.Setting.of(planted.QUICK), 1, 0)


def test_planted_maps_follow_the_images_over_batches_and_leave_other_heads(planted: Any) -> None:
    maps = torch.rand(5, 2, 3, 4)  # image, layer, head, patch
    maps[:, 1, 2] = torch.nan
    own = torch.rand(5, 3, 5, 5)
    edit = planted.PlantedMaps(maps)
    for rows in (slice(0, 3), slice(3, 5)):
        for number, name in enumerate(("first", "second")):
            edited = edit(SimpleNamespace(name=name), own[rows])
            heads = 3 - number
            torch.testing.assert_close(edited[:, :heads, :, 1:], maps[rows, number, :heads, None].expand(-1, -1, 5, -1))
            assert (edited[:, :heads, :, 0] == 0).all() and torch.equal(edited[:, heads:], own[rows, heads:])


def test_what_is_judged_on_planted_maps_are_these_maps(kinds: Any, planted: Any) -> None:
    setting, maps = kinds.setting, kinds.mixed_strengths_and_places(0)
    survey = setting.with_maps(setting.random_models[0], maps)
    np.testing.assert_allclose(survey.shares, maps, atol=1e-5)
    entropy = -(maps * np.log(np.maximum(maps, 1e-30))).sum(axis=-1).mean(axis=0)
    np.testing.assert_allclose(survey.mean_of("entropy").value[:, :-1], entropy, atol=1e-3)


def test_sharpened_random_weights_are_a_model_of_their_own(kinds: Any, planted: Any) -> None:
    entropy = kinds.setting.survey(kinds.setting.sharpened_model(7)).mean_of("entropy").value[:, :-1]
    low, high = planted.ENTROPIES
    assert (entropy > low - 0.05).all() and (entropy < high + 0.05).all() and np.ptp(entropy) > 1
    assert kinds.setting.survey(kinds.setting.random_models[0]).mean_of("entropy").value[:, :-1].min() > 2.6


def test_permuted_pixels_are_the_same_pixels_at_other_places(kinds: Any) -> None:
    images = kinds.setting.images.images
    permuted = kinds.setting.with_permuted_pixels().images.images
    assert not torch.equal(permuted, images)
    assert torch.equal(permuted.flatten(1).sort().values, images.flatten(1).sort().values)
    # Pixels that are equal in all images stay so.
    assert (permuted.float().std(dim=0) == 0).sum() == (images.float().std(dim=0) == 0).sum()


def test_verdicts_on_planted_maps_are_counted(kinds: Any) -> None:
    """Nothing of brightness; and where there is something, the table of nulls would show it."""
    nothing = kinds.maps_null("brightest patch", kinds.brightest)
    assert (nothing.claims.found, nothing.claims.total, nothing.claims.what) == (0, 1, ())

    def on_end_points(number: int) -> Any:
        points = kinds.setting.content.features["end points"][:, None, None]
        maps = kinds.one_strength_and_places(number) * (1 + 2 * points)
        return (maps / maps.sum(axis=-1, keepdims=True)).astype(np.float32)

    something = kinds.maps_null("end points", on_end_points)
    assert something.claims.found == 1 and "End points get more attention than other ink" in something.claims.what


def test_planted_heads_are_found(kinds: Any) -> None:
    assert kinds.needed_head(0)
    assert kinds.one_head("fixed position", kinds.one_place).found == 1
    assert kinds.one_head("content-dependent", kinds.one_place).found == 0


def test_rates_have_the_upper_end_of_their_interval(planted: Any) -> None:
    findings, kinds = (importlib.import_module(name) for name in ("findings", "planted_kinds"))
    none, some = kinds.Count(0, 20), kinds.Count.of([["ink"], [], [], ["ink", "background"]])
    assert findings.rate(none) == "0 of 20: 0% (at most 16%)" and findings.rate(None) == "–"
    assert (some.found, some.total, some.what) == (2, 4, ("ink", "background", "ink"))
    text = findings.null_table([kinds.Null("a", none, some), kinds.Null("b", none)], True)
    assert "| a | 0 of 20: 0% (at most 16%) | 2 of 4: 50% (at most 85%) | – | – | – |" in text
    assert "| all together | 0 of 40: 0% (at most 9%) | 2 of 4: 50% (at most 85%) | – | – | – |" in text
    assert "a: ink, 2" in text and "a: background, 1" in text
    truths = findings.truth_table([kinds.Truth("head", "1 of 12", kinds.Count(3, 4))], True)
    assert "| head | 1 of 12 | 3 of 4 |" in truths
