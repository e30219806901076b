"""Many units, few threads: bounded memory, progress in order, one error."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch

from lowbit.checkpoint import pipeline
from lowbit.checkpoint.pipeline import Unit, run_units
from lowbit.errors import CheckpointError, PlanError


class Gauge:
    """Counts the memory of the units in work, and remembers the most."""

    def __init__(self):
        self.now = self.most = 0
        self._lock = threading.Lock()

    def unit(self, name: str, memory: int) -> Unit:
        """A unit that takes a moment."""

        def run() -> None:
            with self._lock:
                self.now += memory
                self.most = max(self.most, self.now)
            time.sleep(0.002)
            with self._lock:
                self.now -= memory

        return Unit(name, 1, memory, run)


@pytest.mark.parametrize(
    ("jobs", "free", "expected"),
    [(2, 64, 6), (1, 64, 3), (16, 64, 32), (16, 96, 48), (16, 20, 10), (16, 3, 2), (16, None, 2)],
)
def test_every_worker_has_room_for_the_largest_unit(monkeypatch, jobs, free, expected):
    """In half of what is free; a GPU works on one unit after the other. In GiB, of which the largest unit takes 3."""
    gib = 2**30
    monkeypatch.setattr(pipeline, "free_bytes", lambda _: None if free is None else free * gib)
    needs = [gib, 3 * gib, 2 * gib]
    assert pipeline.budget_for(needs, 2 * gib, jobs, torch.device("cpu")) == expected * gib
    assert pipeline.budget_for(needs, 2 * gib, jobs, torch.device("cuda")) == 2 * gib
    assert pipeline.budget_for([], 2 * gib, jobs, torch.device("cpu")) == 2 * gib


def test_memory_stays_in_the_budget():
    """Units run together only while their memory fits; one that is larger than the budget runs alone."""
    gauge = Gauge()
    run_units([gauge.unit(str(i), 30) for i in range(40)], jobs=8, budget=100)
    assert 30 < gauge.most <= 100
    gauge = Gauge()
    run_units([gauge.unit(str(i), 30 if i % 5 else 500) for i in range(20)], jobs=8, budget=100)
    assert gauge.most == 500


def test_every_unit_runs_once_and_progress_adds_up():
    """All units run; progress is called for each, never by two at once, with growing bytes that end at the total."""
    ran, calls, inside = [], [], []

    def progress(done: int, total: int, name: str) -> None:
        inside.append(1)
        time.sleep(0.001)
        assert len(inside) == 1
        inside.pop()
        calls.append((done, total, name))

    units = [Unit(f"u{i}", i, 1, lambda i=i: ran.append(i)) for i in range(50)]
    run_units(units, jobs=4, progress=progress, done=7)

    assert sorted(ran) == list(range(50))
    assert [call[0] for call in calls] == sorted(call[0] for call in calls)
    assert calls[-1][0] == calls[-1][1] == sum(range(50)) + 7
    assert sorted(call[2] for call in calls) == sorted(unit.name for unit in units)


def test_the_first_error_stops_the_rest():
    """An error in one unit is raised to the caller; units that had not begun never do, and no thread is left."""
    ran = []

    def fail() -> None:
        raise CheckpointError("unit 3: no")

    units = [Unit(str(i), 1, 1, fail if i == 3 else lambda i=i: (time.sleep(0.001), ran.append(i))) for i in range(500)]
    before = threading.active_count()
    with pytest.raises(CheckpointError, match="unit 3: no"):
        run_units(units, jobs=2)
    assert len(ran) < 20
    assert threading.active_count() == before


def test_an_error_in_progress_reaches_the_caller():
    """What the caller's own callback raises is not swallowed."""

    def progress(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_units([Unit("a", 1, 1, lambda: None)], progress=progress)


def test_workers_compute_on_one_thread_and_the_callers_count_is_restored():
    """Each worker has one thread of its own for torch; afterwards this thread and new ones have what they had."""
    seen = []
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        run_units([Unit(str(i), 1, 1, lambda: seen.append(torch.get_num_threads())) for i in range(4)], jobs=2)
        assert torch.get_num_threads() == 3
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 1, 1, 1, 3]


@pytest.mark.parametrize(("memory", "jobs", "threads"), [(25, 4, 1), (25, 1, 1), (26, 4, 2), (50, 4, 4), (101, 4, 8)])
def test_units_without_room_for_others_share_the_cores_out(memory, jobs, threads):
    """As many threads as leave none of 8 cores idle. With room for all, the number of workers changes nothing."""
    seen = []
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        units = [Unit(str(i), 1, memory, lambda: seen.append(torch.get_num_threads())) for i in range(8)]
        run_units(units, jobs=jobs, budget=100)
    finally:
        torch.set_num_threads(before)
    assert seen == [threads] * 8


@pytest.mark.parametrize(
    ("units", "total", "threads"), [(8, None, 1), (3, None, 2), (1, None, 8), (1, 3, 2), (1, 9, 1)]
)
@pytest.mark.parametrize("jobs", [1, 4])
def test_few_units_have_several_cores_each(units, total, threads, jobs):
    """Of 8 cores, by how many units the whole work has: the last ones of a run that goes on have no more."""
    seen = []
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        work = [Unit(str(i), 1, 1, lambda: seen.append(torch.get_num_threads())) for i in range(units)]
        run_units(work, jobs=jobs, budget=100, total=total)
    finally:
        torch.set_num_threads(before)
    assert seen == [threads] * units


def test_nothing_to_do():
    """No units are no error."""
    run_units([])


@pytest.mark.parametrize("jobs", [0, -2])
def test_jobs_below_one_are_refused(jobs):
    """A number of jobs that cannot work is refused."""
    with pytest.raises(PlanError, match=f"jobs is {jobs}"):
        run_units([], jobs=jobs)


def test_an_interrupt_waits_for_the_workers():
    """What they do is done when the interrupt arrives at the caller, who then closes their files."""
    ended, before = [], signal.signal(signal.SIGINT, signal.default_int_handler)

    def run() -> None:
        time.sleep(0.2)  # the caller waits by now
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        ended.append(True)

    try:
        with pytest.raises(KeyboardInterrupt):
            run_units([Unit("a", 1, 1, run), Unit("b", 1, 1, run)], jobs=1)
    finally:
        signal.signal(signal.SIGINT, before)

    assert ended == [True]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lowbit-")]
