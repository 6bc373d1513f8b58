"""Is the attention that `capture` shows the model's own? Measured on models of many families, with random weights.

    python benchmarks/model_families.py
    python benchmarks/model_families.py --only swin --markdown

Each model runs on random images in eval mode and float32. `error` is the largest difference between what the captured
weights and values give and the model's own output; `agreement` the largest difference between the captured weights and
those of the model's own explicit path, which is read without `capture`. Exits with 1 if one of them is above 1e-5, if
a layer has no counterpart, or if nothing was captured.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from tables import machine, table, versions

BOUND = 1e-5
NUM_IMAGES = 2  # so that a batch cannot be mistaken for windows


@dataclass(frozen=True)
class Example:
    """build(explicit) makes the model, or the same one with its own explicit path in use.

    explicit: how that path shows its weights: a forward hook on the dropout of attention ("attn_drop"), the results of
    its softmax ("softmax"), `need_weights` of nn.MultiheadAttention, `output_attentions`; None: it has none.
    """

    family: str
    name: str
    special: str
    build: Callable[[bool], Any]
    explicit: str | None
    image_size: int = 224
    channels: int = 3
    needs: str = "torch"
    inputs: Callable[[], Any] | None = None

    @property
    def title(self) -> str:
        return f"{self.needs} {self.name}"


@dataclass(frozen=True)
class Result:
    example: Example
    num_layers: int
    sources: str
    geometries: str
    places: str
    error: float
    agreement: float | None
    moved: float
    entropy: float
    problems: list[str]


# --- the models ------------------------------------------------------------------------------------------------


def timm_model(name: str, **options: Any) -> Callable[[bool], Any]:
    def build(explicit: bool) -> Any:
        import timm
        from timm.layers import config, set_fused_attn

        before = config._USE_FUSED_ATTN
        if explicit:
            set_fused_attn(False)
        try:
            return timm.create_model(name, **options)
        finally:
            config._USE_FUSED_ATTN = before

    return build


def torchvision_model(name: str) -> Callable[[bool], Any]:
    def build(explicit: bool) -> Any:
        import torchvision

        return torchvision.models.get_model(name, weights=None)

    return build


def transformers_model(model: str, config: str, **options: Any) -> Callable[[bool], Any]:
    def build(explicit: bool) -> Any:
        import transformers

        settings = getattr(transformers, config)(**options)
        settings._attn_implementation = "eager" if explicit else "sdpa"
        return getattr(transformers, model)(settings)

    return build


def torch_encoder(explicit: bool) -> Any:
    from torch import nn

    layer = nn.TransformerEncoderLayer(192, 4, 768, batch_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 6)


def tokens() -> Any:
    import torch

    return torch.randn(NUM_IMAGES, 197, 192)


def vit_pytorch_model(explicit: bool) -> Any:
    from vit_pytorch import ViT

    return ViT(image_size=224, patch_size=16, num_classes=10, dim=192, depth=6, heads=3, mlp_dim=768)


def own_model(explicit: bool) -> Any:
    from attention_visualizer import VisionTransformer

    return VisionTransformer()


def timm_example(
    family: str,
    name: str,
    special: str,
    explicit: str | None = "attn_drop",
    image_size: int = 224,
    suffix: str = "",
    **options: Any,
) -> Example:
    return Example(family, name + suffix, special, timm_model(name, **options), explicit, image_size, needs="timm")


def hugging_face_example(
    family: str, model: str, config: str, special: str, explicit: str = "output_attentions", **options: Any
) -> Example:
    build = transformers_model(model, config, image_size=224, **options)
    return Example(family, model, special, build, explicit, needs="transformers")


EXAMPLES = [
    timm_example("ViT", "vit_base_patch16_224", "fused attention, class token"),
    timm_example("ViT", "vit_base_patch16_gap_224", "no class token: mean of patches"),
    timm_example("ViT", "vit_medium_patch16_reg4_gap_256", "4 registers, no class token", image_size=256),
    timm_example("ViT", "vit_small_patch14_reg4_dinov2", "class token and 4 registers, 518 pixels", image_size=518),
    timm_example("ViT", "vit_small_patch16_224", "queries and keys normalised", suffix=" (qk_norm)", qk_norm=True),
    timm_example("ViT", "vit_relpos_small_patch16_224", "relative position bias, no class token"),
    timm_example("DINOv3", "vit_small_patch16_dinov3", "rotary positions, 4 registers", image_size=256),
    timm_example("EVA-02", "eva02_tiny_patch14_224", "rotary positions, SwiGLU"),
    timm_example("DeiT", "deit_small_distilled_patch16_224", "class and distillation token"),
    timm_example("BEiT", "beit_base_patch16_224", "relative position bias with a class token"),
    timm_example("SigLIP", "vit_base_patch16_siglip_224", "pools by attention, with a query of its own", "softmax"),
    timm_example("CaiT", "cait_xxs24_224", "heads mixed after softmax; class token at the end"),
    timm_example("XCiT", "xcit_nano_12_p16_224", "channels attend to channels; class token at the end"),
    timm_example("CrossViT", "crossvit_tiny_240", "two patch sizes, which attend to each other", image_size=240),
    timm_example("Swin", "swin_tiny_patch4_window7_224", "shifted windows"),
    timm_example("Swin V2", "swinv2_tiny_window8_256", "shifted windows, cosine attention", image_size=256),
    timm_example("PVT v2", "pvt_v2_b1", "stages; keys pooled"),
    timm_example("MaxViT", "maxvit_tiny_tf_224", "windows and grids"),
    timm_example("LeViT", "levit_128s", "convolutions; queries pooled between stages", "softmax"),
    timm_example("Hiera", "hiera_tiny_224", "tokens in the order of pooling", "softmax"),
    Example(
        "ViT",
        "vit_b_16",
        "nn.MultiheadAttention",
        torchvision_model("vit_b_16"),
        "need_weights",
        needs="torchvision",
    ),
    Example("Swin", "swin_t", "written by hand", torchvision_model("swin_t"), "softmax", needs="torchvision"),
    Example("MaxViT", "maxvit_t", "written with einsum", torchvision_model("maxvit_t"), "softmax", needs="torchvision"),
    hugging_face_example("ViT", "ViTForImageClassification", "ViTConfig", "class token"),
    hugging_face_example("DeiT", "DeiTForImageClassificationWithTeacher", "DeiTConfig", "class and distillation token"),
    hugging_face_example(
        "DINOv2",
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        "class token and 4 registers",
        patch_size=14,
        hidden_size=384,
        num_attention_heads=6,
    ),
    hugging_face_example("DINOv3", "DINOv3ViTModel", "DINOv3ViTConfig", "rotary positions", num_register_tokens=4),
    hugging_face_example("CLIP", "CLIPVisionModel", "CLIPVisionConfig", "class token, patches of 32"),
    hugging_face_example("SigLIP", "SiglipVisionModel", "SiglipVisionConfig", "pools by attention"),
    # Its output_attentions has one layer of each stage.
    hugging_face_example("Swin", "SwinForImageClassification", "SwinConfig", "shifted windows", "softmax"),
    hugging_face_example(
        "BEiT", "BeitForImageClassification", "BeitConfig", "relative position bias", use_relative_position_bias=True
    ),
    Example(
        "torch",
        "nn.TransformerEncoder",
        "tokens, no images; fast path in eval mode",
        torch_encoder,
        "need_weights",
        inputs=tokens,
    ),
    Example("ViT", "ViT", "written by hand", vit_pytorch_model, "softmax", needs="vit-pytorch"),
    Example(
        "ViT",
        "VisionTransformer",
        "the default model",
        own_model,
        None,
        image_size=28,
        channels=1,
        needs="attention-visualizer",
    ),
]

# --- the models' own explicit paths -----------------------------------------------------------------------------


@contextmanager
def softmax_results() -> Iterator[list[Any]]:
    """What every softmax of the model gives: F.softmax and nn.Softmax end in this method, too."""
    from torch import Tensor

    found: list[Any] = []
    own = Tensor.softmax

    @functools.wraps(own)
    def softmax(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(own(self, *args, **kwargs))
        return found[-1]

    Tensor.softmax = softmax  # type: ignore[method-assign, assignment]
    try:
        yield found
    finally:
        Tensor.softmax = own  # type: ignore[method-assign]


def ask_for_weights(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, kwargs | {"need_weights": True, "average_attn_weights": False}


def explicit_weights(example: Example, model: Any, images: Any) -> list[Any]:
    """[batch, head, query, key] a layer, in the order of calls, from the model's explicit path."""
    from torch import nn

    found: list[Any] = []
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if example.explicit == "attn_drop" and name.rpartition(".")[2] == "attn_drop":
                hook = module.register_forward_hook(lambda module, inputs, output: found.append(output))
                stack.callback(hook.remove)
            if example.explicit != "softmax" and isinstance(module, nn.MultiheadAttention):
                before = module.register_forward_pre_hook(ask_for_weights, with_kwargs=True)
                after = module.register_forward_hook(lambda module, inputs, output: found.append(output[1]))
                stack.callback(before.remove)
                stack.callback(after.remove)
        if example.explicit == "softmax":
            found = stack.enter_context(softmax_results())
        if example.explicit == "output_attentions":
            return [*model(images, output_attentions=True).attentions, *found]
        model(images)
    return found


