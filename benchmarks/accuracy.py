"""How accurate the recipes are on real MNIST: test accuracy of the last weights, over seeds.

    MNIST_DIR=... python benchmarks/accuracy.py
    MNIST_DIR=... python benchmarks/accuracy.py accurate --seeds 0 --folder accuracy -- trainer=bf16

Each run is `python train.py` with what its row says, without logging (which does not move the weights), and with what
follows `--`. No weights are chosen: those of the last step are tested, once for each seed; validation accuracy is
printed beside it, and it is what recipes were chosen by. Runs are kept in the folder: finished ones are not repeated,
and interrupted ones go on, so that this can be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from tables import machine, table, versions

PROJECT = Path(__file__).resolve().parent.parent
RECIPES = {
    "default": [],
    "default-30": ["trainer.max_epochs=30"],
    "seed": ["experiment=seed"],
    "accurate": ["experiment=accurate"],
    # What the default's parts are worth, each against it.
    "no-augmentation": ["data.augment=false"],
    "no-elastic": ["data.elastic=0"],
    "no-fade": ["data.fade=0"],
    "no-smoothing": ["optimizer.label_smoothing=0"],
}
SAME = ["test=false", "data.fallback=null", "callbacks=none", "logger=none", "trainer.enable_progress_bar=false"]
USUAL = ("default", "default-30", "accurate")


def only_one_in(folder: Path) -> Any:
    """Holds the folder, or ends the program: two that go on with the same run would write into each other's files."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise SystemExit(
            f"{folder}: another accuracy.py is at work there; wait for it or give another --folder"
        ) from error
    return lock


def finish(folder: Path, overrides: list[str]) -> Path:
    """The folder of a completed run: one that is there, one that goes on, or a new one."""
    runs = sorted(path.parent for path in folder.glob("*/run.json"))
    for run in runs:
        check_settings(run, overrides)
    for run in runs:
        if json.loads((run / "run.json").read_text())["status"] == "completed":
            return run
    started = next((run for run in reversed(runs) if (run / "checkpoints" / "last.ckpt").is_file()), None)
    command = [sys.executable, str(PROJECT / "train.py")]
    if started is not None:
        command.append(f"ckpt_path={started / 'checkpoints' / 'last.ckpt'}")
    else:
        command += [f"runs_dir={folder}", *SAME, *overrides]
    print(" ".join(command), file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"training failed with exit code {done.returncode}; run this again to go on")
    return finish(folder, overrides)


def check_settings(run: Path, overrides: list[str]) -> None:
    """End the program if the run has other settings than this command, beside which its accuracy would be printed."""
    import yaml

    given = yaml.safe_load((run / ".hydra" / "overrides.yaml").read_text())
    other = {each for each in given if not each.startswith("runs_dir=")} ^ {*SAME, *overrides}
    if other:
        raise SystemExit(f"{run} differs in {', '.join(sorted(other))}: give another --folder")


def tested(run: Path) -> dict[str, Any]:
    """Return the last weights' accuracy on the test and the validation set, tested once and kept in a file."""
    kept = run / "last_weights.json"
    manifest = json.loads((run / "run.json").read_text())
    if not kept.is_file():
        import torch

        from attention_visualizer.data.datamodule import ImageDataModule
        from attention_visualizer.runs.checkpoint import load_checkpoint

        model = load_checkpoint(run / "checkpoints" / "last.ckpt").build_model()
        data = ImageDataModule(name=manifest["data"]["name"], fallback=None)
        data.load()
        found: dict[str, Any] = {"parameters": sum(each.numel() for each in model.parameters())}
        for split in ("validation", "test"):
            with torch.inference_mode():
                correct = [(model(images).argmax(dim=1) == labels) for images, labels in data.evaluation_batches(split)]
            found[split] = float(torch.cat(correct).float().mean())
        kept.write_text(json.dumps(found))
    return (
        json.loads(kept.read_text())
        | {name: manifest["metrics"][name] for name in ("epochs", "seconds")}
        | {"commit": manifest["commit"] or "unknown"}
    )


def percent(shares: list[float]) -> str:
    """Mean and standard deviation, and each."""
    each = ", ".join(f"{100 * share:.2f}" for share in shares)
    if len(shares) == 1:
        return f"{each}%"
    return f"{100 * statistics.mean(shares):.2f} ± {100 * statistics.stdev(shares):.2f}% ({each})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"of {', '.join(RECIPES)} (default: {USUAL})")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--folder", type=Path, default=Path("accuracy"), help="of the runs (default: accuracy)")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    arguments, overrides = parser.parse_args(words[:end]), words[end + 1 :]

    unknown = set(arguments.recipes) - set(RECIPES)
    if unknown:
        parser.error(f"there is no recipe {', '.join(sorted(unknown))}: choose from {', '.join(RECIPES)}")
    print(f"{versions('torch', 'lightning')}; {machine()}\n", flush=True)
    rows = []
    lock = only_one_in(arguments.folder)
    for recipe in arguments.recipes or USUAL:
        chosen = [*RECIPES[recipe], *overrides]
        runs = [
            tested(finish(arguments.folder / recipe / f"seed_{seed}", [*chosen, f"seed={seed}"]))
            for seed in arguments.seeds
        ]
        rows.append(
            (
                recipe,
                " ".join(["python train.py", *chosen]),
                f"{runs[0]['parameters']:,}",
                str(runs[0]["epochs"]),
                ", ".join(sorted({run["commit"][:7] for run in runs})),
                percent([run["validation"] for run in runs]),
                percent([run["test"] for run in runs]),
            )
        )
    lock.release()
    header = ("recipe", "command", "parameters", "epochs", "commit", "validation, last weights", "test, last weights")
    print(table(header, rows, arguments.markdown))


if __name__ == "__main__":
    main()
