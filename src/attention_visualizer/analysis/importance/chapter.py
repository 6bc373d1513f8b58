"""What the answer needs: each head and each layer switched off or averaged, and how the answers then change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from attention_visualizer.analysis.needs import ChapterWriter, Need
from attention_visualizer.analysis.roles.measure import head_labels
from attention_visualizer.analysis.study.budget import LEAST_IMAGES
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.analysis.study.survey import Survey
from attention_visualizer.attention.capture import Edit, intervene
from attention_visualizer.attention.edits import replace_by_mean, switch_off
from attention_visualizer.attention.outputs import has_head, logits_of
from attention_visualizer.figures import charts
from attention_visualizer.measures import intervals
from attention_visualizer.measures.intervals import Interval, learnt_threshold
from attention_visualizer.report.chapter import Chapter, FigureFile, Finding, Table
from attention_visualizer.support.parallel import on_all_cores

Array = NDArray[Any]

# Stated beforehand: a head matters if, without it, the class's score falls by at least this part of what it is.
LEAST_PART = 0.05
WAYS = ("zero", "mean")
SHORT = {"zero": "switched off", "mean": "averaged"}
NAMES = {"zero": "switched off", "mean": "averaged over pictures"}


@dataclass(frozen=True)
class Importance:
    """Of each head, [layer, head + 1] in each way; the last column is the whole layer, NaN for heads not there.

    score: the class's logit relative to the mean of all logits (a common shift changes no answer), as it is: over
    images. of_score: its change; of_accuracy: that of the share of right answers, both paired by image.
    classes: "true", or "predicted" where true ones are not known.
    """

    score: Interval
    accuracy: Interval
    of_score: dict[str, Interval]
    of_accuracy: dict[str, Interval]
    classes: str
    chance: float  # the share of right answers that guessing has

    @property
    def answers(self) -> bool:
        """Whether there is something that heads could be needed for: answers well above guessing. Where true
        classes are not known, that is not known either: any model agrees with itself."""
        return bool(self.classes == "true" and self.accuracy.low > learnt_threshold(self.chance) and self.score.low > 0)

    @property
    def least(self) -> float:
        """The change of the score, downwards, that a head which matters makes at least."""
        return LEAST_PART * abs(float(self.score.value))

    def matters(self, way: str) -> Array:
        """bool [layer, head + 1]: the whole interval lies beyond the least change."""
        with np.errstate(invalid="ignore"):
            return np.asarray((self.of_score[way].high <= -self.least) & self.answers)


def measure_importance(study: Study, numbers: Array) -> Importance:
    """Over the pictures of these numbers. Raises ValueError for a model that gives no class scores."""
    survey = study.survey
    whole = survey.predicted if survey.right is None else survey.labels
    classes = whole[numbers]
    baseline = all_logits(study, numbers)
    if baseline is None:
        raise ValueError("the model gives no class scores")
    num_layers, num_heads = survey.maps.shape[1:3]
    rows = np.arange(len(numbers))
    own = centred(baseline)[rows, classes]
    right = baseline.argmax(axis=1) == classes
    score_changes = {way: np.full((len(numbers), num_layers, num_heads + 1), np.nan) for way in WAYS}
    accuracy_changes = {way: nowhere(num_layers, num_heads + 1, len(numbers)) for way in WAYS}

    def answers(ablation: tuple[str, int, int | None]) -> Array:
        way, layer, head = ablation
        name = survey.layer_names[layer]
        study.progress(f"without head {layer + 1}.{head + 1}" if head is not None else f"without layer {layer + 1}")
        edit = switch_off(name, head) if way == "zero" else replace_by_mean(name, head, survey.mean_weights[name])
        logits = all_logits(study, numbers, edit)
        assert logits is not None
        return logits

    tasks = [(way, layer, head) for way in WAYS for layer, head in ablations(survey)]
    for (way, layer, head), logits in zip(tasks, on_all_cores(answers, tasks, study.target.device), strict=True):
        column = num_heads if head is None else head
        score_changes[way][:, layer, column] = centred(logits)[rows, classes] - own
        change = intervals.share_change(right, logits.argmax(axis=1) == classes)
        for end in ("value", "low", "high"):
            getattr(accuracy_changes[way], end)[layer, column] = getattr(change, end)
    return Importance(
        intervals.bootstrap_mean(own),
        intervals.share_interval(right.sum(), len(right)),
        {way: intervals.bootstrap_mean(each) for way, each in score_changes.items()},
        accuracy_changes,
        "predicted" if survey.right is None else "true",
        1 / baseline.shape[1],
    )


def nowhere(num_layers: int, columns: int, n: int) -> Interval:
    """Not known yet, [layer, column]."""
    value, low, high = np.full((3, num_layers, columns), np.nan)
    return Interval(value, low, high, n)


def ablations(survey: Survey) -> Iterator[tuple[int, int | None]]:
    """Each head that is there, and each layer as a whole (None)."""
    for (layer, head), _ in head_labels(survey):
        yield layer, head
    for layer in range(len(survey.layer_names)):
        yield layer, None


def all_logits(study: Study, numbers: Array, edit: Edit | None = None) -> Array | None:
    """[image, class] of pictures by their numbers, float64; None where the model gives none."""
    found = []
    with torch.no_grad(), ExitStack() as stack:
        if edit is not None:
            stack.enter_context(intervene(study.target.model, edit))
        for images, _ in study.target.batches(numbers):
            logits = logits_of(study.target.model(images)) if has_head(study.target.model) else None
            if logits is None:
                return None
            found.append(logits.double().cpu().numpy())
    return np.concatenate(found)


def centred(logits: Array) -> Array:
    """Relative to their mean over classes."""
    return np.asarray(logits - logits.mean(axis=1, keepdims=True))


@dataclass(frozen=True)
class Correlation:
    """Between a quantity of heads [head] and the loss without them, in each way: Spearman's, p by permutation, adjusted
    for all quantities and ways."""

    values: Array
    value: dict[str, Interval]
    p_value: dict[str, float]


def correlate(quantities: dict[str, Array], losses: dict[str, Array]) -> dict[str, Correlation]:
    """Of each quantity [head] with each loss [head]; NaN where there are too few heads, or all are equal."""
    found = {
        (label, way): intervals.rank_correlation(values, loss)
        for label, values in quantities.items()
        for way, loss in losses.items()
    }
    adjusted = intervals.false_discovery_control(np.array([p_value for _, p_value in found.values()]))
    p_values = dict(zip(found, adjusted.tolist(), strict=True))
    return {
        label: Correlation(
            values, {way: found[label, way][0] for way in losses}, {way: p_values[label, way] for way in losses}
        )
        for label, values in quantities.items()
    }


def write(study: Study) -> Chapter:
    title = CHAPTER.title
    survey = study.survey
    if len(study.target.images) < LEAST_IMAGES:
        return Chapter(title, f"Left out: it takes at least {LEAST_IMAGES} images to say what an answer needs.")
    passes = len(WAYS) * len(list(ablations(survey))) + 1
    numbers = study.affordable_rows(passes)
    if numbers is None:
        return Chapter(title, TOO_MUCH.format(passes=passes))
    found = measure_importance(study, numbers)
    heads = head_labels(survey)
    picked = tuple(np.array([index for index, _ in heads]).T)
    losses = {way: -found.of_score[way].value[picked] for way in WAYS}
    quantities = {"attention entropy (nats)": "entropy", "head confidence (share)": "confidence"}
    correlations = correlate(
        {label: survey.mean_of(measure).value[picked] for label, measure in quantities.items()}, losses
    )
    figure = study.output.save(importance_figure(found, correlations, heads, study), "attention_importance")
    who = f"{len(numbers):,} {study.target.images.kind}s"
    return Chapter(
        title,
        text_of(found, correlations, heads, who),
        [
            FigureFile(
                figure,
                f"Change of the {found.classes} class's score without each head (last column: without the whole "
                f"layer), in percent of the score, over {who}. Below: the loss beside the head's entropy and "
                "confidence, one point a head with its 95 % interval.",
            )
        ],
        [importance_table(found, heads)],
        numbers_of(found, correlations, heads),
        finding=Finding(headline(found, heads), figure),
        caution="A head whose loss is small may still do something: others can do the same work (one head is taken "
        "away at a time, with all others in place).",
    )


def headline(found: Importance, heads: list[tuple[tuple[int, int], str]]) -> str:
    """The finding, in two sentences."""
    picked = tuple(np.array([index for index, _ in heads]).T)
    worst = int(np.argmin(found.of_score["zero"].value[picked]))
    index, name = heads[worst]
    count = int(found.matters("zero")[picked].sum())
    if not found.answers and found.classes == "predicted":
        return (
            "Which heads the answer needs cannot be said where true classes are not known; how the model's own answer "
            f"changes without each of {len(heads)} heads is shown (n = {found.score.n:,})."
        )
    if not found.answers:
        return f"The model answers no better than by chance, so no head can be needed (n = {found.score.n:,})."
    who = f"{count or 'None'} of {len(heads)} heads {'is' if count < 2 else 'are'}"
    score, accuracy = found.of_score["zero"][index].times(-1), found.of_accuracy["zero"][index].times(-100)
    return (
        f"{who} needed alone, that is, worth more than {LEAST_PART:.0%} of the class's score when switched off. "
        f"The most needed, head {name}, costs {score.text(2)} of {found.score.text(2)} logits and "
        f"{accuracy.text(2)} points of {'accuracy' if found.classes == 'true' else 'agreement with itself'} "
        f"(n = {found.score.n:,})."
    )


def text_of(
    found: Importance, correlations: dict[str, Correlation], heads: list[tuple[tuple[int, int], str]], who: str
) -> str:
    picked = tuple(np.array([index for index, _ in heads]).T)
    told = [
        f"{label.split(' (')[0]} "
        + ", ".join(f"{each.value[way].text(2)} when {SHORT[way]} (p = {each.p_value[way]:.3f})" for way in WAYS)
        for label, each in correlations.items()
        if not all(np.isnan(each.value[way].value) for way in WAYS)
    ]
    fixed = [
        name
        for index, name in heads
        if found.of_score["zero"].high[index] < 0
        and found.of_score["mean"].value[index] > 0.1 * found.of_score["zero"].value[index]
    ]
    return TEXT.format(
        who=who,
        classes=found.classes,
        score=found.score.text(2),
        accuracy=found.accuracy.text(2, percent=True),
        least=found.least,
        part=LEAST_PART,
        zero=int(found.matters("zero")[picked].sum()),
        mean=int(found.matters("mean")[picked].sum()),
        count=len(heads),
        correlations=CORRELATIONS.format(count=len(heads), told="; ".join(told)) if told else "",
        chance="" if found.answers else UNKNOWN if found.classes == "predicted" else CHANCE,
        fixed=FIXED.format(names=", ".join(fixed), count=len(fixed)) if fixed else "",
    )


def numbers_of(
    found: Importance, correlations: dict[str, Correlation], heads: list[tuple[tuple[int, int], str]]
) -> dict[str, Any]:
    picked = tuple(np.array([index for index, _ in heads]).T)
    return {
        "images": found.score.n,
        "classes": found.classes,
        "score": found.score.numbers(),
        "accuracy": found.accuracy.numbers(),
        "least_change": found.least,
        "heads": [name for _, name in heads],
        **{
            f"{way}_ablation": {
                "score": found.of_score[way][picked].numbers(),
                "accuracy": found.of_accuracy[way][picked].numbers(),
                "score_of_layers": found.of_score[way][:, -1].numbers(),
                "accuracy_of_layers": found.of_accuracy[way][:, -1].numbers(),
                "matters": found.matters(way)[picked].tolist(),
            }
            for way in WAYS
        },
        "rank_correlation": {
            label: {
                way: {
                    **{end: number(float(getattr(each.value[way], end))) for end in ("value", "low", "high")},
                    "n": each.value[way].n,
                    "p_value_adjusted": number(each.p_value[way]),
                }
                for way in WAYS
            }
            for label, each in correlations.items()
        },
    }


def number(value: float) -> float | None:
    return None if np.isnan(value) else value


def importance_figure(
    found: Importance, correlations: dict[str, Correlation], heads: list[tuple[tuple[int, int], str]], study: Study
) -> Figure:
    """Above, the change by layer and head in each way; below, single heads' loss beside entropy and confidence."""
    num_layers, columns = found.of_score["zero"].value.shape
    heights = max(3.2, 0.42 * num_layers + 1.4), 4.2
    drawn = Figure(figsize=(max(11.0, 1.4 * columns + 4), sum(heights)), layout="constrained")
    parts: Any = drawn.subfigures(2, 1, height_ratios=heights)
    upper, lower = parts
    percent = {way: 100 * found.of_score[way].value / abs(float(found.score.value)) for way in WAYS}
    reach = max(float(np.nanmax(np.abs(each))) for each in percent.values())
    names = [str(head + 1) for head in range(columns - 1)] + ["all"]
    for axis, way in zip(upper.subplots(1, 2), WAYS, strict=True):
        charts.changes(percent[way], "change of the class's score (%)", axis, reach, names, way == WAYS[-1])
        axis.set_title(f"each head {NAMES[way]}", fontsize=11)
    picked = tuple(np.array([index for index, _ in heads]).T)
    colors = {"zero": charts.MEDIAN, "mean": charts.PLACE}
    for number, (axis, (label, each)) in enumerate(
        zip(lower.subplots(1, 2, sharey=True), correlations.items(), strict=True)
    ):
        for way in WAYS:
            interval = found.of_score[way][picked]
            loss, low, high = -interval.value, -interval.high, -interval.low
            axis.vlines(each.values, low, high, color=colors[way], linewidth=1)
            told = f"{NAMES[way]}: rank correlation {each.value[way].text(2)}, p = {each.p_value[way]:.3f}"
            axis.scatter(each.values, loss, color=colors[way], s=28, zorder=3, label=told)
            if way == "zero":
                for position in np.argsort(loss)[-3:]:
                    place = (each.values[position], loss[position])
                    inward = -1 if each.values[position] > np.mean([each.values.min(), each.values.max()]) else 1
                    axis.annotate(
                        heads[position][1],
                        place,
                        (5 * inward, 3),
                        textcoords="offset points",
                        ha="left" if inward > 0 else "right",
                        fontsize=9,
                    )
        if found.least < axis.get_ylim()[1]:
            axis.axhline(found.least, color=charts.REFERENCE, linestyle="--", linewidth=1)
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=9)
        axis.set_xlabel(label)
        axis.set_ylabel("" if number else "loss of the class's score (logits)")
        charts.clean(axis)
    return charts.with_headline(drawn, f"What the answer needs, {found.score.n:,} {study.target.images.kind}s")