# --- measuring --------------------------------------------------------------------------------------------------


QUERY_KEY_SHARES = {"qkv": 2 / 3, "to_qkv": 2 / 3, "in_proj_weight": 2 / 3, "kv": 1 / 2, "q": 1.0, "k": 1.0}
QUERY_KEY_SHARES |= {"query": 1.0, "key": 1.0, "q_proj": 1.0, "k_proj": 1.0, "q_norm": 1.0, "k_norm": 1.0}


def randomise(model: Any, gain: float = 1.5) -> None:
    """Random weights that keep a token's size, those of queries and keys `gain` times as large: so attention is far
    from uniform, and values, to which a reconstruction's error is proportional, are of ordinary size."""
    import torch
    from torch import nn

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif len(parameter) == 1:  # tokens, positions
                parameter.normal_(0.0, 0.5)
            else:
                parameter.normal_(0.0, 1 / math.sqrt(parameter[0].numel()))
            share = max(QUERY_KEY_SHARES.get(part, 0.0) for part in name.split("."))
            parameter[: round(share * len(parameter))] *= gain
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean over passes
        norm.reset_running_stats()
        norm.train()


def output_of(model: Any, images: Any) -> Any:
    """The first tensor that the model returns."""
    import torch

    output = model(images)
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values() if hasattr(output, "values") else output))
    return output


