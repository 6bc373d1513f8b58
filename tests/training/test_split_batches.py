"""A batch in two halves: the same loss and gradients as in one, the same numbers each time, and only where it suits."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.training.classifier import Classifier
from attention_visualizer.training.split_batches import Halves


@pytest.fixture(autouse=True)
def two_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def model(**options: Any) -> VisionTransformer:
    torch.manual_seed(3)
    return VisionTransformer(embed_dim=16, num_heads=2, num_layers=2, mlp_dim=24, **options).train()


def batch(size: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    return torch.randn(size, 1, 28, 28, generator=random), torch.randint(0, 10, (size,), generator=random)


def gradients(module: nn.Module) -> list[Tensor | None]:
    return [None if parameter.grad is None else parameter.grad.clone() for parameter in module.parameters()]


@pytest.mark.parametrize("size", [2, 7, 8])
def test_loss_logits_and_gradients_are_those_of_the_whole_batch(size: int) -> None:
    vit, (images, labels) = model(), batch(size)
    logits = vit(images)
    whole = F.cross_entropy(logits, labels)
    (whole / 3).backward()
    expected = gradients(vit)
    vit.zero_grad()
    loss, found = Halves().loss(vit, F.cross_entropy, images, labels)
    torch.testing.assert_close((loss, found), (whole, logits))
    assert loss.requires_grad and not found.requires_grad
    (loss / 3).backward()  # as when gradients of three batches are accumulated
    torch.testing.assert_close(gradients(vit), expected)
    # Twice as much after a second batch.
    (Halves().loss(vit, F.cross_entropy, images, labels)[0] / 3).backward()
    torch.testing.assert_close(gradients(vit), [2 * each for each in expected if each is not None])


def test_frozen_and_unused_parameters_are_left_alone() -> None:
    vit, (images, labels) = model(), batch(4)
    vit.unused = nn.Parameter(torch.zeros(2))
    vit.head.bias.requires_grad_(False)
    Halves().loss(vit, F.cross_entropy, images, labels)[0].backward()
    missing = {name for name, parameter in vit.named_parameters() if parameter.grad is None}
    assert missing == {"unused", "head.bias"}


def test_each_half_has_dropout_of_its_own_and_a_seed_repeats_it() -> None:
    vit, (images, labels) = model(dropout=0.5), batch(1)
    images, labels, halves = images.expand(6, -1, -1, -1), labels.expand(6), Halves()

    def run(seed: int) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        torch.manual_seed(seed)
        vit.zero_grad()
        loss, logits = halves.loss(vit, F.cross_entropy, images, labels)
        loss.backward()
        return loss.detach(), logits, gradients(vit)

    once = run(5)
    assert len(once[1].unique(dim=0)) == 6
    for _ in range(5):  # in whatever order the threads come
        torch.testing.assert_close(run(5), once, rtol=0, atol=0)
    assert not torch.equal(run(6)[1], once[1])


def test_mixed_precision_reaches_the_threads() -> None:
    vit, (images, labels), seen = model(), batch(4), []
    vit.head.register_forward_hook(lambda *call: seen.append((call[2].dtype, threading.current_thread())))
    with torch.autocast("cpu", torch.bfloat16):
        loss, logits = Halves().loss(vit, F.cross_entropy, images, labels)
    assert [dtype for dtype, _ in seen] == [torch.bfloat16] * 2 and logits.dtype == torch.bfloat16
    assert threading.main_thread() not in {thread for _, thread in seen}
    assert loss.dtype == torch.float32
    loss.backward()
    assert {each.dtype for each in gradients(vit) if each is not None} == {torch.float32}


def test_an_error_in_a_half_is_the_callers() -> None:
    images, labels = batch(4)
    with pytest.raises(IndexError, match="out of bounds"):
        Halves().loss(model(), F.cross_entropy, images, labels + 10)


def test_only_where_it_suits() -> None:
    images, _ = batch(2)
    halves = Halves()
    assert halves.applies_to(model(), images)
    assert not halves.applies_to(model(), images[:1])
    assert not halves.applies_to(model(), images.to("meta"))
    # Its random numbers would depend on which thread comes first.
    assert not halves.applies_to(model(attention_dropout=0.1), images)
    assert not halves.applies_to(nn.Flatten(), images)
    torch.set_num_threads(1)
    assert not halves.applies_to(model(), images)


def test_a_module_that_has_threads_can_be_copied() -> None:
    images, labels = batch(4)
    module = Classifier(model(), 10)
    assert module.halves is not None
    module.halves.loss(module.model, module.training_loss, images, labels)
    other = copy.deepcopy(module)
    assert other.halves is not None and other.halves is not module.halves


@pytest.mark.parametrize("in_halves", [True, False])
def test_training_is_repeatable_and_of_halves_where_it_is_not_turned_off(tmp_path: Path, in_halves: bool) -> None:
    def train() -> tuple[list[Tensor], set[str]]:
        module, threads = Classifier(model(dropout=0.1), 10, seed=2), set()
        if not in_halves:
            module.halves = None
        module.model.register_forward_hook(lambda *_: threads.add(threading.current_thread().name))
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(
            accelerator="cpu", max_epochs=2, enable_checkpointing=False, default_root_dir=tmp_path, **quiet
        )
        trainer.fit(module, DataLoader(TensorDataset(*batch(40)), 8))
        return list(module.model.parameters()), threads

    (first, threads), (second, _) = train(), train()
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert (threads == {"MainThread"}) != in_halves
    assert not in_halves or all(name.startswith("half of a batch") for name in threads)
