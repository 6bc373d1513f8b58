"""Models of other libraries on a folder of pictures: from the command line and from Python."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sklearn.datasets
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from attention_visualizer import AttentionVisualizer, Geometry
from attention_visualizer.attention.capture import capture
from attention_visualizer.data.datamodule import ImageDataModule
from attention_visualizer.data.image_sets import InputFormat, read_formatted
from attention_visualizer.data.images import normalise, read_image
from attention_visualizer.figures import panels
from attention_visualizer.support.errors import UserError
from tests.helpers.analyses import (
    Workplace,
    analyze,
    contains,
    embedded_figures,
    listing,
    random_model,
    read_report,
    succeed,
)

SMALL = "model_from=timm:test_vit"  # 160 pixels, 10 x 10 patches, 2 heads


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/ with three pictures and a broken file, and a really trained digits.safetensors with digits/."""
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "photos/inner").mkdir(parents=True)
    for name, size in (("china", (96, 64)), ("flower", (70, 90))):
        Image.fromarray(sklearn.datasets.load_sample_image(f"{name}.jpg")).resize(size).save(
            folder / f"photos/{name}.png"
        )
    Image.new("L", (50, 20), 90).save(folder / "photos/inner/grey.png")
    (folder / "photos/broken.jpg").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def trained(place: Path) -> tuple[Path, float]:
    """A small ViT of timm, trained on scikit-learn's digits as colour pictures; and its accuracy on others."""
    scans = sklearn.datasets.load_digits()
    images = torch.tensor(scans.images / 16, dtype=torch.float32)[:, None].repeat(1, 3, 1, 1)
    images, labels = (images.repeat_interleave(4, -1).repeat_interleave(4, -2) - 0.5) / 0.5, torch.tensor(scans.target)
    torch.manual_seed(0)
    options: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **options)
    torch.nn.init.normal_(model.pos_embed, std=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(25):
        for rows in torch.randperm(1500).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        accuracy = float((model.eval()(images[1500:]).argmax(dim=1) == labels[1500:]).float().mean())
    (place / "digits").mkdir()
    for number in range(1500, 1505):
        scan = Image.fromarray((scans.images[number] * 255 / 16).astype(np.uint8)).resize((64, 64), 0)
        scan.convert("RGB").save(place / f"digits/{labels[number]}_{number}.png")
    torch.save(model, place / "model.pt")
    return place, accuracy


def statistics_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "attention_statistics.json").read_text())["chapters"]["statistics"]["numbers"]


def test_every_figure_and_number_for_a_model_from_a_file(place: Path) -> None:
    torch.manual_seed(1)
    model = timm.create_model("test_vit", num_classes=7).eval()
    save_file(model.state_dict(), place / "weights.safetensors")
    outcome = succeed(SMALL, "ckpt=weights.safetensors", "images=photos", "output_dir=out", folder=place)
    assert "photos/broken.jpg cannot be read and is left out" in outcome.out + outcome.err
    stems = ("attention_pattern", "attention_heads", "layer_comparison", "attention_methods")
    expected = {f"{stem}_sample_{number}.png" for stem in (*stems, "attention_last_layer") for number in range(3)}
    expected |= {"attention_statistics.png", "attention_statistics_by_head.png", "attention_depth.webp"}
    report = read_report(place / "out")
    assert set(embedded_figures(report)) == expected
    texts = {
        "attention_analysis_report.md",
        "attention_analysis_report.html",
        "attention_explorer.html",
        "attention_statistics.csv",
        "attention_statistics.json",
    }
    assert listing(place / "out") == expected | texts
    for said in (
        "timm:test\\_vit",
        "weights.safetensors, sha256",
        "10 x 10 patches of 16 x 16 pixels, and the class token",
    ):
        assert said in report
    assert "3 images" in report and "broken.jpg could not be read" in report and "by at most" in report
    assert "random weights" not in report and "accuracy" not in report.lower()
    for number, name in enumerate(("china.png", "flower.png", "inner/grey.png")):
        shown = read_formatted(place / "photos" / name, InputFormat.of(model)).permute(1, 2, 0).numpy()
        figure = np.asarray(Image.open(place / f"out/attention_methods_sample_{number}.png").convert("RGB"))
        assert contains(figure, panels.resize(shown, 112, 112)), name
    found = statistics_of(place / "out")
    pictures = [
        Image.open(place / "photos" / name).convert("RGB") for name in ("china.png", "flower.png", "inner/grey.png")
    ]
    transform: Any = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    inputs = torch.stack([transform(picture) for picture in pictures])
    with torch.no_grad(), capture(model) as attention:
        model(inputs)
    for layer, numbers in zip(attention, found["layers"], strict=True):
        row = layer.weights[:, :, 0].double()
        entropy = -(row * row.log()).sum(dim=-1).mean(dim=0)
        np.testing.assert_allclose(numbers["entropy"]["mean_by_head"], entropy, rtol=1e-4)


