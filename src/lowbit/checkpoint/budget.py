"""Choosing one option for each of many items: the least loss in all that a budget pays for.

Each option has a cost and a loss. The steps along the lower convex hull of an item's options have falling gains (loss
saved per cost); taken over all items in the order of their gains they give, after every step, the least loss possible
at that cost, and between steps a bound that no choice passes. A budget mostly ends inside a step. What is then left is
settled exactly: with the gain g of that step as the price of a cost, an option is worth looking at only if its reduced
loss, loss + g cost above the least of its item, is smaller than the distance of the best choice known from the bound
(the Lagrangian bound of the multiple-choice knapsack; Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004,
chapter 11). The few options that remain are combined by dynamic programming over states that no other dominates.

>>> assign([[(1, 8.0), (2, 3.0), (4, 2.0)], [(1, 5.0), (2, 4.0)]], 4).chosen
(1, 1)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from lowbit.errors import PlanError

Option = tuple[float, float]
"""(cost, loss)."""
Floats = npt.NDArray[np.float64]

STATES = 8192  # states of the exact search that are followed at a time
_ROUNDING = 1e-9  # of the budget, which sums of floats may miss


@dataclass(frozen=True)
class Assignment:
    """The index of the option chosen for each item, their cost and loss in all, and a loss that no choice is below."""

    chosen: tuple[int, ...]
    cost: float
    loss: float
    bound: float


@dataclass(frozen=True)
class _Step:
    """From one corner of an item's hull to the next: what it costs more, and how much loss that saves."""

    item: int
    start: int
    end: int
    cost: float
    saved: float

    @property
    def gain(self) -> float:
        return self.saved / self.cost


def hull(options: Sequence[Option]) -> list[int]:
    """Indices of the corners of the lower convex hull of (cost, loss), by rising cost and falling loss."""
    corners: list[int] = []
    for index in sorted(range(len(options)), key=lambda i: options[i]):
        cost, loss = options[index]
        if corners and loss >= options[corners[-1]][1]:
            continue
        while len(corners) > 1:
            (c0, l0), (c1, l1) = options[corners[-2]], options[corners[-1]]
            if (l0 - l1) * (cost - c1) > (l1 - loss) * (c1 - c0):
                break
            corners.pop()
        corners.append(index)
    return corners


def assign(items: Sequence[Sequence[Option]], budget: float) -> Assignment:
    """The choice with the least loss among those that cost no more than `budget`.

    It is the optimum, except where more than `STATES` undominated combinations are as good as its bound; then it is
    the best of those followed. Raises `PlanError` when even the cheapest options cost more.
    """
    search = _Search(items, budget)
    return search.result()


