"""A broken, unsafe or foreign file is refused in one line; a good one gives back exactly what was saved."""

from __future__ import annotations

import json
import os
import random
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.models.vit_config import ViTConfig
from attention_visualizer.runs.checkpoint import load_checkpoint, refuse_other_settings
from attention_visualizer.support.errors import UserError
from attention_visualizer.training.checkpoint_io import AtomicCheckpointIO
from tests.helpers.checkpoints import DATA, SIZES, content_of, same_weights


def changed(model: VisionTransformer, path: Path, change: Callable[[Any], Any]) -> Path:
    content = content_of(model)
    torch.save(change(content) or content, path)
    return path


def refusal(path: str | Path) -> str:
    """The message with which the file is refused: one line that names the file."""
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(path)) and len(message) < len(str(path)) + 250
    return message


# What is read


def test_own_checkpoint_comes_back_whole(model: VisionTransformer, saved: Path) -> None:
    loaded = load_checkpoint(str(saved))
    assert same_weights(loaded, model) and loaded.model_config == ViTConfig(**model.config)
    assert (loaded.epoch, loaded.step, loaded.split_seed, loaded.data_dir) == (2, 17, 3, "data")
    assert loaded.data == DATA and loaded.validation_accuracy == 0.875
    assert len(loaded.sha256) == 16

    before = torch.get_rng_state()
    rebuilt = loaded.build_model()
    assert torch.equal(torch.get_rng_state(), before)
    assert not rebuilt.training
    images = torch.randn(2, 2, 21, 21)
    assert torch.equal(rebuilt(images), model(images))


