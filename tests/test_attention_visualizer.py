"""Every line of the README's Python, as printed, from an empty folder. Works as a script too:

python tests/test_attention_visualizer.py
"""

from __future__ import annotations

import html
import io
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save_file

from attention_visualizer import AttentionVisualizer, capture
from attention_visualizer.data.datamodule import ImageDataModule
from attention_visualizer.data.images import normalise
from attention_visualizer.data.mnist import MnistUnavailable
from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.models.vit_config import ViTConfig
from attention_visualizer.runs.checkpoint import CHECKPOINT_KEY, block_for
from attention_visualizer.support.errors import UserError

PRINTED_PATH = "exp/experiments/efficient_ablation_20250609_101146/embed_dim_ablation_embed_dim_128/best_model.pth"

QUICK_START = f"""
from attention_visualizer import AttentionVisualizer

model_path = "{PRINTED_PATH}"
visualizer = AttentionVisualizer(model_path)

visualizer.run_comprehensive_analysis(model_path)
"""

STEP_BY_STEP = """
visualizer.load_optimal_model()

samples = visualizer.get_test_samples(num_samples=5)

for i, (image, label) in enumerate(samples):
    visualizer.visualize_attention_patterns(image, label, i)

    visualizer.analyze_attention_heads(image, label, i)

    visualizer.create_layer_comparison(image, label, i)

visualizer.create_attention_statistics(samples)
"""

OPTIMAL_CONFIG = """
optimal_config = {
    'img_size': 28,
    'patch_size': 7,
    'in_channels': 1,
    'num_classes': 10,
    'embed_dim': 128,
    'num_heads': 4,
    'num_layers': 6,
    'mlp_dim': 256,
    'dropout': 0.1
}
"""

OPTIONS = """
visualizer = AttentionVisualizer(
    model_path="path/to/model.pth",
    device='cpu'
)

samples = visualizer.get_test_samples(num_samples=8)
"""

DEBUGGING = """
import logging
logging.basicConfig(level=logging.DEBUG)

visualizer.visualize_attention_patterns(image, label, 0)
"""

CUSTOM = """
class CustomAttentionVisualizer(AttentionVisualizer):
    def custom_analysis(self, samples):
        return [self.load_optimal_model()(torch.as_tensor(image)[None]).shape for image, _ in samples]
"""

BATCH = """
model_paths = ["model1.pth", "model2.pth", "model3.pth"]
for path in model_paths:
    visualizer = AttentionVisualizer(path)
    visualizer.run_comprehensive_analysis(path)
"""

SAMPLE_FIGURES = ("attention_pattern", "attention_heads", "layer_comparison", "attention_methods")
RANDOM = "random weights (untrained)"
NOT_MNIST = "scikit-learn digits (not MNIST)"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_budget: None) -> Iterator[Path]:
    """Where the code runs: no models yet, neither MNIST nor a network, and pyplot's settings are left alone."""

    def refuse(_: Path) -> dict[str, np.ndarray]:
        raise MnistUnavailable("there is no network in this test")

    import matplotlib.pyplot as plt

    plt.get_backend()
    settings = matplotlib.rcParams.copy()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MNIST_DIR", raising=False)
    monkeypatch.setattr("attention_visualizer.data.datasets.load_mnist", refuse)
    yield tmp_path
    assert not plt.get_fignums() and matplotlib.rcParams == settings


def model_of(seed: int = 0, **config: Any) -> VisionTransformer:
    """Weights large enough for attention to be far from uniform."""
    model = VisionTransformer(**config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


SMALL: dict[str, Any] = {"embed_dim": 22, "num_heads": 2, "num_layers": 3, "mlp_dim": 29}


def save_pth(path: str | Path, model: VisionTransformer) -> Path:
    """In the seed's format."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model_state_dict": model.state_dict(), "config": model.config}, path)
    return Path(path)


def small_model(path: str | Path = "small.pth", seed: int = 0, **config: Any) -> Path:
    return save_pth(path, model_of(seed, **SMALL | config))


def execute(code: str, **names: Any) -> dict[str, Any]:
    """Runs the README's code; returns its names."""
    scope = {"AttentionVisualizer": AttentionVisualizer, "torch": torch} | names
    exec(compile(code, "README", "exec"), scope)  # noqa: S102
    return scope


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.texts] + [text.get_text() for ax in figure.axes for text in ax.texts]


def assert_pictures(folder: Path, names: set[str]) -> None:
    assert names <= set(os.listdir(folder))
    for name in names:
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 100, name
            assert np.asarray(picture.convert("L")).std() > 10, name