def importance_table(found: Importance, heads: list[tuple[tuple[int, int], str]]) -> Table:
    right = "accuracy" if found.classes == "true" else "same answer"
    columns = [
        "without",
        "score, switched off (logits)",
        "score, averaged (logits)",
        f"{right}, switched off (points)",
        f"{right}, averaged (points)",
        "matters",
    ]
    num_layers, last = found.of_score["zero"].value.shape
    places = [(index, name) for index, name in heads] + [
        ((layer, last - 1), f"layer {layer + 1}") for layer in range(num_layers)
    ]
    rows = [
        [
            name,
            *(found.of_score[way][index].text(2) for way in WAYS),
            *(found.of_accuracy[way][index].times(100).text(1) for way in WAYS),
            " and ".join(way for way in WAYS if found.matters(way)[index]) or "–",
        ]
        for index, name in places
    ]
    return Table(
        f"Change without a head or a layer, with 95 % intervals over {found.score.n:,} images; points: of a hundred "
        "answers (interval: Newcombe, 1998). Zero: switched off, mean: averaged over pictures.",
        columns,
        rows,
    )


NO_SCORES = "The model gives no class scores, so there is nothing that could change without a head."
CHAPTER = ChapterWriter("What the answer needs", write, ("attention_importance",), {Need.CLASSIFIER: NO_SCORES})

TEXT = """Over {who}, each head is taken away in two ways, all others in place: **switched off** (its weights are 0),
and **averaged** (it attends on every picture as it does on average, so that only what depends on the picture is lost).
What changes is the score of the {classes} class (its logit relative to the mean logit), {score} with all heads, and
the share of answers that are the {classes} class, {accuracy}. A head is said to matter if the whole interval of its
loss lies beyond {part:.0%} of the score, {least:.2f}: {zero} of {count} heads when switched off, {mean} when
averaged.{chance}{fixed}{correlations}"""

TOO_MUCH = """Left out: it takes {passes:,} passes over each image, which is long for a model of this size. `subset=50`
does it for 50 images."""

CHANCE = """ These answers are no better than chance, so that no head can be needed for them."""

UNKNOWN = """ The true classes are not known, and a model always agrees with itself: that none is said to matter is no
finding."""

FIXED = """ Of {count} heads at least nine tenths of the loss is gone when they are averaged instead: what they add is
much the same on every picture ({names})."""

CORRELATIONS = """

Rank correlations of the loss over the {count} heads, with 95 % intervals over heads and p by permutation (false
discovery control over all of them): {told}."""
