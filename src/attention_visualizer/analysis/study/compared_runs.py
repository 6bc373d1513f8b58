"""From `runs=<glob>` to runs that can be compared: their weights, checked, and the settings in which they differ."""

from __future__ import annotations

import glob
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from attention_visualizer.files.digests import weights_digest
from attention_visualizer.files.plain_files import read_yaml
from attention_visualizer.runs.checkpoint import LoadedCheckpoint, load_checkpoint
from attention_visualizer.runs.checkpoint_choice import candidates_in
from attention_visualizer.runs.config_fields import field_named
from attention_visualizer.runs.folders import RunFolder, RunGroup, group_at
from attention_visualizer.support.errors import UserError

SUFFIXES = (".ckpt", ".pth", ".pt", ".safetensors")
DATA_FIELDS = ("name", "image_size", "channels", "class_names")  # mean and deviation depend on the split alone


@dataclass(frozen=True)
class ComparedRun:
    """One run to compare, or the study's own (`own`).

    knobs: the settings in which the compared runs differ, but for the seed: "model.embed_dim" -> value, "?" where the
    run does not say. seed: None where it is not known. remarks: what a reader must know of how it was chosen.
    """

    label: str
    loaded: LoadedCheckpoint
    knobs: dict[str, Any]
    seed: int | None = None
    validation_accuracy: float | None = None
    own: bool = False
    remarks: tuple[str, ...] = ()

    @property
    def setting(self) -> tuple[str, ...]:
        """The same of runs that differ in nothing but the seed."""
        return tuple(f"{short_name(name)}={told(value)}" for name, value in self.knobs.items())


@dataclass(frozen=True)
class Found:
    """A checkpoint that was matched, before anything is compared."""

    label: str
    loaded: LoadedCheckpoint
    run: RunFolder | None


def find_compared_runs(pattern: str, own: LoadedCheckpoint, own_run: RunFolder | None = None) -> list[ComparedRun]:
    """The runs that the glob `pattern` matches, each weights once, `own` among them (in front if it is not matched).

    A match is a run folder, a sweep folder (all its jobs) or a checkpoint file. Of a run, the file that `own` has is
    taken (best.ckpt or last.ckpt). Raises UserError if nothing is left to compare, for a broken checkpoint, and for
    one of another data set or image size.
    """
    if not pattern:
        raise UserError("runs= is empty: give a pattern of run folders, such as runs=runs/*_sweep")
    file_name = own.path.name if own.path.name in ("best.ckpt", "last.ckpt") else "best.ckpt"
    matched, remarks = look_up(pattern, file_name)
    if not matched:
        raise UserError(f"runs={pattern} matches no run, no sweep and no checkpoint{told_of(remarks)}")
    for found in matched:
        check_comparable(found.loaded, own)
    own_print = fingerprint(own)
    kept: dict[str, Found] = {}
    for found in matched:
        name = fingerprint(found.loaded)
        if name in kept:
            remarks.append(f"{found.label} holds the same weights as {kept[name].label} and is left out")
        kept.setdefault(name, found)
    if own_print not in kept:
        kept = {own_print: Found(own_label(own, own_run), own, own_run)} | kept
    if len(kept) < 2:
        raise UserError(f"runs={pattern} matches nothing but the analysed weights{told_of(remarks)}")
    runs = described(list(kept.values()), list(kept).index(own_print))
    runs, same = without_repetitions(runs)
    remarks += same
    if len(runs) < 2:
        raise UserError(f"runs={pattern}: there is nothing to compare{told_of(remarks)}")
    return [replace(runs[0], remarks=tuple(remarks)), *runs[1:]]


def look_up(pattern: str, file_name: str) -> tuple[list[Found], list[str]]:
    """Every checkpoint that the pattern means, and a remark for each match that has none."""
    found: list[Found] = []
    remarks: list[str] = []
    for name in sorted(glob.glob(pattern, recursive=True)):
        path = Path(name)
        group = group_at(path) if path.is_dir() else None
        if group is not None:
            found += of_group(group, file_name, remarks)
        elif path.is_file() and path.suffix in SUFFIXES:
            folder = RunFolder.of_checkpoint(path)
            run = folder if path.parent == folder.checkpoints else None
            found.append(Found(path.name if run is None else f"{run.name}/{path.name}", load_checkpoint(path), run))
        else:
            remarks.append(f"{path} is no run, sweep or checkpoint")
    return found, remarks


def of_group(group: RunGroup, file_name: str, remarks: list[str]) -> list[Found]:
    """A run's checkpoint, or those of a sweep's jobs; the other of best and last where that is all there is."""
    found = []
    for run in group.runs:
        other = "last.ckpt" if file_name == "best.ckpt" else "best.ckpt"
        candidate = next(itertools.chain(candidates_in([run], file_name), candidates_in([run], other)), None)
        if candidate is None:
            remarks.append(f"{run.name} has no checkpoint yet")
            continue
        if candidate.path.name == other:
            remarks.append(f"{run.name} has no {file_name}: its {other} is compared")
        label = f"{group.path.name}, job {run.name.partition('_')[0]}" if group.is_sweep else run.name
        found.append(Found(label, candidate.loaded, run))
    return found