# --- as printed ---


def test_the_quick_start(tmp_path: Path, small_budget: None) -> None:
    scope = execute(OPTIMAL_CONFIG)
    save_pth(PRINTED_PATH, model_of(**scope["optimal_config"]))
    execute(QUICK_START)
    pictures = {f"{stem}_sample_{number}.png" for stem in SAMPLE_FIGURES for number in range(8)}
    pictures.add("attention_statistics.png")
    assert_pictures(tmp_path / "attention_analysis", pictures)
    report = (tmp_path / "attention_analysis/attention_analysis_report.md").read_text()
    assert all(f"({name})" in report for name in pictures)
    assert f"{sum(p.numel() for p in model_of(**scope['optimal_config']).parameters()):,} parameters" in report
    assert RANDOM not in report and NOT_MNIST in report


def test_step_by_step(tmp_path: Path) -> None:
    execute(STEP_BY_STEP, visualizer=AttentionVisualizer(small_model()))
    pictures = {f"{stem}_sample_{number}.png" for stem in SAMPLE_FIGURES[:3] for number in range(5)}
    assert_pictures(tmp_path / "attention_analysis", pictures | {"attention_statistics.png"})
    assert not (tmp_path / "attention_analysis/attention_pattern_sample_5.png").exists()


def test_the_options(tmp_path: Path) -> None:
    small_model("path/to/model.pth")
    scope = execute(OPTIONS)
    assert len(scope["samples"]) == 8 == len(scope["visualizer"].get_test_samples())
    assert scope["visualizer"].device == torch.device("cpu")
    assert {parameter.device.type for parameter in scope["visualizer"].load_optimal_model().parameters()} == {"cpu"}
    assert not (tmp_path / "attention_analysis").exists()  # looking at samples writes nothing


def test_a_gpu_that_is_not_there(no_gpu: None) -> None:
    with pytest.raises(UserError, match="device=cuda: no such GPU is available; use device=cpu"):
        AttentionVisualizer(small_model(), device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tmp_path: Path) -> None:
    execute(STEP_BY_STEP, visualizer=AttentionVisualizer(small_model(), device="cuda"))
    assert_pictures(tmp_path / "attention_analysis", {"attention_statistics.png"})


def test_debugging(caplog: pytest.LogCaptureFixture) -> None:
    visualizer = AttentionVisualizer(small_model())
    ((image, label), *_) = visualizer.get_test_samples(1)
    with caplog.at_level(logging.DEBUG):
        execute(DEBUGGING, visualizer=visualizer, image=image, label=label)
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("attention_visualizer")]
    assert any("attention_pattern_sample_0.png" in message for message in ours)


def test_a_subclass_with_an_analysis_of_its_own() -> None:
    visualizer = execute(CUSTOM)["CustomAttentionVisualizer"](small_model())
    samples = visualizer.get_test_samples(num_samples=3)
    assert visualizer.custom_analysis(samples) == [(1, 10)] * 3
    assert isinstance(visualizer.visualize_attention_patterns(*samples[0], 0), Figure)


def test_each_of_several_models_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attention_visualizer.visualizer.CHAPTERS", ("heads",))  # the other tests have all of them
    for number in (1, 2, 3):
        small_model(f"model{number}.pth", seed=number)
    for _ in range(2):  # again: each into its own folder again
        execute(BATCH)
        folders = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
        assert folders == ["attention_analysis", "attention_analysis_model2", "attention_analysis_model3"]
    pictures = {(tmp_path / folder / "attention_heads_sample_0.png").read_bytes() for folder in folders}
    assert len(pictures) == 3
    for folder, name in zip(folders, ("model1.pth", "model2.pth", "model3.pth"), strict=True):
        assert name in (tmp_path / folder / "attention_analysis_report.md").read_text()


def test_checkpoints_of_several_runs_have_folders_of_their_own() -> None:
    """They all are called checkpoints/best.ckpt; none may overwrite another's figures."""
    outputs = []
    for run in range(5):
        visualizer = AttentionVisualizer(small_model(f"runs/{run}/checkpoints/best.ckpt", seed=run))
        ((image, label), *_) = visualizer.get_test_samples(1)
        visualizer.visualize_attention_patterns(image, label, 0)
        outputs.append(visualizer.study.output.folder)
    assert len(set(outputs)) == 5, outputs


