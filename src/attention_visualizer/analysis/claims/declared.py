"""The claims that are put to the test, each as quantities that were fixed before any model was surveyed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attention_visualizer.analysis.claims.content import KEY_POINTS, POINTS
from attention_visualizer.analysis.claims.evidence import Evidence
from attention_visualizer.analysis.claims.verdicts import Claim, Requirement
from attention_visualizer.measures.head_roles import OFTEN_EMPTY, nan_mean
from attention_visualizer.measures.intervals import PERMUTATIONS

Array = NDArray[Any]

# The smallest effects that count, fixed before any model was surveyed. With enough images everything is significant; an
# effect below these would not be called one by somebody who looks at the maps.
MIN_ATTENTION = 0.1  # of a uniform share: a tenth more attention than if all patches got the same
MIN_DISTANCE = 0.1  # of the distance of uniform attention
MIN_SPREAD = 0.1  # of the patches, more than the other heads
WHOLE = 0.75  # of the inked patches take part, for "the whole digit"
MOST = 0.5  # of all patches take part, for "everything"
MIN_VARIANCE = 0.06  # of the maps' variance; Cohen (1988) calls it a medium effect
FAR = "of the distance of uniform attention"
LOCALITY_UNKNOWN = (
    "Locality is not tested: it needs the attention distance of shallow and deep patch queries, and the last layer's "
    "are not used where a class token is read."
)


def thirds(num_layers: int) -> tuple[range, range, range]:
    """Split the layers into shallow, middle and deep ones; of two layers none is in the middle."""
    third = max(1, round(num_layers / 3))
    return range(third), range(third, num_layers - third), range(num_layers - third, num_layers)


def most_layers(values: Array) -> Array:
    """Return the value that a majority of layers reach: [..., layer] -> [...]; NaN, no value, does not count."""
    known = np.sum(~np.isnan(values), axis=-1, keepdims=True)
    # Sorted, NaN comes last; where all is NaN, the first is.
    return np.take_along_axis(np.sort(values, axis=-1), np.maximum(known - (known // 2 + 1), 0), axis=-1)[..., 0]


def beyond_others(values: Array) -> Array:
    """Subtract from each head's value the mean of the layer's other heads: [..., layer, head] -> the same. NaN for
    heads that the layer does not have, and for one that is alone in it."""
    others = np.sum(~np.isnan(values), axis=-1, keepdims=True) - 1
    sums = np.nansum(values, axis=-1, keepdims=True) - values
    return values - np.divide(sums, others, out=np.full_like(sums, np.nan), where=others > 0)


def excess_requirement(feature: str, weights: Array, quantity: str) -> Requirement:
    """Require excess attention on a feature, sum over layers of weights x mean over heads. weights: [layer]."""

    def statistic(values: dict[str, Array]) -> Array:
        return nan_mean(values[feature]) @ weights

    def p_value(evidence: Evidence) -> float:
        return evidence.permutation_p_value(feature, weights)

    return Requirement(quantity, MIN_ATTENTION, statistic, statistic, p_value, "permuted among matched patches")


def head_requirements(
    name: str,
    sign: int,
    head: int,
    quantity: str,
    minimum: float = MIN_ATTENTION,
    least: float | None = None,
    unit: str = Requirement.unit,
) -> tuple[Requirement, Requirement]:
    """Require that a head's values (times `sign`) are large in most layers, and on average over layers larger than the
    other heads'. least: an absolute bound on the first, which a control may well reach."""

    def of_heads(values: dict[str, Array]) -> Array:
        return most_layers(np.swapaxes(sign * values[name], -1, -2))  # [..., head]

    def of_heads_beyond(values: dict[str, Array]) -> Array:
        return nan_mean(np.swapaxes(beyond_others(sign * values[name]), -1, -2))  # [..., head]

    def beyond(evidence: Evidence) -> Array:
        return beyond_others(sign * evidence.values[name])

    return (
        Requirement(
            f"{quantity} in most layers",
            minimum if least is None else least,
            lambda values: of_heads(values)[..., head],
            of_heads if least is None else None,
            unit=unit,
            n_from=name,
        ),
        Requirement(
            f"{quantity} beyond the other heads, mean over layers",
            minimum,
            lambda values: of_heads_beyond(values)[..., head],
            of_heads_beyond,
            lambda evidence: head_number_p_value(beyond(evidence), head),
            "heads drawn at random in each layer",
            unit,
            lambda evidence: smallest_head_number_p(beyond(evidence), head),
            name,
        ),
    )


