"""Class scores and predictions in a model's output, whatever form it has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

CLASSIFIER_NAMES = ("head", "heads", "fc", "classifier", "mlp_head")


def logits_of(output: Any) -> Tensor | None:
    """Return the class scores [image, class] in a model's output: itself, its `logits`, or the first of a tuple.

    None where there are no scores, as in feature maps or tokens.
    """
    if isinstance(output, Mapping) or hasattr(output, "logits"):
        output = output.get("logits") if isinstance(output, Mapping) else output.logits
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) and output.ndim == 2 and output.shape[1] > 1 else None


def has_head(model: nn.Module) -> bool:
    """Whether the model has a classification head.

    Where it declares no classes or its head was removed, its features would look like scores."""
    is_removed = any(isinstance(getattr(model, name, None), nn.Identity) for name in CLASSIFIER_NAMES)
    return not is_removed and getattr(model, "num_classes", None) != 0


def predict(output: Any, num_images: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return each image's predicted class and its probability, [image] both; -1 and NaN where nothing is classified."""
    logits = logits_of(output)
    if logits is None or len(logits) != num_images:
        return np.full(num_images, -1), np.full(num_images, np.nan, np.float32)
    probability, predicted = logits.detach().float().softmax(dim=-1).max(dim=-1)
    return predicted.cpu().numpy(), probability.cpu().numpy()
