"""How fast training is: beside what a user would write, beside the processor's limit, and what its parts cost.

    python benchmarks/training.py
    python benchmarks/training.py peers --repeats 5 --markdown
    python benchmarks/training.py --quick

peers: `python train.py` with everything that is on by default, except augmentation, which the peers do not have, beside
(1) Lightning, torchvision transforms, a DataLoader and `nn.TransformerEncoder`, and (2) vit-pytorch in a plain loop.
The peers compute in float32. All have the default model's architecture (805,130 parameters, vit-pytorch's a few hundred
less: it has no biases at the projections to queries, keys and values), batch size, dropout 0.1, AdamW and gradient
clipping. The peers' dropout also falls on attention weights, where ours has none by default.
parts: where a step's time goes, and how near it is to the time of its matrix products alone.
Every measurement is a process of its own, on real MNIST where MNIST_DIR or data/ has it; repeats are interleaved, and a
number is the median of its repeats with the smallest and the largest behind it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tables import machine, table, versions

PROJECT = Path(__file__).resolve().parent.parent
WARM_UP = 10  # batches that are not timed
WAYS = {
    "lightning": "Lightning, torchvision, nn.TransformerEncoder",
    "vit-pytorch": "vit-pytorch, plain loop, images in memory",
    "ours": "train.py",
    "ours-bf16": "train.py trainer=bf16",
}


# --- one measurement, in a process of its own -------------------------------------------------------------------


def training_images() -> tuple[Any, Any]:
    """uint8 [image, 1, 28, 28] and labels of the training split: MNIST, or the digits where there is none."""
    from attention_visualizer.data import ImageDataModule

    data = ImageDataModule()
    data.load()
    return data.splits["train"]


def clock() -> Any:
    """A Lightning callback whose `moments` are the times at which training batches ended."""
    from lightning import Callback

    class Clock(Callback):
        def __init__(self) -> None:
            self.moments: list[float] = []

        def on_train_batch_end(self, *_: Any) -> None:
            self.moments.append(time.perf_counter())

    return Clock()


def images_per_second(moments: list[float], batch_size: int) -> float:
    return batch_size * (len(moments) - 1 - WARM_UP) / (moments[-1] - moments[WARM_UP])


def measure_lightning(batch_size: int, batches: int, workers: int) -> dict[str, float]:
    """What a user would write."""
    import lightning
    import torch
    from PIL import Image
    from torch import nn
    from torch.utils.data import DataLoader, Dataset
    from torchmetrics.classification import MulticlassAccuracy
    from torchvision import transforms

    images, labels = training_images()

    class Pictures(Dataset[Any]):
        """As torchvision.datasets.MNIST reads its images."""

        transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])

        def __len__(self) -> int:
            return len(labels)

        def __getitem__(self, index: int) -> tuple[Any, int]:
            return self.transform(Image.fromarray(images[index, 0].numpy(), mode="L")), int(labels[index])

    class Peer(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(1, 128, 7, 7)
            self.class_token = nn.Parameter(torch.zeros(1, 1, 128))
            self.positions = nn.Parameter(torch.randn(1, 17, 128) * 0.02)
            self.drop = nn.Dropout(0.1)
            layer = nn.TransformerEncoderLayer(128, 4, 256, 0.1, "gelu", batch_first=True, norm_first=True)
            self.encoder = nn.TransformerEncoder(layer, 6, nn.LayerNorm(128), enable_nested_tensor=False)
            self.head = nn.Linear(128, 10)
            self.accuracy = MulticlassAccuracy(10)

        def forward(self, images: Any) -> Any:
            tokens = self.patches(images).flatten(2).transpose(1, 2)
            tokens = torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], dim=1)
            return self.head(self.encoder(self.drop(tokens + self.positions))[:, 0])

        def training_step(self, batch: Any, _: int) -> Any:
            logits = self(batch[0])
            loss = nn.functional.cross_entropy(logits, batch[1], label_smoothing=0.05)
            self.log("train/loss", loss, prog_bar=True)
            self.accuracy(logits, batch[1])
            self.log("train/accuracy", self.accuracy, on_step=False, on_epoch=True)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1.5e-3, weight_decay=0.05)

    loader = DataLoader(Pictures(), batch_size, True, num_workers=workers, drop_last=True)
    timer = clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=-1,
            max_steps=batches,
            gradient_clip_val=1.0,
            default_root_dir=folder,
            callbacks=[timer],
            enable_checkpointing=False,
        )
        trainer.fit(Peer(), loader)
    return {"images_per_second": images_per_second(timer.moments, batch_size)}


def measure_vit_pytorch(batch_size: int, batches: int) -> dict[str, float]:
    import torch
    from vit_pytorch import ViT

    images, labels = training_images()
    images = (images.float() / 255 - 0.1307) / 0.3081
    model = ViT(
        image_size=28,
        patch_size=7,
        channels=1,
        num_classes=10,
        dim=128,
        depth=6,
        heads=4,
        dim_head=32,
        mlp_dim=256,
        dropout=0.1,
        emb_dropout=0.1,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, weight_decay=0.05)
    order = torch.randperm(len(labels))
    moments = []
    for batch in range(batches):
        start = batch * batch_size % (len(labels) - batch_size)
        chosen = order[start : start + batch_size]
        loss = torch.nn.functional.cross_entropy(model(images[chosen]), labels[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        moments.append(time.perf_counter())
    return {"images_per_second": images_per_second(moments, batch_size)}


class Stopwatch:
    """Seconds by part; those of a part within another count for the inner one only."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._lap()
        self._open.append(name)
        try:
            yield
        finally:
            self._lap()
            self._open.pop()

    def _lap(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def wrap(self, owner: Any, name: str, part: str) -> None:
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part("watching" if "watching" in self._open else part):
                return function(*args, **kwargs)

        setattr(owner, name, timed)


def measure_ours(batch_size: int, batches: int, *overrides: str) -> dict[str, float]:
    """`python train.py`, its parts timed from outside."""
    import torch
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from lightning.pytorch.strategies import SingleDeviceStrategy
    from omegaconf import open_dict

    from attention_visualizer import callbacks, classifier, data

    watch, timer = Stopwatch(), clock()
    watch.wrap(classifier.Classifier, "training_logits", "forward")
    watch.wrap(classifier.F, "cross_entropy", "forward")
    watch.wrap(SingleDeviceStrategy, "backward", "backward")
    watch.wrap(torch.nn.utils, "clip_grad_norm_", "optimiser")
    watch.wrap(torch.optim.AdamW, "step", "optimiser")
    watch.wrap(classifier.Classifier, "training_step", "own overhead")
    watch.wrap(data, "augment_batch", "augmentation")
    watch.wrap(callbacks.AttentionLogger, "_log_frame", "watching")
    started: dict[str, float] = {}

    sys.path.insert(0, str(PROJECT))
    program: Any = importlib.import_module("train")
    build = program.build_trainer

    def with_clock(*args: Any) -> Any:
        trainer = build(*args)
        trainer.callbacks.append(timer)
        return trainer

    def begin_after_warm_up(*_: Any) -> None:
        if len(timer.moments) == WARM_UP + 1:
            started.update(watch.seconds)

    program.build_trainer = with_clock
    timer.on_train_batch_start = begin_after_warm_up
    with tempfile.TemporaryDirectory() as folder:
        fixed = ("trainer.max_epochs=1", f"trainer.limit_train_batches={batches}", "test=false", "trainer=cpu")
        own = [f"data.batch_size={batch_size}", f"runs_dir={folder}", *fixed, *overrides]
        seen: dict[str, float] = {}
        timer.on_validation_start = lambda *_: seen.update(watch.seconds)  # it follows the last batch
        with initialize_config_dir(version_base="1.3", config_dir=str(PROJECT / "conf")):
            config = compose("train", own, return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        with open_dict(config):
            del config.hydra
        program.train(config, sweeping=False)
    total = timer.moments[-1] - timer.moments[WARM_UP]
    steps = len(timer.moments) - 1 - WARM_UP
    parts = {name: (seen[name] - started.get(name, 0.0)) / steps for name in seen if name != "own overhead"}
    parts["own overhead"] = total / steps - sum(parts.values())
    return {"images_per_second": images_per_second(timer.moments, batch_size), "step": total / steps, **parts}


def measure_products(batch_size: int) -> dict[str, float]:
    """The matrix products of one float32 training step, each alone at its own shape and layout, and attention's at
    the rate of the others."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode

    from attention_visualizer.model import VisionTransformer

    products: Counter[Any] = Counter()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = function.overloadpacket.__name__
            if name in ("mm", "addmm"):
                left, right = args[-2:]
                products[tuple((tuple(each.shape), tuple(each.stride())) for each in (left, right))] += 1
            return function(*args, **(kwargs or {}))

    model = VisionTransformer(dropout=0.0).train()
    images, labels = torch.randn(batch_size, 1, 28, 28), torch.randint(0, 10, (batch_size,))

    def step() -> None:
        torch.nn.functional.cross_entropy(model(images), labels).backward()

    with Recorder():
        step()
    with FlopCounterMode(display=False) as counter:
        step()
    operations = counter.get_total_flops()
    seconds = done = 0.0
    for shapes, times in products.items():
        left, right = (torch.empty_strided(*shape).normal_() for shape in shapes)
        out = left @ right
        laps = []
        for _ in range(30):
            began = time.perf_counter()
            torch.mm(left, right, out=out)
            laps.append(time.perf_counter() - began)
        seconds += times * statistics.median(laps)
        done += times * 2 * left.shape[0] * left.shape[1] * right.shape[1]
    rate = done / seconds
    return {"rate": rate, "operations": operations / batch_size, "images_per_second": batch_size * rate / operations}


def measure_here(way: str, batch_size: int, batches: int) -> dict[str, float]:
    import torch

    torch.manual_seed(0)
    same = ("data.augment=false", "model.dropout=0.1")
    kinds: dict[str, Callable[[], dict[str, float]]] = {
        "lightning": lambda: max(
            (measure_lightning(batch_size, batches, workers) for workers in (0, 1, 2)),
            key=lambda found: found["images_per_second"],
        ),
        "vit-pytorch": lambda: measure_vit_pytorch(batch_size, batches),
        "ours": lambda: measure_ours(batch_size, batches, *same),
        "ours-bf16": lambda: measure_ours(batch_size, batches, *same, "trainer=bf16", "trainer.accelerator=cpu"),
        "defaults": lambda: measure_ours(batch_size, batches),
        "no dropout": lambda: measure_ours(batch_size, batches, "data.augment=false", "model.dropout=0.0"),
        "products": lambda: measure_products(batch_size),
    }
    return kinds[way]()


def measure(way: str, batch_size: int, batches: int) -> dict[str, float]:
    """In a child process."""
    print(f"{way} ...", file=sys.stderr, flush=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps([way, batch_size, batches])]
    answer = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if answer.returncode:
        raise SystemExit(f"{way} failed:\n{answer.stderr[-2000:]}")
    return json.loads(answer.stdout.splitlines()[-1])


# --- tables -----------------------------------------------------------------------------------------------------


def interleaved(ways: list[str], repeats: int, batch_size: int, batches: int) -> dict[str, list[dict[str, float]]]:
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way in ways:
            found[way].append(measure(way, batch_size, batches))
    return found


def spread(numbers: list[float], form: str) -> str:
    return f"{statistics.median(numbers):{form}} ({min(numbers):{form}} to {max(numbers):{form}})"


def peers_table(repeats: int, batch_size: int, batches: int, markdown: bool) -> str:
    found = interleaved(list(WAYS), repeats, batch_size, batches)
    rates = {way: [each["images_per_second"] for each in runs] for way, runs in found.items()}
    rows = []
    for way, title in WAYS.items():
        ratios = [ours / peer for ours, peer in zip(rates[way], rates["lightning"], strict=True)]
        rows.append((title, spread(rates[way], ",.0f"), spread(ratios, ".2f")))
    header = (f"training, batch {batch_size}, dropout 0.1, no augmentation", "images/s", "of the first")
    return table(header, rows, markdown)


def parts_table(repeats: int, batch_size: int, batches: int, markdown: bool) -> str:
    ways = ["ours", "no dropout", "defaults", "ours-bf16"]
    found = interleaved([*ways, "products"], repeats, batch_size, batches)
    titles = {"ours": "dropout 0.1", "no dropout": "dropout 0", "defaults": "defaults", "ours-bf16": "0.1, bf16"}
    limits = [each["images_per_second"] for each in found["products"]]
    rows = []
    for part in ("forward", "backward", "optimiser", "augmentation", "watching", "own overhead"):
        shares = [[each.get(part, 0.0) / each["step"] for each in found[way]] for way in ways]
        rows.append((f"{part}, share of a step", *(spread(each, ".1%") for each in shares)))
    rates = {way: [each["images_per_second"] for each in found[way]] for way in ways}
    rows.append(("images/s", *(spread(rates[way], ",.0f") for way in ways)))
    near = {
        way: [rate / limit for rate, limit in zip(rates[way], limits, strict=True)]
        for way in ways
        if way != "ours-bf16"
    }
    rows.append(("of float32 products' limit", *(spread(near[way], ".0%") if way in near else "-" for way in ways)))
    arithmetic = found["products"][0]["operations"] / 1e6
    note = (
        f"\nmatrix products alone: {spread([each['rate'] / 1e9 for each in found['products']], '.0f')} GFLOP/s, "
        f"{arithmetic:.0f} MFLOP an image, so at most {spread(limits, ',.0f')} images/s"
    )
    header = (f"train.py, batch {batch_size}", *(titles[way] for way in ways))
    return table(header, rows, markdown) + "\n" + note


PARTS = {"peers": peers_table, "parts": parts_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="a few batches, once: shows that it runs")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement (default: 3)")
    parser.add_argument("--batch-size", type=int, default=128, help="images a step (default: 128)")
    parser.add_argument("--batches", type=int, default=130, help="of each, 10 of them to warm up (default: 130)")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    if arguments.child:
        print(json.dumps(measure_here(*json.loads(arguments.child))))
        return
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    print(f"{versions('torch', 'torchvision', 'lightning', 'vit-pytorch')}; {machine()}\n", flush=True)
    repeats, batch_size, batches = arguments.repeats, arguments.batch_size, arguments.batches
    if arguments.quick:
        repeats, batch_size, batches = 1, 8, WARM_UP + 4
    for part in arguments.parts or PARTS:
        print(PARTS[part](repeats, batch_size, batches, arguments.markdown), flush=True)
        print(flush=True)


if __name__ == "__main__":
    main()
