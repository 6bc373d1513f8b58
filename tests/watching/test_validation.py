"""ValidationWatch: statistics from whatever somebody's validation step does, and one line about what was odd."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_visualizer.attention.capture import CaptureError, capture
from attention_visualizer.attention.model_search import find_model
from attention_visualizer.measures.streaming import AttentionStatistics
from attention_visualizer.watching.attention_logger import AttentionLogger
from attention_visualizer.watching.validation import ValidationWatch, name_in_pass
from tests.helpers.models import HAND_WRITTEN_GEOMETRY, HandWritten
from tests.helpers.trainers import IMAGES, SIZE, Steps, attention_warnings, fit, kept_in, vit

BATCH = torch.randn(5, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(4))
OTHER = torch.randn(4, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(6))


def watched(model: nn.Module, *batches: Callable[[], Any]) -> ValidationWatch:
    """After a validation of these batches, each a call that does something with the model."""
    watch = ValidationWatch(find_model(model.eval(), BATCH))
    for batch in batches:
        with torch.no_grad(), watch.batch():
            batch()
    assert torch._C._len_torch_function_stack() == 0
    return watch


def entropies(watch: ValidationWatch) -> np.ndarray:
    return watch.statistics.compute()["entropy"].mean


def images(watch: ValidationWatch) -> int:
    return watch.statistics.compute()["entropy"].n


def test_an_ordinary_validation_has_no_remarks() -> None:
    model = vit()
    watch = watched(model, lambda: model(BATCH), lambda: model(OTHER))
    assert watch.remarks() == {} and images(watch) == 9 and watch.seconds > 0
    with torch.no_grad(), capture(model) as attention:
        model(torch.cat([BATCH, OTHER]))
    rows = [layer.weights[:, :, 0] for layer in attention]
    expected = [-(row * row.log()).sum(dim=-1).mean(dim=0).numpy() for row in rows]
    np.testing.assert_allclose(entropies(watch), expected, rtol=1e-5)


def test_a_model_that_runs_twice_counts_twice() -> None:
    model = vit()
    twice = watched(model, lambda: (model(BATCH), model(OTHER)), lambda: model(BATCH[:2]))
    assert images(twice) == 11 and list(twice.remarks()) == ["runs"]
    assert (
        twice.remarks()["runs"] == "validation runs VisionTransformer up to 2 times a batch: statistics are of all runs"
    )
    apart = watched(model, lambda: model(BATCH), lambda: model(OTHER), lambda: model(BATCH[:2]))
    np.testing.assert_allclose(entropies(twice), entropies(apart))


@pytest.mark.parametrize("shared", [False, True])
def test_the_passes_of_one_step_are_told_apart(shared: bool) -> None:
    """Where the module that is watched has the step itself, its passes look like one."""
    model = HandWritten()
    if shared:  # one set of weights for both layers, so that a pass itself names it twice
        model.mixers[1] = model.mixers[0]

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, pictures: Tensor) -> Tensor:
            return self.net(pictures)

        def step(self) -> None:
            self(BATCH)
            self.net(OTHER)

    whole = Whole().eval()
    watch = ValidationWatch(find_model(whole, BATCH, geometry=HAND_WRITTEN_GEOMETRY), HAND_WRITTEN_GEOMETRY)
    with torch.no_grad(), watch.batch():
        whole.step()
    assert len(entropies(watch)) == 2 and images(watch) == 9 and list(watch.remarks()) == ["runs"]


@pytest.mark.parametrize(
    ("name", "layers", "expected"),
    [
        ("attn", ("attn",), "attn"),
        ("attn#3", ("attn",), "attn"),
        ("attn#2", ("attn", "attn#2"), "attn#2"),
        ("attn#3", ("attn", "attn#2"), "attn"),
        ("attn#6", ("attn", "attn#2"), "attn#2"),
        ("other", ("attn",), None),
        ("attn.0", ("attn",), None),
    ],
)
def test_names_within_a_pass(name: str, layers: tuple[str, ...], expected: str | None) -> None:
    assert name_in_pass(name, layers) == expected


def test_other_attention_in_the_module_does_not_count() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = vit(), vit(num_layers=3)

        def forward(self, pictures: Tensor) -> Tensor:
            return self.student(pictures)

    pair = Pair()
    watch = watched(pair, lambda: (pair(BATCH), pair.teacher(BATCH)))
    assert watch.remarks() == {} and images(watch) == 5 and len(entropies(watch)) == 2


def test_attention_that_the_model_did_not_show_when_it_was_found() -> None:
    class Whole(HandWritten):
        def __init__(self) -> None:
            super().__init__()
            self.reading = nn.MultiheadAttention(6, 3, batch_first=True)

        def step(self) -> None:
            self(BATCH)
            self.reading(*[torch.randn(5, 10, 6)] * 3)

    whole = Whole().eval()
    watch = ValidationWatch(find_model(whole, BATCH, geometry=HAND_WRITTEN_GEOMETRY), HAND_WRITTEN_GEOMETRY)
    with torch.no_grad(), watch.batch():
        whole.step()
    assert watch.remarks() == {} and entropies(watch).shape[0] == 2


@pytest.mark.parametrize("mixed", [True, False])
def test_measures_are_taken_in_full_precision(mixed: bool) -> None:
    """Whatever the model runs in: they are those of the weights that it then has."""
    model = vit() if mixed else vit().bfloat16()
    watch = ValidationWatch(find_model(model.eval(), BATCH if mixed else BATCH.bfloat16()))
    expected = AttentionStatistics()
    try:
        torch.set_default_dtype(torch.float32 if mixed else torch.bfloat16)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            with watch.batch():
                model(BATCH.to(torch.get_default_dtype()))
            with capture(model) as attention:
                model(BATCH.to(torch.get_default_dtype()))
    finally:
        torch.set_default_dtype(torch.float32)
    for layer in attention:
        expected.update(layer)
    assert watch.remarks() == {}
    for name, summary in expected.compute().items():
        np.testing.assert_allclose(watch.statistics.compute()[name].mean, summary.mean, rtol=1e-6)


def test_a_validation_of_another_model() -> None:
    model, other = vit(), vit()
    watch = watched(model, lambda: other(BATCH), lambda: None)
    assert watch.remarks() == {
        "idle": 'validation does not run VisionTransformer: no statistics of it (model="..." names another)'
    }
    assert watch.statistics.layer_names == []
    some = watched(model, lambda: model(BATCH), lambda: None, lambda: other(OTHER))
    assert "in 1 of 3 batches" in some.remarks()["idle"] and images(some) == 5


def test_images_of_different_sizes() -> None:
    timm = pytest.importorskip("timm")
    small = {"img_size": SIZE, "patch_size": 5, "in_chans": 1, "embed_dim": 12, "num_heads": 3, "depth": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, dynamic_img_size=True, **small)
    watch = watched(model, lambda: model(BATCH), lambda: model(torch.randn(2, 1, 25, 20)))
    assert images(watch) == 5 and "images of different sizes" in watch.remarks()["sizes"]


def test_what_cannot_be_seen_does_not_reach_the_model() -> None:
    model = vit()

    def broken() -> None:
        with torch.no_grad():
            model.blocks[0].attn.qkv.weight.fill_(float("nan"))
        assert model(BATCH).isnan().all()  # where capture alone raises, as below

    watch = watched(model, lambda: model(BATCH), broken, lambda: model(BATCH))
    assert list(watch.remarks()) == ["failure"] and "is not finite" in watch.remarks()["failure"]
    with pytest.raises(CaptureError, match="is not finite"), torch.no_grad(), capture(model):
        model(BATCH)


def test_errors_of_the_step_itself_are_its_own() -> None:
    model = vit()

    def own() -> None:
        model(BATCH)
        raise CaptureError("somebody else's capture")

    with pytest.raises(CaptureError, match="^somebody else's capture$"):
        watched(model, own)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        watched(model, lambda: torch.ones(2, 3) @ torch.ones(2, 3))
    assert torch._C._len_torch_function_stack() == 0


# --- in a training ---------------------------------------------------------------------------------------------


def said(folder: Path, module: Steps, **options: Any) -> list[str]:
    with attention_warnings() as lines:
        fit(folder, module, AttentionLogger(), **options)
    return lines


def test_each_remark_is_made_once(tmp_path: Path) -> None:
    class Twice(Steps):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            flipped = self.model(batch[0].flip(-1))
            self.log("loss", F.cross_entropy(self.model(batch[0]) + flipped, batch[1]))

    assert said(tmp_path, Twice(vit()), max_epochs=3) == [
        "AttentionLogger: validation runs model up to 2 times a batch: statistics are of all runs"
    ]
    assert kept_in(tmp_path).column("validations", "images").tolist() == [2 * IMAGES] * 3


def test_validation_of_another_model_still_shows_the_probes(tmp_path: Path) -> None:
    class Another(Steps):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("loss", F.cross_entropy(self.average(batch[0]), batch[1]))

    module = Another(vit(), average=vit().requires_grad_(False))
    (line,) = said(tmp_path, module)
    assert line.startswith("AttentionLogger: validation does not run model: no statistics")
    kept = kept_in(tmp_path)
    assert kept.validations == [] and kept.column("frames", "step").tolist() == [0, 1, 2, 4, 5, 10]
