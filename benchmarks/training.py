"""How fast training is: beside what a user would write, beside the processor's limit, and what its parts cost.

    python benchmarks/training.py
    python benchmarks/training.py peers --repeats 5 --markdown
    python benchmarks/training.py peers accuracy --device gpu
    python benchmarks/training.py --quick

peers: `python train.py` with everything that is on by default, except augmentation, which the peers do not have, beside
(1) Lightning, torchvision transforms, a DataLoader and `nn.TransformerEncoder`, and (2) vit-pytorch in a plain loop.
All have the default model's architecture (805,130 parameters, vit-pytorch's a few hundred less: it has no biases at the
projections to queries, keys and values), batch size, dropout 0.1, AdamW and gradient clipping. The peers' dropout also
falls on attention weights, where ours has none by default. Ours goes through the whole first epoch, whose frames of
early training come at its first 1, 2, 4 ... batches; the peers, which do nothing of that kind, through some batches.
parts: where a step's time goes, and how near it is to the time of its matrix products alone. On a GPU, these are the
processor's times, which does not wait for it.
accuracy: seconds of training with validations and figures until 99% of the validation images are correct and the
test accuracy of the best epoch at the end.
Every measurement is a process of its own, on real MNIST where MNIST_DIR or data/ has it; repeats are interleaved, and a
number is the median of its repeats with the smallest and the largest behind it.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from parts import in_child, option_parser, parse
from tables import machine, spread, table, versions

PROJECT = Path(__file__).resolve().parent.parent
WARM_UP = 10  # batches that are not timed
GOAL = 0.99  # validation accuracy
PLAIN = ("data.augment=false", "model.dropout=0.1")  # as the peers
LIGHTNING, OURS = ("lightning", "32-true"), ("ours", "32-true")


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    batch_size: int
    batches: int  # WARM_UP of them are not timed
    device: str  # cpu or gpu
    quick: bool


# --- one measurement, in a process of its own -------------------------------------------------------------------


def training_images() -> tuple[Any, Any]:
    """uint8 [image, 1, 28, 28] and labels of the training split: MNIST, or the digits where there is none."""
    from attention_visualizer.data.datamodule import ImageDataModule

    datamodule = ImageDataModule()
    datamodule.load()
    return datamodule.splits["train"]


def now() -> float:
    """Seconds, when all that a GPU was given is done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def clock() -> Any:
    """A Lightning callback that knows when the first batch after warming up began and when the last one ended."""
    from lightning import Callback

    class Clock(Callback):
        began = ended = 0.0
        batches = 0

        def on_train_batch_start(self, *_: Any) -> None:
            if self.batches == WARM_UP:
                self.began = now()

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.batches += 1
            if trainer.is_last_batch or self.batches == trainer.max_steps:
                self.ended = now()

        @property
        def seconds_a_batch(self) -> float:
            return (self.ended - self.began) / (self.batches - WARM_UP)

    return Clock()


def measure_lightning(scale: Scale, precision: str, workers: int) -> dict[str, float]:
    """What a user would write."""
    import lightning
    import torch
    from PIL import Image
    from torch import nn
    from torch.utils.data import DataLoader, Dataset
    from torchmetrics.classification import MulticlassAccuracy
    from torchvision import transforms

    images, labels = training_images()

    class ImageSet(Dataset[Any]):
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

    loader = DataLoader(ImageSet(), scale.batch_size, True, num_workers=workers, drop_last=True)
    timer = clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            accelerator=scale.device,
            devices=1,
            precision=precision,
            max_epochs=-1,
            max_steps=scale.batches,
            gradient_clip_val=1.0,
            default_root_dir=folder,
            callbacks=[timer],
            enable_checkpointing=False,
        )
        trainer.fit(Peer(), loader)
    return {"images_per_second": scale.batch_size / timer.seconds_a_batch}


