"""See what a Vision Transformer attends to, while it trains and afterwards."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attention_visualizer.attention.capture import CaptureError, capture, intervene
    from attention_visualizer.attention.geometry import Geometry
    from attention_visualizer.models.vision_transformer import VisionTransformer
    from attention_visualizer.support.errors import UserError
    from attention_visualizer.training.tensorboard import TensorBoardLogger
    from attention_visualizer.visualizer import AttentionVisualizer
    from attention_visualizer.watching.attention_logger import AttentionLogger

__all__ = [
    "AttentionLogger",
    "AttentionVisualizer",
    "CaptureError",
    "Geometry",
    "TensorBoardLogger",
    "UserError",
    "VisionTransformer",
    "capture",
    "intervene",
]

# Imported when first used: a command's --help needs no torch, capturing neither Lightning nor matplotlib.
_MODULES = {
    "AttentionLogger": "watching.attention_logger",
    "AttentionVisualizer": "visualizer",
    "CaptureError": "attention.capture",
    "Geometry": "attention.geometry",
    "TensorBoardLogger": "training.tensorboard",
    "UserError": "support.errors",
    "VisionTransformer": "models.vision_transformer",
    "capture": "attention.capture",
    "intervene": "attention.capture",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    except ModuleNotFoundError as error:
        from attention_visualizer.support.extras import missing_package

        raise ImportError(
            str(missing_package(name, error, "report" if name == "AttentionVisualizer" else "train"))
        ) from error
    return value


def __dir__() -> list[str]:
    """For completion in a shell or notebook: what is imported when first used, too."""
    return sorted({*globals(), *_MODULES})