def test_one_visualizer_can_go_on_to_another_model(tmp_path: Path) -> None:
    first, second = small_model("a.pth"), small_model("b.pth", num_layers=2)
    visualizer = AttentionVisualizer(first, output_dir="out")
    assert len(visualizer.load_optimal_model().blocks) == 3
    report = visualizer.run_comprehensive_analysis(second)
    assert "2 layers x 2 heads" in report.read_text() and len(visualizer.load_optimal_model().blocks) == 2


# --- what the methods return ---


@pytest.fixture
def visualizer() -> AttentionVisualizer:
    return AttentionVisualizer(small_model())


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("visualize_attention_patterns", "attention_pattern_sample_7.png"),
        ("analyze_attention_heads", "attention_heads_sample_7.png"),
        ("create_layer_comparison", "layer_comparison_sample_7.png"),
    ],
)
def test_each_method_saves_its_file_and_returns_the_figure(
    visualizer: AttentionVisualizer, tmp_path: Path, method: str, name: str
) -> None:
    ((image, label), *_) = visualizer.get_test_samples(1)
    figure = getattr(visualizer, method)(image, label, 7)
    assert isinstance(figure, Figure)
    assert_pictures(tmp_path / "attention_analysis", {name})
    assert any(f"true {label}, predicted" in text for text in texts(figure))
    figure.savefig(tmp_path / "again.png")
    with Image.open(tmp_path / "again.png") as again, Image.open(tmp_path / "attention_analysis" / name) as saved:
        assert again.size == saved.size
    assert any(NOT_MNIST in text for text in texts(figure)) and not any(RANDOM in text for text in texts(figure))


def test_the_statistics_are_a_figure_and_a_table(visualizer: AttentionVisualizer, tmp_path: Path) -> None:
    samples = visualizer.get_test_samples(num_samples=5)
    figure, table = visualizer.create_attention_statistics(samples)
    assert isinstance(figure, Figure) and isinstance(table, pd.DataFrame)
    assert_pictures(tmp_path / "attention_analysis", {"attention_statistics.png"})
    # Of the last layer, which is read by its class token alone, there is nothing that is over all queries.
    assert len(table) == 9 * 3 * 2 - 3 * 2 and set(table["images"]) == {5}
    assert {"measure", "unit", "layer", "head", "mean", "standard_deviation"} <= set(table.columns)
    maximum = table[(table["measure"] == "maximum") & (table["layer"] == 2)].sort_values("head")["mean"]
    model: Any = visualizer.load_optimal_model()
    images = normalise(torch.stack([image for image, _ in samples]), visualizer.study.target.images.description)
    with torch.no_grad():
        tokens = model.blocks[0](model.embed(images))
        query, key, _ = model.blocks[1].attn.qkv(model.blocks[1].norm1(tokens)).unflatten(-1, (3, 2, 11)).unbind(2)
        weights = torch.einsum("bqhd,bkhd->bhqk", query, key).div(11**0.5).softmax(dim=-1)
    np.testing.assert_allclose(maximum, weights[:, :, 0, 1:].amax(dim=-1).mean(dim=0), rtol=1e-4)
    assert any("5 " in text and "images" in text for text in [figure.get_suptitle()])


def test_samples_are_test_images_between_zero_and_one(visualizer: AttentionVisualizer) -> None:
    data = ImageDataModule(name="digits")
    data.load()
    images, labels = data.splits["test"]
    samples = visualizer.get_test_samples(num_samples=12)
    assert len(samples) == 12
    for image, label in samples:
        assert image.shape == (1, 28, 28) and image.dtype == torch.float32 and isinstance(label, int)
        assert 0 <= image.min() and image.max() <= 1 and image.max() > 0.5
        (places,) = ((images.float() / 255 - image).abs().amax(dim=(1, 2, 3)) < 1e-6).nonzero(as_tuple=True)
        assert label in labels[places]
    assert {label for _, label in samples[:10]} == set(range(10))


def test_an_image_may_come_in_any_usual_form(visualizer: AttentionVisualizer, tmp_path: Path) -> None:
    ((image, label), *_) = visualizer.get_test_samples(1)
    pixels = (image * 255).round().to(torch.uint8)
    forms = [image, image[None], image[0], image.numpy(), image.double(), pixels, pixels.numpy()]
    drawn = set()
    for number, form in enumerate(forms):
        visualizer.visualize_attention_patterns(form, label, 0)
        drawn.add((tmp_path / "attention_analysis/attention_pattern_sample_0.png").read_bytes())
        assert len(drawn) == 1, f"form {number}"
    figure = visualizer.visualize_attention_patterns(image, None, 0)
    assert not any("true " in text for text in texts(figure)) and any("predicted" in text for text in texts(figure))


