"""Measures of attention maps: entropy, distance, rollout and the like, as pure functions on any device.

`weights` is one layer's attention after softmax, `[batch, head, query, key]`, each row a distribution over keys;
a `Geometry` says which tokens are patches and where they lie.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from attention_visualizer.attention.geometry import Geometry

# Whose attention is read: the class token's, the mean over all patch queries, or one patch's (row, column).
Query = Literal["cls", "patches"] | tuple[int, int]
# How rollout joins the heads of a layer.
Fusion = Literal["mean", "max", "min"]


def attention_entropy(weights: Tensor) -> Tensor:
    """Return the Shannon entropy of each row in nats, 0 ln 0 = 0 (Zhai et al., 2023): [..., key] -> [...]."""
    return -torch.special.xlogy(weights, weights).sum(dim=-1)


def effective_tokens(weights: Tensor) -> Tensor:
    """Return exp(entropy): the number of keys that a uniform row of the same entropy would attend to."""
    return attention_entropy(weights).exp()


def is_self_attention(weights: Tensor, geometry: Geometry) -> bool:
    """Return whether queries and keys are the same tokens; they are not for an attention-pooling query, for example."""
    return weights.shape[-2] == geometry.num_tokens


def query_attention(weights: Tensor, geometry: Geometry, query: Query) -> Tensor:
    """Return the attention of one query set over all keys: [batch, head, query, key] -> [batch, head, key].

    "cls" is the first prefix token's row, "patches" the mean over the patch queries, (row, column) one patch. A layer
    that pools, with queries of its own, has the mean over them whatever is asked for. Raise ValueError for "cls" where
    there is no class token.
    """
    if not is_self_attention(weights, geometry):
        return weights.mean(dim=2)
    if query == "cls":
        if geometry.num_prefix_tokens == 0:
            raise ValueError("this model has no class token: ask for the patches' attention")
        return weights[:, :, 0]
    if query == "patches":
        return weights[:, :, geometry.num_prefix_tokens :].mean(dim=2)
    return weights[:, :, geometry.token_of_patch(*query)]


def readout_query(geometry: Geometry) -> Literal["cls", "patches"]:
    """Return the query set that the classification reads: the class token if it reads one, else all patches."""
    return "cls" if geometry.num_prefix_tokens and geometry.class_token == "read" else "patches"


def patch_attention(query_weights: Tensor, geometry: Geometry) -> Tensor:
    """Return the share of each patch key, prefix keys left out, not renormalised: [..., key] -> [..., patch]."""
    return query_weights[..., geometry.num_prefix_tokens :]


def query_entropy(weights: Tensor, geometry: Geometry, query: Query) -> Tensor:
    """Return the entropy in nats of the query's row over all keys, for "patches" the mean of the rows' entropies.

    [batch, head, query, key] -> [batch, head].
    """
    if not is_self_attention(weights, geometry):
        return attention_entropy(weights).mean(dim=-1)
    if query == "patches":
        return attention_entropy(weights[:, :, geometry.num_prefix_tokens :]).mean(dim=-1)
    return attention_entropy(query_attention(weights, geometry, query))


def readout_entropy(weights: Tensor, geometry: Geometry) -> Tensor:
    """Return the entropy of the readout query: [batch, head, query, key] -> [batch, head]."""
    return query_entropy(weights, geometry, readout_query(geometry))


def maximum_attention(weights: Tensor, geometry: Geometry) -> Tensor:
    """Return the readout query's largest weight on a patch key: [batch, head, query, key] -> [batch, head]."""
    return _readout_patches(weights, geometry).amax(dim=-1)


def mean_attention(weights: Tensor, geometry: Geometry) -> Tensor:
    """Return the mean weight that the readout query gives to a patch key: [batch, head, query, key] -> [batch, head].

    Over all keys it would be 1 / N always; over patch keys it is what the prefix tokens leave to the image.
    """
    return _readout_patches(weights, geometry).mean(dim=-1)


