"""Encoders and decoders: weights a second, and the memory they read and write against copying.

Two things are measured. Into memory that is there, against copying into memory that is there: what the kernels do. And
as one call in a program gets it, into fresh pages, against a `clone()` into fresh pages: most of either is then spent
by the system, which makes and clears these pages.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import cpu_machine
from benchmarks.cpu_timing import Contender, alternate, quartiles
from lowbit import QuantizedTensor, dispatch
from lowbit.formats import Format, parse_spec
from lowbit.solvers import solve

SPECS = ("fp8_e4m3", "fp8_e4m3(granularity=row)", "int8", "int8(rotation=256)", "awq_w4a16", "wna16(group_size=64)",
         "mxfp4", "mxfp8", "nvfp4", "svdquant_w4a4", "convrot_w4a4", "w4a8_codebook")  # fmt: skip
SEARCHED = ("nvfp4", "awq_w4a16")  # also with the search for scales
SHAPE = (12288, 3072)
SLOW = 1.0  # seconds of one call: a smaller weight is used, and the result says how many rows
LEAST_ROWS = 256


def measure(specs: tuple[str, ...], shape: tuple[int, int], budget: float, rounds: int) -> dict[str, Any]:
    """Every encoder and decoder in turn with a copy of as many bytes as the bfloat16 weight has; then with a clone."""
    n, k = shape
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    copying = [Contender(name, run) for name, run in cpu_machine.copiers(w).items()]
    found = [one for spec in specs for one in _codecs(parse_spec(spec), w)]
    into_fresh = [Contender(one.name, one.call) for one, _ in found]
    cloning = Contender("clone", lambda _: w.clone())
    with torch.inference_mode():
        with cpu_machine.reused_memory(reused=True) as reused:
            alternate([*copying, *(contender for contender, _ in found)], rounds, budget)
        with cpu_machine.reused_memory(reused=False):
            alternate([cloning, *into_fresh], rounds, budget)
    copied = max(2 * w.nbytes / one.median / 1e9 for one in copying)
    cloned = 2 * w.nbytes / cloning.median / 1e9
    rows = []
    for (contender, known), fresh in zip(found, into_fresh, strict=True):
        weights, nbytes = known["rows"] * k, known.pop("bytes")
        speeds = _speeds(contender, weights, nbytes, copied)
        rows.append({**known, **speeds, "fresh": _speeds(fresh, weights, nbytes, cloned)})
    return {"shape": [n, k], "copy_gb_s": copied, "clone_gb_s": cloned, "reused": reused, "rows": rows}


def _speeds(contender: Contender, weights: int, nbytes: int, copied: float) -> dict[str, Any]:
    seconds = contender.median
    return {
        "seconds": seconds,
        "quartiles": quartiles(contender.times),
        "weights_s": weights / seconds,
        "gb_s": nbytes / seconds / 1e9,
        "share": nbytes / seconds / 1e9 / copied,
    }


def _codecs(fmt: Format, w: Tensor) -> Iterator[tuple[Contender, dict[str, Any]]]:
    """What to time for a format, each with what is known of it before."""
    for solver in ("rtn", "scale_search") if fmt.spec in SEARCHED else ("rtn",):
        encode = _encoder(fmt, solver)
        rows = _rows_that_fit(encode, w)
        piece = w[:rows]
        written = fmt.nbytes(rows, w.shape[1])
        name, kernel = f"quantize, {solver}", f"solver {solver}"
        if solver == "rtn":
            name, kernel = "quantize", dispatch.select("quantize", fmt.name, "", "cpu", (fmt, piece, None)).name
        yield (
            Contender(f"{fmt.spec} {name}", lambda _, run=encode, piece=piece: run(piece)),
            {"format": fmt.spec, "what": name, "kernel": kernel, "rows": rows,
             "bytes": written + piece.numel() * piece.element_size()},
        )  # fmt: skip
    quantized = QuantizedTensor.quantize(w[: _rows_that_fit(_encoder(fmt, "rtn"), w)], fmt)
    args = (fmt, quantized.parts, quantized.matrix, torch.bfloat16)
    kernel = dispatch.select("dequantize", fmt.name, "", "cpu", args)
    yield (
        Contender(f"{fmt.spec} dequantize", lambda _, weight=quantized: weight.dequantize()),
        {"format": fmt.spec, "what": "dequantize", "kernel": kernel.name,
         "rows": quantized.matrix[0], "bytes": quantized.nbytes_stored() + quantized.numel() * 2},
    )  # fmt: skip


def _encoder(fmt: Format, solver: str) -> Callable[[Tensor], object]:
    if solver == "rtn":
        return lambda piece: QuantizedTensor.quantize(piece, fmt)
    return lambda piece: solve(piece, fmt, solver, None)


def _rows_that_fit(encode: Callable[[Tensor], object], w: Tensor) -> int:
    """All rows, or as many as take about SLOW seconds; known from a few of them."""
    few = min(LEAST_ROWS, w.shape[0])
    encode(w[:few])
    began = time.perf_counter()
    encode(w[:few])
    took = time.perf_counter() - began
    fitting = int(few * SLOW / max(took, 1e-9)) // LEAST_ROWS * LEAST_ROWS
    return max(few, min(w.shape[0], fitting))
