"""Write `field=value` as it is typed on the command line."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException


def override(name: str, value: str | Path) -> str:
    """Write `name=value`, in quotes where Hydra would otherwise not take the value for just this text."""
    with suppress(HydraException):
        if OverridesParser.create().parse_override(plain := f"{name}={value}").value() == str(value):
            return plain
    return f"{name}={QuotedString(text=str(value), quote=Quote.single).with_quotes()}"