def readout_effective_tokens(weights: Tensor, geometry: Geometry) -> Tensor:
    """Return exp(entropy) of the readout query, for "patches" the mean over them: [batch, head, query, key] -> [batch,
    head].

    It is the mean of exponentials, which is not the exponential of the mean.
    """
    if not is_self_attention(weights, geometry):
        return effective_tokens(weights).mean(dim=-1)
    if readout_query(geometry) == "cls":
        return effective_tokens(weights[:, :, 0])
    return effective_tokens(weights[:, :, geometry.num_prefix_tokens :]).mean(dim=-1)


def head_confidence(weights: Tensor, geometry: Geometry) -> Tensor:
    """Return the mean over all queries of the largest weight, over all keys (Voita et al., 2019): [batch, head]."""
    return weights.amax(dim=-1).mean(dim=-1)


def reads_class_token(weights: Tensor, geometry: Geometry) -> bool:
    """Return whether the classification reads a class token that attends to itself among the others."""
    return is_self_attention(weights, geometry) and readout_query(geometry) == "cls"


def class_token_self_attention(weights: Tensor, geometry: Geometry) -> Tensor:
    """Return the class token's weight on itself: [batch, head, query, key] -> [batch, head]."""
    return weights[:, :, 0, 0]


def _readout_patches(weights: Tensor, geometry: Geometry) -> Tensor:
    return patch_attention(query_attention(weights, geometry, readout_query(geometry)), geometry)


def mean_attention_distance(weights: Tensor, geometry: Geometry) -> Tensor:
    """Return the mean distance in pixels between a patch query and the patches it attends to, itself included.

    Patch keys are renormalised to 1 for each query (Dosovitskiy et al., 2021; Raghu et al., 2021). NaN where the
    queries are not the patches. [batch, head, query, key] -> [batch, head].
    """
    if not is_self_attention(weights, geometry):
        return torch.full_like(weights[:, :, 0, 0], math.nan)
    # Both sums run over it, and a contiguous copy is a third faster.
    patches = weights[:, :, geometry.num_prefix_tokens :, geometry.num_prefix_tokens :].contiguous()
    centers = geometry.patch_centers(weights.device).to(weights.dtype)
    distances = torch.cdist(centers, centers)
    weighted = (patches * distances).sum(dim=-1)
    mass = patches.sum(dim=-1).clamp_min(torch.finfo(weights.dtype).tiny)
    return (weighted / mass).mean(dim=-1)


def attention_rollout(layers: Iterable[Tensor], fusion: Fusion = "mean", discard: float = 0.0) -> Tensor:
    """Return attention through the residual stream, from the first layer to the last: [batch, query, key].

    It is the product of (heads joined + identity), rows brought to sum 1, later layers on the left (Abnar and Zuidema,
    2020).
    """
    rollout = None
    for weights in layers:
        rollout = rollout_step(rollout, weights, fusion, discard)
    if rollout is None:
        raise ValueError("rollout needs at least one layer")
    return rollout


def rollout_step(rollout: Tensor | None, weights: Tensor, fusion: Fusion = "mean", discard: float = 0.0) -> Tensor:
    """Return the rollout up to and including one more layer. rollout: up to the layer before, None for the first.

    discard: the share of each row's keys, those of least weight, that is set to 0 before the identity is added.
    """
    if fusion == "mean":
        attention = weights.mean(dim=1)
    else:
        attention = weights.amax(dim=1) if fusion == "max" else weights.amin(dim=1)
    num_discarded = int(discard * attention.shape[-1] + 1e-9)  # 0.29 * 100 is a little less than 29
    if num_discarded:
        least = attention.topk(num_discarded, dim=-1, largest=False).indices
        attention = attention.scatter(-1, least, 0.0)
    step = attention + torch.eye(attention.shape[-1], dtype=attention.dtype, device=attention.device)
    step = step / step.sum(dim=-1, keepdim=True)
    return step if rollout is None else step @ rollout


