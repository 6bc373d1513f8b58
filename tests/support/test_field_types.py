"""Values against type hints and bounds, and the words that ask for another one."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import pytest

from attention_visualizer.support.errors import UserError
from attention_visualizer.support.field_types import SHARE, at_least, at_most, between, check_arguments, fits, remedy

WORD_OR_PAIR = Literal["cls"] | tuple[int, int] | None


@pytest.mark.parametrize(
    ("hint", "right", "wrong"),
    [
        (int, [3, -3], [3.0, True, "3", None]),
        (float, [3, 0.5, math.nan], [True, "3", None]),
        (bool, [True, False], [0, 1, "true"]),
        (str | None, ["", None], [0, []]),
        (list[int], [[], [1]], [["a"], [True], 1, (1,)]),
        (dict[str, int], [{}, {"a": 1}], [{"a": "b"}, []]),
        (WORD_OR_PAIR, ["cls", [1, 2], None], ["patches", [1], [1, 2, 3], ["a", 2], True]),
        (Annotated[int | None, at_least(1)], [1, None], [0, 1.5]),
        (Annotated[float, between("pixels", 0, 28)], [0, 28, 0.5], [-1e-9, 29, math.nan, "1"]),
        (Annotated[float, SHARE], [0, 0.99], [1, -0.1, math.nan]),
        (Literal["all"] | Annotated[int, at_least(2)], ["all", 2], [1, "none"]),
        (Any, [None, 1, "a"], []),
    ],
)
def test_what_fits(hint: Any, right: list[Any], wrong: list[Any]) -> None:
    assert all(fits(value, hint) for value in right)
    assert not any(fits(value, hint) for value in wrong)


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int | None, "give a whole number or null"),
        (Literal["a", "b"], "give a or b"),
        (list[int] | dict[str, int], "give a list or a dictionary"),
        (Annotated[int | None, at_least(1)], "give a whole number of at least 1"),
        (Annotated[float, between("a share", 0, 0.9)], "give a share from 0 to 0.9"),
        (Annotated[list[int], "give rows, such as [1,2]"], "give rows, such as [1,2]"),
    ],
)
def test_what_is_asked_for(hint: Any, words: str) -> None:
    assert remedy(hint, "x") == words


@pytest.mark.parametrize(("value", "words"), [(0, "give a whole number of at least 1"), (10, "give at most 9")])
def test_the_violated_bound_is_asked_for(value: int, words: str) -> None:
    assert remedy(Annotated[int, at_least(1), at_most(9)], value) == words


def test_arguments_are_checked_against_the_signature() -> None:
    def resize(size: Annotated[int, at_least(1)], mode: Literal["nearest", "linear"] = "nearest") -> None:
        check_arguments("image", resize_hints, locals())

    resize_hints = resize
    resize(3)
    with pytest.raises(UserError, match="^image.size=0: give a whole number of at least 1$"):
        resize(0)
    with pytest.raises(UserError, match="^image.mode='cubic': give nearest or linear$"):
        resize(1, "cubic")  # type: ignore[arg-type]