def test_a_second_analysis_is_the_same(place: Path) -> None:
    for output in ("one", "two"):
        succeed(SMALL, "ckpt=random", "images=photos", "num_samples=1", f"output_dir={output}", folder=place)
    for path in (place / "one").iterdir():
        if path.suffix not in (".md", ".html"):  # which name the folder
            assert path.read_bytes() == (place / "two" / path.name).read_bytes(), path.name


def test_figures_inside_the_folder_are_not_looked_at_the_next_time(tmp_path: Path) -> None:
    """images=. and the usual output folder: else a second analysis is of the first one's figures."""
    Image.fromarray(sklearn.datasets.load_sample_image("china.jpg")).resize((96, 64)).save(tmp_path / "china.png")
    found = []
    for _ in range(2):
        succeed(SMALL, "ckpt=random", "images=.", "chapters=[patterns,statistics]", folder=tmp_path)
        found.append((tmp_path / "attention_analysis_random/attention_statistics.json").read_bytes())
    assert found[0] == found[1] and b"1 images" in found[0]


def test_names_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "photos" / os.fsdecode(b"caf\xe9\nphoto | <b>.png"))
    (tmp_path / "photos" / os.fsdecode(b"broken\xe9.png")).write_bytes(b"nothing")
    succeed(SMALL, "ckpt=random", "images=photos", "chapters=[patterns]", "format=svg", folder=tmp_path)
    assert "photo \\| &lt;b>.png" in read_report(tmp_path / "attention_analysis_random")


def test_what_a_query_does_not_reach_is_left_out(place: Path) -> None:
    """The last layer's patch queries have no effect on the class token: a panel of zeros would say "nothing here"."""
    arguments = (SMALL, "ckpt=random", "images=photos", "num_samples=1", "chapters=[methods]")
    widths = {}
    for query in ("cls", "[2,3]"):
        output = f"methods{len(widths)}"
        succeed(*arguments, f"query={query}", f"output_dir={output}", folder=place)
        assert ("**Gradient x attention**" in read_report(place / output)) == (query == "cls")
        widths[query] = Image.open(place / output / "attention_methods_sample_0.png").width
    assert widths["cls"] - widths["[2,3]"] == 118


def test_this_projects_own_model_on_a_folder(tmp_path: Path, digits: ImageDataModule) -> None:
    """As its own test images, when the pictures are those."""
    model = random_model()
    Workplace(tmp_path, digits).add_run("2025-01-02_03-04-05-000006", model)
    (tmp_path / "photos").mkdir()
    images, labels = digits.splits["test"]
    for number in range(3):
        Image.fromarray(images[number, 0].numpy()).save(tmp_path / f"photos/{labels[number]}_{number}.png")
    succeed("images=photos", "output_dir=out", "chapters=[patterns,statistics]", folder=tmp_path)
    with torch.no_grad():
        probabilities, predicted = model(normalise(images[:3], digits.description)).softmax(dim=1).max(dim=1)
    report = read_report(tmp_path / "out")
    for number in range(3):
        verdict = f"predicted {int(predicted[number])} ({float(probabilities[number]):.1%})"
        assert f"{labels[number]}\\_{number}.png: {verdict}" in report
    found = statistics_of(tmp_path / "out")
    assert found["images"] == 3 and found["accuracy"] is None


