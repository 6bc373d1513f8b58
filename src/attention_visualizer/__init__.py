"""See what a Vision Transformer attends to, while it trains and afterwards."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attention_visualizer.callbacks import AttentionLogger
    from attention_visualizer.capture import CaptureError, capture, intervene
    from attention_visualizer.errors import UserError
    from attention_visualizer.geometry import Geometry
    from attention_visualizer.model import VisionTransformer
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

# Imported when first used: a command's --help needs no torch, capturing neither Lightning nor matplotlib.
_MODULES = {
    "AttentionLogger": "callbacks",
    "AttentionVisualizer": "visualizer",
    "CaptureError": "capture",
    "Geometry": "geometry",
    "UserError": "errors",
    "VisionTransformer": "model",
    "capture": "capture",
    "intervene": "capture",
}


class _FrontDoor(ModuleType):
    """Python puts each imported module into its package, where `capture` shall always be the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{self.__name__}.{_MODULES[name]}"), name)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        """For completion in a shell or notebook: what is imported when first used, too."""
        return sorted({*super().__dir__(), *_MODULES})


sys.modules[__name__].__class__ = _FrontDoor