def measure_vit_pytorch(scale: Scale) -> dict[str, float]:
    import torch
    from vit_pytorch import ViT

    device = "cuda" if scale.device == "gpu" else "cpu"
    images, labels = (each.to(device) for each in training_images())
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
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, weight_decay=0.05)
    order = torch.randperm(len(labels))
    began = 0.0
    for batch in range(scale.batches):
        if batch == WARM_UP:
            began = now()
        start = batch * scale.batch_size % (len(labels) - scale.batch_size)
        chosen = order[start : start + scale.batch_size]
        loss = torch.nn.functional.cross_entropy(model(images[chosen]), labels[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return {"images_per_second": scale.batch_size * (scale.batches - WARM_UP) / (now() - began)}


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


def run_train(overrides: list[str], *callbacks: Any) -> None:
    """`python train.py` in this process, with callbacks before its own."""
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import open_dict

    from attention_visualizer.commands import train

    build = train.build_trainer

    def with_callbacks(*args: Any) -> Any:
        trainer = build(*args)
        trainer.callbacks[:0] = callbacks
        return trainer

    train.build_trainer = with_callbacks
    with tempfile.TemporaryDirectory() as folder:
        with initialize_config_dir(version_base="1.3", config_dir=str(PROJECT / "conf")):
            config = compose("train", [f"runs_dir={folder}", *overrides], return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        with open_dict(config):
            del config.hydra
        train.train(config)


def device_overrides(scale: Scale, precision: str) -> list[str]:
    return [f"trainer={scale.device}", f"trainer.precision={precision}", f"data.batch_size={scale.batch_size}"]


def measure_ours(scale: Scale, precision: str, *overrides: str) -> dict[str, float]:
    """The first epoch of `python train.py`, its parts timed from outside."""
    import torch
    from lightning.pytorch.strategies import SingleDeviceStrategy

    from attention_visualizer.data import datamodule
    from attention_visualizer.training import classifier
    from attention_visualizer.watching import attention_logger

    watch, timer = Stopwatch(), clock()
    # Halves of a batch go forward and backward at once, so these are one part.
    watch.wrap(classifier.Halves, "loss", "forward and backward")
    watch.wrap(classifier.Classifier, "forward", "forward and backward")
    watch.wrap(classifier.Classifier, "training_loss", "forward and backward")
    watch.wrap(SingleDeviceStrategy, "backward", "forward and backward")
    watch.wrap(torch.nn.utils, "clip_grad_norm_", "optimiser")
    watch.wrap(torch.optim.AdamW, "step", "optimiser")
    watch.wrap(classifier.Classifier, "training_step", "own overhead")
    watch.wrap(datamodule, "augment_batch", "augmentation")
    watch.wrap(attention_logger.AttentionLogger, "_log_frame", "watching")
    begun: dict[str, float] = {}
    ended: dict[str, float] = {}
    start = timer.on_train_batch_start

    def begin_after_warm_up(*arguments: Any) -> None:
        start(*arguments)
        if timer.batches == WARM_UP:
            begun.update(watch.seconds)

    timer.on_train_batch_start = begin_after_warm_up
    timer.on_validation_start = lambda *_: ended.update(watch.seconds)  # it follows the last batch
    few = [f"trainer.limit_train_batches={scale.batches}"] if scale.quick else []
    brief = ["trainer.max_epochs=1", "test=false", *few]
    run_train([*brief, *device_overrides(scale, precision), *overrides], timer)
    step, steps = timer.seconds_a_batch, timer.batches - WARM_UP
    parts = {name: (ended[name] - begun.get(name, 0.0)) / steps for name in ended if name != "own overhead"}
    parts["own overhead"] = step - sum(parts.values())
    return {"images_per_second": scale.batch_size / step, "step": step, **parts}


def measure_accuracy(scale: Scale, precision: str, seed: int) -> dict[str, float]:
    """A whole run. `seconds` from the first batch to the validation that reached the goal, NaN if none did."""
    import lightning

    class Watch(lightning.Callback):
        began = 0.0
        reached = math.nan
        ended = 0.0
        tested = math.nan

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            self.began = self.began or now()

        def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
            self.ended = now()
            accuracy = float(module.validation_accuracy.compute())
            if math.isnan(self.reached) and accuracy >= GOAL:
                self.reached = self.ended - self.began

        def on_test_epoch_end(self, trainer: Any, module: Any) -> None:
            self.tested = float(module.test_accuracy.compute())

    watch = Watch()
    few = ["trainer.max_epochs=1", f"trainer.limit_train_batches={scale.batches}"] if scale.quick else []
    run_train([f"seed={seed}", *few, *device_overrides(scale, precision)], watch)
    return {"goal": watch.reached, "seconds": watch.ended - watch.began, "test": watch.tested}


def measure_products(batch_size: int, device: str) -> dict[str, float]:
    """The matrix products of one float32 training step, each alone at its own shape and layout, and attention's at
    the rate of the others."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.benchmark import Timer
    from torch.utils.flop_counter import FlopCounterMode

    from attention_visualizer.models.vision_transformer import VisionTransformer

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
        left, right = (torch.empty_strided(*shape, device=device).normal_() for shape in shapes)
        names = {"torch": torch, "left": left, "right": right, "out": left @ right}
        timer = Timer("torch.mm(left, right, out=out)", globals=names, num_threads=torch.get_num_threads())
        seconds += times * timer.blocked_autorange(min_run_time=0.05).median
        done += times * 2 * left.shape[0] * left.shape[1] * right.shape[1]
    rate = done / seconds
    return {"rate": rate, "operations": operations / batch_size, "images_per_second": batch_size * rate / operations}


def measure_here(scale: Scale, way: str, *details: Any) -> dict[str, float]:
    import torch

    torch.manual_seed(0)
    if way == "lightning":
        runs = [measure_lightning(scale, details[0], workers) for workers in ((0,) if scale.quick else (0, 1, 2))]
        return max(runs, key=lambda found: found["images_per_second"])
    kinds: dict[str, Callable[..., dict[str, float]]] = {
        "vit-pytorch": measure_vit_pytorch,
        "ours": measure_ours,
        "accuracy": measure_accuracy,
    }
    if way == "products":
        return measure_products(scale.batch_size, "cuda" if scale.device == "gpu" else "cpu")
    return kinds[way](scale, *details)


# --- tables -----------------------------------------------------------------------------------------------------


Way = tuple[str, ...]


def interleaved(ways: Sequence[Way], repeats: int, scale: Scale) -> dict[Way, list[dict[str, float]]]:
    found: dict[Way, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way in ways:
            found[way].append(in_child(__file__, asdict(scale), *way, title=" ".join(map(str, way))))
    return found


def peers_table(scale: Scale, repeats: int, markdown: bool) -> str:
    attention_too, compiled = "model.attention_dropout=0.1", "compile=true"
    ways: dict[Way, str] = {
        LIGHTNING: "Lightning, torchvision, nn.TransformerEncoder",
        ("vit-pytorch",): "vit-pytorch, plain loop, images in memory",
        (*OURS, *PLAIN): "train.py",
        (*OURS, *PLAIN, attention_too): f"train.py {attention_too}",
        ("lightning", "bf16-mixed"): "Lightning peer in bfloat16",
        ("ours", "bf16-mixed", *PLAIN): "train.py trainer=bf16",
    }
    if scale.device == "gpu":
        ways[("ours", "bf16-mixed", *PLAIN, compiled)] = f"train.py trainer=gpu {compiled}"
    if scale.quick:
        ways = {way: title for way, title in ways.items() if way in (LIGHTNING, ("vit-pytorch",), (*OURS, *PLAIN))}
    found = interleaved(list(ways), repeats, scale)
    rates = {way: [each["images_per_second"] for each in runs] for way, runs in found.items()}
    rows = []
    for way, title in ways.items():
        ratios = [ours / peer for ours, peer in zip(rates[way], rates[LIGHTNING], strict=True)]
        rows.append((title, spread(rates[way], ",.0f"), spread(ratios, ".2f")))
    header = (f"training, batch {scale.batch_size}, dropout 0.1, no augmentation", "images/s", "of the first")
    return table(header, rows, markdown)


def parts_table(scale: Scale, repeats: int, markdown: bool) -> str:
    ways: dict[Way, str] = {
        (*OURS, *PLAIN): "dropout 0.1",
        (*OURS, "data.augment=false"): "dropout 0",
        OURS: "defaults",
        ("ours", "bf16-mixed", *PLAIN): "0.1, bf16",
    }
    found = interleaved([*ways, ("products",)], repeats, scale)
    limits = [each["images_per_second"] for each in found["products",]]
    rows = []
    for part in ("forward and backward", "optimiser", "augmentation", "watching", "own overhead"):
        shares = [[each.get(part, 0.0) / each["step"] for each in found[way]] for way in ways]
        rows.append((f"{part}, share of a step", *(spread(each, ".1%") for each in shares)))
    rates = {way: [each["images_per_second"] for each in found[way]] for way in ways}
    rows.append(("images/s", *(spread(each, ",.0f") for each in rates.values())))
    near = [
        spread([rate / limit for rate, limit in zip(own, limits, strict=True)], ".0%") if way[1] == OURS[1] else "-"
        for way, own in rates.items()
    ]
    rows.append(("of float32 products' limit", *near))
    arithmetic = found["products",][0]["operations"] / 1e6
    note = (
        f"\nmatrix products alone: {spread([each['rate'] / 1e9 for each in found['products',]], '.0f')} GFLOP/s, "
        f"{arithmetic:.0f} MFLOP an image, so at most {spread(limits, ',.0f')} images/s"
    )
    return table((f"train.py, batch {scale.batch_size}", *ways.values()), rows, markdown) + "\n" + note


def accuracy_table(scale: Scale, repeats: int, markdown: bool) -> str:
    precision = "bf16-mixed" if scale.device == "gpu" else "32-true"
    runs = [
        in_child(__file__, asdict(scale), "accuracy", precision, seed, title=f"training, seed {seed}")
        for seed in range(repeats)
    ]
    seconds = [spread([each[name] for each in runs], ".1f") for name in ("goal", "seconds")]
    row = (f"train.py trainer={scale.device}", *seconds, spread([each["test"] for each in runs], ".2%"))
    header = ("seconds of training", f"to {GOAL:.0%} of validation", "in all", "test accuracy, best epoch")
    return table(header, [row], markdown)


PARTS = {"peers": peers_table, "parts": parts_table, "accuracy": accuracy_table}


def main() -> None:
    parser = option_parser(__doc__, PARTS, "a few batches", repeats=3)
    parser.add_argument("--batch-size", type=int, default=128, help="images a step (default: 128)")
    parser.add_argument("--batches", type=int, default=130, help="of the peers, 10 of them to warm up (default: 130)")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu", help="default: cpu")
    options = parse(parser, PARTS)
    if options.child:
        scale, *way = options.child
        print(json.dumps(measure_here(Scale(**scale), *way)))
        return
    if options.quick:
        options.batch_size, options.batches = 8, WARM_UP + 4
    scale = Scale(options.batch_size, options.batches, options.device, options.quick)
    packages = versions("torch", "torchvision", "lightning", "vit-pytorch")
    print(f"{packages}; {machine() if scale.device == 'cpu' else machine(gpu_name())}\n", flush=True)
    for part in options.parts:
        print(PARTS[part](scale, options.repeats, options.markdown), end="\n\n", flush=True)


def gpu_name() -> str:
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU that PyTorch can use: leave --device out")
    return torch.cuda.get_device_name()


if __name__ == "__main__":
    main()
