"""Train a Vision Transformer on MNIST and watch its attention. `python train.py --help` shows what can be set."""

from __future__ import annotations

import atexit
import gc
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends in silence, not in a traceback

collects = gc.isenabled()
gc.disable()  # looking for garbage among half a million imported objects is a sixth of the time to import them

import logging
import math
import shlex
import shutil
import sys
import warnings
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from lightning import Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf

from attention_visualizer.attention.capture import CaptureError
from attention_visualizer.attention.model_search import find_model
from attention_visualizer.commands import command_line
from attention_visualizer.data.datamodule import ImageDataModule
from attention_visualizer.files import atomic
from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.models.vit_config import ViTConfig
from attention_visualizer.runs import checkpoint, folders
from attention_visualizer.runs.checkpoint_choice import load_chosen
from attention_visualizer.runs.export import export_safetensors
from attention_visualizer.support import allocator
from attention_visualizer.support.errors import UserError
from attention_visualizer.support.eval_mode import eval_mode
from attention_visualizer.support.text import print_sanitised
from attention_visualizer.training import configuration, resuming, sweeps
from attention_visualizer.training import run as training_run
from attention_visualizer.training.classifier import Classifier
from attention_visualizer.training.configuration import arguments
from attention_visualizer.training.saving import checkpoint_callbacks
from attention_visualizer.training.stopping import StopRequest
from attention_visualizer.watching.lightning_internals import require_saving

gc.freeze()  # nor are they looked through later: for 0.2 s, in the middle of a step
atexit.register(gc.unfreeze)  # or Triton says at the end that they leaked
if collects:
    gc.enable()

CONF = Path(__file__).resolve().parent / "conf"
configuration.register_schemas()


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> float:
    command_line.begin()
    sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        return train(config, sweeping)
    except SystemExit:  # Ctrl-C, SIGTERM
        if sweeping:
            print("The sweep goes on where it was with the same command and resume=auto")
        raise
    except Exception as error:
        if not sweeping:
            if command_line.is_foreseen(error) or isinstance(error, CaptureError):
                command_line.fail(error)
            raise
        # The sweep's other jobs go on; its table names this one.
        sweeps.SweepTable.job_failed = True
        folder = folders.RunFolder(job_path())
        with suppress(UserError):
            if not isinstance(error, folders.RunExistsError):
                lock = folder.lock()  # not of a job that another process trains
                folder.update_manifest(status="failed", error=f"{type(error).__name__}: {command_line.one_line(error)}")
                lock.release()
        log = logging.getLogger("train")
        log.error("job failed: %s", command_line.one_line(error), exc_info=not command_line.is_foreseen(error))
        return math.nan


def train(config: DictConfig, sweeping: bool) -> float:
    """One run, from a composed config to its report; returns the best validation accuracy, for Hydra's sweepers."""
    with StopRequest() as stop, ExitStack() as locks:
        return run(config, sweeping, stop, locks)


