"""Lightning's Trainer for a run, with the loggers and callbacks of its config."""

from __future__ import annotations

import hydra
from hydra.errors import InstantiationException
from lightning import Trainer
from omegaconf import DictConfig

from attention_visualizer.support.errors import UserError
from attention_visualizer.training import slurm
from attention_visualizer.training.checkpoint_io import AtomicCheckpointIO
from attention_visualizer.training.configuration import arguments
from attention_visualizer.training.progress import EpochLines, RunBar, RunLog, shows_bar
from attention_visualizer.training.saving import checkpoint_callbacks
from attention_visualizer.training.start import Start
from attention_visualizer.training.stopping import StopRequest
from attention_visualizer.watching.lightning_internals import require_saving


def given(parts: DictConfig | None) -> list[DictConfig]:
    """Return the loggers or callbacks of a config, but for those that were set to null."""
    return [part for part in (parts or {}).values() if part is not None]


def build_trainer(config: DictConfig, start: Start, stop: StopRequest) -> Trainer:
    """Build the Trainer; write nothing yet. Raise UserError for what Lightning, a logger or a callback refuses."""
    try:
        callbacks = [hydra.utils.instantiate(callback) for callback in given(config.callbacks)]
        callbacks.append(EpochLines(RunLog(start.folder)))
        has_bar = shows_bar(config.trainer.enable_progress_bar)
        if has_bar:
            callbacks.append(RunBar())
        trainer = Trainer(
            **{**arguments(config, "trainer"), "enable_progress_bar": has_bar},
            plugins=[AtomicCheckpointIO(start.checkpoint), *slurm.environments()],
            logger=[hydra.utils.instantiate(logger) for logger in given(config.logger)],
            callbacks=[*callbacks, *checkpoint_callbacks(start.folder, stop)],
            default_root_dir=start.folder.path,
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
