"""`python train.py`: a run, or the jobs of a sweep, from the composed config to the report."""

from __future__ import annotations

import logging
import shlex
import sys
import warnings
from contextlib import ExitStack, suppress
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from attention_visualizer.attention.capture import CaptureError
from attention_visualizer.commands import command_line
from attention_visualizer.runs import folders
from attention_visualizer.runs.checkpoint import LoadedCheckpoint
from attention_visualizer.runs.checkpoint_choice import load_chosen
from attention_visualizer.runs.export import export_safetensors
from attention_visualizer.runs.folders import RunFolder
from attention_visualizer.support.errors import UserError, ran_out_of_memory
from attention_visualizer.support.invocation import invocation
from attention_visualizer.support.text import print_sanitised
from attention_visualizer.training import configuration, resuming, slurm, sweeps
from attention_visualizer.training import run as training_run
from attention_visualizer.training.components import Components, build_components
from attention_visualizer.training.progress import RunLog
from attention_visualizer.training.schemas import register_schemas
from attention_visualizer.training.start import find_start, restoring_config
from attention_visualizer.training.stopping import StopRequest
from attention_visualizer.training.trainer import build_trainer

register_schemas()


def main(conf: Path) -> None:
    """Run the command line. conf: the folder of config files."""
    command_line.run(run_job, conf, "train", on_mistake=sweeps.SweepTable.discard_unbegun)


def run_job(config: DictConfig) -> float:
    """Train a run, or one job of a sweep: where that fails, its folder and the sweep's table say so."""
    job = sweep_job()
    try:
        return train(config, job)
    except SystemExit:  # Ctrl-C, SIGTERM
        if job is not None:
            print("Resume the sweep with the same command and resume=auto")
        raise
    except Exception as error:
        if ran_out_of_memory(error) and not command_line.is_foreseen(error):
            advice = "give a smaller data.batch_size= (with trainer.accumulate_grad_batches=) or a smaller model"
            error = UserError(f"out of memory: {advice}; the run can be resumed from its last checkpoint")
        if job is None:
            if command_line.is_foreseen(error) or isinstance(error, CaptureError):
                command_line.fail(error)
            raise
        sweeps.SweepTable.job_failed = True
        with suppress(UserError):
            if not isinstance(error, folders.RunExistsError):
                lock = job.lock()  # not of a job that another process trains
                job.update_manifest(
                    status="failed",
                    error=f"{type(error).__name__}: {command_line.error_line(error)}",
                    overrides=list(HydraConfig.get().overrides.task),
                )
                lock.release()
        log = logging.getLogger("train")
        log.error("job failed: %s", command_line.error_line(error), exc_info=not command_line.is_foreseen(error))
        return 0.0  # a sweeper that searches takes no NaN; an accuracy of 0 leads it elsewhere


def sweep_job() -> RunFolder | None:
    """Return the folder that Hydra gives to a sweep's job; None for a single run."""
    hydra = HydraConfig.get()
    return RunFolder(Path(hydra.runtime.output_dir)) if hydra.mode == RunMode.MULTIRUN else None


def train(config: DictConfig, job: RunFolder | None = None) -> float:
    """Train from a composed config to the report; return the best validation accuracy, for Hydra's sweepers."""
    with StopRequest() as stop:
        silence_inapplicable_warnings()
        if job is not None and job.path.parent.resolve() != Path(HydraConfig.get().sweep.dir).resolve():
            raise folders.RunExistsError(
                f"{job.path} is outside the sweep's folder: leave hydra.sweep.subdir unchanged"
            )
        named = None
        if config.ckpt_path is not None:
            if job is not None:
                raise UserError("ckpt_path= resumes one run: it cannot be combined with a sweep (-m); resume=auto can")
            named = load_chosen(Path(config.ckpt_path), keep_content=True)
            config = resuming.config_of_resumed_run(config)
        elif config.resume is None and slurm.is_requeued():
            config = configuration.with_values(config, {"resume": "auto"})
        OmegaConf.set_readonly(config, True)
        # Whatever can be wrong is found out here, before a folder is made or touched.
        components = build_components(config)
        if job is not None and config.resume == "auto":
            accuracy = resuming.accuracy_of_completed(job, components.config)
            if accuracy is not None:
                print_sanitised(f"Done already: {job.path}")
                return accuracy
        return train_from_start(components, named, job, stop)


def train_from_start(
    components: Components, named: LoadedCheckpoint | None, job: RunFolder | None, stop: StopRequest
) -> float:
    """Make or find the run's folder, train in it, and record how it went; return the best validation accuracy."""
    model, data, classifier = components.model, components.data, components.classifier
    with ExitStack() as stack:
        start = stack.enter_context(find_start(components, named, job))
        folder, config = start.folder, start.config(components.config)
        try:
            trainer = build_trainer(config, start, stop)
            if start.checkpoint is not None:
                training_run.check_resumable(start.checkpoint, classifier, trainer)
            log_guard = stack.enter_context(training_run.open_logs(trainer, start.step))
        except BaseException:
            start.discard()
            raise
        stack.enter_context(restoring_config(start, trainer))
        record_start(config, components, folder)
        if config.compile:
            classifier.halves = None  # compiled code is made for one thread
            on_gpu = trainer.strategy.root_device.type == "cuda"
            model.compile(mode="reduce-overhead" if on_gpu else "default")
        with training_run.recorded(folder):
            metrics = training_run.fit(trainer, classifier, data, config.ckpt_path)
            if config.test or (config.test is None and job is None):
                metrics |= training_run.test_best(trainer, classifier, data, folder, log_guard)
            if config.export:
                exported = export_safetensors(folder.best, folder.best.with_suffix(".safetensors"))
                print_sanitised(f"Exported:     {exported}")
            training_run.log_hyperparameters(trainer, config, components.num_parameters, metrics)
            folder.update_manifest(status="completed", metrics=metrics)
        training_run.print_report(folder, data.description, metrics)
        return float(metrics["validation_accuracy"])


def record_start(config: DictConfig, components: Components, folder: RunFolder) -> None:
    """Write config.yaml and the manifest, and print where."""
    configuration.save(config, folder)
    folders.start_manifest(
        folder,
        command=shlex.join([*invocation("train"), *sys.argv[1:]]),
        data=components.data.description.to_dict(),
        parameters=components.num_parameters,
        seed=config.seed,
        checkpoints={path.stem: str(path.relative_to(folder.path)) for path in (folder.best, folder.last)},
    )
    log = RunLog(folder)
    for line in (f"Run folder: {folder.path}", *training_run.describe(components)):
        log.say(line)


def silence_inapplicable_warnings() -> None:
    """Silence advice that does not apply here, so that what is printed is worth reading."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*smaller than the logging interval.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message)