def test_dark_ink_on_paper_is_inverted_in_a_folder_as_in_a_single_file(tmp_path: Path, digits: ImageDataModule) -> None:
    """And a report on images of one's own leaves that on the test set."""
    model = random_model()
    run = Workplace(tmp_path, digits).add_run("2025-01-02_03-04-05-000006", model)
    drawn = tmp_path / "my digits"
    drawn.mkdir()
    dark, light = digits.splits["test"][0][:2, 0].numpy()
    Image.fromarray(255 - dark).resize((60, 90)).save(drawn / "a.png")
    see_through = np.dstack([np.zeros((28, 28, 3), np.uint8), dark])  # black ink on nothing
    Image.fromarray(see_through, "RGBA").save(drawn / "b.png")
    Image.fromarray(light).save(drawn / "c.png")
    outcome = succeed("images=my digits", "chapters=[patterns]", folder=tmp_path)
    inverted = "2 of 3 images have a light border, so they are inverted to light ink on dark"
    report = read_report(run.path / "attention_analysis_my_digits")
    assert inverted in outcome.out and inverted in report and "trained on scikit-learn digits" in report
    assert not (run.path / "attention_analysis").exists()
    alone = torch.stack([read_image(drawn / f"{name}.png", digits.description) for name in "abc"])
    assert torch.equal(alone[2, 0], torch.from_numpy(light)) and float(alone[0].float().mean()) < 100
    with torch.no_grad():
        probabilities, predicted = model(normalise(alone, digits.description)).softmax(dim=1).max(dim=1)
    for number, name in enumerate("abc"):
        assert f"{name}.png: predicted {int(predicted[number])} ({float(probabilities[number]):.1%})" in report


def test_windows_have_no_rollout_and_say_so(place: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=24, depths=(2, 2, 2, 2))
    AttentionVisualizer(model=model, images=place / "photos", output_dir=place / "swin").run_comprehensive_analysis()
    report = read_report(place / "swin")
    assert "56 x 56 patches of 4 x 4 pixels, in windows of 7 x 7; then 28 x 28" in report and "3 to 24 heads" in report
    assert "There is no rollout" in report and "**Rollout**" not in report and "**Relevance**" not in report
    assert "by 0" in report  # its own tensors
    layers = statistics_of(place / "swin")["layers"]
    assert [len([mean for mean in layer["entropy"]["mean_by_head"] if mean is not None]) for layer in layers] == (
        [3, 3, 6, 6, 12, 12, 24, 24]
    )


def test_layers_without_a_place_are_named_on_every_figure(place: Path) -> None:
    arguments = ("model_from=timm:xcit_nano_12_p16_224", "ckpt=random", "images=photos", "num_samples=1")
    succeed(*arguments, "chapters=[patterns,statistics]", "output_dir=xcit", folder=place)
    report = read_report(place / "xcit")
    placed = len(statistics_of(place / "xcit")["layers"])
    assert 0 < placed < 14
    assert f"only the {placed} of 14 layers whose keys have a known position on the image" in report
    assert "blocks.0.attn" in report


def test_a_model_that_was_really_trained(trained: tuple[Path, float]) -> None:
    place, accuracy = trained
    assert accuracy > 0.7  # chance is 0.1
    model = torch.load(place / "model.pt", weights_only=False)
    form = InputFormat((32, 32), 3, (0.5,) * 3, (0.5,) * 3)
    visualizer = AttentionVisualizer(
        model=model, images=place / "digits", image_format=form, output_dir=place / "trained", class_names="0123456789"
    )
    report = Path(visualizer.run_comprehensive_analysis()).read_text()
    right = sum(f"{label}\\_{number}.png: predicted {label} (" in report for number, label in names(place / "digits"))
    assert right >= 3 and "random weights" not in report
    assert {"attention_methods_sample_4.png", "attention_statistics.png"} <= listing(place / "trained")


def names(folder: Path) -> list[tuple[str, str]]:
    return [(path.stem.split("_")[1], path.stem.split("_")[0]) for path in folder.iterdir()]


