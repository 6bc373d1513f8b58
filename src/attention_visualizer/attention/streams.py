"""How attention calls follow each other: which are parts of one layer, and which stand side by side."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from attention_visualizer.attention.kernels import modules_that_run, unseen_layers
from attention_visualizer.attention.layers import Part
from attention_visualizer.attention.placement import Unplaced
from attention_visualizer.attention.policies import SwitchedOff
from attention_visualizer.attention.probe import CallPlaces, Probe


@dataclass(frozen=True)
class Streams:
    """How attention calls follow each other."""

    parts: dict[str, Part] = field(default_factory=dict)  # by the name of the call
    #: Calls that do not depend on what the layer before gave: branches side by side.
    beside: frozenset[str] = frozenset()
    unseen: tuple[str, ...] = ()  # modules whose attention is not seen, although that of others of their class is


def find_streams(probe: Probe, places: dict[str, CallPlaces | Unplaced], model: nn.Module) -> Streams:
    """Find which calls are parts of one layer: on the same keys, computed by one module or by those of one list, and
    none from what another gave."""
    names, depends = list(probe.windows), probe.dependence()
    with modules_that_run() as ran:
        values = probe.values(probe.image, SwitchedOff())
    layers: list[list[str]] = []
    beside = set()
    for number, name in enumerate(names):
        if number and not depends[number, number - 1]:
            last = layers[-1]
            if is_beside(name, last, places) and not depends[number, number - len(last) : number].any():
                last.append(name)
                continue
            beside.add(name)
        layers.append([name])
    parts = {}
    for calls in layers:
        if len(calls) < 2:
            continue
        of_queries = all(torch.equal(values[name], values[calls[0]]) for name in calls)
        for number, name in enumerate(calls):
            parts[name] = Part(common_name(calls), number, len(calls), of_queries)
    return Streams(parts, frozenset(beside), tuple(unseen_layers(model, ran, names)))


def is_beside(name: str, calls: list[str], places: dict[str, CallPlaces | Unplaced]) -> bool:
    """Whether a call may be another part of the layer of these calls: of the same module, or of its list."""
    one, other = places[name], places[calls[0]]
    if isinstance(one, Unplaced) or isinstance(other, Unplaced) or module_list(name) != module_list(calls[0]):
        return False
    return one.num_keys == other.num_keys and np.array_equal(one.keys.order, other.keys.order)


def module_list(name: str) -> str:
    """Return the name of a call's module, without the number at its end where it is one of a list."""
    module = name.partition("#")[0]
    around, _, last = module.rpartition(".")
    return around if last.isdigit() else module


def common_name(names: list[str]) -> str:
    steps = os.path.commonprefix([name.partition("#")[0].split(".") for name in names])
    return ".".join(steps) or names[0]
