"""The chapter on runs that differ in the seed only: which heads come again, and what else survives a new seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from attention_visualizer.analysis.runs.run_table import describe_remarks, run_numbers, run_table
from attention_visualizer.analysis.runs.seeds.figure import divergences, draw
from attention_visualizer.analysis.runs.seeds.measure import (
    MIN_GAIN,
    QUANTITIES,
    Pair,
    SeedComparison,
    SeedEffects,
    measure,
)
from attention_visualizer.analysis.runs.surveyed_runs import (
    CONTROL_FACTOR,
    ENOUGH_SEEDS,
    FAMILY_LEVEL,
    FEW_SEEDS,
    SurveyedRun,
)
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.measures.head_roles import MAX_DIVERGENCE
from attention_visualizer.measures.over_seeds import smallest_sign_flip_p
from attention_visualizer.report.chapter import Chapter, FigureFile, Finding, Table

MAX_LISTED = 5  # runs whose values a cell of the table holds one by one


def write(study: Study, surveyed: list[SurveyedRun]) -> Chapter:
    """surveyed: at least two runs that differ in the seed only."""
    comparison = measure(study, surveyed)
    name = study.output.save(draw(comparison), "attention_across_seeds")
    count, n, kind = comparison.num_seeds, comparison.num_images, comparison.image_kind
    text = TEXT.format(count=count, n=n, kind=kind, controls=len(study.control_surveys), seeds=describe_power(count))
    tables = [run_table(surveyed), quantity_table(comparison), head_table(comparison)]
    if count >= FEW_SEEDS:
        tables.insert(1, layer_table(comparison))
    if comparison.supported:
        tables.append(claim_table(comparison))
    return Chapter(
        f"Comparing runs: {count} seeds of one model",
        "\n\n".join([text, describe_heads(comparison), describe_effects(comparison)]) + describe_remarks(surveyed),
        [FigureFile(name, CAPTION.format(count=count, n=n, kind=kind))],
        tables,
        numbers(comparison),
        finding=Finding(finding_text(comparison), name, rank=0 if count >= FEW_SEEDS else 8),
        caution=CAUTION,
    )


def describe_power(num_seeds: int) -> str:
    smallest = (
        f"an exact two-sided sign-flip test of {num_seeds} seeds cannot reach a p below "
        f"{smallest_sign_flip_p(num_seeds):.3g}"
    )
    if num_seeds < ENOUGH_SEEDS:
        return f"With fewer than {ENOUGH_SEEDS} seeds, statements about seeds are descriptive: {smallest}."
    return f"The unit of every test is the seed, with images nested in it; {smallest}."


def describe_heads(comparison: SeedComparison) -> str:
    if comparison.partners.shape[2] == 1:
        return "Layers have one head each, so there is nothing to match."
    gains = [pair.gain for pair in comparison.pairs]
    unrelated = []
    if comparison.shifted:
        unrelated.append(f"{format_gains(comparison.shifted)} for heads matched with those of the next layer")
    if comparison.random:
        unrelated.append(f"{format_gains(comparison.random)} for random weights")
    verdict = (
        "In every pair of runs matched heads are closer than unrelated heads: heads recur."
        if comparison.heads_recur
        else "Not every pair of runs reaches it, so there is no evidence that heads recur."
    )
    return (
        f"**Heads.** Matched heads of two seeds are {np.mean(gains):.0%} closer (pairs of runs: {min(gains):.0%} to "
        f"{max(gains):.0%}) than heads of the same layer paired at random. Matching unrelated heads reaches "
        f"{' and '.join(unrelated) or 'nothing, as there are none'}. The criterion declared in advance is at least "
        f"{MIN_GAIN:.0%} and {CONTROL_FACTOR:g} times the largest of these, so {comparison.limit:.0%}, and a "
        f"permutation test. {verdict} {describe_close_heads(comparison)}"
    )


def describe_close_heads(comparison: SeedComparison) -> str:
    """Single heads may come again where most do not."""
    close, total = count_close(comparison.pairs)
    sentence = (
        f"Of single heads, {close} of {total} (heads x pairs of runs) have a match within {MAX_DIVERGENCE:g} nats"
    )
    if not comparison.shifted:
        return f"{sentence}."
    close, total = count_close(comparison.shifted)
    return f"{sentence}; in the next layer, {close} of {total}."


def count_close(pairs: Sequence[Pair]) -> tuple[int, int]:
    """Count the heads that are close to their partners, and all heads."""
    matched = divergences(pairs)
    return int((matched <= MAX_DIVERGENCE).sum()), matched.size


def format_gains(pairs: Sequence[Pair]) -> str:
    gains = [pair.gain for pair in pairs]
    return f"{np.mean(gains):.0%} (up to {max(gains):.0%})"


def describe_effects(comparison: SeedComparison) -> str:
    layers, heads, count = comparison.layer_effects, comparison.head_effects, comparison.num_seeds
    every_seed = (
        f"**What each seed shows.** By layer, {layers.num_in_every_seed} of {layers.size} differences from random "
        f"weights have one sign in all {count} seeds and exceed the minimum effect in each ({by_quantity(layers)}). "
        f"By head, after matching, {heads.num_in_every_seed} of {heads.size} differences from the layer's mean do, "
        f"beyond the effect of matching alone ({by_quantity(heads)})."
    )
    if count >= ENOUGH_SEEDS:
        return (
            f"{every_seed} Tested together in each of these two families, {layers.num_significant(count)} of "
            f"{layers.size} layers' and {heads.num_significant(count)} of {heads.size} heads' differences hold at "
            f"p < {FAMILY_LEVEL:.2g}."
        )
    smallest = [
        float(np.nanmin(np.concatenate([each.ravel() for each in effects.adjusted.values()])))
        for effects in (layers, heads)
    ]
    return (
        f"{every_seed} Tested together in families of {layers.size} and {heads.size}, the smallest p-values are "
        f"{smallest[0]:.2g} and {smallest[1]:.2g}: no statement about seeds in general rests on them."
    )


def by_quantity(effects: SeedEffects) -> str:
    return ", ".join(f"{name} {count_in_every_seed(effects, name)}" for name in effects.means)


def count_in_every_seed(effects: SeedEffects, quantity: str) -> str:
    """Count the differences that hold in every seed: "3 of 5"."""
    return f"{int(effects.every_seed[quantity].sum())} of {int((~np.isnan(effects.means[quantity])).sum())}"


def finding_text(comparison: SeedComparison) -> str:
    """Values over seeds, where these are enough for an interval; then what recurs."""
    count, sentences = comparison.num_seeds, []
    if count >= FEW_SEEDS:
        accuracy, claims = accuracy_text(comparison), claims_text(comparison)
        sentences += [f"Over {count} seeds {accuracy}"] if accuracy else []
        sentences += [claims] if claims else []
    if comparison.partners.shape[2] > 1:
        gain = np.mean([pair.gain for pair in comparison.pairs])
        unrelated = max((pair.gain for pair in (*comparison.shifted, *comparison.random)), default=0.0)
        recur = "Heads recur" if comparison.heads_recur else "Heads do not recur recognisably"
        sentences.append(
            f"{recur}: matched heads are {gain:.0%} closer than at random, unrelated heads up to {unrelated:.0%} "
            f"({count} seeds, n = {comparison.num_images:,})"
        )
    return " ".join(f"{each}." for each in sentences) or f"{count} seeds were compared, of layers with one head each."


def accuracy_text(comparison: SeedComparison) -> str:
    accuracy = comparison.over_seeds.get("accuracy")
    if accuracy is None:
        return ""
    each = [float(run.accuracy.value) for run in comparison.runs if run.accuracy is not None]
    return (
        f"the mean accuracy is {accuracy.text(2, percent=True)}, interval over seeds (single runs: "
        f"{100 * min(each):.2f} to {100 * max(each):.2f})"
    )


def claims_text(comparison: SeedComparison) -> str:
    supported = comparison.supported
    if not supported:
        return ""
    always = sum(runs == comparison.num_seeds for runs in supported.values())
    sometimes = sum(0 < runs < comparison.num_seeds for runs in supported.values())
    return f"{always} of {len(supported)} common claims are supported in every run, {sometimes} in some"


def layer_table(comparison: SeedComparison) -> Table:
    """Make a row a layer: each quantity over seeds."""
    over_seeds = {name: comparison.over_seeds[name] for name in comparison.values}
    layers = range(comparison.partners.shape[1])
    return Table(
        f"By layer, mean over heads and {comparison.num_seeds} seeds, with 95% intervals over seeds (Student's t).",
        ["layer", *(QUANTITIES[name].label for name in over_seeds)],
        [[str(layer + 1), *(interval[layer].text() for interval in over_seeds.values())] for layer in layers],
    )


def claim_table(comparison: SeedComparison) -> Table:
    return Table(
        f"In how many of the {comparison.num_seeds} runs each claim is supported, each over the same "
        f"{comparison.num_images:,} {comparison.image_kind}s (fewer than in the chapter on claims, so less is found) "
        "and against that chapter's controls.",
        ["claim", "runs that support it"],
        [[claim, str(runs)] for claim, runs in comparison.supported.items()],
    )


def quantity_table(comparison: SeedComparison) -> Table:
    rows = []
    for name in comparison.values:
        quantity = QUANTITIES[name]
        agreements = [
            mean_and_range([pair.agreement[name] for pair in pairs])
            for pairs in (comparison.pairs, comparison.shifted, comparison.random)
        ]
        count = count_in_every_seed(comparison.layer_effects, name)
        profile = mean_and_range(comparison.profiles[name])
        rows.append([quantity.label, *agreements, profile, f"{count} (by at least {quantity.minimum:g})"])
    return Table(
        "Agreement between seeds: rank correlations, mean over pairs of models (and range), of matched heads within "
        "their layers, and of layer means; and in how many layers every seed lies on one side of random weights.",
        ["quantity", "matched heads", "next layer's heads", "random weights", "layer means", "one side"],
        rows,
    )


def mean_and_range(values: Sequence[float]) -> str:
    """Format the mean, smallest and largest of the values that are known."""
    known = [value for value in values if not np.isnan(value)]
    return f"{np.mean(known):.2f} ({min(known):.2f} to {max(known):.2f})" if known else "–"


def head_table(comparison: SeedComparison) -> Table:
    """Make a row a head of the first run: partners, divergences and values of each run."""
    with_first = [pair for pair in comparison.pairs if pair.first == 0]
    rows = []
    for layer, head in np.ndindex(comparison.partners.shape[1:]):
        rows.append(
            [
                f"{layer + 1}.{head + 1}",
                ", ".join(str(partner + 1) for partner in comparison.partners[1:, layer, head]),
                format_values([pair.matching.matched[layer, head] for pair in with_first]),
                f"{np.mean([pair.matching.random_pairing[layer, head] for pair in with_first]):.2f}",
                *(format_values(values[:, layer, head]) for values in comparison.aligned.values()),
            ]
        )
    return Table(
        "Heads of the first run (layer.head) and the matched heads of the others, in the order of the runs: the match, "
        "its divergence (nats), the mean divergence under random pairing, and each quantity in every run.",
        ["head", "matched heads", "divergence", "random pairing", *comparison.aligned],
        rows,
    )


def format_values(values: Any) -> str:
    """List up to MAX_LISTED values; summarise longer lists as mean (min to max)."""
    if np.isnan(values).any():
        return "–"
    if len(values) > MAX_LISTED:
        return mean_and_range(values)
    return ", ".join(f"{value:.2f}" for value in values)


def numbers(comparison: SeedComparison) -> dict[str, Any]:
    return {
        "comparison": "seeds",
        "images": comparison.num_images,
        "runs": run_numbers(comparison.runs),
        "descriptive": comparison.num_seeds < ENOUGH_SEEDS,
        "smallest_p": smallest_sign_flip_p(comparison.num_seeds),
        "heads_recur": comparison.heads_recur,
        "pairs": [
            {
                "runs": [pair.first, pair.second],
                "gain": pair.gain,
                "p": pair.p_value,
                "partners": pair.matching.partners,
                "divergence": pair.matching.matched,
                "divergence_of_random_pairing": pair.matching.random_pairing,
                "rank_correlation": pair.agreement,
            }
            for pair in comparison.pairs
        ],
        "gain_next_layer": [pair.gain for pair in comparison.shifted],
        "gain_random_weights": [pair.gain for pair in comparison.random],
        "values_by_run_layer_head": comparison.values,
        "over_seeds": {name: interval.numbers() for name, interval in comparison.over_seeds.items()},
        "runs_that_support": comparison.supported,
        "families": {
            family: {
                "size": effects.size,
                "mean_difference": effects.means,
                "adjusted_p": effects.adjusted,
                "in_every_seed": effects.every_seed,
            }
            for family, effects in (("layers", comparison.layer_effects), ("heads", comparison.head_effects))
        },
    }


CAPTION = """{count} runs that differ in the seed only, over {n:,} {kind}s. First: the Jensen-Shannon divergence of
matched heads; 0 for copies. Next: each run's layers against random weights. Last: do matched heads deviate from their
layer's mean in the same way? Each dot is a pair of runs."""

TEXT = """{count} runs with the same settings and different seeds, over the same {n:,} {kind}s, compared with {controls}
models with random weights.

Head 1 of one seed need not be head 1 of another. So the heads of two runs are matched within each layer: paired so that
their attention on the same images is as similar as possible (the smallest total Jensen-Shannon divergence of their
readout rows; Hungarian method). Any heads can be paired like this. It is therefore also done with heads that cannot
correspond: those of the next layer, and those of random weights. Matched heads must be closer than these.

Entropy and attention distance are relative to uniform attention. Attention to ink is relative to a uniform head.
{seeds}"""

CAUTION = """Heads are matched by what they attend to, so they always agree to some degree. Compare their agreement
with that of the next layer's heads."""
