"""Calls on a GPU, timed by its own clock: recorded once in a CUDA graph that uses all copies of the inputs, replayed.

A graph holds as many calls as take about a millisecond, and every copy at least once, so that starting one costs
nothing beside it and no call finds in the L2 what an earlier one left there. What cannot be captured (a peer that waits
for the device) is launched call by call between two events, and says so. Contenders take turns: `cpu_timing.alternate`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from benchmarks.cpu_timing import Contender

GRAPH_SECONDS = 1e-3  # of a replay at least, where a call takes less
MOST_CALLS = 256  # in a graph
REPLAYS = 3  # of a visit, after one that is not counted
LAST_LEVEL = 3  # copies together are so many times as large as the L2
MOST_BYTES = 2 << 30  # of the copies of one weight

Call = Callable[[int], object]


class Runner(Protocol):
    """A fixed number of calls, timed together."""

    calls: int
    how: str

    def __call__(self) -> float:
        """Run them all, and return their seconds."""


@dataclass
class Replayed:
    """Calls in a CUDA graph."""

    graph: Any
    calls: int
    how: str = "graph"

    def __call__(self) -> float:
        """Replay the graph."""
        return event_seconds(self.graph.replay)


@dataclass
class Launched:
    """Calls that are launched one by one: for those that cannot be captured."""

    call: Call
    calls: int
    how: str = "launches"

    def __call__(self) -> float:
        """Launch them all."""

        def launch() -> None:
            for index in range(self.calls):
                self.call(index)

        return event_seconds(launch)


def event_seconds(run: Callable[[], object]) -> float:
    """Seconds on the GPU from before to after what is launched."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    run()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1e3


def calls_for(estimate: float, copies: int) -> int:
    """How many calls a graph holds: about a millisecond of them, and a multiple of the copies."""
    wanted = math.ceil(GRAPH_SECONDS / max(estimate, 1e-7))
    rounds = math.ceil(min(wanted, MOST_CALLS) / copies)
    return max(1, rounds) * copies


def capture(call: Call, copies: int) -> Runner:
    """Warm up (kernels are compiled and tuned at their first call), then record. Raises what the call raises."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for index in range(2):
            call(index)
        torch.cuda.synchronize()
        estimate = event_seconds(lambda: call(0))
    torch.cuda.current_stream().wait_stream(side)
    calls = calls_for(estimate, copies)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for index in range(calls):
                call(index)
    except RuntimeError:
        torch.cuda.synchronize()
        return Launched(call, calls)
    return Replayed(graph, calls)


@dataclass
class GpuContender(Contender):
    """A contender whose calls a `Runner` times; `call(i)` uses copy i modulo `copies`."""

    copies: int = 1
    make: Callable[[Call, int], Runner] = capture
    runner: Runner | None = None

    def prepare(self, clock: Callable[[], float]) -> None:
        """Record the calls, and run them once."""
        self.runner = self.make(lambda index: self.call(index % self.copies), self.copies)
        self.estimate = self.runner() / self.runner.calls
        self.spent = 0.0

    def visit(self, clock: Callable[[], float]) -> float:
        """The seconds of a call: the median of some replays, after one that is not counted."""
        assert self.runner is not None, "prepare() comes first"
        began = clock()
        self.runner()
        found = statistics.median(self.runner() for _ in range(REPLAYS))
        self.spent += clock() - began
        return found / self.runner.calls


def copies_for(nbytes: int, l2: int) -> int:
    """How many copies of so many bytes are larger than the L2 together, within reason."""
    return max(2, min(math.ceil(LAST_LEVEL * l2 / max(nbytes, 1)), max(2, MOST_BYTES // max(nbytes, 1)), 64))
