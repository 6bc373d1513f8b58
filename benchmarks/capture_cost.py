"""What `capture` costs: time and peak memory beside a plain forward pass and beside the usual way.

    python benchmarks/capture_cost.py
    python benchmarks/capture_cost.py depth --markdown
    python benchmarks/capture_cost.py --quick

The usual way is the same model with fused attention turned off and hooks that store every map, then the same statistics
from the stored maps. Every measurement is a process of its own, so that one's peak memory is not another's. Times are
medians of processor time on one thread, the ways interleaved: other work on the machine disturbs them least.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, astuple, dataclass, replace
from typing import Any

from parts import in_child, option_parser, parse
from tables import machine, table, versions

MEBIBYTE = 2**20
FLOAT_BYTES = 4
# Of what is freed in blocks below 32 MiB, glibc's allocator keeps much, differently from run to run, unless each large
# block is made one of its own. So what is measured is what is in use.
RETURNS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(MEBIBYTE)}


@dataclass(frozen=True)
class Setup:
    """A timm ViT, `num_batches` batches of `batch_size` random images."""

    name: str
    image_size: int
    patch_size: int
    channels: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float
    batch_size: int
    num_batches: int

    @property
    def num_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def map_bytes(self) -> int:
        """One layer's weights of one batch."""
        return self.batch_size * self.heads * self.num_tokens**2 * FLOAT_BYTES

    @property
    def value_bytes(self) -> int:
        return self.batch_size * self.num_tokens * self.width * FLOAT_BYTES


DEFAULT = Setup("default model, 28 pixels", 28, 7, 1, 128, 6, 4, 2.0, 500, 10)
VIT_BASE = Setup("ViT-B/16, 224 pixels", 224, 16, 3, 768, 12, 12, 4.0, 64, 1)
VIT_LARGE = Setup("ViT-L/14, 518 pixels", 518, 14, 3, 1024, 24, 16, 4.0, 1, 1)
NARROW = Setup("ViT of width 192, 224 pixels", 224, 16, 3, 192, 12, 3, 4.0, 64, 1)
QUICK = Setup("small ViT, 32 pixels", 32, 8, 3, 32, 3, 2, 2.0, 2, 2)

PLACED = ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "pvt_v2_b1", "levit_128")

WAYS = {
    "plain": "plain forward pass",
    "watched": "capture, weights thrown away",
    "streamed": "capture, statistics streamed",
    "stored": "capture, maps stored, then statistics",
    "usual": "not fused, hooks store maps, then statistics",
}


@dataclass(frozen=True)
class Cost:
    seconds: float
    peak_bytes: int
    checksum: float


# --- one measurement, in a process of its own -------------------------------------------------------------------


def build_model(setup: Setup, fused: bool) -> Any:
    import torch
    from timm.layers import set_fused_attn
    from timm.models.vision_transformer import VisionTransformer

    set_fused_attn(fused)
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=setup.image_size,
        patch_size=setup.patch_size,
        in_chans=setup.channels,
        num_classes=10,
        embed_dim=setup.width,
        depth=setup.depth,
        num_heads=setup.heads,
        mlp_ratio=setup.mlp_ratio,
    ).eval()


@contextmanager
def stored_by_hooks(model: Any, setup: Setup) -> Iterator[list[Any]]:
    """The maps of the passes inside, as layers that the statistics take."""
    import torch

    from attention_visualizer.attention.capture import AttentionLayer
    from attention_visualizer.attention.geometry import Geometry

    side = setup.image_size // setup.patch_size
    geometry = Geometry((side, side), 1, (setup.patch_size, setup.patch_size))
    layers: list[Any] = []

    def store(module: Any, inputs: Any, output: Any) -> None:
        index = len(layers)
        layers.append(AttentionLayer(f"blocks.{index}.attn", index, output, torch.empty(0), geometry, 0.0))

    hooks = [block.attn.attn_drop.register_forward_hook(store) for block in model.blocks]
    try:
        yield layers
    finally:
        for hook in hooks:
            hook.remove()


def passes(way: str, setup: Setup, model: Any, totals: Any) -> Callable[[Any], None]:
    """What is done with a batch of images."""
    from attention_visualizer.attention.capture import capture

    def plain(images: Any) -> None:
        model(images)

    def watched(images: Any) -> None:
        with capture(model, consume=lambda layer: None):
            model(images)

    def streamed(images: Any) -> None:
        with capture(model, consume=totals.update):
            model(images)

    def stored(images: Any) -> None:
        with capture(model) as attention:
            model(images)
        for layer in attention:
            totals.update(layer)

    def usual(images: Any) -> None:
        with stored_by_hooks(model, setup) as layers:
            model(images)
            for layer in layers:
                totals.update(layer)

    return {"plain": plain, "watched": watched, "streamed": streamed, "stored": stored, "usual": usual}[way]


def measure_here(way: str, setup: Setup) -> Cost:
    import torch

    from attention_visualizer.measures.streaming import REPORTED_MEASURES, AttentionStatistics

    torch.set_num_threads(1)
    model = build_model(setup, fused=way != "usual")
    with torch.inference_mode():
        warm_up = torch.randn(1, setup.channels, setup.image_size, setup.image_size)
        passes(way, setup, model, AttentionStatistics(REPORTED_MEASURES))(warm_up)
        totals = AttentionStatistics(REPORTED_MEASURES)
        run = passes(way, setup, model, totals)
        images = torch.randn(setup.batch_size, setup.channels, setup.image_size, setup.image_size)
        began = time.process_time()
        for _ in range(setup.num_batches):
            run(images)
        seconds = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    checksum = totals.compute()["entropy"].mean.mean() if totals.layer_names else 0.0
    return Cost(seconds, peak if sys.platform == "darwin" else peak * 1024, float(checksum))


