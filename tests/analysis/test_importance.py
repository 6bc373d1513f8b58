"""Causal importance: a planted head is needed, a spare one is not, a guess needs none; all layers at once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.text import Annotation
from numpy.typing import NDArray
from torch import Tensor

from attention_visualizer.analysis.importance import chapter as importance_chapter
from attention_visualizer.analysis.importance import trials
from attention_visualizer.analysis.importance.figure import draw_heads, draw_whole_model
from attention_visualizer.analysis.importance.measure import (
    Importance,
    joint_ablation,
    joint_counts,
    measure,
    most_needed_first,
    num_passes,
)
from attention_visualizer.analysis.importance.outcomes import MIN_RISE, TABLE_LEVEL, Answers, Outcomes
from attention_visualizer.analysis.importance.trials import Passes, class_queries, partners
from attention_visualizer.analysis.study import budget
from attention_visualizer.analysis.study.budget import QUICK, Budget
from attention_visualizer.analysis.study.heads import Heads
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.attention.capture import Edit, capture
from attention_visualizer.attention.edits import attend_as_partner, in_all_layers, switch_off, together
from attention_visualizer.attention.geometry import Geometry
from attention_visualizer.attention.layers import AttentionLayer
from attention_visualizer.data.image_sets import LabelledImageSet
from attention_visualizer.data.images import DatasetDescription
from attention_visualizer.files.atomic import json_ready
from attention_visualizer.measures import intervals
from attention_visualizer.measures.intervals import Interval
from attention_visualizer.measures.paired_errors import mcnemar
from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.report.chapter import Chapter
from tests.helpers.studies import first_digits, study_of

HEADS, LAYERS, N = 3, 2, 90
SIZES: dict[str, Any] = {
    "img_size": 8, "patch_size": 4, "embed_dim": 12, "num_heads": HEADS, "num_layers": LAYERS, "mlp_dim": 5,
    "num_classes": 3,
}  # fmt: skip


class Planted(VisionTransformer):
    """The answer is what heads of the second layer bring to the class token, the same each, and nothing else."""

    def __init__(self, heads: tuple[int, ...] = (2,)) -> None:
        super().__init__(**SIZES)
        assert self.cls_token is not None and self.pos_embed is not None
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(0.01)
            self.blocks[1].norm1.weight.fill_(1.0)
            values, projection = 0.3 * torch.randn(4, 12), torch.zeros(12, 12)
            for head in heads:
                own = slice(4 * head, 4 * head + 4)
                for part in range(3):  # of queries, keys and values
                    weight = self.blocks[1].attn.qkv.weight[12 * part : 12 * part + 12]
                    weight[own] = values if part == 2 else weight[4 * heads[0] : 4 * heads[0] + 4]
                projection[:4, own] = torch.eye(4)
            self.blocks[1].attn.proj.weight.copy_(projection)
            self.blocks[1].attn.qkv.bias.zero_()

    def classify(self, tokens: Tensor) -> Tensor:
        before = tokens
        for block in self.blocks[:-1]:
            before = block(before)
        added = self.blocks[-1].attn(self.blocks[-1].norm1(before))[:, 0]
        return 100 * added[:, :3]


def labelled_by(model: VisionTransformer) -> LabelledImageSet:
    """Images whose classes are what the model answers."""
    images = torch.randint(0, 256, (N, 1, 8, 8), dtype=torch.uint8)
    description = DatasetDescription("digits", 8, 1, ("a", "b", "c"), 0.5, 0.3, {"test": N})
    pictures = LabelledImageSet(description, images, torch.zeros(N, dtype=torch.long))
    with torch.no_grad():
        labels = model(pictures.model_input(images)).argmax(dim=1)
    return LabelledImageSet(description, images, labels)


@pytest.fixture(scope="module")
def planted() -> tuple[VisionTransformer, LabelledImageSet]:
    torch.manual_seed(0)
    model: VisionTransformer = Planted().eval()
    return model, labelled_by(model)


@pytest.fixture(scope="module")
def study(planted: tuple[VisionTransformer, LabelledImageSet], tmp_path_factory: pytest.TempPathFactory) -> Study:
    return study_of(*planted, tmp_path_factory.mktemp("planted"), 60, 1)


@pytest.fixture(scope="module")
def measured(study: Study) -> Importance:
    return measure(study, study.stratified_rows(60))


@pytest.fixture(scope="module")
def chapter(study: Study) -> Chapter:
    return importance_chapter.CHAPTER(study)


def names_needed(measured: Importance, outcomes: Outcomes) -> list[str]:
    return [name for name, is_needed in zip(outcomes.names, measured.needed(outcomes), strict=True) if is_needed]


# --- heads and layers ---


def test_only_the_planted_head_is_needed(study: Study, measured: Importance, chapter: Chapter) -> None:
    assert measured.is_learnt and float(measured.accuracy.value) == 1.0 and measured.class_source == "true"
    assert names_needed(measured, measured.zero) == ["head 2.3", "layer 2"] and measured.needed_heads == ["2.3"]
    planted_place = measured.zero.names.index("head 2.3")
    assert measured.zero.lost[planted_place] > 20 and measured.zero.gained[planted_place] == 0
    assert float(measured.zero.score_change.value[planted_place]) == pytest.approx(
        -float(measured.score.value), rel=0.02
    )
    # What it brings are the values: the average map, the same for every image, is enough.
    assert measured.mean is not None and names_needed(measured, measured.mean) == []
    assert chapter.finding is not None and "1 of 6 heads is needed alone" in chapter.finding.text
    assert "without head 2.3, the costliest (picked afterwards), errors go from 0 to" in chapter.finding.text
    folder = study.output.folder
    assert {file.name for file in chapter.figures} <= {path.name for path in folder.iterdir()}
    assert len(chapter.figures) == len(importance_chapter.CHAPTER.figures) == 2
    again = json_ready(importance_chapter.numbers_of(measured))
    assert json.dumps(chapter.numbers, allow_nan=False) == json.dumps(again)  # of another measurement
    assert chapter.numbers["zero_ablation"]["needed"] == measured.needed(measured.zero).tolist()


def test_a_spare_head_is_not_needed_alone_but_together_with_the_other(tmp_path: Path) -> None:
    """Two heads do the same: with either one the answer is the same, with neither there is none."""
    torch.manual_seed(0)
    model = Planted((0, 2)).eval()
    study = study_of(model, labelled_by(model), tmp_path, 60, 1)
    measured = measure(study, study.stratified_rows(60))
    assert measured.is_learnt and names_needed(measured, measured.zero) == ["layer 2"]
    assert measured.zero.rise[:6].tolist() == [0] * 6
    joint = measured.joint
    assert joint is not None and set(joint.ranking[:2]) == {"2.1", "2.3"}  # by the score, where errors are equal
    assert joint.most.rise[joint.counts.index(2)] > 10 and joint.least.rise[joint.counts.index(4)] == 0


def test_nothing_is_needed_where_no_head_reaches_the_answer(tmp_path: Path) -> None:
    """Class scores that do not depend on attention: no intervention changes any, alone or in all layers."""
    torch.manual_seed(0)
    model = VisionTransformer(**SIZES).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.proj.weight.zero_()
        model.head.weight.mul_(9)
    model.pooling = "mean"  # the class token alone would be the same for every image
    study = study_of(model, labelled_by(model), tmp_path, 60, 1)
    measured = measure(study, study.stratified_rows(60))
    assert measured.accuracy.value == 1 and len(set(study.survey.predicted)) > 1
    for outcomes in (measured.whole_model, measured.zero, measured.mean):
        assert outcomes is not None and not outcomes.lost.any() and not measured.needed(outcomes).any()


def test_switching_off_is_a_projection_without_the_heads_columns(
    planted: tuple[VisionTransformer, LabelledImageSet], tmp_path: Path
) -> None:
    torch.manual_seed(4)
    model = VisionTransformer(**SIZES).eval()
    study = study_of(model, planted[1], tmp_path, 60, 1)
    rows = study.stratified_rows(40)
    measured = measure(study, rows)
    images = study.target.model_input(study.target.images.read(rows.tolist()))
    labels = planted[1].labels
    assert labels is not None
    classes = labels[torch.from_numpy(rows)].numpy()

    def answers() -> Answers:
        with torch.no_grad():
            logits = model(images).double().numpy()
        score = (logits - logits.mean(axis=1, keepdims=True))[np.arange(40), classes]
        return Answers(logits.argmax(axis=1) == classes, score)

    before = answers()
    with torch.no_grad():
        model.blocks[0].attn.proj.weight[:, 4:8] = 0  # head 1
    after = answers()
    place = measured.zero.names.index("head 1.2")
    change = (after.score - before.score).mean()
    assert float(measured.zero.score_change.value[place]) == pytest.approx(change, rel=1e-3, abs=1e-6)
    assert measured.zero.lost[place] == (before.is_right & ~after.is_right).sum()
    assert measured.zero.gained[place] == (~before.is_right & after.is_right).sum()


@pytest.mark.parametrize(
    ("seed", "labelled", "said"),
    [(seed, True, "not above chance") for seed in range(1, 6)] + [(1, False, "cannot be determined")],
)
def test_nothing_is_needed_for_a_guess(seed: int, labelled: bool, said: str, tmp_path: Path) -> None:
    """Also where classes are not known, and the model's agreement with itself would pass for an answer."""
    pictures = first_digits(80)
    if not labelled:
        pictures = LabelledImageSet(pictures.description, pictures.images, None)
    torch.manual_seed(seed)
    model = VisionTransformer(embed_dim=12, num_heads=2, num_layers=2, mlp_dim=9).eval()
    study = study_of(model, pictures, tmp_path, 60, 1)
    measured = measure(study, study.stratified_rows(60))
    assert not measured.is_learnt and measured.needed_heads == []
    assert not any(measured.needed(outcomes).any() for outcomes in (measured.whole_model, measured.zero))
    headline = importance_chapter.headline(measured)
    assert said in headline and "picked" not in headline
    if not labelled:  # the agreement falls all the same
        assert measured.whole_model.lost.max() > 10 and np.isnan(measured.whole_model.p_value).all()
        assert measured.accuracy.value == 1
        chapter = importance_chapter.CHAPTER(study)
        assert "needed alone" not in chapter.text and chapter.numbers["zero_ablation"]["p_value_adjusted"][0] is None


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_needed_for_classes_that_were_shuffled(
    planted: tuple[VisionTransformer, LabelledImageSet], seed: int, tmp_path: Path
) -> None:
    """The planted head decides the answer, which is right by chance alone."""
    model, pictures = planted
    assert pictures.labels is not None
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    shuffled = LabelledImageSet(pictures.description, pictures.images, pictures.labels[order])
    study = study_of(model, shuffled, tmp_path, 60, 1)
    measured = measure(study, study.stratified_rows(60))
    assert not measured.is_learnt and not measured.needed(measured.zero).any()
    assert measured.zero.lost[measured.zero.names.index("head 2.3")] > 0


