"""A pytest plugin: the tests of the CPU kernels call kernels of another architecture, which an emulator runs.

`pytest -p tests.support.kernel_server tests/backends/cpu` with LOWBIT_KERNELS="qemu-aarch64 .../kernels_neon", which
tests/native builds. The instruction set is what the program's name ends with. A call's pointers are looked up among
the tensors whose data_ptr() was asked for, and the arrays of int64 whose buffer_info() was; their memory travels to
the program, and what it changed comes back.
"""

from __future__ import annotations

import bisect
import ctypes
import os
import shlex
import struct
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable, Iterator

import pytest
import torch

_COMMAND = shlex.split(os.environ.get("LOWBIT_KERNELS", ""))


class Memory:
    """Where the tensors and arrays lie whose addresses were asked for. It keeps them, so that no address means two."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[torch.UntypedStorage | array[int], int]] = {}
        self._plain_data_ptr = torch.Tensor.data_ptr

    def data_ptr(self, tensor: torch.Tensor) -> int:
        """What Tensor.data_ptr gives, noted down."""
        address = self._plain_data_ptr(tensor)
        if address:
            storage = tensor.untyped_storage()
            self._held[storage.data_ptr()] = (storage, storage.nbytes())
        return address

    def note_array(self, address: int, words: array[int]) -> None:
        """An array of int64 lies at this address."""
        self._held[address] = (words, words.itemsize * len(words))

    def regions(self, words: list[int]) -> list[tuple[int, int, bool]]:
        """(address, bytes, whether pointers are in it) of what numbers point to, and of what is pointed to there."""
        starts = sorted(self._held)
        found: dict[int, tuple[int, int, bool]] = {}
        todo = list(words)
        while todo:
            word = todo.pop()
            start = starts[at] if (at := bisect.bisect_right(starts, word) - 1) >= 0 else word + 1
            if start in found or not start <= word <= start + self._held[start][1]:
                continue
            owner, size = self._held[start]
            found[start] = (start, size, isinstance(owner, array))
            if isinstance(owner, array):
                todo += owner
        return [found[start] for start in sorted(found)]

    def forget(self) -> None:
        """Let go of what earlier tests held."""
        self._held.clear()


class Server:
    """The program, with its kernels as attributes: what `native.module()` gives in these tests."""

    def __init__(self, command: list[str], memory: Memory) -> None:
        self.ISA = command[-1].rpartition("_")[2]
        self._memory = memory
        self._lock = threading.Lock()
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __getattr__(self, name: str) -> Callable[..., int]:
        return lambda *args: self._call(name, args)

    def pool(self) -> tuple[bool, str]:
        """The program has one thread."""
        return False, "one thread"

    def _call(self, name: str, args: tuple[float, ...]) -> int:
        words = [struct.unpack("<Q", struct.pack("<d", a))[0] if isinstance(a, float) else int(a) % 2**64 for a in args]
        regions = self._memory.regions(words)
        with self._lock:
            self._write(struct.pack("<I", len(name)) + name.encode())
            self._write(struct.pack(f"<I{len(words)}QI", len(words), *words, len(regions)))
            for address, size, has_pointers in regions:
                self._write(struct.pack("<QQQ", address, size, has_pointers) + ctypes.string_at(address, size))
            self._process.stdin.flush()
            (length,) = struct.unpack("<I", self._read(4))
            if length:
                raise RuntimeError(self._read(length).decode())
            result, negative = struct.unpack("<QI", self._read(12))
            while (index := struct.unpack("<I", self._read(4))[0]) != 2**32 - 1:
                address, size, _ = regions[index]
                ctypes.memmove(address, self._read(size), size)
        return result - 2**64 if negative else result

    def close(self) -> None:
        """End the program."""
        self._process.communicate()

    def _write(self, data: bytes) -> None:
        self._process.stdin.write(data)

    def _read(self, size: int) -> bytes:
        data = self._process.stdout.read(size)
        if len(data) != size:
            raise RuntimeError(f"{shlex.join(_COMMAND)} ended with {self._process.wait()}")
        return data


def pytest_configure(config: pytest.Config) -> None:
    """Put the program in the place of this machine's module before any test is collected."""
    if not _COMMAND:
        raise pytest.UsageError("LOWBIT_KERNELS names no program")
    from lowbit.backends.cpu import native

    memory = Memory()
    server = Server(_COMMAND, memory)

    def data_ptr(tensor: torch.Tensor) -> int:
        return memory.data_ptr(tensor)

    class NotedArray(array):
        def buffer_info(self) -> tuple[int, int]:
            address, length = super().buffer_info()
            memory.note_array(address, self)
            return address, length

    torch.Tensor.data_ptr = data_ptr
    for name, module in list(sys.modules.items()):
        if name.startswith("lowbit.backends.cpu.") and getattr(module, "array", None) is array:
            module.array = NotedArray
    native.module = lambda: server
    native.isa = lambda: server.ISA
    native.available = lambda: (server.ISA,)
    config.stash[_memory_key] = memory
    config.add_cleanup(server.close)


_memory_key: pytest.StashKey[Memory] = pytest.StashKey()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Memory is held for one test."""
    try:
        return (yield)
    finally:
        item.config.stash[_memory_key].forget()