@pytest.mark.parametrize(
    "image",
    [torch.full((1, 28, 28), -0.4), torch.full((1, 28, 28), 2.8), torch.full((1, 28, 28), torch.nan), torch.rand(28)],
    ids=["normalised", "too light", "not a number", "one-dimensional"],
)
def test_an_image_that_is_none_is_refused(visualizer: AttentionVisualizer, image: torch.Tensor) -> None:
    with pytest.raises(UserError):
        visualizer.visualize_attention_patterns(image, 3, 0)


@pytest.mark.parametrize("shape", [(1, 14, 14), (3, 28, 28), (1, 28, 35)])
def test_an_image_of_another_size_is_refused(visualizer: AttentionVisualizer, shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="28"):
        visualizer.visualize_attention_patterns(torch.rand(shape), 3, 0)


def test_statistics_of_no_samples_are_refused(visualizer: AttentionVisualizer) -> None:
    with pytest.raises(UserError, match="sample"):
        visualizer.create_attention_statistics([])


@pytest.mark.parametrize("num_samples", [0, -1])
def test_a_number_of_samples_is_at_least_one(visualizer: AttentionVisualizer, num_samples: int) -> None:
    with pytest.raises(UserError, match="num_samples"):
        visualizer.get_test_samples(num_samples=num_samples)


@pytest.mark.parametrize("label", [10, -1])
def test_a_label_is_a_class(visualizer: AttentionVisualizer, label: int) -> None:
    with pytest.raises(UserError, match="label"):
        visualizer.visualize_attention_patterns(torch.zeros(1, 28, 28), label, 0)


def test_a_model_without_a_class_token_says_what_is_shown() -> None:
    visualizer = AttentionVisualizer(small_model(pooling="mean"))
    ((image, label), *_) = visualizer.get_test_samples(1)
    figure = visualizer.visualize_attention_patterns(image, label)
    assert any("averaged over patch queries" in text for text in texts(figure))


# --- in a notebook ---


def test_a_notebook_shows_figures_and_the_page_and_says_what_things_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("attention_visualizer.visualizer.CHAPTERS", ("patterns", "statistics"))
    visualizer = AttentionVisualizer(small_model())
    assert repr(visualizer).startswith("AttentionVisualizer('") and "device='cpu'" in repr(visualizer)
    samples = visualizer.get_test_samples(num_samples=2)
    figures = [visualizer.visualize_attention_patterns(*samples[0]), visualizer.create_attention_statistics(samples)[0]]
    for figure in figures:
        shown = Image.open(io.BytesIO(figure._repr_png_()))  # type: ignore[attr-defined]
        assert shown.size == tuple(round(side * figure.dpi) for side in figure.get_size_inches())
    report = visualizer.run_comprehensive_analysis()
    page = html.unescape(report._repr_html_())
    assert isinstance(report, Path) and report.is_file() and page.count("<iframe srcdoc=") == 1
    page_file = report.with_name("attention_analysis_report.html").read_text()
    # A link inside the page stays inside it.
    assert page_file.replace("<head>", '<head>\n<base href="about:srcdoc">', 1) in page
    told = capsys.readouterr().out.splitlines()
    assert told[:2] == ["chapter 1/2: patterns", "chapter 2/2: statistics"] and told[2].startswith("1. The readout")
    assert told[-2].endswith("attention_analysis_report.html") and told[-1].endswith("attention_analysis_report.md")


def test_the_explorer_is_a_page_that_a_notebook_shows(tmp_path: Path) -> None:
    visualizer = AttentionVisualizer(small_model(), output_dir=tmp_path / "out")
    samples = visualizer.get_test_samples(num_samples=3)
    page = visualizer.explore(samples)
    assert page == tmp_path / "out" / "attention_explorer.html" and page.is_file()
    assert page.read_text("utf-8").count('"png": ') == 3
    shown = page._repr_html_()
    assert shown.count("<iframe srcdoc=") == 1 and shown.isascii() and "Attention explorer" in shown
    with pytest.raises(UserError, match="the model takes"):
        visualizer.explore([(torch.zeros(1, 5, 5), None)])


