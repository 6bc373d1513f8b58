"""What watching costs while training: AttentionLogger in real runs, and statistics in the validation pass.

    python benchmarks/watching.py
    python benchmarks/watching.py validation --repeats 9 --markdown
    python benchmarks/watching.py --quick

runs: `Trainer.fit` of the default model with TensorBoard, with and without AttentionLogger, each in a process of its
own, on MNIST where MNIST_DIR or data/ has it. Validations are whole; of each epoch's training there are a few batches,
and an epoch's length and its early frames follow from the median batch and the median frame. A validation is timed
from outside, so the numbers hold what the callback's own clock may miss; the last row says how much of it is there.
validation: passes over 5,000 images in one process, plain, with the proof alone, and with all statistics.
Freed memory is kept in the process, as train.py does. Ways are interleaved; a number is the median of its repeats, with
the smallest and the largest behind it.
"""

from __future__ import annotations

import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parts import in_child, option_parser, parse
from tables import machine, spread, table, versions

EPOCHS = 10  # of the run that shares are given for


# --- one run, in a process of its own ---------------------------------------------------------------------------


def measure_run(watched: bool, quick: bool) -> dict[str, Any]:
    """Seconds. start, early, validations: at the hooks; clock: what the callback says of each epoch."""
    import torch
    from lightning import Callback, Trainer
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from attention_visualizer.data.datamodule import ImageDataModule
    from attention_visualizer.models.vision_transformer import VisionTransformer
    from attention_visualizer.support.allocator import keep_freed_memory
    from attention_visualizer.training.classifier import Classifier
    from attention_visualizer.watching.attention_logger import AttentionLogger

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    keep_freed_memory()
    found: dict[str, Any] = {"start": 0.0, "early": [], "validations": [], "clock": []}

    class Timed(AttentionLogger):
        def on_train_start(self, *arguments: Any) -> None:
            began = time.perf_counter()
            super().on_train_start(*arguments)
            found["start"] = time.perf_counter() - began

        def on_train_batch_end(self, *arguments: Any) -> None:
            frames = len(self.history.frames)
            began = time.perf_counter()
            super().on_train_batch_end(*arguments)
            if len(self.history.frames) > frames:
                found["early"].append(time.perf_counter() - began)

    class Stopwatch(Callback):
        """Comes before the logger: a validation begins for it first, and its end comes after all logging."""

        def __init__(self) -> None:
            self.began = 0.0
            self.moments: list[float] = []

        def on_train_batch_end(self, *arguments: Any) -> None:
            self.moments.append(time.perf_counter())

        def on_validation_start(self, *arguments: Any) -> None:
            self.began = time.perf_counter()

        def on_validation_end(self, trainer: Trainer, *arguments: Any) -> None:
            if not trainer.sanity_checking:
                found["validations"].append(time.perf_counter() - self.began)

    torch.manual_seed(0)
    data = ImageDataModule(name="digits" if quick else "mnist")
    data.load()
    stopwatch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=2,
            limit_train_batches=5 if quick else 20,
            num_sanity_val_steps=1,  # which the probe images are taken from
            gradient_clip_val=1.0,
            log_every_n_steps=10,
            callbacks=[stopwatch, Timed()] if watched else [stopwatch],
            logger=TensorBoardLogger(folder, name="board", version=""),
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Classifier(VisionTransformer(num_layers=2 if quick else 6), 10), data)
        if watched:
            written = EventAccumulator(str(Path(folder) / "board")).Reload()
            found["clock"] = [event.value for event in written.Scalars("watching/seconds")]
        moments = stopwatch.moments
        found["batch"] = statistics.median(after - before for before, after in zip(moments, moments[1:], strict=False))
        found["batches"] = len(data.train_dataloader())
    return found


# --- tables -----------------------------------------------------------------------------------------------------


def shares_of_epochs(plain: dict[str, Any], watched: dict[str, Any]) -> dict[str, float]:
    """What watching adds to an epoch, as a share of it without: to the first, to a later one, to each of ten."""
    # The first validation of a process warms up, with and without.
    validation = watched["validations"][1] - plain["validations"][1]
    epoch = plain["batch"] * plain["batches"] + plain["validations"][1]
    num_early = (plain["batches"] - 1).bit_length()  # after 1, 2, 4 ... batches, not after the last
    first = (
        watched["start"]
        + num_early * statistics.median(watched["early"])
        + watched["validations"][0]
        - plain["validations"][0]
    )
    return {
        "first": first / epoch,
        "later": validation / epoch,
        "mean": (first + (EPOCHS - 1) * validation) / (EPOCHS * epoch),
    }


