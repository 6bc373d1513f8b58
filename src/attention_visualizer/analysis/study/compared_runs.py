"""Resolve `runs=<glob>` to runs that can be compared: their weights, checked, and the settings in which they differ."""

from __future__ import annotations

import glob
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from attention_visualizer.files.digests import weights_digest
from attention_visualizer.files.plain_files import read_yaml
from attention_visualizer.runs.checkpoint import LoadedCheckpoint, load_checkpoint
from attention_visualizer.runs.checkpoint_choice import candidates_in
from attention_visualizer.runs.config_fields import field_named
from attention_visualizer.runs.folders import BEST, LAST, RunFolder, RunGroup, group_at
from attention_visualizer.support.errors import UserError

SUFFIXES = (".ckpt", ".pth", ".pt", ".safetensors")
DATA_FIELDS = ("name", "image_size", "channels", "class_names")  # mean and deviation depend on the split alone


@dataclass(frozen=True)
class ComparedRun:
    """A run to compare, possibly the analysed one itself."""

    label: str
    loaded: LoadedCheckpoint
    #: Settings in which the compared runs differ, but for the seed: "model.embed_dim" -> value, "?" for unknown.
    varied: dict[str, Any]
    seed: int | None = None  # None where it is not known
    validation_accuracy: float | None = None
    is_analysed: bool = False
    remarks: tuple[str, ...] = ()  # what a reader must know of how all runs were chosen; on the first run only

    @property
    def setting(self) -> tuple[str, ...]:
        """The varied settings as text, the same for runs that differ in nothing but the seed."""
        return tuple(f"{short_name(name)}={format_value(value)}" for name, value in self.varied.items())


@dataclass(frozen=True)
class MatchedCheckpoint:
    """A checkpoint that the pattern matches, before anything is compared."""

    label: str
    loaded: LoadedCheckpoint
    run: RunFolder | None


def find_compared_runs(
    pattern: str, analysed: LoadedCheckpoint, analysed_run: RunFolder | None = None, num_heads: int | None = None
) -> list[ComparedRun]:
    """Find the runs that the glob `pattern` matches, the same weights once, and `analysed` (in front if not matched).

    A match is a run folder, a sweep folder (all its jobs) or a checkpoint file. Of a run, the file that `analysed` has
    is used (best.ckpt or last.ckpt). Raise UserError if nothing is left to compare, for a broken checkpoint, and for
    one of another data set or image size. num_heads: of models in files that do not say it.
    """
    if not pattern:
        raise UserError("runs= is empty: give a pattern of run folders, such as runs=runs/*_sweep")
    file_name = analysed.path.name if analysed.path.name in (BEST, LAST) else BEST
    matches, remarks = match_checkpoints(pattern, file_name, num_heads)
    if not matches:
        raise UserError(f"runs={pattern} matches no run, no sweep and no checkpoint{in_parentheses(remarks)}")
    for match in matches:
        check_comparable(match.loaded, analysed)
    analysed_weights = fingerprint(analysed)
    by_weights: dict[str, MatchedCheckpoint] = {}
    for match in matches:
        first = by_weights.setdefault(fingerprint(match.loaded), match)
        if first is not match:
            remarks.append(f"{match.label} holds the same weights as {first.label} and is left out")
    if analysed_weights not in by_weights:
        label = analysed.path.name if analysed_run is None else analysed_run.name
        by_weights = {analysed_weights: MatchedCheckpoint(label, analysed, analysed_run)} | by_weights
    if len(by_weights) < 2:
        raise UserError(f"runs={pattern} matches nothing but the analysed weights{in_parentheses(remarks)}")
    runs = describe_runs(list(by_weights.values()), list(by_weights).index(analysed_weights))
    runs, repetitions = split_repetitions(runs)
    remarks += [f"{run.label} has the same settings and seed as another run and is left out" for run in repetitions]
    if len(runs) < 2:
        raise UserError(f"runs={pattern}: there is nothing to compare{in_parentheses(remarks)}")
    return [replace(runs[0], remarks=tuple(remarks)), *runs[1:]]


def match_checkpoints(
    pattern: str, file_name: str, num_heads: int | None = None
) -> tuple[list[MatchedCheckpoint], list[str]]:
    """Load every checkpoint that the pattern means; return a remark for each match that has none."""
    matches: list[MatchedCheckpoint] = []
    remarks: list[str] = []
    for name in sorted(glob.glob(pattern, recursive=True)):
        path = Path(name)
        group = group_at(path) if path.is_dir() else None
        if group is not None:
            matches += load_group(group, file_name, remarks)
        elif path.is_file() and path.suffix in SUFFIXES:
            folder = RunFolder.of_checkpoint(path)
            run = folder if path.parent == folder.checkpoints else None
            label = path.name if run is None else f"{run.name}/{path.name}"
            matches.append(MatchedCheckpoint(label, load_checkpoint(path, num_heads=num_heads), run))
        else:
            remarks.append(f"{path} is no run, sweep or checkpoint")
    return matches, remarks