def test_a_model_in_training_mode_is_told_and_images_are_a_path(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of(**SMALL).train()
    AttentionVisualizer(model=model, images=tmp_path)
    assert "call its train() before you train it on" in caplog.text
    with pytest.raises(UserError, match="images= is a Tensor: give the path of a folder or a file"):
        AttentionVisualizer(model=model.eval(), images=torch.rand(3, 3, 8, 8))  # type: ignore[arg-type]


def test_what_is_captured_prints_no_numbers() -> None:
    model = model_of(**SMALL)
    with torch.no_grad(), capture(model) as attention:
        model(torch.rand(1, 1, 28, 28))
    assert re.fullmatch(
        r"CapturedAttention\(\d+ layers x \d+ heads, reconstruction error \d\.\de-\d\d\)", repr(attention)
    )
    assert "tensor" not in repr(attention[0]) and "weights [1 x " in repr(attention[0])
    assert str(attention[0].geometry) in repr(attention[0])


# --- model files ---


def test_a_missing_model_is_a_loud_warning_and_every_figure_says_random(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All chapters say it on their figures; the command's tests have them all."""
    monkeypatch.setattr("attention_visualizer.visualizer.CHAPTERS", ("patterns", "statistics"))
    visualizer = AttentionVisualizer("nowhere/best_model.pth")
    with pytest.warns(UserWarning, match=r"nowhere/best_model\.pth does not exist.*RANDOM WEIGHTS"):
        model = visualizer.load_optimal_model()
    assert any("RANDOM WEIGHTS" in record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert sum(parameter.numel() for parameter in model.parameters()) == 805_130
    samples = visualizer.get_test_samples(num_samples=2)
    image, label = samples[0]
    drawn = [
        visualizer.visualize_attention_patterns(image, label, 0),
        visualizer.analyze_attention_heads(image, label, 0),
        visualizer.create_layer_comparison(image, label, 0),
        visualizer.create_attention_statistics(samples)[0],
    ]
    for figure in drawn:
        assert any(RANDOM in text for text in texts(figure)), texts(figure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        report = visualizer.run_comprehensive_analysis("nowhere/best_model.pth")
    assert RANDOM in report.read_text()
    numbers = json.loads((tmp_path / "attention_analysis/attention_statistics.json").read_text())
    assert any(RANDOM in warning for warning in numbers["warnings"])


def test_random_weights_are_the_same_every_time_and_draw_nothing_from_the_global_generator() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    weights = []
    for _ in range(2):
        with pytest.warns(UserWarning, match="RANDOM"):
            weights.append(AttentionVisualizer("nowhere.pth").load_optimal_model().state_dict())
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.parametrize("kind", ["ckpt", "pth", "bare", "safetensors", "bare safetensors"])
def test_every_kind_of_model_file(kind: str) -> None:
    model = model_of(**({} if "bare" in kind else SMALL))
    if kind == "ckpt":
        data = ImageDataModule(name="digits")
        data.load()
        block = block_for(ViTConfig(**model.config), data.description, data_dir=None, split_seed=0, seed=0)
        weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save({"state_dict": weights, "epoch": 0, "global_step": 7, CHECKPOINT_KEY: block}, "model.ckpt")
    elif kind == "pth":
        save_pth("model.pth", model)
    elif kind == "bare":
        torch.save(model.state_dict(), "model.pth")
    else:
        metadata = {} if "bare" in kind else {"config": json.dumps(model.config)}
        save_file(dict(model.state_dict()), "model.safetensors", metadata)
    (path,) = Path().glob("model.*")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        visualizer = AttentionVisualizer(str(path), num_heads=4 if "bare" in kind else None)
        loaded = visualizer.load_optimal_model()
    assert not loaded.training and loaded.config == model.config
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    ((image, label), *_) = visualizer.get_test_samples(1)
    assert not any(RANDOM in text for text in texts(visualizer.analyze_attention_heads(image, label, 0)))


def test_a_file_that_is_no_model_is_refused_and_not_replaced_by_random_weights(tmp_path: Path) -> None:
    Path("model.pth").write_text("no model")
    with pytest.raises(UserError, match=r"model\.pth"):
        AttentionVisualizer("model.pth").load_optimal_model()
    assert os.listdir(tmp_path) == ["model.pth"]


def test_the_output_folder_can_be_chosen(tmp_path: Path) -> None:
    visualizer = AttentionVisualizer(small_model(), output_dir=tmp_path / "my figures")
    ((image, label), *_) = visualizer.get_test_samples(1)
    visualizer.analyze_attention_heads(image, label, 0)
    assert_pictures(tmp_path / "my figures", {"attention_heads_sample_0.png"})
    assert not (tmp_path / "attention_analysis").exists()


def test_an_output_folder_that_cannot_be_made_is_a_users_error(tmp_path: Path) -> None:
    Path("taken").write_text("a file")
    visualizer = AttentionVisualizer(small_model(), output_dir="taken")
    with pytest.raises(UserError, match="taken"):
        visualizer.run_comprehensive_analysis()


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