def run(config: DictConfig, sweeping: bool, stop: StopRequest, locks: ExitStack) -> float:
    quieten()
    if sweeping and job_path().parent.resolve() != Path(HydraConfig.get().sweep.dir).resolve():
        raise folders.RunExistsError(
            f"{job_path()} is not a folder of the sweep's own: leave hydra.sweep.subdir as it is"
        )
    named = None
    if config.ckpt_path is not None:
        if sweeping:
            raise UserError("ckpt_path= resumes one run: it does not go with a sweep (-m); resume=auto does")
        named = load_chosen(Path(config.ckpt_path))
        config = resuming.config_of_resumed_run(config, CONF)

    # Whatever can be wrong is found out here, before a folder is made or touched.
    data, model, classifier = prepare(config)
    parameters = ViTConfig(**model.config).num_parameters
    unfinished = None
    if config.resume == "auto":
        if sweeping and (accuracy := resuming.accuracy_of_completed(folders.RunFolder(job_path()), config)) is not None:
            print_sanitised(f"Done already: {job_path()}")
            return accuracy
        unfinished = find_unfinished(config, sweeping)
    begun = named is not None or unfinished is not None
    resumed = named if unfinished is None else unfinished.checkpoint
    if resumed is not None:
        checkpoint.refuse_other_settings(resumed, model.config, data.description.to_dict())
        config.ckpt_path = str(resumed.path)
    place = unfinished.folder.path if unfinished else Path(config.run_folder or config.runs_dir)
    folders.check_space(place, parameters)
    made = atomic.missing_folders(Path(config.runs_dir))
    folder = place_of(config, sweeping, begun) if unfinished is None else unfinished.folder
    locks.callback((folder.lock() if unfinished is None else unfinished.lock).release)
    config.run_folder = str(folder.path)
    try:
        resumed_step = (resumed.step if resumed else -1) if begun else None
        trainer = build_trainer(config, folder, stop, resumed_step)
        if resumed is not None:
            training_run.check_resumable(resumed.path, classifier, trainer)
        log_guard = locks.enter_context(training_run.open_logs(trainer, resumed_step))
    except BaseException:
        if not begun and not sweeping:
            shutil.rmtree(folder.path)  # nothing but empty logs
            atomic.remove_empty(made)
        raise

    configuration.save(config, folder)
    folders.start_manifest(
        folder,
        command=shlex.join(["python", *sys.argv]),
        data=data.description.to_dict(),
        parameters=parameters,
        seed=config.seed,
        checkpoints={path.stem: str(path.relative_to(folder.path)) for path in (folder.best, folder.last)},
    )
    print_sanitised(f"Run folder: {folder.path}")
    if config.compile:
        classifier.halves = None  # compiled code is made for one thread
        on_gpu = trainer.strategy.root_device.type == "cuda"
        model.compile(mode="reduce-overhead" if on_gpu else "default")
    with training_run.recorded(folder):
        metrics = training_run.fit(trainer, classifier, data, config.ckpt_path)
        if config.test or (config.test is None and not sweeping):
            metrics |= training_run.test_best(trainer, classifier, data, folder, log_guard)
        if config.export:
            print_sanitised(f"Exported:     {export_safetensors(folder.best, folder.best.with_suffix('.safetensors'))}")
        settings: Any = OmegaConf.to_container(config, resolve=True)
        recorded = {part: settings[part] for part in ("model", "data", "optimizer", "trainer", "seed")}
        training_run.log_hyperparameters(trainer, recorded | {"parameters": parameters}, metrics)
        folder.update_manifest(status="completed", metrics=metrics)
    training_run.print_report(folder, data.description, metrics)
    return float(metrics["validation_accuracy"])


def prepare(config: DictConfig) -> tuple[ImageDataModule, VisionTransformer, Classifier]:
    """Data and model, with what depends on the data set filled into the config. Raises UserError for all that is wrong
    with them."""
    configuration.check_options(config)
    allocator.keep_freed_memory()
    seed_everything(config.seed, verbose=False)
    data = ImageDataModule(**arguments(config, "data", ImageDataModule), seed=config.seed)
    architecture = ViTConfig(**arguments(config, "model", ViTConfig))
    folders.check_memory(architecture.num_parameters)
    model = VisionTransformer(architecture)
    recipe = arguments(config, "optimizer", Classifier)
    data.load()
    check_model_fits_data(model, data)
    classifier = Classifier(model, model.config["num_classes"], **recipe, seed=config.seed)
    check_watched_part(config, classifier, data)
    classifier.checkpoint_block = checkpoint.block_for(
        model.config,
        data.description.to_dict(),
        data_dir=str(data.data_dir.absolute()),
        split_seed=data.split_seed,
        seed=config.seed,
    )
    config.data.batch_size = data.batch_size
    config.trainer.max_epochs = config.trainer.max_epochs or data.default_epochs
    evaluation_batches = {"validation": len(data.val_dataloader()), "test": len(data.test_dataloader())}
    configuration.check_schedule(config, data.batches_in(config.trainer.limit_train_batches), evaluation_batches)
    return data, model, classifier