def measure(way: str, setup: Setup, environment: dict[str, str] | None = None) -> Cost:
    title = f"{setup.name}, depth {setup.depth}, {way}"
    return Cost(*in_child(__file__, way, asdict(setup), title=title, environment=environment))


def peak_memory(way: str, setup: Setup) -> int:
    return measure(way, replace(setup, num_batches=1), RETURNS_MEMORY).peak_bytes


# --- tables -----------------------------------------------------------------------------------------------------


def mebibytes(number: float) -> str:
    return f"{number / MEBIBYTE:,.0f} MiB"


def cost_table(setup: Setup, repeats: int, markdown: bool) -> str:
    found: dict[str, list[Cost]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way in WAYS:
            found[way].append(measure(way, setup))
    sums = [found[way][0].checksum for way in ("streamed", "stored", "usual")]
    if max(sums) - min(sums) > 1e-5:
        raise SystemExit(f"the ways do not give the same statistics: mean entropies {sums}")
    seconds = {way: statistics.median(cost.seconds for cost in costs) for way, costs in found.items()}
    peaks = {way: statistics.median(cost.peak_bytes for cost in costs) for way, costs in found.items()}
    rows = [
        (
            title,
            f"{seconds[way]:.2f} s",
            f"{seconds[way] / seconds['plain']:.2f}",
            mebibytes(peaks[way]),
            mebibytes(peaks[way] - peaks["plain"]),
        )
        for way, title in WAYS.items()
    ]
    batches = f"{setup.num_batches} x {setup.batch_size} images"
    return table((f"{setup.name}, {batches}", "time", "of plain", "peak memory", "over plain"), rows, markdown)


def depth_table(setup: Setup, depths: list[int], markdown: bool) -> str:
    rows = []
    for depth in depths:
        deep = replace(setup, depth=depth)
        plain, *others = (peak_memory(way, deep) for way in ("plain", "streamed", "stored", "usual"))
        over = [peak - plain for peak in others]
        on_paper_too = (mebibytes(number) for number in reversed(on_paper(deep)))
        rows.append((str(depth), mebibytes(plain), *map(mebibytes, over), *on_paper_too))
    header = ("depth", "plain peak", "streamed", "stored", "not fused", "calculated: streamed", "stored")
    return table(header, rows, markdown)


def on_paper(setup: Setup) -> tuple[float, float]:
    """Bytes of (all layers stored, one layer streamed): weights float32, and the values that come with them.

    Streamed, two maps are there at a time: scores and their softmax, later the softmax and a measure's step.
    """
    stored = setup.depth * (setup.map_bytes + setup.value_bytes)
    return stored, 2 * setup.map_bytes + setup.value_bytes


def paper_table(markdown: bool) -> str:
    rows = []
    for setup in (VIT_LARGE, replace(VIT_LARGE, batch_size=8), NARROW, VIT_BASE):
        stored, streamed = on_paper(setup)
        rows.append(
            (
                f"{setup.name}, {setup.batch_size} images" if setup.batch_size > 1 else f"{setup.name}, 1 image",
                f"{setup.depth} x {setup.heads} x {setup.num_tokens}²",
                mebibytes(setup.map_bytes),
                mebibytes(stored),
                mebibytes(streamed),
            )
        )
    return table(("calculated", "layers x heads x tokens²", "map of a layer", "stored", "streamed"), rows, markdown)


def places_table(repeats: int, markdown: bool) -> str:
    """What measuring places adds to the first capture of a model, random weights, in this process."""
    import timm
    import torch

    from attention_visualizer.attention.capture import capture

    def seconds(model: Any, images: Any, captured: bool) -> float:
        began = time.process_time()
        with capture(model, consume=lambda layer: None) if captured else nullcontext():
            model(images)
        return time.process_time() - began

    torch.set_num_threads(1)
    rows = []
    for name in PLACED:
        images = torch.randn(8, 3, 224, 224)
        times = []
        with torch.inference_mode():
            for _ in range(repeats):
                model = timm.create_model(name).eval()
                model(images[:1])  # warm up
                times.append([seconds(model, images, captured) for captured in (False, True, True)])
        plain, first, later = map(statistics.median, zip(*times, strict=True))
        rows.append((f"timm {name}", f"{first / plain:.1f}", f"{later / plain:.2f}"))
    return table(("8 images, of a plain pass", "first capture", "later ones"), rows, markdown)


PARTS = ("default", "base", "depth", "places", "paper")


def main() -> None:
    options = parse(option_parser(__doc__, PARTS, "a tiny model", repeats=3), PARTS)
    if options.child:
        way, setup = options.child
        print(json.dumps(astuple(measure_here(way, Setup(**setup)))))
        return
    print(f"{versions('torch', 'timm')}; {machine()}\n", flush=True)
    if options.quick:
        print(cost_table(QUICK, 1, options.markdown))
        return
    for part in options.parts:
        if part == "depth":
            print(depth_table(NARROW, [4, 12, 24, 48], options.markdown))
        elif part == "places":
            print(places_table(options.repeats, options.markdown))
        elif part == "paper":
            print(paper_table(options.markdown))
        else:
            print(cost_table(DEFAULT if part == "default" else VIT_BASE, options.repeats, options.markdown))
        print(flush=True)


if __name__ == "__main__":
    main()
