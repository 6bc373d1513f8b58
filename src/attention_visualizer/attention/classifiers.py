"""Whether a model classifies: scores of classes look like features, so it is seen from what runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from attention_visualizer.attention.outputs import ClassScores, class_scores, scores_in

CLASSIFIER_NAMES = ("head", "heads", "fc", "classifier", "mlp_head")


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


def declares_no_head(module: nn.Module) -> bool:
    """Whether a module declares no classes, had its head removed, or is Hugging Face's model without one."""
    heads = [head for name in CLASSIFIER_NAMES if (head := getattr(module, name, None)) is not None]
    if any(isinstance(head, nn.Identity) for head in heads) or getattr(module, "num_classes", None) == 0:
        return True
    return not heads and hasattr(module, "config") and getattr(module, "base_model", None) is module


def parts_without_head(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return the modules that declare no head, and those outside them that have learnt matrices of their own."""
    headless = [module for module in model.modules() if declares_no_head(module)]
    inside = {id(part) for each in headless for part in each.modules()}
    return headless, [module for module in model.modules() if id(module) not in inside and has_matrix(module)]


def has_matrix(module: nn.Module) -> bool:
    """Whether a module has a matrix of its own: a parameter, or what quantised layers keep in its place."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    known = [tensor for tensor in own if not is_lazy(tensor)]
    return any(sum(size > 1 for size in tensor.shape) > 1 for tensor in known) or hasattr(module, "_packed_params")