def positive_gradient_attention(weights: Tensor, gradients: Tensor) -> Tensor:
    """Return the attention that raises the class score: mean over heads of (gradient * weights)^+.

    gradients: of the class score with respect to `weights`. [batch, head, query, key] -> [batch, query, key].
    """
    return (gradients * weights).clamp_min(0.0).mean(dim=1)


def relevance_step(relevance: Tensor | None, weights: Tensor, gradients: Tensor) -> Tensor:
    """Return the relevance of each key to each query, up to and including one more layer: [batch, query, key].

    relevance: up to the layer before, None for the first. R <- R + mean over heads of (gradient * weights)^+ R, from
    the identity: the rule for self-attention of Chefer et al. (ICCV 2021), "Generic Attention-model Explainability".
    """
    if relevance is None:
        relevance = torch.eye(weights.shape[-1], dtype=weights.dtype, device=weights.device).expand(
            len(weights), -1, -1
        )
    return relevance + positive_gradient_attention(weights, gradients) @ relevance


def value_weighted_attention(weights: Tensor, values: Tensor, projection: Tensor | None = None) -> Tensor:
    """Return the length of what each key contributes: the norm of A_ij v_j W_O (Kobayashi et al., 2020).

    values: [batch, head, key, head_dim]; projection: the weight of the output projection [embed, head * head_dim],
    None to measure A_ij v_j before it. -> [batch, head, query, key], in the units of the residual stream.
    """
    if projection is not None:
        heads = projection.to(values.dtype).unflatten(1, (values.shape[1], values.shape[3]))  # (embed, head, head_dim)
        values = torch.einsum("bhkd,ehd->bhke", values, heads)
    return weights * torch.linalg.vector_norm(values, dim=-1)[:, :, None]


def column_mass(weights: Tensor) -> Tensor:
    """Return what each key receives, mean over the queries: [batch, head, query, key] -> [batch, head, key]."""
    return weights.mean(dim=2)


def sink_strength(weights: Tensor, geometry: Geometry) -> Tensor:
    """Return the share of all attention that the most attended key receives, prefix tokens included: [batch, head].

    It is 1 / N where attention is uniform; an attention sink (Xiao et al., 2023; Darcet et al., 2023) draws much more.
    """
    return column_mass(weights).amax(dim=-1)


def head_divergence(weights: Tensor, geometry: Geometry) -> Tensor:
    """Return the mean Jensen-Shannon divergence of each head from the layer's other heads, between the rows of the
    readout query, in nats (Clark et al., 2019): [batch, head, query, key] -> [batch, head]; NaN in a layer of one head.
    """
    return head_divergences(weights, geometry).sum(dim=-1) / (weights.shape[1] - 1 or math.nan)


def head_divergences(weights: Tensor, geometry: Geometry) -> Tensor:
    """Return the divergence between every two heads of the layer: [batch, head, query, key] -> [batch, head, head]."""
    rows = query_attention(weights, geometry, readout_query(geometry))
    return jensen_shannon_divergence(rows[:, :, None], rows[:, None])


def jensen_shannon_divergence(first: Tensor, second: Tensor) -> Tensor:
    """Return the divergence of two sets of distributions in nats, 0 to ln 2 (Lin, 1991): [..., key] twice -> [...]."""
    mixture = (first + second) / 2
    return (attention_entropy(mixture) - (attention_entropy(first) + attention_entropy(second)) / 2).clamp_min(0.0)


def uniform_entropy(num_keys: int) -> float:
    """Return the entropy of a uniform row in nats, ln N: the largest there is."""
    return math.log(num_keys)


def uniform_distance(geometry: Geometry) -> float:
    """Return the mean attention distance of uniform attention in pixels, positive for a single patch too."""
    centers = geometry.patch_centers()
    return max(float(torch.cdist(centers, centers).mean()), 1e-9)