# --- errors ---


def outcomes_of(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> Outcomes:
    """after: [intervention, image]."""
    score = np.zeros(len(before))
    names = [str(number) for number in range(len(after))]
    return Outcomes.of(names, Answers(before, score), [Answers(each, score) for each in after], True)


def test_predictions_that_change_at_random_are_rarely_needed() -> None:
    """1,000 families of 30 interventions that lose and gain equally often: at most 0.5% may have one that is needed,
    half of what a chapter may."""
    generator = np.random.default_rng(0)
    nothing = Interval(np.zeros(30), np.zeros(30), np.zeros(30), 1000)
    found = 0
    for lost, gained in generator.poisson(12.0, (1000, 2, 30)):
        p_value = intervals.holm(mcnemar(lost, gained))
        found += Outcomes([""] * 30, 50, lost, gained, nothing, nothing, nothing, p_value).is_needed.any()
    assert 0 < found / 1000 <= TABLE_LEVEL == intervals.CHAPTER_LEVEL / 2 == 0.005


def test_what_is_needed_costs_a_declared_share_of_errors_beyond_chance() -> None:
    """Of 4,000 images 1,000 are wrong: 60 more are beyond chance, but fewer than a tenth more; 11 more of none are."""
    before = np.arange(4000) >= 1000
    after = np.stack([np.arange(4000) >= 1000 + more for more in (60, 99, 100, 0)])
    outcomes = outcomes_of(before, after)
    assert MIN_RISE == 0.1 and (outcomes.p_value[:3] < 1e-6).all() and outcomes.p_value[3] == 1
    assert outcomes.is_needed.tolist() == [False, False, True, False]
    assert outcomes.errors.tolist() == [1060, 1099, 1100, 1000] and outcomes.gained.tolist() == [0] * 4
    fewer = outcomes_of(after[2], before[None])  # better without: no need
    assert fewer.p_value[0] < 1e-6 and fewer.rise[0] == -100 and not fewer.is_needed[0]
    perfect = outcomes_of(np.ones(500, dtype=bool), np.stack([np.arange(500) >= count for count in (0, 5, 11)]))
    assert perfect.is_needed.tolist() == [False, False, True]


def test_an_accuracy_that_nothing_changes_still_has_an_interval(measured: Importance, chapter: Chapter) -> None:
    assert measured.mean is not None
    unchanged = measured.mean.accuracy_change[0]
    assert unchanged.value == 0 and unchanged.low < 0 < unchanged.high and unchanged.n == 60
    assert measured.accuracy.value == 1 and 0.9 < measured.accuracy.low < measured.accuracy.high == pytest.approx(1)
    whole_model, zero, mean, joint = chapter.tables
    assert all("%" not in cell for row in zero.rows for cell in row) and "accuracy (points)" in zero.columns
    assert len(whole_model.rows) == 7 and len(zero.rows) == 8 and len(mean.rows) == 2 and len(joint.rows) == 6


def test_the_text_says_what_could_not_have_been_seen(measured: Importance, chapter: Chapter) -> None:
    rise = measured.zero.detectable_rise
    assert (
        f"a rise of {rise:,} errors (from 0 to {rise:,}) in 4 of 5 cases" in " ".join(chapter.text.split())
        and 8 <= rise <= 30
    )
    assert chapter.numbers["detectable_rise"] == rise


# --- all layers at once ---


def test_all_layers_are_edited_at_once(planted: tuple[VisionTransformer, LabelledImageSet], tmp_path: Path) -> None:
    """Scores with each intervention are those of the model written out with such weights."""
    torch.manual_seed(2)
    model = VisionTransformer(**SIZES).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    study = study_of(model, planted[1], tmp_path, 60, 1)
    study.target.limit.images = 17  # batches do not matter
    rows = study.stratified_rows(60)
    passes = Passes(study, rows, study.survey.labels[rows])
    images = study.target.model_input(study.target.images.read(rows.tolist()))
    with torch.no_grad(), capture(model) as attention:
        model(images)
    own = [layer.weights for layer in attention]
    mean = [weights.mean(dim=0).expand_as(weights) for weights in own]
    only_class = [weights.clone() for weights in mean]
    other = [weights[torch.from_numpy(partners(60))] for weights in own]
    assert len(only_class) == LAYERS

    def written_out(change: Any) -> NDArray[np.float64]:
        """change: of a layer's number and its weights, given what came before."""
        with torch.no_grad():
            tokens = model.embed(images)
            for number, block in enumerate(model.blocks):
                normed = block.norm1(tokens)
                q, k, v = (
                    part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in block.attn.qkv(normed).chunk(3, -1)
                )
                weights = change(number, (q @ k.mT / 2).softmax(-1))
                tokens = tokens + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
                tokens = tokens + block.mlp(block.norm2(tokens))
            logits = model.head(model.norm(tokens)[:, 0]).double().numpy()
        return (logits - logits.mean(axis=1, keepdims=True))[np.arange(60), passes.classes]

    def class_row(number: int, weights: Tensor) -> Tensor:
        return torch.cat([mean[number][:, :, :1], weights[:, :, 1:]], dim=2)

    expected = {
        "average map": written_out(lambda number, weights: mean[number]),
        "average map, class token's row only": written_out(class_row),
        "another image's attention": written_out(lambda number, weights: other[number]),
        "all on the largest weight": written_out(
            lambda number, weights: torch.nn.functional.one_hot(weights.argmax(-1), weights.shape[-1]).float()
        ),
        "uniform attention": written_out(lambda number, weights: torch.full_like(weights, 1 / weights.shape[-1])),
        "no attention": written_out(lambda number, weights: torch.zeros_like(weights)),
    }
    whole_model = trials.whole_model_trials(passes.average_maps())
    assert [trial.name for trial in whole_model] == list(expected)
    found = {trial.name: each.score for trial, each in zip(whole_model, passes.try_all(whole_model), strict=True)}
    for name, scores in expected.items():
        np.testing.assert_allclose(found[name], scores, atol=1e-4, err_msg=name)
    for one, name in enumerate(found):  # they are different interventions
        for other_name in list(found)[one + 1 :]:
            assert np.abs(found[name] - found[other_name]).max() > 1e-3


def test_each_image_has_one_partner_that_is_another() -> None:
    for count in (2, 3, 60):
        partner = partners(count)
        assert sorted(partner) == list(range(count)) and (partner != np.arange(count)).all()
        assert partner.tolist() == partners(count).tolist()


@pytest.mark.parametrize(
    ("geometry", "num_queries", "expected"),
    [
        (Geometry((2, 2), 1, (4, 4)), 5, 0),
        (Geometry((2, 2), 2, (4, 4)), 6, 0),
        (Geometry((2, 2), 1, (4, 4), order=(0, 1, 2, 3)), 5, 4),  # the class token comes last
        (Geometry((2, 2), 1, (4, 4)), 1, slice(None)),  # a layer that only pools into it
        (Geometry((2, 2), 1, (4, 4), class_token="unread"), 5, None),
        (Geometry((2, 2), 1, (4, 4), class_token="absent"), 5, None),
        (Geometry((2, 2), 0, (4, 4)), 4, None),
        (None, 5, None),
    ],
)
def test_the_class_tokens_row_is_where_it_is_read(
    geometry: Geometry | None, num_queries: int, expected: int | slice | None
) -> None:
    num_keys = 5 if geometry is None else geometry.num_tokens
    layer = AttentionLayer(
        "layer", 0, torch.zeros(1, 2, num_queries, num_keys), torch.zeros(1, 2, num_keys, 3), geometry, 0.0
    )
    assert class_queries(layer) == expected


def test_average_maps_that_are_too_large_are_left_out(
    study: Study, measured: Importance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "MAX_MEAN_BYTES", 8 * HEADS * 5 * 5)  # of one layer
    fewer = measure(study, study.stratified_rows(60))
    assert fewer.mean is not None and fewer.mean.names == ["layer 1"]
    assert fewer.whole_model.names == [name for name in measured.whole_model.names if "average" not in name]
    assert "attention made uniform" in importance_chapter.headline(fewer)
    monkeypatch.setattr(trials, "MAX_MEAN_BYTES", 0)
    none = measure(study, study.stratified_rows(60))
    assert none.mean is None and "averaged" not in importance_chapter.text_of(none).split("Heads and layers")[1][300:]


# --- heads together ---


def test_heads_are_ranked_on_one_half_and_judged_on_the_other(study: Study, measured: Importance) -> None:
    rows = study.stratified_rows(60)
    passes, heads = Passes(study, rows, study.survey.labels[rows]), Heads.of(study.survey)
    before = passes.answers()
    second = np.zeros(60, dtype=bool)
    for label in range(3):
        second[np.flatnonzero(passes.classes == label)[1::2]] = True
    generator = np.random.default_rng(0)
    without = [Answers(generator.random(60) < 0.7, generator.random(60)) for _ in heads]
    joint = joint_ablation(passes, heads, without, before, True)
    other = [
        Answers(np.where(second, ~each.is_right, each.is_right), np.where(second, -each.score, each.score))
        for each in without
    ]
    again = joint_ablation(passes, heads, other, before, True)
    assert joint.ranking == again.ranking and joint.most.accuracy.n == second.sum()
    wrong = [int((~each.is_right[~second]).sum()) for each in without]
    ranked = [wrong[heads.labels.index(label)] for label in joint.ranking]
    assert ranked == sorted(wrong, reverse=True) and len(set(wrong)) > 2
    assert measured.joint is not None and measured.joint.ranking[0] == "2.3" and measured.joint.most.rise[0] > 10


def test_equal_errors_are_ranked_by_the_score() -> None:
    before = Answers(np.ones(4, dtype=bool), np.zeros(4))
    scores = [-1.0, -3.0, 0.5, -2.0]
    rights = [True, True, True, False]
    without = [Answers(np.full(4, right), np.full(4, score)) for right, score in zip(rights, scores, strict=True)]
    assert most_needed_first(before, without).tolist() == [3, 1, 0, 2]


def test_counts_of_heads_double() -> None:
    assert [joint_counts(heads) for heads in (1, 2, 3, 8, 24)] == [[], [1], [1, 2], [1, 2, 4], [1, 2, 4, 8, 16]]


def test_a_single_head_has_no_joint_ablation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(**SIZES | {"num_heads": 1, "num_layers": 1}).eval()
    chapter = importance_chapter.CHAPTER(study_of(model, labelled_by(model), tmp_path, 60, 1))
    assert len(chapter.tables) == 3 and chapter.numbers["joint_ablation"] is None
    assert "Heads together" not in chapter.text and "rank correlation" not in chapter.text


# --- how many images ---


def test_all_images_are_taken_where_two_minutes_suffice() -> None:
    cost = 1e6
    assert QUICK.affordable_images(cost, 10_000) == 500
    assert QUICK.affordable_images(cost, 10_000, of_all=True) == 10_000
    assert QUICK.affordable_images(budget.TWO_MINUTES / 1234.5, 10_000, of_all=True) == 1234
    assert QUICK.affordable_images(budget.TWO_MINUTES / 20, 10_000, of_all=True) is None
    asked_for = Budget(50, 3)  # subset=50
    assert asked_for.affordable_images(cost, 10_000, of_all=True) == 50
    assert Budget(None, 3).affordable_images(1e12, 10_000, of_all=True) == 10_000  # subset=all


def test_passes_are_counted(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    answers, try_all, average_maps = Passes.answers, Passes.try_all, Passes.average_maps

    def count_answers(self: Passes) -> Answers:
        counted.append(len(self.rows))
        return answers(self)

    def count_trials(self: Passes, tried: Sequence[trials.Trial]) -> list[Answers]:
        counted.append(len(self.rows) * sum(2 if trial.with_partners else 1 for trial in tried))
        return try_all(self, tried)

    def count_maps(self: Passes) -> trials.AverageMaps:
        counted.append(len(self.rows))
        return average_maps(self)

    monkeypatch.setattr(Passes, "answers", count_answers)
    monkeypatch.setattr(Passes, "try_all", count_trials)
    monkeypatch.setattr(Passes, "average_maps", count_maps)
    measure(study, study.stratified_rows(60))
    assert sum(counted) / 60 == pytest.approx(num_passes(study), abs=0.2)


class KeepsBesideModules(VisionTransformer):
    """What its answer adds is kept by a module inside the first block."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.blocks[0].mlp.register_forward_hook(self.keep)
        self.kept: Tensor | float = 0.0

    def keep(self, module: Any, inputs: Any, output: Tensor) -> None:
        self.kept = output[:, 0, :3]

    def classify(self, tokens: Tensor) -> Tensor:
        self.kept = 0.0
        return super().classify(tokens) + self.kept


@pytest.mark.parametrize(("kind", "is_reused"), [(VisionTransformer, True), (KeepsBesideModules, False)])
def test_what_runs_before_an_edit_runs_once_for_all_where_that_changes_nothing(
    kind: type[VisionTransformer], is_reused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    study = study_of(kind(**SIZES | {"num_layers": 4}), labelled_by(VisionTransformer(**SIZES).eval()), tmp_path, 40, 1)
    passes = Passes(study, np.arange(40), np.zeros(40, int))
    edits: list[Edit] = [switch_off(f"blocks.{layer}", head) for layer in range(4) for head in (0, None)]
    edits += [together([edits[7], edits[2]]), in_all_layers(switch_off), attend_as_partner("blocks.3")]
    tried = [trials.Trial(str(edit), edit, with_partners=edit is edits[-1]) for edit in edits]
    expected = passes.try_all(tried)  # one batch: each pass is computed whole

    runs: list[None] = []
    study.target.model.blocks[0].norm1.register_forward_hook(lambda *_: runs.append(None))  # type: ignore[index, union-attr]
    monkeypatch.setattr(trials, "MIN_BATCHES", 2)
    study.target.limit.images = 10
    found = passes.try_all(tried)
    for one, other in zip(expected, found, strict=True):
        assert np.array_equal(one.is_right, other.is_right)
        np.testing.assert_allclose(one.score, other.score, atol=1e-6)
    assert not any("forward" in vars(module) for module in study.target.model.modules())
    assert (len(runs) < 4 * len(tried)) == is_reused


def test_too_much_work_and_too_few_images_are_left_out(
    planted: tuple[VisionTransformer, LabelledImageSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pictures = planted
    monkeypatch.setattr(budget, "TWO_MINUTES", 1e5)
    much = importance_chapter.CHAPTER(study_of(model, pictures, tmp_path, 60, 1, max_cost=1e5))
    assert "Omitted" in much.text and "subset=50" in much.text and not much.figures
    few = LabelledImageSet(pictures.description, pictures.images[:20], pictures.labels[:20])  # type: ignore[index]
    assert "at least 30 images" in importance_chapter.CHAPTER(study_of(model, few, tmp_path, 60, 1)).text


# --- figures ---


def test_labels_of_points_stay_inside_their_axes(measured: Importance) -> None:
    figure = draw_heads(measured)
    figure.draw_without_rendering()
    annotated = [(axes, text) for axes in figure.axes for text in axes.texts if isinstance(text, Annotation)]
    assert [text.get_text() for _, text in annotated] == ["2.3"]  # no other costs an error
    for axes, text in annotated:
        box, room = text.get_window_extent(), axes.get_window_extent()
        assert room.x0 <= box.x0 and box.x1 <= room.x1, text.get_text()
    bold = [text.get_text() for axes in figure.axes for text in axes.texts if text.get_fontweight() == "bold"]
    assert len(bold) == 2 and all(int(text) == measured.zero.rise.max() for text in bold)


def test_texts_of_the_first_figure_stay_on_it(measured: Importance) -> None:
    figure = draw_whole_model(measured)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert len(axes.texts) == len(axes.get_yticklabels()) == 7
    for text in [*axes.texts, *axes.get_yticklabels()]:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1, text.get_text()
