"""Properties that are computed once, in threads side by side."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest

from lowbit.solvers.lazy import lazy


@dataclass(frozen=True)
class Layer:
    """Its value waits at a barrier that two threads must reach."""

    barrier: threading.Barrier

    @lazy
    def value(self):
        """The documentation of the property."""
        self.barrier.wait(timeout=10)
        return object()


def test_instances_do_not_wait_for_each_other():
    """Two threads compute the values of two instances at the same time; `functools` locked one out up to 3.11."""
    barrier = threading.Barrier(2)
    layers, found = [Layer(barrier), Layer(barrier)], []
    threads = [threading.Thread(target=lambda one=one: found.append(one.value)) for one in layers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(found) == 2
    assert {id(one.value) for one in layers} == {id(one) for one in found}


def test_it_is_a_property():
    """The class has it with its documentation, and nothing is kept of a computation that failed."""
    assert Layer.value.__doc__ == "The documentation of the property."
    barrier = threading.Barrier(2)
    barrier.abort()
    broken = Layer(barrier)
    for _ in range(2):
        with pytest.raises(threading.BrokenBarrierError):
            _ = broken.value
