"""CUDA kernels on a CPU: their sources compiled by a C++ compiler, with tests/native/simulator.h in CUDA's place."""

from __future__ import annotations

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

from lowbit.backends.cuda import compiler

_SIMULATOR = Path(__file__).parents[1] / "native"


def require() -> str:
    """The C++ compiler; skips the test without one."""
    return shutil.which("g++") or shutil.which("clang++") or pytest.skip("no C++ compiler to simulate a GPU with")


def launch(source: str, name: str, device: torch.device, grid, block: int, arguments, shared: int = 0) -> None:
    """What `kernels.launch` does, simulated: a stand-in for it in tests."""
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
    folder = Path(tempfile.mkdtemp(prefix="lowbit-simulator-"))
    stem = hashlib.sha256(text.encode()).hexdigest()[:12]
    (folder / f"{stem}.cpp").write_text(text)
    command = [
        require(), "-std=c++17", "-O1", "-shared", "-fPIC", "-w", f"-I{_SIMULATOR}", f"-I{compiler.FOLDER / 'device'}",
        "-o", str(folder / f"{stem}.so"), str(folder / f"{stem}.cpp"),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True)
    return ctypes.CDLL(str(folder / f"{stem}.so")).run


def _parameters(source: str, name: str) -> list[str]:
    """The types of a kernel's parameters, read from its source."""
    short = re.sub(r"<.*", "", name).rpartition("::")[2]
    text = (compiler.FOLDER / source).read_text()
    found = re.search(rf"\b{short}\(([^)]*)\)\s*\{{", text)
    assert found, f"no kernel {short} in {source}"
    return [parameter.strip().rpartition(" ")[0].replace("__restrict__", "") for parameter in found[1].split(",")]