@pytest.mark.parametrize("positional_embedding", ["learned", "sincos", "none"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_every_kind_of_model_comes_back(tmp_path: Path, positional_embedding: Any, pooling: Any) -> None:
    model = VisionTransformer(**SIZES, positional_embedding=positional_embedding, pooling=pooling).eval()
    torch.save(content_of(model), tmp_path / "a.ckpt")
    loaded = load_checkpoint(tmp_path / "a.ckpt")
    assert same_weights(loaded, model)
    images = torch.randn(1, 2, 21, 21)
    assert torch.equal(loaded.build_model()(images), model(images))


@pytest.mark.parametrize("written", ["a.ckpt", "a.pth", "bare.pth"])
def test_a_model_with_a_convolutional_stem_comes_back(tmp_path: Path, written: str) -> None:
    sizes = {**SIZES, "img_size": 12, "patch_size": 4, "stem": "convolutions"}
    model = VisionTransformer(**sizes).eval()
    contents = {
        "a.ckpt": content_of(model),
        "a.pth": {"model_state_dict": model.state_dict(), "config": model.config},
        "bare.pth": model.state_dict(),
    }
    torch.save(contents[written], tmp_path / written)
    images, num_heads = torch.randn(1, 2, 12, 12), 4 if written == "bare.pth" else None
    assert torch.equal(load_checkpoint(tmp_path / written, num_heads=num_heads).build_model()(images), model(images))


def test_a_stem_without_convolutions_is_refused(tmp_path: Path) -> None:
    weights = VisionTransformer(**{**SIZES, "img_size": 12, "patch_size": 4, "stem": "convolutions"}).state_dict()
    weights["patch_embed.convolutions.0.weight"] = torch.zeros(3)
    torch.save(weights, tmp_path / "bare.pth")
    with pytest.raises(UserError, match=r"patch_embed\.convolutions\.0\.weight is no convolution's"):
        load_checkpoint(tmp_path / "bare.pth")


def test_a_checkpoint_from_before_there_were_stems_has_patches(model: VisionTransformer, tmp_path: Path) -> None:
    content = content_of(model)
    del content["attention_visualizer"]["model"]["stem"]
    torch.save(content, tmp_path / "old.ckpt")
    assert load_checkpoint(tmp_path / "old.ckpt").model_config.stem == "patches"


def test_hash_tells_files_apart(model: VisionTransformer, saved: Path, tmp_path: Path) -> None:
    other = changed(model, tmp_path / "other.ckpt", lambda content: content | {"epoch": 5})
    assert load_checkpoint(saved).sha256 == load_checkpoint(saved).sha256 != load_checkpoint(other).sha256


def test_older_pth_ignores_training_fields_and_may_lack_what_the_weights_show(
    model: VisionTransformer, tmp_path: Path
) -> None:
    config = {"num_heads": 4, "learning_rate": 1e-3, "epochs": 20}
    state_dict = {f"module._orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"model_state_dict": state_dict, "config": config, "loss": 0.3}, tmp_path / "best_model.pth")
    loaded = load_checkpoint(tmp_path / "best_model.pth")
    assert same_weights(loaded, model) and loaded.model_config == ViTConfig(**SIZES)
    assert loaded.data is None and loaded.epoch is None


NAMELESS: dict[str, Callable[[VisionTransformer], Any]] = {
    "bare": lambda model: model.state_dict(),
    "without a configuration": lambda model: {"model_state_dict": model.state_dict()},
    "a configuration without heads": lambda model: {
        "model_state_dict": model.state_dict(),
        "config": {name: value for name, value in SIZES.items() if name != "num_heads"},
    },
}


@pytest.mark.parametrize("num_heads", [2, 11])
@pytest.mark.parametrize("form", NAMELESS)
def test_the_number_of_heads_that_a_file_does_not_say_is_asked_for(tmp_path: Path, form: str, num_heads: int) -> None:
    """Weights of any number of heads load strictly into any other."""
    model = VisionTransformer(**SIZES | {"num_heads": num_heads}).eval()
    path = tmp_path / "model.pth"
    torch.save(NAMELESS[form](model), path)
    assert "does not say how many attention heads its model has: give num_heads=" in refusal(path)
    loaded = load_checkpoint(path, num_heads=num_heads)
    images = torch.randn(1, 2, 21, 21)
    assert loaded.model_config == ViTConfig(**model.config)
    assert torch.equal(loaded.build_model()(images), model(images))
    with pytest.raises(UserError, match="embed_dim=44 is not divisible by num_heads=3"):
        load_checkpoint(path, num_heads=3)


def test_a_number_of_heads_that_a_file_denies_is_refused(model: VisionTransformer, saved: Path, tmp_path: Path) -> None:
    torch.save({"model_state_dict": model.state_dict(), "config": {"num_heads": 4}}, tmp_path / "four.pth")
    for path in (saved, tmp_path / "four.pth"):
        assert load_checkpoint(path, num_heads=4).model_config.num_heads == 4
        with pytest.raises(UserError, match="says that its model has 4 heads: leave out num_heads=2"):
            load_checkpoint(path, num_heads=2)


@pytest.mark.parametrize("said", [{}, {"img_size": 21}])
def test_other_fields_that_weights_do_not_show_are_asked_for(tmp_path: Path, said: dict[str, int]) -> None:
    """Without learned positions, weights show neither the kind of positions nor the image's size."""
    model = VisionTransformer(**SIZES, positional_embedding="sincos").eval()
    path = tmp_path / "model.pth"
    torch.save({"model_state_dict": model.state_dict(), "config": {"num_heads": 4, **said}}, path)
    assert f"its model's {'positional_embedding' if said else 'img_size'}, nor do its weights" in refusal(path)


def test_safetensors(model: VisionTransformer, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    weights = {f"model.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(weights, path, metadata={"config": json.dumps(SIZES)})
    assert same_weights(load_checkpoint(path), model)
    save_file(weights, path, metadata={"config": "{broken"})
    assert "is truncated, corrupt or no safetensors file" in refusal(path)
    save_file(weights, path, metadata={"config": "3"})
    assert "has a config that is a int" in refusal(path)
    save_file(weights, path)
    assert "does not say how many attention heads" in refusal(path)
    assert same_weights(load_checkpoint(path, num_heads=4), model)
    whole = path.read_bytes()
    for length in (9, 101, 1009, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "is truncated, corrupt or no safetensors file" in refusal(path)


def test_half_precision_becomes_float32(model: VisionTransformer, tmp_path: Path) -> None:
    halves = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    torch.save({"model_state_dict": halves, "config": SIZES}, tmp_path / "half.pth")
    loaded = load_checkpoint(tmp_path / "half.pth")
    assert all(tensor.dtype == torch.float32 for tensor in loaded.state_dict.values())
    assert torch.equal(loaded.state_dict["head.weight"], halves["head.weight"].float())


# What is refused: no checkpoint


def test_paths_that_hold_no_checkpoint(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "missing.ckpt")
    assert "is a folder" in refusal(tmp_path)
    assert "is an address" in refusal("https://example.org/best.ckpt")
    assert "cannot be read" in refusal("a" * 5000)
    os.mkfifo(tmp_path / "pipe.ckpt")
    assert "is not a regular file" in refusal(tmp_path / "pipe.ckpt")
    (tmp_path / "empty.ckpt").touch()
    assert "is empty" in refusal(tmp_path / "empty.ckpt")


def test_files_of_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "notes.ckpt").write_text("these are no weights")
    (tmp_path / "short.ckpt").write_text("PK")
    torch.save({"a": torch.ones(2)}, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    for name in ("notes.ckpt", "short.ckpt", "legacy.pth"):
        assert "is not a checkpoint: expected a checkpoint written by torch.save" in refusal(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "archive.ckpt", "w") as archive:
        archive.writestr("letter.txt", "hello")
    assert "is a zip archive but not a checkpoint" in refusal(tmp_path / "archive.ckpt")
    with pytest.warns(FutureWarning):
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 3)), tmp_path / "script.pt")
    assert "is compressed" in refusal(tmp_path / "script.pt")


# What is refused: broken


def test_every_flipped_bit_is_caught_or_harmless(model: VisionTransformer, tmp_path: Path) -> None:
    """41 places all over the file, and the first bytes, the directory and its end, bit by bit where it hurt once."""
    path = tmp_path / "flipped.ckpt"
    torch.save(content_of(model), path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        weights_at = archive.getinfo("flipped/data/0").header_offset
        directory = archive.start_dir
    chance = random.Random(5)
    spots = [(chance.randrange(len(whole)), chance.randrange(8)) for _ in range(41)]
    spots += [(chance.randrange(directory, len(whole)), chance.randrange(8)) for _ in range(31)]
    spots += [(weights_at + place, chance.randrange(8)) for place in range(4, 30)]
    first_entry = directory + 38  # external attributes of the first member; bit 4 flags a folder
    second_entry = whole.index(b"PK\x01\x02", directory + 1) + 38
    spots += [(first_entry, 4), (second_entry, 4), (len(whole) - 6, 0), (0, 1)]
    refused = 0
    for place, bit in spots:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << bit
        path.write_bytes(flipped)
        try:
            assert same_weights(load_checkpoint(path), model), (place, bit)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused >= 41  # flips in padding, dates and attributes do no harm


def test_a_member_flagged_as_a_folder_is_refused(saved: Path) -> None:
    """torch.load gives memory as it happens to be for such a member, and says nothing."""
    whole = bytearray(saved.read_bytes())
    with zipfile.ZipFile(saved) as archive:
        entry = whole.rindex(b"best/data/3", archive.start_dir) - 46
    whole[entry + 38] ^= 0x10
    saved.write_bytes(whole)
    assert "flagged as a folder" in refusal(saved)


def test_flipped_weight_names_the_member(saved: Path) -> None:
    whole = bytearray(saved.read_bytes())
    with zipfile.ZipFile(saved) as archive:
        middle = archive.getinfo("best/data/3").header_offset + 130
    whole[middle] ^= 1
    saved.write_bytes(whole)
    assert "is corrupt (the checksum of 'best/data/" in refusal(saved)


def test_every_cut_is_caught(saved: Path) -> None:
    whole = saved.read_bytes()
    for length in (1, 4, 29, 101, 1009, len(whole) // 2, len(whole) - 23, len(whole) - 1):
        saved.write_bytes(whole[:length])
        expected = "is truncated or corrupt" if length >= 4 else "is not a checkpoint"
        assert expected in refusal(saved)


# What is refused: unsafe


class Exploit:
    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.touched}",)


def test_a_malicious_pickle_runs_no_code(model: VisionTransformer, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    path = changed(model, tmp_path / "evil.ckpt", lambda content: content | {"hyper_parameters": Exploit(touched)})
    assert "holds Python objects (posix.system)" in refusal(path)
    with pytest.raises(UserError, match="holds Python objects"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=False)
    assert not touched.exists()
    torch.load(path, weights_only=False)  # the file is what it seems to be
    assert touched.exists()


def test_a_whole_model_is_refused(model: VisionTransformer, tmp_path: Path) -> None:
    torch.save(model, tmp_path / "model.pt")
    assert "holds Python objects" in refusal(tmp_path / "model.pt")


def test_a_zip_bomb_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(10**7))
    assert path.stat().st_size < 20_000
    assert "is compressed, or unpacks to more than its size" in refusal(path)


def test_two_members_of_one_name_are_refused(saved: Path) -> None:
    with zipfile.ZipFile(saved, "a") as archive:
        archive.writestr("best/DATA.pkl", b"other")
    assert "holds two members of one name" in refusal(saved)


@pytest.mark.filterwarnings("ignore:.*sparse.*")
@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.zeros(1).expand(10**12), "declares 4,000,0"),
        (torch.zeros(1).expand(10**6, 44), "declares "),
        (torch.eye(5, 44).to_sparse(), "sparse"),
        (torch.empty(5, 44, device="meta"), "special tensor"),
        (torch.ones(5, 44, dtype=torch.int64), "holds 'head.weight' as torch.int64"),
        (torch.ones(5, 44, dtype=torch.complex64), "holds 'head.weight' as torch.complex64"),
        (torch.full((5, 44), 1e300, dtype=torch.float64), "has NaN or infinite values in head.weight"),
        (torch.full((5, 44), float("nan")), "has NaN or infinite values in head.weight"),
        (torch.ones(5, 43), "head.weight|embed_dim=43"),
        (torch.ones(44), "head.weight is not there"),
    ],
)
def test_tensors_that_are_no_weights(model: VisionTransformer, tmp_path: Path, tensor: Tensor, reason: str) -> None:
    def exchange(content: Any) -> None:
        content["state_dict"]["model.head.weight"] = tensor

    message = refusal(changed(model, tmp_path / "odd.ckpt", exchange))
    assert any(part in message for part in reason.split("|"))


# What is refused: another architecture


def with_model(**fields: Any) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        content["attention_visualizer"]["model"].update(fields)

    return change


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"embed_dim": 88}, "has weights of model.embed_dim=44, but its configuration says 88"),
        ({"embed_dim": 10**15}, "model.embed_dim=44"),
        ({"num_layers": 2}, "has weights of model.num_layers=3, but its configuration says 2"),
        ({"num_layers": 10**12}, "model.num_layers=3"),
        ({"mlp_dim": 17}, "model.mlp_dim=13"),
        ({"num_classes": 7}, "model.num_classes=5"),
        ({"in_channels": 1}, "model.in_channels=2"),
        ({"patch_size": 3}, "model.patch_size=7"),
        ({"img_size": 28}, "has weights of model.img_size=21, but its configuration says 28"),
        ({"pooling": "mean"}, "model.pooling=cls"),
        ({"positional_embedding": "sincos"}, "model.positional_embedding=learned"),
        ({"num_heads": 3}, "model.embed_dim=44 is not divisible by num_heads=3"),
        ({"num_heads": 0}, "model.num_heads=0: give a whole number"),
        ({"embed_dim": 44.0}, "model.embed_dim=44.0: give a whole number"),
        ({"dropout": float("nan")}, "model.dropout=nan"),
        ({"dropout": torch.zeros(3)}, "has model.dropout as a Tensor"),
        ({"num_heads": [4]}, "has model.num_heads as a list"),
        ({"_target_": "os.system"}, "has unknown or missing model fields: ['_target_']"),
    ],
)
def test_configurations_that_do_not_fit(
    model: VisionTransformer, tmp_path: Path, fields: dict[str, Any], reason: str
) -> None:
    assert reason in refusal(changed(model, tmp_path / "other.ckpt", with_model(**fields)))


