"""What is logged is called, described and found by: tags of pictures, their descriptions, where to look."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from attention_visualizer.figures.attention_figures import class_name
from attention_visualizer.measures.observation import Observation
from attention_visualizer.watching.lightning_internals import is_tensorboard
from attention_visualizer.watching.lightning_package import Trainer

DESCRIPTIONS = {
    "maps": "What is attended to, on all probe images, layer by layer (mean over heads). White is uniform attention.",
    "layers": "One probe image: each layer's attention (mean over heads) with its entropy H in nats, and the rollout.",
    "heads": "One probe image: the attention of each head, layers down, heads across.",
    "entropy": "Mean entropy of each head's attention over the validation set: dark is one patch, yellow uniform.",
    "watching": "What AttentionLogger took since the validation before: seconds, and as a share of all time.",
}


def image_tags(labels: Sequence[int], names: Sequence[str]) -> list[str]:
    """Return what each probe image is called in tags: its class, where that says which one it is."""
    tags = []
    for number, label in enumerate(labels):
        name = f"class_{class_name(names, label)}"
        known = label >= 0 and list(labels).count(label) == 1
        tags.append(name if known else f"image_{number}" + (f"_{name}" if label >= 0 else ""))
    return tags


def size_of_attention(observation: Observation) -> str:
    """Return the size of the attention that was found."""
    _, layers, heads = observation.head_maps.shape[:3]
    keys = sorted(set(observation.num_keys))
    tokens = f"{keys[0]}" if len(keys) == 1 else f"{keys[0]} to {keys[-1]}"
    return f"{layers} layers x {heads} heads, {tokens} tokens"


def tensorboard_command(folder: str) -> str:
    """Return the command that shows a folder's logs, with all steps of its pictures instead of ten."""
    return shlex.join(["tensorboard", "--logdir", folder, "--samples_per_plugin", "images=200"])


def where_to_look(trainer: Trainer) -> str:
    """Return what a training without validation lacks and the command that shows the pictures, where TensorBoard has
    any, each after "; "."""
    lacking = "" if trainer.enable_validation else "; without validation only the first batches are watched"
    boards = [logger.log_dir.rstrip("/") for logger in trainer.loggers if is_tensorboard(logger)]
    return lacking + (f"; {tensorboard_command(boards[0])}" if boards else "")
