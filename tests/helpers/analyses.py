"""Runs to analyse, the analyse command within the test's process, and what it wrote."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt
from PIL import Image

from attention_visualizer.data.datamodule import ImageDataModule
from attention_visualizer.data.images import normalise
from attention_visualizer.data.mnist import MnistUnavailable
from attention_visualizer.files.atomic import write_json
from attention_visualizer.measures.attention_rows import of_one_layout
from attention_visualizer.measures.observation import RowOptions, observe
from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.models.vit_config import ViTConfig
from attention_visualizer.runs.checkpoint import CHECKPOINT_KEY, block_for
from attention_visualizer.runs.folders import RunFolder
from attention_visualizer.runs.history import MAX_ROW_BYTES, AttentionHistory
from tests.helpers.runs import ENVIRONMENT, Outcome, run_script

LAYERS, HEADS = 3, 2
SIZES: dict[str, Any] = {"embed_dim": 22, "num_heads": HEADS, "num_layers": LAYERS, "mlp_dim": 29}
FRAMES = 5
REPORTS = {"attention_analysis_report.md", "attention_analysis_report.html"}
NOT_MNIST = "data: scikit-learn digits (not MNIST)"
SAMPLE_FIGURES = ("attention_pattern", "attention_heads", "layer_comparison", "attention_methods")
STATISTICS_FIGURES = ("attention_statistics", "attention_statistics_by_head", "attention_statistics_by_class")
FINDINGS_FIGURES = (
    "attention_atlas",
    "attention_atlas_rollout",
    "attention_atlas_differences",
    "attention_roles",
    "attention_redundancy",
    "attention_interventions",
    "attention_importance",
    "attention_trust",
    "attention_claims",
)


# --- runs to analyse ---


def random_model(seed: int = 0, **config: Any) -> VisionTransformer:
    """Weights large enough for attention to be far from uniform, so that no two layers or heads are alike."""
    model = VisionTransformer(**SIZES | config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.35)
    return model


def content_of(model: VisionTransformer, digits: ImageDataModule, accuracy: float | None = 0.75) -> dict[str, Any]:
    """What training writes, as far as it matters here."""
    block = block_for(ViTConfig(**model.config), digits.description, data_dir=None, split_seed=0, seed=0)
    return {
        "state_dict": {f"model.{name}": tensor for name, tensor in model.state_dict().items()},
        "epoch": 2,
        "global_step": 17,
        CHECKPOINT_KEY: block | {"validation_accuracy": accuracy},
    }


def history_of(model: VisionTransformer, digits: ImageDataModule) -> AttentionHistory:
    """As AttentionLogger keeps it, of a model that changes a little from frame to frame."""
    images = digits.splits["validation"][0][:3]
    history = AttentionHistory()
    for number in range(FRAMES):
        earlier = random_model(num_layers=model.config["num_layers"], pooling=model.config["pooling"])
        with torch.no_grad():
            for parameter in earlier.parameters():
                parameter.mul_(0.5 + 0.1 * number)
        seen = observe(earlier, normalise(images, digits.description), rows=RowOptions(MAX_ROW_BYTES))
        entry = {
            "step": np.array(0 if number == 0 else 2**number),
            "epoch": np.array(number / 3),
            "entropy": seen.entropy.mean(axis=0),
            "distance": seen.distance.mean(axis=0),
        }
        probes = {
            "maps": seen.head_maps.mean(axis=2),
            "rollout": seen.rollouts[:, -1],
            "predicted": seen.predicted,
            "probability": seen.probability,
        }
        history.add_frame(entry | probes, of_one_layout(seen.rows))
        if number > 2:
            history.validations.append(entry | {"images": np.array(200)})
    history.probe = {
        "images": images.permute(0, 2, 3, 1).numpy(),
        "labels": digits.splits["validation"][1][:3].numpy(),
        "class_names": np.array(digits.description.class_names),
        "data": np.array(digits.description.watermark),
        "num_keys": np.array(seen.num_keys),
        "query": np.array(str(seen.query)),
    }
    return history


@dataclass(frozen=True)
class Workplace:
    """A folder to work in, with runs/."""

    path: Path
    digits: ImageDataModule

    def add_run(
        self,
        name: str,
        model: VisionTransformer,
        accuracy: float = 0.75,
        files: tuple[str, ...] = ("best.ckpt", "last.ckpt"),
        with_history: bool = False,
        status: str = "completed",
    ) -> RunFolder:
        run = RunFolder(self.path / "runs" / name)
        run.checkpoints.mkdir(parents=True)
        for file in files:
            torch.save(content_of(model, self.digits, accuracy), run.checkpoints / file)
        facts = {"metrics": {"validation_accuracy": accuracy}, "data": self.digits.description.to_dict()}
        write_json(run.manifest_path, {"status": status} | facts)
        if with_history:
            history_of(model, self.digits).save(run.history_path)
        return run


def analyze(*arguments: str, folder: Path) -> Outcome:
    """`python analyze.py ...` in `folder`, within this process and its environment."""
    return run_script("analyze.py", *arguments, folder=folder, environment=ENVIRONMENT)


def succeed(*arguments: str, folder: Path) -> Outcome:
    outcome = analyze(*arguments, folder=folder)
    assert outcome.exit_code == 0, outcome.err
    return outcome


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def embedded_figures(report: str) -> list[str]:
    """Also those that Markdown can only link."""
    tokens = MarkdownIt("commonmark").parse(report)
    children = [child for token in tokens for child in token.children or []]
    addresses = [str(child.attrs.get("src", child.attrs.get("href", ""))) for child in children]
    return [each for each in addresses if each.endswith((".png", ".webp", ".gif", ".mp4", ".svg", ".pdf"))]


def read_report(output: Path) -> str:
    return (output / "attention_analysis_report.md").read_text(encoding="utf-8")


def read_statistics(output: Path) -> dict[str, Any]:
    return json.loads((output / "attention_statistics.json").read_text(encoding="utf-8"))


def read_records(output: Path) -> dict[tuple[str, int, int], dict[str, str]]:
    with (output / "attention_statistics.csv").open(newline="") as file:
        return {(row["measure"], int(row["layer"]), int(row["head"])): row for row in csv.DictReader(file)}


def num_frames(animation: Image.Image) -> int:
    return getattr(animation, "n_frames", 1)


def svg_text(path: Path) -> str:
    return " ".join(text.strip() for text in ElementTree.parse(path).getroot().itertext() if text.strip())


@dataclass(frozen=True)
class Analysis:
    run: RunFolder
    output: Path
    outcome: Outcome


def contains(picture: np.ndarray, part: np.ndarray) -> bool:
    """Whether `part` lies somewhere in `picture`, pixel by pixel."""
    distance = cv2.matchTemplate(picture, part, cv2.TM_SQDIFF)
    return bool(distance.min() <= 1e-6 * part.size * 255**2)


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_refused(folder: Path, *arguments: str, said: str) -> None:
    """One line on stderr, exit code not 0, nothing written."""
    before = listing(folder)
    outcome = analyze(*arguments, folder=folder)
    assert outcome.exit_code != 0
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), outcome.err
    assert said in lines[0]
    assert "Traceback" not in outcome.out and "Report" not in outcome.out
    assert listing(folder) == before


def without_mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with neither MNIST nor a network."""

    def refuse(_: Path) -> dict[str, np.ndarray]:
        raise MnistUnavailable("there is no network in this test")

    monkeypatch.setattr("attention_visualizer.data.datasets.load_mnist", refuse)
