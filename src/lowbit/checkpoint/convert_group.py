"""Layers that a conversion quantizes together: with one smooth_factor and one proj_down, as one piece of work."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lowbit.devices import enough_memory
from lowbit.solvers import Member, solve_shared

from .convert_layer import CPU, LayerWork, record_of
from .dialects import TensorSpec
from .dialects.base import Read
from .rewrite import Made
from .shared_low_rank import group_name

MEMBERS = "members"  # of a group's record: the records of its layers by name


class GroupWork:
    """Some layers with the same input; see `LayerWork`, which they are. All of their weights are in memory at once."""

    def __init__(self, layers: Sequence[LayerWork]) -> None:
        self.layers = tuple(layers)
        first = layers[0]
        self.name = first.held.full_name(group_name([layer.layer for layer in layers]))
        self.place = ", ".join((first.place, *(f"{layer.layer!r}" for layer in layers[1:])))
        self.specs: dict[str, TensorSpec] = {key: spec for layer in layers for key, spec in layer.specs.items()}
        self.size = sum(layer.size for layer in layers)
        joined = 4 * sum(layer.shape[0] for layer in layers) * first.shape[1]  # all rows in float32
        self.memory = sum(layer.own_memory for layer in layers) + max(layer.solving_memory for layer in layers) + joined
        for layer in layers:
            layer.group = self.name

    def make(self) -> Made:
        """Read all weights, solve, store."""
        began = time.perf_counter()
        weights, before = zip(*(layer.read() for layer in self.layers), strict=True)
        first = self.layers[0]
        with enough_memory(first.device, self.place):
            members = [
                Member(w.to(first.device), layer.plan.solver, layer.has_bias, layer.place)
                for layer, w in zip(self.layers, weights, strict=True)
            ]
            done = solve_shared(members, first.fmt, first.known(), where=self.place, seed=first.seed)
            solutions = [solution.on(CPU) for solution in done.solutions]
        tensors: dict[str, Tensor] = {}
        for layer, solution, share in zip(self.layers, solutions, before, strict=True):
            tensors |= layer.tensors(solution, share)
        seconds = (time.perf_counter() - began) / len(self.layers)
        records = {
            layer.name: {**record_of(solution, seconds), "shares": self.name if done.shared else ""}
            for layer, solution in zip(self.layers, solutions, strict=True)
        }
        return Made(tensors, {MEMBERS: records}, lambda read: self._check(weights, records, read))

    def _check(self, weights: Sequence[Tensor], records: dict[str, dict[str, Any]], read: Read) -> dict[str, Any]:
        checked = {
            layer.name: {**records[layer.name], **layer.check(w, read)}
            for layer, w in zip(self.layers, weights, strict=True)
        }
        return {MEMBERS: checked}


def record_in(records: dict[str, dict[str, Any]], layer: LayerWork) -> dict[str, Any]:
    """The record of a layer among those of all pieces of work."""
    found: dict[str, Any] = records[layer.group][MEMBERS][layer.name] if layer.group else records[layer.name]
    return found
