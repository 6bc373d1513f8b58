"""Muon with AdamW: which parameter is whose, the same steps as the two alone, and a state that can be saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.support.errors import UserError
from attention_visualizer.training.classifier import Classifier, muon_groups
from attention_visualizer.training.muon import MuonWithAdamW


def model() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(img_size=14, embed_dim=12, num_heads=3, num_layers=2, mlp_dim=17)


def optimizer_of(vit: nn.Module) -> MuonWithAdamW:
    return MuonWithAdamW(*muon_groups(vit, 0.3), lr=0.01, betas=(0.9, 0.98), fused=True)


def learn(vit: nn.Module, steps: int, *optimizers: torch.optim.Optimizer) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    for _ in range(steps):
        vit(torch.randn(4, 1, 14, 14, generator=random)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in vit.parameters()]


def test_muon_has_the_matrices_of_the_blocks_and_adamw_all_others_with_the_usual_decay() -> None:
    vit = model()
    (hidden,), (others, still) = muon_groups(vit, 0.3)
    names = {id(parameter): name for name, parameter in vit.named_parameters()}
    kinds = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert {names.pop(id(each)) for each in hidden["params"]} == {
        f"blocks.{b}.{k}.weight" for b in (0, 1) for k in kinds
    }
    assert {names.pop(id(each)) for each in others["params"]} == {"patch_embed.proj.weight", "head.weight"}
    assert {id(each) for each in still["params"]} == names.keys()
    assert [group["weight_decay"] for group in (hidden, others, still)] == [0.3, 0.3, 0.0]


def test_a_step_is_muons_and_adamws_own() -> None:
    vit = model()
    together = learn(vit, 3, optimizer_of(vit))
    vit = model()
    hidden, others = muon_groups(vit, 0.3)
    muon = torch.optim.Muon(hidden, lr=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.98), fused=True)
    apart = learn(vit, 3, muon, adamw)
    assert all(torch.equal(one, other) for one, other in zip(together, apart, strict=True))


def test_a_schedule_reaches_both() -> None:
    vit = model()
    optimizer = optimizer_of(vit)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = [parameter.detach().clone() for parameter in vit.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(learn(vit, 1, optimizer), before, strict=True))


def test_a_saved_state_goes_on_as_if_it_had_not_been_saved(tmp_path: Path) -> None:
    vit = model()
    optimizer = optimizer_of(vit)
    learn(vit, 2, optimizer)
    torch.save((vit.state_dict(), optimizer.state_dict()), tmp_path / "state")
    expected = learn(vit, 2, optimizer)
    weights, state = torch.load(tmp_path / "state", weights_only=True)
    again = model()
    again.load_state_dict(weights)
    loaded = optimizer_of(again)
    loaded.load_state_dict(state)
    torch.optim.lr_scheduler.LambdaLR(loaded, lambda step: 1.0)  # groups are still shared
    assert all(torch.equal(one, other) for one, other in zip(learn(again, 2, loaded), expected, strict=True))


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="no matrices in `blocks`"):
        muon_groups(nn.Linear(3, 2), 0.1)


def test_lightning_trains_saves_and_goes_on_with_it(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    images, labels = torch.randn(24, 1, 14, 14, generator=random), torch.arange(24) % 10

    def trainer(epochs: int) -> Trainer:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        return Trainer(accelerator="cpu", max_epochs=epochs, default_root_dir=tmp_path, gradient_clip_val=1.0, **quiet)

    class Constant(Classifier):
        """Both trainers' schedules are alike only where they do not depend on the number of epochs."""

        def configure_optimizers(self) -> Any:
            return super().configure_optimizers()["optimizer"]

    def module() -> Constant:
        return Constant(model(), 10, muon=True)

    data = DataLoader(TensorDataset(images, labels), 8)
    whole = module()
    trainer(2).fit(whole, data)
    begun = module()
    first = trainer(1)
    first.fit(begun, data)
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = module()
    trainer(2).fit(resumed, data, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert isinstance(first.optimizers[0], MuonWithAdamW)
    pairs = zip(resumed.parameters(), whole.parameters(), begun.parameters(), strict=True)
    for one, other, early in pairs:
        assert torch.equal(one, other) and not torch.equal(one, early)