class _Search:
    def __init__(self, items: Sequence[Sequence[Option]], budget: float) -> None:
        self.items = items
        self.budget = budget + abs(budget) * _ROUNDING
        hulls = [hull(options) for options in items]
        self.chosen = [corners[0] for corners in hulls]
        self.cost, self.loss = self._sums(self.chosen)
        if self.cost > self.budget:
            raise PlanError(f"the cheapest choice costs {self.cost:g}, more than {budget:g}")
        self.steps = sorted(
            (
                _Step(item, a, b, items[item][b][0] - items[item][a][0], items[item][a][1] - items[item][b][1])
                for item, corners in enumerate(hulls)
                for a, b in pairwise(corners)
            ),
            key=lambda step: -step.gain,
        )

    def result(self) -> Assignment:
        """Steps by gain until one does not fit, then the exact search."""
        price, bound = 0.0, None
        for step in self.steps:
            if self.chosen[step.item] != step.start:
                continue  # an earlier step of this item did not fit
            if self.cost + step.cost <= self.budget:
                self._take(step)
            elif bound is None:
                price = step.gain
                bound = self.loss - price * (self.budget - self.cost)
        self.cost, self.loss = self._sums(self.chosen)
        if bound is None:
            bound = self.loss
        elif self.loss > bound:
            self._improve(price, bound)
        return Assignment(tuple(self.chosen), self.cost, self.loss, min(bound, self.loss))

    def _take(self, step: _Step) -> None:
        self.chosen[step.item] = step.end
        self.cost += step.cost
        self.loss -= step.saved

    def _sums(self, chosen: Sequence[int]) -> tuple[float, float]:
        picked = [options[index] for options, index in zip(self.items, chosen, strict=True)]
        return sum(cost for cost, _ in picked), sum(loss for _, loss in picked)

    # ---- the exact search -------------------------------------------------------------------------------------------

    def _improve(self, price: float, bound: float) -> None:
        """Look for a choice with less loss than the one at hand."""
        room = self.loss - bound
        core = [_Core(options, price, room) for options in self.items]
        best = [item.options[0] for item in core]
        undecided = sorted((i for i, item in enumerate(core) if len(item.options) > 1), key=lambda i: -core[i].second)
        fixed = sum(self.items[i][best[i]][0] for i in range(len(core)) if len(core[i].options) == 1)
        base = sum(self.items[i][best[i]][1] for i in range(len(core)) if len(core[i].options) == 1)
        states = _States(np.array([fixed]), np.array([base]), np.zeros(1))
        least = sum(core[i].costs.min() for i in undecided)
        most = sum(core[i].costs.max() for i in undecided)
        history = []
        for i in undecided:
            least, most = least - core[i].costs.min(), most - core[i].costs.max()
            states, parents, picks = states.extended(core[i])
            fits = states.costs + least <= self.budget
            waste = price * np.maximum(self.budget - states.costs - most, 0.0)
            keep = _undominated(states, fits, states.reduced + waste, room)
            states = states.at(keep)
            history.append((parents[keep], picks[keep]))
        if states.losses.size and states.losses.min() < self.loss:
            chosen = _traced(best, core, undecided, history, int(states.losses.argmin()))
            cost, loss = self._sums(chosen)
            if cost <= self.budget and loss < self.loss:
                self.chosen, self.cost, self.loss = chosen, cost, loss


class _Core:
    """The options of an item that may be part of a better choice, the one with the least reduced loss first."""

    def __init__(self, options: Sequence[Option], price: float, room: float) -> None:
        cost, loss = np.array(options, dtype=np.float64).T
        reduced = loss + price * cost
        reduced -= reduced.min()
        order = np.argsort(reduced, kind="stable")
        order = order[: max(1, int((reduced[order] < room).sum()))]
        self.options = [int(index) for index in order]
        self.costs, self.losses, self.reduced = cost[order], loss[order], reduced[order]

    @property
    def second(self) -> float:
        """The reduced loss of its second option: large ones decide early, while there are few states."""
        return float(self.reduced[1])


@dataclass(frozen=True)
class _States:
    """Choices for the items so far: their cost, loss and reduced loss, each [states]."""

    costs: Floats
    losses: Floats
    reduced: Floats

    def extended(self, item: _Core) -> tuple[_States, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """All states with all options of one more item; which state and which option each comes from."""
        count, options = self.costs.size, len(item.options)

        def both(mine: Floats, theirs: Floats) -> Floats:
            return np.add.outer(mine, theirs).reshape(-1)

        wider = _States(both(self.costs, item.costs), both(self.losses, item.losses), both(self.reduced, item.reduced))
        return wider, np.repeat(np.arange(count), options), np.tile(np.arange(options), count)

    def at(self, keep: npt.NDArray[np.int64]) -> _States:
        """Some of the states."""
        return _States(self.costs[keep], self.losses[keep], self.reduced[keep])


def _undominated(states: _States, fits: npt.NDArray[np.bool_], bounds: Floats, room: float) -> npt.NDArray[np.int64]:
    """Indices of states that fit, may still beat the choice at hand, and have no cheaper one with as little loss."""
    alive = np.flatnonzero(fits & (bounds < room))
    alive = alive[np.lexsort((states.losses[alive], states.costs[alive]))]
    losses = states.losses[alive]
    before = np.minimum.accumulate(np.concatenate(([np.inf], losses[:-1])))
    alive = alive[losses < before]
    if alive.size > STATES:
        alive = alive[np.argpartition(bounds[alive], STATES)[:STATES]]
    return alive


def _traced(
    best: Sequence[int],
    core: Sequence[_Core],
    undecided: Sequence[int],
    history: Sequence[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]],
    state: int,
) -> list[int]:
    """The choice that a state at the end stands for."""
    chosen = list(best)
    for i, (parents, picks) in zip(reversed(undecided), reversed(history), strict=True):
        chosen[i] = core[i].options[int(picks[state])]
        state = int(parents[state])
    return chosen
