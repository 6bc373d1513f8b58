"""The names of classes that a model declares."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn


def declared_class_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of classes that the outermost part with any declares: Hugging Face's `config.id2label`, timm's
    label names, or a list `class_names` or `classes`; none where there are only placeholders."""
    for module in model.modules():
        labels = getattr(getattr(module, "config", None), "id2label", None)
        config: Any = getattr(module, "pretrained_cfg", None)
        names = config.get("label_names") if isinstance(config, Mapping) else None
        for each in (names, getattr(module, "class_names", None), getattr(module, "classes", None)):
            if isinstance(each, list | tuple) and each and all(isinstance(name, str) for name in each):
                labels = dict(enumerate(each))
        if isinstance(labels, Mapping) and labels and all(str(number).isdecimal() for number in labels):
            known = {int(number): str(name) for number, name in labels.items()}
            if not all(re.fullmatch(r"LABEL_\d+", name) for name in known.values()):
                return tuple(known.get(number, str(number)) for number in range(max(known) + 1))
    return ()