MISTAKES = {
    ("model_from=timm:test_vit", "ckpt=random"): "give images=<folder> or image=<file>",
    (SMALL, "images=photos"): "give the weights with ckpt=<file>",
    (SMALL, "images=photos", "ckpt=random", "run=runs/one"): "refer to different models",
    (SMALL, "images=''", "ckpt=random"): "images= is empty",
    ("images=photos", "ckpt=best"): "no checkpoint yet in runs/",
    (SMALL, "images=photos/broken.jpg", "ckpt=random"): "1 cannot be read, such as broken.jpg",
    (SMALL, "image=photos/none.jpg", "ckpt=random"): "there is no such folder or file",
    (SMALL, "images=photos", "ckpt=random", "rollout_discard=-0.1"): "give a share from 0",
    (SMALL, "images=photos", "ckpt=random", "rollout_discard=nan"): "give a share from 0",
    (SMALL, "images=photos", "ckpt=random", "image=photos"): "this is a folder",
    (SMALL, "images=photos", "ckpt=random", "chapters=[nothing]"): "choose from patterns",
    ("model_from=timm:test_vit.nothing", "images=photos", "ckpt=random"): "timm cannot build this model",
    (SMALL, "images=nowhere", "ckpt=random"): "there is no such folder",
    (SMALL, "images=photos", "ckpt=none.pth"): "does not exist",
    (SMALL, "images=photos", "ckpt=random", "class=3"): "class= needs images whose classes are known",
    (SMALL, "images=photos", "ckpt=random", "wrong=true"): "wrong= needs images whose classes are known",
    (SMALL, "images=photos", "ckpt=random", "samples=[7]"): "give indices from 0 to 2",
    (SMALL, "images=photos", "ckpt=random", "query=[10,0]"): "outside the 10 x 10 patch grid",
    (SMALL, "images=photos", "ckpt=random", "rollout_fusion=median"): "choose one of mean, max, min",
    (SMALL, "images=photos", "ckpt=random", "rollout_discard=1"): "give a share from 0",
    (SMALL, "images=photos", "ckpt=random", "rollout_discard=all"): "give a share from 0",
    ("model_from=timm:nothing_at_all", "images=photos", "ckpt=random"): "timm has no such model",
    ("model_from=timm:resnet18", "images=photos", "ckpt=random"): "no attention of ResNet was captured",
    ("model_from=timm:test_vit2", "images=photos", "ckpt=random", "query=cls"): "no class token",
}


@pytest.mark.parametrize("arguments", MISTAKES, ids=lambda arguments: " ".join(arguments[-2:]))
def test_a_mistake_is_one_line_and_writes_nothing(place: Path, arguments: tuple[str, ...]) -> None:
    before = listing(place)
    outcome = analyze(*arguments, "output_dir=nothing", folder=place)
    assert outcome.exit_code == 2 and MISTAKES[arguments] in outcome.err and "Traceback" not in outcome.err
    assert len([line for line in outcome.err.splitlines() if line.startswith("error:")]) == 1
    assert listing(place) == before


def test_a_picture_and_a_patch_of_ones_own(place: Path) -> None:
    arguments = (SMALL, "ckpt=random", "images=photos", "image=photos/flower.png", "query=[2,3]", "chapters=[patterns]")
    succeed(*arguments, "rollout_fusion=max", "rollout_discard=0.5", "output_dir=own", folder=place)
    assert "flower.png" in read_report(place / "own") and "row 2, column 3" in read_report(place / "own")


