"""Check values of fields, from a config or a caller, against type hints, without torch: commands begin quickly.

`Annotated[int, at_least(1)]` adds a bound to a type, and `Annotated[..., "give ..."]` the words that ask for it.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from attention_visualizer.support.errors import UserError

PLAIN_TYPES: dict[Any, str] = {
    type(None): "null",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a dictionary",
}


@dataclass(frozen=True)
class Bound:
    """A condition on values of a type, for `Annotated`, and its words after "give"."""

    holds: Callable[[Any], bool]
    words: str


def at_least(least: int) -> Bound:
    return Bound(lambda value: value is None or value >= least, f"a whole number of at least {least}")


def at_most(most: int) -> Bound:
    return Bound(lambda value: value <= most, f"at most {most}")


def between(unit: str, least: float, most: float) -> Bound:
    """Return the bound of a range with both ends, in `unit`, such as "pixels". NaN is outside."""
    return Bound(lambda value: least <= value <= most, f"{unit} from {least:g} to {most:g}")


SHARE = Bound(lambda value: 0 <= value < 1, "a share from 0 up to, but not, 1")


def check_arguments(group: str, function: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Raise UserError for an argument that is not of the type, or not within the bounds, that `function` declares.

    values: by name, such as the function's `locals()`. group: what the message puts before the name.
    """
    hints = get_type_hints(function, include_extras=True)
    check_fields(group, {name: values[name] for name in hints if name in values}, hints)


def check_fields(group: str, values: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Raise UserError for the first of `values` that does not fit its hint."""
    for name, value in values.items():
        if not fits(value, hints.get(name, Any)):
            raise UserError(f"{group}.{name}={value!r}: {remedy(hints[name], value)}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value that is made of plain types is of type `hint`; lists stand for tuples, integers for floats."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Annotated:
        return fits(value, inner[0]) and all(each.holds(value) for each in inner[1:] if isinstance(each, Bound))
    if origin in (Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in inner)
    if origin is tuple and Ellipsis not in inner:
        return isinstance(value, list) and len(value) == len(inner) and all(map(fits, value, inner))
    if origin in (list, tuple):
        return isinstance(value, list) and all(fits(each, inner[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(each, inner[1]) for each in value.values())
    if isinstance(value, bool):
        return hint is bool
    kinds = (int, float) if hint is float else hint
    return isinstance(value, kinds) if inspect.isclass(hint) else True


def remedy(hint: Any, value: Any) -> str:
    """Say what to give for a field of type `hint` instead of `value`: within the first bound that it violates."""
    kind, *conditions = get_args(hint) if get_origin(hint) is Annotated else [hint]
    words = [each for each in conditions if isinstance(each, str)]
    if words:
        return words[0]
    if fits(value, kind):
        return f"give {next(each.words for each in conditions if not each.holds(value))}"
    return f"give {in_words(hint)}"


def in_words(hint: Any) -> str:
    """Name the plain types of `hint`, as one would ask for them."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return inner[1].words
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(words for each in inner if (words := in_words(each))))
    if origin is Literal:
        return " or ".join(str(each) for each in inner)
    return PLAIN_TYPES.get(origin or hint, "")
