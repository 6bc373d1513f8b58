"""Put back what objects keep when code of theirs has run: attributes, containers, generators, iterators, tensors.

Tensors are copied when something is about to change them in place, and only then: a look at a model does not hold its
weights twice.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import operator
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attention_visualizer.attention.torch_internals import TorchDispatchMode

MAX_DEPTH = 8  # of objects in objects
MAX_PARTS = 1000  # of more, such as the files of a data set, the container is restored, and not what is in each
MAX_COPIED = 2**20  # bytes of a NumPy array
SERVICES = ("wandb", "mlflow", "comet_ml", "neptune", "clearml", "swanlab", "aim", "tensorboard", "tensorboardX", "ray")
#: Objects of these packages are nobody's own state (a trainer, an optimizer, a thread of a logging service), but for
#: those of the modules OWN.
FOREIGN = {"torch", "lightning", "pytorch_lightning", "lightning_fabric", *SERVICES, *sys.stdlib_module_names}
OWN = ("torch.utils.data", "queue", "types")
PLAIN = (str, bytes, int, float, complex, bool, type(None), type, types.ModuleType, torch.dtype, torch.device)
FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinMethodType, functools.partial)

Restore = Callable[[], Any]


@contextmanager
def kept_state(*values: Any) -> Iterator[None]:
    """Bring all that `values` keep, and the random state of PyTorch, NumPy and Python, back to what it was at the end.

    Modules are walked with all their parts, functions with the variables that they captured or name.
    """
    with ExitStack() as stack:
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        stack.enter_context(torch.random.fork_rng(devices=list(devices)))
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        walk = StateWalk()
        for restore in [restore for value in values for restore in walk.of(value)]:
            stack.callback(restore)
        stack.enter_context(CopyOnWrite(walk.tensors))
        yield


class StateWalk:
    """One walk through objects: each is visited once."""

    def __init__(self) -> None:
        self.seen: dict[int, Any] = {}  # with the objects, whose ids are theirs alone as long as they live
        self.tensors: list[Tensor] = []
        self.read_ahead: dict[int, tuple[Any, Any]] = {}

    def of(self, value: Any, depth: int = MAX_DEPTH) -> Iterator[Restore]:
        """Yield what brings `value`, which is changed in place, back to its present state."""
        if isinstance(value, PLAIN) or id(value) in self.seen or not depth:
            return
        self.seen[id(value)] = value
        if isinstance(value, Tensor):
            self.tensors.append(value)
        elif isinstance(value, nn.Module):
            for module in value.modules():
                self.seen[id(module)] = module
                yield from self._attributes(module, vars(module), MAX_DEPTH)
                if not is_foreign(module):
                    yield from self.of(type(module).forward, 2)
        elif isinstance(value, torch.Generator):
            yield functools.partial(value.set_state, value.get_state())
        elif isinstance(value, np.random.Generator):
            yield functools.partial(setattr, value.bit_generator, "state", copy.deepcopy(value.bit_generator.state))
        elif isinstance(value, np.random.RandomState):
            yield functools.partial(value.set_state, value.get_state())
        elif isinstance(value, random.Random):
            yield functools.partial(value.setstate, value.getstate())
        elif isinstance(value, np.ndarray):
            if value.nbytes <= MAX_COPIED and value.flags.writeable:
                yield functools.partial(np.copyto, value, value.copy())
        elif isinstance(value, (list, dict, set, deque, tuple)):
            if not isinstance(value, tuple):
                yield functools.partial(_refill, value, self._content(value))
            yield from self._parts(value.values() if isinstance(value, dict) else value, depth)
        elif isinstance(value, FUNCTIONS):
            yield from self._function(value, depth)
        elif not is_foreign(value):
            if isinstance(names := getattr(value, "__dict__", None), dict):
                yield from self._attributes(value, names, depth)
            for name in slots_of(value):
                yield functools.partial(object.__setattr__, value, name, getattr(value, name))
                yield from self.of(getattr(value, name), depth - 1)

    def _parts(self, parts: Any, depth: int) -> Iterator[Restore]:
        if len(parts) <= MAX_PARTS:
            for part in list(parts):
                yield from self.of(part, depth - 1)

    def _attributes(self, owner: Any, names: dict[str, Any], depth: int) -> Iterator[Restore]:
        """Yield what brings back each attribute, and then that the owner has just these."""
        before = self._content(names)
        yield functools.partial(_refill, names, before)
        for name, value in before.items():
            if name == "_modules" and isinstance(owner, nn.Module):
                if isinstance(value, dict):  # unlike that of a TorchScript module
                    yield functools.partial(_refill, value, dict(value))
            else:
                yield from self.of(value, depth - 1)

    def _content(self, container: Any) -> Any:
        """Return a copy of what a container has, in which iterators will not have moved."""
        before = dict(container) if isinstance(container, dict) else list(container)
        if isinstance(container, list | dict) and len(container) <= MAX_PARTS:
            for key in container if isinstance(container, dict) else range(len(container)):
                if is_iterator(container[key]):
                    before[key], container[key] = self._iterator(container[key])
        return before

    def _iterator(self, value: Any) -> tuple[Any, Any]:
        """Return an iterator for afterwards, which gives what was read meanwhile once more, and one for now.

        Anything else is returned as it is.
        """
        if not is_iterator(value):
            return value, value
        if id(value) not in self.read_ahead:
            self.seen[id(value)] = value
            later, now = itertools.tee(value)
            self.read_ahead[id(value)] = later, now
        return self.read_ahead[id(value)]

    def _function(self, function: Any, depth: int) -> Iterator[Restore]:
        """Yield what brings back the variables of a function: captured, global, its arguments and its object."""
        if isinstance(function, functools.partial):
            yield from self._parts([function.func, *function.args, *function.keywords.values()], depth)
            return
        if not isinstance(function, types.FunctionType):
            yield from self._parts([function.__self__, getattr(function, "__func__", None)], depth)
            return
        yield from self._attributes(function, vars(function), depth)
        for cell in function.__closure__ or ():
            with suppress(ValueError):  # an empty one
                before, cell.cell_contents = self._iterator(cell.cell_contents)
                yield functools.partial(setattr, cell, "cell_contents", before)
                yield from self.of(cell.cell_contents, depth - 1)
        for name in function.__code__.co_names:
            if name in function.__globals__ and not callable(value := function.__globals__[name]):
                before, function.__globals__[name] = self._iterator(value)
                yield functools.partial(function.__globals__.__setitem__, name, before)
                yield from self.of(value, depth - 1)


def is_foreign(value: Any) -> bool:
    """Whether an object's class belongs to PyTorch, Lightning or Python: loaders, samplers, queues aside."""
    module = type(value).__module__
    return module.partition(".")[0] in FOREIGN and not module.startswith(OWN)


