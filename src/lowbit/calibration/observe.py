"""Hooks on the linears of a model: what flows into them goes to accumulators, one for all that have the same input.

Two linears have the same input when the same rows reach them call by call. That is found by a fingerprint of the values
at their first call and checked at every later one: of a group, only the first member accumulates. A member that stops
agreeing is split off and gets its statistics in another pass; the same happens to inputs that memory has no room for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import StatisticsError

from .accumulate import Accumulator, state_bytes
from .batches import Rows, Split


@dataclass
class Watched:
    """A linear: its shape, its group (the name of the group's first member, "" before its first call), rows by half."""

    name: str
    n: int
    k: int
    group: str = ""
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    log: list[float] = field(default_factory=list)  # fingerprints of this forward's calls


@dataclass
class Group:
    """Linears with one input. `born` is the batch of their first call; without `accumulator` it waits for a pass."""

    members: list[str]
    born: int
    accumulator: Accumulator | None = None


class Observer:
    """Watches linears by name over passes. `memory`: bytes for the accumulators of one pass; None for no bound.

    Attributes:
        watched: the linears by name.
        groups: the groups by the name of their first member.
        done: groups whose statistics are taken.
        last: the linear that was called last.
    """

    def __init__(
        self, linears: Mapping[str, nn.Linear], *, memory: int | None, full_up_to: int | None, share: bool, seed: int
    ) -> None:
        self._linears = dict(linears)
        self.memory, self._full_up_to, self._share, self._seed = memory, full_up_to, share, seed
        self.watched = {
            name: Watched(name, linear.out_features, linear.in_features) for name, linear in linears.items()
        }
        self.groups: dict[str, Group] = {}
        self.done: set[str] = set()
        self.surveying = True  # the first pass: groups are found and rows are counted
        self.last = ""
        self.begun: set[str] = set()  # in a later pass: groups that were called, whether there was room or not
        self._used = 0
        self._split: Split | None = None
        self._index = 0
        self._probes: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
        self._ramps: dict[torch.device, Tensor] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Watch for the time of a with block: in the first pass every linear, later the groups that wait."""
        names: Iterable[str] = self._linears if self.surveying else self.waiting()
        handles = [
            self._linears[name].register_forward_pre_hook(self._hook(self.watched[name]), with_kwargs=True)
            for name in names
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def waiting(self) -> list[str]:
        """The groups without statistics, in the order of their first call."""
        return [name for name in self.groups if name not in self.done]

    def begin(self, split: Split, index: int) -> None:
        """Say which batch the coming calls belong to."""
        self._split, self._index = split, index
        self.last = ""
        for watched in self.watched.values():
            watched.log.clear()

    def end(self) -> None:
        """Check, after a batch of the first pass, that the members of every group saw the same."""
        if not self.surveying:
            return
        for name, group in list(self.groups.items()):
            if len(group.members) > 1:
                self._part(name, group)

    def _part(self, name: str, group: Group) -> None:
        log = self.watched[name].log
        others: dict[tuple[float, ...], list[str]] = {}
        for member in group.members[1:]:
            if self.watched[member].log != log:
                others.setdefault(tuple(self.watched[member].log), []).append(member)
        for members in others.values():
            self.groups[members[0]] = Group(members, group.born)
            for member in members:
                group.members.remove(member)
                self.watched[member].group = members[0]

    def _hook(self, watched: Watched) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs.get("input")
            self.last = watched.name
            if isinstance(x, Tensor) and x.is_floating_point() and x.dim() and x.shape[-1] == watched.k:
                self._see(watched, x.detach())

        return hook

    def _see(self, watched: Watched, x: Tensor) -> None:
        assert self._split is not None
        if not x.numel():
            return
        rows = self._split.rows(x)
        if not any(rows.counts):
            return
        x = x.reshape(-1, watched.k)
        mark = self._fingerprint(x, rows)
        if not math.isfinite(mark) and not bool(rows.select(x).isfinite().all()):
            raise StatisticsError(
                f"{watched.name}: its input has NaN or infinite values in batch {self._index}; run the model in a "
                "wider dtype (bfloat16 or float32), or leave that batch out"
            )
        if self.surveying:
            watched.tokens = [seen + more for seen, more in zip(watched.tokens, rows.counts, strict=True)]
            watched.log.append(mark)
            if not watched.group:
                self._join(watched, x.device)
        if watched.group == watched.name:
            self._accumulate(watched, x, rows)

    def _fingerprint(self, x: Tensor, rows: Rows) -> float:
        """A number that tells the kept rows of x [R, K] and their order from others; not finite where they are not."""
        key = (x.shape[1], x.dtype, x.device)
        if key not in self._probes:
            random = torch.Generator().manual_seed(x.shape[1])
            probe = (torch.rand(x.shape[1], generator=random) + 0.5) / (2 * x.shape[1])  # no overflow in float16
            self._probes[key] = probe.to(x.device, x.dtype)
        along = rows.select(x @ self._probes[key]).double()
        return float((along * self._ramp(len(along), x.device)).sum())

    def _ramp(self, count: int, device: torch.device) -> Tensor:
        """The roots of 1 to `count`: the beginning of the longest that was asked for."""
        if device not in self._ramps or len(self._ramps[device]) < count:
            self._ramps[device] = torch.arange(1, count + 1, dtype=torch.float64, device=device).sqrt_()
        return self._ramps[device][:count]

    def _join(self, watched: Watched, device: torch.device) -> None:
        """Give a linear at its first call a group: one born in this batch by the same first call, or its own."""
        if self._share:
            for name, group in self.groups.items():
                first = self.watched[name]
                if group.born == self._index and first.k == watched.k and first.log[:1] == watched.log:
                    group.members.append(watched.name)
                    watched.group = name
                    return
        watched.group = watched.name
        self.groups[watched.name] = Group([watched.name], self._index)

    def is_full(self, k: int) -> bool:
        """Whether inputs of K channels get the whole second moment: when one such fits into the memory."""
        small = self._full_up_to is None or k <= self._full_up_to
        return small and (self.memory is None or state_bytes(k, full=True) <= self.memory)

    def _accumulate(self, watched: Watched, x: Tensor, rows: Rows) -> None:
        group = self.groups[watched.name]
        if group.accumulator is None and self._may_begin(watched, group):
            self.allocate(watched.name, x.device)
        if group.accumulator is None:
            return
        for half, index in enumerate(rows.halves):
            group.accumulator.add(x, half, index)

    def _may_begin(self, watched: Watched, group: Group) -> bool:
        """Whether a group may accumulate in this pass: at its first call only, and when there is room."""
        if self.surveying and (group.born != self._index or len(watched.log) != 1):
            return False
        if not self.surveying and watched.name in self.begun:
            return False
        self.begun.add(watched.name)
        need = state_bytes(watched.k, full=self.is_full(watched.k))
        return self.memory is None or not self._used or self._used + need <= self.memory

    def allocate(self, name: str, device: torch.device) -> Accumulator:
        """Make the accumulator of a group."""
        k = self.watched[name].k
        full = self.is_full(k)
        self._used += state_bytes(k, full=full)
        made = Accumulator(k, full=full, device=device, seed=self._seed)
        self.groups[name].accumulator = made
        return made

    def begin_pass(self, *, surveying: bool) -> None:
        """Start another pass over the batches, with empty memory."""
        self.surveying = surveying
        self._used = 0
        self.begun.clear()

    def finished(self) -> Iterator[tuple[str, Accumulator]]:
        """At the end of a pass: the groups that were taken in it. Each is marked as done and its memory given back."""
        for name, group in self.groups.items():
            if group.accumulator is not None:
                made, group.accumulator = group.accumulator, None
                self.done.add(name)
                yield name, made

    def state(self) -> dict[str, Any]:
        """All but the accumulators, as JSON data."""
        return {
            "watched": {name: [seen.group, *seen.tokens] for name, seen in self.watched.items()},
            "groups": {name: [group.members, group.born] for name, group in self.groups.items()},
            "done": sorted(self.done),
            "begun": sorted(self.begun),
            "surveying": self.surveying,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; accumulators are allocated and restored by the caller."""
        for name, (group, first, second) in state["watched"].items():
            self.watched[name].group, self.watched[name].tokens = group, [first, second]
        self.groups = {name: Group(members, born) for name, (members, born) in state["groups"].items()}
        self.done, self.begun, self.surveying = set(state["done"]), set(state["begun"]), state["surveying"]
