"""Numbers from attention: pure functions, streaming accumulators, and the statistics to judge them.

Hands out functions of arrays and tensors; no files, no figures. May use data, models, attention and below.

    attention_rows.py       all rows of a layer's attention, as pages and files keep them
    class_variance.py       how much of maps lies between classes, beyond ink
    explanations.py         maps by attention, rollout, values, gradients and relevance
    head_matching.py        pair the heads of two models that do the same
    head_roles.py           what single heads follow, as numbers
    ink_regression.py       maps and classes without what ink predicts of them, out of fold
    intervals.py            bootstrap intervals, permutation tests, multiple-testing correction
    map_measures.py         entropy, distance, rollout and the like, of attention weights
    matched_patches.py      excess attention on a feature, between matched patches
    observation.py          what a model predicts and attends to on a few images, as arrays
    over_seeds.py           intervals and exact tests over training runs
    paired_errors.py        McNemar's test of errors on the same images, and its power
    perturbation.py         deletion and insertion curves
    predicted_attention.py  attention as far as the amounts of ink predict it
    quantised_rows.py       attention weights in 8 bits, each row on its own scale
    shapley.py              Shapley values and leave-one-out of patches
    streaming.py            statistics over any number of images in bounded memory
"""

from attention_visualizer.measures.map_measures import (
    attention_entropy,
    attention_rollout,
    class_token_self_attention,
    column_mass,
    effective_tokens,
    head_confidence,
    head_divergence,
    head_divergences,
    jensen_shannon_divergence,
    maximum_attention,
    mean_attention,
    mean_attention_distance,
    patch_attention,
    positive_gradient_attention,
    query_attention,
    query_entropy,
    readout_effective_tokens,
    readout_entropy,
    readout_query,
    relevance_step,
    rollout_step,
    sink_strength,
    uniform_entropy,
    value_weighted_attention,
)

__all__ = [
    "attention_entropy",
    "attention_rollout",
    "class_token_self_attention",
    "column_mass",
    "effective_tokens",
    "head_confidence",
    "head_divergence",
    "head_divergences",
    "jensen_shannon_divergence",
    "maximum_attention",
    "mean_attention",
    "mean_attention_distance",
    "patch_attention",
    "positive_gradient_attention",
    "query_attention",
    "query_entropy",
    "readout_effective_tokens",
    "readout_entropy",
    "readout_query",
    "relevance_step",
    "rollout_step",
    "sink_strength",
    "uniform_entropy",
    "value_weighted_attention",
]
