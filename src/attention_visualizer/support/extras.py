"""What to install where an optional package is missing."""

from __future__ import annotations

from attention_visualizer.support.errors import UserError


def missing_package(what: str, error: ModuleNotFoundError, extra: str) -> UserError:
    """Return the error that says which extra of this package brings the module that `what` could not import.

    Raise `error` itself where a module of this package is missing: that is no matter of installing.
    """
    package = (error.name or "").partition(".")[0]
    if package in ("", "attention_visualizer"):
        raise error
    return UserError(f"{what} needs {package}: python -m pip install 'attention-visualizer[{extra}]'")