@pytest.mark.parametrize("arguments", [("image=photos/china.png",), ("images=photos/china.png",), ("image=photos",)])
def test_one_picture_or_a_folder_by_either_name(place: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """One has no interval; each has a large picture of the last layer, and captions that end where they say all."""
    chapters = "chapters=[patterns,statistics,claims]"
    succeed(SMALL, "ckpt=random", *arguments, chapters, f"output_dir={tmp_path / 'out'}", folder=place)
    report = read_report(tmp_path / "out")
    number = 1 if "china" in arguments[0] else 3
    assert len(list((tmp_path / "out").glob("attention_last_layer_sample_*.png"))) == number
    width, height = Image.open(tmp_path / "out" / "attention_last_layer_sample_0.png").size
    assert width > 840 and height > 420
    assert "## Not in this report" in report and ": ." not in report
    effective = statistics_of(tmp_path / "out")["means"]["effective_tokens"]
    assert effective["n"] == number and (" to " in report.split("Findings")[1][:400]) == (number > 1)


# --- from Python ---


class Silent(nn.Module):
    """A ViT that states nothing about itself."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, 12, (8, 4), stride=(8, 4))
        self.layer = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True)
        self.answer = nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.cut(images).flatten(2).mT
        return self.answer(self.layer(tokens[:, torch.arange(11, -1, -1)])[:, 0])


def test_the_whole_class_with_a_model_of_ones_own(place: Path) -> None:
    model = timm.create_model("test_vit", num_classes=7).train()
    visualizer = AttentionVisualizer(model=model, images=place / "photos", output_dir=place / "class")
    assert visualizer.load_optimal_model() is model and not model.training
    samples = visualizer.get_test_samples(num_samples=2)
    assert [tuple(image.shape) for image, _ in samples] == [(3, 160, 160)] * 2 and samples[0][1] is None
    for i, (image, label) in enumerate(samples):
        for draw in ("visualize_attention_patterns", "analyze_attention_heads", "create_layer_comparison"):
            assert isinstance(getattr(visualizer, draw)(image, label, i), Figure)
    figure, table = visualizer.create_attention_statistics(samples)
    assert isinstance(figure, Figure) and isinstance(table, pd.DataFrame) and set(table["images"]) == {2}
    assert "attention_heads_sample_1.png" in listing(place / "class")


def test_what_a_model_does_not_state_can_be_said(place: Path) -> None:
    model, photos = Silent(), place / "photos"
    with pytest.raises(UserError, match="give it with image_size="):
        AttentionVisualizer(model=model, images=photos).study  # noqa: B018
    with pytest.raises(UserError, match=r"positions of this model.* geometry=Geometry"):
        AttentionVisualizer(model=nn.Sequential(nn.Identity(), Scrambled()), images=photos, image_size=24).study  # noqa: B018
    backwards = Geometry((3, 4), 0, (8, 4), order=tuple(range(11, -1, -1)))
    for given in (None, backwards):
        visualizer = AttentionVisualizer(
            model=model, images=photos, image_size=(24, 16), geometry=given, output_dir=place / "silent"
        )
        assert visualizer.study.target.images.shape == (3, 24, 16)
        assert visualizer.study.first_observation.geometries == (backwards.usual,)
    with pytest.raises(UserError, match="measured on layer.self_attn .* in another order: leave geometry= out"):
        AttentionVisualizer(model=model, images=photos, image_size=(24, 16), geometry=backwards.usual).study  # noqa: B018


class Scrambled(Silent):
    """With tokens whose number is no grid's."""

    def forward(self, images: Tensor) -> Tensor:
        return self.answer(self.layer(self.cut(images).flatten(2).mT[:, :7])[:, 0])


def test_pictures_that_the_model_cannot_take_are_one_line(place: Path) -> None:
    model = timm.create_model("test_vit", num_classes=7, dynamic_img_size=False)
    for options in ({"image_size": 96}, {"image_format": InputFormat((160, 160), 1, (0.5,), (0.5,))}):
        visualizer = AttentionVisualizer(model=model, images=place / "photos", **options, output_dir=place / "odd")
        with pytest.raises(
            UserError, match=r"VisionTransformer fails on an image of .*: in Python, give .*image_size="
        ):
            visualizer.run_comprehensive_analysis()
    assert not (place / "odd").exists()


def test_models_of_one_class_have_folders_of_their_own(place: Path, tmp_path: Path) -> None:
    """None may write over another's figures; the same model writes into its own again."""
    outputs = []
    with contextlib.chdir(tmp_path):
        for seed in (1, 2, 1):
            torch.manual_seed(seed)
            visualizer = AttentionVisualizer(model=timm.create_model("test_vit"), images=place / "photos")
            ((image, label), *_) = visualizer.get_test_samples(1)
            visualizer.visualize_attention_patterns(image, label)
            outputs.append(visualizer.study.output.folder)
    assert outputs[0] == outputs[2] != outputs[1]


class Custom(AttentionVisualizer):
    def logits(self) -> Tensor:
        return self.load_optimal_model()(torch.stack([image for image, _ in self.get_test_samples(2)]))


def test_a_subclass_that_goes_on_to_another_model(place: Path, tmp_path: Path) -> None:
    """What was said of the first one (three channels, its size) does not hold for this project's."""
    form = InputFormat((160, 160), 3, (0.5,) * 3, (0.5,) * 3)
    visualizer = Custom(
        model=timm.create_model("test_vit", num_classes=2),
        images=place / "photos",
        geometry=Geometry((10, 10), 1, (16, 16)),
        image_format=form,
        class_names=["a", "b"],
        output_dir=tmp_path / "out",
    )
    assert visualizer.logits().shape == (2, 2)
    save_file(random_model().state_dict(), tmp_path / "own.safetensors", {"config": json.dumps(random_model().config)})
    report = visualizer.run_comprehensive_analysis(tmp_path / "own.safetensors").read_text()
    assert "4 x 4 patches of 7 x 7 pixels" in report and "3 layers x 2 heads" in report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give either model_path="),
        ({"model_path": "a.ckpt", "model": nn.Linear(1, 1)}, "give either model_path="),
        ({"model": "test_vit", "images": "photos"}, "is no PyTorch module"),
        ({"model": nn.Linear(1, 1)}, "give images=<folder>"),
    ],
    ids=["nothing", "both", "a name", "no pictures"],
)
def test_mistakes_in_python_are_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AttentionVisualizer(**arguments)
