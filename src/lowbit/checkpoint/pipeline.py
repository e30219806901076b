"""Working through many units with few threads: bounded memory, one error, progress.

Each worker computes with one thread of its own: tensors are many and large, so working on several at once uses the
cores better than sharing each one among them, and no core waits for another. Only where there are fewer units than
cores, or the memory has room for fewer, do these share them out.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from lowbit import memory
from lowbit.devices import free_bytes
from lowbit.errors import PlanError

Progress = Callable[[int, int, str], None]
"""Called with the bytes done, the bytes in all and the name of the unit just finished; never by two threads at once."""

# Bytes in work at a time; one unit larger than this runs alone. Three quarters of it may be held to be used again.
MEMORY_BUDGET = 512 << 20


def budget_for(needs: Iterable[int], base: int, jobs: int | None, device: torch.device) -> int:
    """Bytes in work at a time for units that mostly compute: the largest of their `needs` for each worker.

    No more than half of what is free in main memory, and no less than `base`, which is also what a device other than
    the CPU gets: it works on one unit after the other, however many workers there are.
    """
    free = free_bytes(torch.device("cpu")) if device.type == "cpu" else None
    return base if free is None else max(base, min(max(needs, default=0) * _workers(jobs), free // 2))


def _workers(jobs: int | None) -> int:
    return os.cpu_count() or 1 if jobs is None else jobs


@dataclass(frozen=True)
class Unit:
    """One piece of work. `size`: its bytes for the progress; `memory`: the most bytes it holds while it runs."""

    name: str
    size: int
    memory: int
    run: Callable[[], None]


def run_units(
    units: Sequence[Unit],
    *,
    jobs: int | None = None,
    budget: int = MEMORY_BUDGET,
    progress: Progress | None = None,
    done: int = 0,
    total: int | None = None,
    recycle: bool = True,
) -> None:
    """Run all units on `jobs` threads (by default one a core), begun in order. `done`: bytes finished beforehand.

    total: how many units the whole work has. On that depends how many cores each gets, which may change bits, and not
    on how many are left.
    recycle: whether a unit's large tensors use memory again that earlier ones have left; not where tensors are kept.

    The first exception stops the run: units that have begun are waited for, no other begins, and it is raised here. So
    is an interrupt from the keyboard.
    """
    workers = _workers(jobs)
    if workers < 1:
        raise PlanError(f"jobs is {workers}; give 1 or more, or leave it out for one a core")
    _Run(units, budget, progress, done, total or len(units), recycle).work(min(workers, len(units)))


class _Run:
    def __init__(
        self, units: Sequence[Unit], budget: int, progress: Progress | None, done: int, total: int, recycle: bool
    ) -> None:
        self._waiting: Iterator[Unit] = iter(units)
        self._budget = budget
        self._recycle = recycle
        self._cores = torch.get_num_threads()
        self._threads = max(1, self._cores // max(1, total))  # of a unit that has room beside others
        self._progress = progress
        self._done = done
        self._total = done + sum(unit.size for unit in units)
        self._in_work = 0  # bytes
        self._ended: set[threading.Thread] = set()
        self._workers = 1
        self._changed = threading.Condition()
        self._next: Unit | None = None
        self._error: BaseException | None = None

    def work(self, workers: int) -> None:
        self._workers = max(1, workers)
        threads = [threading.Thread(target=self._worker, name=f"lowbit-{i}", daemon=True) for i in range(workers)]
        with _own_thread_count():
            try:
                for thread in threads:
                    thread.start()
                self._wait_for(threads)
            except BaseException as error:  # noqa: BLE001  (an interrupt: raised below, after the workers have stopped)
                self._stop(error)
                self._wait_for(threads)
        if self._error is not None:
            raise self._error

    def _wait_for(self, threads: Sequence[threading.Thread]) -> None:
        """Wait for all workers that were started, not by `join` alone.

        Once interrupted, Python 3.11's takes a thread that runs for ended: files would be closed under its hands.
        """
        with self._changed:
            while any(thread.ident is not None and thread not in self._ended for thread in threads):
                self._changed.wait()
        for thread in threads:
            if thread.ident is not None:
                thread.join()

    def _worker(self) -> None:
        try:
            self._work_off()
        finally:
            with self._changed:
                self._ended.add(threading.current_thread())
                self._changed.notify_all()

    def _work_off(self) -> None:
        try:
            with memory.recycling(self._budget * 3 // (4 * self._workers) if self._recycle else 0):
                while (unit := self._take()) is not None:
                    torch.set_num_threads(self._threads_for(unit))
                    unit.run()
                    self._finish(unit)
        except BaseException as error:  # noqa: BLE001  (raised again in the calling thread)
            self._stop(error)

    def _threads_for(self, unit: Unit) -> int:
        """One, whatever the number of workers, unless there are fewer units than cores, or room for fewer."""
        if unit.memory * self._workers <= self._budget:
            return self._threads
        return max(self._threads, self._cores // max(1, self._budget // unit.memory))

    def _take(self) -> Unit | None:
        """The next unit, when memory allows it; None when there is no more to do."""
        with self._changed:
            while self._error is None:
                if self._next is None:
                    self._next = next(self._waiting, None)
                if self._next is None:
                    return None
                if not self._in_work or self._in_work + self._next.memory <= self._budget:
                    unit, self._next = self._next, None
                    self._in_work += unit.memory
                    return unit
                self._changed.wait()
            return None

    def _finish(self, unit: Unit) -> None:
        with self._changed:
            self._in_work -= unit.memory
            self._done += unit.size
            self._changed.notify_all()
            if self._progress is not None:
                self._progress(self._done, self._total, unit.name)

    def _stop(self, error: BaseException) -> None:
        with self._changed:
            if self._error is None:
                self._error = error
            self._changed.notify_all()


@contextmanager
def _own_thread_count() -> Iterator[None]:
    """Restore torch's thread count: the workers' setting is also the default of threads that start later."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
