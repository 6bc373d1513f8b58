"""Whatever objects keep is put back: what a forward, a mode, a hook or a data set may change while it is looked at."""

from __future__ import annotations

import functools
import itertools
import queue
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_visualizer.attention.kept_state import kept_state
from attention_visualizer.attention.undisturbed import undisturbed
from tests.helpers.models import Merging

SEEN: list[int] = []
TOTAL = 0


@dataclass
class Bank:
    rows: list[Tensor] = field(default_factory=list)
    size: int = 0
    extra: Any = None


class Slots:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Remembers(nn.Linear):
    """Does something each time; `tell` returns what a second run would show of the first."""

    def __init__(self, change: Callable[[Remembers], Any], **attributes: Any) -> None:
        super().__init__(3, 3)
        self.change = staticmethod(change).__func__
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, inputs: Tensor) -> Tensor:
        changed = self.change(self)
        return super().forward(inputs) + (0 if changed is None else changed)


def counts_globally(self: Any) -> int:
    global TOTAL
    TOTAL += 1
    SEEN.append(1)
    return TOTAL + len(SEEN)


class CountsGlobally(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        global TOTAL
        TOTAL += 1
        SEEN.append(1)
        return super().forward(inputs) + TOTAL + len(SEEN)


def closure() -> Remembers:
    count, rows = 0, [1]

    def change(self: Any) -> int:
        nonlocal count
        count += 1
        rows.append(1)
        return count + len(rows)

    return Remembers(change)


def once_hooked(kind: str) -> nn.Module:
    model, seen = nn.Sequential(nn.Linear(3, 3)), [0]

    def hook(*given: Any) -> Any:
        seen[0] += 1
        if kind == "register_forward_hook":
            return given[-1] + seen[0]
        return (given[1][0] + seen[0],)

    getattr(model, kind)(hook)
    model.seen = seen  # for the comparison alone
    return model


def generator(self: Any) -> float:
    return next(self.numbers)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "a number": lambda: Remembers(lambda self: setattr(self, "n", self.n + 1) or self.n, n=0),
    "a buffer in place": lambda: Remembers(lambda self: self.mean.add_(1), mean=nn.Buffer(torch.zeros(3))),
    "a buffer through its data": lambda: Remembers(lambda self: self.mean.data.add_(1), mean=nn.Buffer(torch.zeros(3))),
    "a new buffer": lambda: Remembers(lambda self: setattr(self, "m", self.m + 1), m=nn.Buffer(torch.zeros(3))),
    "a tensor that is no buffer": lambda: Remembers(lambda self: self.t.add_(1), t=torch.zeros(3)),
    "a tensor that grows": lambda: Remembers(
        lambda self: self.t.resize_(len(self.t) + 3).fill_(1).sum(), t=torch.ones(3)
    ),
    "a tensor of another shape": lambda: Remembers(lambda self: self.t.unsqueeze_(0).ndim, t=torch.ones(3)),
    "a weight in place": lambda: Remembers(lambda self: self.weight.data.add_(1).sum()),
    "a weight that is replaced": lambda: Remembers(lambda self: setattr(self.weight, "data", self.weight.data + 1)),
    "a weight without gradients": lambda: Remembers(lambda self: torch.no_grad()(self.bias.add_)(1)),
    "a weight of limited norm": lambda: Remembers(
        lambda self: self.words(torch.tensor([0, 1])).sum(), words=nn.Embedding(3, 3, max_norm=0.1)  # of words it met
    ),
    "gradients": lambda: Remembers(torch.enable_grad()(lambda self: (self.bias * 2).sum().backward())),
    "frozen weights": lambda: Remembers(lambda self: self.bias.requires_grad_(not self.bias.requires_grad).sum()),
    "a running mean": lambda: Remembers(lambda self: F.batch_norm(torch.ones(2, 3), self.m, self.v, training=True)[0],
                                        m=nn.Buffer(torch.zeros(3)), v=nn.Buffer(torch.ones(3))),
    "a list": lambda: Remembers(lambda self: self.rows.append(1) or len(self.rows), rows=[]),
    "a dictionary of lists": lambda: Remembers(
        lambda self: self.rows["a"].append(1) or len(self.rows["a"]), rows={"a": [1]}
    ),
    "a counter": lambda: Remembers(lambda self: self.seen.update("a") or self.seen["a"], seen=Counter()),
    "a deque": lambda: Remembers(lambda self: self.rows.append(1) or sum(self.rows), rows=deque([2, 3], maxlen=2)),
    "a queue": lambda: Remembers(lambda self: self.rows.put(1) or self.rows.qsize(), rows=queue.Queue()),
    "an object": lambda: Remembers(lambda self: self.bank.rows.append(self.weight) or len(self.bank.rows), bank=Bank()),
    "objects in objects": lambda: Remembers(
        lambda self: setattr(self.bank.extra, "n", self.bank.extra.n + 1) or self.bank.extra.n,
        bank=Bank(extra=SimpleNamespace(n=0)),
    ),
    "a tensor of an object": lambda: Remembers(lambda self: self.bank.extra.add_(1), bank=Bank(extra=torch.zeros(3))),
    "slots": lambda: Remembers(
        lambda self: setattr(self.own, "count", self.own.count + 1) or self.own.count, own=Slots()
    ),
    "an array": lambda: Remembers(lambda self: self.sums.__iadd__(1).sum(), sums=np.zeros(3)),
    "a generator of PyTorch": lambda: Remembers(
        lambda self: torch.randn(3, generator=self.g), g=torch.Generator().manual_seed(0)
    ),
    "a generator of NumPy": lambda: Remembers(lambda self: self.g.random(), g=np.random.default_rng(0)),
    "an old generator of NumPy": lambda: Remembers(lambda self: self.g.rand(), g=np.random.RandomState(0)),
    "a generator of Python": lambda: Remembers(lambda self: self.g.random(), g=random.Random(0)),
    "an iterator": lambda: Remembers(generator, numbers=iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])),
    "an endless iterator": lambda: Remembers(generator, numbers=itertools.count()),
    "iterators by name": lambda: Remembers(lambda self: next(self.all["one"]), all={"one": itertools.count()}),
    "an iterator with two names": lambda: Remembers(
        lambda self: next(self.one) + 10 * next(self.other), **dict.fromkeys(("one", "other"), itertools.count())
    ),
    "a generator function": lambda: Remembers(generator, numbers=(each for each in range(9))),
    "a partial function": lambda: Remembers(lambda self: self.f(), f=functools.partial(SEEN.append, 1)),
    "a part that is replaced": lambda: Remembers(lambda self: setattr(self, "p", nn.Identity()) or 1, p=nn.ReLU()),
    "captured variables": closure,
    "global variables": CountsGlobally,
    "a hook": lambda: once_hooked("register_forward_hook"),
    "a hook before": lambda: once_hooked("register_forward_pre_hook"),
}  # fmt: skip


