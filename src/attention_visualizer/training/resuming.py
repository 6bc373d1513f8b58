"""Going on with an interrupted run: with which one, from which checkpoint, and with which settings."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from attention_visualizer.files import atomic, plain_files
from attention_visualizer.runs import folders
from attention_visualizer.runs.checkpoint import LoadedCheckpoint, load_checkpoint
from attention_visualizer.runs.folders import RunFolder
from attention_visualizer.support.errors import UserError
from attention_visualizer.support.text import print_sanitised

# --- settings ----------------------------------------------------------------------------------------------------

# What a run cannot change on the way, beside the model and the data set: another order, split or random state.
FIXED = ("seed", "data.name", "data.batch_size", "data.split_seed", "optimizer.muon")
# Fields that runs may lack which began before there were any, and what such a run goes on with: as it began.
BEFORE_THEY_WERE_ADDED = {"data.elastic": 0.0, "data.fade": 0.0, "optimizer.muon": False}


def config_of_resumed_run(config: DictConfig, conf: Path) -> DictConfig:
    """The interrupted run's own config, with this command's overrides on top. conf: the folder of config files."""
    folder = RunFolder(Path(config.ckpt_path).resolve().parent.parent)
    if not folder.config_path.is_file():
        raise UserError(f"{config.ckpt_path} is not inside a run folder: {folder.config_path} is missing")
    own = read_config(folder.config_path)
    for name, value in BEFORE_THEY_WERE_ADDED.items():
        if OmegaConf.select(own, name) is None:
            OmegaConf.update(own, name, value, force_add=True)
    own = relocated(own, str(own.run_folder), str(folder.path))
    before = {name: OmegaConf.select(own, name) for name in FIXED}
    overrides = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    for override in overrides:
        key = override.key_or_group.split("@")[0]
        if "." not in key and (key not in config or OmegaConf.is_dict(OmegaConf.select(config, key))):
            # A group's choice would put its defaults in the place of all that the run began with.
            raise UserError(f"{key}= cannot be changed when a run is resumed: give the fields that should differ")
        OmegaConf.update(own, key, OmegaConf.select(config, key), merge=False, force_add=True)
    for name, value in before.items():
        if OmegaConf.select(own, name) not in (value, None):
            raise UserError(f"{name}={OmegaConf.select(own, name)} cannot resume a run that began with {value}")
        OmegaConf.update(own, name, value)
    foreign = targets(own) - targets(config) - shipped_targets(conf)
    if foreign:  # a config file must not decide which code runs
        raise UserError(f"{folder.config_path} names classes that this program does not know: {', '.join(foreign)}")
    refuse_other_places(own, folder, {override.key_or_group for override in overrides})
    own.ckpt_path = str(Path(config.ckpt_path).resolve())
    own.run_folder = str(folder.path)
    return own


def read_config(path: Path) -> DictConfig:
    """A run's config.yaml: plain values, nothing that is looked up or made when it is read. Raises UserError."""
    try:
        config = OmegaConf.create(plain_files.read_yaml(path))
    except (OSError, OmegaConfBaseException, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split()):.200}") from error
    if not isinstance(config, DictConfig):
        raise UserError(f"{path} holds no configuration")
    for name, value in leaves(OmegaConf.to_container(config, resolve=False)):
        if isinstance(value, int) and abs(value) >= 2**63:
            raise UserError(f"{path} holds a number for {name:.60} that no field takes: it was changed by hand")
        special = any(part.startswith("_") and part != "_target_" for part in name.split("."))
        if special or "${" in f"{name}{value}":
            raise UserError(f"{path} holds {name:.60}={value!r:.60}, which is no plain value: it was changed by hand")
    return config


def relocated(config: DictConfig, old: str, new: str) -> DictConfig:
    """The config of a run that may have been moved, or is resumed from another folder than it began in."""

    def follow(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: follow(item) for key, item in value.items()}
        if isinstance(value, list):
            return [follow(item) for item in value]
        return new + value[len(old) :] if isinstance(value, str) and value.startswith(old) else value

    return OmegaConf.create(follow(OmegaConf.to_container(config)))


