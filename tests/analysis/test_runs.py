"""Comparing runs: which are found and refused, heads that recur by design, random weights, settings."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml

from attention_visualizer.analysis.chapters import ANALYSIS_FILE_NAMES
from attention_visualizer.analysis.runs import chapter as runs_chapter
from attention_visualizer.analysis.runs.seeds.chapter import describe_heads
from attention_visualizer.analysis.runs.seeds.figure import draw as draw_seeds
from attention_visualizer.analysis.runs.seeds.measure import measure as compare_seeds
from attention_visualizer.analysis.runs.settings.figure import draw as draw_settings
from attention_visualizer.analysis.runs.settings.measure import QUANTITIES, Setting, Value, mean_over_layers
from attention_visualizer.analysis.runs.settings.measure import measure as compare_settings
from attention_visualizer.analysis.runs.surveyed_runs import survey_runs
from attention_visualizer.analysis.study.analysed_weights import find_weights
from attention_visualizer.analysis.study.budget import Budget
from attention_visualizer.analysis.study.compared_runs import find_compared_runs
from attention_visualizer.analysis.study.output import Output
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.analysis.study.target import Target
from attention_visualizer.data.datamodule import ImageDataModule
from attention_visualizer.data.image_sets import LabelledImageSet
from attention_visualizer.data.images import normalise
from attention_visualizer.files.atomic import write_json
from attention_visualizer.files.tensor_files import CHECKPOINT_KEY
from attention_visualizer.models.untrained import random_weights
from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.models.vit_config import ViTConfig
from attention_visualizer.runs.checkpoint import block_for
from attention_visualizer.runs.folders import RunFolder
from attention_visualizer.support.errors import UserError
from tests.helpers.runs import ENVIRONMENT, run_script

LAYERS, HEADS, WIDTH, IMAGES = 3, 4, 20, 150
CONFIG: dict[str, Any] = {"embed_dim": WIDTH, "num_heads": HEADS, "num_layers": LAYERS, "mlp_dim": 23}


@pytest.fixture(scope="session")
def digits() -> ImageDataModule:
    data = ImageDataModule(name="digits")
    data.load()
    return data


def untrained(seed: int, **config: Any) -> VisionTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VisionTransformer(**CONFIG | config).eval()


@pytest.fixture(scope="session")
def trained(digits: ImageDataModule) -> VisionTransformer:
    """Some seconds of training: about nine of ten digits right."""
    model = untrained(0).train()
    images, labels = digits.splits["train"]
    images = normalise(images, digits.description)
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(8):
        for rows in torch.randperm(len(images), generator=generator).split(64):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimiser.step()
    return model.eval()


def heads_moved(
    model: VisionTransformer, orders: Sequence[Sequence[int]], noise: float, seed: int
) -> VisionTransformer:
    """The same function, its heads in another order (new head k is the old orders[layer][k]), and a little noise."""
    moved = copy.deepcopy(model)
    size = WIDTH // HEADS
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block, order in zip(moved.blocks, orders, strict=True):
            for name, parameter in block.named_parameters():
                if "qkv" in name:
                    parts = parameter.view(3, HEADS, size, *parameter.shape[1:])
                    parameter.copy_(parts[:, list(order)].reshape(parameter.shape))
                if name.endswith("attn.proj.weight"):
                    parameter.copy_(parameter.view(WIDTH, HEADS, size)[:, list(order)].reshape(WIDTH, WIDTH))
        for parameter in moved.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)
    return moved


# --- runs on disk ---


@dataclass(frozen=True)
class Place:
    """A folder with runs/."""

    path: Path
    digits: ImageDataModule

    def add(
        self,
        name: str,
        model: VisionTransformer,
        seed: int | None = 0,
        files: Sequence[str] = ("best.ckpt",),
        accuracy: float = 0.75,
        settings: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
    ) -> Path:
        """A run as training leaves it; returns its first checkpoint."""
        run = RunFolder(self.path / "runs" / name)
        run.checkpoints.mkdir(parents=True)
        description = replace(self.digits.description, **(data or {}))
        block = block_for(ViTConfig(**model.config), description, data_dir=None, split_seed=0, seed=seed or 0)
        content = {
            "state_dict": {f"model.{key}": tensor for key, tensor in model.state_dict().items()},
            "epoch": 2,
            "global_step": 17,
            CHECKPOINT_KEY: block | {"validation_accuracy": accuracy},
        }
        for file in files:
            torch.save(content, run.checkpoints / file)
        manifest = {"status": "completed", "metrics": {"validation_accuracy": accuracy}, "data": description.to_dict()}
        write_json(run.manifest_path, manifest | ({} if seed is None else {"seed": seed}))
        if settings is not None:
            run.config_path.write_text(yaml.safe_dump(settings | {"seed": seed, "run_folder": str(run.path)}))
        return run.checkpoints / files[0]

    def find(self, pattern: str, own: Path) -> list[Any]:
        weights = find_weights(str(own), None, str(self.path / "runs"))
        assert weights.loaded is not None
        return find_compared_runs(str(self.path / pattern), weights.loaded, weights.run)

    def study(self, pattern: str, own: Path, controls: int = 3, count: int = IMAGES) -> Study:
        weights = find_weights(str(own), None, str(self.path / "runs"))
        images, labels = self.digits.splits["test"]
        pictures = LabelledImageSet(self.digits.description, images[:count], labels[:count])
        output = self.path / "out"
        output.mkdir(exist_ok=True)
        target, budget = Target(weights.model, pictures), Budget(count, controls)
        return Study(target, Output(output), weights.text, budget, compared_runs=self.find(pattern, own))


@pytest.fixture
def place(tmp_path: Path, digits: ImageDataModule) -> Place:
    return Place(tmp_path, digits)


def refusal(place: Place, pattern: str, own: Path) -> str:
    with pytest.raises(UserError) as error:
        place.find(pattern, own)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_sweep_stands_for_its_jobs_in_their_order(place: Place) -> None:
    for job in (10, 2, 0):
        place.add(
            f"sweep/{job}_x", untrained(job, embed_dim=8 * (job + 1)), seed=0, settings={"data": {"batch_size": 64}}
        )
    (place.path / "runs/sweep/multirun.yaml").touch()
    found = place.find("runs/sweep", place.path / "runs/sweep/2_x/checkpoints/best.ckpt")
    assert [run.varied for run in found] == [{"model.embed_dim": width} for width in (8, 24, 88)]
    assert [run.is_analysed for run in found] == [False, True, False]
    assert [run.label for run in found] == ["sweep, job 0", "sweep, job 2", "sweep, job 10"]
    assert {run.seed for run in found} == {0} and {run.validation_accuracy for run in found} == {0.75}


def test_settings_come_from_config_and_checkpoint_and_the_seed_is_no_setting(place: Place) -> None:
    config = {"data": {"batch_size": 64, "data_dir": "/here"}, "optimizer": {"_target_": "x", "learning_rate": 0.01}}
    own = place.add("a", untrained(1), 4, settings=config)
    place.add("b", untrained(2, dropout=0.3), 5, settings=config | {"data": {"batch_size": 32, "data_dir": "/there"}})
    place.add("c", untrained(3), None)  # without config.yaml
    found = place.find("runs/*", own)
    assert [run.varied for run in found] == [
        {"model.dropout": 0.0, "data.batch_size": 64},
        {"model.dropout": 0.3, "data.batch_size": 32},
        {"model.dropout": 0.0, "data.batch_size": "?"},
    ]
    assert [run.seed for run in found] == [4, 5, None]
    assert found[1].setting == ("dropout=0.3", "batch_size=32")


def test_the_analysed_run_is_added_in_front_and_its_kind_of_file_is_taken(place: Place) -> None:
    own = place.add("own", untrained(1), 0, files=("last.ckpt",))
    place.add("x1", untrained(2), 1, files=("best.ckpt",))
    other = place.add("x2", untrained(3), 2, files=("last.ckpt",))
    place.add("x2_best", untrained(4), 3, files=("best.ckpt",))
    (place.path / "runs/x3").mkdir()
    found = place.find("runs/x*", own)
    assert [run.label for run in found] == ["own", "x1", "x2", "x2_best"] and found[0].is_analysed
    assert found[2].loaded.path == other
    assert "x1 has no last.ckpt: its best.ckpt is compared" in found[0].remarks
    assert any("x3 is no run" in remark for remark in found[0].remarks)


def test_the_same_weights_and_the_same_seed_count_once(place: Place) -> None:
    own = place.add("a", untrained(1), 0, settings={}, files=("best.ckpt",))
    torch.save(torch.load(own, weights_only=True) | {"epoch": 3}, own.with_name("last.ckpt"))  # same weights
    place.add("b", untrained(1), 0, settings={})
    place.add("c", untrained(2), 1, settings={})
    place.add("d", untrained(3), 1, settings={})  # another file of the same seed
    found = place.find("runs/*", own)
    assert [run.label for run in found] == ["a", "c"]
    assert any("b holds the same weights as a" in remark for remark in found[0].remarks)
    assert any("d has the same settings and seed" in remark for remark in found[0].remarks)
    found = place.find("runs/*/checkpoints/*.ckpt", own)
    assert [run.label for run in found] == ["a/best.ckpt", "c/best.ckpt"]
    assert any("a/last.ckpt holds the same weights as a/best.ckpt" in remark for remark in found[0].remarks)


def test_what_cannot_be_compared_is_refused_in_one_line(place: Place) -> None:
    own = place.add("a", untrained(1), 0)
    assert "matches no run" in refusal(place, "nothing*", own)
    assert "nothing but the analysed weights" in refusal(place, "runs/a", own)
    place.add("copy", untrained(1), 1)
    assert "copy holds the same weights as a" in refusal(place, "runs/[ac]*", own)
    place.add("other_data", untrained(2), 1, data={"name": "mnist"})
    text = refusal(place, "runs/other_data", own)
    assert "other_data" in text and "'mnist'" in text and "same data set" in text
    place.add("other_size", untrained(2, img_size=35), 1)
    text = refusal(place, "runs/other_size", own)
    assert "other_size" in text and "img_size=35" in text
    broken = place.add("broken", untrained(3), 1)
    broken.write_bytes(broken.read_bytes()[:-900])
    assert str(broken) in refusal(place, "runs/*", own)
    with pytest.raises(UserError, match="runs= is empty"):
        loaded = find_weights(str(own), None, "runs").loaded
        assert loaded is not None
        find_compared_runs("", loaded)


# --- the chapter where there is nothing to say ---


def test_without_runs_or_labels_the_chapter_is_one_sentence(place: Place) -> None:
    own = place.add("a", untrained(1), 0)
    place.add("b", untrained(2), 1)
    study = place.study("runs/*", own)
    assert isinstance(study.target.images, LabelledImageSet)
    no_labels = replace(study, target=replace(study.target, images=replace(study.target.images, labels=None)))
    for lacking, told in ((replace(study, compared_runs=()), "runs=<glob>"), (no_labels, "known classes")):
        chapter = runs_chapter.CHAPTER(lacking)
        assert told in chapter.text and not chapter.figures and not chapter.numbers and chapter.finding is None


# --- several seeds ---

ORDERS = ([[1, 2, 3, 0], [2, 0, 1, 3], [3, 2, 0, 1]], [[2, 1, 0, 3], [0, 3, 2, 1], [1, 3, 0, 2]])


@pytest.fixture
def planted(place: Place, trained: VisionTransformer) -> Study:
    """Three "seeds" of which two are the first with its heads moved, and a little noise."""
    own = place.add("0", trained, 0, settings={})
    for number, orders in enumerate(ORDERS, 1):
        place.add(str(number), heads_moved(trained, orders, 0.003, number), number, settings={})
    return place.study("runs/*", own)


def test_moved_heads_are_found_and_called_recurring(planted: Study) -> None:
    surveyed = survey_runs(planted)
    found = compare_seeds(planted, surveyed)
    expected = [np.argsort(orders, axis=1) for orders in ORDERS]  # where the first run's head k stands
    np.testing.assert_array_equal(found.partners[1:], expected)
    assert found.heads_recur and min(pair.gain for pair in found.pairs) > 0.8
    for name, values in found.aligned.items():  # numbered alike, the runs' heads have the same values
        np.testing.assert_allclose(values[1:], np.broadcast_to(values[0], values[1:].shape), rtol=0.1, atol=0.02)
        assert min(pair.agreement[name] for pair in found.pairs) > 0.8 or name == "distance"
        later = [  # each moved run's heads of the next layer that stand for the first run's: the same head in both
            np.take_along_axis(np.roll(found.values[name][pair.second], -1, axis=0), pair.matching.partners, axis=1)
            for pair in found.shifted
            if pair.first == 0
        ]
        np.testing.assert_allclose(*later, rtol=0.1, atol=0.02)
    entropy = surveyed[1].survey.summaries["entropy"].mean / np.log(17)
    np.testing.assert_allclose(found.values["entropy"][1], entropy)
    partners, entropy_of_layers, *_, agreement = draw_seeds(found).axes
    dots = np.sort(np.concatenate([dots.get_offsets()[:, 1] for dots in partners.collections]))
    np.testing.assert_allclose(dots, np.sort([pair.matching.matched for pair in found.pairs], axis=None))
    assert [text.get_text() for text in entropy_of_layers.get_legend().get_texts()][1:] == [
        "seed 0",
        "seed 1",
        "seed 2",
    ]
    assert [label.get_text() for label in agreement.get_xticklabels()] == list(found.values)


def test_the_chapter_on_seeds_says_what_holds_and_that_it_is_descriptive(planted: Study) -> None:
    chapter = runs_chapter.CHAPTER(planted)
    assert "3 seeds" in chapter.title
    assert "statements about seeds are descriptive" in chapter.text and "below 0.25" in chapter.text
    assert "closer than unrelated heads: heads recur." in chapter.text
    (figure,) = chapter.figures
    assert ANALYSIS_FILE_NAMES.fullmatch(figure.name) and (planted.output.folder / figure.name).is_file()
    assert chapter.finding is not None and chapter.finding.figure == figure.name
    assert [table.columns[0] for table in chapter.tables] == ["run", "layer", "quantity", "head", "claim"]
    assert len(chapter.tables[1].rows) == LAYERS and len(chapter.tables[3].rows) == LAYERS * HEADS
    told = json.loads(json.dumps(chapter.numbers, allow_nan=False))
    assert told["descriptive"] and told["smallest_p"] == 0.25 and len(told["pairs"]) == 3
    assert np.array(told["values_by_run_layer_head"]["entropy"]).shape == (3, LAYERS, HEADS)
    assert told["families"]["layers"]["size"] == 4 * LAYERS - 1  # no distance for the last layer
    # Values over seeds lead the report: the mean of the runs, with Student's interval over them.
    accuracies = np.array([run["accuracy"]["value"] for run in told["runs"]])
    half = 4.303 * accuracies.std(ddof=1) / np.sqrt(3)
    over_seeds = told["over_seeds"]["accuracy"]
    assert over_seeds["value"] == pytest.approx(accuracies.mean()) and over_seeds["n"] == 3
    assert over_seeds["high"] - over_seeds["value"] == pytest.approx(half, rel=1e-3)
    entropy = np.array(told["values_by_run_layer_head"]["entropy"]).mean(axis=(0, 2))
    np.testing.assert_allclose(told["over_seeds"]["entropy"]["value"], entropy)
    assert chapter.finding.rank == 0 and chapter.finding.text.startswith("Over 3 seeds the mean accuracy is ")
    assert f"(single runs: {100 * accuracies.min():.2f} to {100 * accuracies.max():.2f})" in chapter.finding.text
    supported = told["runs_that_support"]
    assert chapter.tables[4].rows == [[claim, str(runs)] for claim, runs in supported.items()] and len(supported) > 5
    # Three of the same function support the same claims, or hardly so.
    assert set(supported.values()) <= {0, 3} or "in some" in chapter.finding.text
    assert runs_chapter.CHAPTER(planted).numbers == chapter.numbers


def test_ten_seeds_are_more_than_descriptive(place: Place, trained: VisionTransformer) -> None:
    own = place.add("0", trained, 0, settings={})
    for number in range(1, 10):
        place.add(str(number), heads_moved(trained, ORDERS[number % 2], 0.01, number), number, settings={})
    study = place.study("runs/*", own, count=60)  # too few for claims, which are not asked for here
    chapter = runs_chapter.CHAPTER(study)
    assert "descriptive" not in chapter.text and "sign-flip" in chapter.text
    layers = chapter.numbers["families"]["layers"]
    entropy, adjusted = np.array(layers["mean_difference"]["entropy"]), np.array(layers["adjusted_p"]["entropy"])
    assert (entropy < -0.05).all() and (adjusted < 0.01 / 3).all() and all(layers["in_every_seed"]["entropy"])


@pytest.mark.parametrize("first", [20, 40, 60])
def test_random_weights_never_give_a_finding(place: Place, first: int) -> None:
    """Ten runs that have learnt nothing: heads do not recur, no layer and no head stands out, no claim is supported."""
    own = place.add("0", untrained(first), 0, settings={})
    for number in range(1, 10):
        place.add(str(number), untrained(first + number), number, settings={})
    study = place.study("runs/*", own)
    surveyed = survey_runs(study)
    found = compare_seeds(study, surveyed)
    assert not found.heads_recur
    assert found.layer_effects.num_significant(10) == found.head_effects.num_significant(10) == 0
    assert set(found.supported.values()) == {0}
    assert "no evidence that heads recur" in describe_heads(found)


def test_models_of_one_head_have_nothing_to_match(place: Place) -> None:
    own = place.add("0", untrained(1, num_heads=1, num_layers=1), 0, settings={})
    place.add("1", untrained(2, num_heads=1, num_layers=1), 1, settings={})
    chapter = runs_chapter.CHAPTER(place.study("runs/*", own))
    assert "nothing to match" in chapter.text and chapter.finding is not None
    assert "recur" not in chapter.finding.text
    json.dumps(chapter.numbers, allow_nan=False)


# --- settings ---


def test_what_goes_with_a_setting(place: Place, trained: VisionTransformer) -> None:
    """The same weights with queries four times as long attend to fewer patches: the entropy falls, and is told."""
    sharp = copy.deepcopy(trained)
    with torch.no_grad():
        for block in sharp.blocks:
            for name, parameter in block.named_parameters():
                if "qkv" in name:
                    parameter[:WIDTH] *= 4
    config = {"optimizer": {"learning_rate": 0.01}}
    own = place.add("b", trained, 0, settings=config)
    place.add("a", sharp, 0, settings={"optimizer": {"learning_rate": 0.1}})
    study = place.study("runs/*", own)
    surveyed = survey_runs(study)
    comparison = compare_settings(study, surveyed)
    settings = comparison.settings
    assert [setting.label for setting in settings] == ["learning_rate=0.01", "learning_rate=0.1"]
    assert all(setting.has_learnt for setting in settings)
    found = {each.quantity.name: each for each in comparison.differences}
    assert found["entropy"].stands_out and float(found["entropy"].interval.value) < -0.1
    # Paired over the pictures: the same numbers from each picture's own difference.
    rights = [each.correct for each in sorted(surveyed, key=lambda each: not each.run.is_analysed)]
    assert rights[0] is not None and rights[1] is not None
    gaps = rights[1].astype(float) - rights[0]
    accuracy = found["accuracy"].interval
    assert float(accuracy.value) == pytest.approx(gaps.mean()) and accuracy.n == IMAGES
    half = 1.96 * gaps.std() / np.sqrt(IMAGES)
    assert float(accuracy.high - accuracy.low) == pytest.approx(2 * half, rel=0.15)
    mean = surveyed[1].survey.summaries["entropy"].mean.mean() / np.log(17)
    assert settings[0].values["entropy"].mean == pytest.approx(mean, rel=1e-5)
    distance = surveyed[1].survey.summaries["distance"].mean[:-1].mean() / 14.06  # without the last layer
    assert settings[0].values["distance"].mean == pytest.approx(distance, rel=1e-3)
    above, below = np.array(draw_settings(comparison).axes).reshape(2, -1)
    assert [axis.get_ylabel().split(" (")[0] for axis in above] == [each.label.split(" (")[0] for each in QUANTITIES]
    assert all([label.get_text() for label in axis.get_xticklabels()] == ["0.01", "0.1"] for axis in above)
    assert {axis.get_title() for axis in below} == {"difference from learning_rate=0.01"}
    chapter = runs_chapter.CHAPTER(study)
    assert "learning_rate" in chapter.title and "One run is one sample" in chapter.text
    assert "learning_rate=0.1: attention entropy -" in chapter.text
    assert (
        ANALYSIS_FILE_NAMES.fullmatch(chapter.figures[0].name)
        and (study.output.folder / chapter.figures[0].name).is_file()
    )
    json.dumps(chapter.numbers, allow_nan=False)


@pytest.mark.parametrize("first", [20, 40, 60])
def test_settings_of_random_weights_never_stand_out(place: Place, first: int) -> None:
    """Not even where models are of different sizes, whose attention differs without any training."""
    own = place.add("0", untrained(first), 0, settings={})
    place.add("1", untrained(first + 1, patch_size=14), 0, settings={})
    place.add("2", untrained(first + 2, num_heads=1, pooling="mean"), 0, settings={})
    study = place.study("runs/*", own, controls=2)
    surveyed = survey_runs(study)
    found = compare_settings(study, surveyed).differences
    assert len(found) == 8 and not any(each.stands_out for each in found)
    told = runs_chapter.CHAPTER(study)
    assert "No difference meets all criteria." in told.text and "no better than random weights" in told.text
    json.dumps(told.numbers, allow_nan=False)


def test_a_setting_with_several_runs_must_be_apart_in_all(place: Place, trained: VisionTransformer) -> None:
    """Two runs a setting: where one run of either lies among the other's, nothing stands out."""

    def made(seed: int, factor: float) -> VisionTransformer:
        model = heads_moved(trained, ORDERS[0], 0.001, seed)
        with torch.no_grad():
            for block in model.blocks:
                for name, parameter in block.named_parameters():
                    if "qkv" in name:
                        parameter[:WIDTH] *= factor
        return model

    slow, fast = ({"optimizer": {"learning_rate": rate}} for rate in (0.01, 0.1))
    own = place.add("a0", made(1, 1.0), 0, settings=slow)
    place.add("a1", made(2, 4.0), 1, settings=slow)
    place.add("b0", made(3, 2.5), 0, settings=fast)
    place.add("b1", made(4, 6.0), 1, settings=fast)
    study = place.study("runs/*", own)
    surveyed = survey_runs(study)
    entropy = next(each for each in compare_settings(study, surveyed).differences if each.quantity.name == "entropy")
    assert abs(float(entropy.interval.value)) > 0.05 and entropy.adjusted <= 0.05
    assert not entropy.apart and not entropy.stands_out
    assert "mean of its runs, 2 or more" in runs_chapter.CHAPTER(study).text


