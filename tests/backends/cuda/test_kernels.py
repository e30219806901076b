from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import cuda_simulator

pytest.importorskip("lowbit.backends.cuda", reason="no CUDA compiler", exc_type=ImportError)

from lowbit.backends.cuda import kernels


def test_architecture():
    """Capabilities with instructions of their own are compiled for themselves alone, the others for their family."""
    names = {(7, 5): "sm_75", (8, 6): "sm_86", (9, 0): "sm_90a", (10, 0): "sm_100a", (12, 0): "sm_120a"}
    assert {capability: kernels.architecture(capability) for capability in names} == names


# The driver is a fake one that writes down what the real bindings hand to it.
LAUNCHES = """
import contextlib, threading, types
import torch
from lowbit.backends.cuda import compiler, kernels
from lowbit.errors import UnsupportedError

torch.cuda.device = lambda index: contextlib.nullcontext()
torch.cuda.get_device_capability = lambda index: (9, 0)
torch.cuda.current_stream = lambda: types.SimpleNamespace(cuda_stream=7)
compiler.compiled = lambda *what: compiler.Binary("-".join(what).encode(), "symbol")
x, device = torch.zeros(3), torch.device("cuda", 1)
print(hex(x.data_ptr()))
for grid in (3, (4, 5), (6, 7, 8)):
    kernels.launch("a.cu", "f<1>", device, grid, 64, [x, -2, 0.5, None], 1024)
thread = threading.Thread(target=kernels.launch, args=("a.cu", "f<1>", device, 2, 32, [x, 1, 2.0, None], 100_000))
thread.start()
thread.join()
kernels.launch("a.cu", "f<1>", device, 2, 32, [x, 1, 2.0, None], 0, 80)
for arguments, sizes in (([], (300_000,)), ([], (0, 168)), ([1 << 31], ())):
    try:
        kernels.launch("a.cu", "f<1>", device, 2, 32, arguments, *sizes)
    except UnsupportedError as error:
        print(error)
"""


def test_launch(tmp_path):
    """The driver gets grid, block, memory, torch's stream and every kind of argument; a kernel is loaded once."""
    library, notes = tmp_path / "libcuda.so.1", tmp_path / "notes"
    source = Path(__file__).parents[2] / "native" / "fake_driver.c"
    subprocess.run([cuda_simulator.require(), "-x", "c", "-shared", "-fPIC", "-o", library, source], check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "LOWBIT_FAKE_DRIVER": str(notes)}
    run = subprocess.run(
        [sys.executable, "-c", LAUNCHES], check=True, env=environment, capture_output=True, text=True
    )  # fmt: skip
    address, *refused = run.stdout.splitlines()
    said = notes.read_text().splitlines()
    assert said == [
        "retain 1",
        "enter 1",
        "captures 2",  # loading is no part of a graph that is captured meanwhile
        "load a.cu-",
        "function symbol 1",
        "captures 0",  # as it was before
        f"launch 1 3 1 1 64 1 1 1024 0x7 {address} -2 0.5 1 1",
        f"launch 1 4 5 1 64 1 1 1024 0x7 {address} -2 0.5 1 1",
        f"launch 1 6 7 8 64 1 1 1024 0x7 {address} -2 0.5 1 1",
        "retain 1",  # another thread
        "enter 1",
        "captures 2",
        "load a.cu-",
        "function symbol 1",
        "attribute 1 8 100000",  # more shared memory than a kernel has without asking
        "captures 0",
        f"launch 1 2 1 1 32 1 1 100000 0x7 {address} 1 2 1 1",
        "captures 2",
        "load a.cu-",
        "function symbol 1",
        "asked 4 1",  # as many registers as it needs
        "captures 0",
        f"launch 1 2 1 1 32 1 1 0 0x7 {address} 1 2 1 1",
        "captures 2",
        "load a.cu-",
        "function symbol 1",
        "attribute 1 8 300000",
        "captures 0",  # after a failure, too
        "captures 2",
        "load a.cu-",
        "function symbol 1",
        "asked 4 1",
        "captures 0",
    ]
    shared, registers, large = refused
    assert shared == (
        "giving the CUDA kernel f<1> 300000 bytes of shared memory on GPU 1 failed: "
        "the driver says CUDA_ERROR_INVALID_VALUE"
    )
    assert registers.startswith("the CUDA kernel f<1> was compiled to 80 registers a thread and needs 168")
    assert "2147483648 is beyond the 32 bits" in large


def test_a_later_process_needs_no_compiler():
    """Launching imports the bindings of the driver alone."""
    loaded = "sys.exit('cuda.bindings.nvrtc' in sys.modules)"
    code = f"import sys; import lowbit.backends.cuda.kernels as k; k._driver(); {loaded}"
    assert not subprocess.run([sys.executable, "-c", code], check=False).returncode
