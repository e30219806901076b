"""CUDA kernels on a CPU: their sources compiled by a C++ compiler, with tests/native/simulator.h in CUDA's place.

Where there is a GPU, the same tests run on it: what a launch is given is copied there, and back.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("lowbit.backends.cuda", reason="no CUDA compiler", exc_type=ImportError)  # skips whoever imports it

from lowbit.backends.cuda import compiler, kernels

_SIMULATOR = Path(__file__).parents[1] / "native"
_HEADER = "simulator.h"
_LAUNCH = kernels.launch  # before a test puts the one below in its place


def require() -> str:
    """The C++ compiler; skips the test without one."""
    return shutil.which("g++") or shutil.which("clang++") or pytest.skip("no C++ compiler to simulate a GPU with")


def launch(
    source: str, name: str, device: torch.device, grid, block: int, arguments, shared: int = 0, registers: int = 0
) -> None:
    """What `kernels.launch` does, simulated: a stand-in for it in tests."""
    if torch.cuda.is_available():
        _launch_there(torch.device("cuda", 0), source, name, grid, block, arguments, shared, registers)
        return
    run = _library(source, name)
    values = []
    for value in arguments:
        if value is None:
            values.append(ctypes.c_void_p(0))
        elif isinstance(value, torch.Tensor):
            values.append(ctypes.c_void_p(value.data_ptr()))
        elif isinstance(value, float):
            values.append(ctypes.c_float(value))
        else:
            values.append(ctypes.c_int(value))
    sizes = (*((grid,) if isinstance(grid, int) else grid), 1, 1)
    run(*sizes[:3], block, shared, *values)


def _launch_there(there: torch.device, source: str, name: str, grid, block: int, arguments, *sizes: int) -> None:
    """Launch with copies of the tensors on a device, and copy back what they hold then."""
    tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
    copies = {id(tensor): tensor.to(there) for tensor in tensors}
    given = [copies.get(id(value), value) for value in arguments]
    _LAUNCH(source, name, there, grid, block, given, *sizes)
    for tensor in tensors:
        tensor.copy_(copies[id(tensor)])


@functools.cache
def _library(source: str, name: str):
    """A function (three sizes of the grid, block, shared memory, kernel's arguments...): one instance of a kernel."""
    types = _parameters(source, name)
    declared = ", ".join(f"{kind} a{i}" for i, kind in enumerate(types))
    passed = ", ".join(f"a{i}" for i in range(len(types)))
    text = (
        f'#include "{compiler.FOLDER / source}"\n'
        f'extern "C" void run(unsigned x, unsigned y, unsigned z, unsigned block, unsigned shared, {declared}) {{\n'
        f"  simulator::launch({{x, y, z}}, block, shared, [=] {{ {name}({passed}); }});\n}}\n"
    )
    header = _compiled_header()
    made = header.parent / f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.cpp"
    made.write_text(text)
    device = compiler.FOLDER / "device"
    _compile("-shared", f"-I{_SIMULATOR}", f"-I{device}", "-include", header, "-o", made.with_suffix(".so"), made)
    return ctypes.CDLL(str(made.with_suffix(".so"))).run


@functools.cache
def _compiled_header() -> Path:
    """The simulator, compiled once for all kernels of this process."""
    folder = tempfile.mkdtemp(prefix="lowbit-simulator-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    header = Path(folder, _HEADER)
    _compile("-x", "c++-header", "-o", header.with_suffix(".h.gch"), _SIMULATOR / _HEADER)
    return header


def _compile(*arguments: str | Path) -> None:
    command = [require(), "-std=c++17", "-O1", "-fPIC", "-w", *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert not done.returncode, done.stderr


def _parameters(source: str, name: str) -> list[str]:
    """The types of a kernel's parameters, read from its source."""
    short = re.sub(r"<.*", "", name).rpartition("::")[2]
    text = (compiler.FOLDER / source).read_text()
    found = re.search(rf"\b{short}\(([^)]*)\)\s*\{{", text)
    assert found, f"no kernel {short} in {source}"
    return [parameter.strip().rpartition(" ")[0].replace("__restrict__", "") for parameter in found[1].split(",")]
