"""Edits for `intervene`: switch heads off, average them, make them uniform, permute their keys; see attention/edits.py.

with torch.no_grad(), intervene(model, switch_off("blocks.3", head=1)):
    logits = model(images)
"""

from attention_visualizer.attention.edits import make_uniform, permute_keys, replace_by_mean, switch_off

__all__ = ["make_uniform", "permute_keys", "replace_by_mean", "switch_off"]
