"""The memory that second moments take where the caller does not say."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lowbit
from lowbit import devices
from lowbit.calibration.options import MEMORY
from lowbit.calibration.room import room_on

GIB = 2**30
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Sets what is free: in the machine's memory, on its GPU, and in the container."""

    def told(available: int, rss: int = 0, gpu: int = 0, limit: str = "max"):
        fake = SimpleNamespace(
            virtual_memory=lambda: SimpleNamespace(available=available),
            Process=lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=rss)),
        )
        monkeypatch.setitem(sys.modules, "psutil", fake)
        monkeypatch.setattr(devices.util, "find_spec", lambda _: fake)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (gpu, 2 * gpu))
        (tmp_path / "limit").write_text(f"{limit}\n")
        monkeypatch.setattr(devices, "_LIMITS", (str(tmp_path / "limit"), str(tmp_path / "none")))

    return told


def test_half_of_what_is_free(machine):
    """In whole GiB; with gradients, which take as much again, a third; less than a GiB as it is."""
    machine(21 * GIB)
    assert room_on([CPU, CPU], gradients=False) == 10 * GIB
    assert room_on([CPU], gradients=True) == 7 * GIB
    machine(GIB)
    assert room_on([CPU], gradients=False) == GIB // 2


def test_a_container_allows_less_than_the_machine_has(machine):
    """Its limit, without what the process holds already, is what is free."""
    machine(64 * GIB, rss=2 * GIB, limit=str(8 * GIB))
    assert room_on([CPU], gradients=False) == 3 * GIB
    machine(64 * GIB, rss=9 * GIB, limit=str(8 * GIB))
    assert room_on([CPU], gradients=False) == 0


def test_there_is_room_for_the_widest_input(machine):
    """Whatever is free: nothing is left with a diagonal that nobody asked for."""
    machine(0)
    found = lowbit.calibrate(nn.Linear(64, 32), [torch.randn(4, 64) for _ in range(4)])
    assert next(iter(found.values())).hessian.shape == (64, 64)


def test_the_memory_of_another_run_is_not_taken_over(machine, tmp_path):
    """It may be one that a user gave for another model."""
    path, batches = tmp_path / "s.safetensors", [torch.randn(4, 64) for _ in range(4)]

    def dying():
        yield from batches[:3]
        raise KeyboardInterrupt

    machine(8 * GIB)
    with pytest.raises(KeyboardInterrupt):
        lowbit.calibrate(nn.Linear(64, 32), dying(), path=path, memory="30kB", snapshot_every=0.0)
    assert path.with_name("s.safetensors.progress").exists()
    with lowbit.calibrate(nn.Linear(64, 16), batches, path=path) as found:
        assert found.contents.options["memory"] == 4 * GIB


def test_the_fullest_device_decides(machine):
    """Moments are kept where the inputs are."""
    machine(64 * GIB, gpu=10 * GIB)
    assert room_on([GPU], gradients=False) == 5 * GIB
    assert room_on([CPU, GPU], gradients=False) == 5 * GIB


def test_where_nobody_tells(machine, monkeypatch):
    """On other devices, and without psutil."""
    machine(64 * GIB)
    assert room_on([torch.device("xpu")], gradients=False) == MEMORY
    monkeypatch.setattr(devices.util, "find_spec", lambda _: None)
    assert room_on([CPU], gradients=False) == MEMORY


def test_this_machine_has_something_free():
    """What psutil says, and no more than all there is."""
    psutil = pytest.importorskip("psutil")
    assert 0 < devices.free_bytes(CPU) <= psutil.virtual_memory().total


def test_an_interrupted_run_keeps_its_memory(machine, tmp_path):
    """Whatever is free when it goes on: passes, and the file's bytes, are those of a run that was not interrupted."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
    batches = [torch.randn(4, 64) for _ in range(6)]

    def dying():
        yield from batches[:4]
        raise KeyboardInterrupt

    class Once:
        """Batches of which the first pass is interrupted."""

        first = True

        def __iter__(self):
            first, Once.first = Once.first, False
            return dying() if first else iter(batches)

    machine(8 * GIB)
    lowbit.calibrate(model, batches, path=tmp_path / "straight.safetensors").close()
    with pytest.raises(KeyboardInterrupt):
        lowbit.calibrate(model, Once(), path=tmp_path / "stopped.safetensors", snapshot_every=0.0)
    machine(2 * GIB)
    with lowbit.calibrate(model, Once(), path=tmp_path / "stopped.safetensors", snapshot_every=0.0) as found:
        assert found.contents.options["memory"] == 4 * GIB
    assert (tmp_path / "straight.safetensors").read_bytes() == (tmp_path / "stopped.safetensors").read_bytes()
