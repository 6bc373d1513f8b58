"""What attention maps say, as pure functions on any device.

`weights` is one layer's attention after softmax, `[batch, head, query, key]`, each row a distribution over keys;
a `Geometry` says which tokens are patches and where they lie.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from attention_visualizer.geometry import Geometry

# Which rows are looked at: the class token's, the mean over all patch queries, or one patch's (row, column).
Query = Literal["cls", "patches"] | tuple[int, int]


def attention_entropy(weights: Tensor) -> Tensor:
    """Shannon entropy of each row in nats, 0 ln 0 = 0 (Zhai et al., 2023): [..., key] -> [...]."""
    return -torch.special.xlogy(weights, weights).sum(dim=-1)


def effective_tokens(weights: Tensor) -> Tensor:
    """exp(entropy): the number of keys that a uniform row of the same entropy would attend to."""
    return attention_entropy(weights).exp()


def query_attention(weights: Tensor, geometry: Geometry, query: Query) -> Tensor:
    """The attention of one query set over all keys: [batch, head, query, key] -> [batch, head, key].

    "cls" is the first prefix token's row, "patches" the mean over the patch queries, (row, column) one patch.
    """
    if query == "cls":
        if geometry.num_prefix_tokens == 0:
            raise ValueError("this model has no class token: ask for the patches' attention")
        return weights[:, :, 0]
    if query == "patches":
        return weights[:, :, geometry.num_prefix_tokens :].mean(dim=2)
    return weights[:, :, geometry.token_of_patch(*query)]


def readout_query(geometry: Geometry) -> Literal["cls", "patches"]:
    """The query set that the classification reads: the class token where there is one, else all patches."""
    return "cls" if geometry.num_prefix_tokens else "patches"


def patch_attention(query_weights: Tensor, geometry: Geometry) -> Tensor:
    """The share of each patch key, prefix keys left out, not renormalised: [..., key] -> [..., patch]."""
    return query_weights[..., geometry.num_prefix_tokens :]


def query_entropy(weights: Tensor, geometry: Geometry, query: Query) -> Tensor:
    """Entropy in nats of the query's row over all keys, for "patches" the mean of the rows' entropies.

    [batch, head, query, key] -> [batch, head].
    """
    if query == "patches":
        return attention_entropy(weights[:, :, geometry.num_prefix_tokens :]).mean(dim=-1)
    return attention_entropy(query_attention(weights, geometry, query))


def readout_entropy(weights: Tensor, geometry: Geometry) -> Tensor:
    """Entropy of the readout query: [batch, head, query, key] -> [batch, head]."""
    return query_entropy(weights, geometry, readout_query(geometry))


def maximum_attention(weights: Tensor, geometry: Geometry) -> Tensor:
    """Largest weight that the readout query gives to any patch key: [batch, head, query, key] -> [batch, head]."""
    return _readout_patches(weights, geometry).amax(dim=-1)


def mean_attention(weights: Tensor, geometry: Geometry) -> Tensor:
    """Mean weight that the readout query gives to a patch key: [batch, head, query, key] -> [batch, head].

    Over all keys it would be 1 / N always; over patch keys it is what the prefix tokens leave to the image.
    """
    return _readout_patches(weights, geometry).mean(dim=-1)


def _readout_patches(weights: Tensor, geometry: Geometry) -> Tensor:
    return patch_attention(query_attention(weights, geometry, readout_query(geometry)), geometry)


def mean_attention_distance(weights: Tensor, geometry: Geometry) -> Tensor:
    """Mean distance in pixels between a patch query and the patches it attends to, itself included.

    Patch keys are renormalised to 1 for each query (Dosovitskiy et al., 2021; Raghu et al., 2021).
    [batch, head, query, key] -> [batch, head].
    """
    patches = weights[:, :, geometry.num_prefix_tokens :, geometry.num_prefix_tokens :]
    centers = geometry.patch_centers(weights.device).to(weights.dtype)
    distances = torch.cdist(centers, centers)
    weighted = (patches * distances).sum(dim=-1)
    mass = patches.sum(dim=-1).clamp_min(torch.finfo(weights.dtype).tiny)
    return (weighted / mass).mean(dim=-1)


def attention_rollout(layers: Iterable[Tensor]) -> Tensor:
    """Attention through the residual stream, from the first layer to the last: -> [batch, query, key].

    Product of (mean over heads + identity) / 2, later layers on the left (Abnar and Zuidema, 2020).
    """
    rollout = None
    for weights in layers:
        rollout = rollout_step(rollout, weights)
    if rollout is None:
        raise ValueError("rollout needs at least one layer")
    return rollout


def rollout_step(rollout: Tensor | None, weights: Tensor) -> Tensor:
    """The rollout up to and including one more layer; None before the first."""
    attention = weights.mean(dim=1)
    step = (attention + torch.eye(attention.shape[-1], dtype=attention.dtype, device=attention.device)) / 2
    # Rows of softmax sum to 1 only to rounding; normalising keeps a deep product a distribution.
    step = step / step.sum(dim=-1, keepdim=True)
    return step if rollout is None else step @ rollout


def jensen_shannon_divergence(first: Tensor, second: Tensor) -> Tensor:
    """Divergence of two sets of distributions in nats, 0 to ln 2 (Lin, 1991): [..., key] twice -> [...]."""
    mixture = (first + second) / 2
    return (attention_entropy(mixture) - (attention_entropy(first) + attention_entropy(second)) / 2).clamp_min(0.0)


def uniform_entropy(num_keys: int) -> float:
    """Entropy of a row that prefers nothing: the largest there is, ln N."""
    return math.log(num_keys)
