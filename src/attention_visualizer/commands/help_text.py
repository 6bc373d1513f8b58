"""`--help`: each field with its value and what it means; and the field that a misspelt one was probably meant to be."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from attention_visualizer.support.invocation import invocation
from attention_visualizer.support.text import nearest

NAME_WIDTH = 38  # characters before the explanations
SUGGESTIONS = 3
ABBREVIATIONS = {"lr": "learning_rate", "wd": "weight_decay", "bs": "batch_size", "epochs": "max_epochs"}

# Of train.py; those of analyze.py are the comments in conf/analyze.yaml.
EXPLANATIONS = {
    "model.img_size": "pixels of a side; must be the data set's",
    "model.patch_size": "pixels of a patch's side; divides img_size",
    "model.in_channels": "must be the data set's",
    "model.num_classes": "must be the data set's",
    "model.embed_dim": "width of a token; a multiple of num_heads",
    "model.num_heads": "attention heads of a layer",
    "model.num_layers": "transformer blocks",
    "model.mlp_dim": "hidden width of each block's MLP",
    "model.dropout": "after the embedding and the attention projection, and in the MLP: 0 up to 1",
    "model.attention_dropout": "of attention weights: 0 up to 1",
    "model.positional_embedding": "learned, sincos or none",
    "model.pooling": "cls: classify from a class token; mean: from the mean patch",
    "model.stem": "how patches become tokens: patches (one linear map) or convolutions",
    "data.name": "mnist or digits (scikit-learn's)",
    "data.data_dir": "folder of MNIST's files; null: the environment variable MNIST_DIR, or data/",
    "data.fallback": "used instead where MNIST is not available; null: that is an error",
    "data.batch_size": "training images a step; null: 128 for mnist, 32 for digits",
    "data.eval_batch_size": "images a step without gradients",
    "data.split_seed": "which images are for validation",
    "data.augment": "move training images at random, by at most what the next five fields say",
    "data.rotation": "degrees",
    "data.translation": "pixels",
    "data.scaling": "share of the size",
    "data.shear": "pixels sideways for each pixel down",
    "data.elastic": "deviation of a smooth displacement, pixels",
    "data.fade": "the last share of training, in which augmentation falls to zero",
    "optimizer.learning_rate": "its highest value, after the warm-up",
    "optimizer.weight_decay": "on weight matrices only",
    "optimizer.beta1": "decay of AdamW's mean gradient",
    "optimizer.beta2": "decay of its mean squared gradient",
    "optimizer.warmup_share": "the first share of training, with a rising learning rate",
    "optimizer.label_smoothing": "0 up to 1",
    "optimizer.muon": "Muon for the blocks' matrices, AdamW for the rest",
    "trainer.accelerator": "auto, cpu or gpu",
    "trainer.devices": "1: this program trains on one device",
    "trainer.precision": "null: chosen by the trainer group, 32-true on CPUs",
    "trainer.max_epochs": "null: 10 for mnist, 60 for digits",
    "trainer.max_steps": "-1: as many as the epochs have",
    "trainer.max_time": "such as '00:01:30:00' (days:hours:minutes:seconds)",
    "trainer.limit_train_batches": "a number or a share of each epoch's batches; null: all",
    "trainer.limit_val_batches": "the same in validation",
    "trainer.val_check_interval": "validate after this share, or number, of an epoch's batches; null: at its end",
    "trainer.check_val_every_n_epoch": "validate after every n-th epoch",
    "trainer.log_every_n_steps": "log the training loss after every n-th step",
    "trainer.enable_progress_bar": "null: in a terminal",
    "trainer.enable_model_summary": "Lightning's table of modules",
    "trainer.accumulate_grad_batches": "batches for each step of the optimiser",
    "trainer.gradient_clip_val": "largest norm of the gradient; null: not limited",
    "trainer.deterministic": "true: only deterministic kernels on a GPU",
    "callbacks.attention_logger.every_n_epochs": "watch attention at every n-th epoch",
    "callbacks.attention_logger.early_frames": "pictures after 1, 2, 4, 8 ... batches of the first epoch",
    "callbacks.attention_logger.head_grids": "images with a picture of all layers x heads",
    "callbacks.attention_logger.model": "dotted path of the model to watch; null: found automatically",
    "callbacks.attention_logger.per_head_scalars": "a curve for each head, too",
    "seed": "of weights, order, augmentation and dropout",
    "ckpt_path": "resume this run: its checkpoints/last.ckpt",
    "resume": "auto: go on with the newest unfinished run of these settings, or begin one",
    "export": "write the best weights as checkpoints/best.safetensors, too",
    "compile": "torch.compile while training: for GPUs, it slows CPUs down",
    "test": "test best.ckpt at the end; null: yes, but not for a sweep's jobs",
    "runs_dir": "where run folders are made",
}
HIDDEN = ("run_folder", "logger.", "callbacks.ema.")  # set by the program, or by the choice of a group


def fields_of(conf: Path, name: str, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], DictConfig]:
    """Return the fields that there are by dotted name, with their values, and Hydra's part of the config."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf), job_name=name):
        config = compose(name, list(overrides), return_hydra_config=True)
    hydra = config.hydra
    content: Any = OmegaConf.to_container(config)
    return dict(leaves({key: value for key, value in content.items() if key != "hydra"})), hydra


