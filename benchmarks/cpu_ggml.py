"""ggml's own product of a matrix in GGUF blocks, called through its shared libraries: what llama.cpp runs on a CPU.

No package carries these libraries by themselves. Build them from llama.cpp's sources, and name their folder:

    cmake -S llama.cpp/ggml -B ggml -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON && cmake --build ggml
    LOWBIT_GGML=ggml/src scripts/bench cpu

Weights lie in ggml's buffers, for the types that it rearranges for the processor in such a buffer, as llama.cpp loads
them. Activations are float32, which is what ggml multiplies; it rounds them to 8 bits.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from ctypes import c_bool, c_int, c_int64, c_size_t, c_void_p
from functools import cache as cached
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cpu_linears import Drawn, Entry, check_error, copies_for
from lowbit.numerics.gguf_blocks import GGML_TYPES

FOLDER = "LOWBIT_GGML"
LIMIT = 0.03  # of a relative error: activations of 8 bits
_F32 = 0
_REARRANGED = ("Q4_0", "Q4_K")
_REPACK_BUFFERS = "_Z35ggml_backend_cpu_repack_buffer_typev"  # not in its headers
_NUMBERS = {name: number for number, (name, *_) in GGML_TYPES.items()}


class _Context(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class Library(NamedTuple):
    """The functions used, as ggml.h, ggml-backend.h and ggml-cpu.h declare them."""

    init: Callable[..., int]
    matrix: Callable[..., int]
    multiply: Callable[..., int]
    graph: Callable[..., int]
    expand: Callable[..., None]
    allocate: Callable[..., int]
    put: Callable[..., None]
    get: Callable[..., None]
    compute: Callable[..., int]
    backend: Callable[..., int]
    threads: Callable[..., None]
    plain_buffers: Callable[..., int]
    repack_buffers: Callable[..., int] | None


def why_not() -> str | None:
    """Why it cannot be compared with, or None."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return f"{FOLDER} names no folder with its libraries"
    wanted = [Path(folder) / f"libggml-{part}.so" for part in ("base", "cpu")]
    return None if all(path.exists() for path in wanted) else f"{folder} has no {' and '.join(p.name for p in wanted)}"


@cached
def library() -> Library:
    """The libraries in the folder that `LOWBIT_GGML` names."""
    folder = Path(os.environ[FOLDER])
    base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)

    def function(where: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
        found = getattr(where, name)
        found.restype, found.argtypes = result, arguments
        return found

    at = c_void_p
    return Library(
        function(base, "ggml_init", at, _Context),
        function(base, "ggml_new_tensor_2d", at, at, c_int, c_int64, c_int64),
        function(base, "ggml_mul_mat", at, at, at, at),
        function(base, "ggml_new_graph", at, at),
        function(base, "ggml_build_forward_expand", None, at, at),
        function(base, "ggml_backend_alloc_ctx_tensors_from_buft", at, at, at),
        function(base, "ggml_backend_tensor_set", None, at, at, c_size_t, c_size_t),
        function(base, "ggml_backend_tensor_get", None, at, at, c_size_t, c_size_t),
        function(base, "ggml_backend_graph_compute", c_int, at, at),
        function(cpu, "ggml_backend_cpu_init", at),
        function(cpu, "ggml_backend_cpu_set_n_threads", None, at, c_int),
        function(base, "ggml_backend_cpu_buffer_type", at),
        function(cpu, _REPACK_BUFFERS, at) if hasattr(cpu, _REPACK_BUFFERS) else None,
    )


class Product:
    """One weight in ggml's memory, and the graphs that multiply it, one for each number of tokens."""

    def __init__(self, kind: str, codes: Tensor, n: int, k: int) -> None:
        lib = library()
        self.backend, self.n, self.k = lib.backend(), n, k
        lib.threads(self.backend, torch.get_num_threads())
        self._context = lib.init(_Context(1 << 20, None, True))
        self._weight = lib.matrix(self._context, _NUMBERS[kind], k, n)
        rearranges = lib.repack_buffers if kind in _REARRANGED else None
        self._buffers = [lib.allocate(self._context, (rearranges or lib.plain_buffers)())]
        lib.put(self._weight, codes.data_ptr(), 0, codes.numel())
        self._graphs: dict[int, tuple[int, int, int]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """x float32 [M, K] -> [M, N]."""
        lib, m = library(), x.shape[0]
        if m not in self._graphs:
            context = lib.init(_Context(16 << 20, None, True))
            given = lib.matrix(context, _F32, self.k, m)
            result, graph = lib.multiply(context, self._weight, given), lib.graph(context)
            lib.expand(graph, result)
            self._buffers.append(lib.allocate(context, lib.plain_buffers()))
            self._graphs[m] = given, result, graph
        given, result, graph = self._graphs[m]
        lib.put(given, x.data_ptr(), 0, x.nbytes)
        if lib.compute(self.backend, graph):
            raise RuntimeError("ggml could not multiply")
        out = torch.empty(m, self.n)
        lib.get(result, out.data_ptr(), 0, out.numel() * 4)
        return out


def product(spec: str, drawn: Drawn, cache: int) -> Entry:
    """ggml's product with the very blocks of one of our weights."""
    codes, name = drawn.weight.parts["qdata"].contiguous(), f"ggml {drawn.fmt.config()['type']}"
    n, nbytes = codes.shape[0], codes.numel()
    kind = str(drawn.fmt.config()["type"])
    weights = [Product(kind, codes, n, drawn.k) for _ in range(copies_for(nbytes, cache))]

    def check(x: Tensor, y: Tensor) -> float:
        return check_error(name, y, drawn.exact(x), LIMIT)

    return Entry(name, lambda x, own: own(x), weights, nbytes, check, of=(spec,), input=Tensor.float)