def check_comparable(loaded: LoadedCheckpoint, own: LoadedCheckpoint) -> None:
    """Raises UserError for a model of other pictures than `own`. A file that knows no data set may be of the same."""
    for field in ("img_size", "in_channels", "num_classes"):
        theirs, mine = getattr(loaded.model_config, field), getattr(own.model_config, field)
        if theirs != mine:
            raise UserError(
                f"runs=: {loaded.path} has model.{field}={theirs}, the analysed model {mine}: "
                "compare runs on the same pictures"
            )
    if loaded.data is None or own.data is None:
        return
    described, analysed = loaded.data.to_dict(), own.data.to_dict()
    for field in DATA_FIELDS:
        if described[field] != analysed[field]:
            raise UserError(
                f"runs=: {loaded.path} was trained on other data ({field} {described[field]!r:.60}, the analysed "
                f"model {analysed[field]!r:.60}): compare runs on the same data set"
            )


def fingerprint(loaded: LoadedCheckpoint) -> str:
    """Of the weights and the architecture, whatever else the file holds."""
    return weights_digest(loaded.state_dict, repr(loaded.model_config))


def described(all_found: Sequence[Found], own: int) -> list[ComparedRun]:
    """With labels of their own, seeds, and the settings that differ."""
    settings = [settings_of(found) for found in all_found]
    manifests = [manifest_of(found.run) for found in all_found]
    differing = [
        name
        for name in dict.fromkeys(name for each in settings for name in each)
        if field_named(name).is_hyperparameter and len({told(each[name]) for each in settings if name in each}) > 1
    ]
    labels = [found.label for found in all_found]
    runs = []
    for position, (found, each, manifest) in enumerate(zip(all_found, settings, manifests, strict=True)):
        seed = each.get("seed", manifest.get("seed"))
        accuracy = found.loaded.validation_accuracy
        runs.append(
            ComparedRun(
                found.label if labels.count(found.label) == 1 else str(found.loaded.path),
                found.loaded,
                {name: each.get(name, "?") for name in differing},
                seed if isinstance(seed, int) else None,
                accuracy,
                own=position == own,
            )
        )
    return runs


def without_repetitions(runs: Sequence[ComparedRun]) -> tuple[list[ComparedRun], list[str]]:
    """Of runs with the same settings and the same seed (such as best.ckpt and last.ckpt of one run) one is kept, the
    analysed one first: they would count as two seeds."""
    kept: dict[Any, ComparedRun] = {}
    for run in sorted(runs, key=lambda run: not run.own):  # stable
        kept.setdefault(id(run) if run.seed is None else (run.setting, run.seed), run)
    chosen = [run for run in runs if any(run is each for each in kept.values())]
    same = [f"{run.label} has the same settings and seed as another run and is left out"
            for run in runs if not any(run is each for each in chosen)]  # fmt: skip
    return chosen, same


def settings_of(found: Found) -> dict[str, Any]:
    """The model's from the checkpoint, all others from the run's config.yaml, where there is one."""
    model = {f"model.{name}": value for name, value in found.loaded.model_config.to_dict().items()}
    others: dict[str, Any] = {}
    if found.run is not None and found.run.config_path.is_file():
        try:
            content = read_yaml(found.run.config_path)
        except (OSError, UserError) as error:
            raise UserError(f"{found.run.config_path} cannot be read: repair or delete it") from error
        others = {name: value for name, value in flat(content) if not name.startswith("model.")}
    if found.loaded.split_seed is not None:
        others["data.split_seed"] = found.loaded.split_seed
    return model | others


def flat(content: Any, name: str = "") -> Iterable[tuple[str, Any]]:
    """("data.batch_size", 128) and so on, of nested dictionaries; without the names of classes."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key != "_target_":
                yield from flat(value, f"{name}.{key}" if name else str(key))
    elif name:
        yield name, content


def manifest_of(run: RunFolder | None) -> dict[str, Any]:
    if run is None:
        return {}
    try:
        return run.read_manifest()
    except UserError:  # what it says is a convenience here
        return {}


def own_label(own: LoadedCheckpoint, run: RunFolder | None) -> str:
    return own.path.name if run is None else run.name


def short_name(knob: str) -> str:
    """Without the group: "model.embed_dim" -> "embed_dim"."""
    return knob.rpartition(".")[2]


def told(value: Any) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def told_of(remarks: Sequence[str]) -> str:
    shown = "; ".join(remarks[:3]) + ("; ..." if len(remarks) > 3 else "")
    return f" ({shown})" if remarks else ""