def test_a_huge_image_without_positions_to_tell_is_refused(tmp_path: Path) -> None:
    model = VisionTransformer(**SIZES, positional_embedding="sincos")
    path = changed(model, tmp_path / "huge.ckpt", with_model(img_size=7 * 10**9))
    assert "patches a side: too large" in refusal(path)


def test_heads_come_from_the_configuration(model: VisionTransformer, tmp_path: Path) -> None:
    """Weights of four heads load strictly into two: only the configuration tells, so it is what is rebuilt."""
    torch.save({"model_state_dict": model.state_dict(), "config": SIZES | {"num_heads": 2}}, tmp_path / "two.pth")
    torch.save({"model_state_dict": model.state_dict(), "config": SIZES}, tmp_path / "four.pth")
    two, four = (load_checkpoint(tmp_path / name).build_model() for name in ("two.pth", "four.pth"))
    images = torch.randn(1, 2, 21, 21)
    assert torch.equal(four(images), model(images)) and not torch.allclose(two(images), four(images))


def test_missing_misshapen_and_unknown_weights_are_named(model: VisionTransformer, tmp_path: Path) -> None:
    def lacking(content: Any) -> None:
        del content["state_dict"]["model.blocks.1.norm2.bias"]

    def misshapen(content: Any) -> None:
        content["state_dict"]["model.blocks.1.norm2.bias"] = torch.ones(43)

    def unknown(content: Any) -> None:
        content["state_dict"]["model.distance_token"] = torch.ones(2)

    path = tmp_path / "odd.ckpt"
    assert "lacks the weights blocks.1.norm2.bias" in refusal(changed(model, path, lacking))
    assert "has blocks.1.norm2.bias of shape [43], expected [44]" in refusal(changed(model, path, misshapen))
    assert "has the unknown weights 'distance_token'" in refusal(changed(model, path, unknown))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1, 2], "holds a list where a dictionary of weights was expected"),
        ({}, "holds no dictionary of weights"),
        ({"epoch": 3}, "holds 'epoch' where weights were expected"),
        ({3: torch.ones(2)}, "holds 3 where weights were expected"),
        ({"model_state_dict": [1]}, "holds no dictionary of weights"),
        ({"model_state_dict": {"a": torch.ones(2)}, "config": [1]}, "has a config that is a list"),
        ({"a": torch.ones(2), "model.a": torch.ones(2)}, "holds the weights 'a' twice"),
        ({"conv1.weight": torch.ones(2, 3)}, "is of another architecture"),
        ({"state_dict": {"a": torch.ones(2)}, "epoch": 1}, "does not say which model it holds"),
        ({"attention_visualizer": {"format": 2}}, "is of format 2, this version reads 1"),
        ({"attention_visualizer": None}, "is of format None"),
        ({"attention_visualizer": {"format": 1}}, "has unknown or missing model fields"),
    ],
)
def test_unknown_layouts(tmp_path: Path, content: Any, reason: str) -> None:
    torch.save(content, tmp_path / "odd.ckpt")
    assert reason in refusal(tmp_path / "odd.ckpt")


@pytest.mark.parametrize("field", ["data", "data_dir", "split_seed", "validation_accuracy"])
def test_block_fields_of_another_kind(model: VisionTransformer, tmp_path: Path, field: str) -> None:
    def change(content: Any) -> None:
        content["attention_visualizer"][field] = [3]

    assert f"has {field}=[3]: expected a " in refusal(changed(model, tmp_path / "odd.ckpt", change))


def test_resuming_with_other_settings_is_refused(model: VisionTransformer, saved: Path) -> None:
    loaded = load_checkpoint(saved)
    config = ViTConfig(**model.config)
    refuse_other_settings(loaded, replace(config, dropout=0.3), DATA)
    with pytest.raises(UserError, match=r"model\.num_heads=2 cannot resume .*, which was trained with 4"):
        refuse_other_settings(loaded, replace(config, num_heads=2), DATA)
    with pytest.raises(UserError, match="the data set's name is 'digits' and .* was trained with 'mnist'"):
        refuse_other_settings(loaded, config, replace(DATA, name="digits"))
