"""What predictions need of attention: interventions in all layers at once, heads and layers ablated, heads together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from attention_visualizer.analysis.importance.outcomes import Answers, Outcomes
from attention_visualizer.analysis.importance.trials import AverageMaps, Passes, Trial, whole_model_trials
from attention_visualizer.analysis.study.heads import Heads
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.attention.edits import replace_by_mean, switch_off, together
from attention_visualizer.measures import intervals
from attention_visualizer.measures.intervals import Interval, alternate_halves

Array = NDArray[Any]


@dataclass(frozen=True)
class JointAblation:
    """Heads ablated together: ranked on one half of the images, judged on the other."""

    ranking: list[str]  # labels of all heads, the most needed first
    counts: list[int]  # of heads ablated together
    most: Outcomes  # without so many of the most needed heads
    least: Outcomes  # without so many of the least needed heads


@dataclass(frozen=True)
class Importance:
    """What changes with each intervention, over the same images."""

    heads: Heads
    images: str  # how many of which kind
    class_source: Literal["true", "predicted"]  # which class's score; the predicted where true ones are not known
    #: The class's logit relative to the mean of all logits (a common shift changes no prediction), as the model is.
    score: Interval
    accuracy: Interval  # as the model is
    is_learnt: bool  # whether predictions are well above guessing, so that heads could be needed for them
    whole_model: Outcomes  # interventions in all layers at once
    zero: Outcomes  # without each existing head and then without each layer: zero ablation
    mean: Outcomes | None  # with the average map in each layer: mean ablation; None where no layer's map is known
    joint: JointAblation | None  # None for a single head
    entropy: Array  # [existing head], mean of the readout query's, nats
    entropy_correlation: Interval  # Spearman's, of that with the rise in errors without the head
    entropy_p_value: float  # by permutation

    def needed(self, outcomes: Outcomes) -> Array:
        """Return which of the interventions take away what is needed: bool [intervention]."""
        return outcomes.is_needed & self.is_learnt

    @property
    def needed_heads(self) -> list[str]:
        """The labels of the heads that are needed alone."""
        needed = self.needed(self.zero)[: len(self.heads)]
        return [label for label, is_needed in zip(self.heads.labels, needed, strict=True) if is_needed]

    @property
    def rise_of_heads(self) -> Array:
        """How many more errors there are without each head: [existing head]."""
        return self.zero.rise[: len(self.heads)]


def num_passes(study: Study) -> int:
    """Return about how often `measure` runs the model over each image."""
    num_heads, num_layers = len(Heads.of(study.survey)), len(study.survey.layer_names)
    # As it is, its average maps, and those in all layers at once, every one of which is possible.
    whole_model = 2 + 7
    joint = len(joint_counts(num_heads))  # two rankings, over half of the images
    return whole_model + num_heads + 2 * num_layers + joint


def measure(study: Study, rows: Array) -> Importance:
    """Try all interventions over the images of these rows. Raise ValueError for a model without scores."""
    survey, heads = study.survey, Heads.of(study.survey)
    has_classes = survey.correct is not None
    passes = Passes(study, rows, (survey.labels if has_classes else survey.predicted)[rows])
    before, maps = passes.answers(), passes.average_maps()
    groups = {
        "whole model": whole_model_trials(maps),
        "zero": [*map(partial(without_head, study), heads), *without_layers(study)],
        "mean": averaged_layers(study, maps),
    }
    answers = iter(passes.try_all([trial for trials in groups.values() for trial in trials]))
    after = {group: [next(answers) for _ in trials] for group, trials in groups.items()}
    outcomes = {
        group: Outcomes.of([trial.name for trial in trials], before, after[group], has_classes)
        for group, trials in groups.items()
        if trials
    }
    entropy = survey.mean_of("entropy").value[heads.index]
    rise = outcomes["zero"].rise[: len(heads)]
    correlation, p_value = intervals.rank_correlation(entropy, rise)
    return Importance(
        heads=heads,
        images=f"{len(rows):,} {study.target.images.kind}s",
        class_source="true" if has_classes else "predicted",
        score=intervals.bootstrap_mean(before.score),
        accuracy=intervals.share_interval(before.is_right.sum(), len(rows)).including(
            intervals.half_means(before.is_right)
        ),
        is_learnt=study.has_learnt,
        whole_model=outcomes["whole model"],
        zero=outcomes["zero"],
        mean=outcomes.get("mean"),
        joint=joint_ablation(passes, heads, after["zero"], before, has_classes) if len(heads) > 1 else None,
        entropy=entropy,
        entropy_correlation=correlation,
        entropy_p_value=p_value,
    )


def without_head(study: Study, place: tuple[int, int]) -> Trial:
    layer, head = place
    return Trial(f"head {layer + 1}.{head + 1}", switch_off(study.survey.layer_names[layer], head))


def without_layers(study: Study) -> list[Trial]:
    return [Trial(f"layer {layer + 1}", switch_off(name)) for layer, name in enumerate(study.survey.layer_names)]


def averaged_layers(study: Study, maps: AverageMaps) -> list[Trial]:
    """Return the trials with the average map in a layer, of all layers whose map is known."""
    return [
        Trial(f"layer {layer + 1}", replace_by_mean(name, None, maps.weights[name]))
        for layer, name in enumerate(study.survey.layer_names)
        if name in maps.weights
    ]


def joint_counts(num_heads: int) -> list[int]:
    """Return 1, 2, 4, 8, ..., fewer than all heads."""
    return [2**power for power in range(math.ceil(math.log2(num_heads)))] if num_heads > 1 else []


def joint_ablation(
    passes: Passes, heads: Heads, without: list[Answers], before: Answers, has_classes: bool
) -> JointAblation:
    """Ablate the most and the least needed heads together. without: the answers without each head, then others."""
    second = alternate_halves(passes.classes)
    ranking = most_needed_first(before.of_images(~second), [each.of_images(~second) for each in without[: len(heads)]])
    trials = [without_head(passes.study, place) for place in heads]
    counts = joint_counts(len(heads))

    def jointly(order: Array) -> list[Trial]:
        return [Trial(f"{count} heads", together([trials[head].edit for head in order[:count]])) for count in counts]

    joint = [*jointly(ranking), *jointly(ranking[::-1])]
    judged = passes.of_images(np.flatnonzero(second))
    answers = judged.try_all(joint)
    names, before = [trial.name for trial in joint], before.of_images(second)
    most, least = (
        Outcomes.of(names[part], before, answers[part], has_classes)
        for part in (slice(len(counts)), slice(len(counts), None))
    )
    return JointAblation([heads.labels[head] for head in ranking], counts, most, least)


def most_needed_first(before: Answers, without: list[Answers]) -> Array:
    """Return the heads in the order of the errors that there are without them, the most first; where these are equal,
    in that of the score: [head]."""
    errors = [int((~each.is_right).sum()) for each in without]
    scores = [float((each.score - before.score).mean()) for each in without]
    return np.array(sorted(range(len(without)), key=lambda head: (-errors[head], scores[head])))
