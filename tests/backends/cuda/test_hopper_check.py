from __future__ import annotations

import pytest
import torch

from tests.support import cuda_simulator

pytest.importorskip("lowbit.backends.cuda", reason="no CUDA compiler", exc_type=ImportError)

from lowbit.backends import gpu
from lowbit.backends.cuda import compiler, device_check, hopper_check, kernels
from lowbit.backends.gpu import Target, assume

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("seed", ["1", "2"])
def test_products_are_right(seed, monkeypatch):
    """As the documents say what the instructions do, all sums of the check are right."""
    monkeypatch.setenv("LOWBIT_SIMULATOR_SEED", seed)
    monkeypatch.setattr(kernels, "launch", cuda_simulator.launch)
    assert hopper_check.wrong_sums(CPU) == 0


def test_a_wrong_swizzle_is_seen(monkeypatch):
    """A GPU that finds operand B elsewhere has wrong sums."""
    monkeypatch.setattr(kernels, "launch", cuda_simulator.launch)
    right = hopper_check.tile()
    monkeypatch.setattr(hopper_check, "tile", lambda: right.view(32, 4, 16).flip(1).reshape(32, 64).contiguous())
    assert hopper_check.wrong_sums(CPU) > 0


def test_compiles():
    """It compiles for Hopper without a warning."""
    made = compiler.compile_now(hopper_check.SOURCE, hopper_check.NAME, "sm_90a")
    assert not made.warnings
    assert not made.spills


def test_refusals(monkeypatch):
    """The check runs once for a device; wrong sums, failed launches and captured graphs are refusals in words."""
    monkeypatch.setattr(hopper_check, "_found", {})
    monkeypatch.setattr(device_check, "_found", {GPU: None})
    monkeypatch.setattr(gpu, "_read", lambda *_: Target("cuda", (9, 0)))
    capturing, results = True, iter([0, 5, RuntimeError("out of memory"), 0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)

    def tried(_):
        found = next(results)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(hopper_check, "wrong_sums", tried)
    assert "call once before" in hopper_check.refuses(GPU)
    capturing = False
    assert hopper_check.refuses(GPU) is None
    assert hopper_check.refuses(GPU) is None
    hopper_check._found.clear()
    assert "5 sums" in hopper_check.refuses(GPU)
    hopper_check._found.clear()
    assert "out of memory" in hopper_check.refuses(GPU)
    assert hopper_check.refuses(GPU) is None  # tried again
    with assume(Target("cuda", (9, 0))):
        assert hopper_check.refuses(torch.device("meta")) is None
    with assume(Target("cuda", (10, 0))):
        assert "not of compute capability 9.0" in hopper_check.refuses(torch.device("meta"))
