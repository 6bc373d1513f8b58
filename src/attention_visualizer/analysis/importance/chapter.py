"""What the prediction needs of attention: weights replaced in all layers at once, then heads and layers ablated."""

from __future__ import annotations

from typing import Any

import numpy as np

from attention_visualizer.analysis.importance.figure import draw_heads, draw_whole_model
from attention_visualizer.analysis.importance.measure import Importance, measure, num_passes
from attention_visualizer.analysis.importance.outcomes import MIN_RISE, TABLE_LEVEL
from attention_visualizer.analysis.importance.tables import tables_of
from attention_visualizer.analysis.needs import ChapterWriter, Need
from attention_visualizer.analysis.study.budget import MIN_IMAGES
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.report.chapter import Chapter, FigureFile, Finding


def write(study: Study) -> Chapter:
    title = CHAPTER.title
    if len(study.target.images) < MIN_IMAGES:
        return Chapter(title, f"Omitted: head importance needs at least {MIN_IMAGES} images.")
    rows = study.affordable_rows(num_passes(study), of_all=True)
    if rows is None:
        return Chapter(title, TOO_MUCH.format(passes=num_passes(study)))
    measured = measure(study, rows)
    whole_model = study.output.save(draw_whole_model(measured), "attention_interventions")
    heads = study.output.save(draw_heads(measured), "attention_importance")
    return Chapter(
        title,
        text_of(measured),
        [
            FigureFile(
                whole_model,
                f"What the model still classifies when attention is replaced in all layers at once, over "
                f"{measured.images}; bars: 95% intervals.",
            ),
            FigureFile(
                heads,
                "Above: more errors without each head (last column: the whole layer), in zero ablation; the colours "
                "end at the largest change of a single head. Below: heads ablated together, and the errors against "
                "the heads' entropy.",
            ),
        ],
        tables_of(measured),
        numbers_of(measured),
        finding=Finding(headline(measured), whole_model, rank=1, view=costliest_view(measured)),
        caution="A head that is not needed may have a function that others share; edited attention is attention that "
        "the model was not trained with.",
    )


def headline(measured: Importance) -> str:
    """The finding, in two sentences."""
    count, n = len(measured.heads), measured.accuracy.n
    if not measured.is_learnt and measured.class_source == "predicted":
        return (
            "Without true classes, head importance cannot be determined; the figure shows how the model's predictions "
            f"change with other attention and without each of {count} heads (n = {n:,})."
        )
    if not measured.is_learnt:
        return f"The model's accuracy is not above chance, so no head can matter (n = {n:,})."
    needed = len(measured.needed_heads)
    return (
        f"{whole_model_sentence(measured)} {needed or 'None'} of {count} heads {'is' if needed < 2 else 'are'} needed "
        f"alone; {costliest_sentence(measured)} (n = {n:,})."
    )


def whole_model_sentence(measured: Importance) -> str:
    """What is left of the accuracy with average maps, or with uniform attention where these are too large."""
    outcomes = measured.whole_model
    name, words = "average map", "replaced by its average map"
    if name not in outcomes.names:
        name, words = "uniform attention", "made uniform"
    accuracy = outcomes.accuracy[outcomes.names.index(name)]
    return (
        f"With every layer's attention {words} the model still classifies {float(accuracy.value):.1%} correctly "
        f"({float(measured.accuracy.value):.1%} as it is)."
    )


def costliest_sentence(measured: Importance) -> str:
    rise = measured.rise_of_heads
    if rise.max() <= 0:
        return f"without any one of them the errors stay at {measured.zero.errors_before:,} or fewer"
    costliest = int(rise.argmax())
    return (
        f"without head {measured.heads.labels[costliest]}, the costliest (picked afterwards), errors go from "
        f"{measured.zero.errors_before:,} to {measured.zero.errors[costliest]:,}"
    )


def costliest_view(measured: Importance) -> str:
    rise = measured.rise_of_heads
    return measured.heads.view(int(rise.argmax())) if measured.is_learnt and rise.max() > 0 else ""


def text_of(measured: Importance) -> str:
    zero = measured.zero
    return TEXT.format(
        who=measured.images,
        classes=measured.class_source,
        errors="errors" if measured.class_source == "true" else "predictions other than its own",
        before=zero.errors_before,
        n=measured.accuracy.n,
        rise=MIN_RISE,
        level=TABLE_LEVEL,
        family=len(zero.names),
        verdict=verdict_text(measured),
        joint=joint_text(measured),
        correlation=correlation_text(measured),
    )