def head_number_p_value(beyond: Array, head: int, permutations: int = PERMUTATIONS) -> float:
    """Return how often heads drawn at random in each layer are on average as far beyond the others as those of one
    index: [layer, head] -> p, over the layers that have this head. In a model's initial weights all indices are alike.
    NaN where no layer has it."""
    beyond = beyond[~np.isnan(beyond[:, head])]
    if not len(beyond):
        return float("nan")
    generator = np.random.default_rng(0)
    heads = [row[~np.isnan(row)] for row in beyond]
    null = np.mean([generator.choice(row, permutations) for row in heads], axis=0)
    return float(((null >= beyond[:, head].mean() - 1e-12).sum() + 1) / (permutations + 1))


def smallest_head_number_p(beyond: Array, head: int) -> float:
    """Return the smallest p-value `head_number_p_value` can return: the one best head is drawn in every layer."""
    counts = np.sum(~np.isnan(beyond[~np.isnan(beyond[:, head])]), axis=1)
    return float(np.prod(1 / np.maximum(counts, 1.0)))


def mean_over(name: str, values: dict[str, Array], layers: Sequence[int]) -> Array:
    """Average a quantity [..., layer] over some layers: [...]."""
    return values[name][..., list(layers)].mean(axis=-1)


def distance_gain(values: dict[str, Array], later: Sequence[int], earlier: Sequence[int]) -> Array:
    return mean_over("distance", values, later) - mean_over("distance", values, earlier)


def distance_requirement(quantity: str, statistic: Callable[[dict[str, Array]], Array]) -> Requirement:
    return Requirement(quantity, MIN_DISTANCE, statistic, statistic, unit=FAR, n_from="distance")


def restriction(used: Sequence[int], layers: range) -> str:
    """Say which layers a quantity is of, where it is not of all of `layers`."""
    return "" if len(used) == len(layers) else f" (layer {', '.join(str(layer + 1) for layer in used)} only)"


def declared_claims(evidence: Evidence) -> tuple[list[Claim], list[str]]:
    """Return the claims that can be tested on this model, and sentences on those that cannot."""
    layers, heads = evidence.num_layers, evidence.num_heads
    claims: list[Claim] = []
    missing: list[str] = []
    if layers > 1:
        claims += depth_claims(evidence, missing)
    else:
        missing.append("With one layer there are no shallow and deep layers.")
    if heads > 1:
        claims += head_claims(evidence, missing)
    else:
        missing.append("With one head there are no other heads to compare with.")
    claims += content_claims(evidence, missing)
    return claims, missing


def depth_claims(evidence: Evidence, missing: list[str]) -> list[Claim]:
    shallow, middle, deep = thirds(evidence.num_layers)
    early, halfway, late = ([layer for layer in part if layer in evidence.depth] for part in (shallow, middle, deep))
    first, last = weights_of(shallow, evidence.num_layers), weights_of(deep, evidence.num_layers)
    claims = []
    if "distance" in evidence.values and early and late:

        def closeness(values: dict[str, Array]) -> Array:
            return 1 - mean_over("distance", values, early)

        gain = partial(distance_gain, later=late, earlier=early)
        claims.append(
            Claim(
                f"Shallow layers ({layer_numbers(shallow)}) attend locally",
                (
                    distance_requirement("attention distance short of uniform", closeness),
                    distance_requirement(f"distance gained from shallow to deep{restriction(late, deep)}", gain),
                ),
            )
        )
    else:
        missing.append(LOCALITY_UNKNOWN)
    claims.append(
        Claim(
            f"Shallow layers ({layer_numbers(shallow)}) attend to edges",
            (
                excess_requirement("edges", first, "attention on stroke edges"),
                excess_requirement("edges", first - last, "attention on edges, shallow minus deep"),
            ),
        )
    )
    if "distance" in evidence.values and early and halfway:
        gain = partial(distance_gain, later=halfway, earlier=early)
        claims.append(
            Claim(
                f"Middle layers ({layer_numbers(middle)}) integrate",
                (distance_requirement(f"distance gained from shallow to middle{restriction(halfway, middle)}", gain),),
                "attention reaches farther there, but the weights do not show what is combined: "
                "decoding parts of digits from each layer's tokens could show it",
            )
        )

    def whole(values: dict[str, Array]) -> Array:
        return mean_over("coverage", values, deep)

    claims.append(
        Claim(
            f"Deep layers ({layer_numbers(deep)}) attend to the whole digit",
            (
                excess_requirement("ink", last, "attention on ink"),
                excess_requirement("ink", last - first, "attention on ink, deep minus shallow"),
                Requirement("effective inked patches", WHOLE, whole, None, unit="of the inked patches"),
            ),
        )
    )
    return claims