def refuse_other_places(config: DictConfig, folder: RunFolder, given: set[str]) -> None:
    """Raises UserError where a run's own config has loggers or callbacks write outside its folder, unless the command
    line gave the field."""
    for group in ("logger", "callbacks"):
        for name, value in leaves(OmegaConf.to_container(config).get(group), group):  # type: ignore[union-attr]
            if name in given or not isinstance(value, str):
                continue
            place = name.endswith(("dir", "path", "_uri")) or Path(value).is_absolute() or ".." in Path(value).parts
            if (
                re.search(r"~|\$|:/", value)
                or place
                and not Path(value).resolve().is_relative_to(folder.path.resolve())
            ):
                raise UserError(f"{folder.config_path} writes to {value}: if that is meant, add '{name}={value}'")


def targets(config: Any) -> set[str]:
    """Every `_target_` in a config."""
    if OmegaConf.is_config(config):
        config = OmegaConf.to_container(config, resolve=False)
    if isinstance(config, dict):
        own = {str(value) for key, value in config.items() if key == "_target_"}
        return own.union(*(targets(value) for value in config.values()))
    return set().union(*(targets(value) for value in config)) if isinstance(config, list) else set()


def shipped_targets(conf: Path) -> set[str]:
    """Every `_target_` in the config files of `conf` and in the schemas."""

    def stored(entry: Any) -> list[Any]:
        if isinstance(entry, dict):
            return [node for item in entry.values() for node in stored(item)]
        return [entry.node]

    files = [OmegaConf.load(file) for file in conf.rglob("*.yaml")]
    return set().union(*(targets(node) for node in [*files, *stored(ConfigStore.instance().repo)]))


# --- resume=auto -------------------------------------------------------------------------------------------------

# Fields that say where things are, not what is trained.
WHERE = ("ckpt_path", "resume", "export", "runs_dir", "run_folder", "logger.tensorboard.purge_step")


@dataclass(frozen=True)
class Unfinished:
    """A run to go on with, claimed for this process: checkpoint is None where none was saved, or none is whole."""

    folder: RunFolder
    lock: filelock.BaseFileLock
    checkpoint: LoadedCheckpoint | None


def find_unfinished(config: DictConfig) -> Unfinished | None:
    """The newest single run of these settings in config.runs_dir that was not completed and that no process trains."""
    for group in folders.find_runs(config.runs_dir):
        if not group.is_sweep and (found := unfinished_at(group.runs[0], config)):
            return found
    return None


def unfinished_at(folder: RunFolder, config: DictConfig) -> Unfinished | None:
    """The run in `folder` if it is one of these settings, not completed, and no process trains it."""
    if not folder.config_path.is_file() or not has_settings(folder, config):
        return None
    try:
        lock = folder.lock()
    except UserError:  # somebody trains it, or nothing may be written there
        return None
    with suppress(UserError):
        if folder.read_manifest().get("status") == "completed":
            lock.release()
            return None
    return Unfinished(folder, lock, newest_whole_checkpoint(folder))


def has_settings(folder: RunFolder, config: DictConfig) -> bool:
    """Whether the run was started with the settings in `config`."""
    with suppress(UserError):
        own = read_config(folder.config_path)
        own = relocated(own, str(own.get("run_folder")), str(folder.path))
        asked = OmegaConf.merge(config, {"run_folder": str(folder.path)})
        return settings_of(own) == settings_of(asked)
    return False


def settings_of(config: Any) -> dict[str, Any]:
    """Each field outside WHERE by its dotted name."""
    container = OmegaConf.to_container(config, resolve=True)
    return {name: value for name, value in leaves(container) if name not in WHERE}


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from leaves(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and value:
        for position, item in enumerate(value):
            yield from leaves(item, f"{name}.{position}")
    else:
        yield name, value


def accuracy_of_completed(folder: RunFolder, config: DictConfig) -> float | None:
    """The validation accuracy of a completed run of these settings in `folder`, if there is one."""
    manifest = folder.read_manifest()
    metrics = manifest.get("metrics")
    accuracy = metrics.get("validation_accuracy") if isinstance(metrics, dict) else None
    if manifest.get("status") != "completed" or not isinstance(accuracy, float) or not has_settings(folder, config):
        return None
    return accuracy


def newest_whole_checkpoint(folder: RunFolder) -> LoadedCheckpoint | None:
    """last.ckpt, or best.ckpt where that one is damaged, which is said."""
    for path in (folder.last, folder.best):
        if not path.exists():
            continue
        try:
            found = load_checkpoint(path)
        except UserError as error:
            print_sanitised(f"Not used: {error}")
            continue
        if path != folder.last:  # or a run that has nothing left to train would leave the damaged one
            with atomic.atomic_path(folder.last) as temporary:
                shutil.copyfile(path, temporary)
        return found
    return None