def load_group(group: RunGroup, file_name: str, remarks: list[str]) -> list[MatchedCheckpoint]:
    """Load a run's checkpoint, or those of a sweep's jobs; of best.ckpt and last.ckpt the other where only it exists.

    Add a remark for each run that has no checkpoint, or not the one of this name.
    """
    matches = []
    other = LAST if file_name == BEST else BEST
    for run in group.runs:
        candidate = next(itertools.chain(candidates_in([run], file_name), candidates_in([run], other)), None)
        if candidate is None:
            remarks.append(f"{run.name} has no checkpoint yet")
            continue
        if candidate.path.name == other:
            remarks.append(f"{run.name} has no {file_name}: its {other} is compared")
        label = f"{group.path.name}, job {run.name.partition('_')[0]}" if group.is_sweep else run.name
        matches.append(MatchedCheckpoint(label, candidate.loaded, run))
    return matches


def check_comparable(loaded: LoadedCheckpoint, analysed: LoadedCheckpoint) -> None:
    """Raise UserError for a model of other images than `analysed`. A file that knows no data set may be of the same."""
    for field in ("img_size", "in_channels", "num_classes"):
        theirs, ours = getattr(loaded.model_config, field), getattr(analysed.model_config, field)
        if theirs != ours:
            raise UserError(
                f"runs=: {loaded.path} has model.{field}={theirs}, the analysed model {ours}: "
                "compare runs on the same images"
            )
    if loaded.data is None or analysed.data is None:
        return
    their_data, our_data = loaded.data.to_dict(), analysed.data.to_dict()
    for field in DATA_FIELDS:
        if their_data[field] != our_data[field]:
            raise UserError(
                f"runs=: {loaded.path} was trained on other data ({field} {their_data[field]!r:.60}, the analysed "
                f"model {our_data[field]!r:.60}): compare runs on the same data set"
            )


def fingerprint(loaded: LoadedCheckpoint) -> str:
    """Hash the weights and the architecture, whatever else the file holds."""
    return weights_digest(loaded.state_dict, repr(loaded.model_config))


def describe_runs(matches: Sequence[MatchedCheckpoint], analysed: int) -> list[ComparedRun]:
    """Give each match a unique label, its seed and the settings that vary. analysed: the position of that run."""
    settings = [read_settings(match) for match in matches]
    varied = [
        name
        for name in dict.fromkeys(name for each in settings for name in each)
        if field_named(name).is_hyperparameter
        and len({format_value(each[name]) for each in settings if name in each}) > 1
    ]
    labels = [match.label for match in matches]
    runs = []
    for position, (match, each) in enumerate(zip(matches, settings, strict=True)):
        manifest = {} if match.run is None else match.run.manifest_or_empty()
        seed = each.get("seed", manifest.get("seed"))
        runs.append(
            ComparedRun(
                match.label if labels.count(match.label) == 1 else str(match.loaded.path),
                match.loaded,
                {name: each.get(name, "?") for name in varied},
                seed if isinstance(seed, int) else None,
                match.loaded.validation_accuracy,
                is_analysed=position == analysed,
            )
        )
    return runs


def split_repetitions(runs: Sequence[ComparedRun]) -> tuple[list[ComparedRun], list[ComparedRun]]:
    """Separate runs from others with the same settings and seed, such as best.ckpt and last.ckpt of one run, which
    would count as two seeds. Of these the analysed run stays, else the first."""
    by_seed: dict[Any, ComparedRun] = {}
    for run in sorted(runs, key=lambda run: not run.is_analysed):  # stable
        by_seed.setdefault(id(run) if run.seed is None else (run.setting, run.seed), run)
    chosen = {id(run) for run in by_seed.values()}
    return [run for run in runs if id(run) in chosen], [run for run in runs if id(run) not in chosen]


def read_settings(match: MatchedCheckpoint) -> dict[str, Any]:
    """Read the model's settings from the checkpoint, all others from the run's config.yaml, where there is one."""
    model = {f"model.{name}": value for name, value in match.loaded.model_config.to_dict().items()}
    others: dict[str, Any] = {}
    if match.run is not None and match.run.config_path.is_file():
        try:
            content = read_yaml(match.run.config_path)
        except (FileNotFoundError, UserError) as error:
            raise UserError(f"{match.run.config_path} cannot be read: repair or delete it") from error
        others = {name: value for name, value in flatten_config(content) if not name.startswith("model.")}
    if match.loaded.split_seed is not None:
        others["data.split_seed"] = match.loaded.split_seed
    return model | others


def flatten_config(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ("data.batch_size", 128) and so on from nested dictionaries, without the names of classes."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key != "_target_":
                yield from flatten_config(value, f"{name}.{key}" if name else str(key))
    elif name:
        yield name, content


def short_name(setting: str) -> str:
    """Return a setting's name without its group: "model.embed_dim" -> "embed_dim"."""
    return setting.rpartition(".")[2]


def format_value(value: Any) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def in_parentheses(remarks: Sequence[str]) -> str:
    """Format the first three remarks as " (a; b; c; ...)", the end of a sentence; empty where there are none."""
    shown = "; ".join(remarks[:3]) + ("; ..." if len(remarks) > 3 else "")
    return f" ({shown})" if remarks else ""
