"""What interventions do to the predictions of the same images: errors before and after, with McNemar's test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attention_visualizer.measures import intervals
from attention_visualizer.measures.intervals import CHAPTER_LEVEL, Interval
from attention_visualizer.measures.paired_errors import detectable_rise, mcnemar

Array = NDArray[Any]

# Declared beforehand: a head or layer is needed if there are at least this share more errors without it. With many
# images significance alone would do for a rise from 4,000 to 4,150 errors of 10,000, which no reader would call need; a
# share of the errors means the same at 99% and at 60% accuracy, as points of accuracy or logits do not.
MIN_RISE = 0.1
TABLE_LEVEL = CHAPTER_LEVEL / 2  # two tables say what is needed: zero ablation and mean ablation


class Answers(NamedTuple):
    """A model's predictions for images, compared with the classes that are asked for."""

    is_right: Array  # bool [image]
    score: Array  # [image], the class's logit relative to the mean of all logits

    def of_images(self, chosen: Array) -> Answers:
        return Answers(self.is_right[chosen], self.score[chosen])


@dataclass(frozen=True)
class Outcomes:
    """The predictions with each of several interventions, compared with those without; arrays [intervention]."""

    names: list[str]
    errors_before: int  # without any intervention
    lost: Array  # images that were right and are wrong
    gained: Array  # images that were wrong and are right
    accuracy: Interval
    accuracy_change: Interval
    score_change: Interval
    #: McNemar's, adjusted over these interventions (Holm); NaN where errors are disagreements with the model itself.
    p_value: Array

    @classmethod
    def of(cls, names: Sequence[str], before: Answers, after: Sequence[Answers], has_classes: bool) -> Outcomes:
        """has_classes: whether `Answers.is_right` is about true classes."""
        right = np.stack([each.is_right for each in after], axis=1)
        was_right = before.is_right[:, None]
        lost, gained = (was_right & ~right).sum(axis=0), (~was_right & right).sum(axis=0)
        scores = np.stack([each.score for each in after], axis=1)
        return cls(
            names=list(names),
            errors_before=int((~before.is_right).sum()),
            lost=lost,
            gained=gained,
            accuracy=intervals.share_interval(right.sum(axis=0), len(right)).including(intervals.half_means(right)),
            accuracy_change=intervals.share_change(before.is_right, right).including(
                intervals.half_means(right.astype(np.float64) - was_right)
            ),
            score_change=intervals.bootstrap_mean(scores - before.score[:, None]),
            p_value=intervals.holm(mcnemar(lost, gained)) if has_classes else np.full(len(after), np.nan),
        )

    @property
    def errors(self) -> Array:
        return self.errors_before + self.rise

    @property
    def rise(self) -> Array:
        """How many more errors there are with the intervention, below 0 for fewer."""
        return np.asarray(self.lost - self.gained)

    @property
    def is_needed(self) -> Array:
        """Return whether errors rise by MIN_RISE, and by more than chance: bool [intervention]."""
        return np.asarray((self.p_value < TABLE_LEVEL) & (self.rise >= MIN_RISE * self.errors_before) & (self.rise > 0))

    @property
    def detectable_rise(self) -> int:
        """Return the smallest rise that the test finds in 4 of 5 cases at its strictest step, where as many errors are
        put right at the same time as with the median intervention."""
        return detectable_rise(float(np.median(self.gained)), TABLE_LEVEL / len(self.names))

    def numbers(self) -> dict[str, Any]:
        return {
            "names": self.names,
            "errors": self.errors,
            "lost": self.lost,
            "gained": self.gained,
            "p_value_adjusted": self.p_value,
            "accuracy": self.accuracy.numbers(),
            "accuracy_change": self.accuracy_change.numbers(),
            "score_change": self.score_change.numbers(),
        }