def verdict_text(measured: Importance) -> str:
    """Which heads are needed and what could not have been seen, or why nothing can be said."""
    if not measured.is_learnt:
        return UNKNOWN if measured.class_source == "predicted" else CHANCE
    zero, needed = measured.zero, measured.needed_heads
    return NEEDED.format(
        needed=len(needed),
        count=len(measured.heads),
        names=f": {', '.join(needed)}" if needed else "",
        layers=int(measured.needed(zero)[len(measured.heads) :].sum()),
        all_layers=len(zero.names) - len(measured.heads),
        averaged="" if measured.mean is None else AVERAGED.format(count=int(measured.needed(measured.mean).sum())),
        detectable=zero.detectable_rise,
        before=zero.errors_before,
        reached=zero.errors_before + zero.detectable_rise,
        n=measured.accuracy.n,
    )


def joint_text(measured: Importance) -> str:
    joint = measured.joint
    if joint is None:
        return ""
    return JOINT.format(
        n=joint.most.accuracy.n,
        count=joint.counts[-1],
        most=joint.most.accuracy[-1].text(1, percent=True),
        least=joint.least.accuracy[-1].text(1, percent=True),
        word="accuracy" if measured.class_source == "true" else "agreement with its own predictions",
    )


def correlation_text(measured: Importance) -> str:
    if np.isnan(measured.entropy_correlation.value):
        return ""
    return CORRELATION.format(
        value=measured.entropy_correlation.text(2), p=measured.entropy_p_value, count=len(measured.heads)
    )


def numbers_of(measured: Importance) -> dict[str, Any]:
    joint = measured.joint
    return {
        "images": measured.accuracy.n,
        "classes": measured.class_source,
        "score": measured.score.numbers(),
        "accuracy": measured.accuracy.numbers(),
        "errors": measured.zero.errors_before,
        "least_rise": MIN_RISE,
        "detectable_rise": measured.zero.detectable_rise if measured.class_source == "true" else None,
        "heads": measured.heads.labels,
        "whole_model": measured.whole_model.numbers(),
        "zero_ablation": {**measured.zero.numbers(), "needed": measured.needed(measured.zero)},
        "mean_ablation": None
        if measured.mean is None
        else {**measured.mean.numbers(), "needed": measured.needed(measured.mean)},
        "joint_ablation": None
        if joint is None
        else {
            "images": joint.most.accuracy.n,
            "errors": joint.most.errors_before,
            "ranking": joint.ranking,
            "heads_ablated": joint.counts,
            "most_needed": joint.most.numbers(),
            "least_needed": joint.least.numbers(),
        },
        "rank_correlation": {
            "entropy": {**measured.entropy_correlation.numbers(), "p_value": measured.entropy_p_value}
        },
    }


NO_SCORES = "The model gives no class scores, so the effect of a head on them cannot be measured."
CHAPTER = ChapterWriter(
    "Head importance", write, ("attention_interventions", "attention_importance"), {Need.CLASSIFIER: NO_SCORES}
)

TEXT = """**What does the answer need of attention?** Over {who}, the weights of all layers are replaced at once, and
everything else stays as it is:

- **average map**: each head's mean over these images, so the same for every image;
- **class token's row only**: the average map in that row, everything else as it is;
- **another image's attention**: the weights of the unedited model on an image of any class;
- **all on the largest weight**: one key gets everything;
- **uniform attention**, and **no attention** at all.

**Heads and layers.** Each is switched off alone: its weights become 0 (zero ablation). Each layer is also replaced by
its average map (mean ablation). The table counts {errors}, which are {before:,} of {n:,} with all heads. The score is
the logit of the {classes} class minus the mean logit.

A head or layer is *needed* if, without it, errors rise by at least {rise:.0%} with p < {level:g} (exact McNemar test,
Holm-adjusted over {family}).{verdict}{joint}{correlation}"""

NEEDED = """ {needed} of {count} heads are needed alone{names}, and {layers} of {all_layers} layers{averaged}. With
{n:,} images the test finds a rise of {detectable:,} errors (from {before:,} to {reached:,}) in 4 of 5 cases. What costs
less may not be seen."""

AVERAGED = " ({count} still when only averaged)"

JOINT = """

**Heads together.** Heads are ranked by what each costs on one half of the images, and judged on the other ({n:,}).
Without the {count} most needed heads the model has {most} {word}, without the {count} least needed {least}."""

CORRELATION = """

Are sharp heads needed more? Over the {count} heads, the rise in errors and the entropy of the readout row have a rank
correlation of {value} (p = {p:.3f} by permutation, not adjusted)."""

TOO_MUCH = """Omitted: it takes {passes:,} passes over each image, which is slow for a model of this size. `subset=50`
runs it on 50 images."""

CHANCE = """ The accuracy is not above chance, so no head can matter."""

UNKNOWN = (
    """ The true classes are not known, and a model always agrees with itself, so no head is reported to matter."""
)
