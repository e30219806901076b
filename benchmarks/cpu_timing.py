"""Several ways to do one thing, timed in turn in one process: whatever slows the machine down meets all of them.

A round visits every contender once, each round in another order. A visit is as many calls as take some milliseconds,
the copies of its weights used one after the other, and gives the mean seconds of a call. Two contenders are compared by
the ratio of their medians; its spread is the quartiles of the ratios within each round.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

VISIT = 0.02  # seconds of a visit at least, where a call takes less
MOST_CALLS = 2000  # of a visit
SLOW = 0.2  # seconds of a call that needs no second one to be estimated
TOO_SLOW = 4.0  # seconds of a call that is not waited for


@dataclass
class Contender:
    """Something to time: `call(i)` uses copy i of its weights, and at least `least` rounds are wanted."""

    name: str
    call: Callable[[int], object]
    least: int = 3
    seconds: list[float | None] = field(default_factory=list)
    """One entry a round; None where it did not take part."""
    spent: float = 0.0
    estimate: float = 0.0
    _copies: Iterator[int] = field(default_factory=itertools.count)

    def run(self, calls: int, clock: Callable[[], float]) -> float:
        """The mean seconds of so many calls."""
        began = clock()
        for _ in range(calls):
            self.call(next(self._copies))
        took = clock() - began
        self.spent += took
        return took / calls

    def prepare(self, clock: Callable[[], float]) -> None:
        """The first calls, which allocate, start threads and fill caches, are not counted.

        An estimate that is there already comes from such a call.
        """
        if self.estimate < SLOW:
            self.estimate = self.run(1, clock)
        if self.estimate < SLOW:
            self.estimate = self.run(2, clock)
        self.spent = 0.0

    def visit(self, clock: Callable[[], float]) -> float:
        """The mean seconds of a call, after one that is not counted where calls are short."""
        if self.estimate < VISIT:
            self.run(1, clock)
        calls = math.ceil(VISIT / self.estimate) if self.estimate else MOST_CALLS
        return self.run(max(1, min(MOST_CALLS, calls)), clock)

    @property
    def times(self) -> list[float]:
        """The seconds of the rounds in which it took part."""
        return [value for value in self.seconds if value is not None]

    @property
    def median(self) -> float:
        """The seconds of a call."""
        return statistics.median(self.times)


def alternate(
    contenders: Sequence[Contender], rounds: int, budget: float, clock: Callable[[], float] = time.perf_counter
) -> None:
    """Fill the `seconds` of all contenders: up to `rounds` rounds, each within its share of `budget` seconds.

    One that has used up its share takes part until it has its `least` rounds, and no longer.
    """
    for contender in contenders:
        contender.prepare(clock)
    share = budget / max(1, len(contenders))
    for index in range(rounds):
        first = index % len(contenders)
        present = set()
        for contender in (*contenders[first:], *contenders[:first]):
            if len(contender.times) < min(contender.least, rounds) or contender.spent < share:
                contender.seconds.append(contender.visit(clock))
                present.add(contender.name)
        if not present:
            break
        for contender in contenders:
            if contender.name not in present:
                contender.seconds.append(None)


def expected(known: Sequence[tuple[int, float]], size: int) -> float:
    """The seconds of a call of some size: on the line through the last two known (size, seconds), or as the only."""
    if len(known) < 2:
        return known[-1][1] if known else 0.0
    (first, before), (last, now) = known[-2:]
    return now + (now - before) * (size - last) / (last - first)


def quartiles(values: Sequence[float]) -> list[float]:
    """The first and the third quartile; of a single value, that one twice."""
    if len(values) < 2:
        return [values[0], values[0]]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


def ratio(of: Contender, to: Contender) -> dict[str, object]:
    """How many times faster `of` is than `to`: the ratio of the medians, and the quartiles of those of each round.

    Only rounds in which both took part count.
    """
    pairs = [
        (mine, other)
        for mine, other in zip(of.seconds, to.seconds, strict=True)
        if mine is not None and other is not None
    ]
    found = statistics.median(other for _, other in pairs) / statistics.median(mine for mine, _ in pairs)
    return {"ratio": found, "quartiles": quartiles([other / mine for mine, other in pairs]), "rounds": len(pairs)}
