"""The chapter on runs that differ in the seed only: which heads come again, and what else survives a new seed."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from attention_visualizer.analysis.runs.seeds_measure import (
    CLOSE,
    MINIMUM_GAIN,
    QUANTITIES,
    Claims,
    Pair,
    SeedComparison,
    compare_seeds,
    head_claims,
    layer_claims,
)
from attention_visualizer.analysis.runs.survey import (
    CONTROL_FACTOR,
    SEED_CLAIMS,
    SurveyedRun,
    inked_of,
    numbers_of_runs,
    remarks_of,
    table_of_runs,
)
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.figures import charts, run_charts
from attention_visualizer.files.atomic import json_ready
from attention_visualizer.measures.intervals import LEVEL, smallest_sign_flip_p
from attention_visualizer.report.chapter import Chapter, FigureFile, Finding, Table

MOST_LISTED = 5  # runs whose values a cell of the table holds one by one


def write(study: Study, looked: list[SurveyedRun]) -> Chapter:
    """looked: at least two runs that differ in the seed only."""
    found = compare_seeds([each.survey for each in looked], study.control_surveys, inked_of(study, looked[0].survey))
    layers, heads = layer_claims(found), head_claims(found)
    n = looked[0].survey.num_images
    name = study.output.save(figure(study, looked, found), "attention_across_seeds")
    count = found.num_seeds
    text = TEXT.format(
        count=count,
        n=n,
        kind=study.target.images.kind,
        controls=len(study.control_surveys),
        seeds=how_many_seeds(count),
    )
    return Chapter(
        f"Comparing runs: {count} seeds of one model",
        "\n\n".join([text, *(sentence for sentence in (said_of_heads(found), said_of_claims(found, layers, heads)))])
        + remarks_of(looked),
        [FigureFile(name, CAPTION.format(count=count, n=n, kind=study.target.images.kind))],
        [table_of_runs(looked), table_of_quantities(found, layers), table_of_heads(found)],
        json_ready(numbers(looked, found, layers, heads)),
        finding=Finding(finding(found, layers, n, study.target.images.kind), name),
        caution=CAUTION,
    )


def how_many_seeds(count: int) -> str:
    smallest = (
        f"an exact two-sided sign-flip test of {count} seeds cannot reach a p below {smallest_sign_flip_p(count):.3g}"
    )
    if count < SEED_CLAIMS:
        return f"With fewer than {SEED_CLAIMS} seeds, what is said about seeds is descriptive: {smallest}."
    return f"The unit of every test is the seed, pictures are nested in it; {smallest}."


def said_of_heads(found: SeedComparison) -> str:
    if found.partners.shape[2] == 1:
        return "Layers have one head each, so there is nothing to match."
    gains = [pair.gain for pair in found.pairs]
    unrelated = [f"{share(found.shifted)} for heads matched with those of the next layer"] if found.shifted else []
    unrelated += [f"{share(found.random)} for random weights"] if found.random else []
    verdict = (
        "In every pair of runs partners are closer than unrelated heads: heads come again."
        if found.heads_recur
        else "Not every pair of runs reaches it: that heads come again is not shown."
    )
    return (
        f"**Heads.** Partners in another seed are {np.mean(gains):.0%} closer (pairs of runs: {min(gains):.0%} to "
        f"{max(gains):.0%}) than heads of the same layer paired by lot. With unrelated heads the best partners reach "
        f"{' and '.join(unrelated) or 'nothing, as there are none'}. What was asked for beforehand is at least "
        f"{MINIMUM_GAIN:.0%} and {CONTROL_FACTOR:g} times the largest of these, so {found.limit:.0%}, and a "
        f"permutation test. {verdict} {said_of_close_heads(found)}"
    )


def said_of_close_heads(found: SeedComparison) -> str:
    """Single heads may come again where most do not."""
    close, all_ = count_close(found.pairs)
    told = f"Of single heads, {close} of {all_} (heads x pairs of runs) have a partner within {CLOSE:g} nats"
    if not found.shifted:
        return f"{told}."
    unrelated, of_these = count_close(found.shifted)
    return f"{told}; in the next layer, {unrelated} of {of_these}."


def count_close(pairs: list[Pair]) -> tuple[int, int]:
    matched = np.stack([pair.matching.matched for pair in pairs])
    return int((matched <= CLOSE).sum()), matched.size


def share(pairs: list[Pair]) -> str:
    gains = [pair.gain for pair in pairs]
    return f"{np.mean(gains):.0%} (up to {max(gains):.0%})"


def said_of_claims(found: SeedComparison, layers: Claims, heads: Claims) -> str:
    sentences = [
        f"**What each seed shows.** By layer, {layers.held()} of {layers.size} differences from random weights have "
        f"one sign in all {found.num_seeds} seeds and exceed the minimum effect in each ({by_quantity(layers)}). "
        f"By head, after matching, {heads.held()} of {heads.size} differences from the layer's mean do, beyond what "
        f"matching alone brings about ({by_quantity(heads)})."
    ]
    if found.num_seeds >= SEED_CLAIMS:
        sentences.append(
            f"With false discovery control over each family, {layers.significant(found.num_seeds)} of {layers.size} "
            f"layers' and {heads.significant(found.num_seeds)} of {heads.size} heads' differences hold at {LEVEL:g}."
        )
    else:
        lowest = [float(np.nanmin(np.concatenate([each.ravel() for each in claims_.adjusted.values()])))
                  for claims_ in (layers, heads)]  # fmt: skip
        sentences.append(
            f"Adjusted over their families of {layers.size} and {heads.size}, the smallest p-values are "
            f"{lowest[0]:.2g} and {lowest[1]:.2g}: no statement about seeds in general rests on them."
        )
    return " ".join(sentences)


def by_quantity(held: Claims) -> str:
    return ", ".join(
        f"{name} {int(each.sum())} of {int((~np.isnan(held.effects[name])).sum())}"
        for name, each in held.every_seed.items()
    )


def finding(found: SeedComparison, layers: Claims, n: int, kind: str) -> str:
    gains = [pair.gain for pair in found.pairs]
    come = "come again" if found.heads_recur else "do not come again recognisably"
    unrelated = max((pair.gain for pair in (*found.shifted, *found.random)), default=0.0)
    tested = found.num_seeds >= SEED_CLAIMS
    entropy = layers.every_seed["entropy"] & ((layers.adjusted["entropy"] <= LEVEL) | (not tested))
    heads = (
        f"Over {found.num_seeds} seeds heads {come}: best partners are {np.mean(gains):.0%} closer than by lot, "
        f"unrelated heads up to {unrelated:.0%} (n = {n:,} {kind}s). "
    )
    if found.partners.shape[2] == 1:
        heads = f"Over {found.num_seeds} seeds (n = {n:,} {kind}s): "
    return (
        f"{heads}In {int(entropy.sum())} of {len(entropy)} layers "
        "the entropy differs from that of random weights in the same direction in every seed"
        + (f" (adjusted p at most {LEVEL:g})." if tested else f" (descriptive: fewer than {SEED_CLAIMS} seeds).")
    )


def figure(study: Study, looked: list[SurveyedRun], found: SeedComparison) -> Figure:
    drawn = Figure(figsize=(15, 9), layout="constrained")
    axes = drawn.subplots(2, 3).flatten()
    run_charts.partners_by_layer(
        np.stack([pair.matching.matched for pair in found.pairs]),
        np.stack([pair.matching.random_pairing for pair in found.pairs]),
        np.stack([pair.matching.matched for pair in found.shifted]) if found.shifted else None,
        np.stack([pair.matching.matched for pair in found.random]) if found.random else None,
        axes[0],
    )
    names = short_labels(looked)
    for axis, (name, values) in zip(axes[1:], found.values.items(), strict=False):
        reference = None if name == "maximum" else 1.0
        run_charts.layers_by_run(values, names, found.controls[name], QUANTITIES[name][0], axis, reference)
    run_charts.legend_above(axes[1], columns=4)
    groups = {
        "partners": found.pairs,
        "partners in the next layer": found.shifted,
        "random weights": found.random,
    }
    run_charts.agreement(
        {
            group: [[pair.agreement[name] for pair in pairs] for name in found.values]
            for group, pairs in groups.items()
            if pairs
        },
        list(found.values),
        "rank correlation of partners",
        axes[-1],
    )
    for axis in axes[len(found.values) + 1 : -1]:
        axis.set_visible(False)
    n = looked[0].survey.num_images
    headline = f"{found.num_seeds} seeds of one model, n = {n:,} {study.target.images.kind}s"
    return charts.with_headline(drawn, headline)


def short_labels(looked: list[SurveyedRun]) -> list[str]:
    known = [each.run.seed for each in looked]
    if None not in known and len(set(known)) == len(known):
        return [f"seed {seed}" for seed in known]
    return [f"run {number + 1}" for number in range(len(looked))]


def table_of_quantities(found: SeedComparison, layers: Claims) -> Table:
    rows = []
    for name, (label, minimum) in ((name, QUANTITIES[name]) for name in found.values):
        agreements = [summary([pair.agreement[name] for pair in pairs])
                      for pairs in (found.pairs, found.shifted, found.random)]  # fmt: skip
        held = f"{int(layers.every_seed[name].sum())} of {int((~np.isnan(layers.effects[name])).sum())}"
        rows.append([label, *agreements, summary(found.profiles[name]), f"{held} (by at least {minimum:g})"])
    return Table(
        "Agreement between seeds: rank correlations, mean over pairs of models (and range), of matched heads within "
        "their layers, and of layers' means; and in how many layers every seed lies on one side of random weights.",
        ["quantity", "partners", "partners in the next layer", "random weights", "layers' means", "one side"],
        rows,
    )


def summary(values: list[float]) -> str:
    known = [value for value in values if not np.isnan(value)]
    return f"{np.mean(known):.2f} ({min(known):.2f} to {max(known):.2f})" if known else "–"


def table_of_heads(found: SeedComparison) -> Table:
    """A row a head of the first run: partners, divergences and values of each run."""
    with_first = [pair for pair in found.pairs if pair.first == 0]
    rows = []
    for layer, head in np.ndindex(found.partners.shape[1:]):
        own = [
            f"{layer + 1}.{head + 1}",
            ", ".join(str(partner + 1) for partner in found.partners[1:, layer, head]),
            listed([pair.matching.matched[layer, head] for pair in with_first]),
            f"{np.mean([pair.matching.random_pairing[layer, head] for pair in with_first]):.2f}",
        ]
        rows.append([*own, *(listed(values[:, layer, head]) for values in found.aligned.values())])
    return Table(
        "Heads of the first run (layer.head) and their partners in the others, in the order of the runs: the partner, "
        "its divergence (nats), the mean divergence of heads paired by lot, and each quantity in every run.",
        ["head", "partners", "divergence", "by lot", *found.aligned],
        rows,
    )


def listed(values: Any) -> str:
    """Each of a few, the range of many."""
    if np.isnan(values).any():
        return "–"
    if len(values) > MOST_LISTED:
        return f"{np.mean(values):.2f} ({np.min(values):.2f} to {np.max(values):.2f})"
    return ", ".join(f"{value:.2f}" for value in values)


def numbers(looked: list[SurveyedRun], found: SeedComparison, layers: Claims, heads: Claims) -> dict[str, Any]:
    return {
        "comparison": "seeds",
        "images": looked[0].survey.num_images,
        "runs": numbers_of_runs(looked),
        "descriptive": found.num_seeds < SEED_CLAIMS,
        "smallest_p": smallest_sign_flip_p(found.num_seeds),
        "heads_recur": found.heads_recur,
        "pairs": [
            {
                "runs": [pair.first, pair.second],
                "gain": pair.gain,
                "p": pair.matching.p_value(),
                "partners": pair.matching.partners.tolist(),
                "divergence": pair.matching.matched.tolist(),
                "divergence_by_lot": pair.matching.random_pairing.tolist(),
                "rank_correlation": pair.agreement,
            }
            for pair in found.pairs
        ],
        "gain_next_layer": [pair.gain for pair in found.shifted],
        "gain_random_weights": [pair.gain for pair in found.random],
        "values_by_run_layer_head": found.values,
        "families": {
            family: {
                "size": each.size,
                "mean_difference": each.effects,
                "adjusted_p": each.adjusted,
                "in_every_seed": each.every_seed,
            }
            for family, each in (("layers", layers), ("heads", heads))
        },
    }


CAPTION = """{count} runs that differ in the seed only, over {n:,} {kind}s. First panel: the Jensen-Shannon divergence
between the readout rows of matched heads, 0 for copies. Next: the runs' layers against random weights. Last: whether
partners that differ from their layer's mean do so alike; dots are pairs of runs."""

TEXT = """{count} runs with the same settings and different seeds, over the same {n:,} {kind}s, beside {controls} models
with random weights. Heads have no identity across seeds: within each layer, the heads of two runs are paired so that
the Jensen-Shannon divergence of their readout rows on the same pictures is least in total (Hungarian matching). Such
partners are found for any heads, so the same is done with heads that cannot correspond: those of the next layer, and
those of random weights. Entropy and attention distance are relative to uniform attention, attention to ink is relative
to a head that attends to all patches alike. {seeds}"""

CAUTION = """Partners are chosen by what they attend to, so they agree to some degree whatever the heads are: read their
agreement against that of heads of the next layer, never alone."""