def trace(model: nn.Module) -> list[Any]:
    """What the model has, what the next three passes give, and what it then has."""
    parts = [(type(part), sorted(vars(part)), sorted(part._modules)) for part in model.modules()]
    with torch.no_grad():
        outputs = [model(torch.ones(1, 3)).clone() for _ in range(3)]
    kept = [value.clone() for value in model.state_dict().values()]
    flags = [each.requires_grad for each in model.parameters()]
    gradients = [torch.zeros(()) if each.grad is None else each.grad for each in model.parameters()]
    return [*outputs, *kept, *gradients, torch.tensor(flags), torch.tensor(len(SEEN)), parts, torch.rand(2)]


@pytest.mark.parametrize("hooks", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_what_a_forward_changes_is_put_back(name: str, hooks: bool) -> None:
    global TOTAL
    traces = []
    for looks in (0, 2):
        SEEN.clear()
        TOTAL = 0
        torch.manual_seed(5)
        model = MODELS[name]()
        for _ in range(looks):
            with torch.no_grad(), undisturbed(model, hooks=hooks):
                model(torch.ones(1, 3))
                model(torch.ones(2, 3))
        traces.append(trace(model))
    for one, other in zip(*traces, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


def test_passes_do_change_these_models() -> None:
    """Or the tests above could not fail."""
    for name, make in MODELS.items():
        torch.manual_seed(5)
        untouched, passed = make(), make()
        passed.load_state_dict(untouched.state_dict())
        with torch.no_grad():
            passed(torch.ones(1, 3))
        if isinstance(getattr(passed, "words", None), nn.Embedding):
            assert passed.words.weight.norm() < untouched.words.weight.norm()
            continue  # what a second pass does not change
        pairs = zip(trace(untouched)[:-1], trace(passed)[:-1], strict=True)
        assert not all(torch.equal(*pair) if isinstance(pair[0], Tensor) else pair[0] == pair[1] for pair in pairs), (
            name
        )


# --- modes -----------------------------------------------------------------------------------------------------


class Fusing(nn.Module):
    """Has its branches as one in evaluation, in another module."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)

    def train(self, mode: bool = True) -> Fusing:
        if self.training and not mode:
            self.both = nn.Linear(3, 3)
            self.both.weight.data = self.one.weight.data + self.other.weight.data
            self.both.bias.data = self.one.bias.data + self.other.bias.data
        elif mode and hasattr(self, "both"):
            del self.both
        super().train(mode)
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        return self.one(inputs) + self.other(inputs) if self.training else self.both(inputs)


class Frozen(nn.Sequential):
    """Keeps a part in eval mode and its weights fixed."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 3), nn.BatchNorm1d(3))

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self[1].eval()
        self[1].requires_grad_(not mode)
        return self


@pytest.mark.parametrize("make", [lambda: Merging(3, 3), Fusing, Frozen])
def test_a_mode_that_does_more_than_a_flag(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(5)
    model, inputs = nn.Sequential(make()).train(), torch.randn(4, 3)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [(part.training, [each.requires_grad for each in part.parameters()]) for part in model.modules()]
    with torch.no_grad(), undisturbed(model):
        seen = model(inputs)
    after = model.state_dict()
    assert weights.keys() == after.keys() and all(torch.equal(weights[name], after[name]) for name in after)
    assert flags == [(part.training, [each.requires_grad for each in part.parameters()]) for part in model.modules()]
    assert torch.equal(seen, model.eval()(inputs))  # it was seen as it is in evaluation


def test_a_model_that_has_no_modes() -> None:
    class Exported(nn.Linear):
        def train(self, mode: bool = True) -> Exported:
            raise NotImplementedError("an exported program has no modes")

    model = Exported(3, 3)
    with undisturbed(model):
        assert not model.training
    assert model.training


# --- others than models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(3, device="meta"),
        torch.eye(3).to_sparse(),
        torch.eye(3).to_sparse_csr(),
        nn.parameter.UninitializedParameter(),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        torch.empty(0),
        torch.ones(3).to_mkldnn(),
        torch.ones(3, dtype=torch.complex64),
    ],
    ids=lambda tensor: f"{tensor.layout} on {tensor.device}" if not isinstance(tensor, nn.Parameter) else "lazy",
)
def test_tensors_of_every_kind_are_left_alone(tensor: Tensor) -> None:
    model = nn.Linear(3, 3)
    model.own = tensor
    with undisturbed(model):
        pass
    assert model.own is tensor


def test_only_what_is_changed_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model, copied = nn.Sequential(nn.Linear(30, 30), nn.Linear(3, 3)), []
    clone = torch.UntypedStorage.clone
    monkeypatch.setattr(torch.UntypedStorage, "clone", lambda self: copied.append(self.nbytes()) or clone(self))
    with torch.no_grad(), undisturbed(model):
        model[1].bias.add_(1)
        model[1].bias.add_(1)
    assert copied == [3 * 4]


def test_it_is_put_back_after_an_error() -> None:
    model = nn.Linear(3, 3)
    before = model.weight.clone()
    with pytest.raises(ValueError, match="planted"), undisturbed(model):
        model.weight.data.zero_()
        raise ValueError("planted")
    assert torch.equal(model.weight, before) and model.training


def test_long_lists_are_not_walked() -> None:
    inner = [[0] for _ in range(2000)]
    with kept_state(inner):
        inner.append([1])
        inner[0].append(1)  # as in the list of a data set's files
    assert len(inner) == 2000 and inner[0] == [0, 1]