@pytest.mark.parametrize("runs", [2, 3, 4])
def test_three_runs_of_a_setting_have_an_interval_over_runs(runs: int) -> None:
    each = [0.5, 0.6, 0.65, 0.7][:runs]
    value = Value(float(np.mean(each)), np.linspace(0.59, 0.61, 1000), np.array([0.58, 0.6]), 900)
    setting = Setting("a=1", "a=1", [mock.sentinel.run] * runs, {"entropy": value}, {"entropy": each}, {})
    found = setting.interval("entropy")
    assert float(found.value) == pytest.approx(np.mean(each)) and found.n == (900 if runs == 2 else runs)
    assert (float(found.low) == 0.58) == (runs == 2) and (found.high - found.low > 0.1) == (runs > 2)


def test_pairing_uses_the_same_pictures_in_each_replicate(place: Place) -> None:
    own = place.add("0", untrained(1), 0)
    place.add("1", untrained(2), 1)
    surveyed = survey_runs(place.study("runs/*", own))
    first, second = (each.survey.means.counts for each in surveyed)
    np.testing.assert_array_equal(first, second)
    replicates = mean_over_layers(surveyed[0].survey, "entropy").replicates
    assert replicates.std() > 0 and np.isfinite(replicates).all()


def test_controls_are_the_architecture_and_not_the_weights(trained: VisionTransformer) -> None:
    control = random_weights(trained, 1000)
    assert isinstance(control, VisionTransformer) and control.config == trained.config


# --- the command ---


def test_the_command_compares_and_refuses(place: Place, trained: VisionTransformer) -> None:
    place.add("2025-01-01_00-00-00-000001", trained, 0)
    place.add("2025-01-01_00-00-00-000002", heads_moved(trained, ORDERS[0], 0.01, 1), 1)

    def analyze(*arguments: str) -> Any:
        return run_script("analyze.py", *arguments, folder=place.path, environment=ENVIRONMENT)

    done = analyze("runs=runs/2025-01-01_00-00-00-00000?", "chapters=[runs]", "num_samples=1", "output_dir=out")
    assert done.exit_code == 0, done.err
    report = (place.path / "out/attention_analysis_report.md").read_text()
    assert "2 seeds of one model" in report and "attention_across_seeds.png" in report
    assert "runs=runs/2025" in report  # the command that makes it again
    for arguments, told in (
        (("runs=nowhere/*",), "matches no run"),
        (("runs=runs/*", "ckpt=random"), "leave out ckpt=random or runs="),
        (("runs=3",), "runs=3: give a text"),
    ):
        refused = analyze(*arguments, "output_dir=other")
        assert refused.exit_code == 2 and told in refused.err and len(refused.err.strip().splitlines()) == 1
        assert not (place.path / "other").exists()