def leaves(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        elif key != "_target_":
            yield f"{prefix}{key}", value


def explanations_of(conf: Path, name: str) -> dict[str, str]:
    if name == "train":
        return EXPLANATIONS
    lines = (conf / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return dict(match.groups() for line in lines if (match := re.match(r"(\w+): .*?  # (.*)", line)))  # type: ignore[misc]


def help_text(conf: Path, name: str, overrides: Sequence[str] = ()) -> str:
    """Return what `--help` prints. Raise Hydra's errors for overrides that cannot be composed."""
    fields, hydra = fields_of(conf, name, overrides)
    explained = explanations_of(conf, name)
    width = max(60, min(120, shutil.get_terminal_size().columns))
    lines = [as_typed(str(hydra.help.template)).rstrip(), ""]
    groups = sorted(folder.name for folder in conf.iterdir() if folder.is_dir()) if name == "train" else []
    if groups:
        lines.append("Groups (group=choice; logger=[tensorboard,csv] for several):")
        for group in groups:
            choices = sorted(file.stem for file in (conf / group).glob("*.yaml"))
            lines += textwrap.wrap(
                f"{group}: {', '.join(choices)}", width, initial_indent="  ", subsequent_indent="    "
            )
        lines.append("")
    lines.append("Fields and their values (field=value):")
    others = []
    for field, value in fields.items():
        if field.startswith(HIDDEN):
            continue
        if field not in explained:
            others.append(field)
            continue
        shown = f"  {field}={yaml.safe_dump(value, default_flow_style=True, width=1000).split(chr(10))[0]}"
        first = shown.ljust(NAME_WIDTH) + " "
        if len(shown) > NAME_WIDTH:
            lines.append(shown)
            first = " " * (NAME_WIDTH + 1)
        lines += textwrap.wrap(explained[field], width, initial_indent=first, subsequent_indent=" " * (NAME_WIDTH + 1))
    if others:
        more = ", ".join(other.removeprefix("trainer.") for other in others)
        lines += ["", *textwrap.wrap(f"Further fields of trainer., as Lightning's Trainer has them: {more}", width)]
    return "\n".join([*lines, ""])


def as_typed(text: str) -> str:
    """Write the commands in `text` as this process was started."""
    for command in ("train", "analyze"):
        text = text.replace(f"python {command}.py", " ".join(invocation(command)))
    return text


def did_you_mean(conf: Path, name: str, words: Sequence[str]) -> str:
    """Return, for a line of error, the fields that unknown ones among the overrides were probably meant to be."""
    fields, _ = fields_of(conf, name)
    groups = {part for field in fields for part in (field.partition(".")[0], field.rpartition(".")[0])}
    groups |= {folder.name for folder in conf.iterdir() if folder.is_dir()} | {"hydra"}
    meant = []
    for word in words:
        key = word.lstrip("+~-").partition("=")[0].partition("@")[0]
        if key and key not in fields and key not in groups and not key.startswith("hydra."):
            meant += nearest_fields(key, list(fields))
    return f"; did you mean {' or '.join(f'{each}=' for each in meant)}?" if meant else ""


def nearest_fields(key: str, fields: Sequence[str]) -> list[str]:
    """Return the fields that `key` was probably meant to be: by its last part, which is all that many remember."""
    by_last_part: dict[str, list[str]] = {}
    for field in fields:
        by_last_part.setdefault(field.rpartition(".")[2], []).append(field)
    asked = key.rpartition(".")[2]
    asked = ABBREVIATIONS.get(asked, asked)
    found = [asked] if asked in by_last_part else nearest(asked, by_last_part, SUGGESTIONS)
    return [field for last_part in found for field in by_last_part[last_part]][:SUGGESTIONS]
