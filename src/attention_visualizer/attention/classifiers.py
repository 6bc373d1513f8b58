"""Whether a model classifies: scores of classes look like features, so it is seen from what runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from attention_visualizer.attention.outputs import (
    ClassScores,
    class_scores,
    parts_without_head,
    scores_in,
)


class HeadWatch:
    """What runs last in a model: a module that declares no head, or something learnt behind it."""

    def __init__(self, model: nn.Module, around: nn.Module | None = None) -> None:
        self.model = model
        self.headless, self.learnt = parts_without_head(model)
        self.gives_features = bool(self.headless) and not self.learnt  # until something runs
        self.features: Any = None  # what the last module without a head returned
        parts = list((around or model).modules())
        self.unused: dict[nn.Module, int] = {part: part.in_features for part in parts if isinstance(part, nn.Linear)}
        # Used without being called, and so no head that waits, where there is another that made the scores.
        self.uncalled = {part.out_proj for part in parts if isinstance(part, nn.MultiheadAttention)}
        self.widths: set[int] = set()  # of what linear layers made of one vector an image

    def class_scores(self, images: Tensor, output: Any) -> ClassScores | None:
        """Return the scores of classes in what the model returned for `images`; None where there are none.

        Features are no scores: what a module without a head returned, and what a linear layer that did not run takes
        vectors of that length for.
        """
        scores = scores_in(output, len(images))
        if scores is None or self.gives_features or scores is self.features:
            return None
        width = scores.shape[1]
        waiting = {part for part, size in self.unused.items() if size == width}
        if waiting and not (width in self.widths and waiting <= self.uncalled):
            return None
        return class_scores(self.model, images, output)

    def _note_features(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.gives_features, self.features = True, output

    def _note_learnt(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.gives_features = False

    def _note_use(self, module: nn.Module, inputs: Any) -> None:
        self.unused.pop(module, None)
        if isinstance(module, nn.Linear) and inputs and inputs[0].ndim == 2:
            self.widths.add(module.out_features)


@contextmanager
def watched_head(model: nn.Module, around: nn.Module | None = None) -> Iterator[HeadWatch]:
    """Watch what runs in `model` inside the block. `around`: the module that it is a part of, whose head may wait."""
    watch = HeadWatch(model, around)
    hooks = [part.register_forward_pre_hook(watch._note_use) for part in watch.unused]
    if watch.headless:
        hooks += [part.register_forward_hook(watch._note_learnt) for part in watch.learnt]
        hooks += [part.register_forward_hook(watch._note_features) for part in watch.headless]
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()