def is_iterator(value: Any) -> bool:
    """Whether it is an iterator of Python's own, whose place can be kept by reading ahead alone."""
    return hasattr(value, "__next__") and type(value).__module__ in ("builtins", "itertools")


def slots_of(value: Any) -> list[str]:
    slots = (getattr(kind, "__slots__", ()) for kind in type(value).__mro__)
    names = itertools.chain.from_iterable((each,) if isinstance(each, str) else each for each in slots)
    return [name for name in names if name not in ("__dict__", "__weakref__") and hasattr(value, name)]


def _refill(container: Any, content: Any) -> None:
    if _is_same(container, content):
        return  # and somebody's own class may not like to be written
    container.clear()
    container.extend(content) if isinstance(container, list | deque) else container.update(content)


def _is_same(one: Any, other: Any) -> bool:
    """Whether two containers hold the same objects."""
    if isinstance(one, dict):
        return list(one) == list(other) and all(map(operator.is_, one.values(), other.values()))
    if isinstance(one, set):
        return bool(one == set(other))
    return len(one) == len(other) and all(map(operator.is_, one, other))


class CopyOnWrite(TorchDispatchMode):
    """Keep a copy of each of these tensors that is about to be changed in place; at the end, all are as they were.

    Changes through `tensor.data` are seen as well, since it is the memory that counts.
    """

    supports_higher_order_operators = True

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.before: list[tuple[Tensor, Tensor, Tensor | None, bool]] = []
        self.memory: dict[int, Any] = {}  # address -> storage
        self.copies: list[tuple[Any, Any]] = []  # storage, its content
        for tensor in tensors:
            if (storage := storage_of(tensor)) is not None:
                self.memory[storage.data_ptr()] = storage
                with torch.inference_mode(False):
                    self.before.append((tensor, tensor.detach(), gradient_of(tensor), tensor.requires_grad))

    def __torch_dispatch__(
        self, function: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        schema = getattr(function, "_schema", None)
        if schema is not None and (schema.is_mutable or "batch_norm" in schema.name):  # which does not declare it
            given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
            for argument in schema.arguments:
                if not schema.is_mutable or (argument.alias_info is not None and argument.alias_info.is_write):
                    self._keep(given.get(argument.name))
        return function(*args, **kwargs)

    def _keep(self, value: Any) -> None:
        for tensor in value if isinstance(value, list | tuple) else [value]:
            storage = storage_of(tensor) if isinstance(tensor, Tensor) else None
            kept = None if storage is None else self.memory.pop(storage.data_ptr(), None)
            if kept is not None:
                self.copies.append((kept, kept.clone()))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for storage, content in self.copies:
            if storage.nbytes() != content.nbytes():
                storage.resize_(content.nbytes())
            storage.copy_(content)
        for tensor, before, gradient, requires_gradient in self.before:
            if layout_of(tensor) != layout_of(before):
                tensor.data = before
            if tensor.is_leaf and tensor.requires_grad != requires_gradient:
                tensor.requires_grad_(requires_gradient)
            if gradient_of(tensor) is not gradient:
                tensor.grad = gradient


# PyTorch wraps it to hide it from torch.compile, which costs each operation as much again, and the first one the import
# of the compiler: seconds.
setattr(CopyOnWrite, "__torch_dispatch__", inspect.unwrap(CopyOnWrite.__torch_dispatch__))  # noqa: B010


def storage_of(tensor: Tensor) -> Any:
    """Return the memory of a tensor; None where it has none of its own: meta, sparse, uninitialised, a wrapper."""
    try:
        storage = tensor.untyped_storage()
        return storage if storage.data_ptr() and not tensor.is_nested else None
    except (RuntimeError, NotImplementedError, ValueError):
        return None


def gradient_of(tensor: Tensor) -> Tensor | None:
    return tensor.grad if tensor.is_leaf else None


def layout_of(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()
