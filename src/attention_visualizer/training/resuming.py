"""Resuming a run: with which settings, and which runs are of the same settings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from lightning.pytorch import callbacks
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from attention_visualizer.files import plain_files
from attention_visualizer.runs.config_fields import FIELDS, field_named, values_before_added
from attention_visualizer.runs.folders import RunFolder
from attention_visualizer.support.errors import UserError, one_line
from attention_visualizer.support.invocation import invocation
from attention_visualizer.training.configuration import with_values
from attention_visualizer.training.overrides import override

# The classes that config.yaml of earlier versions names, and their names now; None: the code says which class it is.
RENAMED_TARGETS = {
    "attention_visualizer.callbacks.AttentionLogger": "attention_visualizer.AttentionLogger",
    "attention_visualizer.model.VisionTransformer": None,
    "attention_visualizer.data.ImageDataModule": None,
    "attention_visualizer.classifier.Classifier": None,
    "lightning.pytorch.trainer.trainer.Trainer": None,
    "lightning.pytorch.loggers.TensorBoardLogger": "attention_visualizer.TensorBoardLogger",
}
# What Lightning ships needs no trust of its own; where it writes is checked. (Its loggers may send data away.)
LIGHTNING_CALLBACKS = {f"{callbacks.__name__}.{name}" for name in callbacks.__all__}
# What the data set's defaults fill in.
FILLED_IN = ("data.batch_size", "trainer.max_epochs")
# Beside the model, which is compared with the checkpoint's.
FIXED = [
    name
    for name, field in FIELDS.items()
    if not (field.may_change_on_resume or field.is_set_by_program or name.startswith("model"))
]


# --- the settings of a run that goes on ---------------------------------------------------------------------------


def config_of_resumed_run(config: DictConfig) -> DictConfig:
    """Return the interrupted run's own config, with this command's overrides on top.

    Raise UserError where an override cannot resume the run, and where the run's config names code or places that are
    not this program's.
    """
    folder = RunFolder.of_checkpoint(Path(config.ckpt_path).resolve())
    if not folder.config_path.is_file():
        raise UserError(f"{config.ckpt_path} is not inside a run folder: {folder.config_path} is missing")
    resumed = read_config(folder.config_path)
    for name, value in values_before_added().items():
        has_group = OmegaConf.select(resumed, name.rpartition(".")[0]) is not None  # a callback may not be there
        if has_group and OmegaConf.select(resumed, name) is None:
            OmegaConf.update(resumed, name, value, force_add=True)
    resumed = relocated(resumed, str(resumed.run_folder), str(folder.path))
    before = {name: OmegaConf.select(resumed, name) for name in FIXED}
    overrides = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    for given in overrides:
        key = given.key_or_group.split("@")[0]
        if "." not in key and (key not in config or OmegaConf.is_dict(OmegaConf.select(config, key))):
            # A group's choice would put its defaults in the place of all that the run began with.
            raise UserError(f"{key}= cannot be changed when a run is resumed: give the fields that should differ")
        OmegaConf.update(resumed, key, OmegaConf.select(config, key), merge=False, force_add=True)
    for name, value in before.items():
        if OmegaConf.select(resumed, name) not in (value, None):
            raise UserError(f"{name}={OmegaConf.select(resumed, name)} cannot resume a run that began with {value}")
        OmegaConf.update(resumed, name, value)
    foreign = targets(resumed) - targets(config) - shipped_targets() - LIGHTNING_CALLBACKS
    if foreign:  # a config file must not decide which code runs
        raise UserError(f"{folder.config_path} names classes that this program does not know: {', '.join(foreign)}")
    refuse_other_places(resumed, folder, {given.key_or_group for given in overrides})
    return with_values(resumed, {"ckpt_path": str(Path(config.ckpt_path).resolve()), "run_folder": str(folder.path)})


def read_config(path: Path) -> DictConfig:
    """Read a run's config.yaml, with the names of this version.

    Raise UserError for anything but plain values: nothing is looked up or made when it is read.
    """
    try:
        config = OmegaConf.create(with_names_of_today(plain_files.read_yaml(path)))
    except (FileNotFoundError, OmegaConfBaseException, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read: {one_line(error):.200}") from error
    if not isinstance(config, DictConfig):
        raise UserError(f"{path} holds no configuration")
    for name, value in leaves(OmegaConf.to_container(config, resolve=False)):
        if isinstance(value, int) and abs(value) >= 2**63:
            raise UserError(f"{path} holds a number for {name:.60} that no field takes: it was edited by hand")
        special = any(part.startswith("_") and part != "_target_" for part in name.split("."))
        if special or "${" in f"{name}{value}":
            raise UserError(f"{path} holds {name:.60}={value!r:.60}, which is no plain value: it was edited by hand")
    return config


def with_names_of_today(content: Any) -> Any:
    """Replace the classes' names that earlier versions wrote, or leave them out: see RENAMED_TARGETS."""
    if not isinstance(content, dict):
        return content
    renamed = {name: with_names_of_today(value) for name, value in content.items()}
    target = content.get("_target_")
    if isinstance(target, str) and target in RENAMED_TARGETS:
        renamed["_target_"] = RENAMED_TARGETS[target]
    return {name: value for name, value in renamed.items() if not (name == "_target_" and value is None)}


