"""Control models that have learnt something, but nothing about the classes: shuffled labels, learnt by heart
(Zhang et al., 2017)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attention_visualizer.attention.outputs import class_scores
from attention_visualizer.files import atomic
from attention_visualizer.files.digests import model_digest
from attention_visualizer.files.tensor_files import existing_file, read_tensor_file
from attention_visualizer.files.weights import bare_names, check_weights
from attention_visualizer.models.untrained import random_weights
from attention_visualizer.support.errors import UserError

MAX_IMAGES = 500  # that are learnt by heart
LEARNT = 0.95  # of them, from which they count as learnt by heart
MAX_EPOCHS = 100  # the default model needs about 20
BATCH, LEARNING_RATE, MAX_NORM = 50, 1e-3, 1.0


def learn_shuffled_labels(
    model: nn.Module, inputs: Tensor, labels: Tensor, seed: int, progress: Callable[[str], None] = lambda _: None
) -> nn.Module | None:
    """Return the model, begun anew with random weights, that knows shuffled labels of these images by heart; None for
    one that does not learn them.

    inputs: as the model expects them, [image, channel, height, width]; labels: [image]. In eval mode throughout, so
    that nothing depends on the global random state.
    """
    learner = random_weights(model, seed).requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    count = len(inputs)
    shuffled = labels[torch.randperm(count, generator=generator).to(labels.device)]
    optimizer = torch.optim.AdamW(learner.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    right = 0
    with torch.enable_grad():
        for epoch in range(MAX_EPOCHS):
            progress(f"epoch {epoch + 1}, {right / count:.0%} learnt")
            right = 0
            for rows in torch.randperm(count, generator=generator).to(labels.device).split(BATCH):
                scores = class_scores(learner, inputs[rows], learner(inputs[rows]))
                if scores is None or not scores.logits.requires_grad:  # a model that cuts its own gradients off
                    return None
                optimizer.zero_grad()
                cross_entropy(scores.logits, shuffled[rows]).backward()
                nn.utils.clip_grad_norm_(learner.parameters(), MAX_NORM)
                optimizer.step()
                right += int((scores.logits.argmax(dim=1) == shuffled[rows]).sum())
            if right >= LEARNT * count:
                return learner.requires_grad_(False)
    return None


def kept_or_learnt(
    folder: Path | None,
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    seed: int,
    progress: Callable[[str], None] = lambda _: None,
) -> nn.Module | None:
    """Return `learn_shuffled_labels`, read from `folder` where an earlier analysis has kept it, and kept there."""
    if folder is None:
        return learn_shuffled_labels(model, inputs, labels, seed, progress)
    path = folder / f"shuffled_labels_{seed}_{recipe_digest(model, inputs, labels, seed)}.pth"
    with suppress(UserError, RuntimeError):  # missing, damaged or of another shape: it is learnt anew
        file = read_tensor_file(existing_file(path))
        weights = bare_names(file.content, path)
        check_weights(weights, path, file.size)
        learner = random_weights(model, seed)
        learner.load_state_dict(weights)
        return learner
    learnt = learn_shuffled_labels(model, inputs, labels, seed, progress)
    if learnt is not None:
        with suppress(UserError), atomic.atomic_path(path) as temporary:  # a full disk costs the next analysis a minute
            torch.save({name: tensor.cpu() for name, tensor in learnt.state_dict().items()}, temporary)
    return learnt


def recipe_digest(model: nn.Module, inputs: Tensor, labels: Tensor, seed: int) -> str:
    """Return 16 hex digits that tell apart what control models come from: initial weights, images, labels, recipe."""
    digest = hashlib.sha256(model_digest(random_weights(model, seed)).encode())
    digest.update(inputs.float().cpu().contiguous().numpy().tobytes())
    digest.update(labels.cpu().contiguous().numpy().tobytes())
    digest.update(repr((LEARNT, MAX_EPOCHS, BATCH, LEARNING_RATE, MAX_NORM)).encode())
    return digest.hexdigest()[:16]
