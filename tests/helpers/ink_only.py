"""Attention that is a function of the ink alone, and the ink of real digits, whose classes differ in it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from attention_visualizer.data.datamodule import ImageDataModule
from attention_visualizer.data.ink import ink_amount
from attention_visualizer.measures.ink_regression import main_components, softmax

PATCHES = 16


def ink_of_digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the 1,297 training digits: amount [image, patch], components of the pixels, labels."""
    data = ImageDataModule(name="digits", fallback=None)
    data.load()
    images, labels = data.splits["train"]
    pixels = images[:, 0, ::3, ::3].flatten(1).numpy() / np.float32(255)
    return ink_amount(images, (4, 4)).numpy(), main_components(pixels, 30), labels.numpy()


def brightest(amount: np.ndarray) -> np.ndarray:
    return np.eye(PATCHES)[amount.argmax(axis=1)]


def of_strength(strength: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda amount: softmax(strength * amount)


def with_place(amount: np.ndarray) -> np.ndarray:
    """Not among the regressors: each place has a weight and a strength of its own."""
    generator = np.random.default_rng(3)
    return softmax(generator.uniform(2, 14, PATCHES) * amount + generator.standard_normal(PATCHES))


INK_ONLY = {
    "brightest": brightest,
    "softmax 2": of_strength(2),
    "softmax 14": of_strength(14),
    "softmax 30": of_strength(30),
    "softmax of weights and places": with_place,
}