def relocated(config: DictConfig, old: str, new: str) -> DictConfig:
    """Return the config of a run that may have been moved from folder `old` to `new`, with its places there."""

    def follow(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: follow(item) for key, item in value.items()}
        if isinstance(value, list):
            return [follow(item) for item in value]
        return new + value[len(old) :] if isinstance(value, str) and value.startswith(old) else value

    return OmegaConf.create(follow(OmegaConf.to_container(config)))


def refuse_other_places(config: DictConfig, folder: RunFolder, given: set[str]) -> None:
    """Raise UserError where a run's own config has loggers or callbacks write outside its folder, unless the command
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
    """Return every `_target_` in a config."""
    if OmegaConf.is_config(config):
        config = OmegaConf.to_container(config, resolve=False)
    if isinstance(config, dict):
        own = {str(value) for key, value in config.items() if key == "_target_"}
        return own.union(*(targets(value) for value in config.values()))
    return set().union(*(targets(value) for value in config)) if isinstance(config, list) else set()


def resume_command(folder: RunFolder) -> str:
    """Return the command that goes on with the run, with what its config.yaml alone is not believed: the classes that
    this command named, and its folder of config files."""
    overrides = [each for each in HydraConfig.get().overrides.task if "_target_" in each]
    places = [source.path for source in HydraConfig.get().runtime.config_sources if source.provider == "command-line"]
    config_dir = [part for place in places for part in ("--config-dir", place)]
    return shlex.join([*invocation("train"), override("ckpt_path", folder.last), *overrides, *config_dir])


def shipped_targets() -> set[str]:
    """Return every `_target_` in the program's own config files and schemas, and in a folder that the command names."""

    def stored(entry: Any) -> list[Any]:
        if isinstance(entry, dict):
            return [node for item in entry.values() for node in stored(item)]
        return [entry.node]

    sources = HydraConfig.get().runtime.config_sources
    conf = [Path(source.path) for source in sources if source.provider in ("main", "command-line")]
    files = [OmegaConf.load(file) for folder in conf for file in folder.rglob("*.yaml")]
    return set().union(*(targets(node) for node in [*files, *stored(ConfigStore.instance().repo)]))


# --- runs of the same settings ------------------------------------------------------------------------------------


def has_settings(folder: RunFolder, config: DictConfig, but_for: Collection[str] = ()) -> bool:
    """Whether the run was started with the settings in `config`, wherever it lies; some need not be the same."""
    with suppress(UserError):
        own = read_config(folder.config_path)
        own = relocated(own, str(own.get("run_folder")), str(folder.path))
        asked = OmegaConf.merge(config, {"run_folder": str(folder.path)})
        wanted = settings_of(asked, but_for)
        before = {name: value for name, value in values_before_added().items() if name in wanted}
        return before | settings_of(own, but_for) == wanted
    return False


def settings_of(config: Any, but_for: Collection[str] = ()) -> dict[str, Any]:
    """Return each field by its dotted name, but for those that say where things are, and `but_for`."""
    container = OmegaConf.to_container(config, resolve=True)
    return {
        name: value for name, value in leaves(container) if field_named(name).identifies_run and name not in but_for
    }


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of each value in nested dictionaries and lists; `name` goes in front."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from leaves(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and value:
        for position, item in enumerate(value):
            yield from leaves(item, f"{name}.{position}")
    else:
        yield name, value


def accuracy_of_completed(folder: RunFolder, config: DictConfig) -> float | None:
    """Return the validation accuracy of the run in `folder` if it is completed and of these settings, else None."""
    manifest = folder.read_manifest()
    metrics = manifest.get("metrics")
    accuracy = metrics.get("validation_accuracy") if isinstance(metrics, dict) else None
    if manifest.get("status") != "completed" or not isinstance(accuracy, float) or not has_settings(folder, config):
        return None
    return accuracy
