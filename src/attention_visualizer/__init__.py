"""See what a Vision Transformer attends to, while it trains and afterwards."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from attention_visualizer.capture import CaptureError, capture, intervene
from attention_visualizer.errors import UserError
from attention_visualizer.geometry import Geometry
from attention_visualizer.model import VisionTransformer

if TYPE_CHECKING:
    from attention_visualizer.callbacks import AttentionLogger
    from attention_visualizer.visualizer import AttentionVisualizer

__all__ = [
    "AttentionLogger",
    "AttentionVisualizer",
    "CaptureError",
    "Geometry",
    "UserError",
    "VisionTransformer",
    "capture",
    "intervene",
]

# Imported when first used: capturing needs neither Lightning nor matplotlib, which take seconds.
_LATER = {"AttentionLogger": "callbacks", "AttentionVisualizer": "visualizer"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
