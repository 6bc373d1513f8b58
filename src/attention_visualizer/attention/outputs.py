"""Class scores, probabilities and predictions in a model's output, whatever form it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attention_visualizer.attention.capture import force_eager

#: What an output was made by: a linear map, a sigmoid or softmax, or something else.
Maker = Literal["scores", "probabilities", "unknown"]

# Nodes of autograd's graph, by the functions that they belong to.
LINEAR_MAPS = {"Addmm", "Mm", "Bmm", "Baddbmm", "Addbmm", "Convolution"}
SQUASHING = {"Sigmoid", "Hardsigmoid", "Softmax"}
ARITHMETIC = {"Add", "Sub", "Rsub", "Mul", "Div", "Neg", "Sum"}
SAME_RANGE = {"View", "UnsafeView", "ReshapeAlias", "Alias", "Squeeze", "Unsqueeze", "Select", "Slice", "Permute"}
SAME_RANGE |= {
    "Transpose",
    "T",
    "Expand",
    "Clone",
    "ToCopy",
    "Cat",
    "Stack",
    "Mean",
    "Unbind",
    "Split",
    "Index",
    "Clamp",
}


@dataclass(frozen=True)
class ClassScores:
    """A model's answer for some images, as a classifier of at least two classes."""

    logits: Tensor  # [image, class], with the gradients of the output; of probabilities, their log or log-odds
    probabilities: Tensor | None  # [image, class]; None where they are not known

    @property
    def predicted(self) -> Tensor:
        """The class of each image, [image]."""
        return self.logits.argmax(dim=1)

    @property
    def probability(self) -> Tensor:
        """The predicted class's, [image], NaN where it is not known."""
        if self.probabilities is None:
            return torch.full_like(self.logits[:, 0], torch.nan)
        return self.probabilities.gather(1, self.predicted[:, None])[:, 0]


def class_scores(model: nn.Module, images: Tensor, output: Any) -> ClassScores | None:
    """Return the scores of classes in what `model` returned for `images`; None where there are none.

    Probabilities and log-probabilities, of classes that exclude each other or not, are told from logits. One score is
    that of class 1 against class 0, unless the model declares a regression.
    """
    scores = scores_in(output, len(images))
    if scores is None:
        return None
    problem, rounding = declared_problem(model), torch.finfo(scores.dtype).eps
    scores = scores.float()
    is_share = bool(((scores >= 0) & (scores <= 1)).all())
    is_distribution = is_share and scores.shape[1] > 1 and sums_to_one(scores, max(1e-4, 2 * rounding))
    maker: Maker = "scores"
    if is_share:
        maker = "probabilities" if is_distribution else maker_of(scores, model, images)
    if scores.shape[1] == 1:
        if problem == "regression" or maker == "unknown":
            return None
        score = log_odds(scores) if maker == "probabilities" else scores
        logits = torch.cat([-score, score], dim=1) / 2
        return ClassScores(logits, logits.softmax(dim=1))
    if is_distribution:
        return ClassScores(scores.clamp_min(torch.finfo(torch.float32).tiny).log(), scores)
    if maker == "probabilities":
        return ClassScores(log_odds(scores), scores)
    if maker == "unknown":
        return ClassScores(scores, None)
    # The softmax of log-probabilities is these probabilities.
    is_independent = problem == "multi_label_classification"
    return ClassScores(scores, scores.sigmoid() if is_independent else scores.softmax(dim=1))


def scores_in(output: Any, num_images: int) -> Tensor | None:
    """Return [image, class]: the output itself, its `logits`, or the first of a tuple. None for maps and tokens."""
    if isinstance(output, Mapping) or hasattr(output, "logits"):
        output = output.get("logits") if isinstance(output, Mapping) else output.logits
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.numel() == 0:
        return None
    if output.ndim < 2 and output.numel() == num_images:
        output = output.reshape(num_images, 1)
    return output if output.ndim == 2 and len(output) == num_images else None


def sums_to_one(scores: Tensor, tolerance: float) -> bool:
    return bool(((scores.sum(dim=1) - 1).abs() <= tolerance).all())


def log_odds(probabilities: Tensor) -> Tensor:
    smallest = torch.finfo(torch.float32).eps
    return probabilities.clamp(smallest, 1 - smallest).logit()


def maker_of(scores: Tensor, model: nn.Module, images: Tensor) -> Maker:
    """Return what made scores that all lie between 0 and 1, which logits do by chance, read off the graph of their
    computation; where they have none, that of the first images'."""
    if scores.grad_fn is None:
        with torch.enable_grad(), force_eager():
            few = images[:2].detach().clone().requires_grad_(images.is_floating_point())
            try:
                again = scores_in(model(few), len(few))
            except Exception:  # a model that cannot compute gradients
                return "unknown"
        if again is None or again.grad_fn is None or not torch.allclose(again.float(), scores[:2], atol=1e-3):
            return "unknown"
        scores = again
    return maker_in_graph(scores.grad_fn)


def maker_in_graph(last: Any) -> Maker:
    """Walk back from the last function to those that set the range of its output."""
    makers: set[Maker] = set()
    nodes, seen = [(last, False)], set()
    while nodes:
        node, is_changed = nodes.pop()
        if node is None or (node, is_changed) in seen:
            continue
        seen.add((node, is_changed))
        name = node.name().partition("Backward")[0]
        if name in SAME_RANGE | ARITHMETIC:
            nodes += [(inner, is_changed or name in ARITHMETIC) for inner, _ in node.next_functions]
        elif name in LINEAR_MAPS:
            makers.add("scores")
        elif name in SQUASHING and not is_changed:
            makers.add("probabilities")
        elif not name.startswith("torch::autograd::AccumulateGrad"):
            return "unknown"
    return makers.pop() if len(makers) == 1 else "unknown"


def declared_problem(model: nn.Module) -> str | None:
    """Return what Hugging Face's configuration says that outputs are trained for; of one output, a regression."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "problem_type"):
            problem = config.problem_type
            return "regression" if problem is None and getattr(config, "num_labels", None) == 1 else problem
    return None


def predict(scores: ClassScores | None, num_images: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return each image's predicted class and its probability, [image] both: -1 where nothing is classified, NaN where
    the probability is not known."""
    if scores is None:
        return np.full(num_images, -1), np.full(num_images, np.nan, np.float32)
    return scores.predicted.cpu().numpy(), scores.probability.detach().cpu().numpy()