def measure(example: Example) -> Result:
    import torch

    from attention_visualizer.attention.capture import capture

    torch.manual_seed(0)
    model = example.build(False).eval()
    randomise(model)
    if example.inputs is None:
        images = torch.randn(NUM_IMAGES, example.channels, example.image_size, example.image_size)
    else:
        images = example.inputs()
    with torch.no_grad():
        model(images)  # batch norms measure their input
        model.eval()
        plain = output_of(model, images)
        with capture(model) as attention:
            watched = output_of(model, images)
        layers = list(attention)
        explicit = None
        if example.explicit is not None:
            twin = example.build(True).eval()
            twin.load_state_dict(copy.deepcopy(model.state_dict()))
            explicit = explicit_weights(example, twin, images)
    problems = [] if layers else ["no attention was captured"]
    error = attention.reconstruction_error
    if not error <= BOUND:
        problems.append(f"the reconstruction error is {error:.1e}")
    agreement = None
    if explicit is not None:
        differences = [0.0]
        if len(explicit) != len(layers):
            problems.append(f"{len(layers)} layers were captured, the explicit path has {len(explicit)}")
        for layer, expected in zip(layers, explicit, strict=False):
            if expected.numel() != layer.weights.numel():
                problems.append(f"{layer.name}: {list(layer.weights.shape)}, explicitly {list(expected.shape)}")
            else:  # windows count as batch
                if expected.ndim > 4 and expected.shape[-3] != layer.weights.shape[1]:
                    expected = expected.movedim(1, -3)  # [batch, head, window, query, key]
                differences.append((layer.weights - expected.reshape(layer.weights.shape)).abs().max().item())
        agreement = torch.tensor(differences).max().item()  # NaN if one is
        if not agreement <= BOUND:
            problems.append(f"the weights differ from the explicit path's by {agreement:.1e}")
    return Result(
        example,
        len(layers),
        sources(layers),
        describe_geometries(layers),
        describe_places(model, layers, images.shape[2:]),
        error,
        agreement,
        (watched - plain).abs().max().item() if not torch.equal(watched, plain) else 0.0,
        normalised_entropy(layers),
        problems,
    )


def normalised_entropy(layers: list[Any]) -> float:
    """Mean entropy of the rows, 1 where all are uniform; of layers whose weights are shares."""
    import torch

    found = []
    for layer in layers:
        weights = layer.weights
        rows_are_shares = weights.min() >= 0.0 and (weights.sum(dim=-1) - 1.0).abs().max() < 1e-3
        if weights.shape[-1] > 1 and rows_are_shares:  # heads that were mixed after softmax are not
            entropies = -torch.special.xlogy(weights, weights).sum(dim=-1)
            found.append(entropies.mean().item() / math.log(weights.shape[-1]))
    return sum(found) / len(found) if found else math.nan


def sources(layers: list[Any]) -> str:
    found = [layer.source for layer in layers]
    return ", ".join(
        source if found.count(source) == len(found) else f"{found.count(source)} {source}"
        for source in dict.fromkeys(found)
    )