def find_unfinished(config: DictConfig, sweeping: bool) -> resuming.Unfinished | None:
    """What resume=auto goes on with: a sweep's job only in its own folder."""
    if sweeping:
        found = resuming.unfinished_at(folders.RunFolder(job_path()), config)
    else:
        found = resuming.find_unfinished(config)
    if found is not None:
        where = "from its start" if found.checkpoint is None else f"step {found.checkpoint.step}"
        print_sanitised(f"Going on with {found.folder.path}, {where}")
    return found


def place_of(config: DictConfig, sweeping: bool, begun: bool) -> folders.RunFolder:
    """The folder of this run, made if need be. Raises UserError for a sweep's that holds another run."""
    if begun:
        return folders.RunFolder(Path(config.run_folder))
    if not sweeping:
        return folders.RunFolder.create(Path(config.runs_dir))
    job = folders.RunFolder(job_path())
    if job.exists:
        raise folders.RunExistsError(
            f"{job.path} holds a run already, of other settings or data: choose a new hydra.sweep.dir"
        )
    return job


def job_path() -> Path:
    """The folder that Hydra gives to a sweep's job."""
    return Path(HydraConfig.get().runtime.output_dir)


def quieten() -> None:
    """Silences advice that does not apply here, so that what is printed is worth reading."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*smaller than the logging interval.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message)


def check_model_fits_data(model: VisionTransformer, data: ImageDataModule) -> None:
    description = data.description
    asked = (model.config["img_size"], model.config["in_channels"], model.config["num_classes"])
    given = (description.image_size, description.channels, description.num_classes)
    for name, mine, theirs in zip(("img_size", "in_channels", "num_classes"), asked, given, strict=True):
        if mine != theirs:
            raise UserError(f"model.{name}={mine} does not fit the data set {description.name}, which needs {theirs}")


def check_watched_part(config: DictConfig, classifier: Classifier, data: ImageDataModule) -> None:
    """Raises UserError where the attention logger is told to watch what has no attention."""
    name = OmegaConf.select(config, "callbacks.attention_logger.model")
    if name is not None:
        images, _ = next(data.evaluation_batches("validation"))
        with eval_mode(classifier):
            find_model(classifier, images[:1], name)


def build_trainer(
    config: DictConfig, folder: folders.RunFolder, stop: StopRequest, resumed_step: int | None
) -> Trainer:
    """Writes nothing yet. resumed_step: of the checkpoint that training goes on from, -1 for none; None: a new run."""
    if resumed_step is not None and "tensorboard" in (config.logger or {}):
        # Events after the checkpoint, which this run writes again, disappear from the charts.
        OmegaConf.update(config, "logger.tensorboard.purge_step", resumed_step + 1, force_add=True)
    try:
        callbacks = [hydra.utils.instantiate(callback) for callback in (config.callbacks or {}).values()]
        if config.trainer.enable_progress_bar is not False:
            callbacks.append(training_run.ProgressBar(refresh_rate=10))
        chosen = [logger for logger in (config.logger or {}).values() if logger is not None]
        trainer = Trainer(
            **arguments(config, "trainer", Trainer),
            plugins=checkpoint.AtomicCheckpointIO(),
            logger=[hydra.utils.instantiate(logger) for logger in chosen],
            callbacks=[*callbacks, *checkpoint_callbacks(folder, stop)],
            default_root_dir=folder.path,
        )
    except UserError:
        raise
    except InstantiationException as error:
        raise UserError(str(error.__cause__ or error)) from error
    except Exception as error:  # Lightning raises many kinds for arguments that it cannot use
        hint = "; no GPU was found, use trainer=cpu" if "gpu" in str(config.trainer.accelerator) else ""
        raise UserError(f"trainer: {error}{hint}") from error
    if trainer.world_size > 1:
        raise UserError("trainer.devices: this program trains on one device; use trainer.devices=1")
    require_saving(trainer)
    return trainer


if __name__ == "__main__":
    command_line.run(main, on_mistake=sweeps.SweepTable.discard_unbegun)
