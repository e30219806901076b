"""Kernels run on the threads of torch's own OpenMP library, and on nobody else's."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lowbit

cpu = pytest.importorskip("lowbit.backends.cpu", reason="no compiled kernels here", exc_type=ImportError)

COMPILER = os.environ.get("CXX") or shutil.which("c++")
SOURCES = Path(lowbit.__file__).parent / "backends" / "cpu"
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

PROCESS = """
import json, os, torch
torch.set_num_threads(1)
from lowbit.backends.cpu import native, read_bandwidth

def threads():
    return len(os.listdir("/proc/self/task"))

def libraries():
    names = {os.path.basename(line.split()[-1]) for line in open("/proc/self/maps") if "/" in line}
    return sorted(name for name in names if name.startswith(("libgomp", "libomp", "libiomp")))

x = torch.arange(1 << 20)
found = {"libraries": libraries(), "sums": [read_bandwidth(x)], "before": threads()}
torch.set_num_threads(3)
found["sums"].append(read_bandwidth(x))
found["three"] = threads()
x.sum()
found["sums"].append(read_bandwidth(x))
found["torch too"] = threads()
found["pool"] = native.pool()
found["libraries after"] = libraries()
into, outof = os.pipe()
child = os.fork()
if not child:
    os.write(outof, json.dumps([read_bandwidth(x), native.pool(), threads()]).encode())
    os._exit(0)
os.waitpid(child, 0)
found["child"] = json.loads(os.read(into, 4096))
found["sums"].append(read_bandwidth(x))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def process():
    """What a process with three threads, and its forked child, tell of themselves."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", PROCESS]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True)
    return json.loads(done.stdout)


@linux
def test_one_openmp_library_is_in_the_process(process):
    """Kernels bring no OpenMP library: the one that torch brought is the only one, and it is the one they use."""
    assert len(process["libraries"]) == 1
    assert process["libraries after"] == process["libraries"]
    assert process["pool"].startswith("torch's ")


@linux
def test_the_number_of_threads_is_the_one_set(process):
    """One thread is the calling one; three are two more; and torch then computes on the very same."""
    assert process["three"] == process["before"] + 2
    assert process["torch too"] == process["three"]
    assert len(set(process["sums"])) == 1


@linux
def test_a_forked_child_computes_alone(process):
    """A child has none of its parent's threads: it says so, does not wait for them, and finds the same."""
    total, pool, threads = process["child"]

    assert total == process["sums"][0]
    assert pool == "none, the calling thread computes alone: a forked process has none of its parent's threads"
    assert threads == 1


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """parallel.h in a library of its own, in this process, on torch's threads."""
    if not COMPILER or not shutil.which(COMPILER):
        pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("probe") / "probe.so"
    sources = [Path(__file__).with_name("parallel_probe.cpp"), SOURCES / "native" / "parallel.cpp"]
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", f"-I{SOURCES}", "-ldl", "-lpthread"]
    subprocess.run([COMPILER, *sources, *flags, "-o", path], check=True)
    library = ctypes.CDLL(str(path))
    if not library.probe_pool():
        pytest.skip("torch has no pool here")
    return library


@pytest.mark.parametrize(("tasks", "threads"), [(0, 3), (1, 3), (2, 3), (40, 1), (40, 2), (40, 3)])
def test_every_task_runs_once_on_as_many_threads_as_asked(probe, tasks, threads):
    """Tasks are claimed once each; a worker's number belongs to one thread; none run but on those asked for."""
    counts = torch.zeros(tasks, dtype=torch.int32)
    used = probe.probe_tasks(ctypes.c_int64(tasks), threads, ctypes.c_void_p(counts.data_ptr()))

    assert counts.tolist() == [1] * tasks
    assert used == threads if tasks == 40 else used <= min(tasks, threads)


def shares(probe, tasks, threads, slow=-1):
    """Which worker ran each task, and as its how manieth."""
    workers, order = torch.full((2, tasks), -1, dtype=torch.int32)
    pointers = (ctypes.c_void_p(part.data_ptr()) for part in (workers, order))
    probe.probe_shares(ctypes.c_int64(tasks), threads, slow, *pointers)
    return workers.tolist(), order.tolist()


@pytest.mark.parametrize(("tasks", "threads"), [(12, 2), (13, 3), (4, 4)])
def test_a_thread_begins_with_its_own_share_in_order(probe, tasks, threads):
    """Neighbouring tasks are one thread's, which reads on where it has read."""
    workers, order = shares(probe, tasks, threads)

    for worker in range(threads):
        first, last = tasks * worker // threads, tasks * (worker + 1) // threads
        own = [order[task] for task in range(first, last) if workers[task] == worker]
        assert workers[first] == worker
        assert own == list(range(len(own)))


def test_idle_threads_take_what_a_slow_one_has_not_begun(probe):
    """A thread that is held up keeps one task; all others of its share are done without it."""
    workers, _ = shares(probe, 20, 2, slow=0)

    assert workers.count(0) == 1
    assert workers.count(1) == 19


@pytest.mark.parametrize("threads", [2, 3])
def test_a_worker_is_the_same_thread_in_every_call(probe, threads):
    """It finds what it read last time in its cache; the calling thread is number 0."""
    assert probe.probe_numbers(threads) == 1


def test_a_region_in_a_region_runs_on_its_own_thread(probe):
    """A kernel that is called on a thread of a region does not begin another one."""
    assert probe.probe_nested(3) == 0


@pytest.mark.parametrize("threads", [1, 3])
def test_an_exception_leaves_after_all_threads_have(probe, threads):
    """The first exception reaches the caller as what it was, and the pool works afterwards."""
    counts = torch.zeros(9, dtype=torch.int32)

    assert probe.probe_exception(ctypes.c_int64(20), threads) == 1
    probe.probe_tasks(ctypes.c_int64(9), threads, ctypes.c_void_p(counts.data_ptr()))
    assert counts.tolist() == [1] * 9
