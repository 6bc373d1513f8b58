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
from attention_visualizer.measures.class_variance import smallest
from attention_visualizer.measures.intervals import normal_p_value

Array = NDArray[Any]

# The smallest effects that count, fixed before any model was surveyed. With enough images everything is significant; an
# effect below these would not be called one by somebody who looks at the maps.
MIN_ATTENTION = 0.1  # a tenth more attention than matched patches get
MIN_CONTRAST = 0.1  # between ink and empty patches at the same place: 55 to 45
MIN_DISTANCE = 0.1  # of the distance of uniform attention
WHOLE = 0.75  # of the inked patches take part, for "the whole digit"
MIN_VARIANCE = 0.06  # of the maps' variance; Cohen (1988) calls it a medium effect
CLASS_CLAIM = "Attention differs between classes beyond their ink"
FAR = "of the distance of uniform attention"
LOCALITY_UNKNOWN = (
    "Locality is not tested: it needs the attention distance of shallow and deep patch queries, and the last layer's "
    "are not used where a class token is read."
)


def thirds(num_layers: int) -> tuple[range, range, range]:
    """Split the layers into shallow, middle and deep ones; of two layers none is in the middle."""
    third = max(1, round(num_layers / 3))
    return range(third), range(third, num_layers - third), range(num_layers - third, num_layers)


def excess_requirement(feature: str, weights: Array, quantity: str) -> Requirement:
    """Require attention on a feature, sum over layers of weights x value. weights: [layer]."""

    def statistic(values: dict[str, Array]) -> Array:
        return np.asarray(values[feature] @ weights)

    def p_value(evidence: Evidence) -> float:
        return evidence.permutation_p_value(feature, weights)

    null = "permuted among matched patches"
    if feature == "ink":
        return Requirement(quantity, MIN_CONTRAST, statistic, p_value, null, "of their sum")
    return Requirement(quantity, MIN_ATTENTION, statistic, p_value, null)


def mean_over(name: str, values: dict[str, Array], layers: Sequence[int]) -> Array:
    """Average a quantity [..., layer] over some layers: [...]."""
    return np.asarray(values[name][..., list(layers)].mean(axis=-1))


def distance_gain(values: dict[str, Array], later: Sequence[int], earlier: Sequence[int]) -> Array:
    return np.asarray(mean_over("distance", values, later) - mean_over("distance", values, earlier))


def distance_requirement(quantity: str, statistic: Callable[[dict[str, Array]], Array]) -> Requirement:
    """Require a distance that neither other images nor patches at other places would give."""

    def p_value(evidence: Evidence) -> float:
        of_images = normal_p_value(np.asarray(statistic(evidence.replicates)))
        if evidence.permuted_places is None:
            return of_images
        observed, *null = statistic({"distance": evidence.permuted_places})
        return max(of_images, (sum(np.abs(null) >= abs(observed) * (1 - 1e-9)) + 1) / (len(null) + 1))

    return Requirement(quantity, MIN_DISTANCE, statistic, p_value, "images resampled; places permuted", FAR, "distance")


def restriction(used: Sequence[int], layers: range) -> str:
    """Say which layers a quantity is of, where it is not of all of `layers`."""
    return "" if len(used) == len(layers) else f" (layer {', '.join(str(layer + 1) for layer in used)} only)"


def declared_claims(evidence: Evidence) -> tuple[list[Claim], list[str]]:
    """Return the claims that can be tested on this model, and sentences on those that cannot."""
    claims: list[Claim] = []
    missing: list[str] = []
    if evidence.num_layers > 1:
        claims += depth_claims(evidence, missing)
    else:
        missing.append("With one layer there are no shallow and deep layers.")
    claims += point_claims(evidence.num_layers)
    if evidence.classes:
        claims.append(class_claim(evidence))
    else:
        missing.append("Without labels, differences between classes are not tested.")
    return claims, missing


def depth_claims(evidence: Evidence, missing: list[str]) -> list[Claim]:
    shallow, middle, deep = thirds(evidence.num_layers)
    early, halfway, late = ([layer for layer in part if layer in evidence.depth] for part in (shallow, middle, deep))
    first, last = weights_of(shallow, evidence.num_layers), weights_of(deep, evidence.num_layers)
    claims = []
    if "distance" in evidence.values and early and late:

        def closeness(values: dict[str, Array]) -> Array:
            return np.asarray(1 - mean_over("distance", values, early))

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
                undecided_by="attention reaches farther there, but the weights do not show what is combined: "
                "decoding parts of digits from each layer's tokens could show it",
            )
        )

    def whole(values: dict[str, Array]) -> Array:
        return mean_over("coverage", values, deep)

    claims.append(
        Claim(
            f"Deep layers ({layer_numbers(deep)}) attend to the whole digit",
            (
                excess_requirement("ink", last, "ink against empty patches"),
                excess_requirement("ink", last - first, "ink against empty patches, deep minus shallow"),
                Requirement("effective inked patches", WHOLE, whole, unit="of the inked patches", compared=False),
            ),
        )
    )
    return claims


def point_claims(num_layers: int) -> list[Claim]:
    """Return the claims on points of strokes, each of the mean over layers or of any single one."""

    def anywhere(feature: str) -> tuple[Requirement, ...]:
        places = {"mean over layers": np.full(num_layers, 1 / num_layers)}
        if num_layers > 1:
            places |= {
                f"layer {layer + 1}": weights_of(range(layer, layer + 1), num_layers) for layer in range(num_layers)
            }
        return tuple(
            excess_requirement(feature, weights, f"attention on {feature}, {where}")
            for where, weights in places.items()
        )

    return [
        Claim(
            "The model recognises key points by itself",
            anywhere(KEY_POINTS),
            anywhere=True,
            undecided_by="it attends to them, but attending is not recognising: "
            "moving or erasing such points and comparing predictions could show it",
        ),
        *(
            Claim(f"{name.capitalize()} get more attention than other ink", anywhere(name), anywhere=True)
            for name in POINTS
        ),
    ]


def class_claim(evidence: Evidence) -> Claim:
    """Claim the smallest share of the nested regressions, whichever it is of a control."""

    def share(values: dict[str, Array]) -> Array:
        return values["classes"]

    taken_out = smallest(evidence.classes).taken_out
    requirement = Requirement(
        f"variance of the maps between classes, without what is predicted by {taken_out}",
        MIN_VARIANCE,
        share,
        lambda evidence: smallest(evidence.classes).p_value,
        "random signs of the images' residuals",
        "of the variance",
    )
    return Claim(CLASS_CLAIM, (requirement,))


def weights_of(layers: range, num_layers: int) -> Array:
    """Return the weights of the mean over `layers`: [layer]."""
    weights = np.zeros(num_layers)
    weights[list(layers)] = 1 / len(layers)
    return weights


def layer_numbers(layers: range) -> str:
    """Number layers from 1: "2-4"."""
    return f"{layers[0] + 1}" if len(layers) == 1 else f"{layers[0] + 1}-{layers[-1] + 1}"
