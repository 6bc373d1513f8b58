"""One call of a function of PyTorch, with its arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(slots=True)
class FunctionCall:
    """A function of PyTorch and the arguments that a model calls it with."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self) -> Any:
        return self.function(*self.args, **self.kwargs)

    def tensors(self) -> Iterator[Tensor]:
        """Yield the tensors among the arguments, and in lists, tuples and dictionaries among them."""
        return tensors_of((*self.args, *self.kwargs.values()))

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return the argument that stands at `position` or is given by `name`."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def with_argument(self, position: int, name: str, value: Any) -> FunctionCall:
        """Return the same call with `value` for that argument."""
        if len(self.args) > position:
            args = (*self.args[:position], value, *self.args[position + 1 :])
            return FunctionCall(self.function, args, self.kwargs)
        return FunctionCall(self.function, self.args, {**self.kwargs, name: value})

    def replaced(self, old: Tensor, new: Any) -> FunctionCall:
        """Return the same call with `new` in place of `old`, also inside lists, tuples and dictionaries."""
        return FunctionCall(self.function, _replaced(self.args, old, new), _replaced(self.kwargs, old, new))


def tensors_of(arguments: Any) -> Iterator[Tensor]:
    """Yield the tensors in an iterable, and in lists, tuples and dictionaries inside it."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, tuple | list):
            yield from tensors_of(argument)
        elif isinstance(argument, dict):
            yield from tensors_of(argument.values())


def _replaced(arguments: Any, old: Tensor, new: Any) -> Any:
    if isinstance(arguments, dict):
        return {name: _replaced(value, old, new) for name, value in arguments.items()}
    if isinstance(arguments, tuple | list):
        return type(arguments)(_replaced(value, old, new) for value in arguments)
    return new if arguments is old else arguments