def describe_geometries(layers: list[Any]) -> str:
    """ "14x14 + 1" is a grid after one prefix token; stages of one kind are listed together."""
    groups: dict[tuple[Any, Any], list[Any]] = {}
    for layer in layers:
        if layer.geometry is not None:
            groups.setdefault((layer.geometry.num_prefix_tokens, layer.geometry.window), []).append(layer.geometry)
    parts = []
    for (prefix, window), found in groups.items():
        part = ", ".join(dict.fromkeys(f"{geometry.grid[0]}x{geometry.grid[1]}" for geometry in found))
        part += f" + {prefix}" if prefix else ""
        if window is not None:
            shifts = sorted({max(geometry.shift) for geometry in found})
            part += f" in {window[0]}x{window[1]} windows"
            part += f", shifted by {shifts[-1]}" if shifts[-1] else ""
        parts.append(part)
    unknown = sum(layer.geometry is None for layer in layers)
    if unknown:
        parts.append("none" if unknown == len(layers) else f"none in {unknown} of {len(layers)} layers")
    return "; ".join(parts)


def describe_places(model: Any, layers: list[Any], image: Any) -> str:
    """How many layers have a place and how exactly it is known, and why the others have none."""
    geometries = [layer.geometry for layer in layers if layer.geometry is not None]
    found = [f"{geometry.evidence} {exactness(model, geometry, image)}" for geometry in geometries]
    parts = [f"{found.count(how)} of {len(layers)} {how}" for how in dict.fromkeys(found)]
    reasons = [layer.unplaced for layer in layers if layer.geometry is None]
    parts += [f"{reasons.count(reason)} not: {reason}" for reason in dict.fromkeys(reasons)]
    return "; ".join(parts)


def exactness(model: Any, geometry: Any, image: Any) -> str:
    """Tokens of convolutions that overlap see more than their patches, one that resizes images cuts through pixels."""
    from torch import nn

    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    if any(size > stride for each in convolutions for size, stride in zip(each.kernel_size, each.stride, strict=True)):
        return "to half a patch"
    sides = zip(geometry.offset, geometry.grid, geometry.patch_size, image, strict=True)
    is_whole = all(start == 0 and step == int(step) and number * step == side for start, number, step, side in sides)
    return "to the pixel" if is_whole else "up to interpolation"


def explicit_path(example: Example) -> str:
    own = {"timm": "not fused, ", "transformers": "eager, "}.get(example.needs, "")
    shown = {"attn_drop": "hooks", "softmax": "its softmax", "need_weights": "need_weights=True"}
    shown["output_attentions"] = "attentions"
    return "-" if example.explicit is None else own + shown[example.explicit]


def print_results(results: list[Result], markdown: bool) -> None:
    families = list(dict.fromkeys(result.example.family for result in results))
    results = sorted(results, key=lambda result: families.index(result.example.family))
    code = "`{}`" if markdown else "{}"
    proof = [
        (
            result.example.family,
            f"{result.example.needs} {code.format(result.example.name)}",
            str(result.num_layers),
            result.sources,
            f"{result.error:.1e}",
            "-" if result.agreement is None else f"{result.agreement:.1e}",
            explicit_path(result.example),
            "identical" if result.moved == 0.0 else f"differs by {result.moved:.0e}",
            f"{result.entropy:.2f}",
        )
        for result in results
    ]
    header = ("family", "model", "layers", "source", "error", "agreement", "explicit path", "output", "entropy")
    print(table(header, proof, markdown))
    print()
    places = [
        (
            f"{result.example.needs} {code.format(result.example.name)}",
            result.example.special,
            result.geometries,
            result.places,
        )
        for result in results
    ]
    print(table(("model", "special features", "geometry", "places"), places, markdown))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", help="models whose library or name contains this")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    arguments = parser.parse_args()

    wanted = [e for e in EXAMPLES if (arguments.only or "").lower() in f"{e.family} {e.title}".lower()]
    if not wanted:
        print(f"no model has {arguments.only!r} in its name", file=sys.stderr)
        return 1
    results, problems = [], []
    for example in wanted:
        if find_spec(example.needs.replace("-", "_")) is None:
            print(f"{example.title}: skipped, {example.needs} is not installed", file=sys.stderr)
            continue
        print(f"{example.title} ...", file=sys.stderr)
        try:
            results.append(measure(example))
        except Exception as error:  # one model must not hide the others
            problems.append(f"{example.title}: {type(error).__name__}: {error}")
            continue
        problems += [f"{example.title}: {problem}" for problem in results[-1].problems]
    packages = ("torch", "timm", "torchvision", "transformers", "vit-pytorch")
    print(f"{versions(*packages)}; {machine()}\n")
    print_results(results, arguments.markdown)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
