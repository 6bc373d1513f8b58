"""Studies of small models on digits."""

from __future__ import annotations

from pathlib import Path

from attention_visualizer.analysis.study.budget import Budget
from attention_visualizer.analysis.study.output import Output
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.analysis.study.target import Target
from attention_visualizer.data.datamodule import ImageDataModule
from attention_visualizer.data.image_sets import LabelledImageSet
from attention_visualizer.models.vision_transformer import VisionTransformer


def first_digits(count: int) -> LabelledImageSet:
    """The first test images of scikit-learn's digits, with their classes."""
    data = ImageDataModule(name="digits", fallback=None)
    data.load()
    images, labels = data.splits["test"]
    return LabelledImageSet(data.description, images[:count], labels[:count])


def study_of(
    model: VisionTransformer,
    images: LabelledImageSet,
    folder: Path,
    num_images: int,
    controls: int,
    max_cost: float | None = None,
) -> Study:
    return Study(Target(model.eval(), images), Output(folder), "weights", budget=Budget(num_images, controls, max_cost))