def runs_table(repeats: int, quick: bool, markdown: bool) -> str:
    pairs = [(in_child(__file__, False, quick), in_child(__file__, True, quick)) for _ in range(repeats)]
    plain, watched = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    epochs = [each["batch"] * each["batches"] + each["validations"][1] for each in plain]
    shares = [shares_of_epochs(*pair) for pair in pairs]
    validations = [[each["validations"][1] for each in runs] for runs in (plain, watched)]
    ratios = [after / before for before, after in zip(*validations, strict=True)]
    clock = [each["clock"][1] / (each["validations"][1] - before["validations"][1]) for before, each in pairs]
    seconds = [spread(each, ".2f") + " s" for each in validations]
    early = [statistics.median(each["early"]) for each in watched]
    rows = [
        ("a validation, everything in it", *seconds, spread(ratios, ".2f")),
        ("an early frame", "-", f"{spread(early, '.3f')} s", "-"),
        ("before training", "-", f"{spread([each['start'] for each in watched], '.2f')} s", "-"),
        ("first epoch", f"{spread(epochs, '.1f')} s", "", f"{spread([1 + each['first'] for each in shares], '.3f')}"),
        ("a later epoch", "the same", "", spread([1 + each["later"] for each in shares], ".3f")),
        (f"each of {EPOCHS} epochs", "the same", "", spread([1 + each["mean"] for each in shares], ".3f")),
        ("the callback's clock, share of the difference", "-", spread(clock, ".0%"), "-"),
    ]
    title = "digits, 2 layers" if quick else "default model, MNIST"
    return table((title, "without AttentionLogger", "with", "ratio"), rows, markdown)


def validation_table(repeats: int, quick: bool, markdown: bool) -> str:
    import torch

    from attention_visualizer.attention.capture import capture
    from attention_visualizer.attention.model_search import find_model
    from attention_visualizer.models.vision_transformer import VisionTransformer
    from attention_visualizer.support.allocator import keep_freed_memory
    from attention_visualizer.watching.validation import ValidationWatch

    keep_freed_memory()
    torch.manual_seed(0)
    count, size = (20, 10) if quick else (5000, 500)
    model = torch.nn.Sequential(VisionTransformer(num_layers=2 if quick else 6)).eval()
    batches = torch.randn(count, 1, 28, 28).split(size)

    def plain() -> None:
        for images in batches:
            model(images)

    def proven() -> None:
        for images in batches:
            with capture(model, consume=lambda layer: None):
                model(images)

    def measured() -> None:
        watch = ValidationWatch(found)
        for images in batches:
            with watch.batch():
                model(images)
        if watch.remarks():
            raise SystemExit(f"no statistics: {watch.remarks()}")

    ways: dict[str, Callable[[], None]] = {
        "plain": plain,
        "capture and its proof": proven,
        "all statistics": measured,
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with torch.inference_mode():
        found = find_model(model, batches[0], None, None)
        for repeat in range(repeats + 1):
            for way, run in ways.items():
                began = time.perf_counter()
                run()
                if repeat:  # the first one warms up
                    seconds[way].append(time.perf_counter() - began)
    rows = []
    for way, own in seconds.items():
        ratios = [with_it / without for with_it, without in zip(own, seconds["plain"], strict=True)]
        rows.append((way, f"{spread(own, '.3f')} s", spread(ratios, ".2f")))
    return table((f"validation pass, {count:,} images, batches of {size}", "time", "of plain"), rows, markdown)


PARTS = {"validation": validation_table, "runs": runs_table}


def main() -> None:
    options = parse(option_parser(__doc__, PARTS, "a small model", repeats=5), PARTS)
    if options.child:
        print(json.dumps(measure_run(*options.child)))
        return
    print(f"{versions('torch', 'lightning', 'tensorboard')}; {machine()}\n", flush=True)
    for part in options.parts:
        print(PARTS[part](options.repeats, options.quick, options.markdown), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
