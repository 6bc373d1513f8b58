"""Images that a process has twice: a sampler for several processes fills up their shares to the same number."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch.utils.data import DistributedSampler


class BatchShare(NamedTuple):
    """How many images a batch has, and how many of them, its last ones, another process counts."""

    images: int
    repeated: int


def share_of_batch(loader: Any, number: int) -> BatchShare | None:
    """Return the share of a loader's batch, by its number; None where none of its images are repeated."""
    batches = getattr(loader, "batch_sampler", None)
    sampler, size = getattr(batches, "sampler", None), getattr(batches, "batch_size", None)
    if not isinstance(sampler, DistributedSampler) or size is None:
        return None
    own = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # type: ignore[arg-type]
    start, end = number * size, min((number + 1) * size, sampler.num_samples)
    repeated = end - max(start, own)
    return BatchShare(end - start, repeated) if repeated > 0 else None