def head_claims(evidence: Evidence, missing: list[str]) -> list[Claim]:
    claims = [
        Claim("Head 1 attends to the stroke", head_requirements("ink", 1, 0, "attention on ink")),
        Claim(
            "Head 2 attends to details and junctions", head_requirements("junctions", 1, 1, "attention on junctions")
        ),
        Claim(
            "Head 3 attends to background and border"
            if "border" in evidence.values
            else "Head 3 attends to background",
            (
                *head_requirements("ink", -1, 2, "attention on empty patches"),
                *(head_requirements("border", 1, 2, "attention on the border") if "border" in evidence.values else ()),
            ),
        ),
        Claim(
            "Head 4 gathers everything for the prediction",
            head_requirements("spread", 1, 3, "effective patches", MIN_SPREAD, MOST, "of the patches"),
            "it attends everywhere, but the weights do not show whether the prediction uses it: "
            "ablating the head could show it",
        ),
    ]
    if "border" not in evidence.values:
        why = (
            "all patches lie at the border"
            if np.isnan(evidence.emptiness)
            else f"{evidence.emptiness:.0%} of the interior patches hold no ink, less than {OFTEN_EMPTY:.0%} "
            f"(n = {evidence.n:,}), so that border against interior would compare ink again"
        )
        missing.append(f"Head 3 is tested for the background only: {why}.")
    if evidence.num_heads < len(claims):
        missing.append(f"The model has {evidence.num_heads} heads, so heads of higher index are not tested.")
    return claims[: evidence.num_heads]


def content_claims(evidence: Evidence, missing: list[str]) -> list[Claim]:
    everywhere = np.full(evidence.num_layers, 1 / evidence.num_layers)
    claims = [
        Claim(
            "The model recognises key points by itself",
            (excess_requirement(KEY_POINTS, everywhere, "attention on any key point"),),
            "it attends to them, but attending is not recognising: "
            "moving or erasing such points and comparing predictions could show it",
        ),
        *(
            Claim(
                f"{name.capitalize()} get more attention than other ink",
                (excess_requirement(name, everywhere, f"attention on {name}"),),
            )
            for name in POINTS
        ),
    ]
    if evidence.p_classes is None:
        missing.append("Without labels, differences between classes are not tested.")
        return claims

    def share(values: dict[str, Array]) -> Array:
        return values["classes"]

    requirement = Requirement(
        "variance of the maps between classes, ink regressed out",
        MIN_VARIANCE,
        share,
        share,
        lambda evidence: 1.0 if evidence.p_classes is None else evidence.p_classes,
        "permuted labels",
        "of the variance",
    )
    return [*claims, Claim("Attention differs clearly between classes", (requirement,))]


def weights_of(layers: range, num_layers: int) -> Array:
    """Return the weights of the mean over `layers`: [layer]."""
    weights = np.zeros(num_layers)
    weights[list(layers)] = 1 / len(layers)
    return weights


def layer_numbers(layers: range) -> str:
    """Number layers from 1: "2-4"."""
    return f"{layers[0] + 1}" if len(layers) == 1 else f"{layers[0] + 1}-{layers[-1] + 1}"
