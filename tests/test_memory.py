"""Room for large tensors: huge pages are asked for, and what a pool lends comes back."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import pytest
import torch

from lowbit import memory

LARGE = (3000, 1500)  # bfloat16: 9 MB
POOL = 64 << 20


def advised(tensor: torch.Tensor) -> bool | None:
    """Whether the middle of a tensor lies where huge pages were asked for, by the kernel's books; None without any."""
    middle = tensor.data_ptr() + tensor.nbytes // 2
    within = False
    try:
        lines = Path("/proc/self/smaps").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        first = line.split(" ", 1)[0]
        if "-" in first and not first.endswith(":"):
            start, stop = (int(end, 16) for end in first.split("-"))
            within = start <= middle < stop
        elif within and line.startswith("VmFlags:"):
            return "hg" in line.split()
    return None


def test_a_large_tensor_asks_for_huge_pages():
    """By the kernel's books."""
    if memory._request() is None:
        pytest.skip("this system has no transparent huge pages")
    found = advised(memory.empty(LARGE, torch.bfloat16))
    if found is None:
        pytest.skip("this system does not tell")
    assert found
    assert advised(memory.clone(torch.zeros(LARGE))) is True


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (3, 5), LARGE])
def test_it_is_a_usual_tensor(shape):
    """Of any size, inside a pool and outside of it."""
    outside = memory.empty(shape, torch.float32)
    with memory.recycling(POOL):
        inside = memory.empty(list(shape), torch.float32)
    for tensor in (outside, inside):
        assert tensor.shape == shape
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
        assert tensor.fill_(2.0).sum() == 2 * tensor.numel()


def test_a_clone_is_a_copy():
    """Without gaps, in memory of its own."""
    source = torch.arange(12.0).view(3, 4).t()
    made = memory.clone(source)
    assert made.is_contiguous()
    assert torch.equal(made, source)
    assert made.data_ptr() != source.data_ptr()


def test_memory_comes_back_when_its_last_tensor_is_gone():
    """A view keeps it as well as the tensor itself does."""
    with memory.recycling(POOL):
        first = memory.empty(LARGE, torch.bfloat16).fill_(1.0)
        at, view = first.data_ptr(), first.view(torch.int16)[1:]
        del first
        other = memory.empty(LARGE, torch.bfloat16)
        assert other.data_ptr() != at
        assert (view == 0x3F80).all()
        del view
        gc.collect()
        assert memory.empty(LARGE, torch.bfloat16).data_ptr() == at


def test_a_tensor_outlives_its_pool():
    """Nobody is lent what it still lies in."""
    with memory.recycling(POOL):
        kept = memory.empty(LARGE, torch.bfloat16).fill_(1.0)
    memory.empty(LARGE, torch.bfloat16).fill_(2.0)
    assert (kept == 1.0).all()


def test_what_is_held_is_bounded():
    """What is larger than the limit is not lent, and nothing lies idle beyond the limit."""
    with memory.recycling(20 << 20):
        pool = memory._own.pool
        tensors = [memory.empty(LARGE, torch.bfloat16) for _ in range(4)]
        tensors.append(memory.empty((30 << 20,), torch.uint8))
        del tensors
        gc.collect()
        assert len(pool._idle) == 2
        large = memory.empty((9 << 20,), torch.uint8)  # does not fit beside both
        assert pool._leased == 9 << 20
        assert len(pool._idle) == 1
        del large
        gc.collect()
        assert pool._leased == 0
        assert sum(block.nbytes for block in pool._idle) <= 20 << 20


def test_units_of_two_sizes_in_turn_make_memory_once(monkeypatch):
    """What large units leave stays for the next large one while small ones run, if all of it is within the limit."""
    made = []
    plain = memory.advise
    monkeypatch.setattr(memory, "advise", lambda block: (made.append(block.nbytes), plain(block))[1])
    with memory.recycling(POOL):
        for _ in range(3):
            for size in (8 << 20, 26 << 20):
                tensors = [memory.empty((part,), torch.uint8) for part in (size, size // 2)]
                del tensors
                gc.collect()
    assert made == [8 << 20, 4 << 20, 26 << 20, 13 << 20]


def test_a_small_tensor_keeps_no_large_block():
    """What lives on in a pool's memory takes at most twice its own."""
    with memory.recycling(POOL):
        pool = memory._own.pool
        large = memory.empty((60 << 20,), torch.uint8)
        del large
        gc.collect()
        small = memory.empty((8 << 20,), torch.uint8)
        assert [block.nbytes for block in pool._idle] == []  # let go of: it made room for the small one
        assert small.fill_(1).sum() == 8 << 20


@pytest.mark.parametrize("pool", [0, POOL])
def test_another_default_device_changes_nothing(pool):
    """The memory is the CPU's."""
    with torch.device("meta"), memory.recycling(pool):
        assert memory.empty(LARGE, torch.bfloat16).device.type == "cpu"
        assert memory.clone(torch.zeros(3, device="cpu")).device.type == "cpu"


def test_threads_have_pools_of_their_own():
    """One that has asked for none has none."""
    found = []

    def work() -> None:
        found.append(getattr(memory._own, "pool", None))

    with memory.recycling(POOL):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found == [None]
