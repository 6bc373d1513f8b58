"""Jobs of the scheduler SLURM that are put back into its queue: by SLURM itself, or before their time runs out."""

from __future__ import annotations

import os
import signal
import subprocess

from lightning.pytorch.plugins.environments import SLURMEnvironment

from attention_visualizer.support.text import print_sanitised


def environments() -> list[SLURMEnvironment]:
    """Return the plugin for Lightning where this is a SLURM job; one that leaves signals and checkpoints to us.

    Lightning's own answer to SIGUSR1 is a checkpoint beside last.ckpt that no other command knows.
    """
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


def is_requeued() -> bool:
    """Whether SLURM starts this job again after an earlier try: its run is to go on, as with resume=auto."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")


def requeue_after(exit_code: object) -> None:
    """Put this job back into the queue if it was stopped by SIGUSR1, which `sbatch --signal=USR1@<seconds>` sends
    before the time limit."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or exit_code != 128 + getattr(signal, "SIGUSR1", 0):
        return
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
        failed = done.stderr.strip() if done.returncode else None
    except (OSError, subprocess.SubprocessError) as error:
        failed = str(error)
    print_sanitised(f"Requeued job {job}" if failed is None else f"Job {job} was not requeued: {failed}")
