"""Edits for `intervene`: switch heads off, average them, make them uniform or one-hot, let them attend as on another
image, permute their keys; one head, a layer or all layers; see attention/edits.py.

with torch.no_grad(), intervene(model, switch_off("blocks.3", head=1)):
    logits = model(images)
"""

from attention_visualizer.attention.edits import (
    attend_as_partner,
    attend_to_maximum,
    in_all_layers,
    make_uniform,
    permute_keys,
    replace_by_mean,
    switch_off,
    together,
)

__all__ = [
    "attend_as_partner",
    "attend_to_maximum",
    "in_all_layers",
    "make_uniform",
    "permute_keys",
    "replace_by_mean",
    "switch_off",
    "together",
]
