"""Models of timm with weights from files: those that fit exactly, and one line for all others."""

from __future__ import annotations

import pickle
import socket
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from attention_visualizer.models import timm_models
from attention_visualizer.support.errors import UserError

NAME = "test_vit"  # timm's smallest


def trained(**options: Any) -> nn.Module:
    torch.manual_seed(3)
    return timm.create_model(NAME, **options).eval()


def assert_same(model: nn.Module, other: nn.Module) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not model.training


FORMS: dict[str, Any] = {
    "plain": lambda state: state,
    "under state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "under model": lambda state: {"model": state},
    "of DataParallel": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "of a compiled LightningModule": lambda state: {
        "state_dict": {f"model._orig_mod.{name}": tensor for name, tensor in state.items()}
    },
    "of a LightningModule with its own name for it": lambda state: {
        "state_dict": {f"vit.{name}": tensor for name, tensor in state.items()}
    },
    "two modules deep": lambda state: {f"net.backbone.{name}": tensor for name, tensor in state.items()},
    "beside the weights of classes in a loss": lambda state: {
        "state_dict": {f"vit.{name}": tensor for name, tensor in state.items()} | {"loss.weight": torch.ones(7)}
    },
    "of an averaged model": lambda state: {
        "state_dict": {f"average.module.vit.{name}": tensor for name, tensor in state.items()}
    },
    "half precision": lambda state: {name: tensor.half().float() for name, tensor in state.items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_read_in_every_form(tmp_path: Path, form: str) -> None:
    model = trained(num_classes=7)
    if form == "half precision":
        model = model.half().float()
    torch.save(FORMS[form](model.state_dict()), tmp_path / "weights.pth")
    assert_same(timm_models.build(f"timm:{NAME}", str(tmp_path / "weights.pth")), model)


@pytest.mark.parametrize(
    "options", [{"num_classes": 3}, {"in_chans": 1}, {"img_size": 96}, {"num_classes": 0}], ids=str
)
def test_the_weights_tell_classes_channels_and_size(tmp_path: Path, options: dict[str, Any]) -> None:
    model = trained(**options)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    built = timm_models.build(f"timm:{NAME}", str(tmp_path / "weights.safetensors"))
    assert_same(built, model)


def test_a_distilled_model_has_two_classifiers(tmp_path: Path) -> None:
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    built = timm_models.build("timm:deit_tiny_distilled_patch16_224", str(tmp_path / "weights.safetensors"))
    assert_same(built, model)


def test_weights_as_they_were_first_published(tmp_path: Path) -> None:
    """Swin's own names of the head and of the layers that join patches, and its tables of indices; seven classes."""
    name = "swin_tiny_patch4_window7_224"
    model = timm.create_model(name, num_classes=7).eval()
    published = {}
    for key, tensor in model.state_dict().items():
        key = key.replace("head.fc.", "head.")
        if "downsample" in key:
            stage = int(key.split(".")[1])
            key = key.replace(f"layers.{stage}.", f"layers.{stage - 1}.")
        published[key] = tensor
    published["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.int64)
    torch.save({"model": published}, tmp_path / "swin.pth")
    assert_same(timm_models.build(f"timm:{name}", str(tmp_path / "swin.pth")), model)


def test_random_weights_come_from_the_seed_and_leave_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    one, same, other = (timm_models.build(f"timm:{NAME}", "random", seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert_same(one, same)
    assert not torch.equal(one.state_dict()["head.weight"], other.state_dict()["head.weight"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tiny", "write timm:<name>"),
        ("torchvision:vit_b_16", "write timm:<name>"),
        ("timm:", "write timm:<name>"),
        ("timm:../../etc", "timm has no such model"),
        ("timm:test_vit.no_such_weights", r"timm cannot build this model \(Invalid pretrained tag"),
        ("timm:vit_tiny_patch16_223", "timm has no such model; it has, among others, .*vit_tiny_patch16_224"),
    ],
)
def test_unknown_models_are_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        timm_models.build(name, "random")


class Harmful:
    def __reduce__(self) -> Any:
        return (print, ("this must not run",))


def wrong_weights() -> dict[str, tuple[Any, str]]:
    state = trained().state_dict()
    below = {f"vit.{name}": tensor for name, tensor in state.items()}
    teacher = {f"teacher.{name}": tensor.clone() for name, tensor in state.items()}
    return {
        "beside another head": (below | {"head.weight": torch.ones(3, 64)}, "lacks the weights"),
        "two models": (below | teacher, "lacks the weights"),
        "missing": ({name: tensor for name, tensor in state.items() if "norm.weight" not in name}, "lacks the weights"),
        "unknown": (state | {"extra": torch.ones(2)}, "unknown weights 'extra'"),
        "another shape": (state | {"blocks.0.mlp.fc1.weight": torch.ones(3, 3)}, "it is of another model"),
        "another image size": (state | {"pos_embed": torch.ones(1, 7, 64)}, "it is of another image size, or of"),
        "not finite": (state | {"norm.bias": torch.full((64,), torch.nan)}, "NaN or infinite values in norm.bias"),
        "no weights": ({"epoch": 3}, "holds 'epoch' where weights were expected: save the model's state_dict"),
        "nothing": ({}, "holds no dictionary of weights"),
        "a list": ([torch.ones(2)], "holds no dictionary of weights"),
        "sparse": (state | {"norm.bias": torch.ones(64).to_sparse()}, "sparse"),
        "a giant": (state | {"norm.bias": torch.zeros(1).expand(10**12)}, "declares"),
        "harmful": ({"model": Harmful()}, "loading them could run code"),
    }


@pytest.mark.parametrize("kind", wrong_weights())
def test_weights_that_do_not_fit_are_refused_in_one_line(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content, message = wrong_weights()[kind]
    path = tmp_path / "weights.pth"
    torch.save(content, path, pickle_module=pickle)
    with pytest.raises(UserError, match=message) as caught:
        timm_models.build(f"timm:{NAME}", str(path))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert "must not run" not in capsys.readouterr().out


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        timm_models.build(f"timm:{NAME}", str(tmp_path / "none.pth"))
    with pytest.raises(UserError, match="is a folder"):
        timm_models.build(f"timm:{NAME}", str(tmp_path))
    (tmp_path / "text.pth").write_text("no weights at all")
    with pytest.raises(UserError, match="is not a file of weights"):
        timm_models.build(f"timm:{NAME}", str(tmp_path / "text.pth"))
    torch.save(trained().state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"old\.pth was written by a PyTorch before 1\.6: load it and save it again"):
        timm_models.build(f"timm:{NAME}", str(tmp_path / "old.pth"))
    torch.save(trained(), tmp_path / "module.pth")
    with pytest.raises(UserError, match="save a state dict instead"):
        timm_models.build(f"timm:{NAME}", str(tmp_path / "module.pth"))
    torch.save(trained().state_dict(), tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated or corrupt"):
        timm_models.build(f"timm:{NAME}", str(tmp_path / "cut.pth"))


def test_without_a_network_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no route to host\nand more lines")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    with pytest.raises(UserError, match=r"cannot be downloaded \(no route to host\): give a file") as caught:
        timm_models.build(f"timm:{NAME}", "pretrained")
    assert "\n" not in str(caught.value)


def test_without_a_network_it_does_not_try_for_a_minute(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The hub's client by itself tries ten times and prints each of them."""

    def unknown(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    def wait(_: float) -> None:
        raise AssertionError("it waits to try again")

    for variable in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "https_proxy", "http_proxy", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr("time.sleep", wait)
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    with pytest.raises(
        UserError, match="the weights of test_vit cannot be downloaded .*: give a file of them as ckpt="
    ):
        timm_models.build(f"timm:{NAME}", "pretrained")
    assert capfd.readouterr() == ("", "") and huggingface_hub.constants.HF_HUB_OFFLINE == offline


def test_a_model_that_was_never_published_with_weights() -> None:
    with pytest.raises(UserError, match="cannot be downloaded"):
        timm_models.build("timm:vit_tiny_r_s16_p8_224.augreg_in21k_nothing", "pretrained")


def test_without_timm_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UserError, match="needs timm: python -m pip install timm"):
        timm_models.build(f"timm:{NAME}", "random")
