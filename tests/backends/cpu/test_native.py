"""The compiled modules: which one is chosen, what is refused in words, and functions that every set has."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from lowbit.errors import DependencyError, UnsupportedError

cpu = pytest.importorskip("lowbit.backends.cpu", reason="no compiled kernels here", exc_type=ImportError)
native = cpu.native

CHECKSUM = """
import torch
from lowbit.backends.cpu import native, read_bandwidth
print(native.isa(), read_bandwidth(torch.arange(100_003)))
"""
HIDDEN = """
import torch
import lowbit
from lowbit import dispatch, errors
print(dispatch.load("cpu"))
weight = lowbit.QuantizedTensor.quantize(torch.ones(32, 64), "fp8_e4m3")
print(torch.nn.functional.linear(torch.ones(1, 64), weight)[0, 0].item())
try:
    with dispatch.use_backend("cpu"):
        pass
except errors.UnsupportedError as error:
    print(error)
"""
REFUSED = """
import torch
import lowbit
from lowbit import errors
for _ in range(2):
    try:
        weight = lowbit.QuantizedTensor.quantize(torch.ones(32, 64), "fp8_e4m3")
        print(torch.nn.functional.linear(torch.ones(1, 64), weight)[0, 0].item())
    except errors.DependencyError as error:
        print(error)
"""


def start(code, **environment):
    """Another Python, with the lowbit that is tested here."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **environment}
    return subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)


def words(tensor) -> int:
    """The sum of a tensor's 64-bit words and of the bytes behind the last whole one, modulo 2^64."""
    raw = tensor.view(torch.uint8).numpy().tobytes()
    whole = len(raw) // 8 * 8
    return (sum(np.frombuffer(raw[:whole], np.uint64).tolist()) + sum(raw[whole:])) % 2**64


def test_the_set_with_the_most_instructions_is_chosen(monkeypatch):
    """Without LOWBIT_CPU_ISA the first available set is used, and never an emulated one."""
    monkeypatch.delenv("LOWBIT_CPU_ISA", raising=False)

    assert native.isa.__wrapped__() == native.available()[0]
    assert native.available()[0] in native.SETS
    assert set(native.available()) <= {*native.SETS, *native.EMULATED}


@pytest.mark.parametrize(
    ("runnable", "built", "why"),
    [
        (["portable"], True, "this machine cannot run it"),
        (["portable", "avx2", "avx512", "amx"], False, "not part of this build"),
        (["portable", "avx2", "avx512", "amx"], True, "the system lets nobody"),
    ],
)
def test_a_set_that_is_not_there_is_refused_with_those_that_are(monkeypatch, tmp_path, runnable, built, why):
    """Forcing never falls back: the error says whether machine, build or system lacks the set, and what can be used."""
    machine = native._load("_machine")
    there = {"_machine", "_native_portable", *(["_native_amx"] if built else [])}
    monkeypatch.setattr(native, "_path", lambda name: tmp_path if name in there else None)
    monkeypatch.setattr(machine, "runnable", lambda: runnable)
    monkeypatch.setattr(machine, "why_no_tiles", lambda: "the system lets nobody")
    available = native.available.__wrapped__()
    monkeypatch.setattr(native, "available", lambda: available)
    monkeypatch.setenv("LOWBIT_CPU_ISA", "amx")

    with pytest.raises(DependencyError, match=f"LOWBIT_CPU_ISA=amx: {why}; usable here: portable"):
        native.isa.__wrapped__()


def test_an_unknown_set_is_refused_with_the_known_ones(monkeypatch):
    """A misspelled name is an error that lists every name there is and those that can be used."""
    monkeypatch.setenv("LOWBIT_CPU_ISA", "avx3")

    with pytest.raises(DependencyError, match=r"unknown instruction set; the known ones are amx, .*; usable here: "):
        native.isa.__wrapped__()


def test_a_set_that_is_not_there_is_never_passed_over():
    """Where nothing was said of the backend, either: the first product ends in the error, and runs on no other one."""
    product, refused = start(REFUSED, LOWBIT_CPU_ISA="avx3").communicate(timeout=60)[0].splitlines()

    assert product == refused
    assert product.startswith("LOWBIT_CPU_ISA=avx3: unknown instruction set")


def test_all_sets_agree_and_each_can_be_forced():
    """Every available set, forced in a process of its own, is the one that runs there, and sums the same bytes."""
    running = [start(CHECKSUM, LOWBIT_CPU_ISA=name) for name in native.available()]
    found = dict(process.communicate(timeout=60)[0].split() for process in running)

    assert found == dict.fromkeys(native.available(), str(words(torch.arange(100_003))))


def test_without_modules_everything_runs_on_pytorch(tmp_path):
    """A package without compiled modules imports and computes; backend and doctor name both ways to get them."""
    environment = {"LOWBIT_CPU_MODULES": str(tmp_path)}
    if "LOWBIT_CPU_ISA" in os.environ:
        environment["LOWBIT_CPU_ISA"] = ""
    process = start(HIDDEN, **environment)
    said, product, refused = process.communicate(timeout=60)[0].splitlines()

    assert "scripts/build_native" in said
    assert "pip install" in said
    assert float(product) == 64
    assert refused == f"the cpu backend cannot be used: {said}"


@pytest.mark.parametrize("count", [0, 1, 7, 8, 255, 256, 257, 2**20 - 1, 2**20 + 9, 3 * 2**20 + 300])
@pytest.mark.parametrize("threads", [1, 3])
def test_reading_and_copying_touch_every_byte_once(count, threads):
    """Sums and copies of any number of bytes, from any address, are exact on any number of threads."""
    source = torch.randint(0, 256, (count + 1,), dtype=torch.uint8)[1:]
    to = torch.full((count + 2,), 7, dtype=torch.uint8)
    module = native.module()
    module.copy_bandwidth(to.data_ptr() + 1, source.data_ptr(), count, threads)

    assert module.read_bandwidth(source.data_ptr(), count, threads) == words(source.clone())
    assert torch.equal(to[1:-1], source)
    assert (to[0], to[-1]) == (7, 7)


def test_bandwidth_functions_take_tensors_and_refuse_what_they_cannot_walk():
    """Contiguous tensors on the CPU are summed and copied; others, and unequal sizes, are refused in words."""
    x, y = torch.randn(300, 70), torch.empty(300, 70)
    cpu.copy_bandwidth(y, x)

    assert torch.equal(x, y)
    assert cpu.read_bandwidth(x) == words(x)
    with pytest.raises(UnsupportedError, match="is not contiguous"):
        cpu.read_bandwidth(x.t())
    with pytest.raises(UnsupportedError, match="lies on meta"):
        cpu.copy_bandwidth(torch.empty(300, 70, device="meta"), x)
    with pytest.raises(UnsupportedError, match="give equal sizes"):
        cpu.copy_bandwidth(y[1:], x)


@pytest.mark.parametrize("address", [None, 1.0, "1", -1, 2**64])
def test_only_an_address_is_taken_for_one(address):
    """What is no int, or does not fit in a pointer, is refused before anything is read."""
    with pytest.raises(TypeError, match="incompatible function arguments"):
        native.module().read_bandwidth(address, 0, 1)


def test_threads_are_those_of_torch():
    """As many threads are asked for as torch is set to, at every call."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 2)
        assert native.threads() == before + 2
    finally:
        torch.set_num_threads(before)
